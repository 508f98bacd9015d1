# SPDX-License-Identifier: Apache-2.0
"""Pages of KV memory: reference counts, prefix reuse, page tables that fork and copy on write."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable

import numpy as np

from fullbeam.engine.batch import Int32Array

_ROOT = b""  # parent key of the first page


def page_key(parent: bytes, token_ids: Int32Array) -> bytes:
    """Name the contents of a full page: its own tokens and, through `parent`, all before them."""
    return hashlib.blake2b(parent + token_ids.tobytes(), digest_size=16).digest()


class PagePool:
    """Hands out pages, counts who holds them, and keeps full ones findable after they are let go.

    A page is free, held (reference count above 0), or cached: not held, but its contents are
    known by key and come back on a hit. Cached pages are given up oldest first.
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.num_pages = num_pages
        self.page_size = page_size
        self.ref_counts = [0] * num_pages
        self._free = list(range(num_pages - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()  # pages not held, oldest first
        self._key_of: dict[int, bytes] = {}
        self._page_of: dict[bytes, int] = {}

    @property
    def num_available(self) -> int:
        """Pages that can be allocated now, cached ones included."""
        return len(self._free) + len(self._cached)

    @property
    def num_cached(self) -> int:
        """Pages held by nobody whose contents can still be found."""
        return len(self._cached)

    def allocate(self) -> int:
        """Take a page with one reference; -1 when there is none."""
        if self._free:
            page = self._free.pop()
        elif self._cached:
            page, _ = self._cached.popitem(last=False)
            del self._page_of[self._key_of.pop(page)]
        else:
            return -1
        self.ref_counts[page] = 1
        return page

    def retain(self, page: int) -> None:
        """Add a reference to a held or cached page."""
        if self.ref_counts[page] == 0:
            del self._cached[page]
        self.ref_counts[page] += 1

    def release(self, page: int) -> None:
        """Drop a reference; the last one frees the page, or caches it if its contents are known."""
        count = self.ref_counts[page] - 1
        assert count >= 0, f"page {page} released more often than taken"
        self.ref_counts[page] = count
        if count == 0:
            if page in self._key_of:
                self._cached[page] = None
            else:
                self._free.append(page)

    def publish(self, page: int, key: bytes) -> None:
        """Make a full, computed page findable, unless another page has the same contents."""
        if key not in self._page_of and page not in self._key_of:
            self._page_of[key] = page
            self._key_of[page] = key

    def find(self, key: bytes) -> int:
        """Page with these contents; -1 when there is none."""
        return self._page_of.get(key, -1)

    def check(self, held: list[int]) -> None:
        """Assert that books balance, given every reference that page tables hold (for tests)."""
        counts = [0] * self.num_pages
        for page in held:
            counts[page] += 1
        assert counts == self.ref_counts, "reference counts differ from the page tables"
        free, cached = set(self._free), set(self._cached)
        assert len(free) == len(self._free), "a page is free twice"
        idle = {page for page, count in enumerate(counts) if count == 0}
        assert free | cached == idle, "an idle page is lost"
        assert not free & cached, "a page is both free and cached"
        assert cached <= self._key_of.keys(), "a cached page has no key"
        assert not free & self._key_of.keys(), "a free page can be found"
        assert {page: key for key, page in self._page_of.items()} == self._key_of


class PageTable:
    """Pages of one chain of tokens, in order; `num_tokens` of them hold keys and values."""

    def __init__(self, pool: PagePool, max_pages: int) -> None:
        self._pool = pool
        self.pages: list[int] = []
        self.row: Int32Array = np.full(max_pages, -1, np.int32)  # the same pages, padded with -1
        self.num_tokens = 0
        self.keys: list[bytes] = []  # one for each full page

    def _append(self, page: int) -> None:
        self.row[len(self.pages)] = page
        self.pages.append(page)

    def reuse(self, token_ids: Int32Array, limit: int, keys: list[bytes] | None = None) -> int:
        """Take over cached pages that hold the next tokens, at most up to `limit` tokens in all.

        `keys` spares the hashing where the keys of `token_ids` are known. Returns how many tokens
        were found.
        """
        pool, size = self._pool, self._pool.page_size
        first = len(self.keys)
        found: list[int] = []
        for idx in range(first, limit // size):
            if keys is not None and idx < len(keys):
                key = keys[idx]
            else:
                parent = self.keys[-1] if self.keys else _ROOT
                key = page_key(parent, token_ids[idx * size : (idx + 1) * size])
            page = pool.find(key)
            if page < 0:
                break
            found.append(page)
            self.keys.append(key)
        if not found:
            return 0
        for page in found:
            pool.retain(page)
        self._truncate(first)  # a partial page is replaced by the full one that continues it
        for page in found:
            self._append(page)
        num_found = len(self.pages) * size - self.num_tokens
        self.num_tokens += num_found
        return num_found

    def reserve(self, count: int, copy_page: Callable[[int, int], None]) -> bool:
        """Make room to write the next `count` tokens; False, with nothing lost, when pages run out.

        A partly filled page that others hold too is replaced by a private copy.
        """
        pool, size = self._pool, self._pool.page_size
        idx = self.num_tokens // size
        if idx < len(self.pages) and pool.ref_counts[self.pages[idx]] > 1:
            page = pool.allocate()
            if page < 0:
                return False
            copy_page(self.pages[idx], page)
            pool.release(self.pages[idx])
            self.pages[idx] = page
            self.row[idx] = page
        while len(self.pages) * size < self.num_tokens + count:
            page = pool.allocate()
            if page < 0:
                return False
            self._append(page)
        return True

    def commit(self, token_ids: Int32Array, count: int) -> None:
        """Count `count` more tokens as computed and publish the pages that they filled."""
        self.num_tokens += count
        size = self._pool.page_size
        for idx in range(len(self.keys), self.num_tokens // size):
            parent = self.keys[-1] if self.keys else _ROOT
            key = page_key(parent, token_ids[idx * size : (idx + 1) * size])
            self.keys.append(key)
            self._pool.publish(self.pages[idx], key)

    def fork(self) -> PageTable:
        """Return a second table over the same pages."""
        table = PageTable(self._pool, len(self.row))
        table.row[:] = self.row
        table.pages = self.pages.copy()
        table.keys = self.keys.copy()
        table.num_tokens = self.num_tokens
        for page in table.pages:
            self._pool.retain(page)
        return table

    def release(self) -> None:
        """Give all pages back; the last ones go first, so that they leave the cache first."""
        self._truncate(0)
        self.num_tokens = 0
        self.keys.clear()

    def _truncate(self, num_pages: int) -> None:
        while len(self.pages) > num_pages:
            self._pool.release(self.pages.pop())
            self.row[len(self.pages)] = -1


def prompt_keys(token_ids: Int32Array, page_size: int) -> list[bytes]:
    """Keys of all full pages of a prompt."""
    keys: list[bytes] = []
    parent = _ROOT
    for end in range(page_size, len(token_ids) + 1, page_size):
        parent = page_key(parent, token_ids[end - page_size : end])
        keys.append(parent)
    return keys
