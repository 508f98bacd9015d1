# SPDX-License-Identifier: Apache-2.0
"""A prompt as given to the token ids that the model starts from."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fullbeam.engine.batch import Int32Array
from fullbeam.engine.text import Tokenizer


def encode_prompt(
    tokenizer: Tokenizer, vocab_size: int, prompt: str | Sequence[int] | None
) -> Int32Array:
    """Return a prompt's token ids, checked; "" and None give the start of a document.

    Raises
    ------
    TypeError
        For something that is no token id.
    ValueError
        For an empty list, or ids outside the vocabulary.
    """
    if prompt is None or isinstance(prompt, str):
        ids = tokenizer.encode(prompt or "") or _document_start(tokenizer)
        return np.array(ids, np.int32)
    if len(prompt) == 0:
        raise ValueError("complete: prompt must be text or at least one token id, got []")
    for idx, token_id in enumerate(prompt):
        if isinstance(token_id, bool) or not isinstance(token_id, (int, np.integer)):
            kind = type(token_id).__name__
            raise TypeError(f"complete: prompt[{idx}] must be a token id, got {kind}")
        if not 0 <= token_id < vocab_size:
            bound = vocab_size - 1
            raise ValueError(f"complete: prompt[{idx}] must be in 0..{bound}, got {token_id}")
    return np.array(prompt, np.int32)


def _document_start(tokenizer: Tokenizer) -> list[int]:
    if tokenizer.bos_id is not None:
        return [tokenizer.bos_id]
    if tokenizer.eos_ids:
        return [min(tokenizer.eos_ids)]
    raise ValueError("complete: prompt must not be empty: the model has no start token")
