"""Calibration at a worker's start: synthetic steps that fit, a limit on their time, profiles."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.api import Costs, HandoffCost, StepCosts
from engine.costs import StepModel, features
from engine.ledger import BlockLedger
from engine.plan import StepPlan, StepResult
from engine.scheduler import Limits
from worker.calibration import Profile, calibrate, starting_costs
from worker.spec import WorkerSpec

TRUE = (2e-3, 2e-4, 1e-6, 1e-4, 3e-8)


class Machine:
    """A runner and its clock: steps cost what `TRUE` says."""

    def __init__(self, blocks: BlockLedger, factor: float = 1.0) -> None:
        self.now = 0.0
        self.plans: list[StepPlan] = []
        self.factor = factor
        self._blocks = blocks

    def clock(self) -> float:
        return self.now

    def run(self, plan: StepPlan) -> StepResult:
        self.plans.append(plan)
        written = []
        for row in plan.rows:
            ids = row.block_table.ids.tolist()
            assert all(0 <= block < self._blocks.total for block in ids)
            end, size = row.start + len(row.tokens), self._blocks.block_size
            assert len(ids) * size >= end
            written += [(ids[at // size], at % size) for at in range(row.start, end)]
        assert len(set(written)) == len(written), "one place is written twice in a step"
        self.now += self.factor * sum(a * b for a, b in zip(features(plan), TRUE, strict=True))
        return StepResult([0] * len(plan.rows))


@given(
    blocks=st.integers(1, 300),
    size=st.sampled_from([1, 4, 16, 64]),
    tokens=st.integers(1, 600),
    running=st.integers(1, 80),
)
def test_synthetic_steps_fit_any_worker(blocks: int, size: int, tokens: int, running: int) -> None:
    ledger = BlockLedger(blocks, size)
    machine = Machine(ledger)
    calibrate(StepModel(), machine, ledger, Limits(tokens, running), 1e9, machine.clock)
    assert all(0 < plan.token_count <= tokens and len(plan.rows) <= running for plan in machine.plans)
    assert all(row.sampling is not None for plan in machine.plans for row in plan.rows), "nobody would wait"
    ledger.check(at_rest=True)
    assert ledger.available == ledger.total and not ledger.evictions


def test_it_finds_what_the_machine_costs() -> None:
    ledger = BlockLedger(2000, 16)
    machine = Machine(ledger)
    model = starting_costs(machine, ledger, Limits(), 1e9, Profile(None), machine.clock)
    assert model.costs.seen
    found = model.costs.step
    for step in ((1, 8, 4000, 0, 0), (1, 0, 0, 512, 512 * 256), (1, 1, 100, 0, 0)):
        coefficients = (found.base_s, found.sequence_s, found.kv_token_s, found.token_s, found.attention_s)
        predicted = sum(a * b for a, b in zip(step, coefficients, strict=True))
        assert predicted == pytest.approx(sum(a * b for a, b in zip(step, TRUE, strict=True)), rel=0.1)


def test_a_slow_machine_is_measured_only_for_so_long() -> None:
    ledger = BlockLedger(2000, 16)
    machine = Machine(ledger, factor=40.0)
    calibrate(StepModel(), machine, ledger, Limits(), 1.0, machine.clock)
    slowest = max(40 * sum(a * b for a, b in zip(features(p), TRUE, strict=True)) for p in machine.plans)
    assert machine.now <= 1.0 + slowest


def _spec(folder: Path, **changes: object) -> WorkerSpec:
    settings = {"role": "decode", "worker_id": "d", "incarnation": "i", "token": "t", "model_path": "m"}
    return WorkerSpec(**{**settings, "profile_dir": str(folder), **changes})  # type: ignore[arg-type]


def test_a_profile_is_kept_from_life_to_life(tmp_path: Path) -> None:
    profile = Profile.of(_spec(tmp_path / "new"), "model", "float32")
    ledger = BlockLedger(100, 16)
    machine = Machine(ledger)
    assert profile.load() is None
    first = starting_costs(machine, ledger, Limits(), 1e9, profile, machine.clock).costs
    steps = len(machine.plans)
    assert starting_costs(machine, ledger, Limits(), 1e9, profile, machine.clock).costs.step == first.step
    assert len(machine.plans) == steps, "nothing is measured when a profile is there"
    profile.save(Costs(step=StepCosts(1.0), handoffs=[HandoffCost("p")], seen=9))
    found = profile.load()
    assert found is not None
    assert (found.step.base_s, found.handoffs) == (1.0, [])
    assert [file.suffix for file in (tmp_path / "new").iterdir()] == [".json"]


def test_profiles_are_told_apart_by_all_that_changes_them(tmp_path: Path) -> None:
    paths = {
        Profile.of(_spec(tmp_path, **changes), model, dtype).path
        for model in ("a", "b")
        for dtype in ("float32", "bfloat16")
        for changes in ({}, {"threads": 2}, {"device": "cuda"}, {"tensor_parallel": 2})
    }
    assert len(paths) == 16


def test_a_profile_that_cannot_be_read_is_measured_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    profile = Profile.of(_spec(tmp_path), "model", "float32")
    assert profile.path is not None
    profile.path.write_text("{")
    ledger = BlockLedger(100, 16)
    machine = Machine(ledger)
    with caplog.at_level(logging.WARNING, logger="baton.rank"):
        assert starting_costs(machine, ledger, Limits(), 1e9, profile, machine.clock).costs.seen
    assert "measuring anew" in caplog.text


def test_without_either_it_guesses(tmp_path: Path) -> None:
    ledger = BlockLedger(100, 16)
    machine = Machine(ledger)
    profile = Profile.of(_spec(tmp_path), "model", "float32")
    assert not starting_costs(machine, ledger, Limits(), 0.0, profile, machine.clock).costs.seen
    assert not machine.plans
    profile.save(Costs())
    assert profile.load() is None, "guesses are not kept"
