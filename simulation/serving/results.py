"""From the outcome of a simulated run to figures: those of `bench.figures`, and what only a simulator knows. Pure."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict

import msgspec

from bench.figures import Slo, Summary, summarize
from bench.workload import Schedule
from simulation.serving.cluster import ClusterSpec, Decided, Outcome


class PolicyResult(msgspec.Struct, kw_only=True):
    """One policy at one rate. Latencies in ms, shares from 0 to 1; definitions are in docs/simulate.md."""

    policy: str
    rate: float  # requests a second
    goodput_rps: float
    attainment: float
    ttft_p50_ms: float
    ttft_p99_ms: float
    itl_p50_ms: float
    itl_p99_ms: float
    tpot_p50_ms: float
    e2e_p50_ms: float
    remote_share: float  # of decisions
    prefilled: dict[str, int]  # answered requests, by where their prompts were prefilled in the end
    reasons: dict[str, int]  # decisions, by kind and code
    utilisation: dict[str, float]  # by role: share of the time in which a step ran, the mean of its workers
    utilisation_prompts: dict[str, float]  # of that, steps with prompt tokens
    workers: dict[str, int]
    gpus: int
    cost_per_million_output_tokens_usd: float  # 0: the profile has no price
    cost_per_million_tokens_usd: float  # prompt tokens counted too
    slo: str
    slo_curve: list[tuple[float, float]]  # (times the SLO, share within it)
    profile: str
    derived: bool
    trace: str
    seed: int
    simulated_s: float
    summary: Summary
    counters: dict[str, int]
    decisions: list[Decided]


def result(
    policy: str, rate: float, spec: ClusterSpec, schedule: Schedule, outcome: Outcome, slo: Slo, seed: int
) -> PolicyResult:
    """The figures of one run."""
    summary = summarize(outcome.run, slo, warmup_s=schedule.warmup_s, window_s=schedule.window_s)
    kinds = Counter(one.kind for one in outcome.decisions)
    workers = Counter(one.role for one in outcome.workers)
    busy: dict[str, float] = dict.fromkeys(workers, 0.0)
    prompts: dict[str, float] = dict.fromkeys(workers, 0.0)
    for worker in outcome.workers:
        share = 1 / (workers[worker.role] * max(outcome.end_s, 1e-9))
        busy[worker.role] += worker.busy_s * share
        prompts[worker.role] += worker.prompt_s * share
    price_s = spec.ranks * spec.profile.gpu_hour_usd / 3600
    tokens = summary.output_tps + summary.input_tps
    return PolicyResult(
        policy=policy,
        rate=rate,
        goodput_rps=summary.goodput_rps,
        attainment=summary.attainment,
        ttft_p50_ms=summary.ttft_ms.p50,
        ttft_p99_ms=summary.ttft_ms.p99,
        itl_p50_ms=summary.itl_ms.p50,
        itl_p99_ms=summary.itl_ms.p99,
        tpot_p50_ms=summary.tpot_ms.p50,
        e2e_p50_ms=summary.e2e_ms.p50,
        remote_share=kinds["remote"] / max(1, len(outcome.decisions)),
        prefilled=summary.prefilled,
        reasons=dict(sorted(Counter(f"{one.kind}_{one.code}" for one in outcome.decisions).items())),
        utilisation=busy,
        utilisation_prompts=prompts,
        workers=dict(workers),
        gpus=spec.ranks,
        cost_per_million_output_tokens_usd=_each(price_s, summary.output_tps),
        cost_per_million_tokens_usd=_each(price_s, tokens),
        slo=str(slo),
        slo_curve=summary.slo_curve,
        profile=spec.profile.name,
        derived=spec.profile.derived,
        trace=schedule.trace.name,
        seed=seed,
        simulated_s=outcome.end_s,
        summary=summary,
        counters=dict(sorted(outcome.counters.items())),
        decisions=outcome.decisions,
    )


def _each(price_s: float, tokens_s: float) -> float:
    return 1e6 * price_s / tokens_s if tokens_s else 0.0


def to_json(results: list[PolicyResult]) -> bytes:
    """A list; the same arguments and seed give the same bytes."""
    plain = [
        {**msgspec.to_builtins(one), "decisions": [asdict(each) for each in one.decisions]} for one in results
    ]
    return msgspec.json.format(msgspec.json.encode(plain), indent=1) + b"\n"
