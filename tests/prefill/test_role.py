"""The prefill role as scenes: what it computes, what it sends, and what it says when anything goes wrong."""

from __future__ import annotations

import math
from typing import Any, TypeVar

import numpy as np
import pytest

from engine.api import PeerLink
from engine.ledger import BlockLedger
from engine.scheduler import Limits
from kvtransfer.chunks import chunks
from kvtransfer.handshake import CAPABILITIES
from kvtransfer.messages import (
    Abort,
    Begin,
    Connect,
    Connected,
    ControlMessage,
    Credit,
    Disconnect,
    Done,
    Failed,
    Hello,
    KvSpec,
    Lease,
    Linked,
    Measured,
    MoverJob,
    Quiet,
    SendChunk,
    Sent,
)
from prefill.role import STARVED_S, PrefillRole
from simulation.model import KV_BYTES, VOCABULARY, Model, kv_of
from worker.messages import FromPeer, PeerLost, PeerRefused, PeerUp, ToPeer

BLOCK, CHUNK = 4, 8
Message = TypeVar("Message")


def hello(
    worker_id: str,
    incarnation: str,
    epoch: int = 0,
    model: str = "m",
    *,
    block_size: int = BLOCK,
    chunk_tokens: int = CHUNK,
    wire_dtype: str = "",
) -> Hello:
    kv = KvSpec(
        model=model,
        layers=1,
        q_heads=1,
        kv_heads=1,
        head_dim=1,
        dtype="float32",
        block_size=block_size,
        chunk_tokens=chunk_tokens,
        wire_dtype=wire_dtype,
    )
    return Hello(
        worker_id=worker_id,
        incarnation=incarnation,
        kv=kv,
        transport="t",
        endpoints=[b""],
        epoch=epoch,
        capabilities=list(CAPABILITIES),
        slot_count=8,
        slot_bytes=[chunk_tokens * KV_BYTES],
    )


def prompt_of(length: int, first: int = 0) -> list[int]:
    return [(first + position) % VOCABULARY for position in range(length)]


class Desk:
    """A prefill role with time by hand, a mover whose writes settle when a test says so, and decode workers `d1`..."""

    def __init__(
        self,
        *,
        blocks: int = 60,
        limits: Limits | None = None,
        max_waiting: int = 50,
        min_bandwidth: float = 0.0,
    ) -> None:
        self.now = 0.0
        self.model = Model(blocks, BLOCK)
        self.ledger = BlockLedger(blocks, BLOCK)
        self.role = PrefillRole(
            hello("prefill", "p1"),
            self.ledger,
            limits or Limits(64, 8),
            max_waiting=max_waiting,
            min_bandwidth=min_bandwidth,
        )
        self.begun: dict[tuple[str, int], Begin] = {}
        self.said: list[ToPeer] = []
        self.jobs: list[MoverJob] = []
        self.refused: list[PeerRefused] = []
        self._lease = 0

    # ---- turns -----------------------------------------------------------------------------------------------------

    def turn(self) -> bool:
        self.role.tick(self.now)
        plan = self.role.schedule(self.now)
        self._carry_out()
        if plan is not None:
            self.role.commit(plan, self.model.run(plan, self.role.scheduler.planned), self.now)
            self._carry_out()
        self.ledger.check(at_rest=self.role.at_rest)
        return plan is not None

    def run(self) -> None:
        for _ in range(1000):
            if not self.turn():
                return
        raise AssertionError("it never comes to an end")

    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.run()

    def _carry_out(self) -> None:
        for action in self.role.drain():
            if isinstance(action, ToPeer):
                self.said.append(action)
            elif isinstance(action, PeerRefused):
                self.refused.append(action)
            else:
                assert isinstance(action, Connect | Disconnect | SendChunk)
                self.jobs.append(action)

    def read(self, peer: str = "d1") -> list[ControlMessage]:
        """What was said to the peer since the last read, but for `Linked`."""
        self._carry_out()
        found = [said.message for said in self.said if said.peer == peer]
        self.said = [said for said in self.said if said.peer != peer]
        return [message for message in found if not isinstance(message, Linked)]

    def read_jobs(self, kind: type[Message]) -> list[Message]:
        self._carry_out()
        found: list[Message] = [job for job in self.jobs if isinstance(job, kind)]
        self.jobs = [job for job in self.jobs if not isinstance(job, kind)]
        return found

    # ---- decode workers ----------------------------------------------------------------------------------------------

    def peer_up(self, peer: str = "d1", epoch: int = 1, **kv: Any) -> None:
        self.role.handle(PeerUp(hello(peer, peer, epoch, **kv)), self.now)
        self.role.report(Connected(peer), self.now)

    def say(self, message: ControlMessage, peer: str = "d1", epoch: int = 1) -> None:
        self.role.handle(FromPeer(peer, epoch, message), self.now)

    def begin(
        self,
        handoff: int,
        tokens: list[int],
        *,
        start: int = 0,
        peer: str = "d1",
        epoch: int = 1,
        deadline_s: float = 10.0,
    ) -> None:
        begin = Begin(handoff_id=handoff, request_id="r", tokens=tokens, start=start, deadline_s=deadline_s)
        self.begun[peer, handoff] = begin
        self.say(begin, peer, epoch)

    def credit(
        self, handoff: int, *parts: int, peer: str = "d1", epoch: int = 1, lease_s: float = 1000.0
    ) -> None:
        leases = []
        for chunk in parts:
            self._lease += 1
            leases.append(Lease(self._lease, epoch, chunk, 0, lease_s))
        self.say(Credit(handoff, leases), peer, epoch)

    def sent(self) -> list[SendChunk]:
        """The writes that were asked for since the last call; the KV that they read must be right now."""
        writes = self.read_jobs(SendChunk)
        for write in writes:
            self.gathers(write)
        return writes

    def gathers(self, write: SendChunk) -> None:
        begin = self.begun[write.peer, write.handoff_id]
        first, count = chunks(begin.start, len(begin.tokens), CHUNK)[write.lease.chunk]
        assert (write.first_token, write.tokens) == (first, count)
        (found,) = self.model.gather(write.blocks, write.blocks_start, first, count)
        assert found.tolist() == kv_of(begin.tokens, begin.salt, [])[first : first + count]

    def settle(self, write: SendChunk, error: str = "") -> None:
        """The write has ended; until now its source blocks had to be what they were."""
        self.gathers(write)
        size = 0 if error else write.tokens * KV_BYTES
        report = Sent(write.peer, write.handoff_id, write.lease.lease_id, write.lease.chunk, size, error)
        self.role.report(report, self.now)

    def fill(self, desk_tokens: int, first: int = 0) -> None:
        """Computes a prompt for a peer of its own and finishes it: it stays in the cache."""
        self.peer_up("filler")
        self.begin(99, prompt_of(desk_tokens, first), peer="filler")
        self.credit(99, *range(len(chunks(0, desk_tokens, CHUNK))), peer="filler")
        self.run()
        for write in self.sent():
            self.settle(write)
        self.turn()
        self.read("filler")


@pytest.fixture
def desk() -> Desk:
    desk = Desk()
    desk.peer_up()
    desk.turn()
    desk.read_jobs(Connect)
    return desk


# ---- the life of a hand-off ----------------------------------------------------------------------------------------


def test_chunks_leave_while_the_next_is_computed_and_done_ends_it() -> None:
    desk = Desk(limits=Limits(CHUNK, 8))
    desk.peer_up()
    desk.begin(1, prompt_of(20))
    desk.credit(1, 0, 1, 2)
    writes = []
    for expected in range(3):
        desk.turn()
        (write,) = desk.sent()
        assert write.lease.chunk == expected
        writes.append(write)
    for write in reversed(writes):  # they settle in any order
        assert desk.read() == []
        desk.settle(write)
    (done,) = desk.read()
    assert isinstance(done, Done)
    assert desk.role.at_rest
    assert desk.ledger.held == 0
    assert desk.ledger.cached == 5


def test_nothing_is_sent_without_credit_or_before_it_is_computed(desk: Desk) -> None:
    desk.begin(1, prompt_of(20))
    desk.credit(1, 1)
    desk.run()
    assert not desk.sent()  # chunk 0 has none, and chunks leave in order
    desk.credit(1, 0)
    assert [write.lease.chunk for write in desk.sent()] == [0, 1]
    desk.begin(2, prompt_of(20, first=5))
    desk.credit(2, 0)
    assert not desk.sent()
    desk.turn()
    assert [write.handoff_id for write in desk.sent()] == [2]


def test_it_hands_over_from_where_the_decode_worker_has_no_kv(desk: Desk) -> None:
    desk.begin(1, prompt_of(20), start=12)
    desk.credit(1, 0)
    desk.run()
    (write,) = desk.sent()
    assert (write.first_token, write.tokens, write.blocks_start) == (12, 8, 12)
    assert len(write.blocks) == 2


def test_a_cached_prompt_leaves_without_being_computed_again(desk: Desk) -> None:
    desk.fill(20)
    desk.begin(1, prompt_of(20))
    desk.credit(1, 0, 1, 2)
    plan = desk.role.schedule(desk.now)
    assert plan is not None
    assert plan.token_count == BLOCK  # the last block is always computed anew
    assert [write.lease.chunk for write in desk.sent()] == [0, 1]
    desk.role.commit(plan, desk.model.run(plan, desk.role.scheduler.planned), desk.now)
    desk.gathers(desk.sent()[0])


def test_block_sizes_may_differ_from_the_chunks_of_the_pair() -> None:
    """Chunks that begin in the middle of a block of ours are gathered from there."""
    desk = Desk()
    desk.peer_up()
    desk.begin(1, prompt_of(21), start=2)
    desk.credit(1, 0, 1, 2)
    desk.run()
    writes = desk.sent()
    assert [write.first_token for write in writes] == [2, 10, 18]
    assert [write.blocks_start for write in writes] == [0, 8, 16]


def test_each_peer_has_a_grid_of_its_own() -> None:
    """Whole blocks of the decode worker, at most what both sides hold."""
    desk = Desk()
    desk.peer_up("d1", block_size=8, chunk_tokens=64)
    desk.peer_up("d2", block_size=3, chunk_tokens=7)
    for peer, firsts in (("d1", [0, 8, 16]), ("d2", [0, 6, 12, 18])):
        desk.begin(1, prompt_of(21), peer=peer)
        desk.credit(1, *range(len(firsts)), peer=peer)
        desk.run()
        writes = desk.read_jobs(SendChunk)
        assert [write.first_token for write in writes] == firsts
        for write in writes:
            desk.role.report(Sent(peer, 1, write.lease.lease_id, write.lease.chunk, 8), desk.now)


# ---- refusals --------------------------------------------------------------------------------------------------------


def refusal(desk: Desk, handoff: int = 1) -> str:
    """It failed, and nothing of it is or will be in flight."""
    failed, quiet = desk.read()
    assert isinstance(failed, Failed)
    assert failed.handoff_id == handoff
    assert quiet == Quiet(handoff, 1)
    return failed.reason


def test_too_long_a_prompt_is_refused() -> None:
    desk = Desk(blocks=4)
    desk.peer_up()
    desk.begin(1, prompt_of(17))
    assert "needs 5 KV blocks" in refusal(desk)
    assert desk.role.at_rest


def test_no_room_is_said_at_once() -> None:
    desk = Desk(max_waiting=1)
    desk.peer_up()
    desk.begin(1, prompt_of(9))
    desk.begin(2, prompt_of(9))
    assert "no room" in refusal(desk, 2)


@pytest.mark.parametrize("start", [-4, 9, 12])
def test_a_begin_that_makes_no_sense_is_refused(desk: Desk, start: int) -> None:
    desk.begin(1, prompt_of(9), start=start)
    assert "nothing to hand off" in refusal(desk)


def test_a_handoff_is_begun_once(desk: Desk) -> None:
    desk.begin(1, prompt_of(9))
    desk.begin(1, prompt_of(9))
    assert "begun before" in refusal(desk)
    desk.credit(1, 0, 1)
    desk.run()
    assert len(desk.sent()) == 2  # the first one goes on


def test_a_begin_after_its_abort_is_refused(desk: Desk) -> None:
    desk.say(Abort(1, "changed my mind"))
    assert desk.read() == [Quiet(1, 1)]
    desk.begin(1, prompt_of(9))
    assert "aborted" in refusal(desk)


def test_a_peer_that_the_transport_cannot_reach_gets_nothing() -> None:
    desk = Desk()
    desk.role.handle(PeerUp(hello("d1", "d1", 1)), 0.0)
    desk.begin(1, prompt_of(9))
    assert "not connected" in refusal(desk)
    desk.role.report(Connected("d1", "no route"), 0.0)
    desk.turn()
    assert [refused.reason for refused in desk.refused] == ["no route"]
    assert not [said for said in desk.said if isinstance(said.message, Linked)]
    desk.role.report(Connected("d1"), 0.0)
    desk.turn()
    assert [said.message for said in desk.said] == [Linked()]


def test_a_link_that_is_too_slow_is_refused_with_both_values() -> None:
    def linked(measured: Measured | None, min_bandwidth: float) -> Desk:
        desk = Desk(min_bandwidth=min_bandwidth)
        desk.role.handle(PeerUp(hello("d1", "d1", 1)), 0.0)
        desk.role.report(Connected("d1", "", measured, "tcp/eth0"), 0.0)
        desk.turn()
        return desk

    slow = Measured(bytes_per_s=0.4e9, latency_s=1e-4)
    refused = linked(slow, 2.5)
    assert "0.4 GB/s" in refused.refused[0].reason and "2.5 GB/s" in refused.refused[0].reason
    assert not refused.said and refused.role.load().peers == []
    assert refused.role.load().links[0].error == refused.refused[0].reason
    unknown = linked(Measured(error="it hangs"), 2.5)
    assert "it hangs" in unknown.refused[0].reason and not unknown.said
    for desk in (
        linked(slow, 0.0),
        linked(slow, 0.4),
        linked(Measured(error="it hangs"), 0.0),
        linked(None, 2.5),
    ):
        assert [said.message for said in desk.said] == [Linked()] and not desk.refused
    assert linked(slow, 0.0).role.load().links == [PeerLink("d1", 0.4e9, 1e-4, "tcp/eth0")]
    lost = linked(slow, 0.0)
    lost.role.handle(PeerLost("d1", 1), 0.0)
    assert lost.role.load().links == []


def test_a_peer_of_another_model_is_refused() -> None:
    desk = Desk()
    desk.role.handle(PeerUp(hello("d1", "d1", 1, model="other")), 0.0)
    desk.turn()
    assert "'other'" in desk.refused[0].reason
    assert not desk.read_jobs(Connect)
    desk.begin(1, prompt_of(9))
    assert desk.read() == []
    assert desk.role.counters["late_messages"] == 1


# ---- giving up -------------------------------------------------------------------------------------------------------


def test_an_abort_is_answered_by_quiet_when_the_writes_have_settled(desk: Desk) -> None:
    desk.begin(1, prompt_of(20))
    desk.credit(1, 0, 1)
    desk.run()
    first, second = desk.sent()
    desk.say(Abort(1, "cancelled"))
    desk.credit(1, 2)  # was under way
    desk.run()
    assert not desk.sent()
    desk.settle(first)
    assert desk.read() == []
    assert desk.ledger.held == 5  # a write still reads them
    desk.settle(second, error="lost")
    assert desk.read() == [Quiet(1, 1)]
    assert desk.role.at_rest
    assert desk.ledger.held == 0
    desk.say(Abort(1, "cancelled"))
    assert desk.read() == [Quiet(1, 1)]


def test_an_abort_while_it_computes_leaves_what_a_write_reads() -> None:
    desk = Desk(blocks=6, limits=Limits(CHUNK, 8))
    desk.peer_up()
    desk.begin(1, prompt_of(20))
    desk.credit(1, 0)
    desk.turn()
    (write,) = desk.sent()
    desk.say(Abort(1, ""))
    assert desk.ledger.held == 2
    desk.begin(2, prompt_of(24, first=20))
    assert not desk.turn()
    desk.settle(write)
    assert desk.read() == [Quiet(1, 1)]
    assert desk.turn()


def test_an_abort_while_it_waits_or_computes_is_quiet_at_once() -> None:
    desk = Desk(limits=Limits(CHUNK, 1))
    desk.peer_up()
    desk.begin(1, prompt_of(20))
    desk.begin(2, prompt_of(20, first=7))
    desk.turn()
    desk.say(Abort(2, ""))
    desk.say(Abort(1, ""))
    assert desk.read() == [Quiet(2, 1), Quiet(1, 1)]
    assert desk.role.at_rest
    assert not desk.turn()


def test_the_deadline_ends_a_handoff_without_credit(desk: Desk) -> None:
    desk.begin(1, prompt_of(9), deadline_s=2.0)
    desk.wait(1.9)
    assert desk.read() == []
    desk.wait(0.2)
    assert "deadline" in refusal(desk)
    assert desk.role.at_rest
    assert desk.role.counters["handoffs_expired"] == 1


def test_nothing_is_written_under_a_lease_that_is_over(desk: Desk) -> None:
    desk.begin(1, prompt_of(20))
    desk.credit(1, 0, lease_s=2.0)
    desk.now = 2.0
    desk.run()
    assert not desk.sent()
    failed, quiet = desk.read()
    assert isinstance(failed, Failed) and quiet == Quiet(1, 1)
    assert desk.role.at_rest


def test_a_lease_on_a_slot_that_there_is_not_fails_the_handoff(desk: Desk) -> None:
    desk.begin(1, prompt_of(20))
    desk.say(Credit(1, [Lease(1, 1, 0, 7, 9.0), Lease(2, 1, 1, 8, 9.0)]))
    assert refusal(desk) == "a lease on slot 8 of a worker with 8"
    desk.run()
    assert not desk.sent()


def test_the_deadline_waits_for_writes_in_flight(desk: Desk) -> None:
    desk.begin(1, prompt_of(9), deadline_s=2.0)
    desk.credit(1, 0)
    desk.run()
    (write,) = desk.sent()
    desk.wait(3.0)
    (failed,) = desk.read()
    assert isinstance(failed, Failed)
    desk.settle(write)
    assert desk.read() == [Quiet(1, 1)]


def test_a_failed_write_fails_the_handoff(desk: Desk) -> None:
    desk.begin(1, prompt_of(20))
    desk.credit(1, 0, 1)
    desk.run()
    first, second = desk.sent()
    desk.settle(first, error="no route")
    (failed,) = desk.read()
    assert failed == Failed(1, "write failed: no route")
    desk.settle(second)
    assert desk.read() == [Quiet(1, 1)]


def test_a_lost_peer_is_forgotten_when_its_writes_have_settled(desk: Desk) -> None:
    desk.begin(1, prompt_of(9))
    desk.begin(2, prompt_of(9, first=9))
    desk.credit(1, 0)
    desk.run()
    (write,) = desk.sent()
    desk.role.handle(PeerLost("d1", 1), desk.now)
    assert not desk.read_jobs(Disconnect)
    assert desk.ledger.held == 3
    desk.settle(write)
    assert desk.read_jobs(Disconnect) == [Disconnect("d1")]
    assert desk.read() == []
    assert desk.role.at_rest
    desk.credit(1, 1)
    assert desk.role.counters["late_messages"] == 1


def test_a_peer_that_comes_back_hears_quiet_when_the_old_writes_have_settled(desk: Desk) -> None:
    desk.begin(1, prompt_of(9))
    desk.credit(1, 0)
    desk.run()
    (write,) = desk.sent()
    desk.role.handle(PeerLost("d1", 1), desk.now)
    desk.peer_up(epoch=2)
    desk.begin(2, prompt_of(9, first=9), epoch=2)
    desk.credit(2, 0, epoch=2)
    desk.run()
    assert desk.read() == []
    desk.settle(write)
    assert desk.read() == [Quiet(0, 1)]
    assert [write.handoff_id for write in desk.sent()] == [2]


def test_a_peer_may_come_back_before_its_break_was_noticed(desk: Desk) -> None:
    desk.begin(1, prompt_of(9))
    desk.begin(2, prompt_of(20, first=9))
    desk.credit(1, 0)
    desk.run()
    (write,) = desk.sent()
    desk.peer_up(epoch=3)
    assert desk.read() == []
    desk.role.handle(PeerLost("d1", 1), desk.now)  # at last
    desk.credit(2, 0)  # from the old stream
    assert not desk.sent()
    desk.settle(write)
    assert desk.read() == [Quiet(0, 2)]
    desk.begin(3, prompt_of(9), epoch=3)
    desk.run()
    assert desk.role.load().peers == ["d1"]
    assert not desk.role.at_rest


def test_breaks_in_a_row_owe_one_quiet_for_all(desk: Desk) -> None:
    desk.begin(1, prompt_of(9))
    desk.credit(1, 0)
    desk.run()
    (first,) = desk.sent()
    desk.peer_up(epoch=2)
    desk.begin(2, prompt_of(9, first=9), epoch=2)
    desk.credit(2, 0, epoch=2)
    desk.run()
    (second,) = desk.sent()
    desk.peer_up(epoch=3)
    desk.settle(first)
    assert desk.read() == []
    desk.settle(second)
    assert desk.read() == [Quiet(0, 2)]


def test_messages_of_another_epoch_or_a_stranger_change_nothing(desk: Desk) -> None:
    desk.begin(1, prompt_of(9), epoch=2)
    desk.begin(1, prompt_of(9), peer="stranger")
    desk.say(Abort(1, ""), epoch=2)
    assert desk.read() == []
    assert desk.role.at_rest
    assert desk.role.counters["late_messages"] == 3


# ---- short of blocks -------------------------------------------------------------------------------------------------


def test_source_blocks_are_pinned_until_their_writes_have_settled() -> None:
    desk = Desk(blocks=5)
    desk.peer_up()
    desk.begin(1, prompt_of(16))
    desk.credit(1, 0, 1)
    desk.run()
    writes = desk.sent()
    desk.begin(2, prompt_of(16, first=20))
    for write in writes:
        assert not desk.turn()  # 1 block is free
        desk.settle(write)
    assert desk.turn()
    desk.credit(2, 0)
    desk.sent()


def test_a_prompt_that_finds_no_block_and_waits_for_nobody_gives_way_at_once() -> None:
    desk = Desk(blocks=8, limits=Limits(8, 8))
    desk.peer_up()
    desk.begin(1, prompt_of(16))
    desk.turn()
    taken = desk.ledger.take(6)
    assert taken is not None
    desk.role.schedule(desk.now)
    assert "short of KV blocks" in refusal(desk)
    assert desk.role.at_rest
    desk.ledger.release(taken)
    desk.turn()


def test_what_waits_for_credit_gives_way_when_nothing_has_moved_for_long() -> None:
    """Two decode workers may starve one another through two prefill workers; the deadline is far away."""
    desk = Desk(blocks=6)
    desk.peer_up("d1")
    desk.peer_up("d2")
    desk.begin(5, prompt_of(10), peer="d2", deadline_s=1000.0)
    desk.run()
    desk.begin(6, prompt_of(4, first=7), peer="d2", deadline_s=1000.0)
    desk.run()
    desk.begin(1, prompt_of(12, first=20), deadline_s=1000.0)
    desk.credit(1, 0, 1)
    desk.run()
    desk.wait(STARVED_S * 0.9)
    assert desk.read("d2") == []
    desk.wait(STARVED_S * 0.2)
    failed, quiet = desk.read("d2")  # the youngest that holds blocks; it is enough
    assert isinstance(failed, Failed)
    assert (failed.handoff_id, quiet) == (6, Quiet(6, 1))
    assert [write.handoff_id for write in desk.sent()] == [1, 1]


def test_settling_writes_are_waited_for() -> None:
    desk = Desk(blocks=4)
    desk.peer_up()
    desk.begin(1, prompt_of(16))
    desk.credit(1, 0)
    desk.run()
    (write,) = desk.sent()
    desk.begin(2, prompt_of(16, first=20))
    desk.turn()
    desk.wait(STARVED_S * 0.9)
    desk.settle(write)
    desk.turn()
    desk.wait(STARVED_S * 0.9)
    assert desk.read() == []  # something moved: patience begins anew
    desk.wait(STARVED_S * 0.2)
    assert [type(message) for message in desk.read()] == [Failed, Quiet]


def test_twins_share_blocks_while_one_is_being_sent(desk: Desk) -> None:
    desk.begin(1, prompt_of(20))
    desk.run()
    held = desk.ledger.held
    desk.begin(2, prompt_of(20))
    desk.run()
    assert desk.ledger.held == held + 1  # the last block
    desk.say(Abort(1, ""))
    desk.credit(2, 0, 1, 2)
    writes = desk.sent()
    assert len(writes) == 3
    for write in writes:
        desk.settle(write)
    assert desk.role.at_rest


def test_a_write_that_nobody_asked_for_is_a_defect(desk: Desk) -> None:
    with pytest.raises(AssertionError, match="unknown hand-off"):
        desk.role.report(Sent("d1", 7, 1, 0, 8), 0.0)


def test_the_models_kv_is_checked_by_these_tests(desk: Desk) -> None:
    desk.begin(1, prompt_of(9))
    desk.credit(1, 0)
    desk.run()
    desk.model.pools[0][:] = np.int64(7)
    with pytest.raises(AssertionError):
        desk.sent()


@pytest.mark.parametrize("deadline_s", [math.nan, math.inf])
def test_a_deadline_that_is_none_is_refused_and_the_others_still_pass(deadline_s: float) -> None:
    desk = Desk()
    desk.peer_up()
    desk.begin(1, prompt_of(16), deadline_s=deadline_s)
    said = desk.read()
    assert isinstance(said[0], Failed) and f"{deadline_s}" in said[0].reason
    desk.begin(2, prompt_of(16), deadline_s=1.0)
    desk.run()
    desk.wait(2.0)
    assert any(isinstance(each, Failed) and "deadline" in each.reason for each in desk.read())


def test_a_first_stream_without_an_epoch_has_nothing_to_be_quiet_about() -> None:
    desk = Desk()
    desk.peer_up(epoch=0)
    assert not desk.read()
