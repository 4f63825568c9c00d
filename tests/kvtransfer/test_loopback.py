"""The loopback's faults happen as described, and again for the same seed."""

from __future__ import annotations

import numpy as np
import pytest

from kvtransfer.loopback import LoopbackFabric, LoopbackFaults, LoopbackTransport
from kvtransfer.transport import Rows

PIECES = 16
PIECE = 64


def rows() -> Rows:
    at = np.arange(PIECES, dtype=np.uint64) * PIECE
    return np.stack([at, at, np.full(PIECES, PIECE, dtype=np.uint64)], axis=1)


def pair(
    faults: LoopbackFaults, seed: int = 0
) -> tuple[LoopbackFabric, LoopbackTransport, LoopbackTransport]:
    fabric = LoopbackFabric(seed, faults)
    size = PIECES * PIECE
    here = fabric.open("here", staging_bytes=size, landing_bytes=size)
    there = fabric.open("there", staging_bytes=size, landing_bytes=size)
    here.connect("there", there.describe())
    there.connect("here", here.describe())
    here.staging[:] = np.random.default_rng(seed).integers(1, 256, size, np.uint8)
    return fabric, here, there


def landed(endpoint: LoopbackTransport) -> set[int]:
    """The pieces of which anything has landed."""
    return {int(piece) for piece in np.flatnonzero(endpoint.landing.reshape(PIECES, PIECE).any(axis=1))}


ALL = set(range(PIECES))
EVERYTHING = LoopbackFaults(
    delay=(0, 9), late=(1, 9), reorder=True, lose=0.2, fail=0.2, duplicate=0.2, corrupt=0.2
)


def story(seed: int) -> list[object]:
    """All that can be seen of 30 writes, the receiver's bytes at every tick included."""
    _, here, there = pair(EVERYTHING, seed)
    seen: list[object] = []
    for step in range(90):
        if step % 3 == 0:
            here.write("there", rows())
        seen.append(([(settled.ticket, settled.error) for settled in here.poll()], there.landing.tobytes()))
    return seen


def test_the_same_seed_gives_the_same_story_and_another_another() -> None:
    assert story(1) == story(1)
    assert story(1) != story(2)


def test_it_settles_when_all_has_landed_and_not_before() -> None:
    _, here, there = pair(LoopbackFaults(delay=(3, 20), reorder=True))
    ticket = here.write("there", rows())
    partly = False
    while not (settled := here.poll()):
        partly |= bool(landed(there)) and landed(there) != ALL
    assert [(one.ticket, one.error) for one in settled] == [(ticket, "")]
    assert partly and np.array_equal(there.landing, here.staging)


def test_reordering_lets_later_pieces_land_first() -> None:
    _, here, there = pair(LoopbackFaults(delay=(0, 20), reorder=True))
    here.write("there", rows())
    orders = []
    while len(landed(there)) < PIECES:
        orders.append(landed(there))
        here.poll()
    assert any(some and some != set(range(len(some))) for some in orders)


def test_staging_is_read_when_the_bytes_travel() -> None:
    _, here, there = pair(LoopbackFaults(delay=(5, 5)))
    here.write("there", rows())
    here.staging[:] = 7  # reused too early
    while not here.poll():
        pass
    assert (there.landing == 7).all()


def test_a_lost_write_settles_only_when_its_peer_is_dead() -> None:
    fabric, here, there = pair(LoopbackFaults(lose=1.0))
    ticket = here.write("there", rows())
    fabric.advance(10**6)
    assert here.poll() == [] and landed(there) != ALL
    fabric.kill("there")
    assert [(one.ticket, bool(one.error)) for one in here.poll()] == [(ticket, True)]


def test_a_failed_write_lands_after_it_has_failed_with_the_bytes_of_then() -> None:
    fabric, here, there = pair(LoopbackFaults(fail=1.0, late=(50, 50)))
    here.write("there", rows())
    settled = here.poll()
    assert len(settled) == 1 and settled[0].error
    before = landed(there)
    sent = here.staging.copy()
    here.staging[:] = 0  # settled: it may be reused
    fabric.advance(100)
    assert landed(there) > before
    assert np.array_equal(there.landing, sent)
    assert here.poll() == []


def test_a_duplicate_lands_once_more_after_the_slot_was_reused() -> None:
    fabric, here, there = pair(LoopbackFaults(duplicate=1.0, late=(50, 50)))
    here.write("there", rows())
    assert not here.poll()[0].error
    there.landing[:] = 0
    fabric.advance(100)
    assert np.array_equal(there.landing, here.staging)
    assert here.poll() == []


def test_corruption_is_one_bit_and_the_write_settles_well() -> None:
    _, here, there = pair(LoopbackFaults(corrupt=1.0))
    here.write("there", rows())
    assert not here.poll()[0].error
    assert int(np.unpackbits(there.landing ^ here.staging).sum()) == 1


@pytest.mark.parametrize("seed", range(5))
def test_a_dead_sender_is_gone_only_when_nothing_of_it_can_land(seed: int) -> None:
    fabric, here, there = pair(LoopbackFaults(delay=(1, 40), reorder=True), seed)
    here.write("there", rows())
    fabric.advance(10)
    fabric.kill("here")
    at_death = landed(there)
    assert not there.gone("here")
    while not there.gone("here"):
        there.poll()
    at_the_end = landed(there)
    assert at_death < at_the_end < ALL  # some was in the air, some had not left
    fabric.advance(10**6)
    assert landed(there) == at_the_end


def test_a_hung_peer_moves_nothing_until_it_goes_on() -> None:
    fabric, here, there = pair(LoopbackFaults())
    fabric.hang("there")
    ticket = here.write("there", rows())
    fabric.advance(10**6)
    assert here.poll() == [] and not landed(there) and not here.gone("there")
    fabric.resume("there")
    assert [one.ticket for one in here.poll()] == [ticket] and landed(there) == ALL
