"""Hand-offs whose token ranges come in groups of layers: what counts as verified, who holds which blocks, credits."""

from __future__ import annotations

from typing import Any

import pytest

from engine.api import Submit
from kvtransfer.handshake import CAPABILITIES, LAYER_GROUPS
from kvtransfer.messages import Begin, CopyOut, Done, Lease, Quiet
from tests.decode.desk import Desk, prompt_of


def grouped(**options: Any) -> tuple[Desk, Submit, Begin, list[Lease]]:
    """A hand-off of three token ranges in two layer groups each, and its first credits."""
    desk = Desk(layers=4, layer_groups=2, **options)
    desk.peer_up()
    request = desk.submit(prompt_of(25), to="prefill")
    begin, leases = desk.begun()
    assert begin.layer_groups == 2
    return desk, request, begin, leases


def test_a_token_range_counts_when_all_its_layer_groups_are_verified() -> None:
    desk, request, begin, leases = grouped()
    assert [lease.chunk for lease in leases] == list(range(6))  # as many ranges as without groups
    desk.say(desk.write(begin, leases[0]))
    desk.turn()
    (job,) = desk.read_jobs(CopyOut)
    assert (job.layers, job.first_token, job.tokens) == ((0, 2), 0, 8)
    assert desk.role.load().ledger.blocks_landing == 2  # of the range, taken once
    desk.say(desk.write(begin, leases[1]))
    desk.turn()
    (second,) = desk.read_jobs(CopyOut)
    assert (second.layers, second.blocks, second.seed) == ((2, 4), job.blocks, job.seed)
    counts = desk.role.load().ledger
    assert (counts.blocks_landing, counts.blocks_held) == (0, 2)
    for lease in reversed(leases[2:]):  # in any order
        desk.say(desk.write(begin, lease))
    desk.run()
    assert desk.right(request)
    trace = desk.ends[request.request].trace
    assert trace is not None and (trace.prefilled, trace.remote_tokens) == ("remote", 24)
    assert desk.role.counters["chunks_verified"] == 6
    assert desk.at_rest()


def test_a_bad_layer_group_fails_its_token_range_only_from_there_on() -> None:
    desk, request, begin, leases = grouped()
    for lease in leases[:3]:
        desk.say(desk.write(begin, lease))
    desk.say(desk.write(begin, leases[3], flip=True))
    desk.run()
    assert desk.right(request)
    trace = desk.ends[request.request].trace
    assert trace is not None and (trace.prefilled, trace.remote_tokens) == ("mixed", 8)
    assert desk.role.slots.quarantined == 2
    desk.say(Quiet(begin.handoff_id, 1))
    assert desk.at_rest() and desk.role.slots.free == 8


def test_a_range_of_which_a_group_never_came_is_no_range() -> None:
    desk, request, begin, leases = grouped()
    for lease in (leases[0], leases[1], leases[2], leases[4], leases[5]):
        desk.say(desk.write(begin, lease))
    desk.turn()
    desk.say(Done(begin.handoff_id, 0, 0.0, 0.0))
    desk.run()
    assert desk.right(request)
    trace = desk.ends[request.request].trace
    assert trace is not None and trace.remote_tokens == 8


def test_blocks_of_a_failed_range_wait_for_all_copies_into_them() -> None:
    """One group's digest is wrong while another group is still being copied into the same blocks."""
    desk, request, begin, leases = grouped()
    desk.copies = False
    desk.say(desk.write(begin, leases[0], flip=True))
    desk.say(desk.write(begin, leases[1]))
    desk.turn()
    first, second = desk.read_jobs(CopyOut)
    assert first.blocks == second.blocks
    desk.copy_out(first)
    counts = desk.role.load().ledger
    assert counts.blocks_landing == 2 and not desk.role.landing.handoffs
    desk.turn()  # the prompt is computed here meanwhile, in other blocks
    assert desk.role.load().ledger.blocks_landing == 2
    desk.copy_out(second)
    assert not desk.role.load().ledger.blocks_landing
    desk.run()
    assert desk.right(request)


def tick(desk: Desk) -> None:
    """A turn without the check of the books, which know nothing of blocks that a test has taken."""
    desk.role.tick(desk.now)
    desk._carry_out()


def test_groups_of_a_range_that_has_blocks_go_on_when_no_more_blocks_are_free() -> None:
    desk = Desk(blocks=20, layers=2, layer_groups=2)
    desk.peer_up()
    desk.submit(prompt_of(25), to="prefill")
    begin, leases = desk.begun()
    desk.say(desk.write(begin, leases[0]))
    desk.turn()
    taken = desk.ledger.take(desk.ledger.available)
    assert taken is not None
    desk.say(desk.write(begin, leases[2]))  # of the next range
    desk.say(desk.write(begin, leases[1]))
    tick(desk)
    assert [job.chunk for job in desk.read_jobs(CopyOut)] == [0, 1]
    desk.ledger.release(taken)
    tick(desk)
    assert [job.chunk for job in desk.read_jobs(CopyOut)] == [2]


def test_credits_are_counted_in_chunks_and_blocks_in_ranges() -> None:
    """A younger hand-off is promised a range's blocks once, with the first of its groups."""
    desk = Desk(blocks=13, slots=16, layers=2, layer_groups=2)
    desk.peer_up()
    desk.submit(prompt_of(25), to="prefill")
    _, leases = desk.begun()
    assert len(leases) == 6
    desk.submit(prompt_of(25, first=9), to="prefill")
    _, offered = desk.begun()
    assert [lease.chunk for lease in offered] == [0, 1, 2, 3, 4, 5]  # 6 blocks for each, 13 in all
    desk = Desk(blocks=11, slots=16, layers=2, layer_groups=2)
    desk.peer_up()
    desk.submit(prompt_of(25), to="prefill")
    desk.begun()
    desk.submit(prompt_of(25, first=9), to="prefill")
    _, offered = desk.begun()
    assert [lease.chunk for lease in offered] == [0, 1, 2, 3]  # 5 blocks are left: two ranges of two


def test_auto_follows_the_link_as_the_prefill_worker_measured_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """One group until something was measured, more behind a slow link, again one behind a quick one."""
    monkeypatch.setattr("kvtransfer.groups.LEAST_PIECE_BYTES", 1)
    desk = Desk(layers=4, layer_groups=0)
    desk.peer_up()
    asked = []
    for number, bytes_per_s in enumerate((1e3, 1e12, 0.0, 1e3)):
        request = desk.submit(prompt_of(25, first=5 * number + 1), to="prefill")
        begin, leases = desk.begun()
        asked.append(begin.layer_groups)
        desk.deliver(begin, leases)
        desk.say(Done(begin.handoff_id, 0, 0.0, 1.0, bytes_per_s, 1e-6))
        desk.run()
        assert desk.right(request)
    assert asked == [0, 4, 0, 0]


def test_an_old_release_is_asked_for_chunks_of_all_layers() -> None:
    desk = Desk(layers=4, layer_groups=2)
    desk.peer_up(capabilities=[name for name in CAPABILITIES if name != LAYER_GROUPS])
    request = desk.submit(prompt_of(25), to="prefill")
    begin, leases = desk.begun()
    assert begin.layer_groups == 0 and len(leases) == 3
    desk.deliver(begin, leases)
    desk.run()
    assert desk.right(request)
