# SPDX-License-Identifier: Apache-2.0
"""Models of the hub, fetched by the command line from a stand-in server."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import hf_models
from fullbeam.models import hub as hub_module
from hub_server import COMMIT, StandInHub, serve

REPO = "someone/tiny-llama"
GGUFS = "someone/tiny-llama-GGUF"
PICKLES = "someone/tiny-pickles"
Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    model = hf_models.make_model("llama")
    folder = tmp_path_factory.mktemp("hub")
    saved = hf_models.save("llama", model, folder / "model", max_shard_size="100KB")
    path = hf_models.write_gguf("llama", model, folder / "tiny.gguf")
    whole = {file.name: file.read_bytes() for file in saved.iterdir()}
    pickles = {"config.json": whole["config.json"], "pytorch_model.bin": b"PK"}
    return {
        REPO: whole | {"README.md": b"words", "pytorch_model.bin": b"PK"},
        GGUFS: {"tiny.gguf": path.read_bytes(), "other.gguf": b"GGUF"},
        PICKLES: pickles,
    }


@pytest.fixture
def hub(files: dict[str, dict[str, bytes]]) -> Iterator[StandInHub]:
    with serve(files) as server:
        yield server


@pytest.fixture
def run(hub: StandInHub, tmp_path: Path) -> Run:
    def run_command(*words: str, offline: bool = False) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {
            "HF_ENDPOINT": hub.url,
            "HF_HUB_OFFLINE": str(int(offline)),
            "HF_HOME": str(tmp_path / "hf"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "FULLBEAM_CACHE": str(tmp_path / "cache"),
            "PYTHONWARNINGS": "default",
        }
        return subprocess.run(
            [sys.executable, "-m", "fullbeam", *words],
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
        )

    return run_command


def complete(run: Run, model: str, offline: bool = False) -> str:
    done = run(
        "complete", model, "rs", "--max-tokens=4", "--temperature=0", "--json", offline=offline
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def fetched(hub: StandInHub) -> list[str]:
    return [path.rsplit("/", 1)[1] for method, path, _ in hub.asked if method == "GET"]


def test_folder_is_pulled_once_and_used_offline(run: Run, hub: StandInHub, tmp_path: Path) -> None:
    done = run("pull", REPO)
    assert done.returncode == 0, done.stderr
    folder = Path(done.stdout.strip())
    assert folder.parts[-2:] == ("snapshots", COMMIT)
    assert tmp_path / "cache" / "hub" in folder.parents
    names = fetched(hub)
    assert "README.md" not in names
    assert "pytorch_model.bin" not in names
    assert sum(name.endswith(".safetensors") for name in names) > 2
    hub.asked.clear()
    assert '"text"' in complete(run, REPO, offline=True)
    assert hub.asked == []


def test_folder_without_a_pull_is_fetched_by_its_first_use(run: Run, hub: StandInHub) -> None:
    online = complete(run, REPO)
    assert online == complete(run, REPO, offline=True)


def test_file_of_a_repository(run: Run, hub: StandInHub) -> None:
    assert '"text"' in complete(run, f"{GGUFS}/tiny.gguf")
    assert "other.gguf" not in fetched(hub)
    assert '"text"' in complete(run, f"{GGUFS}/tiny.gguf", offline=True)


def test_interrupted_download_is_resumed(run: Run, hub: StandInHub) -> None:
    data = b"GGUF" + bytes(range(256)) * (80 << 10)  # more than the library takes at once
    hub.repos[GGUFS]["big.gguf"] = data
    hub.break_after["big.gguf"] = 15 << 20
    run("pull", f"{GGUFS}/big.gguf")
    done = run("pull", f"{GGUFS}/big.gguf")
    assert done.returncode == 0, done.stderr
    ranges = [asked for _, path, asked in hub.asked if path.endswith("big.gguf") and asked]
    assert ranges == [f"bytes={10 << 20}-"]
    assert Path(done.stdout.strip()).read_bytes() == data


def test_wrong_checksum_is_refused_and_removed(run: Run, hub: StandInHub) -> None:
    hub.etags["tiny.gguf"] = "0" * 64
    done = run("pull", f"{GGUFS}/tiny.gguf")
    assert done.returncode == 1
    assert "checksum of tiny.gguf must be 000" in done.stderr
    del hub.etags["tiny.gguf"]
    assert run("pull", f"{GGUFS}/tiny.gguf").returncode == 0


@pytest.mark.parametrize(
    ("model", "code", "text"),
    [
        (GGUFS, 2, r"must have config.json, got tiny.gguf, other.gguf: give the id of a GGUF file"),
        (f"{GGUFS}/no.gguf", 2, "must have no.gguf, got tiny.gguf, other.gguf"),
        (PICKLES, 2, "must have model.safetensors, got pytorch_model.bin (pickles are never"),
        ("someone/nothing", 1, "'someone/nothing' could not be fetched from the hub (Repository"),
    ],
)
def test_what_cannot_be_fetched_is_one_line(run: Run, model: str, code: int, text: str) -> None:
    done = run("pull", model)
    assert (done.returncode, done.stdout) == (code, "")
    assert text in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr


def test_offline_without_the_model_is_one_line(run: Run) -> None:
    done = run("complete", REPO, "x", offline=True)
    assert done.returncode == 1
    assert f"model '{REPO}' could not be fetched from the hub" in " ".join(done.stderr.split())


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("owner/name", True),
        ("owner/name.v1/sub/file.gguf", True),
        ("models/file.gguf", False),
        ("nope", False),
        ("/absolute/path", False),
        ("../owner/name", False),
        ("owner/../x.gguf", False),
        ("owner/name/extra", False),
        ("owner/" + "x" * 1000, False),
    ],
)
def test_hub_ids(name: str, expected: bool) -> None:
    assert hub_module.is_id(name) is expected
