# SPDX-License-Identifier: Apache-2.0
"""The models of the worked examples: what comes next depends on the last token alone."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np

import fake_model


class TableDecoder(fake_model.FakeDecoder):
    """Probabilities at the start, and after each token."""

    def __init__(self, start: list[float], after: list[list[float]]) -> None:
        super().__init__(64)
        with np.errstate(divide="ignore"):
            self.after = np.log(np.array([*after, start]))  # the start token comes last
        self.config = SimpleNamespace(vocab_size=len(after) + 1, context_len=64)

    def forward(self, batch: Any, kv: Any, stop: Any) -> Any:
        fake_model.check_batch(batch, kv.cells.shape)
        rows = self.after[batch.token_ids[batch.logit_rows]].astype(np.float32)
        return np.pad(rows, ((0, 0), (0, 1)), constant_values=-np.inf)


class TableTokenizer(fake_model.FakeTokenizer):
    """Some pieces, then the start token."""

    eos_ids = frozenset()

    def __init__(self, pieces: list[str]) -> None:
        self.pieces = [piece.encode() for piece in [*pieces, ""]]
        self.vocab_size = len(self.pieces)
        self.bos_id = len(pieces)

    def encode(
        self, text: str, *, add_special_tokens: bool = True, parse_special: bool = True
    ) -> list[int]:
        assert text == "", "the examples start with nothing"
        return [self.bos_id] if add_special_tokens else []

    def token_bytes(self, token_id: int) -> bytes:
        return self.pieces[token_id]

    def all_token_bytes(self) -> list[bytes]:
        return self.pieces


LETTERS = ["a", "b", "c", " ", "\n"]
START = [0.40, 0.30, 0.15, 0.10, 0.05]
AFTER = [
    [0.10, 0.20, 0.30, 0.15, 0.25],
    [0.05, 0.05, 0.10, 0.20, 0.60],
    [0.30, 0.10, 0.05, 0.20, 0.35],
    [0.50, 0.20, 0.20, 0.05, 0.05],
    [0.20, 0.20, 0.20, 0.20, 0.20],
]
NUMPY = ["nu", "num", "numpy", "m", "\n"]
NUMPY_START = [0.10, 0.25, 0.40, 0.05, 0.20]
NUMPY_AFTER = [
    [0.2] * 5,
    [0.04, 0.05, 0.06, 0.15, 0.70],
    [0.02, 0.03, 0.04, 0.06, 0.85],
    [0.2] * 5,
    [0.2] * 5,
]
