# SPDX-License-Identifier: Apache-2.0
"""Every example runs as a user would run it, on the default model."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from fullbeam.models.catalog import resolve

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module", autouse=True)
def _default_model() -> None:
    try:
        resolve(None)
    except (ValueError, OSError) as error:
        pytest.skip(f"the default model can't be had: {error}")


def run(*arguments: str) -> str:
    command = [sys.executable, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout


@pytest.mark.parametrize("name", ["complete.py", "embed.py"])
def test_example_runs(name: str) -> None:
    assert "Once upon a time" in run(str(EXAMPLES / name)) or name != "embed.py"


def test_torch_loop_answers_the_same_however_many_rows_it_decodes() -> None:
    pytest.importorskip("torch")
    alone, together = (
        sorted(run(str(EXAMPLES / "torch_loop.py"), rows).splitlines()) for rows in ("1", "8")
    )
    assert alone == together
    assert len(alone) == 8


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


def test_every_example_is_short_and_run_here() -> None:
    names = sorted(path.name for path in EXAMPLES.glob("*.py"))
    assert names == ["client.py", "complete.py", "embed.py", "torch_loop.py"]
    assert all(len((EXAMPLES / name).read_text().splitlines()) < 60 for name in names)
