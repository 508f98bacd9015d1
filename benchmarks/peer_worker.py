# SPDX-License-Identifier: Apache-2.0
"""One runtime, measured in a process with an interpreter of its own.

`peer_worker.py NAME MODEL THREADS` serves lines of JSON: a greeting out, then a task in and its
times out, until the input ends. `peer_worker.py NAME` says what is installed. One more runtime is
one more class in SYSTEMS; only what that class itself imports has to be there.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

MAX_ROWS = 64
CONTEXT = 4096
PARENT_DIED = 1  # PR_SET_PDEATHSIG

Ids = Sequence[Sequence[int]]  # [num_prompts][tokens of each]
Result = dict[str, Any]  # first_s, total_s, tokens_between, token_ids: see fullbeam.bench.Timing


class System:
    """A runtime with a model in memory."""

    packages: ClassVar[tuple[str, ...]]  # distributions whose versions are reported
    settings: str  # those of all tasks
    has_search = True
    has_groups = False  # diverse ones
    first_id: int | None = None  # what prompts of this model begin with

    def __init__(self, path: str, threads: int) -> None:
        raise NotImplementedError

    def prepare(self, prompts: Ids, task: dict[str, int]) -> str:
        """Take the settings that are the fastest for such a task, and return them."""
        return ""

    def run(self, prompts: Ids, task: dict[str, int]) -> Result:
        """Run the prompts at once, each to `max_tokens` new tokens, whatever they are."""
        raise NotImplementedError


class Fullbeam(System):
    """The engine with its scheduling, stepped here."""

    packages = ("numpy",)
    has_groups = True

    def __init__(self, path: str, threads: int) -> None:
        from fullbeam.engine.engine import Engine
        from fullbeam.models import open_model

        opened = open_model(Path(path), threads=threads)
        context = min(CONTEXT, opened.decoder.config.context_len)
        self.engine = Engine(
            opened.decoder,
            opened.tokenizer,
            context=context,
            max_rows=MAX_ROWS,
            num_pages=4096,
            draft_tokens=0,
        )
        self.first_id = opened.tokenizer.bos_id if opened.tokenizer.add_bos else None
        self.settings = f"max_rows={MAX_ROWS} token_budget=512 draft_tokens=0"

    def run(self, prompts: Ids, task: dict[str, int]) -> Result:
        from fullbeam.bench import Task, run

        return vars(run(self.engine, prompts, Task(**task).params))


class LlamaCpp(System):
    """`llama_decode`, with flash attention and the unified KV cache as they are fastest."""

    packages = ("llama_cpp_python", "numpy")
    has_search = False

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
        self.contexts: dict[str, Any] = {}  # by task
        built_for = llama_cpp.llama_print_system_info().decode().replace(" = 1 |", "").strip()
        self.settings = f"n_threads=n_threads_batch={threads} n_batch=2048 n_ubatch=512 {built_for}"

    def prepare(self, prompts: Ids, task: dict[str, int]) -> str:
        num_rows = len(prompts) * task["num_choices"]
        params = self.api.llama_context_default_params()
        params.n_seq_max = num_rows
        params.n_ctx = num_rows * -(-(len(prompts[0]) + task["max_tokens"]) // 256) * 256
        params.n_batch, params.n_ubatch = 2048, 512
        params.n_threads = params.n_threads_batch = self.threads
        # Sequences share a prompt's cells only in the unified cache.
        kinds = (True,) if num_rows == 1 or task["num_choices"] > 1 else (True, False)
        short, tried = task | {"max_tokens": min(8, task["max_tokens"])}, []
        for flash, unified in itertools.product((1, 0), kinds):
            params.flash_attn_type, params.kv_unified = flash, unified
            context = self.api.llama_init_from_model(self.model, params)
            self.contexts[str(task)] = self.contexts[str(short)] = context
            result = self.run(prompts, short)
            begin = result["first_s"] if task["max_tokens"] > 1 else 0.0
            words = f"flash_attn={flash} kv_unified={int(unified)}"
            tried.append((result["total_s"] - begin, words, context))
        (_, words, best), *others = sorted(tried, key=lambda entry: entry[0])
        for _, _, context in others:
            self.api.llama_free(context)
        self.contexts[str(task)] = self.contexts[str(short)] = best
        return words

    def run(self, prompts: Ids, task: dict[str, int]) -> Result:
        context, copies = self.contexts[str(task)], task["num_choices"]
        num_rows, length = len(prompts) * copies, len(prompts[0])
        self.api.llama_memory_clear(self.api.llama_get_memory(context), True)
        # A prompt is computed once for all of its choices; its tokens belong to each of them.
        starts = [range(idx * copies, (idx + 1) * copies) for idx in range(len(prompts))]
        begin = time.perf_counter()
        choices = []
        for first in range(0, len(prompts), max(1, 2048 // length)):
            part = range(first, min(first + max(1, 2048 // length), len(prompts)))
            tokens = [
                (prompts[idx][place], place, starts[idx], place == length - 1)
                for idx in part
                for place in range(length)
            ]
            choices.append(self._decode(context, tokens))
        ids = np.repeat(np.concatenate(choices), copies)
        first_s = time.perf_counter() - begin
        steps = [ids]
        for position in range(length, length + task["max_tokens"] - 1):
            rows = [(int(ids[row]), position, (row,), True) for row in range(num_rows)]
            ids = self._decode(context, rows)
            steps.append(ids)
        total_s = time.perf_counter() - begin
        token_ids = np.stack(steps, axis=1)[::copies].tolist()
        return result_of(first_s, total_s, num_rows * (len(steps) - 1), token_ids)

    def _decode(self, context: Any, tokens: Sequence[tuple[int, int, Sequence[int], bool]]) -> Any:
        """Return the most likely successors of the tokens that are marked so."""
        batch = self.api.llama_batch_init(
            len(tokens), 0, max(len(seqs) for _, _, seqs, _ in tokens)
        )
        batch.n_tokens = len(tokens)
        for idx, (token_id, position, seqs, is_last) in enumerate(tokens):
            batch.token[idx], batch.pos[idx], batch.logits[idx] = token_id, position, is_last
            batch.n_seq_id[idx] = len(seqs)
            for place, seq in enumerate(seqs):
                batch.seq_id[idx][place] = seq
        status = self.api.llama_decode(context, batch)
        self.api.llama_batch_free(batch)
        if status != 0:
            raise RuntimeError(f"llama.cpp: llama_decode gave status {status}")
        num_rows = sum(is_last for _, _, _, is_last in tokens)
        logits = self.api.llama_get_logits(context)
        # Quicker than llama.cpp's greedy sampler, which copies the whole row first.
        return np.ctypeslib.as_array(logits, (num_rows, self.vocab_size)).argmax(axis=1)


class CTranslate2(System):
    """`Generator.generate_batch` on int8 weights; a search keeps every beam's KV of its own."""

    packages = ("ctranslate2", "numpy")

    def __init__(self, path: str, threads: int) -> None:
        import ctranslate2

        self.generator: Any = ctranslate2.Generator(
            path, device="cpu", compute_type="int8", intra_threads=threads, inter_threads=1
        )
        self.tokens: list[str] = json.loads(Path(path, "vocabulary.json").read_text())
        self.settings = f"int8 weights, compute_type=int8 intra_threads={threads}"

    def run(self, prompts: Ids, task: dict[str, int]) -> Result:
        copies, num_beams = task["num_choices"], task["num_beams"]
        texts = [[self.tokens[idx] for idx in ids] for ids in prompts]
        first_s = 0.0

        def note(step: Any) -> bool:
            nonlocal first_s
            if step.step == 0:
                first_s = time.perf_counter() - begin
            return False

        options: dict[str, Any] = {
            "max_length": task["max_tokens"],
            "min_length": task["max_tokens"],
            "include_prompt_in_result": False,
            "beam_size": num_beams,
            "num_hypotheses": max(copies, num_beams),
        }
        if num_beams == 1:
            options["callback"] = note
        if copies > 1:  # it draws them: several greedy ones would be one
            options["sampling_topk"] = 2
        begin = time.perf_counter()
        results = self.generator.generate_batch(texts, **options)
        total_s = time.perf_counter() - begin
        steps = task["max_tokens"] - 1
        token_ids = [result.sequences_ids[0] for result in results]
        return result_of(first_s, total_s, len(prompts) * copies * steps, token_ids)


class OpenVino(System):
    """The continuous batching pipeline of OpenVINO GenAI on int8 weights, stepped here."""

    packages = ("openvino-genai", "openvino", "numpy")
    has_groups = True

    def __init__(self, path: str, threads: int) -> None:
        import openvino
        import openvino_genai

        self.api: Any = openvino_genai
        self.tensor: Any = openvino.Tensor
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.cache_size = 3
        scheduler.enable_prefix_caching = False
        scheduler.dynamic_split_fuse = False
        scheduler.max_num_batched_tokens = 4096
        scheduler.max_num_seqs = 256
        self.pipeline = openvino_genai.ContinuousBatchingPipeline(
            path, scheduler, "CPU", {"INFERENCE_NUM_THREADS": threads}
        )
        self.settings = (
            f"int8 weights, continuous batching, INFERENCE_NUM_THREADS={threads}, no prefix "
            "cache, max_num_batched_tokens=4096 dynamic_split_fuse=False"
        )

    def run(self, prompts: Ids, task: dict[str, int]) -> Result:
        options: dict[str, Any] = {"max_new_tokens": task["max_tokens"], "ignore_eos": True}
        num_beams = task["num_beams"]
        if num_beams > 1:
            options |= {"num_beams": num_beams, "num_return_sequences": num_beams}
        if task["num_groups"] > 1:
            options |= {"num_beam_groups": task["num_groups"], "diversity_penalty": 0.3}
        config = self.api.GenerationConfig(**options)
        # Greedy choices of one prompt would be one: they are requests of their own.
        arrays = [np.array([ids]) for ids in prompts for _ in range(task["num_choices"])]
        begin = time.perf_counter()
        handles = [
            self.pipeline.add_request(idx, self.tensor(ids), config)
            for idx, ids in enumerate(arrays)
        ]
        times = []
        while self.pipeline.has_non_finished_requests():
            self.pipeline.step()
            times.append(time.perf_counter() - begin)
        # Prompts that do not fit into a step come in the next; rows decode from then on.
        num_prompt_steps = len(times) - task["max_tokens"] + 1
        found = [handle.read_all() for handle in handles]
        token_ids = [list(outputs[0].generated_ids) for outputs in found]
        if num_prompt_steps < 1 or {len(ids) for ids in token_ids} != {task["max_tokens"]}:
            raise RuntimeError(f"openvino: {task} took {len(times)} steps, which is no such task")
        tokens_between = len(handles) * (task["max_tokens"] - 1)
        firsts = token_ids[:: task["num_choices"]]
        return result_of(times[num_prompt_steps - 1], times[-1], tokens_between, firsts)


class Transformers(System):
    """`generate` in bfloat16, which it is fastest in."""

    packages = ("transformers", "torch", "numpy")

    def __init__(self, path: str, threads: int) -> None:
        import torch
        import transformers

        self.torch: Any = torch
        torch.set_num_threads(threads)
        auto: Any = transformers.AutoModelForCausalLM
        self.model = auto.from_pretrained(path, dtype=torch.bfloat16).eval()
        self.settings = f"bfloat16, torch threads={threads}"

    def run(self, prompts: Ids, task: dict[str, int]) -> Result:
        times: list[float] = []

        def note(token_ids: Any, scores: Any) -> Any:
            times.append(time.perf_counter() - begin)
            return scores

        num_beams, copies = task["num_beams"], task["num_choices"]
        ids = self.torch.tensor(prompts).repeat_interleave(copies, dim=0)
        begin = time.perf_counter()
        with self.torch.inference_mode():
            out = self.model.generate(
                ids,
                attention_mask=self.torch.ones_like(ids),
                max_new_tokens=task["max_tokens"],
                min_new_tokens=task["max_tokens"],
                num_beams=num_beams,
                num_return_sequences=num_beams,
                do_sample=False,
                pad_token_id=0,
                logits_processor=[note],
            )
        total_s = time.perf_counter() - begin
        token_ids = out[:: copies * num_beams, len(prompts[0]) :].tolist()
        return result_of(times[0], total_s, len(ids) * (task["max_tokens"] - 1), token_ids)


SYSTEMS: dict[str, type[System]] = {
    "fullbeam": Fullbeam,
    "llama.cpp": LlamaCpp,
    "ctranslate2": CTranslate2,
    "openvino": OpenVino,
    "transformers": Transformers,
}


def result_of(first_s: float, total_s: float, tokens_between: int, token_ids: Ids) -> Result:
    return {
        "first_s": first_s,
        "total_s": total_s,
        "tokens_between": tokens_between,
        "token_ids": token_ids,
    }


def main(argv: list[str]) -> int:
    """Serve the runtime `argv[0]` on the model `argv[1]` with `argv[2]` threads."""
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what the libraries print does not mix with the results
    kind = SYSTEMS[argv[0]]
    try:
        versions = [f"{name} {version(name)}" for name in kind.packages]
    except PackageNotFoundError as error:
        out.write(json.dumps({"absent": str(error.name)}) + "\n")
        return 0
    if len(argv) == 1:
        out.write(json.dumps({"versions": versions}) + "\n")
        return 0
    if sys.platform == "linux":
        # A process that is stopped could not see that its parent is gone.
        ctypes.CDLL(None).prctl(PARENT_DIED, signal.SIGKILL)
    system = kind(argv[1], int(argv[2]))
    names = ("first_id", "settings", "has_search", "has_groups")
    fields = {name: getattr(system, name) for name in names}
    out.write(json.dumps({"versions": versions, **fields}) + "\n")
    for line in sys.stdin:
        action, prompts, task = json.loads(line)
        try:
            answer = getattr(system, action)(prompts, task)
        except (RuntimeError, ValueError) as error:
            answer = {"error": str(error).splitlines()[0]}
        out.write(json.dumps(answer) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
