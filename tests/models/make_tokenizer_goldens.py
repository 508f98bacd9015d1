# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: RUF001
"""Make `data/tokenizer_goldens.json`: texts, and the ids that llama.cpp gives them.

    python tests/models/make_tokenizer_goldens.py MODEL.gguf ...

needs fullbeam, llama-cpp-python, gguf and tokenizers. The ids of the models given are kept under
their file names; besides, two small vocabularies are trained on the texts themselves, without
cutting the text into words first, so that every cut that a pre-tokenizer makes shows in the ids.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import gguf
import tokenizers
from llama_cpp import Llama
from tokenizers import models, normalizers, pre_tokenizers, trainers

from fullbeam.models.pretokenizers import PRETOKENIZERS

DATA = Path(__file__).parent / "data" / "tokenizer_goldens.json"
CODE = '''def fibonacci(n: int) -> int:
    """Return the n-th number, O(log n)."""
    if n < 2:\n        return n\t# base
    a, b = 0, 1
    for _ in range(n - 1):
        a, b = b, a + b   \n\n\n    return b
'''
WORDS = [
    "",
    "a",
    " a",
    "  a  ",
    "Hello, World! Hello,World!!  ok?",
    "I'm, you're, we've, he'd, she'll, it's, can't. I'M YOU'RE WE'VE He'D 'S 'x x'",
    "1 12 123 1234 12345 1234567890 3.14159 1,000,000 0xDEADBEEF 1e-10 v2.0.1",
    "a \n b\n\nc \n\n d\r\ne\r\n\r\n f\t\tg \t h",
    "    four\n        eight\n\ttab\n \t mixed   ",
    "trailing   ",
    "\n",
    "\r\n",
    "\t\t\t",
    "x" + " " * 37 + "y",
    "=" * 70 + "-" * 33 + "#" * 9,
    CODE,
    "if (x!=y&&z||!w){return a[i]->b::c<T>();} // done; <= >= == => ... `q` $v ^ ~ |",
    "camelCase PascalCase snake_case SCREAMING_CASE HTTPServer2Go iPhone aB AbC",
    "naïve café Ünïcödé straße œuvre ﬁ ﬂ ǅ ʰ ª",
    "e\u0301 e\u0301\u0301 नमस्ते दुनिया สวัสดีชาวโลก",
    "Привет, мир! Γειά σου Κόσμε שלום עולם مرحبا بالعالم ١٢٣ աբգ ქართული",
    "你好，世界！汉字漢字。こんにちは、カタカナ「引用」 안녕하세요 세계 １２３ ＡＢＣ",
    "½ ⅓ Ⅻ ① ² x² €5 £6 ¥7 ™ © ± × ÷ ≤ ∑ → “quoted” ‘single’ — … «x»",
    "👨‍👩‍👧‍👦 🏳️‍🌈 👍🏽👍🏿 🇩🇪🇫🇷 ❤️‍🔥 😀😀😀 x😀y",
    "\x00\x01\x1b[31mred\x1b[0m\x7f\x85\u00a0\u1680\u2003\u2028\u2029\u202f\u3000\ufeffend",
    "zero\u200bwidth\u200c\u200djoin\u00adsoft \u2581 \u2581\u2581x",
    "\ufffd\U0010ffff\U000e0001\ue000 𝔘𝔫𝔦 𝒯𝓍 𐐀𐐨",
    '<div>  <p class="x">a &amp; b</p>\n</div></s><br/>',
    "http://example.com/a/b?q=1&r=%20#frag user@example.org C:\\dir\\file.txt ~/x",
]
SPECIAL = [
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>",
    "<start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n",
    "<|fim_prefix|>def f(<|fim_suffix|>)<|fim_middle|>",
    "<bos>x <bos> y<eos>",
    "<|endoftext|> <|endoftext|",
    "<unused5>[multimodal]<pad><unk><0x0A><0xFF>",
    "<tool_call>\n{}\n</tool_call>",
    "<start_of_image><table><tr>\n\n\n<td>",
]
RUNS = [char * n for char in (" ", "\n", "\t") for n in (2, 3, 15, 16, 31, 32, 65)]
TEXTS = WORDS + SPECIAL + RUNS


def main(paths: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        goldens: dict[str, Any] = {
            "texts": TEXTS,
            "models": {Path(path).name: reference(Path(path), TEXTS) for path in paths},
            "byte_level": byte_level(Path(folder) / "byte_level.gguf"),
            "sentencepiece": sentencepiece(Path(folder) / "sentencepiece.gguf"),
        }
    DATA.parent.mkdir(exist_ok=True)
    lines = json.dumps(goldens, ensure_ascii=True, separators=(",", ":")).replace("]],", "]],\n")
    DATA.write_text(lines + "\n", encoding="utf-8")


def reference(path: Path, texts: list[str]) -> dict[str, Any]:
    """`ids`: start token and control tokens as the model has them; `literal`: neither."""
    model = Llama(model_path=str(path), vocab_only=True, verbose=False)
    raw = [text.encode() for text in texts]
    return {
        "ids": [model.tokenize(text, add_bos=True, special=True) for text in raw],
        "literal": [model.tokenize(text, add_bos=False, special=False) for text in raw],
    }


def byte_level(path: Path) -> dict[str, Any]:
    trained = tokenizers.Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=700, min_frequency=1, initial_alphabet=alphabet, show_progress=False
    )
    trained.train_from_iterator([piece for text in WORDS for piece in (text, text[1::2])], trainer)
    state = json.loads(trained.to_str())["model"]
    tokens = [*sorted(state["vocab"], key=state["vocab"].get), "<|endoftext|>", "<tool>"]
    merges = [" ".join(pair) for pair in state["merges"]]
    types = [1] * (len(tokens) - 2) + [3, 4]
    texts = [*WORDS, "<|endoftext|> a<tool>b", " <tool> "]
    results: list[Any] = []
    which: dict[str, int] = {}
    for pre in PRETOKENIZERS:
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
        writer.add_token_list(tokens)
        writer.add_token_merges(merges)
        writer.add_token_types(types)
        writer.add_bos_token_id(len(tokens) - 2)
        writer.add_eos_token_id(len(tokens) - 2)
        save(writer)
        result = reference(path, texts)
        if result not in results:
            results.append(result)
        which[pre] = results.index(result)
    return {
        "texts": texts[len(WORDS) :],
        "tokens": tokens,
        "merges": merges,
        "types": types,
        "results": results,
        "result_of_pre": which,
    }


def sentencepiece(path: Path) -> dict[str, Any]:
    trained = tokenizers.Tokenizer(models.BPE())
    trained.normalizer = normalizers.Replace(" ", "\u2581")
    trainer = trainers.BpeTrainer(vocab_size=500, min_frequency=1, show_progress=False)
    known = ["".join(char for char in text if "\0" < char < "\u0500") for text in WORDS]
    trained.train_from_iterator([piece for text in known for piece in (text, text[1::2])], trainer)
    state = json.loads(trained.to_str())["model"]
    pieces = sorted(state["vocab"], key=state["vocab"].get)
    order = {"".join(pair): i for i, pair in enumerate(state["merges"])}
    byte_texts = [f"<0x{byte:02X}>" for byte in range(256)]
    tokens = ["<unk>", "<s>", "</s>", *byte_texts, *pieces, "<tool>", "<|im_end|>"]
    scores = [0.0] * 259 + [
        -float(order.get(piece, len(order) + i)) for i, piece in enumerate(pieces)
    ]
    scores += [-1000.0, -1000.0]
    types = [2, 3, 3] + [6] * 256 + [1] * len(pieces) + [4, 3]
    texts = [*WORDS, "<s> a<tool>b <|im_end|> c", " <tool>  x"]
    results = {}
    for prefix in (False, True):
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_tokenizer_model("llama")
        writer.add_token_list(tokens)
        writer.add_token_scores(scores)
        writer.add_token_types(types)
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_add_space_prefix(prefix)
        save(writer)
        results["prefix" if prefix else "plain"] = reference(path, texts)
    return {
        "texts": texts[len(WORDS) :],
        "tokens": tokens,
        "scores": scores,
        "types": types,
        "results": results,
    }


def save(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main(sys.argv[1:])
