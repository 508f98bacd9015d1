# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fullbeam import ops, reference
from op_helpers import as_activation, guarded, wide

pytestmark = pytest.mark.usefixtures("backend")


@pytest.mark.parametrize("kind", reference.WEIGHT_TYPES)
@pytest.mark.parametrize(("rows", "cols"), [(1, 256), (3, 512), (37, 256)])
def test_dequantise_gives_the_values_of_the_blocks(
    rng: Any, rows: int, cols: int, kind: str
) -> None:
    data = reference.quantize(rng.standard_normal((rows, cols)) * 3, kind)
    with guarded((rows, cols)) as out:
        ops.dequantise(data, kind, (rows, cols), out=out)
        np.testing.assert_array_equal(out, reference.dequantise(data, kind, (rows, cols)))


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K"])
def test_dequantise_reads_every_bit_of_the_blocks(rng: Any, kind: str) -> None:
    num_bytes = reference.quantize(np.zeros((8, 1024)), kind).size
    data = rng.integers(0, 256, num_bytes).astype(np.uint8)
    with np.errstate(over="ignore"):
        oracle = reference.dequantise(data, kind, (8, 1024))
    np.testing.assert_array_equal(ops.dequantise(data, kind, (8, 1024)), oracle)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("kind", ["F32", "BF16", "Q4_K"])
def test_dequantise_rounds_to_half_floats(rng: Any, kind: str, dtype: str) -> None:
    data = reference.quantize(rng.standard_normal((5, 256)), kind)
    wanted = as_activation(reference.dequantise(data, kind, (5, 256)).astype(np.float32), dtype)
    out = wanted * 0
    ops.dequantise(data, kind, (5, 256), out=out)
    np.testing.assert_array_equal(wide(out), wide(wanted))


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("cols", [0, 1, 7, 9])
def test_dequantise_takes_any_width_of_float_types(rng: Any, cols: int, kind: str) -> None:
    data = reference.quantize(rng.standard_normal((4, cols)), kind)
    with guarded((4, cols)) as out:
        ops.dequantise(data, kind, (4, cols), out=out)
        np.testing.assert_array_equal(out, reference.dequantise(data, kind, (4, cols)))


def test_dequantise_writes_into_a_wider_matrix_from_unaligned_bytes(rng: Any) -> None:
    data = reference.quantize(rng.standard_normal((3, 64)), "Q5_1")
    memory = np.concatenate([np.zeros(1, np.uint8), data.ravel()])
    whole = np.full((3, 100), 5, np.float32)
    ops.dequantise(memory[1:], "Q5_1", (3, 64), out=whole[:, 10:74])
    expected = np.full((3, 100), 5, np.float32)
    expected[:, 10:74] = reference.dequantise(data, "Q5_1", (3, 64))
    np.testing.assert_array_equal(whole, expected)


def test_dequantise_refuses_what_does_not_fit() -> None:
    data = np.zeros(68, np.uint8)
    with pytest.raises(ValueError, match=r"^dequantise: type must be one of F32, .*, got Q9_9$"):
        ops.dequantise(data, "Q9_9", (1, 64))
    with pytest.raises(
        ValueError, match=r"^dequantise: out must be a multiple of the block of Q8_0 wide, got 40 c"
    ):
        ops.dequantise(data, "Q8_0", (2, 40))
    with pytest.raises(ValueError, match=r"^dequantise: data must be \[102\], got \[68\]$"):
        ops.dequantise(data, "Q8_0", (3, 32))
    with pytest.raises(TypeError, match=r"^dequantise: data must be uint8, got int32$"):
        ops.dequantise(data.astype(np.int32), "Q8_0", (2, 32))
