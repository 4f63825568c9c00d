"""The soak: counts, tells how to replay what it finds, keeps within its limits; its seeds are as large as said."""

from __future__ import annotations

import io
import re
import time
from collections import Counter
from random import Random

import pytest

from simulation import soak as soaking
from simulation.run import Report, run_seed
from simulation.settings import draw_settings
from simulation.soak import soak
from simulation.transitions import allowed


def fails_at_three(seed: int) -> Report:
    """Stands for a run: at module level, so that other processes find it."""
    moves = Counter({allowed()[0]: 2})
    return Report(seed, ["two owners"] if seed == 3 else [], Counter(requests=50), moves, events=10)


def test_what_is_found_is_told_with_the_line_that_replays_it() -> None:
    out = io.StringIO()
    result = soak(0, 5, processes=1, run=fails_at_three, out=out)
    assert (result.seeds, result.failed, result.requests, result.events) == (5, 1, 250, 50)
    assert "seed 3: two owners\n  replay: ./scripts/soak --seeds 1 --seed 3\n" in out.getvalue()
    assert out.getvalue().splitlines()[-1].startswith("5 seeds, 1 with violations, 250 requests, 50 events")


def test_the_table_names_what_was_never_taken() -> None:
    table = soak(0, 5, processes=1, run=fails_at_three, out=io.StringIO()).table()
    assert re.search(r"request +ARRIVED -> PARKED +10\n", table)
    assert table.count(" never\n") == len(allowed()) - 1
    assert table.endswith(f"{len(allowed())} transitions, {len(allowed()) - 1} never taken")


def test_stop_ends_at_the_first_violation() -> None:
    assert soak(0, None, processes=1, run=fails_at_three, stop=True, out=io.StringIO()).seeds == 4


def test_processes_share_the_seeds() -> None:
    result = soak(0, 30, processes=2, run=fails_at_three, out=io.StringIO())
    assert (result.seeds, result.failed) == (30, 1)


def test_seconds_end_it() -> None:
    assert not soak(0, None, 0.0, processes=1, run=fails_at_three, out=io.StringIO()).seeds
    assert not soak(0, None, 0.0, processes=2, run=fails_at_three, out=io.StringIO()).seeds


def test_a_run_that_goes_round_in_circles_is_a_violation(monkeypatch: pytest.MonkeyPatch) -> None:
    def circles(self: object, seed: int) -> None:
        while True:
            time.sleep(0.01)

    monkeypatch.setattr(soaking, "SEED_LIMIT_S", 0.05)
    monkeypatch.setattr("simulation.run.Deployment.__init__", lambda *_: circles(None, 0))
    assert "more than 0.05 s" in soaking.soak_seed(0).violations[0]


def test_its_seeds_are_large() -> None:
    for seed in range(200):
        settings = draw_settings(Random(seed), soak=True)
        roles = Counter(spec.decode for spec in settings.nodes)
        assert roles[True] >= 2 and roles[False] >= 2
        assert settings.requests >= 50 and sum(settings.faults.values()) >= 3


def test_real_seeds_hold() -> None:
    for seed in range(3):
        assert not run_seed(seed, soak=True).violations
