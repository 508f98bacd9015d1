# SPDX-License-Identifier: Apache-2.0
"""Tiny random models of every family as transformers saves them, and as GGUF files."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from fullbeam import reference
from tiny_models import VOCAB_SIZE

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

NUM_TOKENS = 296  # of the tokenizer; rows of the embedding are often rounded up
_PAIRS = [(a, b) for a in "etaoin" for b in "srhldu"]
_SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "max_position_embeddings": 256,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": None,
}
_GPT2 = {
    "vocab_size": VOCAB_SIZE,
    "n_embd": 64,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 128,
    "bos_token_id": 256,
    "eos_token_id": 257,
}
_NO_GROUPS = {name: size for name, size in _SIZES.items() if name != "num_key_value_heads"}


@dataclass(frozen=True)
class Family:
    """One case: transformers' config, and how converters write its GGUF file."""

    config: str  # of transformers, without "Config"
    arch: str  # GGUF's
    fields: dict[str, Any] = field(default_factory=dict)
    sizes: dict[str, Any] = field(default_factory=lambda: _SIZES)
    is_byte_level: bool = True


ROPE = {"rope_type": "default", "rope_theta": 10000.0}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {**ROPE, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
GEMMA3_ROPES = {
    "full_attention": {**ROPE, "rope_theta": 1e6},
    "sliding_attention": {**ROPE},
}

CASES = {
    "llama": Family("Llama", "llama"),
    "llama-3": Family("Llama", "llama", {"rope_parameters": LLAMA3, "head_dim": 32}),
    "codellama": Family(
        "Llama",
        "llama",
        {"num_key_value_heads": 4, "rope_parameters": {**ROPE, "rope_theta": 1e6}},
        is_byte_level=False,
    ),
    "deepseek-coder": Family(
        "Llama", "llama", {"rope_parameters": {**ROPE, "rope_type": "linear", "factor": 4.0}}
    ),
    "smollm2": Family("Llama", "llama", {"tie_word_embeddings": True}),
    "mistral": Family("Mistral", "llama", {"sliding_window": 8}, is_byte_level=False),
    "qwen2": Family("Qwen2", "qwen2", {"tie_word_embeddings": True}),
    "qwen2-yarn": Family("Qwen2", "qwen2", {"rope_parameters": YARN}),
    "qwen3": Family("Qwen3", "qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
    "gemma3": Family(
        "Gemma3Text",
        "gemma3",
        {
            "num_hidden_layers": 7,
            "head_dim": 16,
            "query_pre_attn_scalar": 16,
            "sliding_window": 8,
            "rope_parameters": GEMMA3_ROPES,
        },
        is_byte_level=False,
    ),
    "codegemma": Family("Gemma", "gemma", {"head_dim": 32}, is_byte_level=False),
    "gemma2": Family(
        "Gemma2",
        "gemma2",
        {
            "num_hidden_layers": 4,
            "head_dim": 32,
            "query_pre_attn_scalar": 32,
            "sliding_window": 8,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 4.0,
        },
        is_byte_level=False,
    ),
    "starcoder2": Family("Starcoder2", "starcoder2", {"sliding_window": 8}),
    "phi3": Family("Phi3", "phi3", {"sliding_window": 16}, is_byte_level=False),
    "phi3-long": Family(
        "Phi3",
        "phi3",
        {
            "num_key_value_heads": 4,
            "original_max_position_embeddings": 64,
            "rope_parameters": {
                **ROPE,
                "rope_type": "longrope",
                "partial_rotary_factor": 0.75,
                "short_factor": [1.0 + idx / 8 for idx in range(6)],
                "long_factor": [1.0 + idx for idx in range(6)],
            },
        },
        is_byte_level=False,
    ),
    "gpt2": Family("GPT2", "gpt2", sizes=_GPT2),
    "pythia": Family(
        "GPTNeoX", "gptneox", {"hidden_size": 128, "rotary_pct": 0.25}, sizes=_NO_GROUPS
    ),
    "gptneox-serial": Family(
        "GPTNeoX", "gptneox", {"use_parallel_residual": False}, sizes=_NO_GROUPS
    ),
}


def config_of(name: str) -> Any:
    """transformers' config of a case."""
    family = CASES[name]
    return getattr(transformers, f"{family.config}Config")(**(family.sizes | family.fields))


def make_model(name: str, seed: int = 3) -> Any:
    """A case's model in transformers, float32; weights such that tokens differ clearly."""
    config = config_of(name)
    config._attn_implementation = "eager"
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    is_gemma = "gemma" in name
    with torch.no_grad():
        for key, values in model.named_parameters():
            noise = torch.randn_like(values)
            if values.ndim == 1:
                is_norm = ("norm" in key or "ln_" in key) and key.endswith("weight")
                values.copy_(noise * 0.3 + float(is_norm and not is_gemma))
                if key == "model.norm.weight" and is_gemma:
                    values.add_(6.0)
            else:
                is_embedding = "embed" in key or "wte" in key
                width = values.shape[0] if is_transposed(key) else values.shape[1]
                scale = (0.25 if is_gemma else 3.0) if is_embedding else 1.2
                values.copy_(noise * scale / width**0.5)
    model.generation_config.eos_token_id = None
    model.tie_weights()
    return model


def is_transposed(key: str) -> bool:
    """GPT-2's matrices."""
    return key.startswith("transformer.h.") and ".c_" in key


def save(name: str, model: Any, folder: Path, **options: Any) -> Path:
    """Save a model and its tokenizer as transformers does."""
    model.save_pretrained(folder, **options)
    tokenizer = make_tokenizer(is_byte_level=CASES[name].is_byte_level)
    tokenizer.save(str(folder / "tokenizer.json"))
    options = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(options))
    return folder


def make_tokenizer(*, is_byte_level: bool) -> tokenizers.Tokenizer:
    """A small BPE tokenizer, of bytes or of pieces with bytes to fall back to."""
    tokens = _tokens(is_byte_level)
    ids = {token: idx for idx, token in enumerate(tokens)}
    merges = [pair for pair in _PAIRS if "".join(pair) in ids]
    if is_byte_level:
        tokenizer = tokenizers.Tokenizer(models.BPE(ids, merges))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
    else:
        tokenizer = tokenizers.Tokenizer(models.BPE(ids, merges, byte_fallback=True))
        tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
        )
    special = [tokenizers.AddedToken(token, special=True) for token in ("<s>", "</s>")]
    tokenizer.add_tokens(special)
    return tokenizer


def _tokens(is_byte_level: bool) -> list[str]:
    if is_byte_level:
        first = sorted(pre_tokenizers.ByteLevel.alphabet())
    else:
        first = [f"<0x{byte:02X}>" for byte in range(256)]
    letters = [] if is_byte_level else [*dict.fromkeys("".join(map("".join, _PAIRS))), "\u2581"]
    pieces = [*letters, *("".join(pair) for pair in _PAIRS)]
    return [*first, "<s>", "</s>", *pieces][:NUM_TOKENS]


def write_gguf(
    name: str, model: Any, path: Path, kind: str = "F32", *, max_tensors: int = 0
) -> Path:
    """Write a GGUF file as llama.cpp's converter does, tensors named by the gguf package.

    With ``max_tensors`` it is split into files of so many.
    """
    family, config = CASES[name], model.config
    writer = gguf.GGUFWriter(path, family.arch, split_max_tensors=max_tensors)
    _add_shape(writer, family, config)
    _add_vocabulary(writer, family.is_byte_level)
    arch = {value: key for key, value in gguf.MODEL_ARCH_NAMES.items()}[family.arch]
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    state = model.state_dict()
    for key, values in state.items():
        if key.endswith(("lm_head.weight", "embed_out.weight")) and config.tie_word_embeddings:
            continue
        stem, ending = key.rsplit(".", 1)
        tensor = _gguf_values(family, config, key, values.float().numpy())
        found = names.get_name(stem)
        assert found is not None, key
        used = kind if tensor.ndim == 2 else "F32"
        rows = reference.quantize(tensor, used).reshape(*tensor.shape[:-1], -1)
        ggml_type = gguf.GGMLQuantizationType[used]
        writer.add_tensor(f"{found}.{ending}", rows, raw_dtype=ggml_type)
    for key, values in _rope_factors(config).items():
        writer.add_tensor(key, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_shape(writer: Any, family: Family, config: Any) -> None:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    ffn_size = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    writer.add_feed_forward_length(ffn_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(getattr(config, "num_key_value_heads", config.num_attention_heads))
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    for key in ("layer_norm_epsilon", "layer_norm_eps", "norm_epsilon"):
        if hasattr(config, key):
            writer.add_layer_norm_eps(getattr(config, key))
    if hasattr(config, "rms_norm_eps"):
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if getattr(config, "attn_logit_softcapping", None):
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if family.arch == "gptneox":
        writer.add_parallel_residual(config.use_parallel_residual)
    if getattr(config, "sliding_window", None):
        writer.add_sliding_window(config.sliding_window)
    rope = getattr(config, "rope_parameters", None)
    if rope is None:
        return
    rope = rope.get("full_attention", rope)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_rope_dimension_count(int(head_dim * rope.get("partial_rotary_factor", 1.0)))
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "longrope":
        ratio = config.max_position_embeddings / config.original_max_position_embeddings
        log_original = math.log(config.original_max_position_embeddings)
        writer.add_rope_scaling_attn_factors(math.sqrt(1 + math.log(ratio) / log_original))
        writer.add_rope_scaling_orig_ctx_len(config.original_max_position_embeddings)
    elif "original_max_position_embeddings" in rope and rope["rope_type"] != "llama3":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])


def _rope_factors(config: Any) -> dict[str, Any]:
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "llama3":
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        plain = 1 / rope["rope_theta"] ** (np.arange(0, config.head_dim, 2) / config.head_dim)
        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
        return {"rope_freqs.weight": (plain / scaled.numpy()).astype(np.float32)}
    return {
        f"rope_factors_{which}.weight": np.array(rope[f"{which}_factor"], np.float32)
        for which in ("long", "short")
        if f"{which}_factor" in rope
    }


def _gguf_values(family: Family, config: Any, key: str, values: Any) -> Any:
    heads = config.num_attention_heads
    if family.arch.startswith("gemma") and key.endswith("norm.weight"):
        return values + np.float32(1)
    if family.arch == "llama" and ("q_proj" in key or "k_proj" in key):
        # The halves of a head that rotate together become neighbours.
        halves = values.reshape(-1, 2, config.head_dim // 2, values.shape[1])
        return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(values.shape)
    if family.arch == "gpt2" and values.ndim == 2 and is_transposed(key):
        return np.ascontiguousarray(values.T)
    if "query_key_value" in key:
        by_head = values.reshape(heads, 3, config.hidden_size // heads, *values.shape[1:])
        return np.ascontiguousarray(by_head.swapaxes(0, 1)).reshape(values.shape)
    return values


def _add_vocabulary(writer: Any, is_byte_level: bool) -> None:
    tokens = _tokens(is_byte_level)
    kinds = [gguf.TokenType.NORMAL] * len(tokens)
    kinds[256:258] = [gguf.TokenType.CONTROL] * 2
    if is_byte_level:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_merges([f"{a} {b}" for a, b in _PAIRS if a + b in tokens])
    else:
        kinds[:256] = [gguf.TokenType.BYTE] * 256
        writer.add_tokenizer_model("llama")
        writer.add_token_scores([-1.0 * idx for idx in range(VOCAB_SIZE)])
        writer.add_add_space_prefix(False)
    writer.add_token_list([*tokens, *(f"[PAD{i}]" for i in range(VOCAB_SIZE - len(tokens)))])
    unused = itertools.repeat(gguf.TokenType.UNUSED, VOCAB_SIZE - len(tokens))
    writer.add_token_types([*kinds, *unused])
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(257)
    writer.add_add_bos_token(True)
