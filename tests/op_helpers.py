# SPDX-License-Identifier: Apache-2.0
"""What the tests of the ops share: tolerances, guarded and strided arrays, paged caches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from fullbeam import _core

Array = npt.NDArray[Any]


# Half a unit in the last place, relative.
ROUNDING = {"float32": 0.0, "float16": 2.0**-11, "bfloat16": 2.0**-8}
# What activations may be on CUDA, besides what the CPU takes.
HALF_DTYPES = ["float16", "bfloat16"]


def as_activation(array: Array, dtype: str) -> Any:
    """numpy has no bfloat16: that is a torch tensor."""
    if dtype != "bfloat16":
        return array.astype(dtype)
    torch = pytest.importorskip("torch")
    return torch.from_numpy(np.ascontiguousarray(array, np.float32)).bfloat16()


def wide(array: Any) -> Array:
    return np.asarray(array if isinstance(array, np.ndarray) else array.double(), np.float64)


def assert_accurate(actual: Any, oracle: Array, naive: Array) -> None:
    """The error against float64 is at most 4 times that of a naive float32 run, plus 2 ulp, plus
    what rounding to the results' own dtype costs.
    """
    rounding = ROUNDING[str(actual.dtype).removeprefix("torch.")] * np.abs(oracle)
    assert tuple(actual.shape) == oracle.shape
    assert naive.dtype == np.float32
    if oracle.size == 0:
        return
    error = np.maximum(np.abs(wide(actual) - oracle) - rounding, 0).max()
    bound = 4 * np.abs(naive - oracle).max() + 2.0**-22 * np.abs(oracle).max()
    assert error <= bound, f"error {error}, naive run {np.abs(naive - oracle).max()}"


@contextmanager
def guarded(shape: tuple[int, ...], dtype: str = "float32") -> Iterator[Array]:
    """An array to write to, whose surroundings must be as they were afterwards."""
    size, margin = int(np.prod(shape)), 64
    memory = np.full(size + 2 * margin, 77, dtype)
    yield memory[margin : margin + size].reshape(shape)
    assert (memory[:margin] == 77).all()
    assert (memory[margin + size :] == 77).all()


def strided(array: Array) -> Array:
    """The same numbers, rows apart from each other with NaN between."""
    wide = np.full((*array.shape[:-1], array.shape[-1] + 5), np.nan, array.dtype)
    wide[..., : array.shape[-1]] = array
    return wide[..., : array.shape[-1]]


@contextmanager
def num_threads(count: int) -> Iterator[None]:
    before = _core.num_threads()
    _core.set_num_threads(count)
    yield
    _core.set_num_threads(before)


@dataclass(frozen=True)
class PagedKv:
    k_pages: Array
    v_pages: Array
    page_table: Array
    seq_lens: Array


def paged_kv(
    rng: np.random.Generator,
    seq_lens: list[int],
    *,
    num_kv_heads: int = 2,
    head_dim: int = 32,
    page_size: int = 16,
    dtype: str = "float32",
) -> PagedKv:
    """Random keys and values in shuffled pages; NaN wherever no sequence has a key, and page
    numbers out of all bounds in the entries that no sequence uses.
    """
    pages_of = [-(-seq_len // page_size) for seq_len in seq_lens]
    num_pages = sum(pages_of) + 3
    shape = (num_pages, num_kv_heads, page_size, head_dim)
    k_pages, v_pages = np.full(shape, np.nan, dtype), np.full(shape, np.nan, dtype)
    page_table = np.full((len(seq_lens), max(pages_of, default=0) + 2), 2**31 - 1, np.int32)
    order = iter(rng.permutation(num_pages))
    for seq, seq_len in enumerate(seq_lens):
        for idx in range(pages_of[seq]):
            page = page_table[seq, idx] = next(order)
            used = min(page_size, seq_len - idx * page_size)
            for pages in (k_pages, v_pages):
                pages[page, :, :used] = rng.standard_normal((num_kv_heads, used, head_dim))
    return PagedKv(k_pages, v_pages, page_table, np.array(seq_lens, np.int32))
