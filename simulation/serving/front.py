"""The router of a serving simulation: the real policy, view, books and prefix index; requests in, decisions out.

What workers say reaches the books when the next decision is taken, in its order and as old as it would be: nobody else
looks at them.
"""

from __future__ import annotations

from dataclasses import dataclass
from struct import unpack

import msgspec

from engine.api import Costs, HandoffCost, KvEvents, SamplingParams, Spread, StepCosts, Submit
from engine.costs import StepModel
from router.admission import Admission
from router.placements import Placements
from router.policies import find
from router.policy import Ask, NoRoom, NoWorker, choose
from router.prefix_index import PrefixIndex
from router.view import ClusterView, PoolBook
from simulation.serving.decode_worker import Flight, key_of
from simulation.serving.names import NamedHints, TraceNames
from simulation.serving.worker import Report, Worker


@dataclass(frozen=True, slots=True)
class FrontSpec:
    """Of the configuration's section `router`, and by the same names."""

    policy: str = "cost"
    ttft_s: float = 1.0
    itl_s: float = 0.1
    local_below_tokens: int = 256
    max_prefill_waiting: int = 8
    prefix_index_entries: int = 1_000_000
    worker_queue: int = 32
    max_queued: int = 512
    max_queued_s: float = 60.0
    max_active: int = 1024


@dataclass(frozen=True, slots=True)
class Told:
    """What a worker tells of itself at start."""

    step: StepCosts
    decode_spread: Spread
    prefill_spread: Spread
    block_size: int


class Refusal(Exception):
    """The router refuses the request; `error` is one of `bench.record.ERRORS`."""

    def __init__(self, error: str, message: str) -> None:
        super().__init__(message)
        self.error = error


class Front:
    """One router. Workers are those of `set_workers`; they are known by their ids. All requests are of one tenant."""

    def __init__(self, spec: FrontSpec, names: dict[int, TraceNames], handoff: tuple[float, float]) -> None:
        self.spec = spec
        self.cluster = ClusterView()
        self.index = PrefixIndex(spec.prefix_index_entries)
        self.placements = Placements(self.cluster)
        self.flights: dict[int, Flight] = {}
        self.admission = Admission({}, spec.max_queued)
        self._policy = find(spec.policy)
        self._names = names
        self._workers: dict[str, tuple[Worker, str]] = {}  # with the role
        self._incarnations: dict[str, str] = {}
        self._noisy: dict[Worker, None] = {}  # have news, or may have
        self._handoffs = StepModel(Costs(handoffs=[HandoffCost("all", *handoff, Spread(1.0, 1.0, 1.0))]))
        self._told_handoffs: list[HandoffCost] = []
        self._next_key = 1

    # ---- who is there ------------------------------------------------------------------------------------------

    def set_workers(self, decode: list[str], prefill: list[str]) -> None:
        self._incarnations = dict.fromkeys([*decode, *prefill], "0")
        self.cluster.set_workers(decode, prefill)
        self._set_index()

    def _set_index(self) -> None:
        decode, prefill = (
            [(one, self._incarnations[one]) for one in pool.ids]
            for pool in (self.cluster.decode.pool, self.cluster.prefill.pool)
        )
        self.index.set_workers(decode, prefill)

    def joined(self, worker: Worker, role: str, told: Told) -> None:
        """A worker, or its next incarnation, can be reached."""
        worker_id = worker.worker_id
        if worker_id in self._workers:
            self._incarnations[worker_id] = str(int(self._incarnations[worker_id]) + 1)
            self._set_index()
        self._workers[worker_id] = worker, role
        worker.on_news = self._noisy_now
        book = self._book(role)
        book.set_usable(worker_id, True)
        numbers = msgspec.structs.asdict(told.step)
        for kind, spread in (("decode", told.decode_spread), ("prefill", told.prefill_spread)):
            numbers |= {f"{kind}_{name}": value for name, value in msgspec.structs.asdict(spread).items()}
        book.tell(worker_id, numbers)
        self.cluster.told_spreads()
        self._load(worker_id, Report(worker.side.load(), 0.0, worker.agenda.now))
        self.index.snapshot(worker_id, self._incarnations[worker_id], 0, told.block_size, 0, 1, [])
        self._tell_handoffs()

    def lost(self, worker_id: str) -> list[Flight]:
        """It cannot be reached; returns what was there, which is over."""
        worker, role = self._workers[worker_id]
        self._noisy.pop(worker, None)
        self.placements.lost(worker_id, role)
        gone = [
            flight
            for flight in self.flights.values()
            if flight.decision is not None and flight.decision.decode_worker == worker_id
        ]
        for flight in gone:
            self.ended(flight)
        return gone

    def _book(self, role: str) -> PoolBook:
        return self.cluster.decode if role == "decode" else self.cluster.prefill

    # ---- the life of a request ---------------------------------------------------------------------------------

    @property
    def active(self) -> int:
        return len(self.flights) + len(self.admission)

    def has_room(self, now: float) -> bool:
        """As `WorkerDispatcher._has_room`, of what has been heard until now."""
        self._hear(now)
        pool = self.cluster.view.decode
        if not pool.usable.any():
            return True
        return bool((pool.candidates & (pool.sequences < pool.max_running + self.spec.worker_queue)).any())

    def decide(self, flight: Flight, now: float) -> Submit:
        """Takes the decision and books it, after `has_room`. Raises Refusal."""
        spec, request = self.spec, flight.request
        hints = NamedHints(self._names, request)
        flight.hints = hints
        decode_cached, prefill_cached = self.index.match(hints, now)
        ask = Ask(
            request.input_tokens,
            request.input_tokens - 1,
            spec.local_below_tokens,
            spec.max_prefill_waiting,
            decode_cached=decode_cached,
            prefill_cached=prefill_cached,
            request_id=str(request.number),
            ttft_s=max(0.001, spec.ttft_s - (now - flight.arrived)),
            itl_s=spec.itl_s,
        )
        try:
            decision = choose(self._policy, ask, self.cluster.view, now)
        except NoRoom as error:
            raise Refusal("no_room", str(error)) from None
        except NoWorker as error:
            raise Refusal("unavailable", str(error)) from None
        flight.decision = decision
        flight.key = self._next_key
        self._next_key += 1
        self.flights[flight.key] = flight
        flight.placement = self.placements.submitted(decision, ask, now)
        placed = [(self.cluster.decode, decision.decode_worker, decode_cached)]
        if decision.prefill_worker is not None:
            placed.append((self.cluster.prefill, decision.prefill_worker, prefill_cached))
        for book, worker_id, cached in placed:
            expected = self.index.expect(hints, worker_id, int(cached[book.at(worker_id)]), now)
            if expected is not None:
                flight.expected.append(expected)
        return Submit(
            request=key_of(flight),
            request_id=str(request.number),
            prompt=[request.number & 0x7FFFFFFF] * request.input_tokens,
            sampling=SamplingParams(temperature=0, max_tokens=request.output_tokens),
            prefill_worker=decision.prefill_worker or decision.alternative or "",
            local_below_tokens=decision.local_below_tokens,
            local=decision.prefill_worker is None and decision.alternative is not None,
            handoff_s=decision.handoff_s,
        )

    def first_token(self, flight: Flight, now: float) -> None:
        for expected in flight.expected:
            self.index.settle(expected, now)
        flight.expected.clear()
        if flight.placement is not None and flight.key in self.flights:
            self.placements.token(flight.placement, 0, now, None)

    def ended(self, flight: Flight) -> None:
        if self.flights.pop(flight.key, None) is None:
            return
        assert flight.placement is not None
        self.placements.ended(flight.placement)
        for expected in flight.expected:
            self.index.forget(expected)
        flight.expected.clear()

    # ---- what workers say --------------------------------------------------------------------------------------

    def handed_off(self, size_bytes: int, exposed_s: float) -> None:
        """What a hand-off took beside queue and compute. All pairs are alike: one of them stands for all."""
        self._handoffs.handed_off("all", size_bytes, exposed_s)

    def _tell_handoffs(self) -> None:
        costs = self._handoffs.costs.handoffs
        decode, prefill = self.cluster.decode.pool.ids, self.cluster.prefill.pool.ids
        if costs is not self._told_handoffs and decode and prefill:
            self._told_handoffs = costs
            one = costs[0]
            self.cluster.told_handoffs(decode[0], [HandoffCost(prefill[0], one.latency_s, one.byte_s)])

    def _noisy_now(self, worker: Worker) -> None:
        self._noisy[worker] = None

    def _hear(self, now: float) -> None:
        """All that has come until now."""
        for worker in list(self._noisy):
            worker.catch_up(now)
            news = worker.news
            report: Report | None = None
            later = []
            while news:
                entry = news.popleft()
                when, kind, what = entry
                if when > now:
                    later.append(entry)
                elif kind == "load":
                    report = what
                elif kind == "kv":
                    self._cached(worker.worker_id, what)
                else:
                    for flight in what:
                        if flight.key in self.flights:
                            self.placements.choice_ended(flight.placement, 0)
            news.extend(later)
            if report is not None:
                self._load(worker.worker_id, report)
            if not later and not worker.in_run:
                del self._noisy[worker]
        self._tell_handoffs()

    def _cached(self, worker_id: str, events: KvEvents) -> None:
        self.index.events(
            worker_id,
            self._incarnations[worker_id],
            events.seq,
            unpack(f"<{len(events.added) // 8}Q", events.added),
            unpack(f"<{len(events.evicted) // 8}Q", events.evicted),
            events.cleared,
        )

    def _load(self, worker_id: str, report: Report) -> None:
        """As `Placements.told`, without the message in between."""
        load = report.load
        role = self._workers[worker_id][1]
        book = self._book(role)
        waits = load.waiting + load.running if role == "decode" else 0
        book.report(worker_id, waits + load.handoffs)
        queue = load.queue
        numbers = {
            "running": load.running,
            "waiting": load.waiting,
            "handoffs": load.handoffs,
            "waiting_tokens": load.waiting_tokens,
            "kv_tokens": queue.kv_tokens + report.kv_tokens,
            "prompt_tokens": queue.prompt_tokens,
            "attention": queue.attention,
            "room": queue.room,
            "max_running": queue.max_running,
            "step_tokens": queue.step_tokens,
            "capacity_tokens": queue.capacity_tokens,
            "available_tokens": queue.available_tokens + report.available_tokens,
            "token_bytes": queue.token_bytes,
            "busy": report.busy,
        }
        book.tell(worker_id, numbers)
        book.reported_at(worker_id, report.news_at)
