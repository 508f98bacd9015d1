# SPDX-License-Identifier: Apache-2.0
"""The `fullbeam` command."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

import fullbeam
from fullbeam import cli
from fullbeam.cli.complete import MAX_TOKENS
from fullbeam.engine.text import Logprobs, Piece
from fullbeam.params import CompletionParams
from fullbeam.results import Completion, Usage, as_choice
from fullbeam.server import serve as server
from fullbeam.server.settings import EditorOptions, Settings

Run = Callable[..., Result]


class FakeModel:
    """Says the same words for each choice; records how it was loaded and called."""

    def __init__(self) -> None:
        self.loaded: dict[str, Any] = {}
        self.calls: list[tuple[Any, CompletionParams]] = []
        self.texts = [" two", " words"]
        self.error: BaseException | None = None
        self.is_closed = False
        self.context = 1000
        self.tokenizer = types.SimpleNamespace(encode=list)  # a token for each character

    def stream(self, prompt: Any, *, params: CompletionParams) -> FakeModel:
        self.calls.append((prompt, params))
        return self

    def __enter__(self) -> FakeModel:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def __iter__(self) -> Iterator[Piece]:
        for idx, text in enumerate(self.texts):
            yield Piece(0, text, [idx])
            if self.error is not None:
                raise self.error

    def complete(self, prompt: Any, *, params: CompletionParams) -> Completion:
        self.calls.append((prompt, params))
        top = {"[bold]": -0.25, "x": float("-inf")}
        logprobs = None if params.logprobs is None else Logprobs(["[bold]"], [-0.25], [top], [1])
        choices = [
            as_choice(
                Piece(index, f"[red] {index}", [7], "length", logprobs=logprobs, score=-0.5 - index)
            )
            for index in range(params.n)
        ]
        return Completion(choices, Usage(3, params.n))

    def close(self) -> None:
        self.is_closed = True


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> FakeModel:
    fake = FakeModel()

    def load(model: str | None, **options: Any) -> FakeModel:
        if model == "nope":
            raise ValueError("load: model must be one of a, b,\n got 'nope'")
        fake.loaded = {"model": model, **options}
        return fake

    monkeypatch.setattr(fullbeam, "load", load)
    return fake


@pytest.fixture
def run() -> Run:
    def invoke(*words: str, **options: Any) -> Result:
        return CliRunner().invoke(cli.main, words, **options)

    return invoke


def test_complete_streams_the_text(run: Run, model: FakeModel) -> None:
    result = run("complete", "one")
    assert (result.exit_code, result.stdout, result.stderr) == (0, " two words\n", "")
    assert model.calls == [("one", CompletionParams(max_tokens=MAX_TOKENS))]
    assert model.loaded["model"] is None
    assert model.is_closed


def test_complete_ends_with_one_line_end(run: Run, model: FakeModel) -> None:
    model.texts = [" line\n", ""]
    assert run("complete", "one").stdout == " line\n"


@pytest.mark.parametrize(("num_tokens", "expected"), [(872, 128), (950, 50), (1000, 1)])
def test_default_length_is_what_fits(
    run: Run, model: FakeModel, num_tokens: int, expected: int
) -> None:
    run("complete", "x" * num_tokens)
    assert model.calls[0][1].max_tokens == expected


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--suffix", "y" * 40], 7),  # three tokens mark the parts
        (["--context-len", "900"], 100),
        (["--context-len", "-1"], 128),
    ],
)
def test_default_length_counts_what_is_computed(
    run: Run, model: FakeModel, words: list[str], expected: int
) -> None:
    run("complete", "x" * 950, *words)
    assert model.calls[0][1].max_tokens == expected


def test_complete_takes_model_and_prompt(run: Run, model: FakeModel) -> None:
    run("complete", "some.gguf", "one")
    assert model.loaded["model"] == "some.gguf"
    assert model.calls[0][0] == "one"


@pytest.mark.parametrize("words", [("-",), ("some.gguf", "-")])
def test_complete_reads_standard_input(run: Run, model: FakeModel, words: tuple[str, ...]) -> None:
    run("complete", *words, input="x = 1\n")
    assert model.calls[0][0] == "x = 1\n"


OPTIONS: dict[str, tuple[list[str], Any]] = {
    "max_tokens": (["--max-tokens", "5"], 5),
    "temperature": (["--temperature", "0"], 0.0),
    "top_p": (["--top-p", "0.5"], 0.5),
    "top_k": (["--top-k", "9"], 9),
    "min_p": (["--min-p", "0.25"], 0.25),
    "seed": (["--seed", "-3"], -3),
    "n": (["--n", "2"], 2),
    "stop": (["--stop", "a", "--stop", "b"], ("a", "b")),
    "logprobs": (["--logprobs", "0"], 0),
    "echo": (["--echo"], True),
    "min_tokens": (["--min-tokens", "2"], 2),
    "presence_penalty": (["--presence-penalty", "0.5"], 0.5),
    "frequency_penalty": (["--frequency-penalty", "-0.5"], -0.5),
    "repetition_penalty": (["--repetition-penalty", "1.25"], 1.25),
    "bad_words": (["--bad-word", "a", "--bad-word", "b"], ("a", "b")),
    "ignore_eos": (["--ignore-eos"], True),
    "best_of": (["--best-of", "3"], 3),
    "suffix": (["--suffix", "z"], "z"),
    "prefix": (["--prefix", "p"], "p"),
    "token_healing": (["--token-healing"], True),
    "context_len": (["--context-len", "9"], 9),
    "beam_size": (["--beam-size", "4"], 4),
}

SEARCH_OPTIONS: dict[str, tuple[list[str], Any]] = {
    "diversity_groups": (["--diversity-groups", "2"], 2),
    "diversity_strength": (["--diversity-strength", "0.5"], 0.5),
    "length_penalty": (["--length-penalty", "0"], 0.0),
    "len_norm_base": (["--len-norm-base", "2"], 2.0),
    "len_norm_pow": (["--len-norm-pow", "0.5"], 0.5),
    "mode": (["--mode", "one_token"], "ONE_TOKEN"),
}

MODE_OPTIONS: dict[str, tuple[list[str], Any]] = {
    "top_n": (["--top-n", "3"], 3),
    "only_full_lines": (["--no-only-full-lines"], False),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_reach_the_parameters(run: Run, model: FakeModel, name: str) -> None:
    words, value = OPTIONS[name]
    assert run("complete", "one", *words).exit_code == 0
    expected = {"max_tokens": MAX_TOKENS, name: value}
    assert model.calls[0][1] == CompletionParams(**expected)


@pytest.mark.parametrize("name", [*SEARCH_OPTIONS, *MODE_OPTIONS])
def test_options_of_a_search_reach_the_parameters(run: Run, model: FakeModel, name: str) -> None:
    words, value = {**SEARCH_OPTIONS, **MODE_OPTIONS}[name]
    fields: dict[str, Any] = {"beam_size": 2, name: value}
    words = ["--beam-size", "2", *words]
    if name in MODE_OPTIONS:
        fields["mode"] = "FULL_LINE"
        words += ["--mode", "FULL_LINE"]
    if "mode" not in fields:  # whose texts are short: as many tokens as the API gives
        fields["max_tokens"] = MAX_TOKENS
    assert run("complete", "one", *words).exit_code == 0
    assert model.calls[0][1] == CompletionParams(**fields)


@pytest.mark.parametrize(
    ("option", "value"),
    [("threads", 2), ("context", 64), ("device", "cpu"), ("draft-tokens", 0), ("draft-tokens", 3)],
)
def test_options_reach_the_loader(run: Run, model: FakeModel, option: str, value: Any) -> None:
    assert run("complete", "one", f"--{option}", str(value)).exit_code == 0
    assert model.loaded[option.replace("-", "_")] == value


@pytest.mark.parametrize("words", [["--n", "2"], ["--best-of", "3", "--n", "2"]])
def test_several_choices_are_shown_in_a_table(run: Run, model: FakeModel, words: list[str]) -> None:
    lines = run("complete", "one", *words).stdout.splitlines()
    shown = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if "red" in line]
    assert shown == [["0", "-0.500", "[red] 0", "length"], ["1", "-1.500", "[red] 1", "length"]]


@pytest.mark.parametrize("words", [["--beam-size", "2"], ["--best-of", "2"]])
def test_what_is_chosen_at_the_end_is_a_table_too(
    run: Run, model: FakeModel, words: list[str]
) -> None:
    assert "-0.500" in run("complete", "one", *words).stdout


def test_logprobs_are_shown_in_a_table(run: Run, model: FakeModel) -> None:
    result = run("complete", "one", "--logprobs", "1")
    assert "'[bold]'" in result.stdout
    assert "-0.250" in result.stdout


def test_json_is_the_result(run: Run, model: FakeModel) -> None:
    result = run("complete", "one", "--n", "2", "--logprobs", "2", "--json")
    body = json.loads(result.stdout)
    assert body["usage"] == {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
    assert [choice["index"] for choice in body["choices"]] == [0, 1]
    assert body["choices"][0]["text"] == "[red] 0"
    assert body["choices"][0]["token_ids"] == [7]
    assert body["choices"][0]["logprobs"]["top_logprobs"] == [{"[bold]": -0.25, "x": -9999.0}]


def one_line(result: Result, exit_code: int) -> str:
    assert result.exit_code == exit_code
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    return result.stderr


def test_values_out_of_range_are_refused_before_loading(run: Run, model: FakeModel) -> None:
    error = one_line(run("complete", "one", "--top-p", "2"), 2)
    assert error == "Error: top_p must be in 0..1, got 2.0\n"
    assert model.loaded == {}


def test_unknown_model_is_bad_input(run: Run, model: FakeModel) -> None:
    error = one_line(run("complete", "nope", "one"), 2)
    assert error == "Error: load: model must be one of a, b, got 'nope'\n"


def test_other_failures_exit_with_1(run: Run, model: FakeModel) -> None:
    model.error, model.texts = RuntimeError("engine: it broke"), [""]
    assert one_line(run("complete", "one"), 1) == "Error: engine: it broke\n"
    assert model.is_closed


@pytest.mark.parametrize(
    "words",
    [[], ["a", "b", "c"], ["--n", "x", "one"], ["--beams", "4", "one"], ["--device", "x", "y"]],
)
def test_usage_errors_exit_with_2(run: Run, model: FakeModel, words: list[str]) -> None:
    result = run("complete", *words)
    assert result.exit_code == 2
    assert "Error: " in result.stderr
    assert model.loaded == {}


def test_errors_show_a_part_of_long_words(run: Run, model: FakeModel) -> None:
    result = run("complete", "--n", "9" * 100_000, "one")
    assert result.exit_code == 2
    assert "Invalid value for '--n': '999" in result.stderr
    assert "999' is not a valid integer." in result.stderr
    assert len(result.stderr) < 500


def test_interrupt_exits_with_130(run: Run, model: FakeModel) -> None:
    model.error = KeyboardInterrupt()
    result = run("complete", "one")
    assert (result.exit_code, result.stdout, result.stderr) == (130, " two", "\n")
    assert model.is_closed


def test_broken_pipe_is_silent(run: Run, model: FakeModel) -> None:
    model.error = BrokenPipeError()
    result = run("complete", "one")
    assert (result.exit_code, result.stderr) == (141, "")


def test_what_the_output_cannot_encode_is_replaced(model: FakeModel) -> None:
    model.texts = [" été 日"]
    latin = CliRunner(charset="latin-1")
    assert latin.invoke(cli.main, ["complete", "one"]).stdout == " été ?\n"
    result = latin.invoke(cli.main, ["complete", "--n", "2", "one"])
    assert (result.exit_code, "[red] 1" in result.stdout) == (0, True)


@pytest.mark.skipif(os.name != "posix", reason="closes streams in a shell of POSIX")
@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_are_as_good_as_the_null_device(closed: str) -> None:
    program = (
        "import os, sys, types, fullbeam; from fullbeam.cli import main;"
        "choice = types.SimpleNamespace(text='said', logprobs=None, score=None, index=0,"
        " finish_reason='');"
        "model = types.SimpleNamespace(context=99, close=lambda: None, complete=lambda *_, **__:"
        " types.SimpleNamespace(choices=[choice]), tokenizer=types.SimpleNamespace(encode=list));"
        "fullbeam.load = lambda *_, **__: model;"
        "main(['complete', '--n', '2', '-'])"
    )
    command = f"{shlex.quote(sys.executable)} -c {shlex.quote(program)} {closed}"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, input="")
    assert (done.returncode, done.stderr) == (0, "")
    assert ("said" in done.stdout) == (">&-" not in closed.replace("2>", ""))


def test_models_lists_the_catalogue(run: Run, tmp_path: Path) -> None:
    result = run("models", env={"FULLBEAM_CACHE": str(tmp_path)})
    assert result.exit_code == 0
    for text in ("gemma-3-270m (default)", "253 MB", "Gemma terms", "qwen2.5-coder-0.5b"):
        assert text in result.stdout


def test_pull_of_an_unknown_name(run: Run) -> None:
    assert "pull: name must be a hub id or one of gemma-3-270m" in one_line(run("pull", "nope"), 2)


def info(
    run: Run, monkeypatch: pytest.MonkeyPatch, *, cuda: str = "off", num_devices: int = 0
) -> dict[str, str]:
    core = types.ModuleType("fullbeam._core")
    vars(core).update(
        build_info=lambda: {"compiler": "cc 1.0", "cuda": cuda, "cpu_isas": ["good", "best"]},
        cpu_isa=lambda: "best",
        num_physical_cores=lambda: 77,
        num_cuda_devices=lambda: num_devices,
        why_no_cuda_device=lambda: "no driver",
    )
    monkeypatch.setitem(sys.modules, "fullbeam._core", core)
    monkeypatch.setattr(fullbeam, "_core", core, raising=False)
    result = run("info", env={"FULLBEAM_CACHE": "somewhere", "COLUMNS": "200"})
    assert result.exit_code == 0
    lines = [re.split("  +", line.strip(), maxsplit=1) for line in result.stdout.splitlines()]
    return {name: value for name, value in lines}


def test_info(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FULLBEAM_CPU_ISA", raising=False)
    facts = info(run, monkeypatch)
    assert facts["fullbeam"] == fullbeam.__version__
    assert facts["compiler"] == "cc 1.0"
    assert facts["CPU kernels"] == "good, best; in use: best, the best here"
    assert facts["threads"] == "77 unless --threads is given"
    assert facts["CUDA kernels"] == "none: built without nvcc"
    assert facts["CUDA devices"] == "none: no driver"
    assert "somewhere" in facts["model folder"]
    assert {"numpy", "torch", "python", "machine"} <= facts.keys()


def test_info_says_that_the_instruction_set_is_forced(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FULLBEAM_CPU_ISA", "best")
    facts = info(run, monkeypatch)
    assert facts["CPU kernels"] == "good, best; in use: best, FULLBEAM_CPU_ISA says"


@pytest.mark.parametrize(
    ("reason", "said"),
    [
        ("torch has none", "2, not used: torch has none"),
        ("", "GPU 0, GPU 1; --device cuda uses the first, CUDA_VISIBLE_DEVICES says which that is"),
    ],
)
def test_info_says_whether_a_device_is_used(
    run: Run, monkeypatch: pytest.MonkeyPatch, reason: str, said: str
) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.setattr("fullbeam.engine.device.why_no_cuda", lambda: reason)
    monkeypatch.setattr(torch.cuda, "get_device_name", "GPU {}".format)
    facts = info(run, monkeypatch, cuda="13.0 for sm_80", num_devices=2)
    assert facts["CUDA kernels"] == "by nvcc 13.0 for sm_80"
    assert facts["CUDA devices"] == said


def test_info_without_the_native_module(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fullbeam._core", None)
    monkeypatch.delattr(fullbeam, "_core", raising=False)
    result = run("info")
    assert result.exit_code == 0
    assert "missing" in result.stdout


def test_serve_passes_its_options_on(
    run: Run, model: FakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    served: dict[str, Any] = {}

    def serve(load: Callable[[], Any], settings: Settings, **options: Any) -> None:
        served.update(options, settings=settings)
        load()

    monkeypatch.setattr(server, "serve", serve)
    words = ["--host", "::1", "--port", "0", "--max-rows", "4", "--threads", "1", "--context", "9"]
    words += ["--draft-tokens", "5"]
    keys = ["--api-key", "a", "--api-key", "b"]
    assert run("serve", "x/my.gguf", *words, *keys).exit_code == 0
    assert (served["host"], served["port"]) == ("::1", 0)
    assert served["settings"].name == "my"
    assert served["settings"].api_keys == ("a", "b")
    expected = {"model": "x/my.gguf", "device": "auto", "max_rows": 4, "threads": 1, "context": 9}
    expected["draft_tokens"] = 5
    assert expected.items() <= model.loaded.items()
    assert run("serve", env={"FULLBEAM_API_KEY": "c d"}).exit_code == 0
    assert served["settings"].api_keys == ("c", "d")
    assert served["settings"].name == "gemma-3-270m"
    assert run("serve").exit_code == 0
    assert served["settings"] == Settings(name="gemma-3-270m")
    assert model.loaded["max_rows"] == 32  # some editors search with 30 hypotheses


def test_serve_passes_its_limits_on(
    run: Run, model: FakeModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    served: list[Settings] = []
    monkeypatch.setattr(server, "serve", lambda load, settings, **options: served.append(settings))
    words = ["--max-requests", "7", "--max-body-mib", "0.5", "--max-logprobs", "20"]
    words += ["--max-stop", "9", "--timeout", "2.5", "--grace", "3"]
    words += ["--cors-origin", "http://a", "--cors-origin", "http://b"]
    keys = tmp_path / "keys"
    keys.write_text("b\n# old\nc\n")
    words += ["--api-key", "a", "--api-key-file", str(keys)]
    assert run("serve", *words).exit_code == 0
    assert served == [
        Settings(
            name="gemma-3-270m",
            api_keys=("a", "b", "c"),
            max_requests=7,
            max_body_bytes=2**19,
            max_logprobs=20,
            max_stop=9,
            timeout_s=2.5,
            grace_s=3,
            cors_origins=("http://a", "http://b"),
        )
    ]
    keys.write_text("# none\n")
    error = one_line(run("serve", "--api-key-file", str(keys)), 2)
    assert error.startswith("Error: serve: api_key_file must hold a key in a line, got none in ")
    error = one_line(run("serve", "--api-key", "a", "--api-key", " "), 2)
    assert error == "Error: serve: api_key must not be empty\n"


def test_serve_passes_its_options_for_editors_on(
    run: Run, model: FakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    served: list[Settings] = []
    monkeypatch.setattr(server, "serve", lambda load, settings, **options: served.append(settings))
    for words in ([], ["--no-infill"], ["--no-supersede"], ["--detailed"]):
        assert run("serve", *words).exit_code == 0
    assert [settings.editors for settings in served] == [
        EditorOptions(),
        EditorOptions(infill=False),
        EditorOptions(supersede=False),
        EditorOptions(detailed_default=True),
    ]


def test_help_of_serve_says_what_it_leaves_to_others(run: Run) -> None:
    text = " ".join(run("serve", "--help").output.split())
    assert "leave TLS to a proxy" in text
    assert "127.0.0.1" in text


def test_serve_on_a_port_in_use(run: Run, model: FakeModel) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        error = one_line(run("serve", "--port", port), 1)
    assert error.startswith(f"Error: serve: cannot listen on port {port} of 127.0.0.1: ")
    assert model.loaded == {}


def test_every_command_has_help(run: Run) -> None:
    assert isinstance(cli.main, click.Group)
    for name in cli.main.commands:
        assert run(name, "--help").exit_code == 0


def test_help_is_quick_and_imports_little() -> None:
    program = (
        "import sys; from fullbeam.cli import main; main(['--help'], standalone_mode=False);"
        "heavy = {'numpy', 'rich', 'fastapi', 'uvicorn', 'tokenizers', 'huggingface_hub'};"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.DEVNULL)
    start = time.perf_counter()
    command = [sys.executable, "-m", "fullbeam", "--help"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "complete" in done.stdout
    assert time.perf_counter() - start < 2.0  # 0.1 s on an idle machine


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_interrupted_server_leaves_no_traceback() -> None:
    program = (
        "import types, fullbeam; from fullbeam.cli import main;"
        "model = types.SimpleNamespace(name='x', path=None, close=lambda: None);"
        "fullbeam.load = lambda *_, **__: model;"
        "main(['serve', '--port', '0'])"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], stderr=subprocess.PIPE, text=True, env=os.environ.copy()
    )
    assert process.stderr is not None
    assert process.stderr.readline().startswith("fullbeam: listening on http://127.0.0.1:")
    assert process.stderr.readline() == "fullbeam: gemma-3-270m is ready\n"
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate(timeout=20)
    assert (process.returncode, rest.strip()) == (130, "")
