# SPDX-License-Identifier: Apache-2.0
"""Make `data/group_beam_goldens.json`: what transformers' group beam search finds on tiny models.

    PYTHONPATH=python:tests python tests/models/make_group_beam_goldens.py

needs transformers 4.56, the last line that has this search, with torch, gguf, pytest and a built
fullbeam. The goldens name the case, the seed of its weights, the prompt and the options; a test
builds the same weights from the seed.

Kept are all hypotheses that transformers ever puts on a group's list, before it cuts the list to
the group's size: those that ended, and those that live at the end. Of each its tokens, whether it
ended, and its log-probability without penalties, computed anew from its tokens. transformers' own
results are the best of these by the penalised score; that is checked here. Its early stop of a
group is switched off: the pad tokens of a group that stopped take the place of its tokens in what
later groups are charged with.

A search whose choices hang on gaps of scores too small to survive rounding is repeated with
another prompt.
"""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.generation import beam_search

from beam_oracle import MIN_GAP, choice_gap, random_prompts, tiny_oracle, token_logprobs

DATA = Path(__file__).parent / "data" / "group_beam_goldens.json"
SEED = 11
CONFIGURATIONS = [
    # case, groups, beam size of each, strength, number of ends, prompt tokens, max_tokens
    ("llama", 2, 2, 0.5, 0, 12, 16),
    ("llama", 4, 2, 0.3, 4, 9, 14),
    ("llama", 3, 1, 1.5, 1, 12, 16),
    ("llama", 2, 4, 1.0, 12, 20, 16),
    ("qwen2", 4, 2, 1.0, 0, 12, 16),
    ("qwen2", 2, 2, 0.3, 4, 5, 20),
    ("qwen2", 3, 3, 0.7, 2, 12, 12),
    ("qwen2", 8, 1, 0.5, 6, 12, 12),
    ("gemma3", 2, 4, 0.5, 0, 12, 16),
    ("gemma3", 4, 2, 1.5, 8, 12, 16),
    ("gemma3", 3, 1, 0.3, 3, 17, 20),
    ("gemma3", 3, 4, 0.4, 6, 8, 12),
]
LENGTH_PENALTIES = (0.0, 1.0, 2.0)  # by which the test ranks


@dataclass
class Trace:
    """What a search adds to the lists of its groups, and how sure its choices are."""

    num_prompt: int
    groups: dict[int, list[tuple[list[int], bool, float]]] = field(default_factory=dict)
    gap: float = math.inf
    _end_of: dict[float, int] = field(default_factory=dict)  # the token, by its candidate's score

    def process(
        self, scorer: Any, *args: Any, eos_token_id: Any, group_index: int, **options: Any
    ) -> Any:
        """Stand in for `BeamSearchScorer.process`."""
        self.groups.setdefault(id(scorer._beam_hyps[group_index]), [])
        _, scores, token_ids, _ = args
        ends = [] if eos_token_id is None else eos_token_id.tolist()
        candidates = list(zip(token_ids[0].tolist(), scores[0].tolist(), strict=True))
        self._end_of = {score: token_id for token_id, score in candidates if token_id in ends}
        gap = choice_gap(*zip(*candidates, strict=True), scorer.group_size, ends)
        self.gap = min(self.gap, gap)
        options |= {"eos_token_id": eos_token_id, "group_index": group_index}
        return PROCESS(scorer, *args, **options)

    def add(
        self, group: Any, ids: Any, score: float, *, generated_len: int, **options: Any
    ) -> None:
        """Stand in for `BeamHypotheses.add`; the tokens of those that ended lack the end."""
        token_ids = ids[self.num_prompt :].tolist()
        has_ended = len(token_ids) < generated_len
        if has_ended:
            token_ids.append(self._end_of[score])
        self.groups[id(group)].append((token_ids, has_ended, score))
        ADD(group, ids, score, generated_len=generated_len, **options)


PROCESS = beam_search.BeamSearchScorer.process
ADD = beam_search.BeamHypotheses.add


def golden(
    case: str, groups: int, size: int, strength: float, num_ends: int, length: int, max_tokens: int
) -> dict[str, Any]:
    model = tiny_oracle(case, SEED)
    for seed in itertools.count():
        (prompt,) = random_prompts(seed, 1, length)
        out, trace, ends = search(model, prompt, groups, size, strength, num_ends, max_tokens)
        found = [
            [(ids, has_ended, total(model, prompt, ids)) for ids, has_ended, _ in group]
            for group in trace.groups.values()
        ]
        num_ended = sum(has_ended for group in found for _, has_ended, _ in group)
        is_sure = min(trace.gap, *ranking_gaps(found, groups * size)) >= MIN_GAP
        if is_sure and (num_ended > 0) == (num_ends > 0):
            break
    check_results(out, trace, length, groups * size)
    assert len(found) == groups
    assert len({tuple(ids) for group in found for ids, _, _ in group}) > size, "no diversity"
    print(case, groups, size, strength, "prompt", seed, "gap", trace.gap, "ended", num_ended)
    return {
        "case": case,
        "seed": SEED,
        "prompt": prompt,
        "diversity_groups": groups,
        "beam_size": size,
        "diversity_strength": strength,
        "ends": ends,
        "max_tokens": max_tokens,
        "groups": found,
    }


def search(
    model: Any,
    prompt: list[int],
    groups: int,
    size: int,
    strength: float,
    num_ends: int,
    max_tokens: int,
) -> tuple[Any, Trace, list[int]]:
    ids = torch.tensor([prompt])
    options = {"max_new_tokens": max_tokens, "do_sample": False, "num_beams": groups * size}
    mask = torch.ones_like(ids)
    free = model.generate(ids, attention_mask=mask, **options, num_return_sequences=groups * size)
    counts = Counter(free[:, len(prompt) :].flatten().tolist())
    ends = [token_id for token_id, _ in counts.most_common(num_ends)]
    trace = Trace(len(prompt))
    scorer, hypotheses = beam_search.BeamSearchScorer, beam_search.BeamHypotheses
    scorer.process = lambda self, *args, **given: trace.process(self, *args, **given)
    hypotheses.add = lambda self, *args, **given: trace.add(self, *args, **given)
    hypotheses.is_done = lambda *_: False
    out = model.generate(
        ids,
        attention_mask=mask,
        **options,
        num_beam_groups=groups,
        diversity_penalty=strength,
        num_return_sequences=groups * size,
        eos_token_id=ends or None,
        pad_token_id=0,
        output_scores=True,
        return_dict_in_generate=True,
    )
    scorer.process, hypotheses.add = PROCESS, ADD
    return out, trace, ends


def total(model: Any, prompt: list[int], token_ids: list[int]) -> float:
    (logprobs,) = token_logprobs(model, [prompt + token_ids])
    return round(float(logprobs[len(prompt) - 1 :].sum()), 6)


def ranking_gaps(found: list[list[tuple[list[int], bool, float]]], width: int) -> list[float]:
    """Between the texts that the test ranks last and those that it leaves out."""
    gaps = [math.inf]
    for power in LENGTH_PENALTIES:
        ranked = [logprob / len(ids) ** power for group in found for ids, _, logprob in group]
        ranked.sort(reverse=True)
        gaps += [ranked[width - 1] - score for score in ranked[width : width + 1]]
    return gaps


def check_results(out: Any, trace: Trace, num_prompt: int, width: int) -> None:
    """transformers returns the best of each group's hypotheses, by penalised mean score."""
    best = []
    for group in trace.groups.values():
        ranked = sorted(((score / len(ids), ids) for ids, _, score in group), reverse=True)
        best += ranked[: width // len(trace.groups)]
    best.sort(reverse=True)
    for (score, ids), returned, theirs in zip(
        best, out.sequences[:, num_prompt:].tolist(), out.sequences_scores.tolist(), strict=True
    ):
        assert math.isclose(score, theirs, rel_tol=1e-5)
        assert returned[: len(ids) - 1] == ids[:-1]  # of several ends it returns the first


def main() -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    goldens = [golden(*configuration) for configuration in CONFIGURATIONS]
    lines = ",\n".join(json.dumps(item, separators=(",", ":")) for item in goldens)
    DATA.write_text(f"[\n{lines}\n]\n", encoding="utf-8")


if __name__ == "__main__":
    main()
