"""What a rank logs while it reads its weights."""

from __future__ import annotations

import itertools
import logging

import pytest

from worker.rank_parts import _logged


@pytest.mark.parametrize(("total", "lines"), [((1 << 30) - 1, 0), (1 << 30, 10), (7 << 30, 10)])
def test_a_line_for_each_tenth_of_a_large_model(
    total: int, lines: int, caplog: pytest.LogCaptureFixture
) -> None:
    progress = _logged(itertools.count(5.0).__next__)
    with caplog.at_level(logging.INFO, logger="baton.rank"):
        for part in range(1001):
            progress(total * part // 1000, total)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == lines
    if said:
        assert said[0] == f"weights: 10 % of {total / 2**30:.1f} GiB after 1 s"
        assert said[-1].startswith("weights: 100 %")
