# SPDX-License-Identifier: Apache-2.0
"""Text to token ids and back, from the vocabulary inside a GGUF file."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, overload

import numpy as np

from fullbeam.models.catalog import cache_folder
from fullbeam.models.gguf import GgufFile, GgufStrings
from fullbeam.models.pretokenizers import PRETOKENIZERS, Pretokenizer
from fullbeam.models.sentencepiece import cached_merges
from fullbeam.models.vocabulary import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    InfillTokens,
    Vocabulary,
    read_vocabulary,
)

if TYPE_CHECKING:
    import tokenizers

_SPACE = "\u2581"


class Tokenizer:
    """A model's tokenizer.

    `bos_id` starts a text, `eos_ids` are all the tokens that end one, `add_bos` says whether text
    is encoded with the former in front. `infill` holds the tokens to fill in the middle with, None
    for a model without. `backend` is the `tokenizers` object that does the work.

    The text of ids is the concatenation of `token_bytes`: where a vocabulary puts a space before
    the first word, the space is there.
    """

    vocab_size: int
    bos_id: int | None
    eos_ids: frozenset[int]
    add_bos: bool
    infill: InfillTokens | None
    backend: tokenizers.Tokenizer

    def __init__(
        self,
        vocabulary: Vocabulary,
        backend: tokenizers.Tokenizer,
        *,
        add_bos: bool,
        byte_level: bool,
    ) -> None:
        self.vocab_size = len(vocabulary.kinds)
        self.bos_id = vocabulary.bos_id
        self.eos_ids = vocabulary.eos_ids
        self.add_bos = add_bos
        self.infill = vocabulary.infill
        self.backend = backend
        self._literal: tokenizers.Tokenizer | None = None
        self._kinds = vocabulary.kinds.tobytes()
        self._byte_of_char = _byte_of_char() if byte_level else None
        self._token_bytes: dict[int, bytes] = {}

    @classmethod
    def from_gguf(cls, file: GgufFile) -> Tokenizer:
        """Build the tokenizer that a file describes.

        Parameters
        ----------
        file
            An open file; it may be closed afterwards.

        Raises
        ------
        ValueError
            Where the vocabulary is absent, inconsistent, or of a kind that is not supported.
        """
        # Modules made among the vocabulary's texts would keep the memory of those from going.
        import tokenizers  # noqa: F401

        kind = file.get("tokenizer.ggml.model", str)
        if kind not in ("gpt2", "llama"):
            raise ValueError(
                f"{file.path}: tokenizer.ggml.model must be 'gpt2' or 'llama', got {kind!r}"
            )
        vocabulary = read_vocabulary(file)
        added = _added_tokens(file, vocabulary)
        if kind == "gpt2":
            row = _pretokenizer(file)
            backend = _byte_level_backend(file, vocabulary, row)
            default_bos = row.add_bos
        else:
            backend = _sentencepiece_backend(file, vocabulary)
            default_bos = True
        backend.add_tokens(added)
        add_bos = file.get("tokenizer.ggml.add_bos_token", bool, None)
        if add_bos and vocabulary.bos_id is None:
            raise ValueError(
                f"{file.path}: metadata must have tokenizer.ggml.bos_token_id, which is absent"
            )
        add_bos = default_bos if add_bos is None else add_bos
        return cls(
            vocabulary,
            backend,
            add_bos=add_bos and vocabulary.bos_id is not None,
            byte_level=kind == "gpt2",
        )

    def encode(
        self, text: str, *, add_special_tokens: bool = True, parse_special: bool = True
    ) -> list[int]:
        """Return the token ids of a text.

        Parameters
        ----------
        text
            Any text; "" gives no ids of its own.
        add_special_tokens
            Put the start token in front, if the model wants one.
        parse_special
            Control tokens written in the text (`<|im_end|>`) become those tokens; otherwise they
            are text like any other. User-defined tokens are always recognised.

        Raises
        ------
        ValueError
            Where the text has a lone surrogate, which no encoding of text has.
        """
        if not isinstance(text, str):
            raise TypeError(f"encode: text must be str, got {type(text).__name__}")
        backend = self.backend if parse_special else self._literal_backend()
        try:
            # Unlike `encode`, it lets other threads run, and does not note where tokens lie.
            found = backend.encode_batch_fast([text], add_special_tokens=False)
            ids: list[int] = found[0].ids
        except (UnicodeError, TypeError) as error:
            start = _first_surrogate(text)
            if start is None:
                raise
            raise ValueError(
                f"encode: text must be valid Unicode, got a lone surrogate at {start}"
            ) from error
        if add_special_tokens and self.add_bos and self.bos_id is not None:
            return [self.bos_id, *ids]
        return ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of token ids; bytes that are no UTF-8 become U+FFFD.

        Parameters
        ----------
        ids
            Token ids, each in 0..vocab_size - 1.
        skip_special_tokens
            Leave control tokens out; otherwise they appear by their names.
        """
        parts = [
            self._text(token_id).encode()
            if not skip_special_tokens and self.is_special(token_id)
            else self.token_bytes(token_id)
            for token_id in ids
        ]
        return b"".join(parts).decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        """Return the exact bytes that a token stands for, b"" for control and unused tokens."""
        found = self._token_bytes.get(token_id)
        if found is None:
            kind = self._kind(token_id)
            found = self._token_bytes[token_id] = self._bytes_of_text(self._text(token_id), kind)
        return found

    def all_token_bytes(self) -> list[bytes]:
        """Return the bytes of every token, as `token_bytes` does of one."""
        names = [self._text(token_id) for token_id in range(self.vocab_size)]
        others: Iterable[int] = range(self.vocab_size)
        texts = [b""] * self.vocab_size
        if self._byte_of_char is None and not any("\0" in name for name in names):
            # All at once: a third of the time for Gemma's 262144 tokens.
            texts = "\0".join(names).replace(_SPACE, " ").encode().split(b"\0")
            others = np.flatnonzero(np.frombuffer(self._kinds, np.uint8) != NORMAL).tolist()
        for token_id in others:
            texts[token_id] = self._bytes_of_text(names[token_id], self._kinds[token_id])
        return texts

    def is_special(self, token_id: int) -> bool:
        """Whether a token is a control token (or stands for the unknown), so has no text."""
        return self._kind(token_id) in (CONTROL, UNKNOWN)

    def _bytes_of_text(self, text: str, kind: int) -> bytes:
        if kind in (CONTROL, UNKNOWN, UNUSED):
            return b""
        if kind == BYTE:
            return bytes((int(text[3:5], 16),))
        if kind == USER_DEFINED:
            return text.encode()
        if self._byte_of_char is None:
            return text.replace(_SPACE, " ").encode()
        table = self._byte_of_char
        try:
            return bytes([table[char] for char in text])
        except KeyError:
            return b"".join(bytes((table[c],)) if c in table else c.encode() for c in text)

    def _kind(self, token_id: int) -> int:
        if not 0 <= token_id < self.vocab_size:
            raise ValueError(
                f"tokenizer: token_id must be in 0..{self.vocab_size - 1}, got {token_id}"
            )
        return self._kinds[token_id]

    def _text(self, token_id: int) -> str:
        return self.backend.id_to_token(token_id) or ""

    def _literal_backend(self) -> tokenizers.Tokenizer:
        """The same model (shared, not copied), for which control tokens are ordinary text."""
        if self._literal is None:
            import tokenizers

            literal = tokenizers.Tokenizer(self.backend.model)
            if self.backend.normalizer is not None:
                literal.normalizer = self.backend.normalizer
            if self.backend.pre_tokenizer is not None:
                literal.pre_tokenizer = self.backend.pre_tokenizer
            known = self.backend.get_added_tokens_decoder()
            # All of them, in order: those outside the model's vocabulary get their ids by that.
            literal.add_tokens([known[i] for i in sorted(known)])
            literal.add_special_tokens([known[i] for i in sorted(known) if self.is_special(i)])
            literal.encode_special_tokens = True
            self._literal = literal
        return self._literal


class _Pairs(Sequence[tuple[str, str]]):
    """A vocabulary's merges, made one by one as the backend takes them.

    It takes them last: then the vocabulary's own copy of its texts goes, before the backend builds
    its tables, which for 262144 tokens keeps the peak of memory 40 MB lower.
    """

    def __init__(
        self, vocabulary: Vocabulary, count: int, pairs: Callable[[], Iterator[tuple[str, str]]]
    ) -> None:
        self._vocabulary = vocabulary
        self._count = count
        self._pairs = pairs

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[tuple[str, str]]:
        return chain(self._pairs(), self._forget_texts())

    @overload
    def __getitem__(self, index: int) -> tuple[str, str]: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[tuple[str, str]]: ...

    def __getitem__(self, index: int | slice) -> tuple[str, str] | Sequence[tuple[str, str]]:
        return list(self._pairs())[index]

    def _forget_texts(self) -> Iterator[tuple[str, str]]:
        self._vocabulary.forget_texts()
        yield from ()


def _pretokenizer(file: GgufFile) -> Pretokenizer:
    name = file.get("tokenizer.ggml.pre", str, "default")
    if name not in PRETOKENIZERS:
        raise ValueError(
            f"{file.path}: tokenizer.ggml.pre must be one of {', '.join(sorted(PRETOKENIZERS))}, "
            f"got {name!r}"
        )
    return PRETOKENIZERS[name]


def _byte_level_backend(
    file: GgufFile, vocabulary: Vocabulary, row: Pretokenizer
) -> tokenizers.Tokenizer:
    import tokenizers
    from tokenizers import models, pre_tokenizers

    merges = file.get("tokenizer.ggml.merges", GgufStrings)

    def pairs() -> Iterator[tuple[str, str]]:
        for index, merge in enumerate(merges):
            cut = merge.find(" ", 1)
            if cut < 0:
                raise ValueError(
                    f"{file.path}: tokenizer.ggml.merges[{index}] must be two tokens with a space "
                    f"between, got {merge!r}"
                )
            yield merge[:cut], merge[cut + 1 :]

    try:
        model = models.BPE(
            vocabulary.ids, _Pairs(vocabulary, len(merges), pairs), ignore_merges=row.ignore_merges
        )
    except ValueError:
        raise
    except Exception as error:  # the backend has no narrower kind
        raise ValueError(
            f"{file.path}: tokenizer.ggml.merges must fit the tokens: {error}"
        ) from error
    backend = tokenizers.Tokenizer(model)
    splits = [
        pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated") for pattern in row.patterns
    ]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
    return backend


def _sentencepiece_backend(file: GgufFile, vocabulary: Vocabulary) -> tokenizers.Tokenizer:
    import tokenizers
    from tokenizers import models, normalizers

    texts, kinds = vocabulary.texts, vocabulary.kinds
    if vocabulary.scores is None:
        raise ValueError(f"{file.path}: metadata must have tokenizer.ggml.scores, which is absent")
    for token_id in np.flatnonzero(kinds == BYTE).tolist():
        if texts[token_id] not in _BYTE_TEXTS:
            raise ValueError(
                f"{file.path}: tokenizer.ggml.tokens[{token_id}] must be <0x00> to <0xFF> as a "
                f"byte token, got {texts[token_id]!r}"
            )
    mergeable = (kinds == NORMAL) | (kinds == UNUSED)
    merges = cached_merges(cache_folder() / "tokenizers", texts, vocabulary.scores, mergeable)

    def pairs() -> Iterator[tuple[str, str]]:
        stretches = (
            merges[start : start + 4096].T.tolist() for start in range(0, len(merges), 4096)
        )
        find = texts.__getitem__
        return chain.from_iterable(
            zip(map(find, left), map(find, right), strict=True) for left, right in stretches
        )

    unknown = file.get("tokenizer.ggml.unknown_token_id", int, 0)
    unknown_text = texts[unknown] if 0 <= unknown < len(texts) else None
    model = models.BPE(
        vocabulary.ids,
        _Pairs(vocabulary, len(merges), pairs),
        byte_fallback=True,
        unk_token=unknown_text,
    )
    backend = tokenizers.Tokenizer(model)
    steps: list[normalizers.Normalizer] = [normalizers.Replace(" ", _SPACE)]
    if file.get("tokenizer.ggml.add_space_prefix", bool, True):
        steps.insert(0, normalizers.Prepend(_SPACE))
    backend.normalizer = normalizers.Sequence(steps)
    return backend


def _added_tokens(file: GgufFile, vocabulary: Vocabulary) -> list[tokenizers.AddedToken]:
    """Tokens that are found in the text before it is cut and merged."""
    from tokenizers import AddedToken

    strips = _strips_after_special(file)
    whole = np.isin(vocabulary.kinds, (CONTROL, UNKNOWN, USER_DEFINED))
    return [
        AddedToken(
            text := vocabulary.texts[token_id],
            special=bool(vocabulary.kinds[token_id] != USER_DEFINED),
            normalized=False,
            rstrip=strips(text),
        )
        for token_id in np.flatnonzero(whole).tolist()
    ]


def _strips_after_special(file: GgufFile) -> Callable[[str], bool]:
    """Phi-3 drops the spaces after its special tokens; no other family does, no key says so."""
    name = file.get("general.name", str, "").lower()
    if "phi-3" not in name and "phi3" not in name:
        return lambda _: False
    return lambda text: text not in ("<unk>", "<s>", "<|endoftext|>")


def _first_surrogate(text: str) -> int | None:
    return next((i for i, char in enumerate(text) if "\ud800" <= char <= "\udfff"), None)


def _byte_of_char() -> Mapping[str, int]:
    """Byte-level BPE writes each byte as a character: itself where printable, else from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTE_TEXTS = frozenset(f"<0x{byte:02X}>" for byte in range(256))
