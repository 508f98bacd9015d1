# SPDX-License-Identifier: Apache-2.0
"""The merges that a SentencePiece BPE vocabulary implies.

SentencePiece keeps no merge list: of all neighbours that together spell a piece it joins the pair
whose piece has the highest score, the leftmost first among equals, until none is left. Before a
piece comes about, nothing has been joined across its ends, so it comes about in one way only, the
way it does when it is alone: one merge a piece, ordered by score, gives a merge list with the same
result. (Different pieces of equal score are the exception: a merge list orders them by id. Trained
vocabularies have none.)
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt

Merges = npt.NDArray[np.uint32]
_MAGIC = b"fullbeam merges 1\n"


def merges_from_scores(
    tokens: Sequence[str], scores: npt.NDArray[np.float32], mergeable: npt.NDArray[np.bool_]
) -> Merges:
    """Derive the merge list of a SentencePiece BPE vocabulary.

    Parameters
    ----------
    tokens
        The vocabulary's texts, all different, spaces written as U+2581.
    scores
        float32 [vocab_size], finite; the higher, the earlier.
    mergeable
        bool [vocab_size]: the tokens that merging may make.

    Returns
    -------
    uint32 [num_merges, 2]: token ids of the left and right part, first merge first.
    """
    order = np.lexsort((np.arange(len(tokens)), -scores))
    order = order[mergeable[order]]
    pieces = [tokens[i] for i in order]
    ranks = {piece: rank for rank, piece in enumerate(pieces)}
    merges = [
        pair for piece in pieces if len(piece) > 1 and (pair := _last_merge(piece, pieces, ranks))
    ]
    return order[np.array(merges, np.int64).reshape(-1, 2)].astype(np.uint32)


def _last_merge(piece: str, pieces: Sequence[str], ranks: dict[str, int]) -> tuple[int, int] | None:
    never = len(pieces)
    rank_of = ranks.get
    parts = list(piece)
    pairs = [rank_of(a + b, never) for a, b in pairwise(parts)]
    while len(pairs) > 1:
        best = min(pairs)
        if best == never:
            return None
        i = pairs.index(best)
        parts[i] = joined = pieces[best]
        del parts[i + 1], pairs[i]
        if i < len(pairs):
            pairs[i] = rank_of(joined + parts[i + 1], never)
        if i:
            pairs[i - 1] = rank_of(parts[i - 1] + joined, never)
    left, right = rank_of(parts[0]), rank_of(parts[1])
    return None if left is None or right is None else (left, right)


def cached_merges(
    folder: Path,
    tokens: Sequence[str],
    scores: npt.NDArray[np.float32],
    mergeable: npt.NDArray[np.bool_],
) -> Merges:
    """Do what `merges_from_scores` does, with its result kept in a folder.

    A file that is absent, damaged or of another vocabulary is made anew; a folder that can't be
    written costs only the time to derive the merges again.
    """
    digest = hashlib.sha256("\0".join(tokens).encode())
    digest.update(np.ascontiguousarray(scores).tobytes())
    digest.update(np.ascontiguousarray(mergeable).tobytes())
    path = folder / f"merges-{digest.hexdigest()[:32]}.bin"
    merges = _read(path, digest.digest(), len(tokens))
    if merges is None:
        merges = merges_from_scores(tokens, scores, mergeable)
        with suppress(OSError):
            _write(path, digest.digest(), merges)
    return merges


def _read(path: Path, key: bytes, vocab_size: int) -> Merges | None:
    try:
        content = path.read_bytes()
    except OSError:
        return None
    head = _MAGIC + key
    body = content[len(head) + 32 :]
    check = content[len(head) : len(head) + 32]
    if not content.startswith(head) or hashlib.sha256(body).digest() != check or len(body) % 8:
        return None
    merges = np.frombuffer(body, "<u4").reshape(-1, 2)
    return merges if not merges.size or merges.max() < vocab_size else None


def _write(path: Path, key: bytes, merges: Merges) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    body = merges.astype("<u4").tobytes()
    handle, name = tempfile.mkstemp(prefix=path.name, dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(_MAGIC + key + hashlib.sha256(body).digest() + body)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
