"""Policies over views made by hand, and the books behind the views."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.policy import POLICIES, Ask, NoWorker, threshold
from router.view import ClusterView


def _cluster(decode: dict[str, int], prefill: dict[str, int]) -> ClusterView:
    """Usable workers with that much reported work."""
    cluster = ClusterView()
    cluster.set_workers(list(decode), list(prefill))
    for book, work in ((cluster.decode, decode), (cluster.prefill, prefill)):
        for worker_id, amount in work.items():
            book.set_usable(worker_id, True)
            book.report(worker_id, amount)
    return cluster


def _ask(uncached: int, *, below: int = 256, queue: int = 4) -> Ask:
    return Ask(uncached + 1, uncached, below, queue)


def test_threshold_is_exact() -> None:
    view = _cluster({"d0": 0}, {"p0": 0}).view
    assert threshold(_ask(255), view, 0.0).prefill_worker is None
    assert threshold(_ask(256), view, 0.0).prefill_worker == "p0"


def test_threshold_leaves_a_full_queue_alone() -> None:
    cluster = _cluster({"d0": 0}, {"p0": 4, "p1": 3})
    assert threshold(_ask(500), cluster.view, 0.0).prefill_worker == "p1"
    cluster.prefill.place("p1", 1)
    assert (
        threshold(_ask(500), cluster.view, 0.0).prefill_worker == "p1"
    )  # placed work that was reported counts once
    for _ in range(3):
        cluster.prefill.place("p1", 1)
    decision = threshold(_ask(500), cluster.view, 0.0)
    assert decision.prefill_worker is None
    assert "4 hand-offs" in decision.reason


def test_always_policies() -> None:
    view = _cluster({"d0": 0}, {"p0": 99}).view
    assert POLICIES["always-remote"](_ask(1), view, 0.0).prefill_worker == "p0"
    assert POLICIES["always-local"](_ask(9999), view, 0.0).prefill_worker is None
    alone = _cluster({"d0": 0}, {}).view
    for policy in POLICIES.values():
        assert policy(_ask(9999), alone, 0.0).prefill_worker is None


@pytest.mark.parametrize("name", POLICIES)
def test_without_a_decode_worker(name: str) -> None:
    cluster = _cluster({"d0": 0}, {"p0": 0})
    cluster.decode.set_usable("d0", False)
    with pytest.raises(NoWorker):
        POLICIES[name](_ask(500), cluster.view, 0.0)


@given(
    st.sampled_from(sorted(POLICIES)),
    st.dictionaries(
        st.sampled_from(["a", "b", "c", "d"]), st.tuples(st.booleans(), st.integers(0, 9)), min_size=1
    ),
    st.dictionaries(st.sampled_from(["w", "x", "y", "z"]), st.tuples(st.booleans(), st.integers(0, 9))),
    st.integers(0, 1000),
)
def test_never_picks_the_unusable_and_always_the_least_loaded(
    name: str, decode: dict[str, tuple[bool, int]], prefill: dict[str, tuple[bool, int]], uncached: int
) -> None:
    cluster = _cluster({k: v[1] for k, v in decode.items()}, {k: v[1] for k, v in prefill.items()})
    for book, workers in ((cluster.decode, decode), (cluster.prefill, prefill)):
        for worker_id, (up, _) in workers.items():
            book.set_usable(worker_id, up)
    usable = {worker_id: work for worker_id, (up, work) in decode.items() if up}
    if not usable:
        return
    decision = POLICIES[name](_ask(uncached), cluster.view, 0.0)
    assert usable[decision.decode_worker] == min(usable.values())
    if decision.prefill_worker is not None:
        others = {worker_id: work for worker_id, (up, work) in prefill.items() if up}
        assert others[decision.prefill_worker] == min(others.values())


def test_placements_spread_before_anything_is_reported() -> None:
    """Stale reports cause no herd: what was placed counts at once."""
    cluster = _cluster({"d0": 0, "d1": 0, "d2": 0}, {})
    for _ in range(30):
        cluster.decode.place(threshold(_ask(1), cluster.view, 0.0).decode_worker, 1)
    assert cluster.view.decode.placed.tolist() == [10, 10, 10]


def test_a_view_cannot_be_written_and_follows_the_books() -> None:
    cluster = _cluster({"d0": 0}, {})
    view = cluster.view
    with pytest.raises(ValueError, match="read-only"):
        view.decode.placed[0] = 5
    cluster.decode.place("d0", 1)
    assert view.decode.placed.tolist() == [1]


def test_workers_that_stay_keep_their_numbers() -> None:
    cluster = _cluster({"d0": 3, "d1": 5}, {})
    cluster.decode.place("d1", 1)
    cluster.set_workers(["d1", "d2"], [])
    pool = cluster.view.decode
    assert pool.ids == ("d1", "d2")
    assert pool.usable.tolist() == [True, False]
    assert np.array_equal(pool.load, [5, 0])
    cluster.decode.place("d0", -1)  # gone: no books, no error


@given(
    name=st.sampled_from(sorted(POLICIES)),
    uncached=st.integers(0, 10_000),
    below=st.integers(0, 10_000),
    loads=st.lists(st.integers(0, 50), max_size=3),
)
def test_reasons_have_a_few_codes(name: str, uncached: int, below: int, loads: list[int]) -> None:
    """The words of a reason have numbers in them; a metric's label must not."""
    view = _cluster({"d0": 0}, {f"p{at}": load for at, load in enumerate(loads)}).view
    decision = POLICIES[name](_ask(uncached, below=below), view, 0.0)
    assert decision.code in {"short", "long", "no_prefill_worker", "prefill_busy", "always"}
    assert decision.kind == decision.reason.partition(":")[0]
