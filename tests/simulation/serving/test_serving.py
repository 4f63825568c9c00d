"""The serving simulation: figures that were computed by hand, one end for each request, and runs that equal steps."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given, reject, settings
from hypothesis import strategies as st

from bench.figures import Slo, summarize
from bench.synthetic import Synthetic
from bench.traces import TraceError
from bench.workload import Schedule, Workload
from engine.api import Spread
from simulation.serving.cluster import Failure, Outcome, ServingCluster
from tests.simulation.serving.clusters import COSTS, TOKEN_BYTES, cluster, profile, run, schedule

MESSAGE_S = profile().message_s


def step_s(sequences: int, kv_tokens: int, tokens: int = 0, attention: float = 0.0) -> float:
    return (
        COSTS.base_s
        + COSTS.sequence_s * sequences
        + COSTS.kv_token_s * kv_tokens
        + COSTS.token_s * tokens
        + COSTS.attention_s * attention
    )


def times(outcome: Outcome, number: int) -> list[float]:
    return outcome.run.records[number].piece_times.tolist()


# ---- by hand -----------------------------------------------------------------------------------------------------


def test_one_request_takes_what_its_steps_take() -> None:
    outcome = run(cluster(prefill=0), schedule((0.0, 200, 4)))
    first = step_s(0, 0, 200, 200 * 100)
    expected = [first]
    for drawn in range(3):
        expected.append(expected[-1] + step_s(1, 200 + drawn))
    assert times(outcome, 0) == pytest.approx([4 * MESSAGE_S + at for at in expected])
    assert outcome.end_s == pytest.approx(times(outcome, 0)[-1])


def test_a_prompt_is_cut_to_the_budget_and_delays_who_decodes() -> None:
    outcome = run(cluster(prefill=0), schedule((0.0, 2, 60), (0.05, 300, 2)))
    gaps = np.diff(times(outcome, 0))
    alone = [step_s(1, 2 + drawn) for drawn in range(59)]
    longer = [at for at, gap in enumerate(gaps) if gap > 2 * alone[at]]
    # 255 of 256 tokens are left for the prompt while one decodes, then 45.
    assert len(longer) == 1 and longer[0] + 1 < len(gaps)
    at = longer[0]
    assert gaps[at] == pytest.approx(step_s(1, 2 + at, 255, 255 * 127.5))
    assert gaps[at + 1] == pytest.approx(step_s(1, 3 + at, 45, 45 * (22.5 + 255)))
    assert gaps[at + 2] == pytest.approx(step_s(2, 4 + at + 300))


def test_a_hand_off_takes_messages_compute_and_link() -> None:
    device = profile(handoff_latency_s=0.01, handoff_byte_s=1e-8)
    spec = cluster(device=device, policy="always-remote")
    outcome = run(spec, schedule((0.0, 501, 1)))
    computed = step_s(0, 0, 500, 500 * 250)
    link = 0.01 + 500 * TOKEN_BYTES * 1e-8
    # To the router, the decode worker and the prefill worker; the token to the router and the client.
    expected = 3 * MESSAGE_S + computed + link + step_s(1, 500) + 2 * MESSAGE_S
    assert times(outcome, 0) == pytest.approx([expected])
    assert outcome.run.records[0].prefilled == "remote"
    assert [(one.kind, one.prefill_worker) for one in outcome.decisions] == [("remote", "prefill-0")]


def test_layer_groups_hide_the_link_behind_the_step() -> None:
    device = profile(handoff_latency_s=0.0, handoff_byte_s=4e-8)
    whole = run(cluster(device=device, policy="always-remote"), schedule((0.0, 501, 1)))
    parts = run(
        cluster(device=replace(device, layer_groups=4), policy="always-remote"), schedule((0.0, 501, 1))
    )
    link_s = 500 * TOKEN_BYTES * 4e-8
    assert link_s < 0.75 * step_s(0, 0, 500, 500 * 250)
    assert times(whole, 0)[0] - times(parts, 0)[0] == pytest.approx(0.75 * link_s)


def test_an_equal_prefix_is_computed_once() -> None:
    blocks = ((1, 2, 3), (1, 2, 4))
    outcome = run(cluster(prefill=0), schedule((0.0, 192, 2), (1.0, 192, 2), blocks=blocks))
    assert [record.cached_tokens for record in outcome.run.records] == [0, 128]
    ttft = [times(outcome, number)[0] - at for number, at in enumerate((0.0, 1.0))]
    assert ttft[1] - 4 * MESSAGE_S == pytest.approx(step_s(0, 0, 64, 64 * (32 + 128)))


# ---- runs of steps -----------------------------------------------------------------------------------------------


def synthetic(seed: int, rate: float, seconds: float = 6.0, outputs: str = "uniform:1:60") -> Schedule:
    source = Synthetic(
        rate,
        arrivals="gamma:2",
        input_tokens="uniform:1:900",
        output_tokens=outputs,
        prefix_groups=3,
        prefix_tokens=128,
        prefix_share=0.5,
    )
    return Workload(source, seed=seed, duration_s=seconds).schedule(rate)


def told(outcome: Outcome) -> object:
    records = [
        (one.piece_times.tolist(), one.end, one.error, one.prefilled, one.cached_tokens)
        for one in outcome.run.records
    ]
    return records, outcome.decisions, outcome.workers, outcome.counters, outcome.end_s


@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    shape=st.sampled_from([(1, 1), (2, 2), (0, 2), (1, 3)]),
    tokens=st.sampled_from([1_600, 4_000, 100_000]),
    rate=st.sampled_from([2.0, 8.0, 20.0]),
    policy=st.sampled_from(["cost", "always-remote", "threshold"]),
)
def test_runs_equal_steps(seed: int, shape: tuple[int, int], tokens: int, rate: float, policy: str) -> None:
    """Together or one by one, also where memory is short: the same tokens at the same times, the same decisions."""
    spec = cluster(*shape, tokens=tokens, device=profile(Spread(1.0, 1.2, 2.0)), policy=policy)
    try:
        arrivals = synthetic(seed, rate)
    except TraceError:  # chance brought nobody in these seconds
        reject()
    together = run(spec, arrivals, seed=seed)
    apart = run(spec, arrivals, seed=seed, batch=False)
    assert told(together) == told(apart)
    assert together.events < apart.events


def test_whoever_missed_its_target_is_told_of_once() -> None:
    """With a target below every gap; also when the run ends before the router looks again."""
    spec = cluster(0, 1)
    spec = replace(spec, front=replace(spec.front, itl_s=1e-3))
    simulated = ServingCluster(spec, schedule((0.0, 50, 30), (0.02, 50, 30), (5.0, 50, 1)))
    simulated.run()
    assert [flight.told_late for flight in simulated.flights] == [True, True, False]
    assert not simulated.front.cluster.decode.pool.below.any()


def test_runs_spare_events() -> None:
    spec, arrivals = cluster(0, 1), schedule((0.0, 100, 500), (0.1, 100, 300))
    assert run(spec, arrivals, batch=False).events > 10 * run(spec, arrivals).events


# ---- always ------------------------------------------------------------------------------------------------------


@settings(max_examples=12, deadline=None)
@example(289, 600, "cost", [])
@given(
    seed=st.integers(0, 10_000),
    tokens=st.sampled_from([600, 1_600, 20_000]),
    policy=st.sampled_from(["cost", "always-remote", "always-local", "random", "round-robin"]),
    deaths=st.lists(
        st.tuples(
            st.sampled_from(["decode-0", "decode-1", "prefill-0"]),
            st.floats(0.0, 6.0),
            st.floats(0.0, 3.0),
        ),
        max_size=3,
    ),
)
def test_every_request_has_one_end(
    seed: int, tokens: int, policy: str, deaths: list[tuple[str, float, float]]
) -> None:
    arrivals = synthetic(seed, 12.0)
    spec = cluster(1, 2, tokens=tokens, policy=policy)
    simulated = ServingCluster(spec, arrivals, failures=tuple(Failure(*death) for death in deaths))
    outcome = simulated.run()
    for record, job in zip(outcome.run.records, arrivals.jobs, strict=True):
        assert record.end is not None and record.end >= record.scheduled
        if record.ok:
            pieces = record.piece_times.tolist()
            assert len(pieces) == job.request.output_tokens == record.completion_tokens
            assert pieces == sorted(pieces) and pieces[0] > record.scheduled
        else:
            assert record.error in ("unavailable", "invalid", "no_room")
    if not deaths:
        too_long = [
            job.request.input_tokens + job.request.output_tokens > tokens // 16 * 16 for job in arrivals.jobs
        ]
        assert [record.error for record in outcome.run.records] == [
            "invalid" if one else "" for one in too_long
        ]
    assert not simulated.front.flights
    for worker in simulated.decode.values():
        if worker.alive:
            assert not worker.landing.open
        if not deaths:
            worker.role.check()
    assert all(totals.busy_s <= outcome.end_s * (1 + 1e-9) for totals in outcome.workers)


def test_the_seed_decides_everything() -> None:
    spec = cluster(2, 2, device=profile(Spread(1.0, 1.3, 2.0)))
    arrivals = synthetic(3, 10.0)
    assert told(run(spec, arrivals, seed=5)) == told(run(spec, arrivals, seed=5))
    assert told(run(spec, arrivals, seed=5)) != told(run(spec, arrivals, seed=6))


def figures(outcome: Outcome, arrivals: Schedule) -> tuple[float, float]:
    summary = summarize(outcome.run, Slo(ttft=0.5, itl=0.03), warmup_s=0.0, window_s=arrivals.window_s)
    return summary.attainment, summary.ttft_ms.mean


def test_more_load_is_never_better() -> None:
    source = Synthetic(1.0, input_tokens="uniform:100:900", output_tokens="40")
    found = []
    for rate in (2.0, 10.0, 30.0, 90.0):
        arrivals = Workload(source, seed=1, requests=120).schedule(rate)
        found.append(figures(run(cluster(1, 1), arrivals), arrivals))
    attainments, ttfts = zip(*found, strict=True)
    assert list(attainments) == sorted(attainments, reverse=True) and attainments[0] > attainments[-1]
    assert list(ttfts) == sorted(ttfts)


def test_split_workers_keep_gaps_short_where_mixed_ones_cannot() -> None:
    """Long prompts: beside them every mixed worker's gaps grow, a decode worker's do not."""
    arrivals = schedule(*((0.02 * number, 900, 50) for number in range(40)))
    gaps = {}
    for policy in ("always-remote", "colocated"):
        outcome = run(cluster(2, 2).under(policy), arrivals)
        every = np.concatenate([np.diff(record.piece_times) for record in outcome.run.records])
        gaps[policy] = float(np.percentile(every, 99))
        assert {one.kind for one in outcome.decisions} == {"remote" if policy != "colocated" else "local"}
        assert len(outcome.workers) == 4
    assert gaps["always-remote"] < 0.8 * gaps["colocated"]


def test_colocation_wins_where_there_is_little_to_prefill() -> None:
    arrivals = schedule(*((0.01 * number, 20, 80) for number in range(150)))
    ends = {
        policy: run(cluster(2, 2, max_running=16).under(policy), arrivals).end_s
        for policy in ("always-remote", "colocated")
    }
    assert ends["colocated"] < 0.85 * ends["always-remote"]


def test_unknown_policies_and_workers_are_refused() -> None:
    with pytest.raises(ValueError, match="must be one of"):
        cluster().under("cheapest")
    with pytest.raises(ValueError, match="threshold:TOKENS"):
        cluster().under("threshold:many")
    assert cluster().under("threshold:77").front.local_below_tokens == 77
    with pytest.raises(ValueError, match="no worker 'decode-9'"):
        ServingCluster(cluster(), schedule((0.0, 5, 5)), failures=(Failure("decode-9", 1.0, 1.0),))


def test_a_lost_prefill_worker_costs_time_and_no_request() -> None:
    arrivals = schedule(*((0.05 * number, 900, 5) for number in range(20)))
    spec = cluster(1, 1, policy="always-remote")
    outcome = run(spec, arrivals, failures=(Failure("prefill-0", 0.22, 0.4),))
    assert all(record.ok for record in outcome.run.records)
    places = {record.prefilled for record in outcome.run.records}
    assert "remote" in places and places & {"local", "mixed"}


def test_a_lost_decode_worker_loses_what_it_had() -> None:
    arrivals = schedule((0.0, 50, 400), (3.0, 50, 10))
    outcome = run(cluster(1, 1), arrivals, failures=(Failure("decode-0", 0.5, 1.0),))
    lost, later = outcome.run.records
    assert lost.error == "unavailable" and 0 < len(lost.piece_times) < 400
    assert later.ok


def test_requests_wait_in_the_router_and_are_refused_when_it_takes_too_long() -> None:
    spec = cluster(0, 1, max_running=1)
    front = replace(spec.front, worker_queue=0, max_queued=3, max_queued_s=0.5)
    spec = replace(spec, front=front)
    arrivals = schedule(*((0.001 * number, 20, 40) for number in range(6)))
    outcome = run(spec, arrivals)
    errors = [record.error for record in outcome.run.records]
    assert (
        errors[0] == errors[1] == "" and errors[4:] == ["no_room"] * 2
    )  # three waited, the others found it full
    assert "within 0.5 s" in outcome.run.records[3].message
    first, second = (times(outcome, number) for number in range(2))
    assert second[0] > first[-1]


def test_many_workers() -> None:
    chance = random.Random(1)
    arrivals = schedule(*((0.005 * number, chance.randint(10, 900), 5) for number in range(60)))
    outcome = run(cluster(100, 200, tokens=2_000), arrivals)
    assert all(record.ok for record in outcome.run.records)
    assert len(outcome.workers) == 300
