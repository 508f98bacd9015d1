# SPDX-License-Identifier: Apache-2.0
"""Beam search over the fake model as a plain loop: whole histories, all candidates sorted."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

import fake_model
from fullbeam import ops
from fullbeam.params import CompletionParams


@dataclass(frozen=True)
class Found:
    """A hypothesis."""

    ids: tuple[int, ...] = ()
    score: float = 0.0  # s of the search
    logprob: float = 0.0
    is_finished: bool = False
    group: int = 0


def run(prompt_ids: list[int], params: CompletionParams) -> tuple[list[Found], int]:
    """All finished hypotheses and those that live at the end, and the number of tokens chosen."""
    groups = [[Found(group=idx)] for idx in range(params.diversity_groups)]
    finished: list[Found] = []
    num_chosen = 0
    assert params.max_tokens is not None
    assert params.beam_size is not None
    for _ in range(params.max_tokens):
        seen: list[int] = []
        for idx, live in enumerate(groups):
            candidates = []
            for rank, found in enumerate(live):
                for token_id, value in enumerate(logprobs(prompt_ids, found, params)):
                    if value == -np.inf:
                        continue
                    penalty = params.diversity_strength * seen.count(token_id)
                    score = found.score + value - penalty
                    candidates.append((-score, rank, token_id, found, found.logprob + value))
            candidates.sort(key=lambda item: item[:3])
            groups[idx] = []
            for place, (score, _, token_id, found, logprob) in enumerate(candidates):
                child = Found((*found.ids, token_id), -score, logprob, False, idx)
                if not ends(child, params):
                    groups[idx].append(child)
                elif place < params.beam_size:
                    finished.append(replace(child, is_finished=True))
                    num_chosen += 1
                if len(groups[idx]) == params.beam_size:
                    break
            num_chosen += len(groups[idx])
            seen += [found.ids[-1] for found in groups[idx]]
        if not any(groups):
            break
        if params.mode == "ONE_TOKEN" and finished:
            break
    return finished + [found for live in groups for found in live], num_chosen


def end_ids(params: CompletionParams) -> set[int]:
    """Tokens that end a hypothesis whatever stands before them."""
    return set(params.stop_ids) | (set() if params.ignore_eos else {fake_model.EOS})


def logprobs(prompt_ids: list[int], found: Found, params: CompletionParams) -> Any:
    """float64 [vocab_size]; -inf where a token is not allowed."""
    logits = fake_model.history_logits([*prompt_ids, *found.ids])
    biased = logits.copy()
    for token_id, value in params.biases:
        biased[token_id] += np.float32(value)
    size = len(logits)
    values = ops.logprobs(np.tile(biased, (size, 1)), np.arange(size, dtype=np.int32))[0]
    unbiased = replace(params, logit_bias=None)
    allowed = fake_model.edited(logits, prompt_ids, list(found.ids), unbiased, end_ids(params))
    return np.where(np.isfinite(allowed), values.astype(np.float64), -np.inf)


def text_of(found: Found, params: CompletionParams) -> str:
    """Text behind the constraint."""
    data = b"".join(fake_model.PIECES[token_id] for token_id in found.ids)
    return data[len(params.prefix.encode()) :].decode("utf-8", "surrogateescape")


def ends(found: Found, params: CompletionParams) -> bool:
    if found.ids[-1] in end_ids(params):
        return True
    text = text_of(found, params)
    if any(stop in text for stop in params.stop_strings):
        return True
    if params.mode is not None and "\n" in text:
        return True
    word = [char.isalnum() or char == "_" or char >= "\udc80" for char in text]
    return params.mode == "ONE_TOKEN" and any(word) and not all(word)
