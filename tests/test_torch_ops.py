# SPDX-License-Identifier: Apache-2.0
"""The custom ops of torch: what torch's own checker asks, the numbers of `ops`, and compiling."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from attention_helpers import searches
from fullbeam import ops
from op_helpers import paged_kv
from sample_helpers import edits, params

torch = pytest.importorskip("torch")

from torch._subclasses import FakeTensorMode  # noqa: E402

from fullbeam import torch_ops  # noqa: E402

RNG = np.random.default_rng(7)


@dataclass
class Case:
    name: str
    inputs: list[Any]
    options: dict[str, Any] = field(default_factory=dict)
    torch_only: dict[str, int | None] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name


def normal(*shape: int) -> Any:
    return RNG.standard_normal(shape).astype(np.float32)


def cases() -> list[Case]:
    kv = paged_kv(RNG, [20, 33], dtype="float16")
    found = searches(RNG, [(20, 3, 4), (7, 1, 0)])
    for cache in (kv, found.kv):  # torch's checker takes NaN for a difference
        np.nan_to_num(cache.k_pages, copy=False)
        np.nan_to_num(cache.v_pages, copy=False)
    paged = [kv.k_pages, kv.v_pages, kv.page_table, kv.seq_lens]
    starts = np.array([0, 5, 12], np.int32)
    pages = normal(2, 4, 2, 16, 32)
    slots = np.array([3, -1, 17, 40], np.int64)
    logits, chosen = normal(4, 300), np.array([5, 0, 299, -1], np.int32)
    logits[3] = logits[0]
    drawn = params(4, 0.8, 20, 0.9) | edits(RNG, 4, 300)
    num_top = np.full(4, 5, np.int32)
    ending = logits.copy()
    ending[:, :32] += 20  # terminators come first, so that every place of the results is taken
    beams = {
        "beam_rows": np.arange(4, dtype=np.int32),
        "sums": -RNG.random((4, 2)),
        "group_starts": np.array([0, 2, 4], np.int32),
        "request_starts": np.array([0, 2], np.int32),
        "beam_sizes": np.array([2, 2], np.int32),
        "diversity_strengths": np.array([0.5], np.float32),
        "terminators": np.array([[2**32 - 1, *9 * [0]]], np.uint32),
        "terminator_idx": np.zeros(4, np.int32),
    }
    x = normal(3, 4, 32)
    positions, inv_freq = np.array([0, 9, 4], np.int32), RNG.random(16).astype(np.float32)
    return [
        Case("rms_norm", [x, normal(32)], {"eps": 1e-5, "residual": normal(3, 4, 32)}),
        Case("layer_norm", [normal(3, 32), normal(32), normal(32)], {"eps": 1e-4}),
        Case("activation", [normal(3, 40)], {"activation": "silu"}),
        Case("softcap", [normal(3, 40), 5.0]),
        Case("rope", [x, positions, inv_freq], {"interleaved": True}),
        Case("gated_activation", [normal(3, 40)], {"activation": "gelu"}),
        Case("kv_write", [normal(4, 2, 32), normal(4, 2, 32), pages[0], pages[1], slots]),
        Case("attention_prefill", [normal(12, 4, 32), *paged, starts], {"scale": 0.2, "window": 9}),
        Case("attention_decode", [normal(2, 4, 32), *paged], {"scale": 0.2, "softcap": 5.0}),
        Case(
            "attention_decode",
            [
                normal(len(found.slots["visible"]), 4, 32),
                found.kv.k_pages,
                found.kv.v_pages,
                found.kv.page_table,
                found.kv.seq_lens,
            ],
            found.slots | {"scale": 0.2},
        ),
        Case("logprobs", [logits, np.abs(chosen)], {"num_top": 3}),
        Case("sample", [logits], drawn, {"max_top": None}),
        Case("sample", [logits], drawn | {"num_top": num_top}, {"max_top": 5}),
        Case("beam_step", [ending], beams, {"max_beam": 2}),
    ]


CASES = [pytest.param(case, id=f"{case}-{idx}") for idx, case in enumerate(cases())]


def tensors(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: tensors(each) for name, each in value.items()}
    if isinstance(value, list):
        return [tensors(each) for each in value]
    return torch.from_numpy(value.copy()) if isinstance(value, np.ndarray) else value


def assert_equal(actual: Any, expected: Any) -> None:
    """The same bits, in one array or several; rope's numpy result is its argument."""
    if isinstance(expected, tuple):
        assert type(actual) is type(expected)
        for one, other in zip(actual, expected, strict=True):
            assert_equal(one, other)
    elif expected is None or isinstance(expected, float):
        assert actual == expected
    else:
        assert tuple(actual.shape) == expected.shape
        np.testing.assert_array_equal(actual.numpy(), expected, strict=True)


@pytest.mark.parametrize("case", CASES)
def test_torch_op_equals_the_op_on_numpy(case: Case) -> None:
    ours, theirs = tensors(case.inputs), copy.deepcopy(case.inputs)
    result = getattr(torch_ops, case.name)(*ours, **tensors(case.options), **case.torch_only)
    expected = getattr(ops, case.name)(*theirs, **case.options)
    if case.name == "rope":
        assert result is None
    else:
        assert_equal(result, expected)
    for one, other in zip(ours, theirs, strict=True):
        assert_equal(one, other)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("case", CASES)
def test_torch_op_passes_opcheck(case: Case) -> None:
    op = getattr(torch.ops.fullbeam, case.name).default
    names = [argument.name for argument in op._schema.arguments]
    given = dict(zip(names, tensors(case.inputs), strict=False))
    given |= tensors(case.options) | case.torch_only
    arguments = [given.get(a.name) for a in op._schema.arguments if not a.kwarg_only]
    options = {
        a.name: given[a.name] for a in op._schema.arguments if a.kwarg_only and a.name in given
    }
    torch.library.opcheck(op, tuple(arguments), options)


def decode_step(x: Any, cache: dict[str, Any], weights: dict[str, Any], row: dict[str, Any]) -> Any:
    """Half a decoder layer and the draw."""
    qkv = (torch_ops.rms_norm(x, weights["norm"]) @ weights["qkv"]).view(2, 4, 32)
    torch_ops.rope(qkv[:, :3], cache["positions"], weights["inv_freq"])
    pages = cache["k_pages"], cache["v_pages"]
    torch_ops.kv_write(qkv[:, 2:3], qkv[:, 3:], *pages, cache["slots"])
    table, lens = cache["page_table"], cache["seq_lens"]
    x = torch_ops.attention_decode(qkv[:, :2], *pages, table, lens, scale=0.2).view(2, 64) + x
    logits = torch_ops.gated_activation(x @ weights["up"]) @ weights["head"]
    return torch_ops.sample(logits, **row, max_top=2), torch_ops.logprobs(
        logits, cache["slots"].int()
    )


def test_a_decode_step_compiles_as_one_graph() -> None:
    shapes = {"norm": (64,), "qkv": (64, 128), "inv_freq": (16,), "up": (64, 96), "head": (48, 300)}
    weights = {name: normal(*shape) for name, shape in shapes.items()}
    kv = paged_kv(RNG, [20, 33], num_kv_heads=1)
    last = kv.seq_lens - 1
    cache = vars(kv) | {
        "positions": last,
        "slots": kv.page_table[np.arange(2), last // 16].astype(np.int64) * 16 + last % 16,
    }
    row = params(2, 0.8, 20, 0.9) | {"num_top": np.array([2, 0], np.int32)}
    x = normal(2, 64)

    def run(step: Callable[..., Any]) -> Any:
        own = tensors(cache)
        return step(tensors(x), own, tensors(weights), tensors(row)), own["k_pages"], own["v_pages"]

    compiled = torch.compile(decode_step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(compiled), run(decode_step), rtol=0, atol=0, equal_nan=True)


def test_ops_take_tensors_as_they_lie_in_memory() -> None:
    memory = torch.arange(64, dtype=torch.float32).view(4, 16)
    x, weight, out = memory[::2, 3:11], torch.ones(11)[3:], torch.zeros(2, 16)
    ops.rms_norm(x, weight, out=out[:, 8:])
    np.testing.assert_array_equal(out[:, 8:], ops.rms_norm(x.numpy(), weight.numpy()))
    assert not out[:, :8].any()


def fake() -> Any:
    with FakeTensorMode():
        return torch.ones(1, 16)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: torch.nn.Parameter(torch.ones(1, 16)), BufferError, "require gradient"),
        (lambda: torch.ones(1, 16).to_sparse(), BufferError, "layout other than torch.strided"),
        (
            lambda: torch.ones(1, 16, dtype=torch.complex64),
            TypeError,
            "^rms_norm: x must have dtype",
        ),
        (lambda: torch.ones(1, 1, 1, 1, 16), ValueError, "^array: dimensions must be at most 4"),
        (fake, TypeError, "^rms_norm: x must have memory"),
    ],
)
def test_ops_refuse_tensors_without_plain_memory(
    make: Callable[[], Any], error: type[Exception], message: str
) -> None:
    x, weight, out = make(), torch.ones(16), torch.zeros(1, 16)
    with pytest.raises(error, match=message):
        ops.rms_norm(x, weight, out=out)


def test_sample_refuses_num_top_without_max_top() -> None:
    row = tensors(params(2) | {"num_top": np.array([2, 0], np.int32)})
    with pytest.raises(
        ValueError, match=r"^sample: max_top must be given with num_top.* got None$"
    ):
        torch_ops.sample(torch.zeros(2, 9), **row)


def test_importing_fullbeam_does_not_import_torch() -> None:
    command = "import fullbeam, fullbeam.ops, sys; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", command], check=True)
