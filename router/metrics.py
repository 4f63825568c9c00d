"""The router's numbers: counted while requests run, turned into Prometheus' words only when somebody asks.

`RequestMetrics` is what the hot path touches: plain numbers, no locks (one event loop), a fraction of a microsecond for
each token entry. What workers report lies in their links already and costs nothing until a scrape, when `Collector`
reads all of it. The names are documented in docs/metrics.md; nothing here is global.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric

from baton.v1 import inference_pb2 as api
from router.account import Account
from router.policy import Decision
from router.prefix_index import PrefixIndex

# In seconds. First tokens and waits: from a cached prompt on an idle GPU to a queue that is minutes long.
FIRST_TOKEN_S = (
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.15,
    0.2,
    0.3,
    0.5,
    0.75,
    1,
    2,
    3,
    5,
    7.5,
    10,
    20,
    40,
    80,
)
BETWEEN_TOKENS_S = (
    0.001,
    0.0025,
    0.005,
    0.0075,
    0.01,
    0.015,
    0.02,
    0.03,
    0.04,
    0.05,
    0.075,
    0.1,
    0.2,
    0.5,
    1,
    2,
    5,
)
WHOLE_S = (0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960)
QUEUE_S = (0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 40, 80)
HANDOFF_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.3, 0.5, 1, 2, 5, 10, 30)


# Measured over predicted; and seconds by which a first token came later than the best way promised.
RATIO = (0.1, 0.25, 0.5, 0.7, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5, 2, 3, 5, 10, 30)
REGRET_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


class Histogram:
    """Counts by upper bound. prometheus_client's own takes a lock and walks the bounds: several times the price."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        self.counts[bisect_left(self.bounds, value)] += times
        self.total += value * times

    def family(self, name: str, documentation: str) -> Metric:
        labels = [*(str(float(bound)) for bound in self.bounds), "+Inf"]
        family = HistogramMetricFamily(name, documentation)
        family.add_metric([], list(zip(labels, accumulate(self.counts), strict=True)), self.total)
        return family


class RequestMetrics:
    """All that is counted about requests; see docs/metrics.md for what each means."""

    def __init__(self) -> None:
        self.first_token = Histogram(FIRST_TOKEN_S)
        self.between_tokens = Histogram(BETWEEN_TOKENS_S)
        self.whole = Histogram(WHOLE_S)
        self.queue = Histogram(QUEUE_S)
        self.handoff = Histogram(HANDOFF_S)
        self.prediction = Histogram(RATIO)
        self.regret = Histogram(REGRET_S)
        self.chosen_regret = Histogram(REGRET_S)
        self.prompt_tokens = self.generated_tokens = self.cached_tokens = self.remote_tokens = 0
        self.handoff_bytes = 0
        self.outcomes: Counter[str] = Counter()
        self.decisions: Counter[tuple[str, str]] = Counter()

    def decided(self, decision: Decision, prompt_tokens: int) -> None:
        """A request was given to a worker."""
        self.decisions[decision.kind, decision.code] += 1
        self.prompt_tokens += prompt_tokens

    def tokens(self, account: Account, choice: int, count: int, now: float) -> float | None:
        """`count` tokens of one choice came together; the time since the last ones is shared out among them. Returns
        the gap before each, None for the first."""
        account.generated_tokens += count
        self.generated_tokens += count
        last = account.last_token.get(choice)
        account.last_token[choice] = now
        if last is not None:
            gap_s = (now - last) / count
            self.between_tokens.observe(gap_s, count)
            return gap_s
        if account.first_token is None:
            account.first_token = now
            self.first_token.observe(now - account.arrived)
            if account.decision is not None and account.decision.ttft_s > 0:
                self._predicted(account.decision, now - account.submitted)
        return None

    def _predicted(self, decision: Decision, ttft_s: float) -> None:
        self.prediction.observe(ttft_s / decision.ttft_s)
        self.regret.observe(max(0.0, ttft_s - decision.best_s))
        self.chosen_regret.observe(max(0.0, decision.ttft_s - decision.best_s))

    def traced(self, trace: api.Trace) -> None:
        """A worker is done with a request, whether or not anybody still waits for it."""
        if trace.ttft_s:  # it came out of the queue
            self.queue.observe(trace.queue_s)
        self.cached_tokens += trace.cached_tokens
        if trace.remote_tokens:
            self.handoff.observe(trace.handoff_s)
            self.remote_tokens += trace.remote_tokens
            self.handoff_bytes += trace.handoff_bytes

    def ended(self, account: Account) -> None:
        self.outcomes[account.outcome] += 1
        if account.outcome in ("stop", "length"):
            self.whole.observe(account.ended - account.arrived)

    def families(self) -> Iterator[Metric]:
        yield self.first_token.family(
            "baton_time_to_first_token_seconds",
            "From the arrival of a request at this router to its first token.",
        )
        yield self.between_tokens.family(
            "baton_inter_token_latency_seconds", "Between two tokens of an answer, as they reach this router."
        )
        yield self.whole.family(
            "baton_e2e_request_latency_seconds", "From the arrival of a request to the end of its answer."
        )
        yield self.queue.family(
            "baton_request_queue_time_seconds",
            "At the decode worker, until a request was scheduled or its hand-off begun.",
        )
        yield self.handoff.family(
            "baton_handoff_seconds", "From the begin of a hand-off to its last verified chunk."
        )
        yield self.prediction.family(
            "baton_ttft_prediction_ratio", "First tokens: time since the decision, over what was predicted."
        )
        yield self.regret.family(
            "baton_ttft_regret_seconds", "First tokens: later than the quickest way was predicted to be."
        )
        yield self.chosen_regret.family(
            "baton_chosen_regret_seconds", "Predictions: the chosen way's TTFT beyond the quickest way's."
        )
        for name, value, documentation in (
            ("prompt_tokens", self.prompt_tokens, "Prompt tokens of requests that were sent to a worker."),
            ("generation_tokens", self.generated_tokens, "Tokens of answers that workers sent."),
            (
                "cached_prompt_tokens",
                self.cached_tokens,
                "Prompt tokens found in a decode worker's prefix cache.",
            ),
            (
                "remote_prompt_tokens",
                self.remote_tokens,
                "Prompt tokens whose KV was handed off and verified.",
            ),
            ("handoff_bytes", self.handoff_bytes, "Bytes of KV that were handed off and verified."),
        ):
            yield CounterMetricFamily(f"baton_{name}", documentation, value=value)
        requests = CounterMetricFamily("baton_requests", "Requests that are over.", labels=["outcome"])
        for outcome, count in self.outcomes.items():
            requests.add_metric([outcome], count)
        yield requests
        decisions = CounterMetricFamily(
            "baton_decisions", "Where prompts were sent to be prefilled, and why.", labels=["kind", "reason"]
        )
        for labels, count in self.decisions.items():
            decisions.add_metric(labels, count)
        yield decisions


class Collector:
    """Everything that one router knows, as Prometheus sees it at a scrape.

    `workers`: the latest status of each worker and how often it was started again.
    """

    def __init__(
        self,
        requests: RequestMetrics,
        workers: Callable[[], Iterable[tuple[api.WorkerStatus, int]]],
        active: Callable[[], int],
        queued: Callable[[], int],
        index: PrefixIndex,
        *,
        restarts: int,
        build: dict[str, str],
    ) -> None:
        self._requests = requests
        self._workers = workers
        self._active = active
        self._queued = queued
        self._index = index
        self._restarts = restarts
        self._build = build

    def collect(self) -> Iterator[Metric]:
        info = GaugeMetricFamily("baton_build_info", "Always 1; the labels tell.", labels=list(self._build))
        info.add_metric(list(self._build.values()), 1)
        yield info
        yield GaugeMetricFamily(
            "baton_active_requests", "Requests under way in this router.", value=self._active()
        )
        yield GaugeMetricFamily(
            "baton_queued_requests", "Requests that wait in this router for their turn.", value=self._queued()
        )
        yield CounterMetricFamily(
            "baton_router_restarts", "How often this router was started again.", value=self._restarts
        )
        yield from self._requests.families()
        yield from index_families(self._index)
        yield from worker_families(self._workers())


def index_families(index: PrefixIndex) -> Iterator[Metric]:
    """The prefix index of this router."""
    yield GaugeMetricFamily(
        "baton_prefix_index_entries", "Blocks at workers that the prefix index knows.", value=index.entries
    )
    for name, value, documentation in (
        ("lookups", index.lookups, "Prompts that were looked up."),
        ("hits", index.hits, "Prompts of which some worker had a block."),
        ("resyncs", index.resyncs, "Snapshots of workers' prefix caches that were read."),
        ("gaps", index.gaps, "Batches of KV events, or pieces of snapshots, that were missed."),
        ("dropped", index.dropped, "Entries that were given up, since there were too many."),
    ):
        yield CounterMetricFamily(f"baton_prefix_index_{name}", documentation, value=value)


_GAUGES = {
    "running": "Sequences in the batch.",
    "waiting": "Requests that wait for the scheduler or for a twin's prefix.",
    "waiting_tokens": "Prompt tokens that are not computed yet.",
    "handoffs": "Open hand-offs.",
}
_BLOCKS = ("free", "cached", "held", "landing")
_SLOTS = ("free", "leased", "quarantined")
_WORKER = ["worker", "role"]


def worker_families(workers: Iterable[tuple[api.WorkerStatus, int]]) -> Iterator[Metric]:
    """Gauges of the workers that answer, and the counters of all that are members."""
    found = list(workers)
    up = GaugeMetricFamily("baton_worker_up", "1 while the worker can be reached.", labels=_WORKER)
    restarts = CounterMetricFamily(
        "baton_worker_restarts", "How often the worker was started again.", labels=_WORKER
    )
    steps = CounterMetricFamily("baton_worker_steps", "Engine steps of this life of it.", labels=_WORKER)
    plain = {
        name: GaugeMetricFamily(f"baton_worker_{name}", text, labels=_WORKER)
        for name, text in _GAUGES.items()
    }
    blocks = GaugeMetricFamily(
        "baton_worker_kv_blocks", "KV blocks by where they are now.", labels=[*_WORKER, "state"]
    )
    slots = GaugeMetricFamily(
        "baton_worker_landing_slots", "Landing slots by what they are now.", labels=[*_WORKER, "state"]
    )
    counters: dict[str, CounterMetricFamily] = {}
    for status, restarted in found:
        labels = [status.worker_id, status.role]
        up.add_metric(labels, status.alive)
        restarts.add_metric(labels, restarted)
        steps.add_metric(labels, status.step)
        for name, count in sorted(status.counters.items()):
            if name not in counters:
                counters[name] = CounterMetricFamily(
                    f"baton_worker_{name}", f"The worker's own count: {name}.", labels=_WORKER
                )
            counters[name].add_metric(labels, count)
        if not status.alive:
            continue  # what it last said of itself is not so any more
        for name, family in plain.items():
            family.add_metric(labels, getattr(status, name))
        for state in _BLOCKS:
            blocks.add_metric([*labels, state], getattr(status.ledger, f"blocks_{state}"))
        for state in _SLOTS if status.ledger.slots_total else ():
            slots.add_metric([*labels, state], getattr(status.ledger, f"slots_{state}"))
    yield from (up, restarts, steps, *plain.values(), blocks, slots, *counters.values())
