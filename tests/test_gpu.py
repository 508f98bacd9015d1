# SPDX-License-Identifier: Apache-2.0
"""What benchmarks/gpu.sh runs on a GPU, as far as it runs without one."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from backends import EMULATED, emulated_core
from benchmarks import ops_cuda
from fullbeam import ops

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu.sh"
HEAD = {"commit": "some"}


class Clock:
    """As `ops_cuda.Graphs`, on the CPU."""

    def together(self, calls: list[Callable[[], Any]]) -> Callable[[], Any]:
        return lambda: [call() for call in calls]

    def time_us(self, run: Callable[[], Any]) -> float:
        begin = time.perf_counter()
        run()
        return (time.perf_counter() - begin) * 1e6

    def num_sets(self, num_bytes: int) -> int:
        return 2


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    core = emulated_core()
    core.emulate_set_seed(1, 0)
    core.emulate_set_device(*EMULATED["emulated"])
    monkeypatch.setattr(ops, "_core", core)
    for name, value in {
        "DEVICE": "cpu", "VOCAB": 300, "HEADS": 4, "KV_HEADS": 2, "ATTENTION_DIM": 64,
        "NUM_ROUNDS": 2,
    }.items():  # fmt: skip
        monkeypatch.setattr(ops_cuda, name, value)


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_op_is_measured_beside_its_anchors(
    emulated: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cases = [
        ops_cuda.rms_norm(2, 64),
        ops_cuda.gated_activation(2, 64),
        ops_cuda.rope(2, 3, 16),
        ops_cuda.embedding(2, 64),
        ops_cuda.dequantise("Q4_K", 64, 256),
        ops_cuda.attention_decode("2x20", [20, 20], 16),
        ops_cuda.attention_decode_search(20, 2, 16),
        ops_cuda.attention_prefill(2, 20, 16),
        ops_cuda.logprobs(2),
        ops_cuda.sample(2, 0.8, 50, 0.9),
        ops_cuda.beam_step(2, 2),
    ]
    assert {case.op for case in cases} == {case.op for case in ops_cuda.cases()}
    out = tmp_path / "ops.json"
    assert ops_cuda.report(cases, HEAD, 1e9, Clock(), out) == 0
    head, *rows = lines_of(out)
    assert head == HEAD
    assert [row["op"] for row in rows] == [case.op for case in cases]
    assert all(row["median_us"] > 0 for row in rows)
    decode = next(row for row in rows if row["op"] == "attention_decode")
    assert decode["left_out"].keys() >= {"sdpa cudnn"}  # of a GPU
    said = capsys.readouterr().out.splitlines()
    assert said[1].split() == ops_cuda.COLUMNS
    assert len(said) == 2 + len(cases)


def test_a_case_that_fails_keeps_none_of_the_others_from_the_table(
    emulated: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails() -> Any:
        raise ValueError("no luck")

    differs = ops_cuda.Case(
        "softcap", "1", "f32", 1, lambda: (int, {"torch": int}), 0, np.not_equal
    )
    cases = [ops_cuda.Case("linear", "1", "f32", 1, fails), differs, ops_cuda.rms_norm(1, 8)]
    out = tmp_path / "ops.json"
    assert ops_cuda.report(cases, HEAD, 1e9, Clock(), out) == 2
    assert [row.get("error") for row in lines_of(out)[1:]] == [
        "ValueError: no luck", "AssertionError: ours and torch differ", None,
    ]  # fmt: skip
    assert "rms_norm" in capsys.readouterr().out


def test_what_was_measured_before_an_interruption_is_kept(
    emulated: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted() -> Any:
        raise KeyboardInterrupt

    out = tmp_path / "ops.json"
    cases = [ops_cuda.rms_norm(1, 8), ops_cuda.Case("rope", "1", "f32", 1, interrupted)]
    with pytest.raises(KeyboardInterrupt):
        ops_cuda.report(cases, HEAD, 1e9, Clock(), out)
    assert [row["op"] for row in lines_of(out)[1:]] == ["rms_norm"]
    assert "rms_norm" in capsys.readouterr().out


# ---- The script, on a machine whose tools are stand-ins


def gpu_sh(folder: Path, *arguments: str, tools: dict[str, str], **env: str) -> Any:
    """Runs the script with only these tools, shell scripts, beside the system's own."""
    bin_folder = folder / "bin"
    bin_folder.mkdir()
    for name, text in tools.items():
        (bin_folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (bin_folder / name).chmod(0o755)
    for name in ("bash", "git", "date", "nproc", "tail", "head", "tee", "mkdir", "dirname", "cat",
                 "rm", "sed", "timeout", "env", "sleep"):  # fmt: skip
        found = shutil.which(name)
        if found and not (bin_folder / name).exists():
            (bin_folder / name).symlink_to(found)
    root = folder / "tree"
    (root / "benchmarks").mkdir(parents=True)
    shutil.copy(SCRIPT, root / "benchmarks")
    (root / "build" / "gpu-site" / "fullbeam").mkdir(parents=True)
    (root / "build" / "gpu-site" / "fullbeam" / "_core.so").touch()
    done = subprocess.run(
        [bin_folder / "bash", root / "benchmarks" / "gpu.sh", *arguments],
        capture_output=True, text=True, timeout=60, cwd=folder,
        env={"PATH": str(bin_folder), "HOME": str(folder), "OUT": str(folder / "out")} | env,
    )  # fmt: skip
    summary = folder / "out" / "summary.txt"
    return done, summary.read_text() if summary.exists() else ""


ALL_THERE = {"python3": "exit 0", "nvcc": "", "g++": "", "cmake": "", "ninja": ""}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["tests"], "unknown step or option 'tests'"),
        (["--limit", "soon"], "--limit wants seconds"),
        (["--out"], "--out wants a folder"),
    ],
)
def test_the_script_refuses_what_it_does_not_know(
    tmp_path: Path, arguments: list[str], words: str
) -> None:
    done, _ = gpu_sh(tmp_path, *arguments, tools=ALL_THERE)
    assert done.returncode == 2
    assert words in done.stderr


def test_the_script_says_what_is_missing_and_goes_on(tmp_path: Path) -> None:
    answers = '*"-m pytest"*) echo "5 passed";; *scikit_build_core*) exit 1;;'
    tools = ALL_THERE | {"python3": f'case "$*" in {answers} esac'}
    del tools["ninja"]
    done, summary = gpu_sh(tmp_path, "build", "test", "sanitize", tools=tools)
    assert "missing: ninja, needed by build, portable" in summary
    assert "missing: scikit_build_core, needed by build, portable" in summary
    assert "build (left out: ninja is missing)" in summary
    assert "sanitize (left out: compute-sanitizer is missing)" in summary
    assert "test: ok" in summary
    assert done.returncode == 3
    assert "5 passed" in (tmp_path / "out" / "test.log").read_text()


def test_the_script_keeps_the_log_of_a_step_that_fails_or_runs_too_long(tmp_path: Path) -> None:
    slow = """case "$*" in
      *"-m pytest"*) echo "1 failed"; exit 1;;
      *"-m benchmarks"*) trap 'echo interrupted; exit 130' INT; echo half; sleep 60 & wait;;
    esac"""
    done, summary = gpu_sh(
        tmp_path, "--limit", "16", "test", "bench", "sanitize",
        tools=ALL_THERE | {"python3": slow, "compute-sanitizer": ""},
    )  # fmt: skip
    assert "test: status 1" in summary
    assert "bench: out of time" in summary
    assert "memcheck (skipped): out of time, 0 s" in summary
    assert done.returncode == 124
    assert "1 failed" in (tmp_path / "out" / "test.log").read_text()
    log = (tmp_path / "out" / "bench.log").read_text()
    assert "half" in log
    assert "interrupted" in log
    assert summary.rstrip() in done.stdout


def test_the_script_builds_before_it_tests(tmp_path: Path) -> None:
    tools = ALL_THERE | {
        "python3": 'case "$*" in *"-m pip"*) echo "$CMAKE_ARGS" "$@"; exit 1;; esac'
    }
    done, summary = gpu_sh(tmp_path, "build", "test", tools=tools)
    assert "build: status 1" in summary
    assert "test (left out: no package in build/gpu-site; run the step build)" in summary
    assert "--no-index" in (tmp_path / "out" / "build.log").read_text()
    assert done.returncode == 3
