"""The engine against transformers: same logits and same greedy tokens, however the work is cut into steps."""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from engine.api import SamplingParams
from engine.plan import BlockTable, Row, StepPlan
from engine.runner import Runner, load_runner
from engine.sampler import sample

torch.set_num_threads(1)

GREEDY = SamplingParams(temperature=0.0)
BASE = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
SHAPES: dict[str, dict[str, Any]] = {
    "gqa": {},
    "mha": {"num_key_value_heads": 8},
    "wide heads": {"head_dim": 24},
    "tied": {"tie_word_embeddings": True},
    "llama3 rope": {"rope_parameters": LLAMA3},
    "linear rope": {"rope_parameters": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0}},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "one kv head": {"num_key_value_heads": 1, "rms_norm_eps": 1e-3},
}


def make_model(folder: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> LlamaForCausalLM:
    """A random Llama whose layers are large and whose biases and norms are not trivial, saved to `folder`."""
    torch.manual_seed(7)
    model = LlamaForCausalLM(LlamaConfig(**{**BASE, **changes}))
    for name, parameter in model.named_parameters():
        if "embed" in name or "lm_head" in name:
            torch.nn.init.normal_(parameter, std=0.02 if "embed" in name else 0.3)
        elif parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=2 / parameter.shape[1] ** 0.5)
        else:
            torch.nn.init.normal_(parameter, mean=0.0 if "bias" in name else 1.0, std=0.2)
    model.to(dtype).save_pretrained(folder)
    return model.eval()


def reference(model: LlamaForCausalLM, prompt: list[int], count: int) -> list[int]:
    """Greedy tokens of transformers."""
    ids = torch.tensor([prompt])
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=count,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    tokens: list[int] = out[0, len(prompt) :].tolist()
    return tokens


class Sequence:
    def __init__(self, prompt: list[int], count: int) -> None:
        self.known = list(prompt)
        self.computed = 0
        self.table = BlockTable()
        self.final = len(prompt) + count


class Driver:
    """The least of schedulers: decodes first, then prompts in order up to a token budget; blocks in random order."""

    def __init__(self, runner: Runner, budget: int, seed: int = 1) -> None:
        self.runner = runner
        self.budget = budget
        self.free = list(range(runner.kv_cache.num_blocks))
        random.Random(seed).shuffle(self.free)
        self.steps = itertools.count()
        self.mixed = 0

    def row(self, sequence: Sequence, count: int, sampling: SamplingParams | None) -> Row:
        size = self.runner.kv_cache.block_size
        needed = -(-(sequence.computed + count) // size) - len(sequence.table)
        sequence.table.extend([self.free.pop() for _ in range(needed)])
        tokens = sequence.known[sequence.computed : sequence.computed + count]
        return Row(sequence.computed, tokens, sequence.table, sampling)

    def step(self, sequences: list[Sequence], sampling: SamplingParams) -> None:
        left, rows, chosen = self.budget, [], []
        active = [s for s in sequences if len(s.known) < s.final]
        for sequence in sorted(active, key=lambda s: len(s.known) - s.computed != 1):
            count = min(left, len(sequence.known) - sequence.computed)
            if count:
                ends = sequence.computed + count == len(sequence.known)
                rows.append(self.row(sequence, count, sampling if ends else None))
                chosen.append((sequence, count))
                left -= count
        counts = [count for _, count in chosen]
        self.mixed += 1 in counts and max(counts) > 1
        result = self.runner.run(StepPlan(next(self.steps), rows))
        for (sequence, count), row, token in zip(chosen, rows, result.sampled, strict=True):
            sequence.computed += count
            assert (token == -1) == (row.sampling is None)
            if token >= 0:
                sequence.known.append(token)

    def run(
        self, prompts: list[list[int]], counts: list[int], sampling: SamplingParams = GREEDY
    ) -> list[list[int]]:
        """Starts one more sequence every second step, so that decodes and prefills meet."""
        sequences = [Sequence(prompt, count) for prompt, count in zip(prompts, counts, strict=True)]
        started = 0
        while started < len(sequences) or any(len(s.known) < s.final for s in sequences):
            started += next(self.steps) % 2 == 0
            self.step(sequences[:started], sampling)
        for sequence in sequences:
            self.free.extend(sequence.table.clear())
        return [s.known[len(p) :] for s, p in zip(sequences, prompts, strict=True)]


def make_prompts(lengths: list[int], vocab: int = 320) -> list[list[int]]:
    rng = random.Random(3)
    return [[rng.randrange(vocab) for _ in range(length)] for length in lengths]


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_and_greedy_tokens_equal_transformers(shape: str, tmp_path: Path) -> None:
    model = make_model(tmp_path, **SHAPES[shape])
    prompts = make_prompts([33, 1, 300, 5, 150, 16])
    runner = load_runner(tmp_path, num_blocks=128, block_size=16)
    driver = Driver(runner, 4096)
    rows = [driver.row(Sequence(prompt, 1), len(prompt), GREEDY) for prompt in prompts]
    got = runner.logits(StepPlan(0, rows))
    for prompt, logits in zip(prompts, got, strict=True):
        with torch.no_grad():
            expected = model(torch.tensor([prompt])).logits[0, -1]
        assert expected.std() > 0.1  # a flat model would agree with anything
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)

    counts = [16, 40, 6, 12, 10, 8]
    expected_tokens = [reference(model, prompt, count) for prompt, count in zip(prompts, counts, strict=True)]
    assert all(len(set(tokens)) > 3 for tokens in expected_tokens)  # nor one that repeats itself
    for budget in (16, 128, 2048):
        driver = Driver(load_runner(tmp_path, num_blocks=80, block_size=16), budget)
        assert driver.run(prompts, counts) == expected_tokens
        assert driver.mixed
        assert sorted(driver.free) == list(range(80))


@pytest.mark.parametrize("block_size", [1, 8, 64])
def test_block_size_changes_nothing(block_size: int, tmp_path: Path) -> None:
    model = make_model(tmp_path)
    prompts = make_prompts([9, 70, 31])
    expected = [reference(model, prompt, 10) for prompt in prompts]
    driver = Driver(load_runner(tmp_path, num_blocks=1 + 200 // block_size, block_size=block_size), 32)
    assert driver.run(prompts, [10, 10, 10]) == expected


def test_a_dirty_cache_changes_nothing(tmp_path: Path) -> None:
    """Blocks come back from others with anything in them, NaN too; only slots written for this row may count."""
    model = make_model(tmp_path)
    prompts = make_prompts([9, 70, 31, 1])
    expected = [reference(model, prompt, 20) for prompt in prompts]
    runner = load_runner(tmp_path, num_blocks=16, block_size=16)
    for layer in runner.kv_cache.layers:
        layer.fill_(float("nan"))
    assert Driver(runner, 16).run(prompts, [20] * 4) == expected


def test_a_prompt_longer_than_one_causal_call(tmp_path: Path) -> None:
    """Beyond 512 tokens from position 0 another kernel is used, and beyond 512 of context another tile."""
    model = make_model(tmp_path, max_position_embeddings=2048)
    (prompt,) = make_prompts([1100])
    expected = [reference(model, prompt, 5)]
    for budget in (300, 700, 2048):
        assert Driver(load_runner(tmp_path, num_blocks=80), budget).run([prompt], [5]) == expected


def test_rows_that_draw_nothing_leave_the_same_cache(tmp_path: Path) -> None:
    """A prefill worker never samples: the skipped end of the last layer must not change what is handed over."""
    make_model(tmp_path)
    caches = []
    for sampling in (None, GREEDY):
        runner = load_runner(tmp_path, num_blocks=8)
        driver = Driver(runner, 64)
        rows = [driver.row(Sequence(prompt, 1), len(prompt), sampling) for prompt in make_prompts([30, 40])]
        sampled = runner.run(StepPlan(0, rows)).sampled
        assert (sampled == [-1, -1]) == (sampling is None)
        caches.append(torch.stack(runner.kv_cache.layers))
    assert torch.equal(caches[0], caches[1])


def test_drawn_tokens_depend_on_the_request_alone(tmp_path: Path) -> None:
    """Whatever the budget and the company, and resumed with the tokens so far as a longer prompt."""
    model = make_model(tmp_path)
    prompts = make_prompts([40, 3, 17])
    sampling = SamplingParams(temperature=0.8, top_k=40, top_p=0.95, seed=11, choice=2)
    runner = load_runner(tmp_path, num_blocks=32)
    tokens = Driver(runner, 16).run(prompts, [20, 30, 25], sampling)
    assert Driver(runner, 2048).run(prompts[:1], [20], sampling) == tokens[:1]
    assert Driver(runner, 64).run([prompts[1] + tokens[1][:13]], [17], sampling) == [tokens[1][13:]]
    with torch.no_grad():
        logits = model(torch.tensor([prompts[2]])).logits[0, -1:]
    assert sample(logits, [sampling], [len(prompts[2])]).item() == tokens[2][0]
    assert tokens != Driver(runner, 2048).run(prompts, [20, 30, 25])


def test_bfloat16_is_near(tmp_path: Path) -> None:
    model = make_model(tmp_path, torch.bfloat16)
    prompts = make_prompts([5, 60, 130])
    runner = load_runner(tmp_path, num_blocks=32)
    assert runner.kv_cache.dtype == torch.bfloat16
    driver = Driver(runner, 4096)
    got = runner.logits(StepPlan(0, [driver.row(Sequence(p, 1), len(p), GREEDY) for p in prompts])).float()
    exact = model.float()
    for prompt, logits in zip(prompts, got, strict=True):
        with torch.no_grad():
            expected = exact(torch.tensor([prompt])).logits[0, -1]
        assert (logits - expected).abs().max() < 0.15 * expected.std() * 4
        assert torch.nn.functional.cosine_similarity(logits, expected, dim=0) > 0.995
    assert [len(tokens) for tokens in Driver(runner, 32).run(prompts, [9, 9, 9])] == [9, 9, 9]


def test_an_empty_plan_is_an_empty_result(tmp_path: Path) -> None:
    make_model(tmp_path)
    assert load_runner(tmp_path, num_blocks=4).run(StepPlan(0)).sampled == []
