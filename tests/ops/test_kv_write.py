# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from backends import CPU, CUDA
from fullbeam import ops, reference
from op_helpers import HALF_DTYPES, as_activation, guarded, wide

pytestmark = pytest.mark.usefixtures("backend")


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("head_dim", [1, 7, 16, 40])
def test_kv_write_stores_tokens_in_their_slots(rng: Any, head_dim: int, dtype: str) -> None:
    qkv = rng.standard_normal((6, 8, head_dim)).astype(np.float32)
    k, v = qkv[:, 2:5], qkv[:, 5:8]
    slots = rng.permutation(4 * 16)[:6].astype(np.int64)
    slots[2] = -1
    with guarded((4, 3, 16, head_dim), dtype) as k_pages, guarded(k_pages.shape, dtype) as v_pages:
        k_pages[:], v_pages[:] = 5, 6
        expected = reference.kv_write(k, v, k_pages, v_pages, slots)
        ops.kv_write(k, v, k_pages, v_pages, slots)
        np.testing.assert_array_equal(k_pages, expected[0])
        np.testing.assert_array_equal(v_pages, expected[1])


def test_kv_write_rounds_to_bfloat16(rng: Any) -> None:
    torch = pytest.importorskip("torch")
    k = torch.from_numpy(rng.standard_normal((3, 2, 24)).astype(np.float32))
    k[0, 0, 0] = float("nan")
    pages = [torch.zeros((2, 2, 16, 24), dtype=torch.bfloat16) for _ in range(2)]
    ops.kv_write(k, -k, pages[0], pages[1], torch.tensor([31, 0, 7]))
    written = pages[0][[1, 0, 0], :, [15, 0, 7]]
    torch.testing.assert_close(written, k.bfloat16(), rtol=0, atol=0, equal_nan=True)
    assert pages[1].float().nan_to_num().sum() == -pages[0].float().nan_to_num().sum()


def test_kv_write_saturates_float16() -> None:
    values = np.array([65504, 65519, 65520, 1e9, np.inf, -np.inf, -1e6, np.nan, 1e-8], np.float32)
    k = np.tile(values, 3).reshape(1, 1, 27)
    pages = np.zeros((2, 1, 1, 1, 27), np.float16)
    ops.kv_write(k, k, pages[0], pages[1], np.zeros(1, np.int64))
    top = 65504
    expected = [top, top, top, top, top, -top, -top, np.nan, 0]
    np.testing.assert_array_equal(pages[0, 0, 0, 0], expected * 3)


@pytest.mark.parametrize("backend", CPU, indirect=True)
def test_kv_write_refuses_a_slot_past_the_last_page() -> None:
    k = np.ones((2, 1, 16), np.float32)
    with guarded((2, 1, 8, 16)) as k_pages, guarded(k_pages.shape) as v_pages:
        slots = np.array([3, 16], np.int64)
        with pytest.raises(
            ValueError, match=r"^kv_write: slots must be below num_pages\*page_size=16, got 16$"
        ):
            ops.kv_write(k, k, k_pages, v_pages, slots)
        assert (k_pages == 77).all()


@pytest.mark.parametrize("slot", [16, 2**40, 2**63 - 1, -(2**63)])
def test_kv_write_skips_a_bad_slot_in_a_recorded_program(slot: int) -> None:
    k, slots = np.ones((2, 1, 16), np.float32), np.array([3, 4], np.int64)
    with guarded((2, 1, 8, 16)) as k_pages, guarded(k_pages.shape) as v_pages:
        ops._core.start_recording()
        ops.kv_write(k, k, k_pages, v_pages, slots)
        program = ops._core.stop_recording()
        slots[1] = slot
        program.run()
        assert (k_pages[0, 0, 3] == 1).all()
        assert (k_pages == 77).sum() == k_pages.size - 16


@pytest.mark.parametrize("backend", CUDA, indirect=True)
@pytest.mark.parametrize("dtype", HALF_DTYPES)
def test_kv_write_takes_half_floats_on_cuda(rng: Any, dtype: str) -> None:
    k, v = (as_activation(rng.standard_normal((3, 2, 24)), dtype) for _ in range(2))
    pages = np.zeros((2, 2, 2, 16, 24), np.float32)
    ops.kv_write(k, v, pages[0], pages[1], np.array([31, 99, 7]))  # a device's slots are not read
    expected = np.zeros_like(pages)
    for kind, values in enumerate((wide(k), wide(v))):
        expected[kind, 1, :, 15], expected[kind, 0, :, 7] = values[0], values[2]
    np.testing.assert_array_equal(pages, expected)


def test_kv_write_refuses_what_does_not_fit() -> None:
    k, pages = np.ones((2, 1, 16), np.float32), np.zeros((2, 1, 8, 16), np.float32)
    slots = np.zeros(2, np.int64)
    with pytest.raises(TypeError, match=r"^kv_write: v_pages must be float32, got float16$"):
        ops.kv_write(k, k, pages, pages.astype(np.float16), slots)
    with pytest.raises(TypeError, match=r"^kv_write: slots must be int64, got int32$"):
        ops.kv_write(k, k, pages, pages.copy(), slots.astype(np.int32))
    with pytest.raises(ValueError, match=r"^kv_write: k_pages must be \[num_pages, num_kv_heads=1"):
        ops.kv_write(k, k, np.zeros((2, 2, 8, 16), np.float32), pages, slots)
    with pytest.raises(ValueError, match=r"^kv_write: k_pages must be contiguous within a"):
        ops.kv_write(k, k, np.zeros((2, 1, 16, 16), np.float32)[:, :, ::2], pages, slots)


def test_kv_write_takes_pages_at_any_distance(rng: Any) -> None:
    memory = np.zeros((5, 3, 2, 4, 16), np.float16)  # three layers' pages lie between each other
    k, v = (rng.standard_normal((2, 2, 16), dtype=np.float32) for _ in range(2))
    ops.kv_write(k, v, memory[:, 1], memory[:, 2], np.array([7, 18]))
    expected = np.zeros_like(memory)
    for token, (page, offset) in enumerate(((1, 3), (4, 2))):
        expected[page, 1, :, offset] = k[token]
        expected[page, 2, :, offset] = v[token]
    np.testing.assert_array_equal(memory, expected)
