"""A serving cluster under virtual time: workers, links, the router, faults; a trace in, records out.

    request due --message--> front: decision --message--> decode worker --message--> prefill worker
                                                              ^--- pieces over the link: latency, bytes, queueing ---'
    tokens --message--> front --message--> client

Everything follows from the arguments; the same seed gives the same run.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal

from bench.record import Record, Run
from bench.workload import Schedule
from engine.ledger import BlockLedger
from engine.scheduler import Limits
from router.admission import Ticket
from router.policies import find
from simulation.serving.agenda import Agenda
from simulation.serving.decode_worker import DecodeSpec, DecodeWorker, Flight
from simulation.serving.front import Front, FrontSpec, Refusal, Told
from simulation.serving.landing import TimedHandoff
from simulation.serving.names import TraceNames, names_of
from simulation.serving.prefill_side import PrefillSide, Source
from simulation.serving.profiles import Floats, Profile, noise
from simulation.serving.worker import Worker
from worker.loop import LOAD_PERIOD_S

Role = Literal["prefill", "decode"]

COLOCATED = "colocated"
DETECT_S = 0.1  # until the death of a process is known everywhere


@dataclass(frozen=True, slots=True)
class PoolSpec:
    """Workers of one role. `kv_bytes`: of one worker, all its ranks together."""

    workers: int
    kv_bytes: int
    tensor_parallel: int = 1
    block_size: int = 16
    limits: Limits = field(default_factory=Limits)
    max_waiting: int = 512


@dataclass(frozen=True, slots=True)
class ClusterSpec:
    """A deployment and the device below it."""

    profile: Profile
    prefill: PoolSpec
    decode: PoolSpec
    front: FrontSpec = field(default_factory=FrontSpec)
    handoff_timeout_s: float = 30.0

    def under(self, policy: str) -> ClusterSpec:
        """The same with another policy; `threshold:N`: that one, with N tokens. Raises ValueError for an unknown one.

        `colocated`: as many workers, all of the decode kind, no hand-offs; placed by the `cost` policy, so that it is
        the best of its kind."""
        name, colon, threshold = policy.partition(":")
        if colon and name == "threshold":
            if not threshold.isdecimal():
                raise ValueError(f"policy {policy!r}: write threshold:TOKENS, such as threshold:2048")
            return replace(self, front=replace(self.front, policy=name, local_below_tokens=int(threshold)))
        if policy != COLOCATED:
            find(policy)
            return replace(self, front=replace(self.front, policy=policy))
        workers = self.decode.workers + self.prefill.workers
        return replace(
            self,
            prefill=replace(self.prefill, workers=0),
            decode=replace(self.decode, workers=workers),
            front=replace(self.front, policy="cost"),
        )

    @property
    def ranks(self) -> int:
        """Devices in all."""
        pools = (self.prefill, self.decode)
        return sum(pool.workers * pool.tensor_parallel for pool in pools)


@dataclass(frozen=True, slots=True)
class Failure:
    """A worker dies at `at_s` and the next incarnation is there `down_s` later."""

    worker_id: str
    at_s: float
    down_s: float


@dataclass(frozen=True, slots=True)
class Decided:
    """One decision. `became`: where the prompt was prefilled in the end, empty when it was not."""

    request: int
    kind: Literal["local", "remote"]
    decode_worker: str
    prefill_worker: str
    code: str
    became: str


@dataclass(frozen=True, slots=True)
class WorkerTotals:
    """What one worker (all its incarnations) did."""

    worker_id: str
    role: str
    ranks: int
    busy_s: float
    prompt_s: float
    steps: int
    computed_tokens: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """A run: `run` is what `bench.figures` reads. `end_s`: when the last request was over."""

    run: Run
    decisions: list[Decided]
    workers: list[WorkerTotals]
    end_s: float
    events: int
    counters: dict[str, int]


class ServingCluster:
    """One run of one deployment on one schedule."""

    def __init__(
        self,
        spec: ClusterSpec,
        schedule: Schedule,
        *,
        seed: int = 0,
        failures: tuple[Failure, ...] = (),
        batch: bool = True,
    ) -> None:
        self.spec = spec
        self.agenda = Agenda()
        self._batch = batch
        self._schedule = schedule
        self._seed = seed
        self._noise: dict[str, Floats] = {}
        sizes = {pool.block_size for pool in (spec.decode, spec.prefill) if pool.workers}
        self._names = {size: TraceNames(schedule.trace, size) for size in sizes}
        link = spec.profile.handoff(spec.prefill.tensor_parallel, spec.decode.tensor_parallel)
        self._latency_s, self._byte_s = link
        self.front = Front(spec.front, self._names, link)
        self.decode: dict[str, DecodeWorker] = {}
        self.prefill: dict[str, Worker] = {}
        self._sides: dict[str, PrefillSide] = {}
        self._link_free: dict[str, float] = {}
        self._totals: dict[str, WorkerTotals] = {}
        self._counters: dict[str, int] = {}
        self._turns: dict[int, Flight] = {}  # who waits in the router, by ticket
        self.flights: list[Flight] = []
        self.open = len(schedule.jobs)
        names = [
            [f"{role}-{number}" for number in range(pool.workers)]
            for role, pool in (("decode", spec.decode), ("prefill", spec.prefill))
        ]
        self.front.set_workers(*names)
        for worker_id in names[1]:
            self._start_prefill(worker_id)
        for worker_id in names[0]:
            self._start_decode(worker_id)
        for job in schedule.jobs:
            request = job.request
            record = Record(
                request.number, job.at_s, request.input_tokens, request.output_tokens, warmup=job.warmup
            )
            flight = Flight(0, request, record)
            self.flights.append(flight)
            self.agenda.at(job.at_s + spec.profile.message_s, self._arrive, flight)
        for failure in failures:
            if failure.worker_id not in self.decode and failure.worker_id not in self.prefill:
                known = ", ".join([*self.decode, *self.prefill])
                raise ValueError(
                    f"there is no worker {failure.worker_id!r} that could fail; there are {known}"
                )
            self.agenda.at(failure.at_s, self._fail, failure)

    # ---- workers -----------------------------------------------------------------------------------------------

    def _noise_of(self, worker_id: str) -> Floats:
        """Steps of prompts and decodes have one spread here: that of the kind which the worker mostly runs."""
        profile = self.spec.profile
        spread = profile.prefill_spread if worker_id.startswith("prefill") else profile.decode_spread
        if worker_id not in self._noise:
            self._noise[worker_id] = noise(spread, self._seed * 1_000_003 + len(self._noise))
        return self._noise[worker_id]

    def _blocks(self, pool: PoolSpec) -> int:
        blocks = pool.kv_bytes // (self.spec.profile.kv_token_bytes * pool.block_size)
        if blocks < 1:
            raise ValueError(
                f"kv_cache_gib is too small: {pool.kv_bytes} bytes hold no block of {pool.block_size} tokens of "
                f"{self.spec.profile.kv_token_bytes} bytes"
            )
        return blocks

    def _told(self, pool: PoolSpec, role: Role) -> Told:
        profile = self.spec.profile
        costs = profile.costs(pool.tensor_parallel, role)
        return Told(costs, profile.decode_spread, profile.prefill_spread, pool.block_size)

    def _start_decode(self, worker_id: str) -> None:
        pool, profile = self.spec.decode, self.spec.profile
        worker = DecodeWorker(
            DecodeSpec(
                worker_id,
                self._blocks(pool),
                pool.block_size,
                pool.limits,
                pool.max_waiting,
                profile.kv_token_bytes,
                self.spec.handoff_timeout_s,
                profile.costs(pool.tensor_parallel),
            ),
            names=lambda key: self._prompt_names(self.front.flights[key], pool.block_size),
            on_first=self._first,
            on_end=self._ended,
            agenda=self.agenda,
            noise=self._noise_of(worker_id),
            message_s=profile.message_s,
            itl_s=self.spec.front.itl_s,
            batch=self._batch,
        )
        worker.role.timed = self.front.handed_off
        worker.landing.begin_at = lambda handoff: self._begin(worker, handoff)
        worker.landing.over = self._over
        self.decode[worker_id] = worker
        self.front.joined(worker, "decode", self._told(pool, "decode"))

    def _start_prefill(self, worker_id: str) -> None:
        pool, profile = self.spec.prefill, self.spec.profile
        side = PrefillSide(
            BlockLedger(self._blocks(pool), pool.block_size),
            pool.limits,
            pool.max_waiting,
            profile.kv_token_bytes,
            names=lambda handoff: self._handoff_names(handoff, pool.block_size),
            send=lambda *piece: self._send(worker_id, *piece),
            fail=self._handoff_failed,
        )
        worker = _PrefillWorker(
            side,
            agenda=self.agenda,
            worker_id=worker_id,
            costs=profile.costs(pool.tensor_parallel, "prefill"),
            noise=self._noise_of(worker_id),
            message_s=profile.message_s,
            itl_s=self.spec.front.itl_s,
            batch=self._batch,
        )
        self.prefill[worker_id] = worker
        self._sides[worker_id] = side
        self._link_free[worker_id] = 0.0
        self.front.joined(worker, "prefill", self._told(pool, "prefill"))

    def _prompt_names(self, flight: Flight, block_size: int) -> list[bytes]:
        assert flight.hints is not None
        return names_of(flight.hints.chain(block_size).known)

    def _handoff_names(self, handoff: TimedHandoff, block_size: int) -> list[bytes]:
        return self._prompt_names(self.front.flights[handoff.submit.request.key], block_size)

    # ---- requests ----------------------------------------------------------------------------------------------

    def _arrive(self, flight: Flight) -> None:
        """Goes in, waits for its turn, or is refused, as in `WorkerDispatcher.generate`."""
        now, front = self.agenda.now, self.front
        flight.record.sent = flight.record.scheduled
        flight.arrived = now
        if front.active >= front.spec.max_active:
            self._tell_end(flight, "no_room", f"this router has {front.spec.max_active} requests already")
            return
        request, admission = flight.request, front.admission
        ticket = admission.enter("", 0, request.input_tokens + request.output_tokens)
        if not len(admission) and front.has_room(now):
            admission.admitted(ticket)
            self._submit(flight)
        elif admission.full:
            self._tell_end(flight, "no_room", f"{admission.max_waiting} requests wait at this router already")
        else:
            if not len(admission):
                self.agenda.at(now + LOAD_PERIOD_S, self._look_for_room)
            admission.wait(ticket)
            self._turns[ticket.arrival] = flight
            self.agenda.at(now + front.spec.max_queued_s, self._waited, ticket)

    def _waited(self, ticket: Ticket) -> None:
        flight = self._turns.pop(ticket.arrival, None)
        if flight is not None:
            self.front.admission.leave(ticket)
            self._tell_end(flight, "no_room", f"no room within {self.front.spec.max_queued_s:g} s")

    def _look_for_room(self) -> None:
        """Reports come all the time: while somebody waits they are looked at as often as a worker makes them."""
        self._next_turns()
        if len(self.front.admission):
            self.agenda.at(self.agenda.now + LOAD_PERIOD_S, self._look_for_room)

    def _next_turns(self) -> None:
        admission = self.front.admission
        while len(admission) and self.front.has_room(self.agenda.now):
            ticket = admission.next()
            if ticket is None:
                return
            self._submit(self._turns.pop(ticket.arrival))

    def _tell_end(self, flight: Flight, error: str, message: str) -> None:
        self._over_for_client(flight, error, message, self.agenda.now + self.spec.profile.message_s)

    def _submit(self, flight: Flight) -> None:
        now = self.agenda.now
        try:
            submit = self.front.decide(flight, now)
        except Refusal as refusal:
            self._tell_end(flight, refusal.error, str(refusal))
            return
        assert flight.decision is not None
        worker = self.decode[flight.decision.decode_worker]
        self.agenda.at(now + self.spec.profile.message_s, worker.submit, flight, submit)

    def _first(self, flight: Flight, drawn: float) -> None:
        self.front.first_token(flight, self.agenda.now)

    def _ended(self, flight: Flight, reason: str, detail: str, drawn: float) -> None:
        if flight.key not in self.front.flights:
            return  # its worker was lost before this could be said
        self.front.ended(flight)
        error = "" if reason in ("stop", "length") else "no_room" if reason == "no_room" else "invalid"
        self._tell_end(flight, error, detail)
        self._next_turns()

    def _over_for_client(self, flight: Flight, error: str, message: str, now: float) -> None:
        record, later = flight.record, 2 * self.spec.profile.message_s
        worker = flight.worker
        if worker is not None:
            for first, end in flight.spans:
                record.piece_times.extend([at + later for at in worker.token_times[first:end]])
            record.piece_tokens.extend([1] * len(record.piece_times))
            record.completion_tokens = len(record.piece_times)
        flight.worker = flight.sequence = flight.hints = None
        record.prompt_tokens = flight.request.input_tokens
        record.end = now
        record.finish_reason = "" if error else "length"
        if error:
            record.fail(error, message)
        self.open -= 1

    # ---- hand-offs ---------------------------------------------------------------------------------------------

    def _begin(self, worker: DecodeWorker, handoff: TimedHandoff) -> str:
        to = self.prefill.get(handoff.to)
        if to is None or not to.alive:
            return f"not connected to {handoff.to}"
        side = self._sides[handoff.to]
        self.agenda.at(self.agenda.now + self.spec.profile.message_s, to.receive, side.begin, handoff)
        return ""

    def _over(self, handoff: TimedHandoff) -> None:
        to = self.prefill.get(handoff.to)
        if to is not None:
            side = self._sides[handoff.to]
            self.agenda.at(self.agenda.now + self.spec.profile.message_s, to.receive, side.over, handoff)

    def _handoff_failed(self, handoff: TimedHandoff, reason: str) -> None:
        worker = self.decode[self._decoder(handoff)]
        self.agenda.at(self.agenda.now + self.spec.profile.message_s, worker.failed, handoff, reason)

    def _decoder(self, handoff: TimedHandoff) -> str:
        decision = self.front.flights[handoff.submit.request.key].decision
        assert decision is not None
        return decision.decode_worker

    def _send(self, worker_id: str, source: Source, tokens: int, last: bool, step_s: float) -> None:
        """A piece leaves: behind what the link has, as early as its layers were computed; the last layer group not
        before the step's end."""
        profile, handoff, now = self.spec.profile, source.handoff, self.agenda.now
        if handoff.over or handoff.submit.request.key not in self.front.flights:
            return
        seconds = tokens * profile.kv_token_bytes * self._byte_s
        groups = profile.layer_groups
        begin = max(self._link_free[worker_id], now - (1 - 1 / groups) * step_s)
        free = max(begin + seconds, now + seconds / groups)
        self._link_free[worker_id] = free
        worker = self.decode[self._decoder(handoff)]
        self.agenda.at(free + self._latency_s, worker.arrived, handoff, source.sent, last)

    # ---- faults ------------------------------------------------------------------------------------------------

    def _fail(self, failure: Failure) -> None:
        worker: Worker = self.decode.get(failure.worker_id) or self.prefill[failure.worker_id]
        if not worker.alive:
            return
        worker.stop()
        self._count(worker)
        self.agenda.at(self.agenda.now + DETECT_S, self._noticed, worker)
        self.agenda.at(self.agenda.now + max(failure.down_s, DETECT_S), self._back, failure.worker_id)

    def _noticed(self, worker: Worker) -> None:
        now, message_s = self.agenda.now, self.spec.profile.message_s
        worker_id = worker.worker_id
        if isinstance(worker, DecodeWorker):
            for handoff in list(worker.landing.open.values()):
                handoff.over = True
                self._over(handoff)
            for flight in self.front.lost(worker_id):
                if flight.since is not None:
                    flight.spans.append((flight.since, len(worker.token_times)))
                self._over_for_client(
                    flight, "unavailable", f"{worker_id} was lost; try again", now + message_s
                )
            return
        self.front.lost(worker_id)
        for decoder in self.decode.values():
            for handoff in list(decoder.landing.open.values()):
                if handoff.to == worker_id:
                    decoder.failed(handoff, f"lost {worker_id}")

    def _back(self, worker_id: str) -> None:
        if worker_id in self.decode:
            self._start_decode(worker_id)
        else:
            self._start_prefill(worker_id)

    # ---- the run -----------------------------------------------------------------------------------------------

    def run(self, progress: Callable[[int], None] | None = None) -> Outcome:
        """Until every request is over. `progress(requests that are over)` is called now and then."""
        # A tenth of the time would go into looking for cycles, of which a run makes hardly any.
        collecting = gc.isenabled()
        gc.disable()
        try:
            return self._run(progress)
        finally:
            if collecting:
                gc.enable()

    def _run(self, progress: Callable[[int], None] | None) -> Outcome:
        if progress is None:
            complete = self.agenda.run(lambda: not self.open)
        else:
            told, step = 0, max(1, len(self.flights) // 200)

            def done() -> bool:
                nonlocal told
                over = len(self.flights) - self.open
                if over >= told + step:
                    told = over
                    progress(over)
                return not self.open

            complete = self.agenda.run(done)
        if not complete:
            raise AssertionError(f"nothing happens any more, and {self.open} requests are open")
        for worker in [*self.decode.values(), *self.prefill.values()]:
            if worker.alive:
                self._count(worker)
        end_s = max((flight.record.end or 0.0 for flight in self.flights), default=0.0)
        run = Run([flight.record for flight in self.flights], 0.0, end_s, 0.0)
        decisions = [_decided(flight) for flight in self.flights if flight.decision is not None]
        return Outcome(run, decisions, list(self._totals.values()), end_s, self.agenda.events, self._counters)

    def _count(self, worker: Worker) -> None:
        role = "decode" if isinstance(worker, DecodeWorker) else "prefill"
        pool = self.spec.decode if role == "decode" else self.spec.prefill
        had = self._totals.get(worker.worker_id)
        self._totals[worker.worker_id] = WorkerTotals(
            worker.worker_id,
            role,
            pool.tensor_parallel,
            worker.busy_s + (had.busy_s if had else 0.0),
            worker.prompt_s + (had.prompt_s if had else 0.0),
            worker.steps + (had.steps if had else 0),
            worker.computed_tokens + (had.computed_tokens if had else 0),
        )
        found = {**worker.side.counters, "preemptions": worker.side.scheduler.preemptions}
        for name, count in found.items():
            name = f"{role}_{name}"
            self._counters[name] = self._counters.get(name, 0) + count


class _PrefillWorker(Worker):
    def __init__(self, side: PrefillSide, **options: object) -> None:
        super().__init__(side=side, **options)  # type: ignore[arg-type]
        self._prefill = side

    def side_step(self, seconds: float) -> None:
        self._prefill.step_s = seconds

    def next_look(self) -> float | None:
        return self._prefill.next_look()


def _decided(flight: Flight) -> Decided:
    decision = flight.decision
    assert decision is not None
    return Decided(
        flight.request.number,
        decision.kind,
        decision.decode_worker,
        decision.prefill_worker or "",
        decision.code,
        flight.record.prefilled,
    )
