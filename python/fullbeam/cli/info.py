# SPDX-License-Identifier: Apache-2.0
"""`fullbeam info`."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import click

from fullbeam.cli.command import Command, open_console

if TYPE_CHECKING:
    from types import ModuleType


@click.command(cls=Command)
def info() -> None:
    """Show what this installation is, what it runs on, and why a device is not used."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    from rich.table import Table

    from fullbeam import __version__
    from fullbeam.models.catalog import cache_folder

    facts: dict[str, object] = {
        "fullbeam": __version__,
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "numpy": version("numpy"),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} logical cores",
        "model folder": cache_folder(),
    }
    try:
        facts["torch"] = version("torch")
    except PackageNotFoundError:
        facts["torch"] = "not installed; only CUDA devices need it"
    try:
        from fullbeam import _core
    except ImportError as error:
        facts["native module"] = f"missing ({error}): install fullbeam again"
    else:
        built = _core.build_info()
        facts["compiler"] = built["compiler"]
        chosen = "FULLBEAM_CPU_ISA says" if os.environ.get("FULLBEAM_CPU_ISA") else "the best here"
        isas = ", ".join(built["cpu_isas"])
        facts["CPU kernels"] = f"{isas}; in use: {_core.cpu_isa()}, {chosen}"
        facts["threads"] = f"{_core.num_physical_cores()} unless --threads is given"
        cuda = built["cuda"]
        facts["CUDA kernels"] = "none: built without nvcc" if cuda == "off" else f"by nvcc {cuda}"
        facts["CUDA devices"] = _cuda_devices(_core)
    table = Table(show_header=False, box=None)
    for name, value in facts.items():
        table.add_row(name, str(value))
    open_console().print(table)


def _cuda_devices(core: ModuleType) -> str:
    num_devices = core.num_cuda_devices()
    if num_devices == 0:
        return f"none: {core.why_no_cuda_device()}"
    from fullbeam.engine.device import why_no_cuda

    if reason := why_no_cuda():
        return f"{num_devices}, not used: {reason}"
    import torch

    names = ", ".join(map(torch.cuda.get_device_name, range(num_devices)))
    return f"{names}; --device cuda uses the first, CUDA_VISIBLE_DEVICES says which that is"
