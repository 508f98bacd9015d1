# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest

from fullbeam.engine.pages import PagePool, PageTable, prompt_keys

IDS = np.arange(100, dtype=np.int32)


def no_copy(src: int, dst: int) -> None:
    raise AssertionError("nothing to copy")


def filled(pool: PagePool, count: int, ids: np.ndarray = IDS) -> PageTable:
    table = PageTable(pool, 16)
    assert table.reserve(count, no_copy)
    table.commit(ids, count)
    return table


def test_released_pages_are_found_again_and_partial_ones_are_copied() -> None:
    pool = PagePool(8, 4)
    table = filled(pool, 10)
    pages = table.pages.copy()
    table.release()
    assert pool.num_available == 8
    assert pool.num_cached == 3
    again = PageTable(pool, 16)
    copies = []
    assert again.reuse(IDS, 11, lambda src, dst: copies.append((src, dst))) == 10
    assert again.pages[:2] == pages[:2]
    assert copies == [(pages[2], again.pages[2])]
    assert again.row.tolist() == again.pages + [-1] * 13
    assert again.num_tokens == 10
    pool.check(again.pages)
    assert again.reserve(1, no_copy)  # the copy is its own
    again.release()
    assert pool.num_available == 8


def test_the_page_with_the_longest_common_start_is_copied() -> None:
    pool = PagePool(8, 4)
    other = IDS.copy()
    other[6] = 99
    filled(pool, 8).release()
    filled(pool, 7, other).release()
    wanted = IDS.copy()
    wanted[7] = 98
    table = PageTable(pool, 16)
    assert table.reuse(wanted, 16, lambda src, dst: None) == 7
    pool.check(table.pages)


def test_a_partial_page_is_not_copied_where_there_is_no_page_left() -> None:
    pool = PagePool(2, 4)
    table = filled(pool, 4)
    other = filled(pool, 2, IDS[50:])
    wanted = IDS.copy()
    wanted[3] = 99
    assert PageTable(pool, 16).reuse(wanted, 4, no_copy) == 0
    pool.check(table.pages + other.pages)


def test_what_a_longer_page_holds_is_not_kept_twice() -> None:
    pool = PagePool(8, 4)
    long, short = filled(pool, 7), filled(pool, 6)
    long.release()
    short.release()
    assert pool.num_cached == 2
    pool.check([])


def test_reuse_stops_at_its_limit_and_at_the_first_difference() -> None:
    pool = PagePool(8, 4)
    filled(pool, 16).release()
    table = PageTable(pool, 16)
    assert table.reuse(IDS, 8, no_copy) == 8
    other = IDS.copy()
    other[5] = 99
    assert PageTable(pool, 16).reuse(other, 16, lambda src, dst: None) == 5
    shifted = IDS[4:].copy()  # the same second page after another first one
    assert PageTable(pool, 16).reuse(shifted, 12, no_copy) == 0


def test_prompt_keys_are_those_that_tables_publish() -> None:
    pool = PagePool(8, 4)
    table = filled(pool, 14)
    assert prompt_keys(IDS[:14], 4) == table.keys


def test_cached_pages_are_given_up_oldest_first_and_ends_before_beginnings() -> None:
    pool = PagePool(4, 4)
    filled(pool, 8).release()
    filled(pool, 8, IDS[50:]).release()
    table = PageTable(pool, 16)
    assert table.reserve(4, no_copy)
    assert PageTable(pool, 16).reuse(IDS, 8, no_copy) == 4
    kept = PageTable(pool, 16)
    assert kept.reuse(IDS[50:], 8, no_copy) == 8


def test_fork_shares_pages_and_the_first_writers_copy_the_partial_one() -> None:
    pool = PagePool(8, 4)
    table = filled(pool, 6)
    forks = [table.fork(), table.fork()]
    table.release()
    pool.check(forks[0].pages + forks[1].pages)
    copies = []
    assert forks[0].reserve(1, lambda src, dst: copies.append((src, dst)))
    assert copies == [(forks[1].pages[1], forks[0].pages[1])]
    assert forks[0].row[:2].tolist() == forks[0].pages
    assert forks[1].reserve(1, no_copy)  # the last one writes in place
    assert forks[0].pages[0] == forks[1].pages[0]
    assert forks[0].pages[1] != forks[1].pages[1]
    pool.check(forks[0].pages + forks[1].pages)


def test_reserve_says_when_pages_run_out_and_loses_none() -> None:
    pool = PagePool(2, 4)
    table = filled(pool, 4)
    assert not table.reserve(9, no_copy)
    pool.check(table.pages)
    assert table.num_tokens == 4
    table.release()
    assert pool.num_available == 2


def test_reserve_takes_no_copy_when_pages_run_out() -> None:
    pool = PagePool(1, 4)
    table = filled(pool, 2)
    fork = table.fork()
    assert not fork.reserve(1, no_copy)
    pool.check(table.pages + fork.pages)


def test_equal_pages_are_published_once() -> None:
    pool = PagePool(4, 4)
    first, second = filled(pool, 4), filled(pool, 4)
    first.release()
    second.release()
    assert pool.num_cached == 1
    pool.check([])


def test_releasing_twice_is_caught() -> None:
    pool = PagePool(1, 4)
    page = pool.allocate()
    pool.release(page)
    with pytest.raises(AssertionError, match="more often"):
        pool.release(page)
