# SPDX-License-Identifier: Apache-2.0
"""A server's own loop and torch model (a toy): pages, attention and draws are fullbeam's ops.

python examples/torch_loop.py [MAX_ROWS [DEVICE]]; answers are the same for any number of rows.
"""

import sys
from functools import partial
from itertools import accumulate
from types import SimpleNamespace

import torch

from fullbeam import ops

VOCAB, SIZE, HEADS, DIM, PAGE, NUM_PAGES, NEW = 300, 128, 4, 32, 16, 12, 12
MAX_ROWS = int(sys.argv[1]) if sys.argv[1:] else 3
if sys.argv[2:]:
    torch.set_default_device(sys.argv[2])
torch.manual_seed(0)
embedding = torch.randn(VOCAB, SIZE)
qkv, head = torch.randn(SIZE, 3 * SIZE) / SIZE**0.5, torch.randn(SIZE, VOCAB) / 4
k_pages, v_pages = torch.zeros(2, NUM_PAGES, HEADS, PAGE, DIM)
int32 = partial(torch.tensor, dtype=torch.int32)


def step(batch: list) -> list[int]:
    """The next token of each; prompts of new sequences and last tokens of others in one batch."""
    places = [(seq, at) for seq in batch for at in range(seq.num_cached, len(seq.tokens))]
    starts = [0, *accumulate(len(seq.tokens) - seq.num_cached for seq in batch)]
    x = embedding[[seq.tokens[at] for seq, at in places]]
    q, k, v = (x @ qkv).view(-1, 3, HEADS, DIM).unbind(1)
    slots = torch.tensor([seq.pages[at // PAGE] * PAGE + at % PAGE for seq, at in places])
    ops.kv_write(k, v, k_pages, v_pages, slots)
    tables = int32([seq.pages + [-1] * (NUM_PAGES - len(seq.pages)) for seq in batch])
    lens = [len(seq.tokens) for seq in batch]
    attended = ops.attention_prefill(
        q, k_pages, v_pages, tables, int32(lens), int32(starts), scale=DIM**-0.5
    )
    last, ones = [start - 1 for start in starts[1:]], torch.ones(len(batch))
    return ops.sample(
        (x + attended.flatten(1))[last] @ head,
        temperature=0.8 * ones, top_k=int32([50] * len(batch)), top_p=0.95 * ones, min_p=0 * ones,
        seeds=torch.tensor([seq.seed for seq in batch], dtype=torch.uint64),
        counters=torch.tensor([[0, 0, length] for length in lens], dtype=torch.uint32),
    ).token_ids.tolist()  # fmt: skip


prompts = [list(range(7 * i, 7 * i + 5 * i + 3)) for i in range(8)]
waiting = [SimpleNamespace(seed=i, tokens=[*p], num_cached=0) for i, p in enumerate(prompts)]
running, free_pages = [], list(range(NUM_PAGES))
while waiting or running:
    while waiting and len(running) < MAX_ROWS:
        if (num_pages := (len(waiting[0].tokens) + NEW) // PAGE + 1) > len(free_pages):
            break  # until a sequence ends
        waiting[0].pages = [free_pages.pop() for _ in range(num_pages)]
        running.append(waiting.pop(0))
    for seq, token in zip(list(running), step(running), strict=True):
        seq.num_cached = len(seq.tokens)
        seq.tokens.append(token)
        if len(seq.tokens) == len(prompts[seq.seed]) + NEW:
            running.remove(seq)
            free_pages += seq.pages
            print(seq.seed, seq.tokens[-NEW:])
