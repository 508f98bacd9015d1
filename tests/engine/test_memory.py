# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import pytest

from fullbeam.engine.memory import available_bytes, plan_kv

MIB = 1 << 20
BASE: dict[str, Any] = {
    "bytes_per_token": 1024,
    "model_context": 32768,
    "context": None,
    "max_rows": None,
    "available_bytes": 1024 * MIB,
    "kv_share": 0.5,
}


def test_defaults() -> None:
    plan = plan_kv(**BASE)
    assert (plan.context, plan.max_rows, plan.num_pages) == (4096, 16, 4096)
    assert plan_kv(**{**BASE, "model_context": 1000}).context == 1000


def test_pages_stay_within_a_share_of_the_memory() -> None:
    plan = plan_kv(**{**BASE, "available_bytes": 64 * MIB})
    assert plan.context == 4096
    assert plan.num_pages * 16 * 1024 <= 32 * MIB
    assert plan_kv(**{**BASE, "available_bytes": 4 * MIB}).context == 2048


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"context": 0}, "context must be at least 1, got 0"),
        ({"context": 32769}, "context must be at most 32768, got 32769"),
        ({"context": 4096, "available_bytes": 4 * MIB}, "context must be at most 2048 here"),
        ({"available_bytes": MIB // 4}, "context must have room for 256 tokens"),
        ({"max_rows": 0}, "max_rows must be at least 1, got 0"),
        ({"max_rows": 10**6}, "max_rows must be at most 32768 here"),
    ],
)
def test_no_room_names_the_argument(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        plan_kv(**{**BASE, **options})


def test_kinds() -> None:
    with pytest.raises(TypeError, match="context must be an integer, got float"):
        plan_kv(**{**BASE, "context": 10.0})


def test_available_memory_is_some() -> None:
    assert 0 < available_bytes() < 1 << 50
