"""Each row of the design's table of failures, and each rule of the decode role, as a scene with one decode worker."""

from __future__ import annotations

import msgspec
import pytest

from decode.landing import CREDITS_PER_HANDOFF, PROBE_PERIOD_S
from decode.role import DecodeRole
from engine.api import RequestKey
from engine.ledger import BlockLedger, SlotLedger
from engine.scheduler import Limits
from kvtransfer.leases import LEASES, LeaseState
from kvtransfer.messages import (
    Abort,
    Begin,
    Connect,
    Connected,
    Copied,
    CopyOut,
    Disconnect,
    Done,
    Failed,
    Linked,
    Probe,
    Probed,
    Quiet,
)
from tests.decode.desk import BLOCK, CHUNK, Desk, hello, prompt_of, with_epoch
from worker.messages import FromPeer, PeerUp, SessionLost


@pytest.fixture
def desk() -> Desk:
    """With one prefill worker, `prefill`, whose first stream is up."""
    desk = Desk()
    desk.peer_up()
    return desk


# ---- the ways of a prompt ----------------------------------------------------------------------------------------


def test_a_remote_prompt_lands_and_only_its_last_token_is_computed_here(desk: Desk) -> None:
    request = desk.submit(prompt_of(21), to="prefill")
    begin, leases = desk.begun()
    assert begin.tokens == prompt_of(20)
    assert [lease.chunk for lease in leases] == [0, 1, 2]
    desk.deliver(begin, leases)
    desk.say(Done(begin.handoff_id, 0, 0.0, 0.0))
    desk.run()
    assert desk.right(request)
    trace = desk.ends[request.request].trace
    assert trace is not None
    assert (trace.prefilled, trace.remote_tokens, trace.fallback) == ("remote", 20, "")
    assert desk.at_rest()
    assert desk.role.slots.free == 8
    assert desk.role.load().counters["late_messages"] == 0


def test_chunks_may_land_in_any_order(desk: Desk) -> None:
    request = desk.submit(prompt_of(25), to="prefill")
    begin, leases = desk.begun()
    for lease in reversed(leases):
        desk.say(desk.write(begin, lease))
        desk.run()
    assert desk.right(request)


def test_a_cached_prefix_is_not_fetched(desk: Desk) -> None:
    desk.submit(prompt_of(13))
    desk.run()
    request = desk.submit(prompt_of(30), to="prefill")
    begin, leases = desk.begun()
    assert begin.start == 12
    desk.deliver(begin, leases)
    desk.run()
    assert desk.right(request)


def test_a_short_uncached_rest_is_computed_here_whatever_the_router_thought(desk: Desk) -> None:
    desk.submit(prompt_of(20))
    desk.run()
    request = desk.submit(prompt_of(30), to="prefill", local_below=16)
    desk.run()
    assert not desk.read(Begin)
    assert desk.right(request)
    trace = desk.ends[request.request].trace
    assert trace is not None
    assert not trace.fallback and desk.role.counters["turned_local"] == 1


def test_a_prompt_of_one_token_has_nothing_to_fetch(desk: Desk) -> None:
    request = desk.submit([7], to="prefill")
    desk.run()
    assert not desk.read(Begin)
    assert desk.right(request)


def test_without_a_connected_peer_the_prompt_is_computed_here() -> None:
    desk = Desk()
    requests = [desk.submit(prompt_of(20), to="prefill")]
    desk.role.handle(PeerUp(hello("prefill", "p1", 1)), 0.0)
    requests.append(desk.submit(prompt_of(20, first=1), to="prefill"))
    desk.role.report(Connected("p1"), 0.0)  # our side reaches it; it has not said that it reaches us
    requests.append(desk.submit(prompt_of(20, first=2), to="prefill"))
    desk.run()
    assert not desk.read(Begin)
    for request in requests:
        assert desk.right(request)
        trace = desk.ends[request.request].trace
        assert trace is not None
        assert trace.fallback == "not connected to prefill"


def test_a_peer_that_measures_its_link_finds_the_transport_awake() -> None:
    """Over TCP, writes to us need our own polling."""
    desk = Desk()
    seen = [desk.role.expecting]
    desk.role.handle(PeerUp(hello("prefill", "p1", 1)), 0.0)
    desk.role.report(Connected("p1"), 0.0)
    desk.role.tick(9.0)
    seen.append(desk.role.expecting)
    desk.role.handle(FromPeer("p1", 1, Linked()), 9.0)
    desk.role.tick(9.0)
    seen.append(desk.role.expecting)
    assert seen == [False, True, False]
    desk.role.handle(PeerUp(hello("other", "p2", 1)), 20.0)
    desk.role.tick(29.9)
    seen.append(desk.role.expecting)
    desk.role.tick(30.0)
    seen.append(desk.role.expecting)
    assert seen[3:] == [True, False], "one that never links is not waited for all the time"


def test_a_worker_without_slots_refuses_peers_and_computes_all() -> None:
    desk = Desk(slots=0)
    desk.role.handle(PeerUp(hello("prefill", "p1", 1)), 0.0)
    request = desk.submit(prompt_of(20), to="prefill")
    desk.run()
    assert "no landing slots" in desk.refused[0].reason
    assert not desk.read_jobs(Connect)
    assert desk.right(request)


def test_a_peer_of_another_model_is_refused_with_both_values() -> None:
    desk = Desk()
    desk.role.handle(PeerUp(hello("prefill", "p1", 1, model="other")), 0.0)
    desk.run()
    assert "'m'" in desk.refused[0].reason
    assert "'other'" in desk.refused[0].reason
    assert not desk.read_jobs(Connect)


def test_each_peer_has_a_grid_of_its_own() -> None:
    """Whole blocks of this worker, at most what both sides hold."""
    desk = Desk()
    desk.peer_up("small", "p1", block_size=3, chunk_tokens=7)
    desk.peer_up("large", "p2", block_size=16, chunk_tokens=64)
    for peer, chunk, count in (("small", 4, 4), ("large", CHUNK, 3)):
        desk.submit(prompt_of(25, first=chunk), to=peer)
        desk.turn()
        (begin,) = desk.read(Begin)
        handoff = desk.role.landing._handoffs[begin.handoff_id]
        assert [part.first_token for part in handoff.chunks] == list(range(0, 24, chunk))
        assert len(desk.credits(begin)) == min(count, CREDITS_PER_HANDOFF)


def test_prefixes_that_crossed_with_loss_have_names_of_their_own() -> None:
    """The other side computes exactly, so what travels is the request's own salt."""
    names = set()
    for wire_dtype in ("", "int8", "fp8_e4m3"):
        desk = Desk(wire_dtype=wire_dtype)
        desk.peer_up(wire_dtype=wire_dtype, chunk_tokens=CHUNK)
        for n in (1, 2):
            request = msgspec.structs.replace(
                desk.submit(prompt_of(21), to="prefill"), request=RequestKey(2, n), n=n, salt="tenant"
            )
            desk.role.handle(request, desk.now)
        sequences = [request.sequence for request in desk.role._requests.values()]
        assert {request.submit.salt for request in desk.role._requests.values()} == {"", "tenant"}
        for sequence in sequences:
            sequence.match_prefix(desk.ledger, 16)
            names.add((sequence.salt, sequence.hashes[0]))
        desk.turn()
        assert {begin.salt for begin in desk.read(Begin)} == {"", "tenant"}
    assert len(names) == len({name for _, name in names}) == 6


# ---- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "reason", "detail"),
    [
        (prompt_of(200), 41, "invalid", "241 tokens"),
        ([], 5, "invalid", "needs a prompt"),
        (prompt_of(5), 0, "invalid", "max_tokens of at least 1"),
    ],
)
def test_impossible_requests_are_refused(
    desk: Desk, prompt: list[int], max_tokens: int, reason: str, detail: str
) -> None:
    request = desk.submit(prompt, max_tokens)
    desk.run()
    assert desk.ends[request.request].reason == reason
    assert detail in desk.ends[request.request].detail
    assert desk.at_rest()


def test_a_request_that_just_fits_the_pool_is_served(desk: Desk) -> None:
    request = desk.submit(prompt_of(200), 40)
    desk.run()
    assert desk.right(request)


def test_no_room_is_said_at_once() -> None:
    desk = Desk(max_waiting=2)
    requests = [desk.submit(prompt_of(9, first=i)) for i in range(3)]
    desk.run()
    assert desk.ends[requests[2].request].reason == "no_room"
    assert all(desk.right(request) for request in requests[:2])


def test_a_request_is_accepted_once(desk: Desk) -> None:
    request = desk.submit(prompt_of(9), 20)
    desk.turn()
    desk.role.handle(request, 0.0)
    end = desk.role.drain()[0]
    assert getattr(end, "reason", "") == "invalid"
    desk.run()
    assert desk.right(request)


# ---- what breaks ---------------------------------------------------------------------------------------------------


def test_a_flipped_bit_is_refused_and_never_read(desk: Desk) -> None:
    request = desk.submit(prompt_of(25), to="prefill")
    begin, leases = desk.begun()
    desk.say(desk.write(begin, leases[0]))
    desk.say(desk.write(begin, leases[1], flip=True))
    desk.run()
    assert desk.role.counters["digest_refused"] == 1
    assert [abort.handoff_id for abort in desk.read(Abort)] == [begin.handoff_id]
    assert desk.right(request)
    trace = desk.ends[request.request].trace
    assert trace is not None
    assert (trace.prefilled, trace.remote_tokens) == ("mixed", 8)
    assert "digest" in trace.fallback
    assert desk.role.slots.quarantined == 1  # the third chunk may still be written
    desk.say(Quiet(begin.handoff_id, 1))
    assert desk.role.slots.free == 8


@pytest.mark.parametrize("wrong", [{"size_bytes": 8}, {"digests": []}, {"digests": [b"x" * 16] * 2}])
def test_a_chunk_of_other_pieces_than_planned_is_refused(desk: Desk, wrong: dict[str, object]) -> None:
    request = desk.submit(prompt_of(9), to="prefill")
    begin, (lease,) = desk.begun()
    desk.say(msgspec.structs.replace(desk.write(begin, lease), **wrong))
    desk.run()
    assert desk.role.counters["digest_refused"] == 1
    assert not desk.read_jobs(CopyOut)
    assert desk.right(request)
    assert desk.role.slots.free == 8


def test_a_chunk_whose_announcement_was_lost_is_found_out_by_done(desk: Desk) -> None:
    request = desk.submit(prompt_of(25), to="prefill")
    begin, leases = desk.begun()
    for lease in leases[:2]:
        desk.say(desk.write(begin, lease))
    desk.write(begin, leases[2])
    desk.say(Done(begin.handoff_id, 0, 0.0, 0.0))
    desk.run()
    assert desk.right(request)
    assert desk.read(Abort)
    assert desk.role.slots.quarantined == 1


def test_done_may_come_before_the_last_copies(desk: Desk) -> None:
    request = desk.submit(prompt_of(25), to="prefill")
    begin, leases = desk.begun()
    desk.copies = False
    for lease in leases[:2]:
        desk.say(desk.write(begin, lease))
    desk.turn()
    desk.say(desk.write(begin, leases[2]))
    desk.say(Done(begin.handoff_id, 0, 0.0, 0.0))
    desk.copies = True
    desk.turn()
    for job in desk.read_jobs(CopyOut)[:2]:
        desk.copy_out(job)
    desk.run()
    assert desk.right(request)
    assert not desk.read(Abort)


def test_silence_ends_with_the_deadline_and_keeps_what_was_verified(desk: Desk) -> None:
    expired = LEASES.taken[LeaseState.GRANTED, LeaseState.EXPIRED]
    request = desk.submit(prompt_of(25), to="prefill")
    begin, leases = desk.begun()
    desk.say(desk.write(begin, leases[0]))
    desk.run()
    desk.wait(9.9)
    assert request.request not in desk.ends
    desk.wait(0.2)
    assert desk.right(request)
    assert desk.role.counters["handoffs_expired"] == 1
    assert desk.role.slots.quarantined == 2
    assert LEASES.taken[LeaseState.GRANTED, LeaseState.EXPIRED] == expired + 2
    trace = desk.ends[request.request].trace
    assert trace is not None
    assert trace.remote_tokens == 8
    # What comes after all that is late, and dropped.
    desk.say(desk.write(begin, leases[1]))
    desk.run()
    assert desk.role.load().counters["late_messages"] == 1
    assert not [job for job in desk.read_jobs(CopyOut) if job.lease_id == leases[1].lease_id]


def test_news_beat_timeouts(desk: Desk) -> None:
    """The last chunk is announced in the very turn in which the deadline is over."""
    request = desk.submit(prompt_of(9), to="prefill")
    begin, (lease,) = desk.begun()
    desk.say(desk.write(begin, lease))
    desk.turn()
    desk.now = 11.0
    desk.run()
    assert desk.role.counters["handoffs_expired"] == 0
    assert desk.right(request)


def test_a_failed_handoff_goes_on_here(desk: Desk) -> None:
    request = desk.submit(prompt_of(25), to="prefill")
    begin, leases = desk.begun()
    desk.say(desk.write(begin, leases[0]))
    desk.turn()
    desk.say(Failed(begin.handoff_id, "short of blocks"))
    desk.say(Quiet(begin.handoff_id, 1))
    desk.run()
    assert desk.right(request)
    trace = desk.ends[request.request].trace
    assert trace is not None
    assert trace.fallback == "short of blocks"
    assert desk.role.slots.free == 8


def test_messages_of_another_epoch_or_peer_change_nothing(desk: Desk) -> None:
    desk.submit(prompt_of(9), to="prefill")
    begin, (lease,) = desk.begun()
    done = desk.write(begin, lease)
    desk.say(done, epoch=2)
    desk.say(done, peer="somebody")
    desk.say(with_epoch(done, 2))
    desk.say(Failed(begin.handoff_id, "no"), epoch=2)
    desk.say(Failed(begin.handoff_id, "no"), peer="somebody")
    desk.run()
    assert desk.role.load().counters["late_messages"] == 5
    assert desk.role.landing.handoffs == 1
    assert not desk.read_jobs(CopyOut)


def test_a_chunk_that_is_announced_twice_lands_once(desk: Desk) -> None:
    request = desk.submit(prompt_of(25), to="prefill")
    begin, leases = desk.begun()
    done = desk.write(begin, leases[0])
    desk.say(done)
    desk.say(done)
    desk.run()
    desk.say(done)
    desk.run()
    assert len(desk.read_jobs(CopyOut)) == 1
    assert desk.role.load().counters["late_messages"] == 2
    desk.deliver(begin, leases[1:])
    desk.run()
    assert desk.right(request)


def test_a_lost_peers_slots_wait_until_it_is_certainly_gone(desk: Desk) -> None:
    request = desk.submit(prompt_of(25), to="prefill")
    begin, leases = desk.begun()
    desk.say(desk.write(begin, leases[0]))
    desk.turn()
    desk.peer_lost()
    desk.run()
    assert desk.right(request)
    assert not desk.read(Abort)  # to whom
    assert desk.role.slots.quarantined == 2
    for gone in (False, False, True):
        assert desk.read_jobs(Probe) == [Probe("p1")]
        assert desk.role.slots.quarantined == 2
        desk.role.report(Probed("p1", gone), desk.now)
        desk.wait(PROBE_PERIOD_S)
    assert desk.role.slots.free == 8
    assert desk.read_jobs(Disconnect) == [Disconnect("p1")]
    assert not desk.read_jobs(Probe)


def test_a_lost_peer_that_guards_nothing_is_forgotten(desk: Desk) -> None:
    desk.peer_lost()
    desk.run()
    assert desk.read_jobs(Disconnect) == [Disconnect("p1")]
    assert not desk.read_jobs(Probe)


def test_a_peer_that_comes_back_is_asked_for_quiet_not_probed(desk: Desk) -> None:
    desk.submit(prompt_of(9), to="prefill")
    begin, _ = desk.begun()
    desk.peer_lost()
    desk.peer_lost()  # old news
    desk.run()
    desk.peer_up(epoch=3)
    desk.read_jobs(Probe)
    desk.role.report(Probed("p1", True), desk.now)  # an answer that was under way when it came back
    desk.wait(1.0)
    assert not desk.read_jobs(Probe)
    assert desk.role.slots.quarantined == 1
    second = desk.submit(prompt_of(9, first=20), to="prefill")
    begin, leases = desk.begun()
    desk.say(Quiet(0, 2), epoch=3)
    assert desk.role.slots.quarantined == 0
    assert desk.role.slots.leased == 1
    desk.deliver(begin, leases, epoch=3)
    desk.run()
    assert desk.right(second)


def test_the_break_of_an_old_stream_is_no_news_after_the_next_one(desk: Desk) -> None:
    desk.peer_lost()
    desk.peer_up(epoch=2)
    desk.submit(prompt_of(9), to="prefill")
    desk.begun()
    desk.peer_lost(epoch=1)
    assert desk.role.landing.handoffs == 1


def test_a_restarted_prefill_worker_is_another_peer(desk: Desk) -> None:
    first = desk.submit(prompt_of(9), to="prefill")
    desk.begun()
    desk.peer_up(incarnation="p2")
    second = desk.submit(prompt_of(9, first=20), to="prefill")
    desk.turn()
    assert desk.said[0].peer == "p2"
    begin, leases = desk.begun()
    desk.peer_lost()  # of p1, at last
    desk.deliver(begin, leases, peer="p2")
    desk.run()
    assert desk.right(first)
    assert desk.right(second)
    desk.submit(prompt_of(9, first=30), to="prefill")
    desk.begun()


def test_all_slots_in_quarantine_mean_no_handoff() -> None:
    desk = Desk(slots=1)
    desk.peer_up()
    desk.submit(prompt_of(9), to="prefill")
    begin, _ = desk.begun()
    desk.say(Failed(begin.handoff_id, "no"))
    request = desk.submit(prompt_of(9, first=20), to="prefill")
    desk.run()
    assert not desk.read(Begin)
    assert desk.right(request)


# ---- cancels ---------------------------------------------------------------------------------------------------------


def test_cancel_while_it_waits(desk: Desk) -> None:
    request = desk.submit(prompt_of(9))
    desk.cancel(request)
    desk.cancel(request)
    desk.run()
    assert desk.ends[request.request].reason == "cancelled"
    assert desk.at_rest()


def test_cancel_while_it_decodes(desk: Desk) -> None:
    request = desk.submit(prompt_of(9), 30)
    desk.turn()
    desk.turn()
    desk.cancel(request)
    desk.run()
    assert desk.ends[request.request].reason == "cancelled"
    assert len(desk.tokens[request.request]) == 2
    assert desk.at_rest()


def test_cancel_during_a_handoff_tells_the_writer(desk: Desk) -> None:
    request = desk.submit(prompt_of(25), to="prefill")
    begin, leases = desk.begun()
    desk.say(desk.write(begin, leases[1]))  # verified, but not in order yet
    desk.run()
    desk.cancel(request)
    desk.run()
    assert [abort.handoff_id for abort in desk.read(Abort)] == [begin.handoff_id]
    assert desk.at_rest()
    assert desk.role.slots.quarantined == 2
    desk.say(Quiet(begin.handoff_id, 1))
    assert desk.role.slots.free == 8


@pytest.mark.parametrize("verified", [True, False])
def test_cancel_while_a_chunk_is_copied(desk: Desk, verified: bool) -> None:
    """The mover is writing into the blocks: they are free when it says so, not before."""
    aborted = LEASES.taken[LeaseState.LANDED, LeaseState.ABORTED]
    request = desk.submit(prompt_of(9), to="prefill")
    begin, (lease,) = desk.begun()
    desk.copies = False
    desk.say(desk.write(begin, lease))
    desk.run()
    desk.cancel(request)
    desk.run()
    assert desk.ends[request.request].reason == "cancelled"
    assert not desk.role.at_rest
    assert desk.ledger.landing == 2
    assert desk.role.slots.leased == 1
    desk.role.report(Copied(begin.handoff_id, lease.lease_id, verified), desk.now)
    assert desk.at_rest()
    assert desk.ledger.cached == 0
    assert LEASES.taken[LeaseState.LANDED, LeaseState.ABORTED] == aborted + 1
    assert desk.role.slots.free == 8


def test_a_chunk_landed_but_not_copied_frees_its_slot_when_cancelled() -> None:
    desk = Desk(blocks=5)
    desk.peer_up()
    request = desk.submit(prompt_of(13), to="prefill")
    begin, leases = desk.begun()
    desk.take(5)
    desk.say(desk.write(begin, leases[0]))
    desk.turn()
    assert not desk.read_jobs(CopyOut)
    desk.cancel(request)
    assert desk.role.slots.leased == 0
    assert desk.role.slots.quarantined == 1
    desk.give_back()
    assert desk.at_rest()


def test_a_lost_session_cancels_what_it_asked_for_and_nothing_else(desk: Desk) -> None:
    ours = [
        desk.submit(prompt_of(9), session=1),
        desk.submit(prompt_of(25, first=9), to="prefill", session=1),
    ]
    twin = desk.submit(prompt_of(25, first=9), to="prefill", session=1)
    theirs = desk.submit(prompt_of(9, first=20), session=2)
    desk.turn()
    desk.role.handle(SessionLost(1), desk.now)
    desk.run()
    assert {desk.ends[request.request].reason for request in [*ours, twin]} == {"cancelled"}
    assert desk.right(theirs)
    assert desk.at_rest()


# ---- twins -----------------------------------------------------------------------------------------------------------


def test_a_twin_waits_for_the_first_ones_blocks(desk: Desk) -> None:
    first = desk.submit(prompt_of(22), to="prefill")
    twins = [desk.submit(prompt_of(22), to="prefill", local_below=BLOCK) for _ in range(3)]
    begin, leases = desk.begun()
    desk.deliver(begin, leases)
    desk.run()
    assert not desk.read(Begin)
    assert desk.right(first)
    for twin in twins:
        assert desk.right(twin)
        trace = desk.ends[twin.request].trace
        assert trace is not None
        assert (trace.prefilled, trace.cached_tokens) == ("cached", 20)


def test_a_twin_takes_over_when_the_first_is_cancelled(desk: Desk) -> None:
    first = desk.submit(prompt_of(22), to="prefill")
    second = desk.submit(prompt_of(22), to="prefill")
    third = desk.submit(prompt_of(22), to="prefill", local_below=BLOCK)
    desk.begun()
    desk.cancel(first)
    begin, leases = desk.begun()
    assert not desk.read(Begin)  # the third waits for the second now
    desk.deliver(begin, leases)
    desk.run()
    assert desk.right(second)
    assert desk.right(third)
    assert desk.at_rest()


def test_a_parked_twin_can_be_cancelled(desk: Desk) -> None:
    first = desk.submit(prompt_of(22), to="prefill")
    twin = desk.submit(prompt_of(22), to="prefill")
    begin, leases = desk.begun()
    desk.cancel(twin)
    desk.deliver(begin, leases)
    desk.run()
    assert desk.right(first)
    assert desk.ends[twin.request].reason == "cancelled"
    assert desk.at_rest()


def test_twins_wait_through_the_first_ones_preemption() -> None:
    desk = Desk(blocks=12, limits=Limits(8, 8))
    elder = desk.submit(prompt_of(8, first=20), 24)
    desk.turn()
    owner = desk.submit(prompt_of(22), 2)
    twin = desk.submit(prompt_of(22), 2)
    desk.run()
    assert all(desk.right(request) for request in (elder, owner, twin))
    assert desk.at_rest()


def test_cached_twins_of_whole_blocks_do_not_wait_for_one_another(desk: Desk) -> None:
    """Their last block is computed anew by each, so there is nothing to wait for."""
    desk.submit(prompt_of(16))
    desk.run()
    twins = [desk.submit(prompt_of(16), 1) for _ in range(4)]
    assert desk.turn()
    assert all(desk.right(twin) for twin in twins)


# ---- credits, slots and blocks ---------------------------------------------------------------------------------------


def test_credits_are_few_and_follow_the_copies(desk: Desk) -> None:
    desk.submit(prompt_of(CHUNK * 7 + 1), to="prefill")
    begin, leases = desk.begun()
    assert len(leases) == CREDITS_PER_HANDOFF
    desk.say(desk.write(begin, leases[0]))
    desk.run()
    assert [lease.chunk for lease in desk.credits(begin)] == [CREDITS_PER_HANDOFF]


def test_the_last_free_slot_is_the_oldest_handoffs() -> None:
    desk = Desk(slots=3)
    desk.peer_up()
    oldest = desk.submit(prompt_of(CHUNK + 1), to="prefill")
    young = desk.submit(prompt_of(CHUNK * 3 + 1, first=20), to="prefill")
    desk.turn()
    begins = desk.read(Begin)
    leases = [desk.credits(begin) for begin in begins]
    assert [len(offered) for offered in leases] == [1, 1]
    assert desk.role.slots.free == 1
    desk.deliver(begins[0], leases[0])
    desk.deliver(begins[1], leases[1] + desk.credits(begins[1]))
    desk.run()
    assert desk.right(oldest)
    assert desk.right(young)


def test_credit_needs_blocks_for_the_oldest_and_one_for_each_that_runs() -> None:
    desk = Desk(blocks=20)
    desk.peer_up()
    desk.submit(prompt_of(4, first=20), 8)
    desk.turn()
    desk.turn()
    desk.take(desk.ledger.available - 4)
    desk.submit(prompt_of(17), to="prefill")  # needs 4
    begin, leases = desk.begun()
    assert desk.ledger.available == 4
    assert desk.role.scheduler.running == 1
    assert not leases
    desk.give_back()
    desk.turn()
    assert desk.credits(begin)


def test_handoffs_that_hold_the_pool_give_way_youngest_first_and_with_their_blocks() -> None:
    """Each holds cached blocks, so the oldest finds too few; nothing runs, nothing else waits, no deadline is near."""
    desk = Desk(blocks=12, timeout_s=1000.0)
    desk.peer_up()
    for first in (0, 20):
        desk.submit(prompt_of(13, first=first), 1)
        desk.run()
    oldest = desk.submit(
        prompt_of(13) + prompt_of(27, first=5), 1, to="prefill"
    )  # 10 blocks, 3 of them cached
    young = desk.submit(prompt_of(13, first=20) + prompt_of(26, first=5), 1, to="prefill")
    desk.turn()
    begins = desk.read(Begin)
    assert len(begins) == 2
    desk.run()
    assert [abort.handoff_id for abort in desk.read(Abort)] == [begins[1].handoff_id]
    desk.deliver(begins[0], desk.credits(begins[0]))
    desk.run()
    assert desk.right(oldest)
    assert desk.right(young)
    assert desk.at_rest()


def test_a_young_handoffs_chunk_waits_in_its_slot_while_the_oldest_needs_the_blocks() -> None:
    desk = Desk(blocks=12, slots=4)
    desk.peer_up()
    oldest = desk.submit(prompt_of(CHUNK * 2 + 1), 1, to="prefill")
    young = desk.submit(prompt_of(CHUNK + 1, first=20), 1, to="prefill")
    desk.turn()
    begins = desk.read(Begin)
    leases = [desk.credits(begin) for begin in begins]
    desk.take(7)  # 5 are left, of which the oldest needs 4
    desk.say(desk.write(begins[1], leases[1][0]))
    desk.run()
    assert not desk.read_jobs(CopyOut)
    desk.say(desk.write(begins[0], leases[0][1]))
    desk.turn()
    assert [job.handoff_id for job in desk.read_jobs(CopyOut)] == [begins[0].handoff_id]
    desk.give_back()
    desk.deliver(begins[0], leases[0][:1])
    desk.run()
    assert desk.right(oldest)
    assert desk.right(young)


def test_what_landed_may_take_the_pool_from_open_handoffs_when_nothing_runs() -> None:
    """The open hand-off finds all that it needs, but may take long; what has landed lacks one block, for no reason."""
    desk = Desk(blocks=9, timeout_s=1000.0)
    desk.peer_up()
    first = desk.submit(prompt_of(29), 1, to="prefill")
    begin, leases = desk.begun()
    desk.say(desk.write(begin, leases[0]))
    desk.run()
    second = desk.submit(prompt_of(13, first=20), 1, to="prefill")
    young, offered = desk.begun()
    desk.say(desk.write(young, offered[0]))
    desk.run()
    assert desk.ledger.available == 5
    desk.say(Failed(begin.handoff_id, "no"))  # it has 2 blocks and needs 6 more
    desk.run()
    assert desk.right(first)
    assert desk.right(second)
    assert desk.at_rest()


def test_slots_that_hold_no_block_are_an_error_at_start() -> None:
    with pytest.raises(ValueError, match="chunks of 8 tokens, less than a block of 16"):
        DecodeRole(hello("decode", "d1"), BlockLedger(4, 2 * CHUNK), SlotLedger(1), Limits())
    assert CHUNK % BLOCK == 0
