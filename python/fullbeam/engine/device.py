# SPDX-License-Identifier: Apache-2.0
"""What a step's arrays are and where they live; the CPU's: numpy arrays, ops replayed natively."""

from __future__ import annotations

import importlib.util
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from fullbeam import _core
from fullbeam.checks import shown
from fullbeam.engine.memory import available_bytes
from fullbeam.ops import Array

HostArray = npt.NDArray[Any]
Part: TypeAlias = tuple[Array, str, tuple[int, int]]  # bytes of a GGUF type, the type, the shape

MAX_PROGRAMS = 64  # recorded steps to keep; one takes some kilobytes, on a GPU some megabytes

# What a row adds to a step of few, over a step of one: the dearer of Gemma 3 270M and Qwen2.5-Coder
# 0.5B, Q4_K_M, 2 threads of Zen 4, 1 to 16 rows of one sequence with their logits.
_ROW_COST = {"portable": 0.75, "avx2": 0.24, "avx512": 0.15}


class Program(Protocol):
    """Ops that were called once, to be run again on what their arrays then hold."""

    def run(self, stop: _core.Stop | None = None) -> bool:
        """Run them; whether all of them ran: fewer do once `stop` is set."""


class Packing(Protocol):
    """Weights on their way."""

    @property
    def packed_bytes(self) -> int:
        """Of the parts, so far."""

    def add(self, parts: list[Part], release: bool, largest_only: bool) -> Any:
        """Return a weight that may be used once `wait` says so; `release` the parts' pages."""

    def wait(self, seconds: float) -> bool:
        """Wait for all that was added, no longer than given; whether it is done."""


class Inputs(Protocol):
    """Arrays that the host writes and the device reads."""

    @property
    def host(self) -> Mapping[str, HostArray]:
        """To be written to."""

    @property
    def device(self) -> Mapping[str, Array]:
        """The same arrays as ops take them, at the same place for as long as the object lives."""

    def send(self) -> None:
        """Let the device have what was written; the host may go on writing at once."""


@dataclass(frozen=True, slots=True)
class Results:
    """What an op gives, or will give."""

    first: Array  # on the device
    read: Callable[[], tuple[Any, ...]]  # waits for them, and gives them as host arrays


class Device(Protocol):
    """Makes arrays and runs ops on them. Used by one thread at a time, inside `active`."""

    @property
    def name(self) -> str:
        """ "cpu" or "cuda"."""

    @property
    def dtype(self) -> str:
        """Of activations."""

    @property
    def kv_dtype(self) -> str:
        """Of keys and values in their pages."""

    @property
    def row_cost(self) -> float:
        """What one more token adds to a step of few, as a share of a step of one."""

    @property
    def gains_largest_only(self) -> bool:
        """Whether `ops.linear` is faster where only each token's largest value matters."""

    @property
    def kv_share(self) -> float:
        """Of the memory that is left once the weights are loaded: for keys and values."""

    @property
    def threads(self) -> int:
        """Of the CPU, that compute: 0 where a GPU does."""

    @property
    def runs_ahead(self) -> bool:
        """Whether ops return before they are done."""

    def active(self) -> AbstractContextManager[object]:
        """Within it ops run here."""

    def zeros(self, shape: tuple[int, ...], dtype: str) -> Array:
        """A new array."""

    def upload(self, array: HostArray, dtype: str | None = None) -> Array:
        """An array on the device, of its own dtype unless another is given."""

    def weight_bytes(self, shape: tuple[int, ...], file_bytes: int) -> int:
        """Memory that a weight of a file takes."""

    def pack(self, parts: list[Part], largest_only: bool) -> Any:
        """A weight for `ops.linear` and `ops.embedding`; see `ops.pack_weight`."""

    def packing(self, spare_bytes: int) -> Packing:
        """Packs weights while the caller does other things.

        Parameters
        ----------
        spare_bytes
            How much memory the caller takes meanwhile.
        """

    def inputs(self, arrays: Mapping[str, tuple[tuple[int, ...], str]]) -> Inputs:
        """Arrays of given shapes and dtypes, filled with zeros."""

    def rounded(self, count: int) -> int:
        """How many rows to run where `count` are wanted, so that few programs serve all counts."""

    def merged(self, token_ids: Array, sources: Array, drawn: Array) -> Array:
        """``drawn[sources]``, and ``token_ids`` where a source is negative."""

    def program(self, record: Callable[[], None]) -> Program:
        """What `record` calls of ops. The arrays stay the caller's to keep."""

    def select(
        self,
        op: Callable[..., tuple[Array, ...]],
        logits: Array,
        options: Mapping[str, Any],
        drawn: Array | None = None,
        **more: Any,
    ) -> Results:
        """Start an op that chooses from logits.

        Parameters
        ----------
        op : `ops.sample`, `ops.beam_step` or `ops.logprobs`
        logits : on the device
        options : by the op's names: host arrays, or None
        drawn : int32, on the device
            Tokens that the host doesn't know yet; `history_last` is then which of them each row
            goes on from.
        more : arguments that are no arrays
        """

    def available_bytes(self) -> int:
        """Memory that is left."""


class Programs:
    """Recorded ops by what they depend on; those not used for longest are forgotten."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._programs: OrderedDict[Hashable, Program] = OrderedDict()

    def run(self, key: Hashable, record: Callable[[], None], stop: _core.Stop | None) -> bool:
        """Run what `record` calls; whether all of it ran."""
        program = self._programs.get(key)
        if program is None:
            program = self._programs[key] = self._device.program(record)
            if len(self._programs) > MAX_PROGRAMS:
                self._programs.popitem(last=False)
        else:
            self._programs.move_to_end(key)
        return program.run(stop)

    def clear(self) -> None:
        """Forget all: the arrays are others now."""
        self._programs.clear()


class _HostInputs:
    """The host's arrays are the device's."""

    def __init__(self, arrays: Mapping[str, tuple[tuple[int, ...], str]]) -> None:
        self.host = {name: np.zeros(shape, dtype) for name, (shape, dtype) in arrays.items()}
        self.device = self.host

    def send(self) -> None:
        """They are there."""


class CpuDevice:
    """numpy arrays and so many threads: see `Device`."""

    name = "cpu"
    dtype = "float32"
    kv_dtype = "float16"
    kv_share = 0.5
    gains_largest_only = True
    runs_ahead = False

    def __init__(self, threads: int) -> None:
        self.threads = threads

    @property
    def row_cost(self) -> float:
        return _ROW_COST[_core.cpu_isa()]

    def active(self) -> AbstractContextManager[object]:
        _core.set_num_threads(self.threads)
        return nullcontext()

    def zeros(self, shape: tuple[int, ...], dtype: str) -> Array:
        return np.zeros(shape, dtype)

    def upload(self, array: HostArray, dtype: str | None = None) -> Array:
        return array if dtype is None else array.astype(dtype, copy=False)

    def weight_bytes(self, shape: tuple[int, ...], file_bytes: int) -> int:
        return file_bytes

    def pack(self, parts: list[Part], largest_only: bool) -> Any:
        return _core.pack_weight(parts, largest_only)

    def packing(self, spare_bytes: int) -> Packing:
        # One processor is left to the caller, which is busy all the while.
        return _core.Packing(max(1, self.threads - 1), spare_bytes)

    def inputs(self, arrays: Mapping[str, tuple[tuple[int, ...], str]]) -> Inputs:
        return _HostInputs(arrays)

    def rounded(self, count: int) -> int:
        return count

    def merged(self, token_ids: Array, sources: Array, drawn: Array) -> Array:
        return np.where(sources < 0, token_ids, drawn[np.maximum(sources, 0)])

    def program(self, record: Callable[[], None]) -> Program:
        _core.start_recording()
        try:
            record()
        finally:
            program = _core.stop_recording()
        return program

    def select(
        self,
        op: Callable[..., tuple[Array, ...]],
        logits: Array,
        options: Mapping[str, Any],
        drawn: Array | None = None,
        **more: Any,
    ) -> Results:
        if drawn is not None:
            last = options["history_last"]
            options = {**options, "history_last": self.merged(last, last, drawn)}
        arrays = op(logits, **options, **more)
        return Results(arrays[0], lambda: arrays)

    def available_bytes(self) -> int:
        return available_bytes()


def choose_device(name: str, threads: int | None) -> Device:
    """What `fullbeam.load` computes with.

    Parameters
    ----------
    name
        "auto", "cpu" or "cuda".
    threads
        Of the CPU; None: its physical cores.

    Raises
    ------
    ValueError
        For another name, or where there is no GPU, or no torch to use it.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(f"load: device must be 'auto', 'cpu' or 'cuda', got {shown(name)}")
    if name == "cuda":
        if reason := why_no_cuda():
            raise ValueError(f"load: device must be 'auto' or 'cpu' here, got 'cuda': {reason}")
        from fullbeam.engine.cuda import CudaDevice

        return CudaDevice()
    return CpuDevice(_core.num_physical_cores() if threads is None else threads)


def why_no_cuda() -> str:
    """Why `CudaDevice` can't be used here; "" where it can."""
    if _core.num_cuda_devices() == 0:
        return _core.why_no_cuda_device()
    if importlib.util.find_spec("torch") is None:
        return 'torch must be there, which multiplies matrices: pip install "fullbeam[cuda]"'
    import torch

    if not torch.cuda.is_available():
        return f"torch {torch.__version__} has no CUDA: install a build of it that has"
    if (capability := torch.cuda.get_device_capability()) < (8, 0):
        major, minor = capability
        return f"{torch.cuda.get_device_name()} has compute capability {major}.{minor}, below 8.0"
    return ""
