"""The sampler draws from the right distribution, and every draw depends on its own row alone."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from engine.api import SamplingParams
from engine.sampler import gumbel, noise_key, sample, uniform

torch.set_num_threads(1)

VOCAB = 40


def keys_of(*words: int) -> torch.Tensor:
    return torch.from_numpy(np.array([noise_key(*words)], dtype=np.uint64).view(np.int64))


def draw(logits: torch.Tensor, params: SamplingParams, count: int = 20_000) -> np.ndarray:
    """Counts of each token over `count` positions of one request with these logits [vocab] at every position."""
    tokens = sample(logits.expand(count, -1), [params] * count, range(count))
    return np.bincount(tokens.numpy(), minlength=len(logits))


def chi_square(counts: np.ndarray, probabilities: torch.Tensor) -> float:
    """Standard deviations by which the statistic exceeds its mean; impossible tokens must not occur."""
    expected = probabilities.double().numpy() * counts.sum()
    assert not counts[expected == 0].any()
    common = expected > 5
    statistic = ((counts - expected)[common] ** 2 / expected[common]).sum()
    freedom = common.sum() - 1
    return float((statistic - freedom) / math.sqrt(2 * freedom))


def truncated(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """The wanted distribution, token by token: temperature, then top-k, then top-p of what is left."""
    p = torch.softmax(logits.double() / params.temperature, -1)
    order = sorted(range(len(p)), key=lambda token: (-float(p[token]), token))
    order = order[: params.top_k or None]
    mass = sum(float(p[token]) for token in order)
    kept, reached = [], 0.0
    for token in order:
        if reached >= params.top_p * mass:
            break
        kept.append(token)
        reached += float(p[token])
    out = torch.zeros_like(p)
    out[kept] = p[kept]
    return out / out.sum()


CASES = [
    SamplingParams(temperature=1.0, seed=1),
    SamplingParams(temperature=0.5, seed=2, choice=3),
    SamplingParams(temperature=2.0, seed=-3),
    SamplingParams(temperature=1.0, top_k=7, seed=2**64 - 1),
    SamplingParams(temperature=1.3, top_p=0.8, seed=5),
    SamplingParams(temperature=1.0, top_k=12, top_p=0.6, seed=6),
    SamplingParams(temperature=0.7, top_k=1000, top_p=0.95, seed=7),
]


@pytest.mark.parametrize("params", CASES, ids=str)
def test_draws_follow_the_softmax(params: SamplingParams) -> None:
    logits = torch.randn(VOCAB, generator=torch.Generator().manual_seed(1)) * 2
    assert abs(chi_square(draw(logits, params), truncated(logits, params))) < 3.5


@pytest.mark.parametrize("vary", ["seed", "choice", "position", "id"])
def test_noise_is_uniform_and_uncorrelated_along_each_argument(vary: str) -> None:
    """Neighbouring counters must look independent, else a request's tokens would depend on each other."""
    count = 1 << 16
    if vary == "id":
        words, ids = [noise_key(9, 0, 5)], torch.arange(count)
    else:
        place = ("seed", "choice", "position").index(vary)
        words = [
            noise_key(*(index if place == argument else 7 for argument in range(3))) for index in range(count)
        ]
        ids = torch.tensor([11])
    u = uniform(torch.from_numpy(np.array(words, dtype=np.uint64).view(np.int64)), ids).numpy()
    assert u.min() > 0 and u.max() < 1
    counts, _ = np.histogram(u, bins=64, range=(0, 1))
    assert abs(chi_square(counts, torch.full((64,), 1 / 64))) < 3.5
    for lag in (1, 2, 64):
        assert abs(np.corrcoef(u[:-lag], u[lag:])[0, 1]) * math.sqrt(count) < 3.5


def test_noise_is_pinned() -> None:
    """Workers of two releases serve one request in turn: the noise must never change."""
    # From SplitMix64 in plain integers.
    assert noise_key(0, 0, 0) == 0x238275BC38FCBE91
    values = uniform(keys_of(42, 1, 100), torch.tensor([0, 1, 128_000])).tolist()
    assert values == [0.4428627120009808, 0.951342897678699, 0.2590212165685092]


def test_uniform_never_reaches_its_ends() -> None:
    """The finaliser is a bijection: invert it to feed it the words that give all zeros and all ones."""
    mask = (1 << 64) - 1

    def unshift(word: int, count: int) -> int:
        out = word
        for _ in range(64 // count + 1):
            out = word ^ (out >> count)
        return out

    for word in (0, mask):
        word = unshift(word, 31) * pow(0x94D049BB133111EB, -1, 1 << 64) & mask
        word = unshift(word, 27) * pow(0xBF58476D1CE4E5B9, -1, 1 << 64) & mask
        key = (unshift(word, 30) - 0x9E3779B97F4A7C15) & mask
        keys = torch.from_numpy(np.array([key], dtype=np.uint64).view(np.int64))
        (u,) = uniform(keys, torch.tensor([0])).tolist()
        assert u == (2.0**-53 if word == 0 else 1 - 2.0**-53)
        assert math.isfinite(gumbel(keys, torch.tensor([0])).item())


def test_a_row_draws_the_same_in_any_company() -> None:
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(60, 3000, generator=generator) * 3
    params = [
        SamplingParams(
            temperature=(0.0, 0.6, 1.0, 1.5)[row % 4],
            top_k=(0, 5, 900)[row % 3],
            top_p=(1.0, 0.9)[row % 2],
            seed=row,
        )
        for row in range(60)
    ]
    together = sample(logits, params, range(100, 160)).tolist()
    alone = [sample(logits[row : row + 1], [params[row]], [100 + row]).item() for row in range(60)]
    assert together == alone
    order = list(range(59, -1, -1))
    shuffled = sample(logits[order], [params[row] for row in order], [100 + row for row in order]).tolist()
    assert shuffled == together[::-1]
    assert len(set(together)) > 20


def test_a_flat_row_sees_the_whole_vocabulary() -> None:
    """top-p without top-k looks at the best few hundred first, and beyond where they do not reach p."""
    logits = torch.zeros(3000)
    counts = draw(logits, SamplingParams(top_p=0.5, seed=3), 4000)
    assert counts[:1500].sum() == 4000 and (counts[:1500] > 0).sum() > 1200
    assert abs(chi_square(counts[:1500].reshape(100, -1).sum(1), torch.full((100,), 0.01))) < 3.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ties_go_to_the_lowest_id(dtype: torch.dtype) -> None:
    logits = torch.zeros(2, 5000, dtype=dtype)
    logits[:, [4000, 17, 900, 18]] = 5.0
    assert sample(logits, [SamplingParams(temperature=0)] * 2, [0, 1]).tolist() == [17, 17]
    assert sample(logits, [SamplingParams(top_k=1, seed=s) for s in range(2)], [0, 1]).tolist() == [17, 17]
    one = SamplingParams(top_k=2, seed=4)
    assert set(sample(logits[:1].expand(50, -1), [one] * 50, range(50)).tolist()) == {17, 18}
    tied_behind = SamplingParams(top_k=6, seed=4, temperature=50.0)
    seen = set(sample(logits[:1].expand(500, -1), [tied_behind] * 500, range(500)).tolist())
    assert seen == {17, 18, 900, 4000, 0, 1}


def test_extremes() -> None:
    logits = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(5)) * 100
    best = logits.argmax().item()
    for params in (
        SamplingParams(temperature=1e-310),
        SamplingParams(temperature=1e-30, top_k=5, top_p=0.5),
        SamplingParams(top_p=1e-9),
        SamplingParams(top_p=0.0),
        SamplingParams(top_k=1, temperature=100.0),
    ):
        assert sample(logits, [params], [0]).item() == best
    masked = torch.full((1, VOCAB), -torch.inf)
    masked[0, 7] = 0.0
    for params in (
        SamplingParams(),
        SamplingParams(top_k=5),
        SamplingParams(top_p=0.9),
        SamplingParams(temperature=0),
    ):
        assert sample(masked, [params], [0]).item() == 7
