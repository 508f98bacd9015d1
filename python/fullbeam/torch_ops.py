# SPDX-License-Identifier: Apache-2.0
"""`fullbeam.ops` as custom ops of torch, ``torch.ops.fullbeam.*``: torch.compile goes through them.

Arguments and results are those of the functions of the same names in `fullbeam.ops`, as torch
tensors and without ``out``. `rope` and `kv_write` write in place and return nothing; `sample` and
`beam_step` are told the widths of their results, so that shapes don't depend on numbers in tensors.
No op has a gradient.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fullbeam import ops
from fullbeam.ops import BeamStep, Sample

__all__ = [
    "activation",
    "attention_decode",
    "attention_prefill",
    "beam_step",
    "gated_activation",
    "kv_write",
    "layer_norm",
    "logprobs",
    "rms_norm",
    "rope",
    "sample",
    "softcap",
]


def _custom_op(
    function: Callable[..., Any],
    results: Callable[..., Any],
    run: Callable[..., Any] | None = None,
    *,
    returns: Any = Tensor,
    in_place: tuple[str, ...] = (),
    **more: Any,
) -> Any:
    """Register a function of `fullbeam.ops` with its own arguments, but for ``out``.

    Parameters
    ----------
    results : makes tensors for the results, given the arguments by name
    run : computes; None: the function itself, given ``out``
    returns : type of the results
    in_place : arguments that are written to
    more : types of required arguments that are new, or replace the function's
    """

    def run_into(**given: Any) -> Any:
        out = results(**given)
        function(**given, out=out)
        return out

    parameters = []
    signature = inspect.signature(function, eval_str=True, locals={"Array": Tensor})
    for each in signature.parameters.values():
        if each.name != "out" and each.name not in more:
            # torch takes no tensors by keyword only.
            is_tensor = each.annotation in (Tensor, Tensor | None)
            parameters.append(each.replace(kind=each.POSITIONAL_OR_KEYWORD) if is_tensor else each)
    for name, annotation in more.items():
        parameters.append(
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation)
        )
    parameters.sort(key=lambda each: each.kind)

    def by_name(called: Callable[..., Any]) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            given = zip(parameters, args, strict=False)
            return called(**{each.name: value for each, value in given}, **options)

        return call

    op = by_name(run or run_into)
    op.__signature__ = inspect.Signature(parameters, return_annotation=returns)
    op.__doc__ = f"See `fullbeam.ops.{function.__name__}`."
    made = torch.library.custom_op(f"fullbeam::{function.__name__}", op, mutates_args=in_place)
    made.register_fake(by_name(results))
    return made


def _like(*, x: Tensor, **_: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _like_q(*, q: Tensor, **_: Any) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)


def _half(*, x: Tensor, **_: Any) -> Tensor:
    return x.new_empty((x.shape[0], x.shape[1] // 2))


def _nothing(**_: Any) -> None:
    pass


def _rope(**given: Any) -> None:
    ops.rope(**given)


rms_norm = _custom_op(ops.rms_norm, _like)
layer_norm = _custom_op(ops.layer_norm, _like)
activation = _custom_op(ops.activation, _like)
softcap = _custom_op(ops.softcap, _like)
rope = _custom_op(ops.rope, _nothing, _rope, returns=None, in_place=("x",))
gated_activation = _custom_op(ops.gated_activation, _half)
kv_write = _custom_op(
    ops.kv_write, _nothing, ops.kv_write, returns=None, in_place=("k_pages", "v_pages")
)
attention_prefill = _custom_op(ops.attention_prefill, _like_q)
attention_decode = _custom_op(ops.attention_decode, _like_q)


def _logprobs_results(
    *, logits: Tensor, num_top: int = 0, **_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    num_rows = logits.shape[0]
    return (
        logits.new_empty((num_rows,), dtype=torch.float32),
        logits.new_empty((num_rows,), dtype=torch.int32),
        logits.new_empty((num_rows, num_top), dtype=torch.int32),
        logits.new_empty((num_rows, num_top), dtype=torch.float32),
    )


logprobs = _custom_op(
    ops.logprobs,
    _logprobs_results,
    ops.logprobs,
    returns=tuple[Tensor, Tensor, Tensor, Tensor],
)


def _sample_results(*, logits: Tensor, max_top: int | None, **_: Any) -> list[Tensor]:
    token_ids = logits.new_empty((logits.shape[0],), dtype=torch.int32)
    if max_top is None:
        return [token_ids]
    log_sums = logits.new_empty((logits.shape[0], 2), dtype=torch.float64)
    return [token_ids, *_logprobs_results(logits=logits, num_top=max_top), log_sums]


def _run_sample(*, logits: Tensor, max_top: int | None, **given: Any) -> list[Tensor]:
    out = _sample_results(logits=logits, max_top=max_top)
    ops.sample(logits, **given, out=Sample(*out))
    return out


_sample = _custom_op(
    ops.sample, _sample_results, _run_sample, returns=list[Tensor], max_top=int | None
)


def sample(logits: Tensor, *, max_top: int | None = None, **options: Tensor | None) -> Sample:
    """See `fullbeam.ops.sample`.

    Parameters
    ----------
    max_top : at least the largest of ``num_top``
        Width of the results; given with ``num_top``, and only then.
    """
    if (max_top is None) != (options.get("num_top") is None):
        raise ValueError(f"sample: max_top must be given with num_top, only then, got {max_top}")
    return Sample(*_sample(logits, **options, max_top=max_top))


def _beam_step_results(
    *, logits: Tensor, group_starts: Tensor, max_beam: int, **_: Any
) -> list[Tensor]:
    shape = (group_starts.shape[0] - 1, max_beam)
    return [
        logits.new_empty((*shape, 2) if dtype is torch.float64 else shape, dtype=dtype)
        for dtype in 2 * (torch.int32, torch.int32, torch.float32, torch.float64)
    ]


def _run_beam_step(**given: Any) -> list[Tensor]:
    return list(ops.beam_step(**given))


_beam_step = _custom_op(
    ops.beam_step, _beam_step_results, _run_beam_step, returns=list[Tensor], max_beam=int
)


def beam_step(logits: Tensor, *, max_beam: int, **options: Tensor | None) -> BeamStep:
    """See `fullbeam.ops.beam_step`; ``max_beam`` must be given."""
    return BeamStep(*_beam_step(logits, **options, max_beam=max_beam))
