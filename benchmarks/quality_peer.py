# SPDX-License-Identifier: Apache-2.0
"""Logits of other runtimes, from a process with an interpreter of its own: no import of fullbeam.

A line of JSON with token ids in, `float32 [num_tokens, vocab_size]` out, until the input ends. The
first line out is JSON with the runtime's name and versions.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Logits = Callable[[list[int]], Any]


def transformers_logits(path: Path) -> Logits:
    """Float32 PyTorch on the dequantised weights; transformers itself reads the file."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, modeling_gguf_pytorch_utils

    auto: Any = AutoModelForCausalLM
    files: Any = modeling_gguf_pytorch_utils
    config = AutoConfig.from_pretrained(str(path.parent), gguf_file=path.name)
    model = auto.from_config(config, dtype=torch.float32)
    loaded = files.load_gguf_checkpoint(
        str(path), return_tensors=True, model_to_load=model, torch_dtype=torch.float32
    )
    missing, unexpected = model.load_state_dict(loaded["tensors"], strict=False)
    del loaded
    if unexpected or set(missing) - ({"lm_head.weight"} if config.tie_word_embeddings else set()):
        raise ValueError(f"{path}: tensors must be the model's, got {unexpected}, not {missing}")
    model.tie_weights()
    model.eval()

    def run(ids: list[int]) -> Any:
        with torch.inference_mode():
            return model(torch.tensor([ids]), use_cache=False).logits[0].numpy()

    return run


def llama_cpp_logits(path: Path) -> Logits:
    """llama.cpp as it comes: its own kernels, a float16 KV cache."""
    import llama_cpp

    model = llama_cpp.Llama(
        str(path), n_ctx=512, n_batch=512, n_gpu_layers=0, logits_all=True, verbose=False
    )

    def run(ids: list[int]) -> Any:
        model.reset()
        model.eval(ids)
        return model.scores[: len(ids)]

    return run


RUNTIMES = {
    "transformers": (transformers_logits, ("transformers", "torch")),
    "llama.cpp": (llama_cpp_logits, ("llama_cpp_python",)),
}


def main(argv: list[str]) -> int:
    """Serve `argv[0]`, a runtime, on the file `argv[1]`."""
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what the libraries print does not mix with the numbers
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    make, packages = RUNTIMES[argv[0]]
    try:
        versions = {name: importlib.metadata.version(name) for name in packages}
    except importlib.metadata.PackageNotFoundError as error:
        out.write(json.dumps({"absent": str(error.name)}).encode() + b"\n")
        return 0
    logits = make(Path(argv[1]))
    out.write(json.dumps({"versions": versions}).encode() + b"\n")
    out.flush()
    for line in sys.stdin:
        out.write(np.ascontiguousarray(logits(json.loads(line)), np.float32).tobytes())
        out.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
