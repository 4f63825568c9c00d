"""A simulated decode worker: the real decode role over timed hand-offs. A colocated one is handed none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from bench.record import Record
from bench.traces import TraceRequest
from decode.request import Request
from decode.role import DecodeRole
from engine.api import Costs, RequestEnd, RequestKey, StepCosts, StepOutput, Submit
from engine.costs import StepModel
from engine.ledger import BlockLedger, SlotLedger
from engine.scheduler import Limits
from engine.sequence import Sequence
from kvtransfer.messages import Hello, KvSpec
from router.placements import Placement
from router.policy import Decision
from router.prefix_index import Expected
from simulation.serving.landing import TimedHandoff, TimedLanding
from simulation.serving.names import NamedHints
from simulation.serving.worker import Worker


@dataclass(slots=True, eq=False)
class Flight:
    """One request under way. `spans`: of the worker's token times, those that are its own."""

    key: int
    request: TraceRequest
    record: Record
    arrived: float = 0.0  # at the router
    decision: Decision | None = None
    placement: Placement | None = None
    expected: list[Expected] = field(default_factory=list)
    worker: DecodeWorker | None = None
    sequence: Sequence | None = None
    since: int | None = None  # begin of the span that is open
    spans: list[tuple[int, int]] = field(default_factory=list)
    preemptions: int = 0  # of its sequence, as far as `spans` know
    told_late: bool = False
    hints: NamedHints | None = None


class TimedDecodeRole(DecodeRole):
    """The role; prompts are named by the trace, and what hand-offs cost is learned for all pairs together."""

    names: Callable[[int], list[bytes]]
    opened: Callable[[Request], None]
    timed: Callable[[int, float], None]

    def _place(self, request: Request, now: float) -> None:
        if not request.sequence.hashes:
            request.sequence.hashes = self.names(request.submit.request.key)
            self.opened(request)
        super()._place(request, now)

    def _handoff_timed(self, peer: str, size_bytes: int, exposed_s: float) -> None:
        self.timed(size_bytes, exposed_s)


@dataclass(frozen=True, slots=True)
class DecodeSpec:
    """What a decode worker has."""

    worker_id: str
    blocks: int
    block_size: int
    limits: Limits
    max_waiting: int
    token_bytes: int
    handoff_timeout_s: float
    costs: StepCosts


class DecodeWorker(Worker):
    """`front` hears of first tokens and ends, each a message later."""

    role: TimedDecodeRole

    def __init__(
        self,
        spec: DecodeSpec,
        names: Callable[[int], list[bytes]],
        on_first: Callable[[Flight, float], None],
        on_end: Callable[[Flight, str, str, float], None],
        **options: Any,
    ) -> None:
        self.spec = spec
        self.role = TimedDecodeRole(
            _hello(spec),
            BlockLedger(spec.blocks, spec.block_size),
            SlotLedger(0),
            spec.limits,
            max_waiting=spec.max_waiting,
            handoff_timeout_s=spec.handoff_timeout_s,
            landing=TimedLanding,
        )
        self.role.costs = StepModel(Costs(step=spec.costs, seen=1))
        self.role.names = names
        self.role.opened = self._opened
        landing = self.role.landing
        assert isinstance(landing, TimedLanding)
        self.landing = landing
        super().__init__(worker_id=spec.worker_id, costs=spec.costs, side=self.role, **options)
        self.flights: dict[int, Flight] = {}
        self.preempted = 0
        self._on_first = on_first
        self._on_end = on_end

    # ---- what comes in -----------------------------------------------------------------------------------------

    def submit(self, flight: Flight, submit: Submit) -> None:
        self.flights[flight.key] = flight
        flight.worker = self
        self.receive(self._submit, submit)

    def _submit(self, submit: Submit, now: float) -> None:
        self.role.handle(submit, now)

    def arrived(self, handoff: TimedHandoff, tokens: int, last: bool) -> None:
        """KV of a hand-off is here. The last piece is news; others get their blocks at the next turn."""
        if not self.alive or handoff.over:
            return
        handoff.arrived = max(handoff.arrived, tokens)
        if last or not self._computing:
            self.wake()

    def failed(self, handoff: TimedHandoff, reason: str) -> None:
        """The prefill worker will not bring the rest."""
        self.receive(self._failed, handoff, reason)

    def _failed(self, handoff: TimedHandoff, reason: str, now: float) -> None:
        if not handoff.over:
            self.landing.fail(handoff, reason, now)

    # ---- what the loop asks ------------------------------------------------------------------------------------

    def before_step(self, now: float) -> None:
        self.role.tick(now)

    def next_look(self) -> float | None:
        return self.landing.next_look()

    def after_schedule(self, now: float) -> None:
        for action in self.role.drain():
            if isinstance(action, RequestEnd):  # refused
                self._ended_request(action, now)
        if self.role.scheduler.preemptions != self.preempted:
            self.preempted = self.role.scheduler.preemptions
            end = len(self.token_times)
            for (
                flight
            ) in self.flights.values():  # one may be admitted again by the very plan that preempted it
                sequence = flight.sequence
                if sequence is not None and sequence.preemptions != flight.preemptions:
                    flight.preemptions = sequence.preemptions
                    if flight.since is not None:
                        flight.spans.append((flight.since, end))
                        flight.since = None

    def after_commit(self, now: float, steps: int) -> None:
        flights = self.flights
        for action in self.role.drain():
            if not isinstance(action, StepOutput):
                if isinstance(action, RequestEnd):
                    self._ended_request(action, now)
                continue
            for entry in action.tokens:
                flight = flights[entry.request.key]
                if flight.since is None:
                    flight.since = len(self.token_times) - steps
                    if not flight.spans:
                        self.agenda.at(now + self.message_s, self._on_first, flight, now)
            for end in action.ends:
                self._ended_request(end, now)

    def _ended_request(self, end: RequestEnd, now: float) -> None:
        flight = self.flights.pop(end.request.key)
        if flight.since is not None:
            flight.spans.append((flight.since, len(self.token_times)))
            flight.since = None
        record = flight.record
        if end.trace is not None:
            record.prefilled = end.trace.prefilled
            record.cached_tokens = end.trace.cached_tokens
        self.agenda.at(now + self.message_s, self._on_end, flight, end.reason, end.detail, now)

    def targets(self, sequences: list[Sequence]) -> list[Flight]:
        told = []
        for sequence in sequences:
            flight = self.flights.get(sequence.request.key)
            if flight is not None and not flight.told_late:
                flight.told_late = True
                told.append(flight)
        return told

    def _opened(self, request: Request) -> None:
        flight = self.flights[request.submit.request.key]
        flight.sequence = request.sequence


def key_of(flight: Flight) -> RequestKey:
    return RequestKey(0, flight.key)


def _hello(spec: DecodeSpec) -> Hello:
    """KV of `token_bytes` a token, as one layer of one head."""
    kv = KvSpec(
        model="simulated",
        layers=1,
        q_heads=1,
        kv_heads=1,
        head_dim=max(1, spec.token_bytes // 4),
        dtype="bfloat16",
        block_size=spec.block_size,
        chunk_tokens=spec.block_size,
    )
    return Hello(
        worker_id=spec.worker_id, incarnation=spec.worker_id, kv=kv, transport="simulated", endpoints=[]
    )
