"""The books behind the view: what was placed counts until a report that is younger, and targets of what runs."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.v1 import inference_pb2 as api
from router.placements import LEAST_LEARNED, Placements
from router.policy import Ask, Decision
from router.view import SETTLE_S, ClusterView


def books() -> Placements:
    cluster = ClusterView()
    cluster.set_workers(["d0"], ["p0"])
    cluster.decode.set_usable("d0", True)
    cluster.prefill.set_usable("p0", True)
    return Placements(cluster)


LOCAL = Decision("d0", None, "", 0, "", ttft_s=0.1)
REMOTE = Decision("d0", "p0", "", 0, "", ttft_s=0.1)
ASK = Ask(100, 99, 0, 0, decode_cached=np.array([40]), prefill_cached=np.array([16]), itl_s=0.05)


def status(age_s: float = 0.0, waiting: int = 0, waiting_tokens: int = 0) -> api.WorkerStatus:
    queue = api.WorkerQueue(age_s=age_s, room=9, max_running=9, step_tokens=64)
    return api.WorkerStatus(queue=queue, waiting=waiting, waiting_tokens=waiting_tokens)


def test_a_local_prompt_counts_at_once_and_until_a_younger_report() -> None:
    placed = books()
    placed.submitted(LOCAL, ASK, now=1.0)
    decode = placed.cluster.view.decode
    assert (decode.new_tokens[0], decode.queue_tokens[0], decode.sequences[0]) == (60, 60, 1)
    assert decode.new_attention[0] == 60 * (30 + 40)
    placed.told("d0", "decode", status(age_s=0.5), now=1.4)  # what it says is of 0.9
    assert decode.new_tokens[0] == 60
    placed.told("d0", "decode", status(age_s=0.1, waiting=1, waiting_tokens=60), now=1.2 + SETTLE_S)
    assert (decode.new_tokens[0], decode.queue_tokens[0], decode.sequences[0]) == (0, 60, 1)


def test_a_remote_prompt_counts_at_both() -> None:
    placed = books()
    placement = placed.submitted(REMOTE, ASK, now=1.0)
    view = placed.cluster.view
    assert (view.prefill.new_tokens[0], view.decode.new_tokens[0]) == (99 - 16, 1)
    assert (view.prefill.placed[0], view.decode.placed[0]) == (1, 1)
    assert view.decode.sequences[0] == 1
    placed.token(placement, 0, 2.0, None)
    assert (view.prefill.placed[0], view.decode.placed[0]) == (0, 1)
    placed.ended(placement)
    assert (view.prefill.placed[0], view.decode.placed[0]) == (0, 0)


def test_targets_count_while_a_request_runs_and_has_not_missed_it() -> None:
    placed = books()
    below = placed.cluster.view.decode.below
    one, two = (placed.submitted(LOCAL, ASK, now=1.0) for _ in range(2))
    assert not below.any(), "no token yet"
    for placement in (one, two):
        placed.token(placement, 0, 2.0, None)
        placed.token(placement, 1, 2.0, None)
    assert below[0, -1] == 4
    placed.token(one, 0, 2.04, 0.04)
    assert below[0, -1] == 4
    placed.token(one, 0, 2.1, 0.06)
    placed.token(one, 0, 2.2, 0.1)
    assert below[0, -1] == 3
    placed.choice_ended(two, 1)
    assert below[0, -1] == 2
    placed.ended(one)
    placed.ended(two)
    assert not below.any()


def test_a_lost_worker_owes_nothing() -> None:
    placed = books()
    placed.submitted(LOCAL, ASK, now=1.0)
    placed.lost("d0", "decode")
    assert placed.cluster.view.decode.new_tokens[0] == 0
    assert not placed.cluster.view.decode.usable[0]


def test_costs_come_with_a_status_and_stay() -> None:
    placed = books()
    told = status()
    told.costs.CopyFrom(
        api.WorkerCosts(
            base_s=0.25,
            token_s=0.5,
            decode_spread=[1, 2, 3],
            prefill_spread=[1, 4, 5],
            handoffs=[api.HandoffCosts(peer="p0", latency_s=0.75, byte_s=1.0, spread=[1, 1, 1])],
        )
    )
    placed.told("d0", "decode", told, 1.0)
    placed.told("d0", "decode", status(), 2.0)
    view = placed.cluster.view
    assert (view.decode.base_s[0], view.decode.token_s[0], view.decode.step_s[0]) == (0.25, 0.5, 0.25)
    assert view.pairs[:, 0, 0].tolist() == [0.75, 1.0]
    assert (view.step_spread, view.local_spread) == ((1.0, 2.0, 3.0), (1.0, 4.0, 5.0))


def test_how_far_off_first_tokens_are_is_learned_for_each_way() -> None:
    placed = books()
    for number in range(LEAST_LEARNED):
        placed.token(placed.submitted(REMOTE, ASK, now=0.0), 0, 0.3, None)
        placed.token(placed.submitted(LOCAL, ASK, now=0.0), 0, 0.1 * (1 + number % 2), None)
    view = placed.cluster.view
    assert view.remote_spread == pytest.approx((3.0, 3.0, 3.0))
    assert view.local_spread[0] == pytest.approx(1.5) and view.local_spread[2] == pytest.approx(2.0)


def test_a_policy_that_predicts_nothing_teaches_nothing() -> None:
    placed = books()
    before = placed.cluster.view.remote_spread
    for _ in range(2 * LEAST_LEARNED):
        placed.token(placed.submitted(Decision("d0", "p0", "", 0, ""), ASK, now=0.0), 0, 9.0, None)
    assert placed.cluster.view.remote_spread == before


@given(st.lists(st.tuples(st.booleans(), st.floats(0, 1), st.integers(1, 500)), max_size=40))
def test_what_is_unreported_is_what_was_placed_since(events: list[tuple[bool, float, int]]) -> None:
    """Against a list that remembers everything."""
    cluster = ClusterView()
    cluster.set_workers(["d0"], [])
    book, now, known = cluster.decode, 0.0, list[tuple[float, int]]()
    for places, value, amount in events:
        now += value
        if places:
            book.expect("d0", now, amount, 2.0 * amount, 3.0 * amount)
            known.append((now, amount))
        else:
            book.reported_at("d0", now - value / 2)
            known = [entry for entry in known if entry[0] > now - value / 2 - SETTLE_S]
        pool, total = cluster.view.decode, sum(amount for _, amount in known)
        found = [pool.new_requests[0], pool.new_tokens[0], pool.new_attention[0], pool.new_kv_tokens[0]]
        assert found == pytest.approx([len(known), total, 2 * total, 3 * total])
        cluster.set_workers(["d1", "d0"] if len(known) % 2 else ["d0"], [])
        assert cluster.view.decode.new_tokens[book.at("d0")] == total
        cluster.set_workers(["d0"], [])


def test_limits_that_were_not_told_limit_nothing() -> None:
    placed = books()
    placed.told("d0", "decode", api.WorkerStatus(queue=api.WorkerQueue(room=1), running=3), now=1.0)
    pool = placed.cluster.view.decode
    assert (
        min(pool.max_running[0], pool.step_tokens[0], pool.capacity_tokens[0], pool.available_tokens[0]) > 100
    )
