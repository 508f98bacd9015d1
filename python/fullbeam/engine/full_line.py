# SPDX-License-Identifier: Apache-2.0
"""From the hypotheses of a search to suggestions of code: text, score, merging, order."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from fullbeam.engine.sorted_tokens import is_word

# Tabs are white space of code; other control characters and stray bytes are no text to suggest.
_UNFIT = re.compile(r"[\x00-\x08\x0a-\x1f\x7f-\x9f\udc80-\udcff]")


def length_factor(num_tokens: int, base: float, power: float) -> float:
    """Return ((base + num_tokens) / (base + 1)) ** power; base > -1, num_tokens >= 1."""
    try:
        return float(((base + num_tokens) / (base + 1)) ** power)
    except OverflowError:
        return math.inf


def rank_score(
    logprob: float, num_tokens: int, len_norm: tuple[float, float] | None, length_penalty: float
) -> float:
    """Return what results are ranked by, the highest first.

    Parameters
    ----------
    logprob
        Sum over the generated tokens, <= 0.
    num_tokens
        Generated tokens, the one that ended the text included, >= 1.
    len_norm
        Base and power: exp(logprob / length_factor). None: logprob / num_tokens**length_penalty.
    length_penalty
        See there.
    """
    if len_norm is None:
        return _divide(logprob, length_factor(num_tokens, 0.0, length_penalty))
    return math.exp(_divide(logprob, length_factor(num_tokens, *len_norm)))


def best_score(
    logprob: float,
    num_tokens: int,
    max_tokens: int,
    len_norm: tuple[float, float] | None,
    length_penalty: float,
) -> float:
    """Return the highest `rank_score` that a live hypothesis can still reach.

    Each further token can only lower `logprob`, and the divisor grows or shrinks with every token
    (by the sign of the power): so the best is the same `logprob` after one more token or after all.
    """
    return max(
        rank_score(logprob, length, len_norm, length_penalty)
        for length in (min(num_tokens + 1, max_tokens), max_tokens)
    )


class Hypothesis(NamedTuple):
    """A text that a search found."""

    data: bytes
    """Bytes of its tokens, the constraint included, an end token left out."""
    num_tokens: int
    """Generated tokens, the one that ended the text included."""
    logprob: float
    """Sum over the generated tokens, without penalties for diversity."""
    is_finished: bool
    group: int


@dataclass(frozen=True, slots=True)
class Suggestion:
    """What a client sees of a hypothesis."""

    text: str
    score: float
    source: int
    """Which of the given hypotheses it is, from 0."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FullLine:
    """How hypotheses become suggestions."""

    mode: str
    """"FULL_LINE" or "ONE_TOKEN": a suggestion is the rest of the line, or one word of it."""
    constraint: bytes
    """What every text was held to start with; ends in `prefix` or is the end of it."""
    prefix: str
    """What the user typed: every suggestion starts with it, and has more."""
    stop_strings: tuple[str, ...] = ()
    """Texts before which a suggestion ends."""
    only_full_lines: bool
    """Finished hypotheses only, as always with "ONE_TOKEN"."""
    len_norm: tuple[float, float] | None
    """See `rank_score`."""
    length_penalty: float
    """See `rank_score`."""
    alike: tuple[float, float] | None
    """Prefix and edit distance, as shares of the longer text, below which two suggestions are
    alike; None: none are merged."""
    keep_kinds: tuple[str, ...]
    """Which of those that are alike stay: the "prob"able, the "short"est, the "long"est."""
    group_top_n: int | None
    """Most suggestions of each diversity group, before merging. None: all."""
    top_n: int | None
    """Most suggestions. None: all."""

    def suggestions(self, hypotheses: Sequence[Hypothesis]) -> list[Suggestion]:
        """Return the suggestions, best first; of equal scores the hypothesis given first."""
        groups: dict[int, list[Suggestion]] = {}
        for source, hypothesis in enumerate(hypotheses):
            text = self.text(hypothesis)
            if text is not None:
                score = rank_score(
                    hypothesis.logprob, hypothesis.num_tokens, self.len_norm, self.length_penalty
                )
                groups.setdefault(hypothesis.group, []).append(Suggestion(text, score, source))
        merged = [item for group in groups.values() for item in _best(group, self.group_top_n)]
        distinct: dict[str, Suggestion] = {}
        for item in _best(merged, None):
            distinct.setdefault(item.text, item)
        found = list(distinct.values())
        if self.alike is not None:
            found = _merge_alike(found, *self.alike, self.keep_kinds)
        return _best(found, self.top_n)

    def text(self, hypothesis: Hypothesis) -> str | None:
        """Return what to suggest of a hypothesis; None where that is nothing."""
        if not (hypothesis.is_finished or (self.mode == "FULL_LINE" and not self.only_full_lines)):
            return None
        # Shorter than the constraint where tokens ran out: then nothing is left.
        text = hypothesis.data[len(self.constraint) :].decode("utf-8", "surrogateescape")
        for stop in self.stop_strings:
            text = text.partition(stop)[0]
        text = text.partition("\n")[0]  # a carriage return before it goes with the white space
        if not hypothesis.is_finished:
            text = _whole_words(text)
        if self.mode == "ONE_TOKEN":
            text = _first_word(text, self.prefix)
        text = text.rstrip()
        if not self.prefix:
            text = text.lstrip()
        if not text or _UNFIT.search(text):
            return None
        return self.prefix + text


def _divide(logprob: float, factor: float) -> float:
    """Quotient of a log-probability; a factor too small for a float makes it endless."""
    logprob = min(logprob, 0.0)
    if factor == 0:
        return -math.inf if logprob else 0.0
    return logprob / factor


def _whole_words(text: str) -> str:
    """Cut a text behind its last character that is in no word."""
    return text[: len(text) - len(_run(text[::-1], True))]


def _first_word(text: str, prefix: str) -> str:
    """Cut a text to the word that it goes on with; without a prefix perhaps to what is no word."""
    word = _run(text, True)
    return word if word or prefix else _run(text, False)


def _run(text: str, in_word: bool) -> str:
    """Return the longest beginning of a text that is all in words, or all not."""
    ends = (i for i, char in enumerate(text) if is_word(char) != in_word)
    return text[: next(ends, len(text))]


def _best(items: Iterable[Suggestion], count: int | None) -> list[Suggestion]:
    return sorted(items, key=lambda item: (-item.score, item.source))[:count]


def _merge_alike(
    items: Sequence[Suggestion], prefix_dist: float, edit_dist: float, kinds: tuple[str, ...]
) -> list[Suggestion]:
    """Put suggestions, best first, into clusters around their best, and keep some of each."""
    clusters: list[list[Suggestion]] = []
    for item in items:
        for cluster in clusters:
            if _is_alike(item.text, cluster[0].text, prefix_dist, edit_dist):
                cluster.append(item)
                break
        else:
            clusters.append([item])
    kept: list[Suggestion] = []
    for cluster in clusters:
        chosen = {
            "prob": cluster[0],
            "short": min(cluster, key=lambda item: len(item.text)),
            "long": max(cluster, key=lambda item: len(item.text)),
        }
        kept += {chosen[kind]: None for kind in chosen if kind in kinds}
    return kept


def _is_alike(one: str, two: str, prefix_dist: float, edit_dist: float) -> bool:
    longest = max(len(one), len(two))
    if prefix_dist > 0 and 1 - _common_start(one, two) / longest < prefix_dist:
        return True
    return edit_dist > 0 and _edits(one, two) / longest < edit_dist


def _common_start(one: str, two: str) -> int:
    pairs = zip(one, two, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(two)))


def _edits(one: str, two: str) -> int:
    """Return the Levenshtein distance."""
    row = list(range(len(two) + 1))
    for i, char in enumerate(one, 1):
        diagonal, row[0] = row[0], i
        for j, other in enumerate(two, 1):
            diagonal, row[j] = (
                row[j],
                min(row[j] + 1, row[j - 1] + 1, diagonal + (char != other)),
            )
    return row[-1]
