# SPDX-License-Identifier: Apache-2.0
"""Every example runs as a user would run it, on the default model."""

from __future__ import annotations

import runpy
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from fullbeam import _core
from fullbeam.models.catalog import resolve

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def _default_model() -> None:
    try:
        resolve(None)
    except (ValueError, OSError) as error:
        pytest.skip(f"the default model can't be had: {error}")


def run(*arguments: str) -> str:
    command = [sys.executable, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout


@pytest.mark.usefixtures("_default_model")
@pytest.mark.parametrize("name", ["complete.py", "embed.py"])
def test_example_runs(name: str) -> None:
    assert "Once upon a time" in run(str(EXAMPLES / name)) or name != "embed.py"


def torch_loop(*arguments: str) -> list[str]:
    pytest.importorskip("torch")
    return sorted(run(str(EXAMPLES / "torch_loop.py"), *arguments).splitlines())


def test_torch_loop_answers_the_same_however_many_rows_it_decodes() -> None:
    alone, together = torch_loop("1"), torch_loop("8")
    assert alone == together
    assert len(alone) == 8


@pytest.mark.parametrize("backend", ["emulated"], indirect=True)
def test_torch_loop_answers_the_same_on_the_cuda_kernels(
    backend: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = torch_loop()
    monkeypatch.setattr(sys, "argv", ["torch_loop.py"])
    runpy.run_path(str(EXAMPLES / "torch_loop.py"))
    assert sorted(capsys.readouterr().out.splitlines()) == expected


@pytest.mark.skipif(not _core.num_cuda_devices(), reason="needs a GPU")
def test_torch_loop_runs_on_a_gpu() -> None:
    assert torch_loop("1", "cuda") == torch_loop("8", "cuda")


@pytest.mark.usefixtures("_default_model")
def test_client_example_completes_against_a_server() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "fullbeam", "serve", "--port", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(300):
            try:
                url = f"http://127.0.0.1:{port}/health"
                if urllib.request.urlopen(url, timeout=1).status == 200:
                    break
            except OSError:
                time.sleep(0.1)
        printed = run(str(EXAMPLES / "client.py"), f"http://127.0.0.1:{port}/v1")
    finally:
        server.terminate()
        server.wait(timeout=20)
    assert "0 length" in printed or "0 stop" in printed


def test_every_example_is_short_and_tested() -> None:
    names = sorted(path.name for path in EXAMPLES.glob("*.py"))
    tested = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*example*.py"))
    assert all(f'"{name}"' in tested for name in names)
    assert all(len((EXAMPLES / name).read_text().splitlines()) < 240 for name in names)
