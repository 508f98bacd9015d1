# SPDX-License-Identifier: Apache-2.0
"""A prompt and its parameters as given to the request that the engine runs."""

from __future__ import annotations

import operator
import os
from collections.abc import Callable, Sequence
from typing import Any

from fullbeam.checks import shown
from fullbeam.engine.batch import Int32Array
from fullbeam.engine.pages import PagePool
from fullbeam.engine.prompt import encode_infill, encode_prompt, heal
from fullbeam.engine.rules import Rules, TokenIndex
from fullbeam.engine.search import Search
from fullbeam.engine.sequence import Event, Request, pages_needed
from fullbeam.engine.sequence import Sequence as TokenSequence
from fullbeam.engine.text import TokenNames
from fullbeam.params import (
    DEFAULT_MAX_TOKENS,
    CompletionParams,
    ContextLengthError,
    ParameterError,
)

_MAX_SCORED_VALUES = 2**20
"""Most log-probabilities of a prompt: so many take seconds and 300 MB as Python objects."""

_MAX_PROMPT_INDEX = 2**32 - 1  # a key of the random draws


class Intake:
    """Checks and encodes what callers give; any thread may."""

    def __init__(self, index: TokenIndex, pool: PagePool, *, context: int, max_rows: int) -> None:
        self._index = index
        self._pool = pool
        self._context = context
        self._max_rows = max_rows
        self._tokenizer = index.tokenizer
        self._vocab_size = index.vocab_size
        self._names = TokenNames(index.tokenizer)

    def request(
        self,
        prompt: str | Sequence[int] | None,
        params: CompletionParams,
        *,
        on_event: Callable[[Event], None],
        prompt_index: int,
        stream: bool,
    ) -> Request:
        """Return the request of `Engine.submit`, which says what is raised."""
        if not isinstance(params, CompletionParams):
            kind = type(params).__name__
            raise TypeError(f"submit: params must be CompletionParams, got {kind}")
        if not callable(on_event):
            raise TypeError(f"submit: on_event must be callable, got {type(on_event).__name__}")
        prompt_index = operator.index(prompt_index)
        if not 0 <= prompt_index <= _MAX_PROMPT_INDEX:
            bound = f"in 0..{_MAX_PROMPT_INDEX}"
            raise ValueError(f"submit: prompt_index must be {bound}, got {shown(prompt_index)}")
        self._check_ids(params)
        token_ids, constraint = self._encode(prompt, params)
        self._check_num_scored(len(token_ids), params)
        max_tokens = self._num_allowed(len(token_ids), params.max_tokens)
        if params.min_tokens > max_tokens:
            bound = f"at most max_tokens = {max_tokens}"
            raise ParameterError("min_tokens", bound, params.min_tokens)
        seed = params.seed
        if seed is None:
            seed = int.from_bytes(os.urandom(8), "little")
        end_ids = frozenset(params.stop_ids)
        if not params.ignore_eos:
            end_ids |= self._tokenizer.eos_ids
        if params.suffix and self._tokenizer.infill is not None:
            end_ids |= self._tokenizer.infill.end_ids
        rules = self._rules(params, end_ids, constraint)
        if params.is_search and max_tokens == 0:
            raise ContextLengthError(self._context, len(token_ids), 1)
        request = Request(
            prompt_ids=token_ids,
            given_text="" if prompt is None else prompt if isinstance(prompt, str) else None,
            params=params,
            max_tokens=max_tokens,
            prompt_index=prompt_index,
            seed=seed & (2**64 - 1),
            stream=stream,
            on_event=on_event,
            tokenizer=self._tokenizer,
            names=self._names,
            end_ids=end_ids,
            rules=rules,
            constraint=constraint,
        )
        if params.is_search and rules is not None:
            self._check_search(request)
            request.sequences = [Search(request, rules, self._pool)]
        else:
            width = self._rows_together(request)
            request.sequences = [
                TokenSequence(request, range(first, min(first + width, params.num_candidates)))
                for first in range(0, params.num_candidates, width)
            ]
        return request

    def _encode(
        self, prompt: str | Sequence[int] | None, params: CompletionParams
    ) -> tuple[Int32Array, bytes]:
        """Return the prompt's ids, and the bytes that its continuation has to start with."""
        constraint = params.prefix.encode()
        if params.token_healing:
            if prompt is not None and not isinstance(prompt, str):
                raise ValueError("submit: token_healing must be left out: the prompt is token ids")
            prompt, constraint = heal(prompt or "", params.prefix, self._index)
        options: dict[str, Any] = {
            "add_special_tokens": params.add_special_tokens,
            "max_tokens": self._num_kept(params),
            "whole_lines": params.truncate_prompt_tokens is None,
        }
        if params.suffix:
            ids = encode_infill(self._tokenizer, self._vocab_size, prompt, params.suffix, **options)
        else:
            ids = encode_prompt(self._tokenizer, self._vocab_size, prompt, **options)
        if constraint and not self._index.allowed_mask(constraint).any():
            text = constraint.decode("utf-8", "replace")
            raise ParameterError("prefix", "text that the tokens can spell", text)
        return ids, constraint

    def _num_kept(self, params: CompletionParams) -> int | None:
        """Return how many tokens of the prompt to keep; None: all."""
        wanted = DEFAULT_MAX_TOKENS if params.max_tokens is None else params.max_tokens
        room = max(1, self._context - wanted)
        if params.context_len is not None:
            return min(params.context_len, room) if params.context_len > 0 else room
        return room if params.truncate_prompt_tokens == -1 else params.truncate_prompt_tokens

    def _check_search(self, request: Request) -> None:
        pool, params = self._pool, request.params
        if params.width > self._max_rows:
            bound = f"at most {self._max_rows} (max_rows) in all groups"
            raise ParameterError("beam_size", bound, params.width)
        num_pages = -(-request.num_prompt_tokens // pool.page_size)
        num_pages += -(-(params.width * (request.max_tokens - 1)) // pool.page_size)
        if num_pages > pool.num_pages:
            num_tokens = pool.num_pages * pool.page_size - request.num_prompt_tokens
            bound = f"such that {params.width} hypotheses fit into the {num_tokens} tokens"
            raise ParameterError(
                "max_tokens", f"{bound} that the prompt leaves of the KV cache", request.max_tokens
            )

    def _check_ids(self, params: CompletionParams) -> None:
        biased_ids = tuple(token_id for token_id, _ in params.biases)
        given = {
            "stop_token_ids": params.stop_ids,
            "allowed_token_ids": params.allowed_ids,
            "logit_bias": biased_ids,
        }
        for field, ids in given.items():
            if ids and max(ids) >= self._vocab_size:
                raise ValueError(
                    f"submit: {field} must be in 0..{self._vocab_size - 1}, got {max(ids)}"
                )

    def _check_num_scored(self, num_prompt: int, params: CompletionParams) -> None:
        most = _MAX_SCORED_VALUES // self._vocab_size
        if params.num_top_scored == -1 and num_prompt > most:
            bound = f"at least 0 for a prompt of more than {most} tokens"
            raise ParameterError("prompt_logprobs", bound, -1)

    def _rules(
        self, params: CompletionParams, end_ids: frozenset[int], constraint: bytes
    ) -> Rules | None:
        """Return what the text is held to; None where tokens are drawn freely."""
        rules = Rules(
            self._index,
            end_ids=end_ids,
            mode=params.mode,
            # Drawn text is searched for them as it comes: no rule is needed.
            stop_strings=params.stop_strings if params.is_search else (),
            bad_words=params.bad_strings,
            allowed_ids=frozenset(params.allowed_ids),
            min_tokens=params.min_tokens,
            constraint=constraint,
        )
        return rules if params.is_search or not rules.is_trivial else None

    def _num_allowed(self, num_prompt: int, max_tokens: int | None) -> int:
        """Return how many tokens to generate."""
        if max_tokens is None and num_prompt <= self._context:
            return min(DEFAULT_MAX_TOKENS, self._context - num_prompt)
        wanted = max_tokens or 0
        if num_prompt + wanted > self._context:
            raise ContextLengthError(self._context, num_prompt, wanted)
        return wanted

    def _rows_together(self, request: Request) -> int:
        """Return how many choices one sequence may have, so that it can run to its end alone."""
        pool = self._pool
        num_prompt, max_tokens = request.num_prompt_tokens, request.max_tokens
        for width in range(min(request.params.num_candidates, self._max_rows), 0, -1):
            if pages_needed(num_prompt, max_tokens, width, pool.page_size) <= pool.num_pages:
                return width
        raise ValueError(
            f"submit: prompt + max_tokens must fit into the KV cache of "
            f"{pool.num_pages * pool.page_size} tokens, got {num_prompt} + {max_tokens}"
        )
