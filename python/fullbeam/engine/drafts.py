# SPDX-License-Identifier: Apache-2.0
"""What a row may say next, guessed from its own text, so that one step checks several tokens.

Text that is edited, quoted or listed repeats itself: what followed the latest tokens when they came
before is likely to follow again. The step computes such a draft behind the row's newest token and
draws at every place of it, as it would have without: tokens hold as far as they are those of the
draft, so that no answer changes, and the first that differs is a token like any other.
"""

from __future__ import annotations

from itertools import chain

import numpy as np

from fullbeam.engine.batch import Int32Array

DEFAULT_DRAFT_TOKENS = 15

_BITS = 21  # of a token id: three of them make a key, two of them another, below 0
_PAIR = 2 ** (2 * _BITS) - 1
_TRIPLE = 2 ** (3 * _BITS) - 1
_START_SHARE = 0.7
_MEMORY = 0.1  # weight of the newest token in the share of guesses that hold
_MARGIN = 1.25  # by which a draft has to be worth more than it costs, as neither is sure
_SURE_SHARE = 0.85  # a batch where even such guesses are not worth it is left alone


class Drafter:
    """Guesses the tokens of one row.

    A guess costs some look-ups, a new token two entries, whatever the length of the text. Whether
    the guesses are any good is learned from every token, also where none was computed ahead: a row
    that starts to repeat itself is found out at no cost.
    """

    def __init__(self, prompt_places: dict[int, int], prompt_ids: Int32Array) -> None:
        self._prompt_places = prompt_places  # shared by the rows of a prompt; see index_prompt
        self._places: dict[int, int] = {}  # likewise, of the row's own text
        self._num_seen = len(prompt_ids)
        self._triple = _TRIPLE  # the last three tokens seen, as a key
        for token_id in prompt_ids[-3:].tolist():
            self._triple = (self._triple << _BITS | token_id) & _TRIPLE
        self._source = -1  # where the text that is guessed to come next was seen
        self._guess = -1  # the next token, guessed; -1: none
        self.share = _START_SHARE  # of guessed tokens that held, lately

    def look(self, ids: Int32Array, num_tokens: int) -> bool:
        """Take in the row's new tokens; return whether there is a guess what comes next."""
        own, prompt, triple = self._places, self._prompt_places, self._triple
        new = ids[self._num_seen : num_tokens].tolist()
        if new and self._guess >= 0:
            self._learn(new[0] == self._guess)
        for place, token_id in enumerate(new, self._num_seen):
            own[triple] = own[~(triple & _PAIR)] = place
            triple = (triple << _BITS | token_id) & _TRIPLE
        self._num_seen, self._triple = num_tokens, triple
        source = own.get(triple, -1)
        if source < 0:
            source = prompt.get(triple, -1)
        if source < 0:
            pair = ~(triple & _PAIR)
            source = own.get(pair, -1)
            if source < 0:
                source = prompt.get(pair, -1)
        self._source = source
        self._guess = -1 if source < 0 else int(ids[source])
        return source >= 0

    def draft(self, ids: Int32Array, num_tokens: int, count: int) -> list[int]:
        """Write the next `count` tokens, as guessed, behind the row's own; return them."""
        known = ids[self._source : min(self._source + count, num_tokens)]
        ids[num_tokens : num_tokens + count] = np.resize(known, count)  # a text may run into itself
        self._guess = -1
        drafts: list[int] = ids[num_tokens : num_tokens + count].tolist()
        return drafts

    def note(self, num_drafted: int, num_held: int) -> None:
        """Learn how many tokens of a draft held."""
        for _ in range(num_held):
            self._learn(True)
        if num_held < num_drafted:
            self._learn(False)

    def _learn(self, held: bool) -> None:
        self.share += _MEMORY * (held - self.share)


def index_prompt(ids: Int32Array) -> dict[int, int]:
    """Where each two and three tokens of a prompt came last: the place of what followed them."""
    wide = ids.astype(np.int64)
    pairs = ~(wide[:-2] << _BITS | wide[1:-1])
    triples = wide[:-3] << 2 * _BITS | wide[1:-2] << _BITS | wide[2:-1]
    places = chain(range(2, len(ids)), range(3, len(ids)))
    return dict(zip(chain(pairs.tolist(), triples.tolist()), places, strict=True))


class Allowance:
    """How many tokens the rows of a step may draft.

    A draft lengthens the step for all rows: a token is worth computing ahead while the chance that
    it holds, over what it adds to the step, is above the tokens that the step yields without it,
    over the time that it takes, by a margin. So a row whose guesses fail drafts nothing, and the
    more rows there are, the surer a guess has to be: with a row cost of 0.15, 13 are too many.

    Parameters
    ----------
    num_rows
        Rows that decode in the step.
    row_cost
        See `fullbeam.engine.runner.Decoder`.
    """

    def __init__(self, num_rows: int, row_cost: float) -> None:
        self._row_cost = row_cost
        self._time = 1 + row_cost * (num_rows - 1)
        self._yield = float(num_rows)

    @property
    def is_spent(self) -> bool:
        """Whether only the surest of guesses would be worth their cost."""
        return self._time * _SURE_SHARE <= _MARGIN * self._row_cost * self._yield

    def take(self, share: float, most: int) -> int:
        """Return how many tokens a row may draft, of whose guesses this share holds."""
        chance, count = share, 0
        while count < most and chance * self._time > _MARGIN * self._row_cost * self._yield:
            self._yield += chance
            self._time += self._row_cost
            chance *= share
            count += 1
        return count
