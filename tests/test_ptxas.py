# SPDX-License-Identifier: Apache-2.0
"""What nvcc made of the kernels, where this tree was built with it."""

from __future__ import annotations

import pytest

from benchmarks.kernels import DOCUMENT, kernels, name_of, reports

found = [kernel for path in reports() for kernel in kernels(path)]
needs_nvcc = pytest.mark.skipif(not found, reason="no build with nvcc in build/")


def test_names_are_read_from_mangled_ones() -> None:
    mangled = "_ZN8fullbeam4cuda22_GLOBAL__N__d3_11_a_cu9norm_rowsIfLi1EEEvNS_13RmsNormParamsE"
    assert name_of(mangled) == "norm_rows"


@needs_nvcc
def test_no_kernel_spills() -> None:
    assert not [kernel for kernel in found if kernel.spill_bytes]


@needs_nvcc
def test_every_kernel_is_built_for_all_and_for_hopper() -> None:
    by_arch = {arch: {k.name for k in found if k.arch == arch} for arch in ("sm_80", "sm_90a")}
    assert by_arch["sm_80"] == by_arch["sm_90a"] != set()


@needs_nvcc
def test_the_document_names_every_kernel() -> None:
    text = DOCUMENT.read_text()
    assert not [k.name for k in found if f"| {k.op} | `{k.name}` | {k.arch} |" not in text]
