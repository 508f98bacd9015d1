# SPDX-License-Identifier: Apache-2.0
"""What Hugging Face folders of each family call what GGUF files call otherwise."""

from __future__ import annotations

from dataclasses import dataclass, replace

# Keys of config.json, of all families, and GGUF's for them.
KEYS = {
    "hidden_size": "embedding_length",
    "n_embd": "embedding_length",
    "num_hidden_layers": "block_count",
    "n_layer": "block_count",
    "num_attention_heads": "attention.head_count",
    "n_head": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "intermediate_size": "feed_forward_length",
    "n_inner": "feed_forward_length",
    "max_position_embeddings": "context_length",
    "n_positions": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "layer_norm_eps": "attention.layer_norm_epsilon",
    "layer_norm_epsilon": "attention.layer_norm_epsilon",
    "norm_epsilon": "attention.layer_norm_epsilon",
    "hidden_act": "hidden_activation",
    "hidden_activation": "hidden_activation",
    "activation_function": "hidden_activation",
    "use_parallel_residual": "use_parallel_residual",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}


@dataclass(frozen=True)
class Layout:
    """Where a family's tensors are; names are GGUF's to Hugging Face's, without their ending."""

    arch: str  # GGUF's name of the family
    whole: dict[str, str]  # of the whole model
    layer: dict[str, str]  # of a layer, behind `layer_prefix`
    layer_prefix: str = "model.layers.{}."
    ignored_keys: tuple[str, ...] = ()  # of config.json: what they say isn't so
    is_transposed: bool = False  # matrices of layers are [cols, rows]
    is_qkv_by_head: bool = False  # query, key and value of a head follow each other


_LLAMA = Layout(
    "llama",
    whole={
        "token_embd": "model.embed_tokens",
        "output_norm": "model.norm",
        "output": "lm_head",
    },
    layer={
        "attn_norm": "input_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_q_norm": "self_attn.q_norm",
        "attn_k_norm": "self_attn.k_norm",
        "attn_output": "self_attn.o_proj",
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    },
)
_GEMMA2_LAYER = {
    **_LLAMA.layer,
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}

LAYOUTS: dict[str, Layout] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": replace(_LLAMA, arch="qwen2"),
    "qwen3": replace(_LLAMA, arch="qwen3"),
    "gemma3_text": replace(_LLAMA, arch="gemma3", layer=_GEMMA2_LAYER),
    "gemma": replace(_LLAMA, arch="gemma", ignored_keys=("hidden_act", "hidden_activation")),
    "gemma2": replace(_LLAMA, arch="gemma2", layer=_GEMMA2_LAYER),
    "starcoder2": replace(
        _LLAMA,
        arch="starcoder2",
        layer=_LLAMA.layer | {"ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"},
    ),
    "phi3": replace(
        _LLAMA,
        arch="phi3",
        layer=_LLAMA.layer | {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"},
    ),
    "gpt2": Layout(
        "gpt2",
        whole={
            "token_embd": "transformer.wte",
            "position_embd": "transformer.wpe",
            "output_norm": "transformer.ln_f",
            "output": "lm_head",
        },
        layer={
            "attn_norm": "ln_1",
            "attn_qkv": "attn.c_attn",
            "attn_output": "attn.c_proj",
            "ffn_norm": "ln_2",
            "ffn_up": "mlp.c_fc",
            "ffn_down": "mlp.c_proj",
        },
        layer_prefix="transformer.h.{}.",
        is_transposed=True,
    ),
    "gpt_neox": Layout(
        "gptneox",
        whole={
            "token_embd": "gpt_neox.embed_in",
            "output_norm": "gpt_neox.final_layer_norm",
            "output": "embed_out",
        },
        layer={
            "attn_norm": "input_layernorm",
            "attn_qkv": "attention.query_key_value",
            "attn_output": "attention.dense",
            "ffn_norm": "post_attention_layernorm",
            "ffn_up": "mlp.dense_h_to_4h",
            "ffn_down": "mlp.dense_4h_to_h",
        },
        layer_prefix="gpt_neox.layers.{}.",
        is_qkv_by_head=True,
    ),
}
"""By config.json's model_type."""
