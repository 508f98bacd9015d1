# SPDX-License-Identifier: Apache-2.0
"""What ptxas says of the CUDA kernels: registers, stack and spills per kernel and architecture.

    python -m benchmarks.kernels            # the table of the last build with nvcc
    python -m benchmarks.kernels --write    # puts it into docs/kernels.md

A build keeps the report beside each object (third_party/keep_ptxas_report.sh).
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCUMENT = ROOT / "docs" / "kernels.md"
BEGIN, END = "<!-- kernels: begin -->", "<!-- kernels: end -->"


@dataclass(frozen=True)
class Kernel:
    op: str
    name: str
    arch: str
    registers: int
    stack_bytes: int
    spill_bytes: int  # stores and loads

    @property
    def max_warps(self) -> int:
        """Warps of a multiprocessor (of 64) that the registers leave room for."""
        return min(64, 65536 // (-(-self.registers // 8) * 8 * 32) // 4 * 4)


def reports() -> list[Path]:
    """Those of the newest build folder that has any."""
    folders: dict[Path, list[Path]] = {}
    for path in ROOT.glob("build/*/CMakeFiles/cuda_kernels.dir/**/*.ptxas"):
        folders.setdefault(path.relative_to(ROOT / "build").parents[-2], []).append(path)
    newest = max(
        folders.values(), key=lambda paths: max(p.stat().st_mtime for p in paths), default=[]
    )
    return sorted(newest)


def name_of(mangled: str) -> str:
    """The function's own name: the last of the length-prefixed names of its nesting."""
    names, rest = [], mangled.removeprefix("_ZN")
    while found := re.match(r"\d+", rest):
        length, rest = int(found[0]), rest[found.end() :]
        names.append(rest[:length])
        rest = rest[length:]
    return names[-1] if names else mangled


def kernels(path: Path) -> Iterator[Kernel]:
    text = path.read_text()
    pattern = (
        r"Compiling entry function '(\w+)' for '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill"
        r" stores, (\d+) bytes spill loads.*?Used (\d+) registers"
    )
    for mangled, arch, stack, stores, loads, registers in re.findall(pattern, text, re.DOTALL):
        yield Kernel(
            path.name.split(".")[0], name_of(mangled), arch, int(registers), int(stack),
            int(stores) + int(loads),
        )  # fmt: skip


def table(found: list[Kernel]) -> str:
    lines = [
        "| op | kernel | for | instances | registers | warps of 64 | stack, spill bytes |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for op, name, arch in sorted({(k.op, k.name, k.arch) for k in found}):
        same = [k for k in found if (k.op, k.name, k.arch) == (op, name, arch)]
        most = max(k.registers for k in same)
        least = min(k.registers for k in same)
        registers = f"{least}-{most}" if least < most else f"{most}"
        stack, spill = max(k.stack_bytes for k in same), max(k.spill_bytes for k in same)
        lines.append(
            f"| {op} | `{name}` | {arch} | {len(same)} | {registers} |"
            f" {min(k.max_warps for k in same)} | {stack}, {spill} |"
        )
    return "\n".join(lines)


def main() -> None:
    found = [kernel for path in reports() for kernel in kernels(path)]
    if not found:
        sys.exit("kernels: no build with nvcc here; build with FULLBEAM_CUDA=ON first")
    text = table(found)
    if sys.argv[1:] == ["--write"]:
        before, rest = DOCUMENT.read_text().split(BEGIN)
        DOCUMENT.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}")
    else:
        print(text)


if __name__ == "__main__":
    main()
