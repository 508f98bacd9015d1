# SPDX-License-Identifier: Apache-2.0
"""Searches in the model: tokens in slots give the logits that plain sequences of them give."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from attention_helpers import grow_tree, visible_words
from fullbeam.engine.batch import Batch, FloatArray
from fullbeam.models import OpenModel, open_model
from tiny_models import VOCAB_SIZE, Tiny

PAGE_SIZE = 8
TINY = {
    "llama": Tiny(),
    "gemma3": Tiny(arch="gemma3", num_layers=6, num_kv_heads=1, window=16),
}


@pytest.fixture(params=TINY)
def model(request: pytest.FixtureRequest, tmp_path: Path) -> OpenModel:
    tiny = TINY[request.param]
    return open_model(tiny.write(tmp_path / "tiny.gguf", tiny.weights(seed=8)), threads=1)


@dataclass
class Seq:
    """A sequence stepped by hand: its rows' new tokens, where they go and what they see."""

    pages: list[int]
    chains: list[list[int]]  # token ids of each row, from the start
    slot_start: int = 0
    prompt_len: int = 0  # of a search
    paths: list[list[int]] = field(default_factory=list)  # of a search: slots of each row
    num_new: int = 1  # tokens of a row in this step

    @property
    def num_slots(self) -> int:
        return max((slot + 1 for path in self.paths for slot in path), default=0)

    def places(self) -> list[int]:
        """Where this step's keys and values go, page * PAGE_SIZE + offset."""
        end = len(self.chains[0])
        keys = [self.slot_start + path[-1] for path in self.paths]
        keys = keys or [*range(end - self.num_new, end)]
        return [self.pages[key // PAGE_SIZE] * PAGE_SIZE + key % PAGE_SIZE for key in keys]


def forward(model: OpenModel, kv: Any, seqs: list[Seq]) -> list[FloatArray]:
    """One step of sequences, those that decode first; the logits of each one's rows."""
    num_decode = sum(seq.num_new == 1 for seq in seqs)
    num_words = max(-(-seq.num_slots // 32) for seq in seqs)
    table = np.full((len(seqs), max(len(seq.pages) for seq in seqs)), -1, np.int32)
    slot_positions = np.zeros((num_decode, 32 * num_words), np.int32)
    for idx, seq in enumerate(seqs):
        table[idx, : len(seq.pages)] = seq.pages
        for path in seq.paths:
            slot_positions[idx, path] = seq.prompt_len + np.arange(len(path))
    new = [(seq, chain) for seq in seqs for chain in seq.chains]
    starts = np.cumsum([0, *(len(seq.chains) * seq.num_new for seq in seqs)]).astype(np.int32)
    words = [
        visible_words(path, num_words) for seq in seqs[:num_decode] for path in seq.paths or [[]]
    ]
    batch = Batch(
        token_ids=np.array([idx for seq, ids in new for idx in ids[-seq.num_new :]], np.int32),
        positions=np.concatenate(
            [np.arange(len(ids) - seq.num_new, len(ids)) for seq, ids in new]
        ).astype(np.int32),
        slots=np.array([place for seq in seqs for place in seq.places()]),
        query_starts=starts,
        num_decode=num_decode,
        page_table=table,
        seq_lens=np.array([seq.prompt_len or len(seq.chains[0]) for seq in seqs], np.int32),
        logit_rows=np.arange(starts[-1], dtype=np.int32),
        slot_starts=np.array([seq.slot_start for seq in seqs[:num_decode]], np.int32),
        num_slots=np.array([seq.num_slots for seq in seqs[:num_decode]], np.int32),
        visible=np.array(words, np.uint32).reshape(starts[num_decode], num_words),
        slot_positions=slot_positions,
    )
    return np.split(model.decoder.forward(batch, kv).copy(), starts[1:-1])


def search(
    model: OpenModel, seed: int, prompt: list[int], *, with_others: bool
) -> list[tuple[list[list[int]], FloatArray]]:
    """A random search of 5 beams, by itself or among others: chains and logits of each step."""
    rng = np.random.default_rng(seed)
    kv = model.decoder.allocate_kv(50, PAGE_SIZE)
    pages = rng.permutation(30).tolist()
    slot_start = -(-len(prompt) // PAGE_SIZE) * PAGE_SIZE
    prompt_pages = pages[: slot_start // PAGE_SIZE]
    forward(model, kv, [Seq(prompt_pages, [prompt], num_new=len(prompt))])
    own = Seq(pages, [prompt], slot_start=slot_start, prompt_len=len(prompt))
    other = Seq([40, 41, 42, 43, 44], [rng.integers(0, VOCAB_SIZE, 9).tolist()], num_new=9)
    steps = []
    for idx, (parents, own.paths) in enumerate(grow_tree(rng, 5, 30)):
        ids = rng.integers(0, VOCAB_SIZE, 5).tolist()
        own.chains = [[*own.chains[p], token] for p, token in zip(parents, ids, strict=True)]
        if not with_others:
            logits = forward(model, kv, [own])[0]
        elif idx % 3 == 0:  # at first with the other's prompt
            logits = forward(model, kv, [own, other])[0]
        else:
            reading = Seq([30, 31], [list(range(9 + idx % 2))], num_new=9)
            logits = forward(model, kv, [other, own, reading])[1]
        other.chains[0].append(ids[0])
        other.num_new = 1
        steps.append((own.chains, logits))
    return steps


@pytest.mark.parametrize("seed", [1, 2])
def test_tokens_in_slots_give_the_logits_of_plain_sequences(model: OpenModel, seed: int) -> None:
    prompt = np.random.default_rng(3).integers(0, VOCAB_SIZE, 21).tolist()
    kv = model.decoder.allocate_kv(10, PAGE_SIZE)
    for chains, logits in search(model, seed, prompt, with_others=True):
        for chain, row in zip(chains, logits, strict=True):
            plain = forward(model, kv, [Seq(list(range(10)), [chain], num_new=len(chain))])[0][-1]
            # Sums in another order; now and then a key or value rounds to another float16.
            assert np.abs(row - plain).max() <= 1e-3 * np.abs(plain).max()


def test_a_search_is_the_same_bits_whatever_shares_its_batch(isa: str, model: OpenModel) -> None:
    prompt = np.random.default_rng(3).integers(0, VOCAB_SIZE, 21).tolist()
    alone, together = (search(model, 3, prompt, with_others=others) for others in (False, True))
    for (chains, logits), (same_chains, same_logits) in zip(alone, together, strict=True):
        assert chains == same_chains
        np.testing.assert_array_equal(logits, same_logits)
