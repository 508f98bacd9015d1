# SPDX-License-Identifier: Apache-2.0
"""What a GGUF file says about its tokens: texts, kinds, which of them start or end a text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fullbeam.models.gguf import GgufFile, GgufStrings

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

# Texts that end a generation wherever a vocabulary has them as anything but ordinary words.
_END_TEXTS = (
    "<|endoftext|>",
    "<|im_end|>",
    "<|end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end_of_text|>",
    "<end_of_turn>",
    "<end_of_utterance>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
    "<|return|>",
    "<|call|>",
    "<|calls|>",
    "<|flush|>",
    "<EOT>",
    "_<EOT>",
    "\u2581<EOT>",
    "[EOT]",
    "[EOS]",
    "[e~[",
)
# These are HTML to some vocabularies: they count only where the file calls them control tokens.
_END_TEXTS_IF_CONTROL = ("</s>", "<eos>")

_INFILL_KEYS = {
    "prefix": ("fim_pre_token_id", "prefix_token_id"),
    "suffix": ("fim_suf_token_id", "suffix_token_id"),
    "middle": ("fim_mid_token_id", "middle_token_id"),
    "pad": ("fim_pad_token_id",),
    "repository": ("fim_rep_token_id",),
    "file": ("fim_sep_token_id",),
}
_INFILL_TEXTS = {
    "prefix": (
        "<|fim_prefix|>",
        "<fim-prefix>",
        "<fim_prefix>",
        "<\uff5cfim\u2581begin\uff5c>",
        "<PRE>",
        "\u2581<PRE>",
        "<|code_prefix|>",
        "<|prefix|>",
        "<[fim-prefix]>",
    ),
    "suffix": (
        "<|fim_suffix|>",
        "<fim-suffix>",
        "<fim_suffix>",
        "<\uff5cfim\u2581hole\uff5c>",
        "<SUF>",
        "\u2581<SUF>",
        "<|code_suffix|>",
        "<|suffix|>",
        "<[fim-suffix]>",
    ),
    "middle": (
        "<|fim_middle|>",
        "<fim-middle>",
        "<fim_middle>",
        "<\uff5cfim\u2581end\uff5c>",
        "<MID>",
        "\u2581<MID>",
        "<|code_middle|>",
        "<|middle|>",
        "<[fim-middle]>",
    ),
    "pad": ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
    "repository": ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
    "file": ("<|file_sep|>", "<file_sep>", "<|file_separator|>"),
}
# Names of tokenizer.ggml.pre whose models were trained with the suffix before the prefix.
_SUFFIX_FIRST = ("mellum", "seed-coder")
# Qwen2.5-Coder was trained to infill with the suffix last, but what its instruction tuning left of
# that is worse than no suffix: of 149 removed lines of the standard library the 0.5B model restores
# 22 so, 37 without the suffix, and 49 with the prefix last (`python -m benchmarks infill` gives the
# last two), the other order of Bavarian et al. 2022, arXiv 2207.14255. There, typing leaves the
# start of the prompt as it is, too.
_NO_TOKEN = 0xFFFFFFFF  # what some writers put for "none"


@dataclass(frozen=True, slots=True)
class InfillTokens:
    """Token ids that a model trained to fill in the middle expects; None where it has no such."""

    prefix: int
    suffix: int
    middle: int
    pad: int | None = None
    repository: int | None = None
    file: int | None = None
    suffix_first: bool = False
    prefix_last: bool = False

    @property
    def end_ids(self) -> frozenset[int]:
        """Tokens that can only mean that the middle is over."""
        ids = self.prefix, self.suffix, self.middle, self.pad, self.repository, self.file
        return frozenset(token_id for token_id in ids if token_id is not None)

    def arrange(self, before: Sequence[int], after: Sequence[int]) -> list[int]:
        """Put the tokens before and after a gap into the order that the model knows."""
        if self.prefix_last:
            return [self.prefix, self.suffix, *after, self.middle, *before]
        if self.suffix_first:
            return [self.suffix, *after, self.prefix, *before, self.middle]
        return [self.prefix, *before, self.suffix, *after, self.middle]


@dataclass(frozen=True, slots=True, eq=False)
class Vocabulary:
    """The tokens of a file.

    `texts` has one entry per id, all different, and `ids` is its inverse; `kinds` is uint8
    [vocab_size], of this module's constants; `scores` is float32 [vocab_size].
    """

    texts: list[str]
    ids: dict[str, int]
    kinds: npt.NDArray[np.uint8]
    scores: npt.NDArray[np.float32] | None
    bos_id: int | None
    eos_ids: frozenset[int]
    infill: InfillTokens | None

    def forget_texts(self) -> None:
        """Empty `texts` and `ids`, the large part."""
        self.texts.clear()
        self.ids.clear()


def read_vocabulary(file: GgufFile) -> Vocabulary:
    """Read and check the vocabulary of a file.

    Raises
    ------
    ValueError
        Where it is absent or inconsistent; the text names the file and the key.
    """
    texts, ids = _read_texts(file)
    kinds = _read_kinds(file, len(texts))
    scores = _read_scores(file, len(texts))
    is_llama = file.get("tokenizer.ggml.model", str) == "llama"
    special = find_special(
        ids.get,
        kinds,
        lambda key: _read_id(file, key, len(texts)),
        suffix_first=file.get("tokenizer.ggml.pre", str, "") in _SUFFIX_FIRST,
        prefix_last=is_prefix_last(
            file.get("general.architecture", str, ""), file.get("general.name", str, "")
        ),
    )
    bos, ends = special.bos_id, special.eos_ids
    if is_llama and _read_id(file, "eos_token_id", len(texts)) is None and len(texts) > 2:
        ends |= {2}
    if bos is None and is_llama and len(texts) > 1:
        bos = 1
    kinds[list(ends)] = CONTROL
    return Vocabulary(texts, ids, kinds, scores, bos, ends, special.infill)


@dataclass(frozen=True, slots=True)
class SpecialTokens:
    """What a vocabulary's special tokens are for."""

    bos_id: int | None
    eos_ids: frozenset[int]
    infill: InfillTokens | None


def find_special(
    id_of: Callable[[str], int | None],
    kinds: npt.NDArray[np.uint8],
    given: Callable[[str], int | None],
    *,
    suffix_first: bool = False,
    prefix_last: bool = False,
) -> SpecialTokens:
    """Find the special tokens by what a model says of them, else by their texts.

    Parameters
    ----------
    id_of
        The token of a text.
    kinds
        uint8 [vocab_size]; those found become CONTROL.
    given
        The token that a model names by one of GGUF's keys, such as `eos_token_id`.
    suffix_first, prefix_last
        As in `InfillTokens`.
    """
    marks = (UNKNOWN, CONTROL, USER_DEFINED)

    def find(candidates: Iterable[str], allowed: Iterable[int]) -> list[int]:
        wanted = {text: None for text in candidates}
        return [i for text in wanted if (i := id_of(text)) is not None and kinds[i] in allowed]

    def special(keys: Iterable[str], candidates: Iterable[str] = ()) -> int | None:
        for key in keys:
            if (token_id := given(key)) is not None:
                return token_id
        return next(iter(find(candidates, marks)), None)

    roles = {role: special(keys, _INFILL_TEXTS[role]) for role, keys in _INFILL_KEYS.items()}
    prefix, suffix, middle = roles["prefix"], roles["suffix"], roles["middle"]
    infill = None
    if prefix is not None and suffix is not None and middle is not None:
        infill = InfillTokens(
            prefix,
            suffix,
            middle,
            roles["pad"],
            roles["repository"],
            roles["file"],
            suffix_first=suffix_first,
            prefix_last=prefix_last,
        )
    texts = {i: text for text in _END_TEXTS for i in find((text,), marks)}
    ends = set(texts) | set(find(_END_TEXTS_IF_CONTROL, (CONTROL,)))
    ends |= {i for role in ("pad", "repository", "file") if (i := roles[role]) is not None}
    named = (given(key) for key in ("eos_token_id", "eot_token_id", "eom_token_id"))
    ends |= {i for i in named if i is not None}
    ends -= _not_ends(texts, ends)
    kinds[[i for i in (*ends, *roles.values()) if i is not None]] = CONTROL
    return SpecialTokens(given("bos_token_id"), frozenset(ends), infill)


def is_prefix_last(arch: str, name: str) -> bool:
    """Whether a model infills best with the prefix behind the suffix: see above."""
    return arch == "qwen2" and "instruct" in name.lower()


def _not_ends(texts: Mapping[int, str], ends: set[int]) -> set[int]:
    """In formats with channels `<|end|>` closes a message, not the text."""
    have = {texts[i]: i for i in ends if i in texts}
    calls = "<|call|>" in have or "<|calls|>" in have
    if "<|end|>" in have and calls and ("<|return|>" in have or "<|flush|>" in have):
        return {have["<|end|>"]}
    return set()


def _read_texts(file: GgufFile) -> tuple[list[str], dict[str, int]]:
    key = "tokenizer.ggml.tokens"
    texts = list(file.get(key, GgufStrings))
    if not texts:
        raise ValueError(f"{file.path}: {key} must have at least one token, got none")
    if "" in texts:
        texts = [text or f"[EMPTY_{i}]" for i, text in enumerate(texts)]
    ids = dict(zip(texts, range(len(texts)), strict=True))
    if len(ids) != len(texts):
        twice = next(text for i, text in enumerate(texts) if ids[text] != i)
        raise ValueError(f"{file.path}: {key} must be distinct, got {twice!r} twice")
    return texts, ids


def _read_kinds(file: GgufFile, vocab_size: int) -> npt.NDArray[np.uint8]:
    key = "tokenizer.ggml.token_type"
    kinds = file.get(key, np.ndarray, None)
    if kinds is None:
        return np.full(vocab_size, NORMAL, np.uint8)
    if len(kinds) != vocab_size or kinds.dtype.kind not in "iu":
        raise ValueError(
            f"{file.path}: {key} must be {vocab_size} integers, got {len(kinds)} of {kinds.dtype}"
        )
    if kinds.min() < 0 or kinds.max() > BYTE:
        raise ValueError(
            f"{file.path}: {key} must be in 0..{BYTE}, got {kinds.min()}..{kinds.max()}"
        )
    return np.where(kinds == 0, UNUSED, kinds).astype(np.uint8)


def _read_scores(file: GgufFile, vocab_size: int) -> npt.NDArray[np.float32] | None:
    key = "tokenizer.ggml.scores"
    scores = file.get(key, np.ndarray, None)
    if scores is None:
        return None
    if len(scores) != vocab_size or scores.dtype.kind not in "if":
        raise ValueError(
            f"{file.path}: {key} must be {vocab_size} numbers, got {len(scores)} of {scores.dtype}"
        )
    if not np.isfinite(scores).all():
        raise ValueError(f"{file.path}: {key} must be finite, got other values")
    return scores.astype(np.float32)


def _read_id(file: GgufFile, name: str, vocab_size: int) -> int | None:
    key = f"tokenizer.ggml.{name}"
    token_id = file.get(key, int, None)
    if token_id is None or token_id in (-1, _NO_TOKEN):
        return None
    if not 0 <= token_id < vocab_size:
        raise ValueError(f"{file.path}: {key} must be in 0..{vocab_size - 1}, got {token_id}")
    return token_id
