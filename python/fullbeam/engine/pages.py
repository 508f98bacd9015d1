# SPDX-License-Identifier: Apache-2.0
"""Pages of KV memory: reference counts, prefix reuse, page tables that fork and copy on write."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Sequence

import numpy as np

from fullbeam.engine.batch import Int32Array

_ROOT = b""  # parent key of the first page
_TOKEN_BYTES = 4


def page_key(parent: bytes, tokens: bytes) -> bytes:
    """Name the contents of a full page: its own tokens and, through `parent`, all before them."""
    return hashlib.blake2b(parent + tokens, digest_size=16).digest()


class PagePool:
    """Hands out pages, counts who holds them, and keeps full ones findable after they are let go.

    A page is free, held (reference count above 0), or cached: not held, but its contents are
    known, its own tokens and the key of all before them, and come back on a hit. Cached pages are
    given up oldest first.
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.num_pages = num_pages
        self.page_size = page_size
        self.ref_counts = [0] * num_pages
        self._free = list(range(num_pages - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()  # pages not held, oldest first
        self._contents: dict[int, tuple[bytes, bytes]] = {}  # parent key, own tokens
        self._pages_after: dict[bytes, dict[bytes, int]] = {}  # parent key, own tokens: page

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
            self._forget(page)
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
            if page in self._contents:
                self._cached[page] = None
            else:
                self._free.append(page)

    def publish(self, page: int, parent: bytes, tokens: bytes) -> None:
        """Make a computed page findable that is not written any more, unless another one has its
        tokens and perhaps more."""
        siblings = self._pages_after.setdefault(parent, {})
        if page not in self._contents and not any(
            known.startswith(tokens) for known in _like(siblings, tokens)
        ):
            siblings[tokens] = page
            self._contents[page] = parent, tokens

    def find(self, parent: bytes, tokens: bytes) -> int:
        """Page with exactly these tokens; -1 when there is none."""
        return self._pages_after.get(parent, {}).get(tokens, -1)

    def find_longest(self, parent: bytes, tokens: bytes) -> tuple[int, int]:
        """Page that starts with as many of these tokens as any, and how many those are."""
        siblings = self._pages_after.get(parent, {})
        best, most = -1, 0
        for known in _like(siblings, tokens):
            count = _common(known, tokens)
            if count > most:
                best, most = siblings[known], count
        return best, most

    def _forget(self, page: int) -> None:
        parent, tokens = self._contents.pop(page)
        siblings = self._pages_after[parent]
        del siblings[tokens]
        if not siblings:
            del self._pages_after[parent]

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
        assert cached <= self._contents.keys(), "a cached page has no contents"
        assert not free & self._contents.keys(), "a free page can be found"
        assert self._contents == {
            page: (parent, tokens)
            for parent, siblings in self._pages_after.items()
            for tokens, page in siblings.items()
        }


class PageTable:
    """Pages of one chain of tokens, in order; `num_tokens` of them hold keys and values."""

    def __init__(self, pool: PagePool, max_pages: int) -> None:
        self._pool = pool
        self.pages: list[int] = []
        self.row: Int32Array = np.full(max_pages, -1, np.int32)  # the same pages, padded with -1
        self.num_tokens = 0
        self.keys: list[bytes] = []  # one for each full page
        self._token_ids: Int32Array | None = None  # of the chain, from its start

    def _append(self, page: int) -> None:
        self.row[len(self.pages)] = page
        self.pages.append(page)

    def reuse(
        self,
        token_ids: Int32Array,
        limit: int,
        copy_page: Callable[[int, int], None],
        keys: Sequence[bytes] = (),
    ) -> int:
        """Take over cached pages that hold the next tokens, at most up to `limit` tokens in all.

        Of a page that holds only some of them, or others after them, a copy is taken. `keys` spares
        the hashing where the keys of `token_ids` are known. Returns how many tokens were found.
        """
        pool, size = self._pool, self._pool.page_size
        first, num_before = len(self.keys), self.num_tokens
        found: list[int] = []
        for idx in range(first, limit // size):
            parent = self.keys[-1] if self.keys else _ROOT
            tokens = token_ids[idx * size : (idx + 1) * size].tobytes()
            page = pool.find(parent, tokens)
            if page < 0:
                break
            found.append(page)
            self.keys.append(keys[idx] if idx < len(keys) else page_key(parent, tokens))
        for page in found:
            pool.retain(page)
        if found:
            self._truncate(first)  # a partial page is replaced by the full one that continues it
            for page in found:
                self._append(page)
            self.num_tokens = len(self.pages) * size
        start = len(self.keys) * size
        tokens = token_ids[start : min(start + size, limit)].tobytes()
        parent = self.keys[-1] if self.keys else _ROOT
        page, count = pool.find_longest(parent, tokens)
        if start + count > self.num_tokens:
            pool.retain(page)
            copy = pool.allocate()
            if copy >= 0:
                copy_page(page, copy)
                self._truncate(len(self.keys))
                self._append(copy)
                self.num_tokens = start + count
            pool.release(page)
        self._token_ids = token_ids
        return self.num_tokens - num_before

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
        self._token_ids = token_ids
        size = self._pool.page_size
        for idx in range(len(self.keys), self.num_tokens // size):
            parent = self.keys[-1] if self.keys else _ROOT
            tokens = token_ids[idx * size : (idx + 1) * size].tobytes()
            self.keys.append(page_key(parent, tokens))
            self._pool.publish(self.pages[idx], parent, tokens)

    def fork(self) -> PageTable:
        """Return a second table over the same pages."""
        table = PageTable(self._pool, len(self.row))
        table.row[:] = self.row
        table.pages = self.pages.copy()
        table.keys = self.keys.copy()
        table.num_tokens = self.num_tokens
        table._token_ids = self._token_ids
        for page in table.pages:
            self._pool.retain(page)
        return table

    def release(self) -> None:
        """Give all pages back; the last ones go first, so that they leave the cache first."""
        start = len(self.keys) * self._pool.page_size
        if start < self.num_tokens and self._token_ids is not None:
            page = self.pages[len(self.keys)]
            if self._pool.ref_counts[page] == 1:
                parent = self.keys[-1] if self.keys else _ROOT
                tokens = self._token_ids[start : self.num_tokens].tobytes()
                self._pool.publish(page, parent, tokens)
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
        parent = page_key(parent, token_ids[end - page_size : end].tobytes())
        keys.append(parent)
    return keys


def _common(one: bytes, two: bytes) -> int:
    """Number of tokens that both start with."""
    count = min(len(one), len(two)) // _TOKEN_BYTES
    pairs = zip(memoryview(one).cast("i"), memoryview(two).cast("i"), strict=False)
    return next((idx for idx, (a, b) in enumerate(pairs) if a != b), count)


def _like(siblings: dict[bytes, int], tokens: bytes) -> list[bytes]:
    """Those that start with the same token."""
    first = tokens[:_TOKEN_BYTES]
    return [known for known in siblings if first and known.startswith(first)]
