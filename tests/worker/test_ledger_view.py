"""Who holds what, as operators read it: owners and leases by age, quarantined bytes, and the proof at rest."""

from __future__ import annotations

from decode.role import DecodeRole
from engine.ledger import BlockLedger, SlotLedger
from engine.scheduler import Limits
from kvtransfer.messages import Lease
from tests.decode.desk import CHUNK, Desk, hello, prompt_of
from worker import ledger_view
from worker.messages import LedgerRead, ReadLedger
from worker.spec import WorkerSpec


def _desk(**how: float) -> Desk:
    desk = Desk(timeout_s=10.0, **how)  # type: ignore[arg-type]
    desk.peer_up()
    return desk


def _read(desk: Desk, oldest: int = 16) -> LedgerRead:
    return ledger_view.read(desk.role, ReadLedger(7, oldest), desk.now)


def _spec() -> WorkerSpec:
    return WorkerSpec(role="decode", worker_id="decode-0", incarnation="d1", token="t", model_path="m")


def test_at_rest_every_block_was_looked_at() -> None:
    desk = _desk()
    request = desk.submit(prompt_of(30))
    desk.run()
    assert desk.right(request)
    found = _read(desk)
    assert (found.call, found.at_rest, found.checked, found.broken) == (7, True, True, "")
    assert found.counts.blocks_free + found.counts.blocks_cached == found.counts.blocks_total
    assert not found.owners and not found.oldest and not found.leases


def test_a_leak_is_told_at_rest() -> None:
    desk = _desk()
    desk.ledger.take(1)
    assert "at rest, but 1 held" in _read(desk).broken
    leak = DecodeRole(hello("d", "d"), BlockLedger(8, 4), SlotLedger(0), Limits(64, 8))
    leak.blocks._state[3] = leak.blocks._state[3].__class__.LANDING
    assert ledger_view.read(leak, ReadLedger(1, 1), 0.0).broken


def test_owners_by_age_the_oldest_first() -> None:
    desk = _desk()
    first = desk.submit(prompt_of(12), max_tokens=40)
    desk.turn()
    desk.now += 2.0
    second = desk.submit(prompt_of(20, first=7), max_tokens=40)
    desk.turn()
    desk.now += 1.0
    found = _read(desk)
    assert not found.at_rest and not found.checked
    assert [(owner.name, owner.kind, owner.state, owner.age_s) for owner in found.oldest] == [
        (first.request_id, "request", "decoding", 3.0),
        (second.request_id, "request", "decoding", 1.0),
    ]
    assert sum(owner.blocks for owner in found.oldest) == found.counts.blocks_held
    fewer = _read(desk, oldest=1)
    assert fewer.owners == 2 and [owner.name for owner in fewer.oldest] == [first.request_id]


def test_leases_granted_landed_and_quarantined() -> None:
    desk = _desk()
    desk.submit(prompt_of(25), to="prefill")
    begin, leases = desk.begun()
    desk.copies = False
    desk.say(desk.write(begin, leases[0]))
    desk.turn()
    desk.now += 4.0
    found = _read(desk)
    assert found.lease_count == 3
    assert {(lease.chunk, lease.state, lease.age_s) for lease in found.leases} == {
        (0, "landed", 4.0),
        (1, "granted", 4.0),
        (2, "granted", 4.0),
    }
    (chunk,) = [owner for owner in found.oldest if owner.kind == "chunk"]
    assert (chunk.name, chunk.state, chunk.blocks) == ("p1/1", "chunk 0", 2)
    assert chunk.blocks == found.counts.blocks_landing
    desk.peer_lost()
    told = ledger_view.told(_spec(), _read(desk), slot_bytes=CHUNK * 8)
    assert [lease.state for lease in told.leases].count("quarantined") == 2
    assert told.quarantined_bytes == 2 * CHUNK * 8
    assert told.leases[0].peer == "p1" and told.worker_id == "decode-0"


def test_a_verified_chunk_that_waits_for_an_earlier_one_is_the_hand_offs() -> None:
    desk = _desk()
    desk.submit(prompt_of(25), to="prefill")
    begin, leases = desk.begun()
    desk.say(desk.write(begin, leases[1]))
    desk.turn()
    (owner,) = _read(desk).oldest
    assert (owner.kind, owner.state, owner.blocks) == ("hand-off", "0 of 3 chunks", 2)
    assert owner.left_s == 10.0
    assert isinstance(leases[0], Lease)
