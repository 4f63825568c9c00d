"""Small deployments and traces for the tests of the serving simulation."""

from __future__ import annotations

from bench.load import Job
from bench.traces import Trace, TraceRequest
from bench.workload import Schedule
from engine.api import Spread, StepCosts
from engine.scheduler import Limits
from simulation.serving.cluster import ClusterSpec, Outcome, PoolSpec, ServingCluster
from simulation.serving.front import FrontSpec
from simulation.serving.profiles import Profile

COSTS = StepCosts(base_s=4e-3, sequence_s=1e-4, kv_token_s=1e-7, token_s=5e-5, attention_s=1e-9)
TOKEN_BYTES = 1000


EXACT = Spread(1.0, 1.0, 1.0)


def profile(spread: Spread = EXACT, **changes: float) -> Profile:
    return Profile("test", COSTS, TOKEN_BYTES, decode_spread=spread, prefill_spread=spread, **changes)  # type: ignore[arg-type]


def cluster(
    prefill: int = 1,
    decode: int = 1,
    *,
    tokens: int = 100_000,
    device: Profile | None = None,
    policy: str = "cost",
    max_running: int = 64,
    block_size: int = 16,
) -> ClusterSpec:
    """Workers whose KV holds `tokens`."""
    kv_bytes = tokens * TOKEN_BYTES
    return ClusterSpec(
        device or profile(),
        PoolSpec(prefill, kv_bytes, 1, block_size, Limits(1024, 64)),
        PoolSpec(decode, kv_bytes, 1, block_size, Limits(256, max_running)),
        FrontSpec(policy, ttft_s=0.5, itl_s=0.03),
    )


def schedule(*requests: tuple[float, int, int], blocks: tuple[tuple[int, ...], ...] = ()) -> Schedule:
    """Requests as (arrival_s, input, output); `blocks` of 64 tokens each."""
    made = tuple(
        TraceRequest(number, at_s, inputs, outputs, blocks[number] if blocks else ())
        for number, (at_s, inputs, outputs) in enumerate(requests)
    )
    trace = Trace("test", made, span_s=max(one.arrival_s for one in made) + 1.0, block_tokens=64)
    return Schedule(trace, [Job(one, one.arrival_s) for one in made], 0.0, trace.span_s)


def run(spec: ClusterSpec, arrivals: Schedule, **options: object) -> Outcome:
    return ServingCluster(spec, arrivals, **options).run()  # type: ignore[arg-type]
