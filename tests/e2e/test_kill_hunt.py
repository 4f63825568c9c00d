"""Ten of the kills of `scripts/kill-hunt`: nothing lost, nothing wrong, nothing left, and the process did die there."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.deployment import TINY
from tests.support.hunt import POINTS, hunting

pytestmark = [pytest.mark.e2e, pytest.mark.nixl, pytest.mark.timeout(240)]


async def test_workers_die_at_every_point_of_a_hand_off(tmp_path: Path) -> None:
    async with hunting(tmp_path, TINY) as hunt:
        async with hunt.load(streams=8):
            # In turn, so that most workers of a role are there while others start again.
            for point in sorted(POINTS, key=lambda point: POINTS.index(point) * 7 % len(POINTS)):
                await hunt.at_point(point, "kill", patient=False)
            await hunt.whole()
        await hunt.settle()
        report = hunt.report
        assert report.good, "\n".join(report.lines())
        assert report.strikes == {f"{point} kill": 1 for point in POINTS}
        assert report.remote > len(POINTS)
