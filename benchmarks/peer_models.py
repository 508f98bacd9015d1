# SPDX-License-Identifier: Apache-2.0
"""A GGUF file's weights in the formats of other runtimes: `peer_models.py FORMAT SOURCE FOLDER`.

A script for the interpreters of the other runtimes: no import of fullbeam. `transformers` reads the
file and writes its dequantised weights as bfloat16; `ctranslate2` and `openvino` read that folder
and quantise to int8, one scale per row, as their converters do unless told otherwise.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any


def convert_transformers(source: Path, folder: Path) -> None:
    import torch
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoTokenizer,
        modeling_gguf_pytorch_utils,
    )

    auto: Any = AutoModelForCausalLM
    files: Any = modeling_gguf_pytorch_utils
    tokenizer: Any = AutoTokenizer
    config = AutoConfig.from_pretrained(str(source.parent), gguf_file=source.name)
    model = auto.from_config(config, dtype=torch.float32)
    loaded = files.load_gguf_checkpoint(
        str(source), return_tensors=True, model_to_load=model, torch_dtype=torch.float32
    )
    missing, unexpected = model.load_state_dict(loaded["tensors"], strict=False)
    if unexpected or set(missing) - ({"lm_head.weight"} if config.tie_word_embeddings else set()):
        raise ValueError(f"{source}: tensors must be the model's, got {unexpected}, not {missing}")
    del loaded
    model.tie_weights()
    model.config.architectures = [type(model).__name__]
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.from_pretrained(str(source.parent), gguf_file=source.name).save_pretrained(folder)


def convert_ctranslate2(source: Path, folder: Path) -> None:
    from ctranslate2.converters import TransformersConverter

    TransformersConverter(str(source)).convert(str(folder), quantization="int8", force=True)


def convert_openvino(source: Path, folder: Path) -> None:
    from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig

    model = OVModelForCausalLM.from_pretrained(
        str(source),
        export=True,
        compile=False,
        quantization_config=OVWeightQuantizationConfig(bits=8),
    )
    model.save_pretrained(str(folder))


FORMATS = {
    "transformers": convert_transformers,
    "ctranslate2": convert_ctranslate2,
    "openvino": convert_openvino,
}

if __name__ == "__main__":
    FORMATS[sys.argv[1]](Path(sys.argv[2]), Path(sys.argv[3]))
