# SPDX-License-Identifier: Apache-2.0
"""Gemma 3 27B alone scales its queries by the width per head, not by the head's size."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fullbeam.models.families import read_config
from fullbeam.models.source import Source, Tensor


class InMemory(Source):
    path = Path("x.gguf")
    is_converted = True

    def __init__(self, metadata: dict[str, Any], tensors: dict[str, Any]) -> None:
        self.metadata, self.tensors = metadata, tensors

    def release(self, tensor: Tensor) -> None: ...

    def close(self) -> None: ...


@pytest.mark.parametrize(
    ("layers", "hidden", "heads", "scale"), [(62, 5376, 32, 168.0), (48, 3840, 16, 256.0)]
)
def test_gemma3_attention_scale(layers: int, hidden: int, heads: int, scale: float) -> None:
    values = {
        "general.architecture": "gemma3",
        "gemma3.embedding_length": hidden,
        "gemma3.block_count": layers,
        "gemma3.attention.head_count": heads,
        "gemma3.attention.head_count_kv": 16 if heads == 32 else 8,
        "gemma3.attention.key_length": 128 if heads == 32 else 256,
        "gemma3.attention.value_length": 128 if heads == 32 else 256,
        "gemma3.attention.sliding_window": 1024,
        "gemma3.attention.layer_norm_rms_epsilon": 1e-6,
        "gemma3.context_length": 131072,
        "gemma3.feed_forward_length": 1024,
    }

    table = SimpleNamespace(shape=(262144, hidden))
    source = InMemory(values, {"token_embd.weight": table})
    assert read_config(source).attention_scale == pytest.approx(scale**-0.5)
