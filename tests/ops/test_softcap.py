# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from backends import CUDA
from fullbeam import ops, reference
from op_helpers import HALF_DTYPES, as_activation, assert_accurate, guarded, strided, wide

pytestmark = pytest.mark.usefixtures("backend")


@pytest.mark.parametrize(
    ("num_rows", "size"), [(0, 8), (1, 1), (3, 15), (2, 4096), (2, 4097), (1, 9001)]
)
def test_softcap_is_accurate(rng: Any, num_rows: int, size: int) -> None:
    x = strided((rng.standard_normal((num_rows, size)) * 40).astype(np.float32))
    with guarded((num_rows, size)) as out:
        ops.softcap(x, 30.0, out=out)
        naive = np.float32(30) * np.tanh(x / np.float32(30))
        assert_accurate(out, reference.softcap(x, 30.0), naive)


def test_softcap_has_its_limits() -> None:
    x = np.array([[0, -np.inf, np.inf, -3e38, 3e38, np.nan]], np.float32)
    out = ops.softcap(x, 30.0, out=x)
    assert out is x
    np.testing.assert_array_equal(out, np.array([[0, -30, 30, -30, 30, np.nan]], np.float32))


@pytest.mark.parametrize("backend", CUDA, indirect=True)
@pytest.mark.parametrize("dtype", HALF_DTYPES)
def test_softcap_of_half_floats_is_accurate_on_cuda(rng: Any, dtype: str) -> None:
    x = as_activation(rng.standard_normal((2, 2056)) * 40, dtype)
    out = ops.softcap(x, 30.0)
    assert out.dtype == x.dtype
    naive = np.float32(30) * np.tanh(wide(x).astype(np.float32) / np.float32(30))
    assert_accurate(out, reference.softcap(wide(x), 30.0), naive)


def test_softcap_refuses_what_does_not_fit() -> None:
    x = np.zeros((2, 8), np.float32)
    for cap in (0.0, -1.0, np.inf, np.nan):
        with pytest.raises(ValueError, match=r"^softcap: cap must be finite and above 0, got"):
            ops.softcap(x, cap)
    with pytest.raises(ValueError, match=r"^softcap: out must be \[num_rows=2, size=8\], got"):
        ops.softcap(x, 30.0, out=np.zeros((2, 9), np.float32))
