# SPDX-License-Identifier: Apache-2.0
"""The `gpt` package against fullbeam's server, with a small engine behind it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

import fake_model
import gpt
from fullbeam.engine.engine import Engine
from fullbeam.model import Model
from fullbeam.models.vocabulary import InfillTokens
from gpt.models import components, errors
from server_harness import serving

KEY = "a key"

# What the SDK's documentation shows: these calls, with these arguments and no address.
DOCUMENTED = f"""
import gpt
from gpt.models import components

s = gpt.Gpt(api_key_auth="{KEY}")
req = components.CreateCompletionRequest(
    model="fake", prompt="Say this.", max_tokens=16, n=1, suffix="That's it.", temperature=1,
    top_p=1, user="somebody",
)
res = s.completions.create_completion(req)
if res.create_completion_response is not None:
    print(res.create_completion_response.choices[0].finish_reason.value)
"""


class AnyText(fake_model.FakeTokenizer):
    """Takes any text, a token a character, and can fill in the middle."""

    infill = InfillTokens(2, 3, 4)

    def encode(
        self, text: str, *, add_special_tokens: bool = True, parse_special: bool = True
    ) -> list[int]:
        ids = [2 + ord(char) % 12 for char in text]
        return [fake_model.BOS, *ids] if add_special_tokens else ids


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    decoder: Any = fake_model.FakeDecoder(256)
    model = Model(Engine(decoder, AnyText(), page_size=4), name="fake")
    with serving(model, api_keys=(KEY,)) as address:
        yield address


@pytest.fixture
def client(url: str, session: requests.Session) -> gpt.Gpt:
    return gpt.Gpt(KEY, server_url=url, client=session)


def request(**fields: Any) -> components.CreateCompletionRequest:
    return components.CreateCompletionRequest(**({"model": "fake", "prompt": "abc"} | fields))


def complete(client: gpt.Gpt, **fields: Any) -> components.CreateCompletionResponse:
    answer = client.completions.create_completion(request(**fields)).create_completion_response
    assert answer is not None
    return answer


def test_documented_example_runs(url: str) -> None:
    environment = {"PYTHONPATH": str(Path(gpt.__file__).parents[1]), "FULLBEAM_URL": url}
    command = [sys.executable, "-c", DOCUMENTED]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (result.stderr, result.returncode) == ("", 0)
    assert result.stdout in ("stop\n", "length\n")


def test_defaults_of_the_client_are_accepted(client: gpt.Gpt) -> None:
    answer = complete(client)
    assert answer.object is components.CreateCompletionResponseObject.TEXT_COMPLETION
    assert answer.model == "fake"
    assert answer.system_fingerprint is not None
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_several_choices_with_the_best_of_that_is_always_sent(client: gpt.Gpt) -> None:
    answer = complete(client, prompt=["ab", "cd"], n=2, seed=3)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.choices == complete(client, prompt=["ab", "cd"], n=2, seed=3).choices


def test_logprobs(client: gpt.Gpt) -> None:
    (choice,) = complete(client, logprobs=2, echo=True, max_tokens=1, temperature=0).choices
    assert choice.logprobs is not None
    assert choice.logprobs.tokens is not None
    assert choice.logprobs.token_logprobs is not None
    assert len(choice.logprobs.tokens) == len(choice.logprobs.token_logprobs)
    assert choice.logprobs.token_logprobs[0] is None
    assert choice.finish_reason in (
        components.CreateCompletionResponseFinishReason.STOP,
        components.CreateCompletionResponseFinishReason.LENGTH,
    )


def test_stream_raises_with_the_events(client: gpt.Gpt) -> None:
    with pytest.raises(errors.SDKError) as caught:
        client.completions.create_completion(request(stream=True, max_tokens=2))
    assert caught.value.message == "unknown content-type received: text/event-stream; charset=utf-8"
    assert caught.value.status_code == 200
    assert caught.value.body.endswith("data: [DONE]\n\n")


@pytest.mark.parametrize(
    ("fields", "status", "code"),
    [
        ({"top_p": 2}, 400, '"param":"top_p"'),
        ({"model": "other"}, 404, '"code":"model_not_found"'),
        ({"max_tokens": 999}, 400, '"code":"context_length_exceeded"'),
    ],
)
def test_errors(client: gpt.Gpt, fields: dict[str, Any], status: int, code: str) -> None:
    with pytest.raises(errors.SDKError) as caught:
        client.completions.create_completion(request(**fields))
    assert caught.value.status_code == status
    assert code in caught.value.body
    assert str(caught.value) == f"API error occurred: Status {status}\n{caught.value.body}"


def test_wrong_key(url: str) -> None:
    with requests.Session() as session, pytest.raises(errors.SDKError, match="invalid_api_key"):
        gpt.Gpt("wrong", server_url=url, client=session).models.list_models()


def test_models(client: gpt.Gpt) -> None:
    listed = client.models.list_models().list_models_response
    assert listed is not None
    (card,) = listed.data
    assert (card.id, card.owned_by) == ("fake", "fullbeam")
    assert client.models.retrieve_model("fake").model == card
    with pytest.raises(errors.SDKError, match="Status 405"):
        client.models.delete_model("fake")
