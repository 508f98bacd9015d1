# SPDX-License-Identifier: Apache-2.0
"""The backends that the tests of the ops run on, besides the CPU's instruction sets.

``emulated``: the CUDA kernels, compiled for the CPU (tests/emulate/fibers.h); arrays in the host's
memory count as device memory. ``cuda``: the same kernels on a GPU; `OnDevice` carries the tests'
host arrays there and back, so that the tests are the same.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np

from fullbeam import _core

CPU = _core.available_isas()
# Compute capability, multiprocessors, shared memory that a block may have, blocks of a cluster.
EMULATED = {
    "emulated": (9, 0, 4, 227 << 10, 8),
    "emulated_slice": (9, 0, 4, 227 << 10, 4),  # of a GPU
    "emulated_sm80": (8, 0, 4, 163 << 10, 1),
    "emulated_sm120": (12, 0, 4, 99 << 10, 8),
}
ROOT = Path(__file__).parent.parent


def has_gpu() -> bool:
    return bool(_core.num_cuda_devices())


CUDA = ["emulated", *(["cuda"] if has_gpu() else [])]
# For ops that have other kernels where the device isn't a Hopper one.
CUDA_OLD_AND_NEW = ["emulated_sm80", *CUDA]


def tool(name: str) -> str:
    found = shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)
    assert found is not None, f"the tests build C++ with {name}: pip install {name}"
    return found


def is_sanitized() -> bool:
    """Whether this process runs under the address sanitizer (`make test-asan`)."""
    return "libasan" in os.environ.get("LD_PRELOAD", "")


@functools.cache
def emulated_core() -> Any:
    """The native module with emulated CUDA kernels, built at the first call."""
    import pybind11

    build = ROOT / "build" / ("emulate-asan" if is_sanitized() else "emulate")
    options = [
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}",
        f"-DFULLBEAM_SANITIZE={'ON' if is_sanitized() else 'OFF'}",
    ]
    if shutil.which("ccache"):
        options.append("-DCMAKE_CXX_COMPILER_LAUNCHER=ccache")
    env = {key: value for key, value in os.environ.items() if key != "LD_PRELOAD"}
    source = ROOT / "tests" / "emulate"
    for command in (
        [tool("cmake"), "-S", str(source), "-B", str(build), "-G", "Ninja", *options],
        [tool("cmake"), "--build", str(build)],
    ):
        done = subprocess.run(command, capture_output=True, text=True, env=env)
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-4000:]}{done.stderr}"
    (library,) = build.glob("_core*.so")
    # The last part of the name is the one that the library's entry point has.
    spec = importlib.util.spec_from_file_location("emulated._core", library)
    assert spec is not None
    assert spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    handle = ctypes.CDLL(str(library))
    module.emulate_set_seed = lambda seed, test: handle.emulate_set_seed(
        ctypes.c_uint64(seed), ctypes.c_uint64(test)
    )
    module.emulate_set_device = handle.emulate_set_device
    module.library = handle
    return module


class OnDevice:
    """`_core` for host arrays: each call runs on their copies on the GPU, which then come back.

    What is copied is the whole memory that an array is a view of, so that views keep their strides
    and their overlaps, and what a kernel writes beside its output comes back too.
    """

    def __init__(self) -> None:
        self._recorded: list[Any] = []

    def __getattr__(self, name: str) -> Any:
        function = getattr(_core, name)
        if name == "stop_recording":
            return lambda: _ProgramOnDevice(function(), self._recorded)
        if name in ("pack_weight", "start_recording") or not callable(function):
            return function

        def call(*args: Any) -> Any:
            memories: dict[int, tuple[Any, Any]] = {}
            result = function(*(_to_device(arg, memories) for arg in args))
            _to_host(memories)
            self._recorded.append(memories)
            return result

        return call


class _ProgramOnDevice:
    def __init__(self, program: Any, recorded: list[Any]) -> None:
        self._program, self._recorded = program, recorded

    def __len__(self) -> int:
        return len(self._program)

    def run(self) -> None:
        for memories in self._recorded:
            for host, device in memories.values():
                device.copy_(host)
        self._program.run()
        for memories in self._recorded:
            _to_host(memories)


def _to_device(array: Any, memories: dict[int, tuple[Any, Any]]) -> Any:
    import torch

    if isinstance(array, np.ndarray):
        if not array.flags.writeable:  # torch takes none; nothing is written to it anyway
            array = array.copy()
        root = array
        while isinstance(root.base, np.ndarray):
            root = root.base
        host = torch.from_numpy(
            np.lib.stride_tricks.as_strided(root, (root.size,), (root.itemsize,))
        )
        host = host.view(torch.uint8)
        dtype = torch.from_numpy(np.empty(0, array.dtype)).dtype
        strides = [stride // array.itemsize for stride in array.strides]
        shape, start = array.shape, array.ctypes.data
    elif isinstance(array, torch.Tensor):
        storage = array.untyped_storage()
        host = torch.empty(0, dtype=torch.uint8).set_(storage)
        dtype, strides, shape, start = array.dtype, array.stride(), array.shape, array.data_ptr()
    else:
        return array
    _, device = memories.setdefault(host.data_ptr(), (host, host.cuda()))
    offset = start - host.data_ptr()
    itemsize = torch.empty(0, dtype=dtype).element_size()
    whole = device[offset % itemsize :]
    whole = whole[: whole.numel() // itemsize * itemsize].view(dtype)
    return whole.as_strided(shape, strides, offset // itemsize)


def _to_host(memories: dict[int, tuple[Any, Any]]) -> None:
    for host, device in memories.values():
        host.copy_(device)
