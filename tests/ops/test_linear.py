# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fullbeam import _core, ops, reference
from op_helpers import Array, assert_accurate, guarded, num_threads, strided

pytestmark = pytest.mark.usefixtures("isa")

FLOATS = ("F32", "F16", "BF16")


def make_weight(rng: Any, parts: list[tuple[str, int]], cols: int) -> tuple[Any, Array]:
    """Packed parts of (type, rows), and the same matrix dequantised."""
    packed, dense = [], []
    for kind, rows in parts:
        data = reference.quantize(rng.standard_normal((rows, cols)), kind)
        packed.append((data, kind, (rows, cols)))
        dense.append(reference.dequantize(data, kind, (rows, cols)))
    return ops.pack_weight(packed), np.concatenate(dense)


def assert_product(out: Array, x: Array, dense: Array, kind: str, **terms: Array) -> None:
    seen = x if kind in FLOATS else reference.round_activations(x)
    # One product after the other: what a BLAS makes of it depends on its registers.
    products = seen.astype(np.float32)[:, None, :] * dense[None]
    naive = np.cumsum(products, axis=-1, dtype=np.float32)[..., -1]
    for term in terms.values():
        naive = naive + term
    assert_accurate(out, reference.linear(seen, dense, **terms), naive)


@pytest.mark.parametrize("kind", reference.WEIGHT_TYPES)
@pytest.mark.parametrize("num_tokens", [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 33, 130])
def test_linear_is_accurate(rng: Any, num_tokens: int, kind: str) -> None:
    weight, dense = make_weight(rng, [(kind, 37)], 512)
    x = strided(rng.standard_normal((num_tokens, 512)).astype(np.float32))
    with guarded((num_tokens, 37)) as out:
        ops.linear(x, weight, out=out)
        assert_product(out, x, dense, kind)


@pytest.mark.parametrize("kind", reference.WEIGHT_TYPES)
@pytest.mark.parametrize("rows", [1, 15, 16, 17, 31, 64])
def test_linear_takes_any_number_of_rows(rng: Any, rows: int, kind: str) -> None:
    weight, dense = make_weight(rng, [(kind, rows)], 256)
    x = rng.standard_normal((3, 256)).astype(np.float32)
    assert_product(ops.linear(x, weight), x, dense, kind)


@pytest.mark.parametrize("kind", [kind for kind in reference.WEIGHT_TYPES if "_K" not in kind])
@pytest.mark.parametrize("cols", [32, 96, 320])
def test_linear_takes_columns_by_blocks_of_32(rng: Any, cols: int, kind: str) -> None:
    weight, dense = make_weight(rng, [(kind, 20)], cols)
    x = rng.standard_normal((5, cols)).astype(np.float32)
    assert_product(ops.linear(x, weight), x, dense, kind)


@pytest.mark.parametrize("kind", reference.WEIGHT_TYPES)
def test_linear_takes_extreme_blocks(rng: Any, kind: str) -> None:
    """Largest levels of both signs against the largest activations: no saturation on the way."""
    sizes = np.where(rng.random((16, 256)) < 0.5, -1.0, 1.0)
    sizes[:4], sizes[4:8] = 1.0, -1.0
    data = reference.quantize(sizes, kind)
    dense = reference.dequantize(data, kind, sizes.shape)
    x = np.concatenate([np.ones((1, 256)), -np.ones((1, 256)), sizes[:3]]).astype(np.float32)
    assert_product(ops.linear(x, ops.pack_weight([(data, kind, sizes.shape)])), x, dense, kind)


@pytest.mark.parametrize("kind", [kind for kind in reference.WEIGHT_TYPES if kind not in FLOATS])
def test_linear_takes_blocks_of_any_bytes(rng: Any, kind: str) -> None:
    data = reference.quantize(np.zeros((20, 512)), kind)
    data[:] = rng.integers(0, 256, data.size)
    blocks = data.reshape(20 * 512 // (256 if "_K" in kind else 32), -1)
    scales_at = {"Q4_1": (0, 2), "Q5_1": (0, 2), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}
    for at in scales_at.get(kind, (0,)):
        scales = rng.standard_normal((len(blocks), 1)).astype(np.float16)  # finite, of both signs
        blocks[:, at : at + 2] = scales.view(np.uint8)
    weight = ops.pack_weight([(data, kind, (20, 512))])
    x = rng.standard_normal((3, 512)).astype(np.float32)
    assert_product(ops.linear(x, weight), x, reference.dequantize(data, kind, (20, 512)), kind)


@pytest.mark.parametrize(
    "parts",
    [
        [("Q4_K", 48), ("Q6_K", 16), ("Q4_K", 16)],
        [("Q5_0", 17), ("Q8_0", 1), ("Q4_K", 33), ("Q5_K", 5)],
        [("Q4_0", 16), ("Q4_1", 3), ("Q5_1", 30)],
        [("F32", 5), ("F16", 16), ("BF16", 20)],
        [("Q8_0", 20), ("F32", 10)],
    ],
)
@pytest.mark.parametrize("num_tokens", [1, 6])
def test_linear_stacks_parts_of_different_types(
    rng: Any, parts: list[tuple[str, int]], num_tokens: int
) -> None:
    weight, dense = make_weight(rng, parts, 256)
    assert weight.shape == dense.shape
    x = rng.standard_normal((num_tokens, 256)).astype(np.float32)
    out, begin = ops.linear(x, weight), 0
    for kind, rows in parts:
        rows_of_part = slice(begin, begin + rows)
        assert_product(out[:, rows_of_part].copy(), x, dense[rows_of_part], kind)
        begin += rows


@pytest.mark.parametrize("kind", ["F16", "Q8_0", "Q4_K"])
def test_linear_adds_bias_and_residual_in_place(rng: Any, kind: str) -> None:
    weight, dense = make_weight(rng, [(kind, 40)], 256)
    x = rng.standard_normal((5, 256)).astype(np.float32)
    bias = rng.standard_normal(40).astype(np.float32)
    residual = strided(rng.standard_normal((5, 40)).astype(np.float32))
    assert_product(ops.linear(x, weight, bias=bias), x, dense, kind, bias=bias)
    before = residual.copy()
    ops.linear(x, weight, bias=bias, residual=residual, out=residual)
    assert_product(residual, x, dense, kind, bias=bias, residual=before)


@pytest.mark.parametrize("kind", reference.WEIGHT_TYPES)
def test_linear_of_a_token_ignores_the_other_tokens(rng: Any, kind: str) -> None:
    weight, _ = make_weight(rng, [(kind, 40)], 512)
    x = rng.standard_normal((70, 512)).astype(np.float32)
    together = ops.linear(x, weight)
    for begin, end in [(0, 1), (69, 70), (3, 5), (10, 13), (20, 24), (30, 39), (1, 70)]:
        np.testing.assert_array_equal(ops.linear(x[begin:end], weight), together[begin:end])
    for count in (1, 3):
        with num_threads(count):
            np.testing.assert_array_equal(ops.linear(x, weight), together)
            np.testing.assert_array_equal(ops.linear(x[:2], weight), together[:2])
    x[1::2] = np.nan
    np.testing.assert_array_equal(ops.linear(x, weight)[::2], together[::2])


@pytest.mark.parametrize("kind", ["F32", "Q8_0", "Q6_K"])
def test_linear_of_zeros_and_of_tiny_numbers(kind: str, rng: Any) -> None:
    weight, dense = make_weight(rng, [(kind, 16)], 256)
    x = np.zeros((3, 256), np.float32)
    x[1] = 1e-30 * rng.standard_normal(256)
    x[2] = 1e30 * rng.standard_normal(256)
    out = ops.linear(x, weight)
    np.testing.assert_array_equal(out[0], 0)
    for row in (1, 2):
        assert_product(out[row : row + 1], x[row : row + 1], dense, kind)


def assert_largest(out: Array, whole: Array) -> None:
    """The largest values are there, bit for bit, and all others are bounds below them."""
    largest = whole.max(axis=1, keepdims=True)
    np.testing.assert_array_equal(out.max(axis=1, keepdims=True), largest)
    np.testing.assert_array_equal(out == largest, whole == largest)
    assert (out >= whole).all()


@pytest.mark.parametrize("num_tokens", [1, 2, 3, 4, 5, 9])
@pytest.mark.parametrize("num_rows", [1, 16, 37, 1000])
def test_linear_finds_the_largest_values(rng: Any, num_tokens: int, num_rows: int) -> None:
    values = rng.standard_normal((num_rows, 320)).astype(np.float32)
    parts = [(reference.quantize(values, "Q8_0"), "Q8_0", (num_rows, 320))]
    weight = ops.pack_weight(parts, largest_only=True)
    whole = ops.pack_weight(parts)
    assert weight.num_bytes == whole.num_bytes
    near = values[rng.choice(num_rows, num_tokens)]  # one row stands out for each token
    x = strided(near + rng.standard_normal((num_tokens, 320)).astype(np.float32))
    np.testing.assert_array_equal(ops.linear(x, weight), ops.linear(x, whole))
    for count in (1, 2, 5):
        with num_threads(count), guarded((num_tokens, num_rows)) as out:
            ops.linear(x, weight, largest_only=True, out=out)
            assert_largest(out, ops.linear(x, whole))
    # Few tokens leave bounds where a row is far above the others.
    has_bounds = (ops.linear(x, weight, largest_only=True) != ops.linear(x, whole)).any()
    is_few = num_tokens <= (2 if _core.cpu_isa() == "portable" else 4)
    assert has_bounds == is_few if num_rows == 1000 else is_few or not has_bounds
    np.testing.assert_array_equal(ops.linear(x, whole, largest_only=True), ops.linear(x, whole))


@pytest.mark.parametrize("sign", [-1, 1])
def test_linear_finds_largest_values_next_to_their_bounds(rng: Any, sign: int) -> None:
    """Lower halves that are all 0 or all 15, as the activations' signs have it."""
    x = rng.standard_normal((2, 1024)).astype(np.float32)
    up = np.where(x[0] > 0, 15, 0) if sign > 0 else np.where(x[0] > 0, 0, 15)
    values = (rng.integers(-8, 8, (400, 1024)) * 16 + up).astype(np.int8)
    values[200:] = values[:200]  # every value twice
    blocks = np.zeros((400 * 32, 34), np.uint8)
    blocks[:, :2] = rng.uniform(0.01, 0.02, (400 * 32, 1)).astype(np.float16).view(np.uint8)
    blocks[200 * 32 :, :2] = blocks[: 200 * 32, :2]
    blocks[:, 2:] = values.reshape(-1, 32).view(np.uint8)
    parts = [(blocks.reshape(-1), "Q8_0", (400, 1024))]
    out = ops.linear(x, ops.pack_weight(parts, largest_only=True), largest_only=True)
    assert_largest(out, ops.linear(x, ops.pack_weight(parts)))
    assert ((out == out.max(axis=1, keepdims=True)).sum(axis=1) == 2).all()


def test_linear_finds_largest_values_of_any_scales(rng: Any) -> None:
    """Scales of both signs, infinite ones and no numbers; tokens of zeros, tiny and huge ones."""
    data = reference.quantize(rng.standard_normal((200, 64)), "Q8_0")
    scales = data.reshape(400, 34)[:, :2]
    scales[::3] = (-scales[::3].copy().view(np.float16)).view(np.uint8)
    parts = [(data, "Q8_0", (200, 64))]
    x = rng.standard_normal((4, 64)).astype(np.float32)
    x[1], x[2], x[3] = 0, x[2] * np.float32(1e-38), x[3] * np.float32(1e30)
    out = ops.linear(x, ops.pack_weight(parts, largest_only=True), largest_only=True)
    assert_largest(out, ops.linear(x, ops.pack_weight(parts)))
    for value in (np.inf, -np.inf, np.nan):
        scales[7] = np.array([value], np.float16).view(np.uint8)
        out = ops.linear(x, ops.pack_weight(parts, largest_only=True), largest_only=True)
        whole = ops.linear(x, ops.pack_weight(parts))
        np.testing.assert_array_equal(np.isnan(out), np.isnan(whole))
        np.testing.assert_array_equal(np.isinf(out), np.isinf(whole))


def test_linear_adds_a_bias_to_largest_values(rng: Any) -> None:
    data = reference.quantize(rng.standard_normal((300, 64)), "Q8_0")
    weight = ops.pack_weight([(data, "Q8_0", (300, 64))], largest_only=True)
    x = rng.standard_normal((2, 64)).astype(np.float32)
    bias = 10 * rng.standard_normal(300).astype(np.float32)
    out = ops.linear(x, weight, bias=bias, largest_only=True)
    assert_largest(out, ops.linear(x, weight, bias=bias))


def test_linear_refuses_what_does_not_fit(rng: Any) -> None:
    weight, _ = make_weight(rng, [("Q8_0", 16)], 64)
    x = np.zeros((2, 64), np.float32)
    with pytest.raises(ValueError, match=r"^linear: x must be \[num_tokens, 64\], got \[2, 32\]$"):
        ops.linear(x[:, :32], weight)
    with pytest.raises(TypeError, match=r"^linear: x must be float32, got float16$"):
        ops.linear(x.astype(np.float16), weight)
    with pytest.raises(ValueError, match=r"^linear: bias must be \[16\], got \[15\]$"):
        ops.linear(x, weight, bias=np.zeros(15, np.float32))
    with pytest.raises(ValueError, match=r"^linear: residual must be \[num_tokens=2, 16\], got"):
        ops.linear(x, weight, residual=np.zeros((3, 16), np.float32))
    message = r"^linear: residual must be None where largest_only is True, got an array$"
    with pytest.raises(ValueError, match=message):
        ops.linear(x, weight, residual=np.zeros((2, 16), np.float32), largest_only=True)


@pytest.mark.parametrize(
    ("data_bytes", "kind", "shape"),
    [
        (33, "Q8_0", (1, 32)),
        (34, "Q8_0", (1, 33)),
        (34, "Q2_K", (1, 32)),
        (0, "Q8_0", (0, 32)),
        (34, "Q8_0", (-1, 32)),
        (34, "Q8_0", (2**62, 32)),
        (34, "Q4_K", (1, 32)),
    ],
)
def test_pack_weight_refuses_what_does_not_fit(
    data_bytes: int, kind: str, shape: tuple[int, int]
) -> None:
    with pytest.raises(ValueError, match=r"^pack_weight: "):
        ops.pack_weight([(np.zeros(data_bytes, np.uint8), kind, shape)])


def test_pack_weight_refuses_parts_of_different_columns() -> None:
    parts = [(np.zeros(34 * n, np.uint8), "Q8_0", (1, 32 * n)) for n in (1, 2)]
    with pytest.raises(ValueError, match=r"^pack_weight: "):
        ops.pack_weight(parts)
    with pytest.raises(ValueError, match=r"^pack_weight: "):
        ops.pack_weight([])
    with pytest.raises(TypeError, match=r"^pack_weight: data must be uint8, got float32$"):
        ops.pack_weight([(np.zeros(34, np.float32), "Q8_0", (1, 32))])


@pytest.mark.parametrize("kind", reference.WEIGHT_TYPES)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 33, 255])
def test_linear_never_hides_what_is_not_finite(
    rng: Any, kind: str, value: float, place: int
) -> None:
    weight = rng.standard_normal((32, 256), dtype=np.float32)
    packed = ops.pack_weight([(reference.quantize(weight, kind), kind, (32, 256))])
    x = rng.standard_normal((5, 256), dtype=np.float32)
    clean = ops.linear(x, packed)
    x[2, place] = value
    dirty = ops.linear(x, packed)
    assert not np.isfinite(dirty[2]).any()
    np.testing.assert_array_equal(np.delete(dirty, 2, 0), np.delete(clean, 2, 0))


@pytest.mark.parametrize("spare_bytes", [0, 1 << 20, 1 << 40])
def test_weights_packed_in_the_background_are_the_same(tmp_path: Path, spare_bytes: int) -> None:
    kinds = {"Q4_K": 256, "Q8_0": 96, "F16": 33}
    sources = []
    for kind, cols in kinds.items():
        data = reference.quantize(np.random.default_rng(cols).normal(size=(4099, cols)), kind)
        (tmp_path / kind).write_bytes(bytes(7) + data.tobytes())
        mapped = np.memmap(tmp_path / kind, np.uint8, "r", offset=7)
        sources.append((mapped, kind, (4099, cols)))
    packing = _core.Packing(2, spare_bytes)
    weights = [packing.add([source], release=True, largest_only=False) for source in sources]
    weights.append(packing.add(sources[:1] + sources[:1], release=False, largest_only=True))
    while not packing.wait(0.01):
        pass
    num_bytes = sum(weight.num_bytes for weight in weights)
    assert num_bytes - 128 * len(weights) < packing.packed_bytes <= num_bytes
    for weight, parts in zip(
        weights, [*([source] for source in sources), sources[:1] + sources[:1]], strict=True
    ):
        x = np.random.default_rng(1).normal(size=(2, weight.shape[1])).astype(np.float32)
        np.testing.assert_array_equal(ops.linear(x, weight), ops.linear(x, ops.pack_weight(parts)))


def test_packing_refuses_what_pack_weight_refuses() -> None:
    packing = _core.Packing(1, 0)
    with pytest.raises(ValueError, match=r"^pack_weight: "):
        packing.add([(np.zeros(33, np.uint8), "Q8_0", (1, 32))], release=False, largest_only=False)
    assert packing.wait(0)
