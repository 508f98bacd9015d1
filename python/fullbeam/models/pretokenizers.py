# SPDX-License-Identifier: Apache-2.0
"""How each byte-level BPE family cuts text into words before it merges.

`tokenizer.ggml.pre` in a GGUF file names a row of `PRETOKENIZERS`. A row's patterns are applied in
order, each to the pieces that the one before left; matches and the gaps between them both become
pieces. They are the patterns that the models' authors published, in Oniguruma's syntax.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Pretokenizer:
    """One family's rules."""

    patterns: tuple[str, ...]
    ignore_merges: bool = False
    """Whether a word that is a token is taken whole, whatever its merges."""
    add_bos: bool = False
    """Whether texts start with the start token where the file says nothing about it."""


_ENGLISH = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_BREAKS = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def _modern(digits: str) -> str:
    word = r"[^\r\n\p{L}\p{N}]?\p{L}+"
    return rf"{_ENGLISH}|{word}|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_BREAKS}"


def _cased(digits: str, suffix: str) -> str:
    lead = r"[^\r\n\p{L}\p{N}]?"
    words = f"{lead}{_UPPER}*{_LOWER}+{suffix}|{lead}{_UPPER}+{_LOWER}*{suffix}"
    return rf"{words}|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_BREAKS}"


_DEEPSEEK_PUNCTUATION = r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""
_DEEPSEEK_V3 = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    _DEEPSEEK_PUNCTUATION
    + r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|"
    + _BREAKS,
)
# DeepSeek LLM lists its letters one by one; they come to the cased letters without these.
_DEEPSEEK_OTHERS = (
    "\u0560-\u0588\u10c7\u10cd\u10d0-\u10ff\u1c80-\u1c8a\u2d00-\u2d2d\ua790-\ua7fa\uab30-\uab68"
    "\U00010570-\U000105bc\U00016e40-\U00016e7f\U0001d400-\U0001d7cb\U0001df00-\U0001dfff"
)
_DEEPSEEK_LETTERS = rf"[\p{{Lu}}\p{{Ll}}\p{{Lt}}&&[^{_DEEPSEEK_OTHERS}]]"
_DEEPSEEK_CJK = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_DEEPSEEK_LLM = (
    r"[\r\n]",
    rf"\s?{_DEEPSEEK_LETTERS}+",
    "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
    r"\s+$",
    _DEEPSEEK_CJK,
    r"\p{N}+",
)
_DEEPSEEK_CODER = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _DEEPSEEK_CJK, r"\p{N}")

_SYMBOLS = r"\p{P}$+<=>^~|"
_SENTENCES = " ?[^(\\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+"
_QWEN35 = (
    rf"{_ENGLISH}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}|"
    rf" ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_BREAKS}"
)
_SEED_CODER = (
    rf"{_ENGLISH}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_BREAKS}"
)
_BAILING = (
    r"'(?:[sSdDmMtT]|[lL][lL]|[vV][eE]|[rR][eE])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)

_FAMILIES: tuple[tuple[Pretokenizer, str], ...] = (
    (Pretokenizer((rf"[{_SYMBOLS}]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")), "default"),
    (
        Pretokenizer((_GPT2,)),
        "gpt-2 phi-2 mpt olmo jais trillion gigachat mellum a.x-4.0 exaone4 granite-docling",
    ),
    (
        Pretokenizer((r"\p{N}", _GPT2)),
        "starcoder refact command-r smollm codeshell exaone minerva-7b mellum2",
    ),
    (Pretokenizer((rf"[{_SYMBOLS}`]+", _GPT2, "[0-9][0-9][0-9]")), "falcon"),
    (
        Pretokenizer((_modern(r"\p{N}{1,3}"),), ignore_merges=True, add_bos=True),
        "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2",
    ),
    (Pretokenizer((_modern(r"\p{N}{1,3}"),)), "dbrx smaug-bpe glm4 chatglm-bpe"),
    (
        Pretokenizer((_modern(r"\p{N}"),)),
        "qwen2 deepseek-r1-qwen megrez stablelm2 hunyuan solar-open grok-2 kormo f2llmv2",
    ),
    (Pretokenizer((_QWEN35,)), "qwen35"),
    (Pretokenizer(_DEEPSEEK_LLM), "deepseek-llm"),
    (Pretokenizer(_DEEPSEEK_CODER), "deepseek-coder"),
    (Pretokenizer(_DEEPSEEK_V3), "deepseek-v3 hunyuan-dense joyai-llm"),
    (Pretokenizer((_cased(r"\p{N}", ""),), ignore_merges=True, add_bos=True), "tekken"),
    (Pretokenizer((_cased(r"\p{N}{1,3}", f"{_ENGLISH}?"),)), "gpt-4o llama4 kanana2 minimax-m2"),
    (Pretokenizer((_SEED_CODER,)), "seed-coder"),
    (Pretokenizer((_BAILING,)), "bailingmoe bailingmoe2 llada-moe"),
    (Pretokenizer((_SENTENCES,)), "poro-chat bloom gpt3-finnish"),
    (Pretokenizer((_SENTENCES, r"\p{N}")), "viking"),
)

PRETOKENIZERS: dict[str, Pretokenizer] = {
    name: row for row, names in _FAMILIES for name in names.split()
}
