# SPDX-License-Identifier: Apache-2.0
"""A prompt as given to the token ids that the model starts from."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from fullbeam.checks import shown
from fullbeam.engine.batch import Int32Array
from fullbeam.engine.rules import TokenIndex
from fullbeam.engine.text import Tokenizer

_TAIL = 512  # characters that healing looks at: more than any token or name of one has


def encode_prompt(
    tokenizer: Tokenizer,
    vocab_size: int,
    prompt: str | Sequence[int] | None,
    *,
    add_special_tokens: bool = True,
    max_tokens: int | None = None,
    whole_lines: bool = True,
) -> Int32Array:
    """Return a prompt's token ids, checked; "" and None give the start of a document.

    Parameters
    ----------
    tokenizer, vocab_size
        Of the model.
    prompt
        Text, or token ids that are taken as they are.
    add_special_tokens
        Put the start token before a text, if the model wants one.
    max_tokens
        Most tokens to keep, >= 1, from the end, the start token of a text included. None: all.
    whole_lines
        Keep a text from the start of a line if possible (see `crop_start`).

    Raises
    ------
    TypeError
        For something that is no token id.
    ValueError
        For an empty list, or ids outside the vocabulary.
    """
    if prompt is None or isinstance(prompt, str):
        text = prompt or ""
        if max_tokens is None:
            ids = tokenizer.encode(text, add_special_tokens=add_special_tokens)
        else:
            head = tokenizer.encode("")[:max_tokens] if add_special_tokens else []
            room = max_tokens - len(head)
            start = crop_start(text, room, _counter(tokenizer)) if whole_lines else 0
            ids = [*head, *_last(tokenizer.encode(text[start:], add_special_tokens=False), room)]
        return np.array(ids or _document_start(tokenizer), np.int32)
    if len(prompt) == 0:
        raise ValueError("complete: prompt must be text or at least one token id, got []")
    return np.array(_last(_checked(prompt, vocab_size), max_tokens), np.int32)


def encode_infill(
    tokenizer: Tokenizer,
    vocab_size: int,
    prompt: str | Sequence[int] | None,
    suffix: str,
    *,
    add_special_tokens: bool = True,
    max_tokens: int | None = None,
    whole_lines: bool = True,
) -> Int32Array:
    """Return the ids of a prompt with a gap after it, in the order that the model was trained on.

    The middle ends with one of the model's end tokens or of its infill tokens,
    `tokenizer.infill.end_ids`. Control tokens written in the texts are text here, unlike in other
    prompts: they would move the gap.

    Parameters
    ----------
    tokenizer, vocab_size, add_special_tokens, whole_lines
        As for `encode_prompt`.
    prompt
        What comes before the gap, text or token ids; a start token at its front stays in front.
    suffix
        What comes after the gap.
    max_tokens
        Most tokens to keep of everything. Where that is too few, the start of the suffix gets up
        to a quarter, the end of the prompt the rest. None: all.

    Raises
    ------
    TypeError
        For something that is no token id.
    ValueError
        For a model without infill tokens, ids outside the vocabulary, or no room for any text.
    """
    infill = tokenizer.infill
    if infill is None:
        raise ValueError("complete: suffix must be left out: the model has no infill tokens")
    text: str | None = None
    head: list[int] = []
    if prompt is None or isinstance(prompt, str):
        text = prompt or ""
        if add_special_tokens:
            head = tokenizer.encode("")
    else:
        ids = _checked(prompt, vocab_size)
        if ids[:1] == [tokenizer.bos_id]:
            head, ids = ids[:1], ids[1:]
    after = _encode_after(tokenizer, suffix)
    room = None
    if max_tokens is not None:
        room = max_tokens - len(head) - len(infill.arrange([], []))
        if room < 1:
            raise ValueError(
                f"complete: context_len must leave room for a token beside {max_tokens - room} "
                f"control tokens, got {max_tokens}"
            )
    if text is not None:
        start = 0
        if room is not None and whole_lines:  # a long text is not encoded whole
            start = crop_start(text, max(0, room - len(after)), _counter(tokenizer))
            if start > 0:
                after = after[: room // 4]
                start = crop_start(text, room - len(after), _counter(tokenizer))
        ids = tokenizer.encode(text[start:], add_special_tokens=False, parse_special=False)
    if room is not None and len(ids) + len(after) > room:
        after = after[: room // 4]
        ids = _last(ids, room - len(after))
    return np.array([*head, *infill.arrange(ids, after)], np.int32)


def heal(prompt: str, prefix: str, index: TokenIndex) -> tuple[str, bytes]:
    """Split a prompt where the model can choose its own tokens for what follows.

    The end of a prompt is often the beginning of a longer token, which the model would have
    chosen had it known the rest. So that end is taken off, and the text held to start with it.

    Parameters
    ----------
    prompt
        Text before what the user is typing. Its last control token stays, with all before it.
    prefix
        What the user has typed of a word.

    Returns
    -------
    context
        Text to give to the model.
    constraint
        Bytes that its continuation has to start with; `prefix` is at their end.
    """
    typed = prefix.encode("utf-8", "surrogatepass")
    tail = _behind_control_tokens(index, prompt[-_TAIL:]).encode("utf-8", "surrogatepass")
    num_healed = max(0, index.healed_len(tail + typed) - len(typed))
    healed = tail[len(tail) - num_healed :]
    num_chars = len(healed.decode("utf-8", "surrogatepass"))
    return prompt[: len(prompt) - num_chars], healed + typed


def crop_start(text: str, max_tokens: int, count: Callable[[str], int]) -> int:
    """Return where to start a text so that what remains has about `max_tokens` tokens at most.

    It is the start of a line behind a mark that stands every max_tokens / 2 characters, counted
    from the start of the text. So while the user types at the end, the start stays where it is
    until the budget forces it to the next mark, and the computed prompt can be used again. Lines
    are counted one by one, and the last one as at least 64 tokens or an eighth of the budget:
    typing in it changes nothing. Where the next mark would leave less than half of what fits
    (lines are long, or tokens have hardly more than a character), it is the first line that fits.

    It is 0 where the whole text fits, and the last line's start where that alone is too long: then
    the caller has to cut.

    Parameters
    ----------
    text
        The whole text: marks are counted from its start.
    max_tokens
        The budget, >= 0.
    count
        Number of tokens of a text.
    """
    reserve = min(64, max_tokens // 8)
    start = first = text.rfind("\n") + 1  # of the lines counted so far; of those that fit
    total = max(count(text[start:]), reserve)
    enough = max_tokens + max_tokens // 8 + reserve  # counted line by line, too much in any case
    while start > 0 and total <= enough:
        end, start = start, text.rfind("\n", 0, start - 1) + 1
        total += count(text[start:end])
        if total <= max_tokens:
            first = start
    if first == 0 or (total <= enough and count(text) <= max_tokens):
        return 0
    step = max(1, max_tokens // 2)
    mark = first - first % step
    if text.find("\n", max(0, mark - 1), first - 1) >= 0 or mark == 0:
        mark += step  # its line is gone
    start = text.find("\n", mark - 1) + 1
    return start if first <= start <= (first + len(text)) // 2 else first


def _encode_after(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return the ids of a text that follows another: without the space that some tokenizers put
    in front of what they encode."""
    ids = tokenizer.encode(text, add_special_tokens=False, parse_special=False)
    if b"".join(map(tokenizer.token_bytes, ids)) != b" " + text.encode():
        return ids
    mark = "\u263a"  # merges with nothing
    skip = len(tokenizer.encode(mark, add_special_tokens=False))
    return tokenizer.encode(mark + text, add_special_tokens=False, parse_special=False)[skip:]


def _behind_control_tokens(index: TokenIndex, text: str) -> str:
    """Return the end of a text in which no control token is written."""
    tokenizer = index.tokenizer
    ids = tokenizer.encode(text, add_special_tokens=False)
    for idx in reversed(range(len(ids))):
        if not index.token_bytes(ids[idx]):
            after = b"".join(map(index.token_bytes, ids[idx + 1 :])).decode("utf-8", "replace")
            return after if text.endswith(after) else after[1:]  # a space that was put in front
    return text


def _counter(tokenizer: Tokenizer) -> Callable[[str], int]:
    return lambda text: len(tokenizer.encode(text, add_special_tokens=False))


def _last(ids: list[int], count: int | None) -> list[int]:
    return ids if count is None else ids[max(0, len(ids) - count) :]


def _checked(ids: Sequence[int], vocab_size: int) -> list[int]:
    for idx, token_id in enumerate(ids):
        if isinstance(token_id, bool) or not isinstance(token_id, (int, np.integer)):
            kind = type(token_id).__name__
            raise TypeError(f"complete: prompt[{idx}] must be a token id, got {kind}")
        if not 0 <= token_id < vocab_size:
            bound, got = vocab_size - 1, shown(int(token_id))
            raise ValueError(f"complete: prompt[{idx}] must be in 0..{bound}, got {got}")
    return [int(token_id) for token_id in ids]


def _document_start(tokenizer: Tokenizer) -> list[int]:
    if tokenizer.bos_id is not None:
        return [tokenizer.bos_id]
    if tokenizer.eos_ids:
        return [min(tokenizer.eos_ids)]
    raise ValueError("complete: prompt must not be empty: the model has no start token")
