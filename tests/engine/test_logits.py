"""Penalties, biases and cuts: the distribution is that of transformers' processors over the same logits."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from engine.api import SamplingParams
from engine.logits import shaped
from engine.plan import BlockTable, Row
from engine.sampler import sample
from tests.conftest import Reference
from tests.support.local_engine import LocalEngine

VOCAB = 60
DRAWS = 20_000
HISTORY = [3, 3, 3, 17, 25, 25, 41, 9, 3, 41, 50, 50, 50]
PROMPT = 6  # of HISTORY


def wanted(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """Probabilities [vocab] by transformers; OpenAI's penalties, which it lacks, stand where vLLM has them."""
    ids = torch.tensor([HISTORY])
    before: list[Any] = []
    if params.logit_bias:
        before.append(SequenceBiasLogitsProcessor({(token,): bias for token, bias in params.logit_bias}))
    if params.repetition_penalty != 1:
        before.append(RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    scores = LogitsProcessorList(before)(ids, logits.float().unsqueeze(0).clone())
    counts = torch.bincount(ids[0, PROMPT:], minlength=VOCAB)
    scores = scores - params.frequency_penalty * counts - params.presence_penalty * (counts > 0)
    after: list[Any] = []
    if params.min_tokens:
        after.append(
            MinNewTokensLengthLogitsProcessor(PROMPT, params.min_tokens, list(params.stop_token_ids))
        )
    after.append(TemperatureLogitsWarper(params.temperature))
    if params.top_k:
        after.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        after.append(TopPLogitsWarper(params.top_p))
    if params.min_p:
        after.append(MinPLogitsWarper(params.min_p))
    return torch.softmax(LogitsProcessorList(after)(ids, scores)[0].double(), -1)


def row(params: SamplingParams, history: list[int] = HISTORY, prompt: int = PROMPT) -> Row:
    return Row(len(history) - 1, history[-1:], BlockTable(), params, history, prompt)


def deviation(logits: torch.Tensor, params: SamplingParams) -> float:
    """Standard deviations by which chi-square of many draws exceeds its mean; impossible tokens must not occur."""
    ready = shaped(logits.unsqueeze(0).clone(), [row(params)])[0]
    tokens = sample(ready.expand(DRAWS, -1), [params] * DRAWS, range(DRAWS))
    counts = np.bincount(tokens.numpy(), minlength=VOCAB)
    expected = wanted(logits, params).numpy() * DRAWS
    assert not counts[expected == 0].any()
    common = expected > 5
    statistic = ((counts - expected)[common] ** 2 / expected[common]).sum()
    freedom = max(1, common.sum() - 1)
    return float((statistic - freedom) / math.sqrt(2 * freedom))


CASES: list[dict[str, Any]] = [
    {"min_p": 0.1},
    {"min_p": 0.3, "temperature": 1.7},
    {"min_p": 0.05, "top_k": 20, "temperature": 0.7},
    {"min_p": 0.05, "top_p": 0.9},
    {"min_p": 1.0},
    {"repetition_penalty": 1.8},
    {"repetition_penalty": 0.6, "temperature": 1.3},
    {"presence_penalty": 1.5},
    {"frequency_penalty": 0.7},
    {"frequency_penalty": -0.5, "presence_penalty": -1.0},
    {"logit_bias": ((3, 2.5), (17, -100.0), (59, 4.0), (41, -1.0))},
    {"min_tokens": 8, "stop_token_ids": (25, 41, 2)},
    {"min_tokens": 7, "stop_token_ids": (25, 41, 2)},  # 7 were drawn
    {"top_k": 15, "top_p": 0.8, "repetition_penalty": 1.3},
    {
        "temperature": 0.8,
        "top_k": 40,
        "top_p": 0.95,
        "min_p": 0.02,
        "repetition_penalty": 1.4,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.4,
        "logit_bias": ((3, 3.0), (8, -2.0)),
        "min_tokens": 20,
        "stop_token_ids": (5,),
    },
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_draws_follow_transformers(case: dict[str, Any]) -> None:
    logits = torch.randn(VOCAB, generator=torch.Generator().manual_seed(4)) * 2
    assert abs(deviation(logits, SamplingParams(**{"seed": 11, **case}))) < 3.5


def test_rows_do_not_meddle_with_each_other() -> None:
    """Each row is shaped by its own history and parameters, and those that ask for nothing stay as they are."""
    logits = torch.randn(len(CASES) + 1, VOCAB, generator=torch.Generator().manual_seed(5))
    rows = [row(SamplingParams(**case), HISTORY[: 7 + at % 6], 3 + at % 4) for at, case in enumerate(CASES)]
    rows.insert(2, row(SamplingParams()))
    together = shaped(logits.clone(), rows)
    alone = torch.cat([shaped(logits[at : at + 1].clone(), [each]) for at, each in enumerate(rows)])
    assert torch.equal(together, alone)
    assert torch.equal(together[2], logits[2])
    half = logits.bfloat16()
    assert torch.equal(shaped(half, rows), shaped(half.float(), rows))
    assert shaped(half, rows[2:3]) is half


@pytest.mark.parametrize("penalty", [1.3, 0.8])
def test_greedy_with_repetition_penalty_is_that_of_transformers(reference: Reference, penalty: float) -> None:
    expected = transformers_answers(reference.folder, reference.prompts[4:12], repetition_penalty=penalty)
    params = SamplingParams(temperature=0, max_tokens=24, repetition_penalty=penalty)
    engine = LocalEngine(reference.folder, budget=64)
    assert engine.generate([(prompt, params) for prompt in reference.prompts[4:12]]) == expected
    assert expected != [answer[:24] for answer in reference.answers[4:12]]


def test_min_tokens_keeps_the_answer_going(reference: Reference) -> None:
    prompt, answer = reference.prompts[6], reference.answers[6]
    engine = LocalEngine(reference.folder)
    stops = tuple(dict.fromkeys(answer[:5]))
    params = SamplingParams(temperature=0, max_tokens=40, stop_token_ids=stops)
    assert engine.generate([(prompt, params)]) == [answer[:1]]
    longer = SamplingParams(temperature=0, max_tokens=40, stop_token_ids=stops, min_tokens=7)
    (ids,) = engine.generate([(prompt, longer)])
    assert len(ids) > 7 and not set(ids[:7]) & set(stops)
    assert len(ids) == 40 or ids[-1] in stops


def test_penalties_are_the_same_however_the_answer_came(reference: Reference) -> None:
    """Alone, together and preempted: the history counts, not the steps."""
    asked = [
        (
            prompt,
            SamplingParams(
                temperature=0.9,
                seed=at,
                max_tokens=20,
                min_p=0.02,
                repetition_penalty=1.2,
                presence_penalty=0.6,
                frequency_penalty=0.3,
            ),
        )
        for at, prompt in enumerate(reference.prompts[:14])
    ]
    alone = LocalEngine(reference.folder)
    expected = [alone.generate([one])[0] for one in asked]
    assert LocalEngine(reference.folder, budget=32).generate(asked) == expected
    cramped = LocalEngine(reference.folder, blocks=36, budget=256)
    assert cramped.generate(asked) == expected
    assert cramped.role.scheduler.preemptions > 0


def transformers_answers(folder: Path, prompts: list[list[int]], **how: Any) -> list[list[int]]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    answers = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        settings = {"max_new_tokens": 24, "min_new_tokens": 24, "do_sample": False, "eos_token_id": None}
        with torch.no_grad():
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **{**settings, **how}
            )
        answers.append(out[0, len(prompt) :].tolist())
    return answers
