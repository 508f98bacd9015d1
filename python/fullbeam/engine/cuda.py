# SPDX-License-Identifier: Apache-2.0
"""A CUDA GPU: torch gives memory, matrix products and captured graphs, our kernels the rest.

Everything goes to one stream. A step is two copies from pinned memory, of what the host knows of
its batch and of the rules to choose by, and two graphs, the model and the choice, once the same
rounded sizes have come twice; its results come back by copies that the host waits for when it has
started the next step.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from fullbeam import ops
from fullbeam._core import Stop
from fullbeam.engine.device import MAX_PROGRAMS, HostArray, Inputs, Packing, Part, Program, Results
from fullbeam.ops import Array

_ALIGNMENT = 256  # bytes, of arrays that travel together

# Inputs whose length is how much all rows have together: their `starts` say where it ends.
_LISTS = {"allowed", "terminators", "bias_ids", "bias_values", "history_ids", "history_counts"}


class CudaDevice:
    """Tensors of torch, see `Device`.

    Parameters
    ----------
    device
        A CUDA device; the tests give "cpu", where emulated kernels compute.
    dtype, kv_dtype
        Of activations and weights, and of keys and values.
    """

    name = "cuda"
    threads = 0
    gains_largest_only = False
    kv_share = 0.9
    row_cost = 0.02  # estimated: weights are read once for all rows

    def __init__(
        self, device: str = "cuda", *, dtype: str = "bfloat16", kv_dtype: str = "bfloat16"
    ) -> None:
        self.dtype, self.kv_dtype = dtype, kv_dtype
        self._device = torch.device(device)
        self.runs_ahead = True
        self._stream: Any = None
        self._pool: Any = None
        self._selections: OrderedDict[Hashable, _Selection] = OrderedDict()
        if self._is_gpu:
            self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
            # All graphs take memory from the pool of this one, which stays: torch gives a pool up
            # with its last graph, and fails where another then asks for it.
            self._first_graph = torch.cuda.CUDAGraph()
            with self.active():
                spare = self.zeros((1,), "int32").zero_()
                self._first_graph.capture_begin(capture_error_mode="thread_local")
                spare.zero_()
                self._first_graph.capture_end()
            self._pool = self._first_graph.pool()

    @property
    def _is_gpu(self) -> bool:
        return self._device.type == "cuda"

    @contextmanager
    def active(self) -> Iterator[None]:
        with torch.cuda.stream(self._stream):  # None: as it is
            try:
                yield
            except torch.OutOfMemoryError as error:
                raise ValueError(
                    f"the GPU's memory is full: {self.available_bytes() >> 20} MiB are free: lower "
                    "context or max_rows, end what else uses it, or choose a smaller model"
                ) from error

    def zeros(self, shape: tuple[int, ...], dtype: str) -> Array:
        return torch.zeros(shape, dtype=getattr(torch, dtype), device=self._device)

    def upload(self, array: HostArray, dtype: str | None = None) -> Array:
        # A copy in any case: the host's array may be a file's pages, which are let go.
        tensor = torch.from_numpy(array.copy()).to(self._device)
        return tensor if dtype is None else tensor.to(getattr(torch, dtype))

    def weight_bytes(self, shape: tuple[int, ...], file_bytes: int) -> int:
        size: int = getattr(torch, self.dtype).itemsize
        return size * math.prod(shape)

    def pack(self, parts: list[Part], largest_only: bool) -> Any:
        rows, cols = sum(shape[0] for _, _, shape in parts), parts[0][2][1]
        matrix = torch.empty((rows, cols), dtype=getattr(torch, self.dtype), device=self._device)
        start = 0
        for data, kind, shape in parts:
            end = start + shape[0]
            ops.dequantise(self.upload(data), kind, shape, out=matrix[start:end])
            start = end
        return matrix

    def packing(self, spare_bytes: int) -> Packing:
        return _Uploads(self)

    def inputs(self, arrays: Mapping[str, tuple[tuple[int, ...], str]]) -> Inputs:
        return _Block(arrays, self._device)

    def rounded(self, count: int) -> int:
        if count <= 8:
            return 1 << (count - 1).bit_length() if count else 0
        step = 8 if count <= 64 else 32 if count <= 512 else 128
        return -(-count // step) * step

    def merged(self, token_ids: Array, sources: Array, drawn: Array) -> Array:
        return torch.where(sources < 0, token_ids, drawn.index_select(0, sources.clamp_min(0)))

    def program(self, record: Callable[[], None]) -> Program:
        return _Graph(record, self._pool) if self._is_gpu else _Calls(record)

    def select(
        self,
        op: Callable[..., tuple[Array, ...]],
        logits: Array,
        options: Mapping[str, Any],
        drawn: Array | None = None,
        **more: Any,
    ) -> Results:
        arrays = {name: value for name, value in options.items() if value is not None}
        shapes = {name: (_room(name, array), array.dtype.name) for name, array in arrays.items()}
        num_drawn = 0 if drawn is None else self.rounded(len(drawn))
        results = self._selection(op, logits, shapes, num_drawn, more).run(arrays, drawn)
        copies = [None if r is None else r.to("cpu", non_blocking=True) for r in results]
        done = None if self._stream is None else self._stream.record_event()

        def read() -> tuple[Any, ...]:
            if done is not None:
                done.synchronize()
            return tuple(None if copy is None else copy.numpy() for copy in copies)

        # Where a graph leaves its results, others that were captured before it may compute.
        return Results(results[0].clone(), read)

    def _selection(
        self,
        op: Callable[..., tuple[Array, ...]],
        logits: Array,
        shapes: Mapping[str, tuple[tuple[int, ...], str]],
        num_drawn: int,
        more: Mapping[str, Any],
    ) -> _Selection:
        if not logits._is_view():  # gathered for this once: keeping it would keep its memory
            return _Selection(self, op, logits, shapes, num_drawn, more)
        key = (op, logits.data_ptr(), logits.shape, *shapes.items(), num_drawn, *more.items())
        selection = self._selections.get(key)
        if selection is None:
            selection = _Selection(self, op, logits, shapes, num_drawn, more)
            self._selections[key] = selection
            if len(self._selections) > MAX_PROGRAMS:
                self._selections.popitem(last=False)
        else:
            self._selections.move_to_end(key)
        return selection

    def available_bytes(self) -> int:
        if self._is_gpu:
            return int(torch.cuda.mem_get_info(self._device)[0])
        return 1 << 30


def _room(name: str, array: HostArray) -> tuple[int, ...]:
    """The shape of an input that an array fits into: what is listed by rows has room to grow."""
    if name in _LISTS:
        return (1 << (len(array) - 1).bit_length(), *array.shape[1:])
    return array.shape


class _Selection:
    """An op that chooses from logits, on inputs of given shapes."""

    def __init__(
        self,
        device: CudaDevice,
        op: Callable[..., tuple[Array, ...]],
        logits: Array,
        shapes: Mapping[str, tuple[tuple[int, ...], str]],
        num_drawn: int,
        more: Mapping[str, Any],
    ) -> None:
        self._inputs = inputs = device.inputs(shapes)
        self._drawn = tokens = device.zeros((num_drawn,), "int32")
        self._results: list[Array] = []
        results = self._results

        def record() -> None:  # doesn't hold this object, so that a graph is gone with its last use
            options = dict(inputs.device)
            if num_drawn:
                last = options["history_last"]
                options["history_last"] = device.merged(last, last, tokens)
            results[:] = op(logits, **options, **more)

        self._program = device.program(record)

    def run(self, arrays: Mapping[str, HostArray], drawn: Array | None) -> list[Array]:
        for name, array in arrays.items():
            self._inputs.host[name][: len(array)] = array
        self._inputs.send()
        if drawn is not None:
            self._drawn[: len(drawn)] = drawn
        self._program.run()
        return self._results


class _Uploads:
    """Weights that are there at once."""

    def __init__(self, device: CudaDevice) -> None:
        self._device = device
        self.packed_bytes = 0

    def add(self, parts: list[Part], release: bool, largest_only: bool) -> Any:
        weight = self._device.pack(parts, largest_only)
        for data, _, _ in parts:
            self.packed_bytes += data.nbytes
        return weight

    def wait(self, seconds: float) -> bool:
        return True


class _Block:
    """A piece of the host's memory and one of the device's, cut into the same arrays."""

    def __init__(
        self, arrays: Mapping[str, tuple[tuple[int, ...], str]], device: torch.device
    ) -> None:
        places: dict[str, slice] = {}
        end = 0
        for name, (shape, dtype) in arrays.items():
            num_bytes = math.prod(shape) * np.dtype(dtype).itemsize
            places[name] = slice(end, end + num_bytes)
            end += -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
        self._host = torch.zeros(end, dtype=torch.uint8)
        self._device = torch.zeros(end, dtype=torch.uint8, device=device)

        def cut(block: torch.Tensor) -> dict[str, torch.Tensor]:
            return {
                name: block[places[name]].view(getattr(torch, dtype)).view(shape)
                for name, (shape, dtype) in arrays.items()
            }

        self.host: Mapping[str, HostArray] = {
            name: tensor.numpy() for name, tensor in cut(self._host).items()
        }
        self.device: Mapping[str, Array] = cut(self._device)

    def send(self) -> None:
        if self._device.is_cuda:
            # torch keeps this memory from being used again before it is copied.
            pinned = torch.empty_like(self._host, pin_memory=True).copy_(self._host)
            self._device.copy_(pinned, non_blocking=True)
        else:
            self._device.copy_(self._host)


class _Calls:
    """Calls the ops anew every time."""

    def __init__(self, record: Callable[[], None]) -> None:
        self._record = record

    def run(self, stop: Stop | None = None) -> bool:
        self._record()
        return True


class _Graph:
    """A CUDA graph, captured when the ops come for the second time: the first may be the last."""

    def __init__(self, record: Callable[[], None], pool: Any) -> None:
        self._record = record
        self._pool = pool  # of memory, one for all graphs: one runs at a time
        self._graph: torch.cuda.CUDAGraph | None = None
        self._has_run = False

    def run(self, stop: Stop | None = None) -> bool:
        if not self._has_run:  # kernels are loaded and workspaces grown, which a capture can't
            self._record()
            self._has_run = True
            return True
        if self._graph is None:
            graph = torch.cuda.CUDAGraph()
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                self._record()
            finally:
                graph.capture_end()
            self._graph = graph
        self._graph.replay()
        return True
