"""Fitting what steps cost: known coefficients are found again, under noise, drift, outliers and wrong priors."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.api import Costs, SamplingParams, StepCosts
from engine.costs import Fit, Floats, StepModel, decode_step_s, features, non_negative, prompts_s
from engine.plan import BlockTable, Row, StepPlan

GPU = np.array([3e-3, 1e-5, 3e-8, 2e-5, 1e-9])
CPU = np.array([3e-3, 2e-4, 1e-6, 1e-4, 3e-8])


def _steps(rng: np.random.Generator, count: int, *, prompts: bool) -> Floats:
    sequences = rng.integers(0 if prompts else 1, 64, count)
    kv_tokens = sequences * rng.integers(10, 2000, count)
    tokens = rng.integers(2, 512, count) * prompts
    cached = rng.integers(0, 2000, count)
    columns = [np.ones(count), sequences, kv_tokens, tokens, tokens * (tokens / 2 + cached)]
    return np.stack(columns, axis=1).astype(np.float64)


def _teach(fit: Fit, true: Floats, rng: np.random.Generator, rounds: int, noise: float = 0.05) -> None:
    for number in range(rounds):
        kind = number % 2
        steps = _steps(rng, 32, prompts=bool(kind))
        fit.add(steps, steps @ true * np.exp(rng.normal(0, noise, 32)), kind)


def _error(fit: Fit, true: Floats, rng: np.random.Generator) -> float:
    """The largest relative error of a prediction."""
    steps = np.concatenate([_steps(rng, 200, prompts=prompts) for prompts in (False, True)])
    return float(np.abs(steps @ fit.coefficients / (steps @ true) - 1).max())


def _fit() -> Fit:
    model = StepModel()
    return model._fit


@settings(max_examples=25, deadline=None)
@given(
    factors=st.lists(st.floats(-2, 2), min_size=5, max_size=5),
    seed=st.integers(0, 1000),
    noise=st.floats(0, 0.1),
)
def test_known_coefficients_are_found_again_from_any_prior(
    factors: list[float], seed: int, noise: float
) -> None:
    """The prior is off by up to 100 times in each coefficient."""
    rng = np.random.default_rng(seed)
    true = _fit().prior * 10 ** np.array(factors)
    fit = _fit()
    _teach(fit, true, rng, 40, noise)
    assert _error(fit, true, rng) < 0.05 + noise
    assert (fit.coefficients >= 0).all()


def test_outliers_change_little() -> None:
    rng = np.random.default_rng(1)
    fit = _fit()
    for number in range(60):
        steps = _steps(rng, 32, prompts=bool(number % 2))
        slowed = np.where(rng.random(32) < 0.05, 20.0, 1.0)
        fit.add(steps, steps @ CPU * np.exp(rng.normal(0, 0.05, 32)) * slowed, number % 2)
    assert _error(fit, CPU, rng) < 0.12


def test_it_follows_a_machine_that_changes() -> None:
    rng = np.random.default_rng(2)
    fit = _fit()
    _teach(fit, CPU, rng, 40)
    _teach(fit, 3 * CPU, rng, 140)
    assert _error(fit, 3 * CPU, rng) < 0.12
    assert fit.windows[0].spread.p50 == pytest.approx(1.0, abs=0.1)


def test_decodes_do_not_wash_out_what_prefills_taught() -> None:
    rng = np.random.default_rng(3)
    fit = _fit()
    _teach(fit, GPU, rng, 40)
    steps = np.repeat(_steps(rng, 1, prompts=False), 32, axis=0)  # hours of the very same step
    for _ in range(2000):
        fit.add(steps, steps @ GPU)
    assert _error(fit, GPU, rng) < 0.1


def test_quantiles_of_the_errors() -> None:
    rng = np.random.default_rng(4)
    fit = _fit()
    _teach(fit, CPU, rng, 60, noise=0.2)
    spread = fit.windows[1].spread
    assert spread.p50 == pytest.approx(1.0, abs=0.1)
    assert spread.p90 == pytest.approx(np.exp(1.28 * 0.2), rel=0.15)
    assert spread.p50 < spread.p90 < spread.p99


def test_few_observations_leave_the_spread_near_the_priors() -> None:
    fit = _fit()
    fit.add(np.array([[1.0, 1, 10, 0, 0]]), np.array([fit.prior @ [1, 1, 10, 0, 0]]))
    assert fit.windows[0].spread.p99 > 2


@given(st.integers(0, 10**6), st.integers(1, 5))
@settings(max_examples=60, deadline=None)
def test_non_negative_least_squares_are_the_least(seed: int, size: int) -> None:
    """Nothing near it that is allowed is better."""
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(8, size))
    wanted = rng.normal(size=8)
    gram = rows.T @ rows + 1e-6 * np.eye(size)
    found = non_negative(gram, rows.T @ wanted)

    def cost(at: Floats) -> float:
        return float(at @ gram @ at - 2 * at @ (rows.T @ wanted))

    assert (found >= 0).all()
    for _ in range(50):
        other = np.maximum(0, found + rng.normal(scale=rng.choice([1e-3, 0.1, 1.0]), size=size))
        assert cost(other) >= cost(found) - 1e-9


def _plan(*rows: tuple[int, int]) -> StepPlan:
    """Rows by (start, tokens)."""
    sampling = SamplingParams()
    return StepPlan(1, [Row(start, [0] * count, BlockTable(), sampling) for start, count in rows])


def test_features_of_a_mixed_step() -> None:
    assert features(_plan((99, 1), (9, 1), (100, 50))) == (1, 2, 108, 50, 50 * 25 + 50 * 100)


def test_chunks_add_up_to_their_prompt() -> None:
    whole, first, second = (features(_plan(row)) for row in ((64, 300), (64, 100), (164, 200)))
    assert first[3] + second[3] == whole[3]
    assert first[4] + second[4] == whole[4]


def test_predictions_of_numbers_and_of_arrays_agree() -> None:
    costs = StepCosts(*CPU.tolist())
    assert decode_step_s(costs, 4, 1000) == pytest.approx(CPU @ [1, 4, 1000, 0, 0])
    alone = prompts_s(costs, 4, 1000, 700, 9e4, 256)
    assert alone == pytest.approx(3 * decode_step_s(costs, 4, 1000) + 700 * CPU[3] + 9e4 * CPU[4])
    many = prompts_s(
        costs, np.array([4, 0]), np.array([1000, 0]), np.array([700, 0]), np.array([9e4, 0]), 256
    )
    assert many.tolist() == pytest.approx([alone, 0.0])


def test_costs_are_told_anew_only_when_they_changed_noticeably() -> None:
    model = StepModel(Costs(step=StepCosts(*CPU.tolist()), seen=5))
    told = model.costs
    plan = _plan((100, 1))
    for _ in range(300):
        model.observe(plan, float(CPU @ features(plan)))
    assert model.costs is told or model.costs.decode != told.decode  # the spread became known
    told = model.costs
    for _ in range(300):
        model.observe(plan, float(CPU @ features(plan)))
    assert model.costs is told
    for _ in range(600):
        model.observe(plan, 2 * float(CPU @ features(plan)))
    assert model.costs is not told
    assert model.costs.step.base_s > told.step.base_s


def test_handoffs_are_learned_for_each_peer() -> None:
    model = StepModel()
    rng = np.random.default_rng(5)
    for size in rng.integers(1 << 16, 1 << 24, 200).tolist():
        model.handed_off("near", size, 2e-3 + size * 1e-10)
        model.handed_off("far", size, 2e-2 + size * 1e-9)
    near, far = model.costs.handoffs
    assert (near.peer, near.seen, far.seen) == ("near", 200, 200)
    for cost, latency, byte in ((near, 2e-3, 1e-10), (far, 2e-2, 1e-9)):
        for size in (1 << 18, 1 << 23):
            assert cost.latency_s + size * cost.byte_s == pytest.approx(latency + size * byte, rel=0.1)
    told = model.costs
    model.handed_off("near", 1 << 20, 2e-3 + (1 << 20) * 1e-10)
    assert model.costs is told
