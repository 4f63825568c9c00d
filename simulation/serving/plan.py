"""The search behind `baton plan`: the split of devices and the tensor parallelism that serve the highest rate. Pure.

Every split of the devices into prefill and decode workers of some sizes is a candidate, colocation among them. Most
are pruned by a bound that needs no simulation: no pool can do more work than its devices have seconds. The rest are
simulated at rising rates, the most promising first, and a candidate that cannot beat the best so far is left.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import msgspec

from bench.figures import RateSearch, Slo
from bench.traces import Trace, TraceError
from bench.workload import Workload
from engine.costs import decode_step_s, prompt_attention
from simulation.serving.cluster import ClusterSpec, ServingCluster
from simulation.serving.profiles import Profile
from simulation.serving.results import PolicyResult, result

GIB = 1 << 30
_TOLERANCE = 0.08  # between the rate that is within the SLO and the next that is not
_TRIES = 9


@dataclass(slots=True)
class Split:
    """One way to use the devices. `bound`: no higher rate is possible; `rate`: the highest found within the SLO."""

    prefill: int
    prefill_tp: int
    decode: int
    decode_tp: int
    bound: float = 0.0
    rate: float = 0.0
    result: PolicyResult | None = None
    note: str = ""

    @property
    def gpus(self) -> int:
        return self.prefill * self.prefill_tp + self.decode * self.decode_tp

    @property
    def name(self) -> str:
        if not self.prefill:
            return f"{self.decode} mixed tp{self.decode_tp}"
        return f"{self.prefill}P tp{self.prefill_tp} + {self.decode}D tp{self.decode_tp}"


@dataclass(frozen=True, slots=True)
class Goal:
    """What is planned for."""

    workload: Workload
    slo: Slo
    gpus: int
    attainment: float = 0.9
    seed: int = 0
    tensor_parallel: tuple[int, ...] = (1, 2, 4, 8)


def splits(profile: Profile, gpus: int, sizes: Iterable[int]) -> Iterator[Split]:
    """Every way to use all devices with workers of one size for each role, where the model fits."""
    fitting = [size for size in sizes if size <= gpus and profile.kv_gib(size) > 0]
    for decode_tp in fitting:
        if gpus % decode_tp == 0:
            yield Split(0, 1, gpus // decode_tp, decode_tp)
        for prefill_tp in fitting:
            for prefill in range(1, gpus // prefill_tp + 1):
                left = gpus - prefill * prefill_tp
                if left and left % decode_tp == 0:
                    yield Split(prefill, prefill_tp, left // decode_tp, decode_tp)


def bound(split: Split, spec: ClusterSpec, trace: Trace, slo: Slo) -> float:
    """Requests a second that no policy can exceed: all prompts at the better of both pools' speed, all decodes in the
    largest batch that the target for ITL and the memory allow."""
    profile = spec.profile
    cached = shared_share(trace)
    count = len(trace.requests)
    prompt = sum(one.input_tokens for one in trace.requests) / count * (1 - cached)
    attention = sum(float(prompt_attention(one.input_tokens, 0)) for one in trace.requests)
    attention *= (1 - cached) / count
    answer = sum(one.output_tokens for one in trace.requests) / count
    context = sum(one.input_tokens + one.output_tokens / 2 for one in trace.requests) / count
    costs = profile.costs(split.decode_tp)
    memory = profile.kv_gib(split.decode_tp) * GIB * split.decode_tp / profile.kv_token_bytes
    batch = min(spec.decode.limits.max_running, memory / context)
    each_s = costs.sequence_s + costs.kv_token_s * context
    if slo.itl is not None and each_s:
        batch = min(batch, (slo.itl - costs.base_s) / each_s)
    if batch < 1:
        return 0.0
    decode_s = answer * float(decode_step_s(costs, batch, batch * context)) / batch
    here_s = prompt * costs.token_s + attention * costs.attention_s
    if not split.prefill:
        return split.decode / (decode_s + here_s)
    there = profile.costs(split.prefill_tp, "prefill")
    there_s = prompt * there.token_s + attention * there.attention_s
    # What one pool has to spare the other may use: prompts may be computed on both sides, decodes on one.
    both = (split.decode * there_s + split.prefill * here_s) / (decode_s * there_s + here_s * there_s)
    return min(split.decode / decode_s, both)


def shared_share(trace: Trace) -> float:
    """Prompt tokens that an unlimited cache would have, as a share of all."""
    seen: set[int] = set()
    shared = total = 0
    for request in trace.requests:
        begin, known = 0, True
        for block, edge in zip(request.blocks, trace.edges(request), strict=False):
            known = known and block in seen
            shared += (edge - begin) if known else 0
            seen.add(block)
            begin = edge
        total += request.input_tokens
    return shared / total if total else 0.0


def deployment(split: Split, spec: ClusterSpec, policy: str = "cost") -> ClusterSpec:
    """The specification of a split: `spec` with other pools, which get all memory that weights leave."""
    pools = {}
    for role, workers, ranks in (
        ("prefill", split.prefill, split.prefill_tp),
        ("decode", split.decode, split.decode_tp),
    ):
        pool = spec.prefill if role == "prefill" else spec.decode
        kv_bytes = int(spec.profile.kv_gib(ranks) * GIB) * ranks
        pools[role] = replace(pool, workers=workers, tensor_parallel=ranks, kv_bytes=kv_bytes)
    return replace(
        spec,
        prefill=pools["prefill"],
        decode=pools["decode"],
        front=replace(spec.front, policy=policy),
    )


def search(
    spec: ClusterSpec, goal: Goal, progress: Callable[[Split, int, int], None] = lambda *_: None
) -> list[Split]:
    """All splits, the best first; those that were not simulated say why. Raises ValueError when nothing fits.

    `progress(split, how many are done, how many there are)` is called before each simulation.
    """
    source = goal.workload.source
    if not isinstance(source, Trace):
        source = goal.workload.schedule(goal.workload.rate).trace
    found = list(splits(spec.profile, goal.gpus, goal.tensor_parallel))
    if not found:
        raise ValueError(
            f"the model ({spec.profile.weights_gib:g} GiB of weights) fits on no split of {goal.gpus} devices of "
            f"{spec.profile.memory_gib:g} GiB with tensor parallelism {', '.join(map(str, goal.tensor_parallel))}"
        )
    scaled = source.scaled(goal.workload.input_scale, goal.workload.output_scale)
    for split in found:
        split.bound = bound(split, spec, scaled, goal.slo)
    found.sort(key=lambda split: -split.bound)
    best = colocated = 0.0
    for number, split in enumerate(found):
        progress(split, number, len(found))
        floor = colocated if not split.prefill else best
        if split.bound <= floor:
            split.note = f"cannot exceed {split.bound:.2f}/s" if split.bound > 0 else "misses the ITL target"
            continue
        split.rate, split.result = _highest(deployment(split, spec), goal, split.bound, floor)
        if split.result is None:
            split.note = f"below {floor:.2f}/s" if floor else "never within the SLO"
        best = max(best, split.rate)
        if not split.prefill:
            colocated = max(colocated, split.rate)
    found.sort(key=lambda split: (-split.rate, -split.bound))
    return found


def _highest(spec: ClusterSpec, goal: Goal, most: float, floor: float) -> tuple[float, PolicyResult | None]:
    """The highest rate within the SLO; given up at once where `floor`, the best so far, is not."""
    first = floor if floor else most / 2
    rates = RateSearch(first, attainment=goal.attainment, tolerance=_TOLERANCE, most=_TRIES)
    best: PolicyResult | None = None
    while (rate := rates.next()) is not None:
        if rate > most * 1.05:
            rates.tell(rate, 0.0)  # cannot be
            continue
        try:
            schedule = goal.workload.schedule(rate)
        except TraceError:
            break  # the trace is used up: what was found so far is a lower bound
        outcome = ServingCluster(spec, schedule, seed=goal.seed).run()
        told = result(spec.front.policy, rate, spec, schedule, outcome, goal.slo, goal.seed)
        rates.tell(rate, told.attainment)
        if told.attainment >= goal.attainment:
            best = told if best is None or told.rate > best.rate else best
        elif floor and best is None:
            return 0.0, None
    return (rates.met or 0.0), best


def verdict(found: list[Split]) -> str:
    """Which is best, and what colocation would do, in words."""
    best = found[0]
    mixed = max((one for one in found if not one.prefill), key=lambda one: one.rate, default=None)
    if not best.rate:
        return "no split keeps this SLO at any rate: relax it, or add devices"
    if mixed is None:
        return f"best: {best.name}, {best.rate:.2f} requests/s"
    if best is mixed or best.rate <= mixed.rate * (1 + _TOLERANCE):
        split = next((one for one in found if one.prefill and one.rate), None)
        beside = f"; the best split, {split.name}, reaches {split.rate:.2f}/s" if split else ""
        return (
            f"colocation is as good or better here: {mixed.name}, {mixed.rate:.2f} requests/s{beside} (differences "
            f"below {_TOLERANCE:.0%} are within the search's own step)"
        )
    gain = best.rate / mixed.rate - 1 if mixed.rate else float("inf")
    return (
        f"best: {best.name}, {best.rate:.2f} requests/s, {gain:+.0%} against the best colocation "
        f"({mixed.name}, {mixed.rate:.2f}/s)"
    )


def to_json(found: list[Split], said: str) -> bytes:
    """The table with each split's figures at its highest rate, and the verdict."""
    table = []
    for one in found:
        row = {
            "prefill": one.prefill,
            "prefill_tp": one.prefill_tp,
            "decode": one.decode,
            "decode_tp": one.decode_tp,
            "gpus": one.gpus,
            "bound_rps": one.bound,
            "rate_rps": one.rate,
            "note": one.note,
        }
        if one.result is not None:
            figures = ("goodput_rps", "attainment", "ttft_p99_ms", "itl_p99_ms", "remote_share")
            row |= {figure: getattr(one.result, figure) for figure in figures}
        table.append(row)
    return msgspec.json.format(msgspec.json.encode({"verdict": said, "splits": table}), indent=1) + b"\n"
