# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import numpy as np

import fake_model
from fullbeam.engine.logits import History
from fullbeam.engine.sequence import Request, Row, Sequence, best_rows
from fullbeam.engine.text import TokenLogprob, TokenNames
from fullbeam.params import CompletionParams

A, B, C, D = 2, 3, 4, 5


def new_row(*, given_text: str = "", healed: bytes = b"", **fields: Any) -> Row:
    params = CompletionParams(max_tokens=9, **fields)
    tokenizer = fake_model.FakeTokenizer()
    request = Request(
        prompt_ids=np.array([fake_model.BOS], np.int32),
        given_text=given_text,
        params=params,
        max_tokens=9,
        prompt_index=0,
        seed=0,
        stream=True,
        on_event=lambda event: None,
        tokenizer=tokenizer,
        names=TokenNames(tokenizer),
        end_ids=tokenizer.eos_ids,
        constraint=healed,
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
    assert piece.score == -2.0


def test_a_stop_string_that_stays_is_shown_with_its_tokens() -> None:
    row = new_row(stop="cab", include_stop_str_in_output=True)
    assert steps(row, [C, A, C, 2, 9]) == [None, None, ("ca", [C, A]), None, ("cab", [C, A, 9])]
    assert (row.finish_reason, row.stop_reason) == ("stop", "cab")


def test_what_the_prompt_ended_with_is_not_shown_again() -> None:
    row = new_row(given_text="xé ab", healed="é ab".encode(), logprobs=0)
    for token_id in (19, 6, 10, D):  # é, space, abc, d
        row.append(token_id, TokenLogprob(-1.0, [], []))
    row.finish_without_token()
    piece = row.take_piece()
    assert piece is not None
    assert piece.text == "cd"
    assert piece.token_ids == [19, 6, 10, D]
    assert piece.logprobs is not None
    assert piece.logprobs.text_offset == [1, 2, 3, 6]


def test_stop_strings_are_not_found_in_what_is_spelled_again() -> None:
    row = new_row(healed=b"ab", stop=["ab", "bc"])
    assert steps(row, [10, A]) == [("c", [10]), None]  # the "a" may become a stop string


def test_special_tokens_are_named_where_they_are_not_skipped() -> None:
    row = new_row(skip_special_tokens=False)
    assert steps(row, [A, fake_model.BOS, fake_model.EOS]) == [
        ("a", [A]),
        ("<bos>", [fake_model.BOS]),
        ("", [fake_model.EOS]),
    ]


def test_rows_are_ranked_by_their_mean_and_then_in_order() -> None:
    rows = []
    for values in ([-0.1, -0.9], [-0.3, -0.3, -0.3], [-0.6], [-0.5]):
        rows.append(new_row())
        for value in values:
            rows[-1].append(A, TokenLogprob(value, [], []))
    assert best_rows(rows, 2) == [rows[1], rows[0]]
    assert best_rows(rows, 4) == [rows[1], rows[0], rows[3], rows[2]]


def test_history_has_each_token_once_and_counts_generated_ones() -> None:
    history = History(np.array([3, 0, 3, 7], np.int32), 4)
    for token_id in (5, 3, 5, 9):
        history.add(token_id)
    assert history.ids.tolist() == [0, 3, 7, 5, 9]
    assert history.counts.tolist() == [0, 1, 0, 2, 1]
    assert history.ids.dtype == history.counts.dtype == np.int32
