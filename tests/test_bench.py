# SPDX-License-Identifier: Apache-2.0
"""`fullbeam bench`, and the benchmarks that start other processes: what they say, how they end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from benchmarks import engine, harness, load, peers, steps
from fullbeam import _core, bench, cli
from fullbeam.models import open_model
from tiny_models import Tiny

ROOT = Path(__file__).parents[1]
PACKAGES = str(Path(bench.__file__).parents[1])  # installed, or of the tree
SERVER = """
import http.server, sys, time
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"{}")
    def do_POST(self):
        open(sys.argv[0] + ".asked", "w").close()
        time.sleep(100)
port = int(sys.argv[sys.argv.index("--port") + 1])
http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = Tiny(context_len=1024, num_layers=1)
    path = tmp_path_factory.mktemp("bench") / "tiny.gguf"
    return model.write(path, model.weights(seed=1), "Q8_0")


def test_int8_rate_is_that_of_the_instruction_set(isa: str) -> None:
    rate = _core.int8_ops_per_second()
    assert rate == 0 if isa == "portable" else rate > 1e9


def test_a_load_is_the_bytes_and_products_of_the_weights(tiny: Path) -> None:
    load = bench.Load.of(open_model(tiny, threads=1).decoder.weights)
    assert load.layer_products == 64 * (64 + 2 * 32) + 64 * 64 + 3 * 64 * 96
    assert load.head_products == 300 * 64
    assert load.step_bytes >= (load.layer_products + load.head_products) * 34 // 32
    assert peers.load_of(tiny)[0].layer_products == load.layer_products
    assert peers.load_of(tiny)[0].head_products == load.head_products
    assert load.spared_bytes == -(-300 // 16) * 16 * 64 // 2  # in whole panels of 16 rows
    assert peers.load_of(tiny)[0].spared_bytes == 300 * 64 // 2


def test_ops_are_timed_with_empty_caches() -> None:
    assert harness.median_us(lambda: None, harness.Cache().flush, limit_s=0.001) >= 0


def test_shares_of_the_ceilings() -> None:
    load = bench.Load(10**6, spared_bytes=10**5, layer_products=10**6, head_products=10**5)
    ceilings = bench.Ceilings(read_bytes=1e9, int8_ops=1e10)
    task = bench.Task(num_seqs=8, num_prompt=64, max_tokens=33)
    values = task.values(first_s=1.0, total_s=1.0 + 32 * 0.002, tokens_between=8 * 32)
    assert values["tok/s"] == pytest.approx(8 / 0.002)
    assert values["ms a step"] == pytest.approx(2)
    assert values["prompt tok/s"] == 8 * 64
    shares = task.shares(values, load, ceilings)
    assert shares["%read"] == pytest.approx(100 * 500 * 1e6 / 1e9)
    assert shares["%int8"] == pytest.approx(100 * 2 * 500 * 8 * 1.1e6 / 1e10)
    one = bench.Task(num_seqs=1, num_prompt=64, max_tokens=33)
    assert one.shares(values, load, ceilings)["%read"] == pytest.approx(100 * 500 * 0.9e6 / 1e9)


def test_bench_measures_and_writes_json(tiny: Path, tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    words = ["bench", str(tiny), "--rounds", "1", "--threads", "1", "--json", str(file)]
    result = CliRunner(env={"COLUMNS": "80"}).invoke(cli.main, words)
    assert result.exit_code == 0, result.output
    found = json.loads(file.read_text())
    assert [row["task"] for row in found["rows"]] == list(bench.TASKS)
    assert found["threads"] == 1
    assert found["read_GB/s"] > 0
    for row in found["rows"]:
        task = bench.TASKS[row["task"]]
        assert row["prompt tok/s"]["median"] > 0
        assert ("tok/s" in row) == (task.max_tokens > 1 and task.num_beams == 1)
    assert "beam search" in result.output
    assert "\u2026" not in result.output  # nothing is cut off


def test_bench_refuses_a_short_context(tmp_path: Path) -> None:
    model = Tiny(num_layers=1)
    path = model.write(tmp_path / "short.gguf", model.weights(seed=1))
    result = CliRunner().invoke(cli.main, ["bench", str(path)])
    assert result.exit_code == 2
    assert "context must be at least 513, got 512" in result.output


def test_bench_looks_for_the_folder_of_its_file_first(tmp_path: Path) -> None:
    words = ["bench", str(tmp_path / "no.gguf"), "--json", str(tmp_path / "none" / "x.json")]
    result = CliRunner().invoke(cli.main, words)
    assert result.exit_code == 2
    assert "json must be in a folder that exists, got " in result.output


def test_what_fails_in_a_request_is_raised(tiny: Path) -> None:
    engine = bench.Bench(open_model(tiny, threads=1)).engine
    with pytest.raises(ValueError, match="1000000"):
        bench.run(engine, [[10**6]], bench.Task(1, 1, 1).params)


def test_steps_names_every_op_and_all_of_the_time(
    tiny: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "steps.jsonl"
    words = ["--only", "decode-8", "--repeats", "2", "--threads", "1", "--json", str(file)]
    assert steps.main([str(tiny), *words]) == 0
    _, *rows = map(json.loads, file.read_text().splitlines())
    names = [row["op"] for row in rows]
    linears = [f"linear {name}" for name in ("qkv", "attention_out", "up", "down", "head")]
    assert {"embedding", "rope", "kv_write", "attention_decode", *linears} <= set(names)
    assert names[-2:] == ["rest", "whole step"]
    assert sum(row["us"] for row in rows[:-1]) == pytest.approx(rows[-1]["us"])
    assert all(row["GOP/s"] > 0 for row in rows if row["op"] in linears)


def fake_runtimes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Let every runtime be this one, under its name, but for what is not there."""
    worker = tmp_path / "worker.py"
    worker.write_text(
        f"""
import sys, time
sys.path.insert(0, {str(ROOT / "benchmarks")!r})
import peer_worker
class Other(peer_worker.Fullbeam):
    has_groups = False
    def run(self, prompts, task):
        if task["max_tokens"] == 1:
            raise ValueError("no prompts here")
        result = super().run(prompts, task)
        return result | {{"token_ids": [[ids[0] + 1] for ids in result["token_ids"]]}}
class Absent(peer_worker.Fullbeam):
    packages = ("not-a-distribution",)
peer_worker.SYSTEMS |= {{"llama.cpp": Other, "ctranslate2": Absent}}
sys.exit(peer_worker.main(sys.argv[1:]))
"""
    )
    monkeypatch.setattr(peers, "WORKER", worker)


def test_peers_compares_warns_and_leaves_out(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    fake_runtimes(monkeypatch, tmp_path)
    monkeypatch.setenv("PYTHONPATH", PACKAGES)
    file = tmp_path / "out.jsonl"
    words = ["--rounds", "2", "--threads", "1", "--peers", "llama.cpp,ctranslate2"]
    rows = ["decode-2", "prompt-512", "beam-4", "groups-4x2"]
    before = signal.getsignal(signal.SIGTERM)
    try:
        peers.main([str(tiny), *words, "--only", ",".join(rows), "--json", str(file)])
    finally:
        signal.signal(signal.SIGTERM, before)
    out, err = capfd.readouterr()
    assert "has no not-a-distribution: ctranslate2 is left out" in err
    assert "llama.cpp fails at prompt-512: no prompts here" in err
    assert "decode-2: llama.cpp has 0 % of fullbeam's first tokens" in out
    _, *lines = map(json.loads, file.read_text().splitlines())
    found = {(line["row"], line["runtime"]): line for line in lines}
    theirs = {(row, "llama.cpp") for row in ("decode-2", "beam-4")}
    assert set(found) == {(row, "fullbeam") for row in rows} | theirs
    line = found["decode-2", "llama.cpp"]
    ratio = line["ratio"]
    assert 0 < ratio["min"] <= ratio["median"] <= ratio["max"]
    assert found["decode-2", "fullbeam"]["%same"] == 100


def end_by_sigterm(command: list[str], is_under_way: Any) -> tuple[float, int]:
    """Return the seconds that a process takes to end, and its status."""
    environment = os.environ | {"PYTHONPATH": PACKAGES}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL) as process:
        until = time.monotonic() + 60
        while not is_under_way() and process.poll() is None and time.monotonic() < until:
            time.sleep(0.05)
        assert process.poll() is None
        assert is_under_way()
        begin = time.monotonic()
        process.terminate()
        status = process.wait(60)
        return time.monotonic() - begin, status


def running(text: str) -> list[int]:
    """Return the processes with this in their command."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if text in path.read_text() and int(path.parent.name) != os.getpid():
                found.append(int(path.parent.name))
        except OSError:  # ended meanwhile
            pass
    return found


def test_peers_ends_at_once_and_leaves_no_process(tiny: Path) -> None:
    rounds = ["--rounds", "100000", "--threads", "1", "--only", "decode-1", "--peers", "llama.cpp"]
    command = [sys.executable, "-m", "benchmarks", "peers", str(tiny), *rounds]
    worker = f"peer_worker.py\0fullbeam\0{tiny}"
    seconds, status = end_by_sigterm(command, lambda: running(worker))
    assert status == 143
    assert seconds < 10
    assert not running(worker)


def test_server_benchmark_ends_while_answers_are_under_way(tiny: Path, tmp_path: Path) -> None:
    script = tmp_path / "llama-server"
    script.write_text(f"#!{sys.executable}\n{SERVER}")
    script.chmod(0o755)
    command = [sys.executable, "-m", "benchmarks", "server", str(tiny), "--llama-server"]
    command += [str(script), "--rounds", "1", "--requests", "4", "--clients", "2", "--threads", "1"]
    asked = Path(f"{script}.asked")
    seconds, status = end_by_sigterm(command, asked.exists)
    assert status == 1
    assert seconds < 15
    assert not running(str(script) + "\0")


def test_load_says_what_a_process_took(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = load.measure(tiny, 1, None, rounds=2)
    assert [row["way"] for row in rows] == ["as stored"]
    assert rows[0]["files MiB"] == tiny.stat().st_size / 2**20
    assert 0 < rows[0]["load s"]["min"] <= rows[0]["load s"]["max"] < 60
    assert 10 < rows[0]["peak MiB"]["median"] < 2000
    with pytest.raises(SystemExit):
        load.main([str(tiny), "--quantize", "q8", "--rounds", "1"])
    assert "quantize" in capsys.readouterr().err


def test_engine_on_random_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "engine.json"
    assert (
        engine.main(["--shape", "tiny", "--rows", "1,3", "--rounds", "1", "--json", str(file)]) == 0
    )
    head, *rows = (json.loads(line) for line in file.read_text().splitlines())
    assert head["shape"] == "tiny"
    assert [row["what"] for row in rows] == [
        "1 rows",
        "3 rows",
        "first token, 200-token prompt",
        "step of 8 beams / of 8 drawn rows",
        "8 beams, 200 + 32 tokens",
    ]
    assert all(row["median"] > 0 for row in rows)
    assert "8 beams, 200 + 32 tokens" in capsys.readouterr().out


@pytest.mark.parametrize("options", [["--rows", "0"], ["--rows", "x"], ["--rounds", "0"]])
def test_engine_refuses_counts(options: list[str]) -> None:
    with pytest.raises(SystemExit):
        engine.main([*options, "--shape", "tiny"])
