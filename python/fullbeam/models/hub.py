# SPDX-License-Identifier: Apache-2.0
"""Models of the Hugging Face hub by their ids: `owner/name`, `owner/name/file.gguf`.

Files go to `hub` in the cache folder, by the hub's own library: it resumes what was interrupted,
locks, shows its progress and speaks to `HF_ENDPOINT`. What is there, or in that library's own
cache, is used without asking the hub. Weights whose checksum the hub states are compared with it
once they are fetched, and by each `pull`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from fullbeam.checks import shown

T = TypeVar("T")
Progress = Callable[[float, str], None]

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(/[\w./-]+\.gguf)?")
_MAX_NAME_LEN = 96  # the hub's, of an owner or a repository
_CONFIG, _INDEX, _SINGLE = "config.json", "model.safetensors.index.json", "model.safetensors"
# Fetched before the weights: where these are, all of what the repository has is there.
_OPTIONAL = ("generation_config.json", "tokenizer_config.json", "tokenizer.json")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_CHUNK_BYTES = 1 << 22


def is_id(model: str) -> bool:
    """Whether a name has the form of a hub id."""
    if model.count("/") == 1 and model.endswith(".gguf"):  # a file that isn't there
        return False
    is_short = max(map(len, model.split("/")[:2])) <= _MAX_NAME_LEN
    return is_short and _ID.fullmatch(model) is not None and ".." not in model


def find(model: str, cache: Path) -> Path | None:
    """The file or folder of a hub id where it is on this machine, whole; else None."""
    repo, file = _split(model)
    for folder in (cache / "hub", None):  # None: the library's own
        found = _find_file(repo, file, folder) if file else _find_folder(repo, folder)
        if found is not None:
            return found
    return None


def fetch(model: str, cache: Path, progress: Progress | None) -> Path:
    """Fetch what a hub id names, or what is new of it; return its file or folder.

    Raises
    ------
    ValueError
        For a repository that holds no model that can be loaded; the text says what it holds.
    RuntimeError
        Where the hub can't be reached or refuses, or a file arrives with the wrong checksum.
    """
    from huggingface_hub import hf_hub_download

    repo, file = _split(model)
    revision: str | None = None

    def get(name: str) -> Path:
        path = hf_hub_download(repo, name, revision=revision, cache_dir=cache / "hub")
        return Path(path)

    if file:
        path = _fetched(model, lambda: get(file))
        if path is None:
            raise ValueError(f"load: hub repository {repo} must have {file}, {_others(repo)}")
        return _checked(path, progress)
    config = _fetched(model, lambda: get(_CONFIG))
    if config is None:
        raise ValueError(
            f"load: hub repository {repo} must have config.json, {_others(repo)}: give the id of a "
            f"GGUF file as {repo}/FILE.gguf"
        )
    revision = config.parent.name  # the others of the same commit
    for name in _OPTIONAL:
        _fetched(model, lambda name=name: get(name))  # type: ignore[misc]
    index = _fetched(model, lambda: get(_INDEX))
    for name in _shards(index):
        path = _fetched(model, lambda name=name: get(name))  # type: ignore[misc]
        if path is None:
            raise ValueError(
                f"load: hub repository {repo} must have {name}, {_others(repo)} (pickles are never "
                "loaded)"
            )
        _checked(path, progress)
    return config.parent


def _split(model: str) -> tuple[str, str]:
    owner, name, *rest = model.split("/", 2)
    return f"{owner}/{name}", "".join(rest)


def _find_file(repo: str, name: str, folder: Path | None) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    found: Any = try_to_load_from_cache(repo, name, cache_dir=folder)
    return Path(found) if isinstance(found, str) else None


def _find_folder(repo: str, folder: Path | None) -> Path | None:
    config = _find_file(repo, _CONFIG, folder)
    if config is None:
        return None
    shards = _shards(_find_file(repo, _INDEX, folder))
    is_whole = all(_find_file(repo, name, folder) is not None for name in shards)
    return config.parent if is_whole else None


def _shards(index: Path | None) -> list[str]:
    if index is None:
        return [_SINGLE]
    from fullbeam.models.huggingface import indexed_files

    return indexed_files(index)


def _fetched(model: str, get: Callable[[], T]) -> T | None:
    """What `get` fetches, None where the repository doesn't have it."""
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        return get()
    except Exception as error:
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            return None
        reason = str(error).strip().split("\n", 1)[0]
        raise RuntimeError(
            f"load: model {shown(model)} could not be fetched from the hub "
            f"({type(error).__name__}: {reason})"
        ) from error


def _others(repo: str) -> str:
    """What of interest a repository has, for errors."""
    from huggingface_hub import HfApi

    try:
        files: list[str] = HfApi().list_repo_files(repo)
    except Exception:  # the error that this is for says enough
        return "which it has not"
    endings = (".gguf", ".safetensors", ".bin")
    found = [name for name in files if name.endswith(endings)]
    return f"got {', '.join(found[:20]) or 'no weights'}"


def _checked(path: Path, progress: Progress | None) -> Path:
    """Compare a file with the checksum by which the library stores it, where it is one."""
    blob = path.resolve()
    expected = blob.name
    if not _SHA256.fullmatch(expected):
        return path
    digest = hashlib.sha256()
    total, done = max(1, blob.stat().st_size), 0
    with blob.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
            done += len(chunk)
            if progress is not None:
                progress(done / total, f"check {path.name}")
    if digest.hexdigest() != expected:
        blob.unlink()
        path.unlink(missing_ok=True)
        raise RuntimeError(
            f"pull: checksum of {path.name} must be {expected}, got {digest.hexdigest()}: the file "
            "has been removed, fetch it again"
        )
    return path
