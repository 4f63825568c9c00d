"""The kernel draws the tokens of engine.sampler, whatever the parameters, ties and masks."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from engine.api import SamplingParams
from engine.kernels import sampling as kernels
from engine.kernels.sampling import Draws, Scratch
from engine.sampler import gumbel, noise_key, noise_stream, signed_words
from engine.sampler import sample as sample_on_host

pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")  # infinities are wanted


def draw(
    logits: torch.Tensor, params: Sequence[SamplingParams], positions: Sequence[int], reference: bool = False
) -> list[int]:
    device = logits.device
    scratch = Scratch.empty(len(logits), logits.shape[1], device)
    for tensor in (scratch.maxima, scratch.noisy, scratch.masses):
        tensor.fill_(torch.nan)
    scratch.argmaxima.fill_(-1)
    scratch.proposals.fill_(-1)
    out = torch.full((len(logits),), -1, dtype=torch.int64, device=device)
    where = torch.tensor(list(positions), dtype=torch.int32, device=device)
    apply = kernels.sample_reference if reference else kernels.sample
    return apply(logits, Draws.of(params, device), where, scratch, out).tolist()


def assert_all_agree(logits: torch.Tensor, params: Sequence[SamplingParams]) -> list[int]:
    positions = range(100, 100 + len(params))
    expected = sample_on_host(logits, params, positions).tolist()
    assert draw(logits, params, positions, reference=True) == expected
    assert draw(logits, params, positions) == expected
    return expected


def random_params(rng: random.Random, vocab: int) -> SamplingParams:
    return SamplingParams(
        temperature=rng.choice([0.0, 0.3, 0.7, 1.0, 1.0, 2.5]),
        top_k=rng.choice([0, 0, 1, 2, 20, 500, vocab - 1, vocab, vocab + 1, -1]),
        top_p=rng.choice([1.0, 1.0, 0.0, 1e-9, 0.3, 0.9, 0.999]),
        min_p=rng.choice([0.0, 0.0, 0.05, 0.9, 1.0]),
        seed=rng.choice([0, -3, 2**64 - 1, rng.randrange(2**63)]),
        choice=rng.randrange(3),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("vocab", [2, 40, 4096, 9001])
def test_all_parameters(dtype: torch.dtype, vocab: int, device: torch.device) -> None:
    rng = random.Random(vocab)
    logits = torch.randn(40, vocab, generator=torch.Generator().manual_seed(vocab)) * 3
    logits[::5, : vocab // 2] = -torch.inf  # as a grammar leaves them
    drawn = assert_all_agree(logits.to(device, dtype), [random_params(rng, vocab) for _ in range(40)])
    assert len(set(drawn)) > min(vocab, 20) // 2


@pytest.mark.parametrize("vocab", [50, 5000])
def test_ties(vocab: int, device: torch.device) -> None:
    """Few distinct logits: the order of equal ones decides what top-k and top-p leave; both zeros are one."""
    rng = random.Random(1)
    steps = torch.randint(-2, 2, (60, vocab), generator=torch.Generator().manual_seed(1)).float()
    steps[steps == 0] *= torch.where(torch.arange(int((steps == 0).sum())) % 2 == 0, 1.0, -1.0)
    params = [random_params(rng, vocab) for _ in range(60)]
    assert_all_agree((steps * 0.5).to(device), params)


def test_a_flat_row_and_a_peaked_one(device: torch.device) -> None:
    flat = torch.zeros(4, 6000)
    flat[3, 77] = 60.0
    params = [SamplingParams(top_p=p, seed=s) for s, p in enumerate((0.5, 1e-7, 0.25, 0.9))]
    drawn = assert_all_agree(flat.to(device), params)
    assert drawn[0] < 3000 and drawn[1] == 0 and drawn[2] < 1500 and drawn[3] == 77


def test_top_p_reached_exactly_takes_no_more(device: torch.device) -> None:
    params = [SamplingParams(top_p=0.5, seed=seed) for seed in range(12)]
    assert assert_all_agree(torch.zeros(12, 2, device=device), params) == [0] * 12


def test_extremes(device: torch.device) -> None:
    logits = torch.randn(5, 40, generator=torch.Generator().manual_seed(5)) * 100
    logits[4] = -torch.inf
    logits[4, 7] = 0.0
    params = [
        SamplingParams(temperature=1e-310),
        SamplingParams(temperature=1e-30, top_k=5, top_p=0.5),
        SamplingParams(top_p=1e-9),
        SamplingParams(top_k=1, temperature=100.0),
        SamplingParams(top_k=3, top_p=0.9),
    ]
    assert assert_all_agree(logits.to(device), params) == [*logits[:4].argmax(-1).tolist(), 7]


def test_a_row_draws_the_same_in_any_company_and_from_a_strided_batch(device: torch.device) -> None:
    rng = random.Random(7)
    wide = torch.randn(12, 5200, generator=torch.Generator().manual_seed(2)).to(device) * 3
    logits = wide[:, :5100]
    params = [random_params(rng, 5100) for _ in range(12)]
    together = draw(logits, params, range(12))
    assert together == [draw(logits[row : row + 1], [params[row]], [row])[0] for row in range(12)]


@triton.jit
def _noise(streams, positions, ids, out, WIDTH: tl.constexpr):
    at = tl.arange(0, WIDTH)
    key = kernels._noise_key(tl.load(streams), tl.load(positions))
    tl.store(out + at, kernels._gumbel(key, tl.load(ids + at)))


def test_noise_is_that_of_the_host(device: torch.device) -> None:
    ids = torch.tensor([0, 1, 2, 1000, 128_000, 151_935, 262_143, 7], dtype=torch.int32, device=device)
    for seed, choice, position in ((42, 1, 100), (-1, 0, 0), (2**64 + 5, 3, 131_071), (0, 0, 0)):
        stream = torch.from_numpy(signed_words([noise_stream(seed, choice)])).to(device)
        out = torch.empty(8, dtype=torch.float64, device=device)
        _noise[(1,)](stream, torch.tensor([position], device=device), ids, out, WIDTH=8)
        key = torch.from_numpy(np.array([noise_key(seed, choice, position)], np.uint64).view(np.int64))
        torch.testing.assert_close(out, gumbel(key.to(device), ids.long()), atol=0, rtol=1e-14)


def test_no_rows_and_wrong_scratch(device: torch.device) -> None:
    assert draw(torch.zeros(0, 9, device=device), [], []) == []
    logits = torch.zeros(2, 9, device=device)
    draws, out = Draws.of([SamplingParams()] * 2, device), torch.zeros(2, dtype=torch.int64, device=device)
    with pytest.raises(ValueError, match="scratch for 2 parts, 1 needed"):
        kernels.sample(logits, draws, out, Scratch.empty(2, 5000, device), out)
    with pytest.raises(ValueError, match="scratch for 1 rows, 2 needed"):
        kernels.sample(logits, draws, out, Scratch.empty(1, 9, device), out)
