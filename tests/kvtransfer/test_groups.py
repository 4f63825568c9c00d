"""How many layer groups: few on quick links, many on slow ones, never pieces that are slow by themselves."""

from __future__ import annotations

import random
from typing import Any

import pytest

from kvtransfer.groups import LEAST_PIECE_BYTES, LinkModel, layer_groups

MIB = 1 << 20


def groups(**changes: Any) -> int:
    usual: dict[str, Any] = {
        "layers": 32,
        "range_bytes": 16 * MIB,
        "piece_bytes": 4 * MIB,
        "compute_s": 0.02,
        "bytes_per_s": 1e9,
        "latency_s": 50e-6,
    }
    return layer_groups(**usual | changes)


def test_enough_that_the_last_ones_transfer_is_small_beside_its_compute() -> None:
    assert groups() == 9  # 16.8 ms to send, 2 ms may show
    assert groups(bytes_per_s=100e9) == 1
    assert groups(bytes_per_s=0.5e9) == 17
    assert groups(bytes_per_s=0.01e9) == 32  # no more than there are layers


def test_pieces_stay_large_and_groups_well_above_the_latency() -> None:
    assert groups(bytes_per_s=0.01e9, piece_bytes=5 * LEAST_PIECE_BYTES) == 5
    assert groups(bytes_per_s=0.01e9, piece_bytes=100) == 1
    assert groups(latency_s=1e-3) == 2
    assert groups(latency_s=1.0) == 1


@pytest.mark.parametrize("unknown", ["bytes_per_s", "compute_s"])
def test_without_a_measurement_it_is_one(unknown: str) -> None:
    assert groups(**{unknown: 0.0}) == 1


def test_a_link_is_learned_from_writes_of_several_sizes() -> None:
    link, chance = LinkModel(), random.Random(0)
    assert link.measured == (0.0, 0.0)
    for _ in range(200):
        size = chance.choice((MIB, 4 * MIB, 16 * MIB))
        link.add(size, (2e-3 + size / 1e9) * chance.uniform(0.9, 1.1))
    bytes_per_s, latency_s = link.measured
    assert bytes_per_s == pytest.approx(1e9, rel=0.1)
    assert latency_s == pytest.approx(2e-3, rel=0.3)
    for _ in range(200):  # the link has become slower
        size = chance.choice((MIB, 4 * MIB, 16 * MIB))
        link.add(size, size / 1e8)
    assert link.measured[0] == pytest.approx(1e8, rel=0.1)


def test_writes_of_one_size_tell_a_rate_only() -> None:
    link = LinkModel()
    for _ in range(5):
        link.add(MIB, 1e-3)
    link.add(0, 1.0)  # a rank that has no piece of a chunk
    bytes_per_s, latency_s = link.measured
    assert bytes_per_s == pytest.approx(MIB / 1e-3) and not latency_s
