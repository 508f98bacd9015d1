# SPDX-License-Identifier: Apache-2.0
"""What lm-evaluation-harness posts and reads (`local-completions`), and the harness itself."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fake_model
import fullbeam
from fullbeam.engine.engine import Engine
from fullbeam.model import Model
from server_harness import serving
from tiny_models import Tiny

TEXTS = [("the rest", " is the"), ("other", " tea"), ("or", "i"), ("no end", " there is no")]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    shape = Tiny(num_layers=2)
    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    shape.write(path, shape.weights(7), "Q8_0")
    with fullbeam.load(str(path)) as model:
        yield model


def post(client: Any, model: Model, prompts: list[list[int]]) -> list[dict[str, Any]]:
    """Send what the harness sends; return the choices as it orders them."""
    client.model = model
    body = client.post(
        model="fake",
        prompt=prompts,
        temperature=0,
        max_tokens=1,
        logprobs=1,
        seed=1234,
        echo=True,
    ).json()
    choices = sorted(body["choices"], key=itemgetter("index"))
    assert len(choices) == len(prompts)
    return choices


def read(choice: dict[str, Any], ctxlen: int) -> tuple[float, bool]:
    """Log-likelihood of what follows the context, and whether it is the greedy text."""
    values = choice["logprobs"]["token_logprobs"][ctxlen:-1]
    top = choice["logprobs"]["top_logprobs"][ctxlen:-1]
    is_greedy = all(value == max(best.values()) for value, best in zip(values, top, strict=True))
    return sum(values), is_greedy


def test_likelihoods_are_those_of_score(
    make_client: Any, tiny: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiny, "close", lambda: None)  # the end of one server is not the end
    encode = tiny.tokenizer.encode
    contexts = [encode(context) for context, _ in TEXTS]
    prompts = [encode(context + more) for context, more in TEXTS]
    greedy = tiny.complete(contexts[0], max_tokens=5, temperature=0, ignore_eos=True)
    contexts.append(contexts[0])
    prompts.append(contexts[0] + greedy.choices[0].token_ids)
    choices = post(make_client(), tiny, prompts)
    scores = tiny.score(prompts)
    assert isinstance(scores, list)
    flags = []
    for context, choice, score in zip(contexts, choices, scores, strict=True):
        ctxlen = len(context)
        expected = sum(value for value in score.logprobs[ctxlen:] if value is not None)
        is_greedy = all(score.is_greedy[ctxlen:])
        assert read(choice, ctxlen) == (expected, is_greedy)
        flags.append(is_greedy)
    assert flags == [False, False, False, False, True]


def test_one_generated_entry_is_there_even_at_the_end_of_the_text(make_client: Any) -> None:
    prompts = [[2, first, second] for first in range(2, 23) for second in range(2, 23)]
    ending = [
        prompt
        for prompt in prompts
        if np.argmax(fake_model.history_logits(prompt)) == fake_model.EOS
    ][:5]
    decoder: Any = fake_model.FakeDecoder(256)
    model = Model(Engine(decoder, fake_model.FakeTokenizer()), name="fake")
    for choice in post(make_client(), model, ending):
        assert choice["finish_reason"] == "stop"
        assert {len(values) for values in choice["logprobs"].values()} == {4}
        assert choice["logprobs"]["tokens"][-1] == "<eos>"


TASK = """\
task: likelihoods
dataset_path: json
dataset_kwargs:
  data_files: {data}
test_split: train
output_type: loglikelihood
doc_to_text: "{{{{context}}}}"
doc_to_target: "{{{{more}}}}"
target_delimiter: ""
metric_list:
  - metric: acc
metadata:
  version: 1
"""


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed")
def test_lm_eval_itself(tiny: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny, "close", lambda: None)
    lines = [json.dumps({"context": context, "more": more}) for context, more in TEXTS]
    (tmp_path / "data.json").write_text("\n".join(lines))
    (tmp_path / "task.yaml").write_text(TASK.format(data=tmp_path / "data.json"))
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    tiny.tokenizer.backend.save(str(tokenizer / "tokenizer.json"))
    ends = {"bos_token": "<298>", "eos_token": "<299>"}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **ends}
    (tokenizer / "tokenizer_config.json").write_text(json.dumps(config))
    with serving(tiny) as url:
        options = f"model=fake,base_url={url}/completions,tokenizer={tokenizer},num_concurrent=2"
        command = [sys.executable, "-m", "lm_eval", "run", "--model", "local-completions"]
        command += ["--model_args", options, "--tasks", "likelihoods", "--batch_size", "3"]
        command += ["--include_path", str(tmp_path), "--output_path", str(tmp_path / "out")]
        offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path)}
        subprocess.run(
            [*command, "--log_samples"], check=True, capture_output=True, env=os.environ | offline
        )
    (samples,) = (tmp_path / "out").rglob("samples_*.jsonl")
    found = [json.loads(line) for line in samples.read_text().splitlines()]
    found.sort(key=itemgetter("doc_id"))
    for (context, more), sample in zip(TEXTS, found, strict=True):
        ids = tiny.tokenizer.encode(context + more, add_special_tokens=False)
        ctxlen = len(tiny.tokenizer.encode(context, add_special_tokens=False))
        score = tiny.score(ids)
        assert isinstance(score, fullbeam.Score)
        expected = sum(value for value in score.logprobs[ctxlen:] if value is not None)
        ((value, is_greedy),) = sample["filtered_resps"]
        assert float(value) == expected
        assert str(is_greedy) == str(all(score.is_greedy[ctxlen:]))
