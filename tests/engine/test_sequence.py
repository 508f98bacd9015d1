# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import numpy as np

import fake_model
from fullbeam.engine.sequence import Request, Row, Sequence
from fullbeam.engine.text import TokenLogprob, TokenNames
from fullbeam.params import CompletionParams

A, B, C, D = 2, 3, 4, 5


def new_row(**fields: Any) -> Row:
    params = CompletionParams(max_tokens=9, **fields)
    tokenizer = fake_model.FakeTokenizer()
    request = Request(
        prompt_ids=np.array([fake_model.BOS], np.int32),
        given_text="",
        params=params,
        max_tokens=9,
        prompt_index=0,
        seed=0,
        stream=True,
        on_event=lambda event: None,
        tokenizer=tokenizer,
        names=TokenNames(tokenizer),
        end_ids=tokenizer.eos_ids,
    )
    return Sequence(request, range(1)).rows[0]


def steps(row: Row, token_ids: list[int]) -> list[tuple[str, list[int]] | None]:
    """What can be shown after each token."""
    shown: list[tuple[str, list[int]] | None] = []
    for token_id in token_ids:
        row.append(token_id, TokenLogprob(-1.0, [], []))
        piece = row.take_piece()
        shown.append(piece and (piece.text, piece.token_ids))
    return shown


def test_tokens_that_a_stop_string_may_still_remove_are_not_shown() -> None:
    row = new_row(stop="cab")
    assert steps(row, [C, A, C, A, B]) == [None, None, ("ca", [C, A]), None, ("", [])]
    assert row.finish_reason == "stop"
    assert row.stop_reason == "cab"


def test_a_token_that_holds_the_start_of_the_cut_stays() -> None:
    row = new_row(stop="bd")
    assert steps(row, [8, D]) == [("a", [8]), ("", [])]


def test_tokens_of_a_character_are_shown_with_it() -> None:
    row = new_row()
    assert steps(row, [16, 17, 18, A]) == [None, None, ("€", [16, 17, 18]), ("a", [A])]


def test_an_end_token_follows_what_was_held() -> None:
    row = new_row(stop="cab", logprobs=0)
    row.append(16, TokenLogprob(-1.0, [], []))
    row.append(fake_model.EOS, TokenLogprob(-3.0, [], []))
    piece = row.take_piece()
    assert piece is not None
    assert piece.text == "\ufffd"
    assert piece.token_ids == [16, fake_model.EOS]
    assert piece.logprobs is not None
    assert piece.logprobs.text_offset == [0, 1]
    assert piece.mean_logprob == -2.0
