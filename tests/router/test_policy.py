"""Policies over views made by hand, and the books behind the views."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.policies import POLICIES, find, threshold
from router.policy import Ask, Decision, NoRoom, NoWorker, PolicyError, choose
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


LEAST_LOADED = ["threshold", "always-remote", "always-local"]


@given(
    st.sampled_from(LEAST_LOADED),
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
    codes = {"short", "long", "no_prefill_worker", "prefill_busy", "always", "random", "turn", "slo", "cost"}
    assert decision.code in codes
    assert decision.kind == decision.reason.partition(":")[0]


def _cached(tokens: int, decode: list[int], prefill: list[int]) -> Ask:
    arrays = [np.array(numbers, dtype=np.int64) for numbers in (decode, prefill)]
    return Ask(tokens + 1, tokens, 256, 4, decode_cached=arrays[0], prefill_cached=arrays[1])


def test_what_is_cached_draws_a_request_and_is_not_prefilled() -> None:
    view = _cluster({"d0": 1, "d1": 3, "d2": 0}, {"p0": 0, "p1": 2}).view
    decision = threshold(_cached(1000, [0, 640, 0], [0, 320]), view, 0.0)
    assert (decision.decode_worker, decision.prefill_worker) == ("d1", "p1")
    assert "360 tokens" in decision.reason
    decision = threshold(_cached(1000, [0, 800, 0], [0, 320]), view, 0.0)
    assert (decision.decode_worker, decision.prefill_worker) == ("d1", None)
    assert "200 tokens" in decision.reason
    assert threshold(_cached(1000, [0, 1008, 0], [0, 0]), view, 0.0).reason.startswith("local: 0 tokens")
    for name in ("always-local", "always-remote"):
        assert POLICIES[name](_cached(1000, [0, 640, 0], [0, 0]), view, 0.0).decode_worker == "d1"


def test_what_is_cached_does_not_outweigh_a_crowd_or_a_lost_worker() -> None:
    cluster = _cluster({"d0": 1, "d1": 5, "d2": 6}, {"p0": 3, "p1": 4})
    asked = _cached(1000, [0, 320, 640], [0, 960])
    decision = threshold(asked, cluster.view, 0.0)
    assert decision.decode_worker == "d1"
    assert decision.prefill_worker == "p0"  # the other one's queue is full
    cluster.decode.set_usable("d1", False)
    assert threshold(asked, cluster.view, 0.0).decode_worker == "d0"
    cluster.decode.set_usable("d0", False)
    assert threshold(asked, cluster.view, 0.0).decode_worker == "d2"


@given(st.data())
def test_cached_or_not_no_policy_picks_a_lost_worker(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 5))
    loads = data.draw(st.lists(st.integers(0, 9), min_size=2 * count, max_size=2 * count))
    usable = data.draw(st.lists(st.booleans(), min_size=2 * count, max_size=2 * count))
    cached = data.draw(st.lists(st.integers(0, 1000), min_size=2 * count, max_size=2 * count))
    decode = {f"d{i}": loads[i] for i in range(count)}
    prefill = {f"p{i}": loads[count + i] for i in range(count)}
    cluster = _cluster(decode, prefill)
    for at in range(count):
        cluster.decode.set_usable(f"d{at}", usable[at])
        cluster.prefill.set_usable(f"p{at}", usable[count + at])
    asked = _cached(1000, cached[:count], cached[count:])
    for policy in POLICIES.values():
        if not any(usable[:count]):
            with pytest.raises(NoWorker):
                policy(asked, cluster.view, 0.0)
            continue
        decision = policy(asked, cluster.view, 0.0)
        assert usable[int(decision.decode_worker[1:])]
        if decision.prefill_worker is not None:
            assert usable[count + int(decision.prefill_worker[1:])]


@given(
    name=st.sampled_from(sorted(POLICIES)),
    decode=st.lists(st.sampled_from(["well", "lost", "draining", "full"]), min_size=1, max_size=20),
    prefill=st.lists(st.sampled_from(["well", "lost", "draining", "full"]), max_size=20),
    uncached=st.integers(0, 5000),
    seed=st.integers(0, 1 << 30),
)
def test_no_policy_picks_a_lost_draining_or_full_worker(
    name: str, decode: list[str], prefill: list[str], uncached: int, seed: int
) -> None:
    states = {f"d{at}": state for at, state in enumerate(decode)}
    states |= {f"p{at}": state for at, state in enumerate(prefill)}
    cluster = ClusterView()
    cluster.set_workers([one for one in states if one[0] == "d"], [one for one in states if one[0] == "p"])
    cluster.decided = seed % 1000
    rng = np.random.default_rng(seed)
    for worker_id, state in states.items():
        book = cluster.decode if worker_id[0] == "d" else cluster.prefill
        book.set_usable(worker_id, state != "lost")
        book.set_draining(worker_id, state == "draining")
        book.report(worker_id, int(rng.integers(0, 5)))
        book.tell(worker_id, {"room": 0.0 if state == "full" else 3.0, "running": float(rng.integers(0, 9))})
    cached = [rng.integers(0, 1000, len(workers)) for workers in (decode, prefill)]
    asked = replace(_ask(uncached), request_id=str(seed), decode_cached=cached[0], prefill_cached=cached[1])
    if "well" not in decode:
        with pytest.raises(NoWorker) as refused:
            choose(POLICIES[name], asked, cluster.view, 0.0)
        assert isinstance(refused.value, NoRoom) == ("full" in decode)
        return
    decision = choose(POLICIES[name], asked, cluster.view, 0.0)
    for chosen in (decision.decode_worker, decision.prefill_worker, decision.alternative):
        assert chosen is None or states[chosen] == "well"


def test_a_worker_is_full_when_what_was_placed_fills_it() -> None:
    cluster = _cluster({"d0": 0}, {})
    cluster.decode.tell("d0", {"room": 2.0})
    cluster.decode.expect("d0", 0.0, 10, 0, 0)
    assert choose(POLICIES["cost"], _ask(5), cluster.view, 0.0).decode_worker == "d0"
    cluster.decode.expect("d0", 0.0, 10, 0, 0)
    with pytest.raises(NoRoom):
        choose(POLICIES["cost"], _ask(5), cluster.view, 0.0)


def test_random_is_drawn_from_the_requests_id() -> None:
    view = _cluster({"d0": 0, "d1": 0}, {"p0": 0, "p1": 0}).view

    def ways() -> list[tuple[str, str | None]]:
        asked = [replace(_ask(9), request_id=f"request-{number}") for number in range(200)]
        decisions = [POLICIES["random"](ask, view, 0.0) for ask in asked]
        return [(one.decode_worker, one.prefill_worker) for one in decisions]

    first = ways()
    assert first == ways()
    assert set(first) == {(d, p) for d in ("d0", "d1") for p in ("p0", "p1", None)}


def test_round_robin_visits_every_pair() -> None:
    cluster = _cluster({"d0": 0, "d1": 0}, {"p0": 0, "p1": 0})
    pairs = []
    for _ in range(8):
        decision = POLICIES["round-robin"](_ask(9), cluster.view, 0.0)
        cluster.decided += 1
        pairs.append((decision.decode_worker, decision.prefill_worker))
    assert len(set(pairs[:4])) == 4 and pairs[:4] == pairs[4:]


def test_an_answer_that_cannot_be_carried_out_is_refused() -> None:
    view = _cluster({"d0": 0}, {"p0": 0}).view
    for decode, prefill in (("d1", None), ("d0", "p1"), ("p0", None)):
        with pytest.raises(PolicyError, match="which is no"):
            choose(lambda *_, d=decode, p=prefill: Decision(d, p, "", 0, ""), _ask(9), view, 0.0)


def test_the_example_of_the_documentation_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "policies.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (tmp_path / "away.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    policy = find("away:long_prompts_away")
    cluster = _cluster({"d0": 0, "d1": 0}, {"p0": 0, "p1": 0})
    cluster.decode.tell("d0", {"running": 5.0})
    cluster.prefill.expect("p0", 0.0, 100, 0, 0)
    short, long = (choose(policy, _ask(tokens), cluster.view, 0.0) for tokens in (10, 2000))
    assert (short.decode_worker, short.prefill_worker) == ("d1", None)
    assert (long.decode_worker, long.prefill_worker) == ("d1", "p1")
