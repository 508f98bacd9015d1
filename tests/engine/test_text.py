# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import codecs

from hypothesis import given
from hypothesis import strategies as st

import fake_model
from fullbeam.engine.text import TextStream, TokenLogprob, TokenNames, decode_bytes, prompt_offsets

TOKENIZER = fake_model.FakeTokenizer()


def complete_text(data: bytes) -> str:
    return codecs.getincrementaldecoder("utf-8")("replace").decode(data)


chunks = st.lists(st.sampled_from([b"a", b"b", b"ab", b"aab", "é".encode(), b"\xc3", b"\xa9", b""]))
stops = st.lists(st.text("abé", min_size=1, max_size=4), max_size=3, unique=True)


@given(chunks, stops)
def test_stop_strings_against_a_search_of_the_whole_text(
    chunks: list[bytes], stops: list[str]
) -> None:
    stream = TextStream(tuple(stops))
    shown, data = "", b""
    for chunk in chunks:
        matched = stream.push(chunk)
        data += chunk
        whole = complete_text(data)
        found = [(whole.find(stop), rank) for rank, stop in enumerate(stops) if stop in whole]
        shown += stream.take()
        if found:
            cut, rank = min(found)
            assert matched == stops[rank]
            assert shown == whole[:cut]
            assert stream.num_shown == cut
            return
        assert matched is None
        assert stream.num_chars == len(whole)
        tails = [k for s in stops for k in range(1, len(s)) if whole.endswith(s[:k])]
        assert shown == whole[: len(whole) - max(tails, default=0)]
    stream.finish()
    assert shown + stream.take() == data.decode("utf-8", "replace")


@given(st.text(), st.data())
def test_characters_appear_only_whole(text: str, data: st.DataObject) -> None:
    raw = text.encode("utf-8", "surrogatepass").decode("utf-8", "replace").encode()
    stream, shown, start = TextStream(), "", 0
    while start < len(raw):
        size = data.draw(st.integers(1, 3))
        stream.push(raw[start : start + size])
        start += size
        shown += stream.take()
        assert raw.decode().startswith(shown)
    stream.finish()
    assert shown + stream.take() == raw.decode()


def test_an_incomplete_character_at_the_end_is_replaced() -> None:
    stream = TextStream()
    stream.push(b"a\xe2\x82")
    assert stream.take() == "a"
    stream.finish()
    assert stream.take() == "\ufffd"


def test_text_that_may_become_a_stop_string_is_held_back() -> None:
    stream = TextStream(("abcd",))
    stream.push(b"xab")
    assert stream.take() == "x"
    stream.push(b"c")
    assert stream.take() == ""
    stream.push(b"e")
    assert stream.take() == "abce"


def test_the_earliest_match_counts_then_the_first_given() -> None:
    stream = TextStream(("cd", "bc", "bcd"))
    assert stream.push(b"abcd") == "bc"
    assert stream.take() == "a"


def test_a_stop_string_can_be_kept() -> None:
    stream = TextStream(("cd", "bc"), keep_stop=True)
    assert stream.push(b"ab") is None
    assert stream.push(b"cde") == "bc"
    assert stream.take() == "abc"
    assert stream.num_shown == 3


def test_stop_strings_are_not_looked_for_in_what_was_given() -> None:
    stream = TextStream(("ab", "c"), num_given=3)
    assert stream.push(b"aba") is None
    assert stream.take() == "aba"
    assert stream.push(b"b") is None  # "ab" would start in what was given
    assert stream.push(b"xab") == "ab"
    assert stream.take() == "bx"


def test_token_names() -> None:
    names = TokenNames(TOKENIZER)
    assert names[8] == "ab"
    assert names[fake_model.EOS] == "<eos>"
    assert names[16] == "bytes:\\xe2"


def test_top_logprobs_hold_the_chosen_token_and_the_larger_of_equal_names() -> None:
    names = TokenNames(TOKENIZER)
    entry = TokenLogprob(-3.0, [8, 2], [-0.5, -1.0])
    result = names.render([3, 2], [entry, None], [4, 5])
    assert result.tokens == ["b", "a"]
    assert result.top_logprobs == [{"ab": -0.5, "a": -1.0, "b": -3.0}, None]
    assert result.token_logprobs == [-3.0, None]
    assert result.text_offset == [4, 5]
    same = names.render([2], [TokenLogprob(-2.0, [2], [-1.0])], [0])
    assert same.top_logprobs == [{"a": -1.0}]


def test_prompt_offsets_count_characters() -> None:
    ids = TOKENIZER.encode("é日ab")
    assert prompt_offsets(TOKENIZER, ids, "é日ab") == [0, 0, 1, 2]
    assert prompt_offsets(TOKENIZER, [14, 15, 2], "éa") == [0, 0, 1]


def test_prompt_offsets_leave_out_a_space_that_the_tokenizer_added() -> None:
    assert prompt_offsets(TOKENIZER, [12, 3], "ab") == [0, 1]


def test_prompt_offsets_count_from_the_start_of_a_text_whose_end_was_kept() -> None:
    assert prompt_offsets(TOKENIZER, [fake_model.BOS, 10, 5], "xx\nabcd") == [3, 3, 6]


def test_decode_bytes_joins_before_decoding() -> None:
    assert decode_bytes(TOKENIZER, [0, 16, 17, 18, 1]) == "€"
