# SPDX-License-Identifier: Apache-2.0
"""One runtime, measured in a process with an interpreter of its own.

Lines of JSON: a greeting out, then a task in and its times out, until the input ends. One more
runtime is one more class in SYSTEMS; only what that class itself imports has to be installed.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any, ClassVar

import numpy as np

CONTEXT = 1024  # tokens of room for each sequence
PAGE_SIZE = 16

Ids = Sequence[Sequence[int]]  # [num_seqs][tokens of each]


class System:
    """A runtime with a model in memory; its threads sleep between two calls."""

    packages: ClassVar[tuple[str, ...]]  # distributions whose versions are reported
    has_engine = False  # whether there is a `requests` to be measured
    first_id: int | None = None  # what prompts of this model begin with
    vocab_size: int
    settings: str

    def __init__(self, path: str, threads: int) -> None:
        raise NotImplementedError

    def batch(self, token_ids: Ids, start: int) -> Any:
        """Lay out tokens that begin at position `start` of each sequence."""
        raise NotImplementedError

    def step(self, num_seqs: int, batch: Any) -> Any:
        """Compute a batch and return each sequence's most likely next token."""
        raise NotImplementedError

    def prepare(self, prompts: Ids, steps: Ids) -> str:
        """Take the settings that are the fastest for such a task, and return them."""
        return self.settings

    def run(self, prompts: Ids, steps: Ids) -> dict[str, Any]:
        """Time the bare model: prompts at once, then steps whose tokens are given."""
        num_seqs, start = len(prompts), len(prompts[0])
        batches = [self.batch([[i] for i in ids], start + idx) for idx, ids in enumerate(steps)]
        prompt = self.batch(prompts, 0)
        begin = time.perf_counter()
        choices = [self.step(num_seqs, prompt)]
        middle = time.perf_counter()
        choices += [self.step(num_seqs, batch) for batch in batches]
        end = time.perf_counter()
        tokens = np.concatenate(choices).tolist()
        return {"prompt_s": middle - begin, "steps_s": end - middle, "choices": tokens}

    def requests(self, prompts: Ids, steps: Ids) -> float:
        """Return the seconds for requests of 1 + len(steps) greedy tokens, all at once."""
        raise NotImplementedError


class Fullbeam(System):
    """The decoder for itself, and the engine with its scheduling on the same weights."""

    packages = ("numpy",)
    has_engine = True

    def __init__(self, path: str, threads: int) -> None:
        import fullbeam
        from fullbeam.models.decoder import Decoder

        self.model = fullbeam.load(path, threads=threads)
        loaded: Any = self.model.engine._runner._decoder
        # A decoder of its own: recorded steps hold on to one KV cache.
        self.decoder = Decoder(loaded.config, loaded.weights, threads=threads)
        max_rows, self.max_pages = self.model.engine.max_rows, CONTEXT // PAGE_SIZE
        self.kv = self.decoder.allocate_kv(max_rows * self.max_pages, PAGE_SIZE)
        tokenizer: Any = self.model.tokenizer
        self.first_id = tokenizer.bos_id if tokenizer.add_bos else None
        self.vocab_size = self.decoder.config.vocab_size
        self.settings = f"threads={threads} max_rows={max_rows} context={self.model.context}"

    def step(self, num_seqs: int, batch: Any) -> Any:
        return self.decoder.forward(batch, self.kv).argmax(axis=1)

    def batch(self, token_ids: Ids, start: int) -> Any:
        from fullbeam.engine.batch import Batch

        num_seqs, count = len(token_ids), len(token_ids[0])
        positions = np.tile(np.arange(start, start + count), num_seqs)
        seqs = np.repeat(np.arange(num_seqs), count)
        query_starts = np.arange(num_seqs + 1, dtype=np.int32) * np.int32(count)
        pages = np.arange(num_seqs * self.max_pages, dtype=np.int32)
        return Batch(
            token_ids=np.array(token_ids, np.int32).reshape(-1),
            positions=positions.astype(np.int32),
            slots=(seqs * CONTEXT + positions).astype(np.int64),
            query_starts=query_starts,
            num_decode=num_seqs if count == 1 else 0,
            page_table=pages.reshape(num_seqs, self.max_pages),
            seq_lens=np.full(num_seqs, start + count, np.int32),
            logit_rows=query_starts[1:] - np.int32(1),
        )

    def requests(self, prompts: Ids, steps: Ids) -> float:
        fields: dict[str, Any] = {
            "max_tokens": 1 + len(steps),
            "temperature": 0.0,
            "ignore_eos": True,
        }
        begin = time.perf_counter()
        result = self.model.complete(prompts, **fields)
        seconds = time.perf_counter() - begin
        assert result.usage.completion_tokens == (1 + len(steps)) * len(prompts)
        return seconds


class LlamaCpp(System):
    """`llama_decode`, with flash attention and the unified KV cache as they are fastest."""

    packages = ("llama_cpp_python", "numpy")

    def __init__(self, path: str, threads: int) -> None:
        import llama_cpp

        self.api: Any = llama_cpp
        self.threads = threads
        self._quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self._quiet, None)
        llama_cpp.llama_backend_init()
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = 0
        self.model = llama_cpp.llama_model_load_from_file(path.encode(), params)
        if not self.model:
            raise ValueError(f"llama.cpp: MODEL must be a file that it knows, got {path}")
        vocab = llama_cpp.llama_model_get_vocab(self.model)
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(vocab)
        self.contexts: dict[tuple[int, int], Any] = {}  # by sequences and length of prompts
        self.batches: list[Any] = []
        built_for = llama_cpp.llama_print_system_info().decode().replace(" = 1 |", "").strip()
        self.settings = f"n_threads=n_threads_batch={threads} n_batch=2048 n_ubatch=512 {built_for}"

    def prepare(self, prompts: Ids, steps: Ids) -> str:
        tried = []
        several, key = len(prompts) > 1, (len(prompts), len(prompts[0]))
        if key in self.contexts:
            self.api.llama_free(self.contexts.pop(key))
        params = self.api.llama_context_default_params()
        params.n_ctx, params.n_seq_max = CONTEXT * len(prompts), len(prompts)
        params.n_batch, params.n_ubatch = 2048, 512
        params.n_threads = params.n_threads_batch = self.threads
        for flash, unified in itertools.product((1, 0), (True, False) if several else (True,)):
            params.flash_attn_type, params.kv_unified = flash, unified
            self.context = self.api.llama_init_from_model(self.model, params)
            runs = [self.run(prompts, steps[:8]) for _ in range(3)][1:]
            seconds = min(run["steps_s" if steps else "prompt_s"] for run in runs)
            words = f"flash_attn={flash}" + f" kv_unified={int(unified)}" * several
            tried.append((seconds, words, self.context))
        (_, words, best), *others = sorted(tried, key=lambda entry: entry[0])
        for _, _, context in others:
            self.api.llama_free(context)
        self.contexts[key] = best
        return words

    def run(self, prompts: Ids, steps: Ids) -> dict[str, Any]:
        self.context = self.contexts.get((len(prompts), len(prompts[0])), self.context)
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), True)
        while self.batches:
            self.api.llama_batch_free(self.batches.pop())
        return super().run(prompts, steps)

    def step(self, num_seqs: int, batch: Any) -> Any:
        status = self.api.llama_decode(self.context, batch)
        if status != 0:
            raise RuntimeError(f"llama.cpp: llama_decode gave status {status}")
        logits = self.api.llama_get_logits(self.context)
        # Quicker than llama.cpp's greedy sampler, which copies the whole row first.
        return np.ctypeslib.as_array(logits, (num_seqs, self.vocab_size)).argmax(axis=1)

    def batch(self, token_ids: Ids, start: int) -> Any:
        num_seqs, count = len(token_ids), len(token_ids[0])
        batch = self.api.llama_batch_init(num_seqs * count, 0, 1)
        self.batches.append(batch)
        batch.n_tokens = num_seqs * count
        for idx, (seq, offset) in enumerate(itertools.product(range(num_seqs), range(count))):
            batch.token[idx] = token_ids[seq][offset]
            batch.pos[idx] = start + offset
            batch.n_seq_id[idx] = 1
            batch.seq_id[idx][0] = seq
            batch.logits[idx] = offset == count - 1
        return batch


SYSTEMS: dict[str, type[System]] = {"fullbeam": Fullbeam, "llama.cpp": LlamaCpp}


def main(argv: list[str]) -> int:
    """Serve the runtime `argv[0]` on the file `argv[1]` with `argv[2]` threads."""
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what the libraries print does not mix with the results
    kind = SYSTEMS[argv[0]]
    try:
        versions = [f"{name} {version(name)}" for name in kind.packages]
    except PackageNotFoundError as error:
        out.write(json.dumps({"absent": str(error.name)}) + "\n")
        return 0
    system = kind(argv[1], int(argv[2]))
    names = ("first_id", "vocab_size", "settings", "has_engine")
    fields = {name: getattr(system, name) for name in names}
    out.write(json.dumps({"versions": versions, **fields}) + "\n")
    for line in sys.stdin:
        action, prompts, steps = json.loads(line)
        out.write(json.dumps(getattr(system, action)(prompts, steps)) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
