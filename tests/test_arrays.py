# SPDX-License-Identifier: Apache-2.0
"""Arrays of other libraries as arguments of the ops: how they are read, and which stream it is."""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest

from fullbeam import _core, ops

X = np.arange(1, 33, dtype=np.float32).reshape(2, 16)
ONES = np.ones(16, np.float32)
NORMED = ops.rms_norm(X, ONES)
DLPACK_CUDA = 2


class DlTensor(ctypes.Structure):
    _fields_: ClassVar = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("num_dims", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


VIEW = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.POINTER(DlTensor))
CURRENT_STREAM = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_int32, ctypes.c_int32, ctypes.POINTER(ctypes.c_void_p)
)


class ExchangeApi(ctypes.Structure):
    _fields_: ClassVar = [
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("unused", ctypes.c_void_p * 4),
        ("view", VIEW),
        ("current_stream", CURRENT_STREAM),
    ]


def cuda_tensor_type(stream: int | None) -> Any:
    """A type like torch.Tensor whose tensors say that they are on CUDA device 3.

    Calls of the exchange API are noted in ``calls``; without `stream` it can't tell the stream.
    """

    @VIEW
    def view(tensor: Any, out: Any) -> int:
        tensor.calls.append("view")
        array = tensor.array
        tensor.shape = (ctypes.c_int64 * array.ndim)(*array.shape)
        tensor.strides = (ctypes.c_int64 * array.ndim)(*(s // 4 for s in array.strides))
        out[0] = DlTensor(
            array.ctypes.data, DLPACK_CUDA, 3, array.ndim, 2, 32, 1, tensor.shape, tensor.strides, 0
        )
        return 0

    @CURRENT_STREAM
    def current_stream(device_type: int, device_id: int, out: Any) -> int:
        Tensor.calls.append(("current_stream", device_type, device_id))
        out[0] = stream
        return 0

    api = ExchangeApi(
        1, 3, view=view, current_stream=current_stream if stream else CURRENT_STREAM()
    )
    capsule = ctypes.pythonapi.PyCapsule_New
    capsule.restype = ctypes.py_object

    class Tensor:
        calls: ClassVar[list[Any]] = []
        is_cuda = True
        __dlpack_c_exchange_api__ = capsule(ctypes.byref(api), b"dlpack_exchange_api", None)
        keep = (api, view, current_stream)

        def __init__(self, array: Any, requires_grad: bool = False) -> None:
            self.array = array
            self.requires_grad = requires_grad

        def __dlpack_device__(self) -> tuple[int, int]:
            return DLPACK_CUDA, 3

        def __dlpack__(self, *, stream: int) -> Any:
            raise BufferError(f"the protocol was asked, with stream={stream}")

    return Tensor


def stream_of(core: Any) -> tuple[int | None, int]:
    """Handle and device of this thread's current stream."""
    current = core.library._ZN8fullbeam14current_streamEv
    current.restype = ctypes.POINTER(ctypes.c_void_p * 2)
    handle, device = current().contents
    return handle, device or 0


@pytest.mark.parametrize("backend", ["emulated"], indirect=True)
def test_cuda_tensors_are_read_by_the_exchange_api_and_run_on_its_stream(backend: str) -> None:
    tensor = cuda_tensor_type(stream=0x5EED)
    out = np.zeros_like(X)
    ops.rms_norm(tensor(X), tensor(ONES), out=tensor(out))
    np.testing.assert_array_equal(out, NORMED)
    assert tensor.calls == ["view", "view", "view", ("current_stream", DLPACK_CUDA, 3)]
    assert stream_of(ops._core) == (0x5EED, 3)


@pytest.mark.parametrize("backend", ["emulated"], indirect=True)
def test_torch_is_asked_for_the_stream_where_the_exchange_api_does_not_tell_it(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch = pytest.importorskip("torch")
    raw_stream = {3: 0xBEE}.__getitem__
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", raw_stream, raising=False)
    tensor = cuda_tensor_type(stream=None)
    ops.rms_norm(tensor(X), tensor(ONES), out=tensor(np.zeros_like(X)))
    assert stream_of(ops._core) == (0xBEE, 3)


def test_cuda_tensors_keep_their_checks() -> None:
    tensor = cuda_tensor_type(stream=1)
    with pytest.raises(ValueError, match=r"^rms_norm: weight must be \[size=16\], got \[8\]$"):
        ops.rms_norm(tensor(X), tensor(ONES[:8]), out=tensor(X))
    with pytest.raises(BufferError, match="the protocol was asked, with stream=-1"):
        ops.rms_norm(tensor(X, requires_grad=True), tensor(ONES), out=tensor(X))
    with pytest.raises(ValueError, match=r"^rms_norm: .* device"):
        ops.rms_norm(tensor(X), ONES, out=tensor(X))


TOKEN = np.zeros(2, np.int32)
ROW: dict[str, Any] = {
    "temperature": np.zeros(2, np.float32),
    "top_k": TOKEN,
    "top_p": np.ones(2, np.float32),
    "min_p": np.zeros(2, np.float32),
    "seeds": np.zeros(2, np.uint64),
    "counters": np.zeros((2, 3), np.uint32),
}
BEAMS: dict[str, Any] = {
    "beam_rows": TOKEN,
    "sums": np.zeros((2, 2)),
    "group_starts": np.array([0, 2], np.int32),
    "request_starts": np.array([0, 1], np.int32),
    "beam_sizes": np.array([2], np.int32),
    "diversity_strengths": np.zeros(1, np.float32),
}
WEIGHT = ops.pack_weight([(np.zeros(16 * 16 * 4, np.uint8), "F32", (16, 16))])
CALLS: dict[str, Callable[[Any], Any]] = {
    "dequantise: data": lambda bad: ops.dequantise(bad, "F32", (2, 2)),
    "embedding: token_ids": lambda bad: ops.embedding(bad, WEIGHT),
    "rms_norm: x": lambda bad: ops.rms_norm(bad, ONES),
    "rms_norm: weight": lambda bad: ops.rms_norm(X, bad),
    "layer_norm: x": lambda bad: ops.layer_norm(bad, ONES, ONES),
    "linear: x": lambda bad: ops.linear(bad, WEIGHT),
    "linear: weight": lambda bad: ops.linear(X, bad),
    "rope: x": lambda bad: ops.rope(bad, TOKEN, ONES),
    "kv_write: k": lambda bad: ops.kv_write(bad, X, X, X, TOKEN),
    "attention_prefill: q": lambda bad: ops.attention_prefill(bad, X, X, X, X, X, scale=1.0),
    "attention_decode: q": lambda bad: ops.attention_decode(bad, X, X, X, X, scale=1.0),
    "gated_activation: x": lambda bad: ops.gated_activation(bad),
    "activation: x": lambda bad: ops.activation(bad),
    "softcap: x": lambda bad: ops.softcap(bad, 1.0),
    "logprobs: logits": lambda bad: ops.logprobs(bad, TOKEN),
    "sample: logits": lambda bad: ops.sample(bad, **ROW),
    "beam_step: logits": lambda bad: ops.beam_step(bad, **BEAMS),
    "beam_step: beam_sizes": lambda bad: ops.beam_step(X, **BEAMS | {"beam_sizes": bad}),
    "beam_step: group_starts": lambda bad: ops.beam_step(X, **BEAMS | {"group_starts": bad}),
}


@pytest.mark.parametrize("bad", [[1.0, 2.0], None, "text", 3, np.float32(3)], ids=repr)
@pytest.mark.parametrize("argument", CALLS)
def test_what_is_no_array_is_refused_by_op_and_argument(argument: str, bad: Any) -> None:
    with pytest.raises(TypeError, match=rf"^{argument} must be a .*, got {type(bad).__name__}$"):
        CALLS[argument](bad)


@pytest.mark.parametrize("bad", ["none", 3, [1.0]])
def test_what_is_no_array_of_the_optional_ones_is_refused_too(bad: Any) -> None:
    for argument in ("residual", "out"):
        with pytest.raises(TypeError, match=f"^rms_norm: {argument} must be a numpy array"):
            ops.rms_norm(X, ONES, **{argument: bad})
    with pytest.raises(TypeError, match=r"^sample: num_top must be a numpy array"):
        ops.sample(X, **ROW, num_top=bad)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (np.ones((2, 16), ">f4"), "must be little-endian"),
        (np.ones((2, 16), bool), "must have dtype float32"),
        (np.zeros((), np.float32), r"must be \[num_tokens, 2 \* size\], got \[\]"),
        (np.ones(16, np.float32), r"must be \[num_tokens, 2 \* size\], got \[16\]"),
        (np.ones((2, 3), np.float32), "must be of an even number of columns, got 3"),
    ],
)
def test_what_is_wrong_with_an_array_is_told_by_op_and_argument(x: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=f"^gated_activation: x {message}"):
        ops.gated_activation(x)


def test_errors_show_the_beginning_of_long_texts() -> None:
    with pytest.raises(ValueError, match=r"gelu_tanh, got \w{97}\.\.\.$"):
        ops.activation(X, activation="x" * 1_000_000)
    with pytest.raises(ValueError, match=r"gelu_tanh, got x日{32}\.\.\.$"):
        ops.activation(X, activation="x" + "日" * 1000)
    with pytest.raises(ValueError, match=r"Q6_K, got \w{97}\.\.\.$"):
        ops.dequantise(np.zeros(4, np.uint8), "x" * 1_000_000, (1, 1))


def test_tensors_of_torch_as_weight_want_tensors_of_torch() -> None:
    torch = pytest.importorskip("torch")
    weight = torch.ones(16, 16)
    with pytest.raises(TypeError, match=r"^linear: x must be a torch tensor, .* got ndarray$"):
        ops.linear(X, weight)
    with pytest.raises(TypeError, match=r"^linear: bias must be a torch tensor, .* got list$"):
        ops.linear(torch.ones(2, 16), weight, bias=[1.0])
    with pytest.raises(ValueError, match=r"^linear: residual must be None where largest_only is"):
        ops.linear(torch.ones(2, 16), weight, residual=torch.ones(2, 8), largest_only=True)


def test_jax_arrays_are_read_where_they_are() -> None:
    """Skipped where jax is not installed; results are numpy arrays."""
    jax = pytest.importorskip("jax")
    with jax.default_device(jax.devices("cpu")[0]):
        x, weight = jax.numpy.asarray(X), jax.numpy.asarray(ONES)
    result = ops.rms_norm(x, weight)
    assert type(result) is np.ndarray
    np.testing.assert_array_equal(result, NORMED)
    logprobs, ranks, *_ = ops.logprobs(x, jax.numpy.asarray([15, 0], "int32"))
    assert [result.dtype for result in (logprobs, ranks)] == [np.float32, np.int32]
    assert ranks.tolist() == [1, 16]


@pytest.mark.skipif(not _core.num_cuda_devices(), reason="cupy's arrays need a GPU")
def test_cupy_arrays_give_cupy_arrays() -> None:
    cupy = pytest.importorskip("cupy")
    result = ops.rms_norm(cupy.asarray(X), cupy.asarray(ONES))
    assert type(result) is cupy.ndarray
    np.testing.assert_allclose(result.get(), NORMED, rtol=1e-6)


class CupyArray:
    """What the ops use of cupy's arrays, on the host's memory."""

    __cuda_array_interface__: ClassVar[dict[str, Any]] = {}
    device = contextlib.nullcontext()

    def __init__(self, array: Any) -> None:
        self.array = array
        self.shape, self.dtype = array.shape, array.dtype

    def __dlpack_device__(self) -> tuple[int, int]:
        return DLPACK_CUDA, 0

    def __dlpack__(self, *, stream: int) -> Any:
        assert stream == 1, "the default stream has to wait for cupy's"
        return self.array.__dlpack__()


@pytest.mark.parametrize("backend", ["emulated"], indirect=True)
def test_results_of_cupy_arrays_are_made_by_cupy(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cupy = SimpleNamespace(empty=lambda shape, dtype: CupyArray(np.empty(shape, dtype)))
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    result = ops.rms_norm(CupyArray(X), CupyArray(ONES))
    assert type(result) is CupyArray
    np.testing.assert_array_equal(result.array, NORMED)
