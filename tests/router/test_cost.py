"""The cost policy: what it must never get wrong (hypothesis), and what it decides on views made by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.api import HandoffCost, StepCosts
from engine.costs import prompt_attention
from router.cost import cost
from router.estimates import SHORTLIST, estimate, local_scores
from router.policy import Ask, Decision
from router.view import TARGET_BINS, ClusterView

# A step takes 5 ms, 0.1 ms for each sequence, and a thousand prompt tokens 0.1 s. Hand-offs: 5 ms and 1 GB/s.
MACHINE = StepCosts(5e-3, 1e-4, 1e-8, 1e-4, 1e-9)
TOKEN_BYTES = 4096.0


def cluster_of(decode: int = 1, prefill: int = 1, machine: StepCosts = MACHINE) -> ClusterView:
    cluster = ClusterView()
    names = [f"d{at}" for at in range(decode)], [f"p{at}" for at in range(prefill)]
    cluster.set_workers(*names)
    numbers = {"base_s": machine.base_s, "sequence_s": machine.sequence_s, "kv_token_s": machine.kv_token_s}
    numbers |= {"token_s": machine.token_s, "attention_s": machine.attention_s, "token_bytes": TOKEN_BYTES}
    for book, ids in zip((cluster.decode, cluster.prefill), names, strict=True):
        for worker_id in ids:
            book.set_usable(worker_id, True)
            book.tell(worker_id, numbers)
    for worker_id in names[0]:
        cluster.told_handoffs(worker_id, [HandoffCost(peer, 5e-3, 1e-9) for peer in names[1]])
    return cluster


def running(
    cluster: ClusterView, worker_id: str, count: int, itl_s: float = 0.1, kv_tokens: int = 200
) -> None:
    cluster.decode.tell(worker_id, {"running": float(count), "kv_tokens": float(count * kv_tokens)})
    for _ in range(count):
        cluster.decode.count_target(worker_id, itl_s, 1)


def queued(cluster: ClusterView, worker_id: str, tokens: int) -> None:
    book = cluster.decode if worker_id[0] == "d" else cluster.prefill
    attention = prompt_attention(float(tokens), 0.0)
    book.tell(worker_id, {"waiting_tokens": float(tokens), "attention": attention})


def ask_of(prompt: int, ttft_s: float = 1.0, itl_s: float = 0.1) -> Ask:
    return Ask(prompt, prompt - 1, 0, 0, ttft_s=ttft_s, itl_s=itl_s)


def decide(cluster: ClusterView, ask: Ask) -> Decision:
    return cost(ask, cluster.view, 0.0)


# ---- by hand -----------------------------------------------------------------------------------------------------


def test_at_idle_a_handoff_only_costs() -> None:
    decision = decide(cluster_of(), ask_of(1000))
    assert decision.kind == "local"
    assert decision.ttft_s == pytest.approx(0.1 + 2.5 * 5.1e-3, rel=0.05), (
        "two steps and half of one under way"
    )


def test_a_long_prompt_leaves_a_busy_decode_worker() -> None:
    cluster = cluster_of()
    running(cluster, "d0", 40)
    assert decide(cluster, ask_of(1000)).kind == "remote"
    assert decide(cluster, ask_of(8)).kind == "local"


def test_the_length_from_which_it_pays_falls_as_the_batch_grows_and_rises_with_the_prefill_queue() -> None:
    def shortest_remote(batch: int, queue: int) -> int:
        cluster = cluster_of()
        running(cluster, "d0", batch)
        queued(cluster, "p0", queue)
        lengths = range(16, 4096, 16)
        return next((length for length in lengths if decide(cluster, ask_of(length)).kind == "remote"), 4096)

    batches = [shortest_remote(batch, 0) for batch in (1, 4, 16, 64)]
    assert batches == sorted(batches, reverse=True) and batches[0] > 2 * batches[-1]
    queues = [shortest_remote(16, queue) for queue in (0, 1000, 4000, 16000)]
    assert queues == sorted(queues) and queues[-1] > 2 * queues[0]


def test_tight_gaps_of_others_send_a_prompt_away_and_loose_ones_do_not() -> None:
    """One step of 512 prompt tokens takes 57 ms."""
    for itl_s, kind in ((0.02, "remote"), (0.5, "local")):
        cluster = cluster_of()
        running(cluster, "d0", 1, itl_s)
        queued(cluster, "p0", 2000)
        decision = decide(cluster, ask_of(600, ttft_s=2.0, itl_s=0.5))
        assert decision.kind == kind
        if kind == "remote":
            assert decision.code == "slo"


def test_who_has_missed_its_target_already_is_not_protected() -> None:
    cluster = cluster_of()
    running(cluster, "d0", 2, 0.02)
    queued(cluster, "p0", 2000)
    ask = ask_of(600, ttft_s=2.0, itl_s=0.5)
    assert decide(cluster, ask).kind == "remote"
    for _ in range(2):
        cluster.decode.count_target("d0", 0.02, -1)
    assert decide(cluster, ask).kind == "local"


def test_a_tight_first_token_takes_the_quicker_way_even_if_it_harms_price() -> None:
    cluster = cluster_of()
    running(cluster, "d0", 40, 0.5)
    queued(cluster, "p0", 9000)
    assert decide(cluster, ask_of(1000, ttft_s=0.4, itl_s=0.5)).kind == "local"
    assert decide(cluster, ask_of(1000, ttft_s=30.0, itl_s=0.5)).kind == "remote"


def test_a_cached_prompt_goes_where_it_is_cached() -> None:
    cluster = cluster_of(decode=3, prefill=1)
    ask = replace(ask_of(2000), decode_cached=np.array([0, 1984, 0]), prefill_cached=np.array([0]))
    decision = decide(cluster, ask)
    assert (decision.kind, decision.decode_worker) == ("local", "d1")
    running(cluster, "d1", 200)
    queued(cluster, "d1", 60000)
    assert decide(cluster, ask).decode_worker != "d1", "not whatever it costs"


def test_a_prompt_cached_at_a_prefill_worker_goes_there() -> None:
    cluster = cluster_of(decode=1, prefill=3)
    running(cluster, "d0", 30)
    ask = replace(ask_of(2000), decode_cached=np.array([0]), prefill_cached=np.array([0, 0, 1984]))
    assert decide(cluster, ask).prefill_worker == "p2"


def test_a_slow_link_is_not_worth_it() -> None:
    cluster = cluster_of(decode=1, prefill=2)
    running(cluster, "d0", 10)
    cluster.told_handoffs("d0", [HandoffCost("p0", 5e-3, 1e-6)])
    assert decide(cluster, ask_of(2000)).prefill_worker == "p1"
    cluster.told_handoffs("d0", [HandoffCost("p1", 5e-3, 1e-6)])
    assert decide(cluster, ask_of(2000)).kind == "local"


def test_pairs_that_were_never_seen_count_as_the_mean_of_the_others() -> None:
    cluster = cluster_of(decode=1, prefill=1)
    cluster.told_handoffs("d0", [HandoffCost("p0", 0.5, 1e-7)])
    cluster.set_workers(["d0", "d1"], ["p0", "p1"])
    assert cluster.view.pairs[:, 1, 1].tolist() == [0.5, 1e-7]
    assert cluster.view.pairs[:, 0, 0].tolist() == [0.5, 1e-7]


def test_placements_that_nobody_reported_spread_the_load() -> None:
    cluster = cluster_of(decode=4, prefill=0)
    chosen = []
    for _ in range(40):
        decision = decide(cluster, ask_of(500))
        chosen.append(decision.decode_worker)
        cluster.decode.expect(decision.decode_worker, 0.0, 500, 0.0, 0.0)
    assert sorted(map(chosen.count, set(chosen))) == [10, 10, 10, 10]


def test_nearly_equal_ways_stay_what_was_last() -> None:
    """A batch at which both are worth about the same: then the last decision stands."""
    for count in range(1, 200):
        cluster = cluster_of()
        running(cluster, "d0", count)
        local, remote = estimate(ask_of(200), cluster.view)
        assert remote is not None
        if abs(local.score[0] - remote.score[0, 0]) < 1e-3:
            kinds = []
            for last in (False, True):
                cluster.last_remote = last
                kinds.append(decide(cluster, ask_of(200)).kind)
            assert kinds == ["local", "remote"]
            return
    raise AssertionError("no such batch")


def test_the_bound_for_the_decode_worker_is_about_where_both_ways_break_even() -> None:
    cluster = cluster_of()
    running(cluster, "d0", 40)
    decision = decide(cluster, ask_of(1000))
    assert decision.kind == "remote"
    bound = decision.local_below_tokens
    assert 0 < bound <= 250
    # With so much missing instead, the router itself would have decided the other way.
    known = replace(ask_of(1000), decode_cached=np.array([1000 - bound // 2]), prefill_cached=np.array([0]))
    assert decide(cluster, known).kind == "local"


def test_a_local_decision_names_who_to_turn_to_when_the_cache_was_not_there() -> None:
    cluster = cluster_of()
    running(cluster, "d0", 40)
    ask = replace(ask_of(4000), decode_cached=np.array([3990]), prefill_cached=np.array([0]))
    decision = decide(cluster, ask)
    assert (decision.kind, decision.alternative) == ("local", "p0")
    assert 10 * 4 <= decision.local_below_tokens < 4000
    assert decision.handoff_s > 0.3


def test_a_full_batch_or_memory_costs_waiting() -> None:
    for numbers in ({"max_running": 8.0}, {"capacity_tokens": 4000.0, "available_tokens": 100.0}):
        cluster = cluster_of(decode=2, prefill=0)
        for worker_id in ("d0", "d1"):
            running(cluster, worker_id, 8)
        cluster.decode.tell("d0", numbers)
        assert decide(cluster, ask_of(1000)).decode_worker == "d1"


def test_the_shortlist_has_the_best() -> None:
    """Far more workers than are paired: the one good pair is found."""
    cluster = cluster_of(decode=3 * SHORTLIST, prefill=3 * SHORTLIST)
    for at in range(3 * SHORTLIST):
        running(cluster, f"d{at}", 10 if at == 37 else 60)
        queued(cluster, f"p{at}", 0 if at == 41 else 50000)
    decision = decide(cluster, ask_of(2000))
    assert (decision.decode_worker, decision.prefill_worker) == ("d37", "p41")


# ---- what must always hold -----------------------------------------------------------------------------------------

counts = st.integers(0, 200)
tokens = st.integers(0, 20000)


@st.composite
def clusters(draw: st.DrawFn) -> Callable[[], ClusterView]:
    """Makes the same random cluster as often as it is called."""
    decode, prefill = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    batches = draw(st.lists(st.tuples(counts, tokens, st.floats(0.005, 2)), min_size=decode, max_size=decode))
    queues = draw(st.lists(st.tuples(tokens, st.floats(0, 1)), min_size=prefill, max_size=prefill))
    last = draw(st.booleans())
    factor = draw(st.floats(0.01, 10))

    def make() -> ClusterView:
        machine = StepCosts(*(factor * value for value in (5e-3, 1e-4, 1e-8, 1e-4, 1e-9)))
        cluster = cluster_of(decode, prefill, machine)
        for at, (batch, queue, itl_s) in enumerate(batches):
            running(cluster, f"d{at}", batch, itl_s)
            queued(cluster, f"d{at}", queue)
        for at, (queue, busy) in enumerate(queues):
            queued(cluster, f"p{at}", queue)
            cluster.prefill.tell(f"p{at}", {"busy": busy})
        cluster.last_remote = last
        return cluster

    return make


asks = st.builds(ask_of, st.integers(1, 20000), ttft_s=st.floats(0.01, 20.0), itl_s=st.floats(0.002, 1.0))


@settings(max_examples=150, deadline=None)
@given(clusters(), asks, st.data())
def test_a_longer_prefill_queue_never_makes_remote_more_attractive(
    make: Callable[[], ClusterView], ask: Ask, data: st.DataObject
) -> None:
    cluster = make()
    before = decide(cluster, ask)
    at = data.draw(st.integers(0, len(cluster.view.prefill.ids) - 1))
    cluster.prefill.expect(f"p{at}", 0.0, data.draw(tokens), data.draw(st.floats(0, 1e8)), 0.0)
    after = decide(cluster, ask)
    if before.kind == "local":
        assert after.kind == "local"
    elif before.prefill_worker != f"p{at}":
        assert (after.prefill_worker, after.decode_worker) == (before.prefill_worker, before.decode_worker)


@settings(max_examples=150, deadline=None)
@given(clusters(), asks, st.data())
def test_more_cached_on_a_worker_never_makes_it_less_attractive(
    make: Callable[[], ClusterView], ask: Ask, data: st.DataObject
) -> None:
    view = make().view
    decode_cached, prefill_cached = (
        np.array(data.draw(st.lists(tokens, min_size=len(pool.ids), max_size=len(pool.ids))))
        for pool in (view.decode, view.prefill)
    )
    before = cost(replace(ask, decode_cached=decode_cached, prefill_cached=prefill_cached), view, 0.0)
    more = data.draw(tokens)
    if data.draw(st.booleans()):
        decode_cached = decode_cached + more * (np.array(view.decode.ids) == before.decode_worker)
        after = cost(replace(ask, decode_cached=decode_cached, prefill_cached=prefill_cached), view, 0.0)
        assert after.decode_worker == before.decode_worker
    elif before.prefill_worker is not None:
        prefill_cached = prefill_cached + more * (np.array(view.prefill.ids) == before.prefill_worker)
        after = cost(replace(ask, decode_cached=decode_cached, prefill_cached=prefill_cached), view, 0.0)
        assert after.prefill_worker == before.prefill_worker


@settings(max_examples=100, deadline=None)
@given(clusters(), asks, st.data())
def test_more_queued_at_a_decode_worker_never_draws_requests_to_it(
    make: Callable[[], ClusterView], ask: Ask, data: st.DataObject
) -> None:
    cluster = make()
    before = decide(cluster, ask)
    other = data.draw(st.sampled_from(cluster.view.decode.ids))
    cluster.decode.expect(other, 0.0, data.draw(tokens), 0.0, 0.0)
    after = decide(cluster, ask)
    if other != before.decode_worker:
        assert after.decode_worker != other


@settings(max_examples=100, deadline=None)
@given(clusters(), asks)
def test_a_decision_is_whole_and_the_same_each_time(make: Callable[[], ClusterView], ask: Ask) -> None:
    decision = decide(make(), ask)
    assert decision == decide(make(), ask)
    assert 0 < decision.ttft_s < np.inf and 0 < decision.best_s <= decision.ttft_s + 1e-9
    assert 0 <= decision.local_below_tokens <= ask.prompt_tokens + 1
    assert (decision.handoff_s > 0) == (
        decision.prefill_worker is not None or decision.alternative is not None
    )
    assert decision.kind == decision.reason.partition(":")[0]
    if decision.kind == "remote":
        assert decision.local_below_tokens <= max(1, ask.prompt_tokens)


@settings(max_examples=100, deadline=None)
@given(clusters(), asks)
def test_one_worker_in_plain_numbers_is_worth_what_it_is_in_arrays(
    make: Callable[[], ClusterView], ask: Ask
) -> None:
    view = make().view
    rng = np.random.default_rng(ask.prompt_tokens)
    cached = rng.integers(0, ask.prompt_tokens, len(view.decode.ids))
    local, _ = estimate(replace(ask, decode_cached=cached), view)
    for at in range(len(view.decode.ids)):
        (score,) = local_scores(ask, view, at, [float(ask.prompt_tokens - cached[at])])
        assert score == pytest.approx(local.score[at], rel=1e-9)


@given(st.lists(st.floats(1e-4, 10.0), max_size=30), st.data())
def test_targets_are_counted_by_bin(targets: list[float], data: st.DataObject) -> None:
    cluster = cluster_of(decode=2)
    for target in targets:
        cluster.decode.count_target("d1", target, 1)
    below = cluster.view.decode.below
    assert below[1, -1] == len(targets) and not below[0].any()
    for at, edge in enumerate(TARGET_BINS):
        rounded = [max((bin_ for bin_ in TARGET_BINS if bin_ <= t), default=TARGET_BINS[0]) for t in targets]
        assert below[1, at] == sum(target < edge for target in rounded)
    for target in targets:
        cluster.decode.count_target("d1", target, -1)
    assert not cluster.view.decode.below.any()
