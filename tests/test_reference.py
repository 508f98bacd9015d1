# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fullbeam import reference


@pytest.mark.parametrize("kind", reference.WEIGHT_TYPES)
def test_dequantize_equals_the_gguf_package(rng: Any, kind: str) -> None:
    gguf = pytest.importorskip("gguf")
    shape = (6, 512)
    data = reference.quantize(rng.standard_normal(shape), kind)
    if kind.startswith("Q"):  # any bytes are valid blocks: scales and signs of all kinds
        data = rng.integers(0, 256, data.size).astype(np.uint8)
    with np.errstate(invalid="ignore", over="ignore"):
        theirs = gguf.quants.dequantize(data.reshape(shape[0], -1), gguf.GGMLQuantizationType[kind])
    np.testing.assert_array_equal(reference.dequantize(data, kind, shape), theirs)


@pytest.mark.parametrize(
    ("kind", "steps"),
    [("F32", 1e7), ("F16", 2000), ("BF16", 250), ("Q8_0", 250), ("Q4_0", 14), ("Q4_1", 14),
     ("Q5_0", 30), ("Q5_1", 30), ("Q4_K", 14), ("Q5_K", 28), ("Q6_K", 55)],
)  # fmt: skip
def test_quantize_gives_the_nearest_levels(rng: Any, kind: str, steps: float) -> None:
    x = rng.uniform(-1, 1, (8, 256)).astype(np.float32)
    x[0, :32] = 0
    back = reference.dequantize(reference.quantize(x, kind), kind, x.shape)
    assert np.abs(back - x).max() <= 2 / steps
    np.testing.assert_allclose(back[0, :16], 0, atol=0.1)


def test_dequantize_refuses_what_does_not_fit() -> None:
    data = np.zeros(34, np.uint8)
    with pytest.raises(ValueError, match=r"^dequantize: data must be 68 bytes, got 34$"):
        reference.dequantize(data, "Q8_0", (2, 32))
    with pytest.raises(ValueError, match=r"^weight type must be one of F32, .*, got Q2_K$"):
        reference.dequantize(data, "Q2_K", (1, 32))
    with pytest.raises(ValueError, match=r"^Q4_K: columns must be a multiple of 256, got 32$"):
        reference.dequantize(data, "Q4_K", (1, 32))
