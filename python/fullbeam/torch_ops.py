# SPDX-License-Identifier: Apache-2.0
"""`fullbeam.ops` as custom ops of torch, ``torch.ops.fullbeam.*``: torch.compile goes through them.

Arguments and results are those of the functions of the same names in `fullbeam.ops`, as torch
tensors and without ``out``. `rope` and `kv_write` write in place and return nothing; `sample` and
`beam_step` are told the widths of their results, so that shapes don't depend on numbers in tensors.
No op has a gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fullbeam import ops
from fullbeam.ops import BeamStep, Sample

__all__ = [
    "attention_decode",
    "attention_prefill",
    "beam_step",
    "gated_activation",
    "kv_write",
    "logprobs",
    "rms_norm",
    "rope",
    "sample",
]


def _empty_like(x: Tensor, *_: object, **__: object) -> Tensor:
    return x.new_empty(x.shape)


def _half(x: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], x.shape[1] // 2))


@torch.library.custom_op("fullbeam::rms_norm", mutates_args=())
def rms_norm(
    x: Tensor,
    weight: Tensor,
    residual: Tensor | None = None,
    *,
    eps: float = 1e-6,
    weight_offset: float = 0.0,
) -> Tensor:
    """See `fullbeam.ops.rms_norm`."""
    out = _empty_like(x)
    ops.rms_norm(x, weight, eps=eps, weight_offset=weight_offset, residual=residual, out=out)
    return out


@torch.library.custom_op("fullbeam::rope", mutates_args=("x",))
def rope(
    x: Tensor,
    positions: Tensor,
    inv_freq: Tensor,
    *,
    interleaved: bool = False,
    scale: float = 1.0,
) -> None:
    """See `fullbeam.ops.rope`."""
    ops.rope(x, positions, inv_freq, interleaved=interleaved, scale=scale)


@torch.library.custom_op("fullbeam::gated_activation", mutates_args=())
def gated_activation(x: Tensor, *, activation: str = "silu") -> Tensor:
    """See `fullbeam.ops.gated_activation`."""
    out = _half(x)
    ops.gated_activation(x, activation=activation, out=out)
    return out


@gated_activation.register_fake
def _(x: Tensor, *, activation: str = "silu") -> Tensor:
    return _half(x)


@torch.library.custom_op("fullbeam::kv_write", mutates_args=("k_pages", "v_pages"))
def kv_write(k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, slots: Tensor) -> None:
    """See `fullbeam.ops.kv_write`."""
    ops.kv_write(k, v, k_pages, v_pages, slots)


@torch.library.custom_op("fullbeam::attention_prefill", mutates_args=())
def attention_prefill(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    query_starts: Tensor,
    *,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
) -> Tensor:
    """See `fullbeam.ops.attention_prefill`."""
    out = _empty_like(q)
    ops.attention_prefill(
        q, k_pages, v_pages, page_table, seq_lens, query_starts,
        scale=scale, window=window, softcap=softcap, out=out,
    )  # fmt: skip
    return out


@torch.library.custom_op("fullbeam::attention_decode", mutates_args=())
def attention_decode(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    query_starts: Tensor | None = None,
    slot_starts: Tensor | None = None,
    num_slots: Tensor | None = None,
    visible: Tensor | None = None,
    slot_positions: Tensor | None = None,
    positions: Tensor | None = None,
    *,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
) -> Tensor:
    """See `fullbeam.ops.attention_decode`."""
    out = _empty_like(q)
    ops.attention_decode(
        q, k_pages, v_pages, page_table, seq_lens, query_starts=query_starts,
        slot_starts=slot_starts, num_slots=num_slots, visible=visible,
        slot_positions=slot_positions, positions=positions,
        scale=scale, window=window, softcap=softcap, out=out,
    )  # fmt: skip
    return out


for _op in (rms_norm, attention_prefill, attention_decode):
    _op.register_fake(_empty_like)


def _logprobs_results(logits: Tensor, num_top: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    num_rows = logits.shape[0]
    return (
        logits.new_empty((num_rows,), dtype=torch.float32),
        logits.new_empty((num_rows,), dtype=torch.int32),
        logits.new_empty((num_rows, num_top), dtype=torch.int32),
        logits.new_empty((num_rows, num_top), dtype=torch.float32),
    )


@torch.library.custom_op("fullbeam::logprobs", mutates_args=())
def logprobs(
    logits: Tensor, token_ids: Tensor, *, num_top: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `fullbeam.ops.logprobs`."""
    return ops.logprobs(logits, token_ids, num_top=num_top)


@logprobs.register_fake
def _(
    logits: Tensor, token_ids: Tensor, *, num_top: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _logprobs_results(logits, num_top)


def _sample_results(logits: Tensor, max_top: int | None) -> list[Tensor]:
    token_ids = logits.new_empty((logits.shape[0],), dtype=torch.int32)
    if max_top is None:
        return [token_ids]
    log_sums = logits.new_empty((logits.shape[0], 2), dtype=torch.float64)
    return [token_ids, *_logprobs_results(logits, max_top), log_sums]


@torch.library.custom_op("fullbeam::sample", mutates_args=())
def _sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seeds: Tensor,
    counters: Tensor,
    allowed: Tensor | None,
    allowed_idx: Tensor | None,
    bias_starts: Tensor | None,
    bias_ids: Tensor | None,
    bias_values: Tensor | None,
    history_starts: Tensor | None,
    history_ids: Tensor | None,
    history_counts: Tensor | None,
    repetition_penalty: Tensor | None,
    frequency_penalty: Tensor | None,
    presence_penalty: Tensor | None,
    num_top: Tensor | None,
    max_top: int | None,
) -> list[Tensor]:
    out = _sample_results(logits, max_top)
    ops.sample(
        logits, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seeds=seeds,
        counters=counters, allowed=allowed, allowed_idx=allowed_idx, bias_starts=bias_starts,
        bias_ids=bias_ids, bias_values=bias_values, history_starts=history_starts,
        history_ids=history_ids, history_counts=history_counts,
        repetition_penalty=repetition_penalty, frequency_penalty=frequency_penalty,
        presence_penalty=presence_penalty, num_top=num_top, out=Sample(*out),
    )  # fmt: skip
    return out


@_sample.register_fake
def _(logits: Tensor, *others: Any) -> list[Tensor]:
    return _sample_results(logits, others[-1])


def sample(
    logits: Tensor,
    *,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seeds: Tensor,
    counters: Tensor,
    allowed: Tensor | None = None,
    allowed_idx: Tensor | None = None,
    bias_starts: Tensor | None = None,
    bias_ids: Tensor | None = None,
    bias_values: Tensor | None = None,
    history_starts: Tensor | None = None,
    history_ids: Tensor | None = None,
    history_counts: Tensor | None = None,
    repetition_penalty: Tensor | None = None,
    frequency_penalty: Tensor | None = None,
    presence_penalty: Tensor | None = None,
    num_top: Tensor | None = None,
    max_top: int | None = None,
) -> Sample:
    """See `fullbeam.ops.sample`.

    Parameters
    ----------
    max_top : at least the largest of ``num_top``
        Width of the results; given with ``num_top``, and only then.
    """
    if (max_top is None) != (num_top is None):
        raise ValueError(f"sample: max_top must be given with num_top, only then, got {max_top}")
    return Sample(*_sample(
        logits, temperature, top_k, top_p, min_p, seeds, counters, allowed, allowed_idx,
        bias_starts, bias_ids, bias_values, history_starts, history_ids, history_counts,
        repetition_penalty, frequency_penalty, presence_penalty, num_top, max_top,
    ))  # fmt: skip


@torch.library.custom_op("fullbeam::beam_step", mutates_args=())
def _beam_step(
    logits: Tensor,
    beam_rows: Tensor,
    sums: Tensor,
    group_starts: Tensor,
    request_starts: Tensor,
    beam_sizes: Tensor,
    diversity_strengths: Tensor,
    allowed: Tensor | None,
    allowed_idx: Tensor | None,
    terminators: Tensor | None,
    terminator_idx: Tensor | None,
    bias_starts: Tensor | None,
    bias_ids: Tensor | None,
    bias_values: Tensor | None,
    max_beam: int,
) -> list[Tensor]:
    return list(ops.beam_step(
        logits, beam_rows=beam_rows, sums=sums, group_starts=group_starts,
        request_starts=request_starts, beam_sizes=beam_sizes,
        diversity_strengths=diversity_strengths, allowed=allowed, allowed_idx=allowed_idx,
        terminators=terminators, terminator_idx=terminator_idx, bias_starts=bias_starts,
        bias_ids=bias_ids, bias_values=bias_values, max_beam=max_beam,
    ))  # fmt: skip


@_beam_step.register_fake
def _(
    logits: Tensor, beam_rows: Tensor, sums: Tensor, group_starts: Tensor, *others: Any
) -> list[Tensor]:
    shape = (group_starts.shape[0] - 1, others[-1])
    return [
        logits.new_empty((*shape, 2) if dtype is torch.float64 else shape, dtype=dtype)
        for dtype in 2 * (torch.int32, torch.int32, torch.float32, torch.float64)
    ]


def beam_step(
    logits: Tensor,
    *,
    beam_rows: Tensor,
    sums: Tensor,
    group_starts: Tensor,
    request_starts: Tensor,
    beam_sizes: Tensor,
    diversity_strengths: Tensor,
    max_beam: int,
    allowed: Tensor | None = None,
    allowed_idx: Tensor | None = None,
    terminators: Tensor | None = None,
    terminator_idx: Tensor | None = None,
    bias_starts: Tensor | None = None,
    bias_ids: Tensor | None = None,
    bias_values: Tensor | None = None,
) -> BeamStep:
    """See `fullbeam.ops.beam_step`; ``max_beam`` must be given."""
    return BeamStep(*_beam_step(
        logits, beam_rows, sums, group_starts, request_starts, beam_sizes, diversity_strengths,
        allowed, allowed_idx, terminators, terminator_idx, bias_starts, bias_ids, bias_values,
        max_beam,
    ))  # fmt: skip
