"""One outcome for each lease, whatever is said and in whichever order; a quarantine ends by the right word only."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from engine.ledger import SlotLedger
from engine.lifecycle import IllegalTransition
from kvtransfer.leases import LEASES, LeaseBook, LeaseState
from kvtransfer.messages import ChunkDone, Lease

SLOTS = 4
PEERS = ["p1", "p2"]
HANDOFFS = [1, 2, 3]
EPOCHS = [1, 2]


class Said:
    """The model's record of one lease: to whom, and what became of it."""

    def __init__(self, lease: Lease, handoff_id: int, peer: str) -> None:
        self.lease = lease
        self.handoff_id = handoff_id
        self.peer = peer
        self.state = "granted"  # landed, completed, aborted, quarantined, over


class LeaseMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.book = LeaseBook(SlotLedger(SLOTS))
        self.said: list[Said] = []
        self.late = 0

    def of_state(self, *states: str) -> list[Said]:
        return [said for said in self.said if said.state in states]

    @rule(
        handoff=st.sampled_from(HANDOFFS), peer=st.sampled_from(PEERS), epoch=st.sampled_from(EPOCHS),
        chunk=st.integers(0, 1),
    )  # fmt: skip
    def grant(self, handoff: int, peer: str, epoch: int, chunk: int) -> None:
        busy = {said.lease.slot for said in self.of_state("granted", "landed", "quarantined")}
        lease = self.book.grant(handoff, peer, epoch, chunk, 1.0)
        assert (lease is None) == (len(busy) == SLOTS)
        if lease is not None:
            assert lease.slot not in busy
            assert lease.lease_id not in {said.lease.lease_id for said in self.said}
            self.said.append(Said(lease, handoff, peer))

    @rule(data=st.data(), wrong=st.sampled_from(["", "", "", "peer", "handoff", "epoch", "chunk", "lease"]))
    def landed(self, data: st.DataObject, wrong: str) -> None:
        if not self.said:
            return
        said = data.draw(st.sampled_from(self.of_state("granted") * 3 + self.said))
        lease = said.lease
        done = ChunkDone(
            said.handoff_id + (wrong == "handoff"),
            lease.lease_id + (1000 if wrong == "lease" else 0),
            lease.epoch + (wrong == "epoch"),
            lease.chunk + (wrong == "chunk"),
            8,
            [],
        )
        record = self.book.landed("someone else" if wrong == "peer" else said.peer, done)
        if wrong or said.state != "granted":
            assert record is None
            self.late += 1
        else:
            assert record is not None
            assert record.lease == lease
            assert record.state is LeaseState.LANDED
            said.state = "landed"
        assert self.book.late_messages == self.late

    @rule(data=st.data(), used=st.booleans())
    def copied_out(self, data: st.DataObject, used: bool) -> None:
        landed = self.of_state("landed")
        if landed:
            said = data.draw(st.sampled_from(landed))
            self.book.copied_out(said.lease.lease_id, used=used)
            said.state = "over"

    @rule(handoff=st.sampled_from(HANDOFFS), expired=st.booleans())
    def abandon(self, handoff: int, expired: bool) -> None:
        closing = [said for said in self.of_state("granted") if said.handoff_id == handoff]
        assert self.book.abandon(handoff, expired=expired) == len(closing)
        for said in closing:
            said.state = "quarantined"

    @rule(peer=st.sampled_from(PEERS), handoff=st.sampled_from([0, *HANDOFFS]), epoch=st.sampled_from(EPOCHS))
    def quiet(self, peer: str, handoff: int, epoch: int) -> None:
        ending = [
            said
            for said in self.of_state("quarantined")
            if said.peer == peer and said.lease.epoch <= epoch and handoff in (0, said.handoff_id)
        ]
        assert self.book.quiet(peer, handoff, epoch) == len(ending)
        for said in ending:
            said.state = "over"

    @rule(peer=st.sampled_from(PEERS))
    def gone(self, peer: str) -> None:
        ending = [said for said in self.of_state("quarantined") if said.peer == peer]
        assert self.book.gone(peer) == len(ending)
        for said in ending:
            said.state = "over"

    @invariant()
    def slots_are_as_the_leases_say(self) -> None:
        slots = self.book.slots
        slots.check()
        assert slots.leased == len(self.of_state("granted", "landed")) == self.book.open_count
        assert slots.quarantined == len(self.of_state("quarantined"))
        assert set(self.book.quarantined_peers()) == {said.peer for said in self.of_state("quarantined")}


LeaseMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestLeases = LeaseMachine.TestCase


def one_lease() -> tuple[LeaseBook, Lease, ChunkDone]:
    book = LeaseBook(SlotLedger(1))
    lease = book.grant(7, "peer", 1, 0, 1.0)
    assert lease is not None
    return book, lease, ChunkDone(7, lease.lease_id, 1, 0, 8, [])


def test_a_landed_lease_is_not_quarantined_when_its_handoff_is_given_up() -> None:
    """Its write has settled: the slot is free as soon as the copy has ended."""
    book, lease, done = one_lease()
    record = book.landed("peer", done)
    assert record is not None
    assert book.abandon(7) == 0
    assert book.slots.quarantined == 0
    book.copied_out(lease.lease_id, used=False)
    assert record.state is LeaseState.ABORTED
    assert book.slots.free == 1


def test_a_lease_completes_once() -> None:
    book, lease, done = one_lease()
    book.landed("peer", done)
    book.copied_out(lease.lease_id, used=True)
    with pytest.raises(KeyError):
        book.copied_out(lease.lease_id, used=True)
    assert book.landed("peer", done) is None
    assert book.late_messages == 1


def test_an_aborted_lease_cannot_land() -> None:
    book, _, done = one_lease()
    book.abandon(7, expired=True)
    assert book.landed("peer", done) is None
    assert book.slots.quarantined == 1


@pytest.mark.parametrize(
    ("peer", "handoff_id", "epoch"), [("other", 7, 1), ("peer", 8, 1), ("peer", 7, 0), ("peer", 0, 0)]
)
def test_another_peers_handoffs_or_epochs_quiet_ends_no_quarantine(
    peer: str, handoff_id: int, epoch: int
) -> None:
    book, _, _ = one_lease()
    book.abandon(7)
    assert book.quiet(peer, handoff_id, epoch) == 0
    assert book.slots.quarantined == 1
    assert book.quiet("peer", 7, 1) == 1
    assert book.slots.free == 1


def test_outcomes_are_final() -> None:
    for outcome in (LeaseState.COMPLETED, LeaseState.ABORTED, LeaseState.EXPIRED):
        for after in LeaseState:
            with pytest.raises(IllegalTransition):
                LEASES.move(outcome, after)
