# SPDX-License-Identifier: Apache-2.0
"""transformers' searches on tiny random models, with the gaps between scores that they hung on.

For transformers 5 (`test_search.py`) and 4.56 (`make_group_beam_goldens.py`): the models here have
the rope frequencies that both take by default.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from tiny_models import VOCAB_SIZE, Tiny

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

CASES = {
    "llama": Tiny(),
    "qwen2": Tiny(arch="qwen2"),
    "gemma3": Tiny(arch="gemma3", num_layers=7, num_kv_heads=1, rope_base=1e6, window=8),
}
MIN_GAP = 1e-3
"""Between scores that a choice hangs on: a hundred times what rounding changes in them."""


def tiny_oracle(name: str, seed: int) -> Any:
    """A case's model in transformers, in float32, with weights drawn from the seed."""
    tiny = CASES[name]
    fields = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": tiny.hidden_size,
        "num_hidden_layers": tiny.num_layers,
        "num_attention_heads": tiny.num_q_heads,
        "num_key_value_heads": tiny.num_kv_heads,
        "head_dim": tiny.head_dim,
        "intermediate_size": tiny.ffn_size,
        "max_position_embeddings": tiny.context_len,
        "tie_word_embeddings": True,
        "rms_norm_eps": 1e-6,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    if tiny.is_gemma:
        fields |= {"sliding_window": tiny.window, "query_pre_attn_scalar": tiny.head_dim}
    kind = {"llama": "Llama", "qwen2": "Qwen2", "gemma3": "Gemma3Text"}[tiny.arch]
    config = getattr(transformers, f"{kind}Config")(**fields)
    config._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config)
    weights = tiny.weights(seed)
    state = {key: torch.from_numpy(values) for key, values in weights.items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])
    model.tie_weights()
    return model.float().eval()


class Gaps(transformers.LogitsProcessor):
    """Notes, for each prompt of a beam search, the least gap that a choice of it hung on."""

    def __init__(self, num_prompts: int, num_beams: int, ends: Sequence[int]) -> None:
        self.least = [float("inf")] * num_prompts
        self._num_beams = num_beams
        self._ends = ends
        self._sums: list[dict[tuple[int, ...], float]] = [{} for _ in range(num_prompts)]

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """Look at the log-probabilities of all beams of all prompts; leave them as they are."""
        for idx, sums in enumerate(self._sums):
            rows = slice(idx * self._num_beams, (idx + 1) * self._num_beams)
            # In the first step all beams are the prompt, which counts once.
            logprobs = dict(
                zip(map(tuple, input_ids[rows].tolist()), scores[rows].double(), strict=True)
            )
            beams = list(logprobs)
            totals = torch.cat([logprobs[beam] + (sums[beam] if sums else 0.0) for beam in beams])
            top = totals.topk(min(len(totals), self._num_beams * (len(self._ends) + 1) + 1))
            places, values = top.indices.tolist(), top.values.tolist()
            token_ids = [place % VOCAB_SIZE for place in places]
            gap = choice_gap(token_ids, values, self._num_beams, self._ends)
            self.least[idx] = min(self.least[idx], gap)
            self._sums[idx] = {
                (*beams[place // VOCAB_SIZE], token_id): value
                for place, token_id, value in zip(places, token_ids, values, strict=True)
            }
        return scores


def choice_gap(
    token_ids: Sequence[int], scores: Sequence[float], num_beams: int, ends: Sequence[int]
) -> float:
    """How far apart the candidates are, best first, between which a step of a search cuts."""
    is_end = [token_id in ends for token_id in token_ids]
    live = [score for score, ended in zip(scores, is_end, strict=True) if not ended]
    gaps = [float("inf")]
    if len(live) > num_beams:
        gaps.append(live[num_beams - 1] - live[num_beams])
    if True in is_end[num_beams - 1 : num_beams + 1]:
        gaps.append(scores[num_beams - 1] - scores[num_beams])
    return min(gaps)


def random_prompts(seed: int, num_prompts: int, num_tokens: int) -> list[list[int]]:
    """Bytes, of which every prompt has as many."""
    ids: list[list[int]] = (
        np.random.default_rng(seed).integers(0, 256, (num_prompts, num_tokens)).tolist()
    )
    return ids


def token_logprobs(model: Any, texts: Sequence[Sequence[int]]) -> Any:
    """float64 [texts, tokens - 1]: log-probability of each token after the first; equal lengths."""
    ids = torch.tensor([list(text) for text in texts])
    with torch.inference_mode():
        logits = model(ids, use_cache=False).logits[:, :-1]
    logprobs = logits.double().log_softmax(dim=-1)
    return logprobs.gather(-1, ids[:, 1:, None])[..., 0]
