"""The step loop of a rank process, shared by both roles: events in, one step, actions out.

A turn is: read what the shell and the mover say, let the role decide, carry out what it wants, compute one step,
carry out what came of it. It blocks only when nothing can run, and wakes on the first event.
"""

from __future__ import annotations

import math
import os
import select
import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

import msgspec

from engine.api import Costs, Load
from engine.plan import StepPlan, StepResult
from kvtransfer import failpoints
from kvtransfer.messages import MoverJob, MoverReport
from worker import ledger_view
from worker.messages import FromEngine, FromPeer, ReadLedger, Shutdown, ToEngine, ToPeer
from worker.ring import RingReader, RingWriter
from worker.role import Action, Role

LOAD_PERIOD_S = 0.05  # at most this often when something changed
HEARTBEAT_S = 0.2  # at least this often, so that a hung engine shows
REST_S = 1.0  # idle for so long: the integrity check, which scans all blocks, holds nobody up
KV_PERIOD_S = 0.03  # while steps run, changes of the prefix cache are told at most this often
KV_BATCH = 4096  # at most so many of them at once: 32 KiB
SHARE_S = 2.0  # over which the share of prompt steps is averaged
WAIT_S = 0.02  # while hand-offs are open: deadlines and credits are looked at this often


class Runner(Protocol):
    def run(self, plan: StepPlan) -> StepResult:
        """Computes one step."""


class Mover(Protocol):
    def submit(self, job: MoverJob) -> None:
        """Queues a job; its report comes back through the loop's `mover_reports`."""

    def expecting(self, on: bool) -> None:
        """Peers may (not) be writing into this process now."""


class ReportQueue:
    """What the mover's thread reports, with an eventfd that wakes the loop."""

    def __init__(self) -> None:
        self._reports: deque[MoverReport] = deque()
        self._event = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def put(self, report: MoverReport) -> None:
        self._reports.append(report)
        os.eventfd_write(self._event, 1)

    def fileno(self) -> int:
        return self._event

    def read(self) -> list[MoverReport]:
        try:
            os.eventfd_read(self._event)
        except BlockingIOError:
            return []
        return [self._reports.popleft() for _ in range(len(self._reports))]


class StepLoop:
    """Runs a role until it is told to shut down."""

    def __init__(
        self,
        role: Role,
        runner: Runner,
        mover: Mover | None,
        reports: ReportQueue,
        inbox: RingReader,
        outbox: RingWriter,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.role = role
        self.runner = runner
        self.mover = mover
        self.reports = reports
        self.inbox = inbox
        self.outbox = outbox
        self.clock = clock
        self._poll = select.poll()
        self._poll.register(inbox.fileno(), select.POLLIN)
        self._poll.register(reports.fileno(), select.POLLIN)
        self._stop = False
        self._expecting = False
        self._busy_at: float | None = None  # when it was last seen at work; None: at rest and checked
        self._load_at = 0.0
        self._kv_at = 0.0
        self._last_load: Load | None = None
        self._news_at = 0.0  # when events were read last
        self._told_costs: Costs | None = None
        self._share = _Share(clock())

    def run(self) -> None:
        """Returns after `Shutdown`, when the books were checked."""
        ran = False
        while not self._stop:
            ran = self.turn(may_block=not ran)
        self.role.check()

    def turn(self, *, may_block: bool) -> bool:
        """One turn; True when a step was computed."""
        if may_block:
            waiting_for_time = self.role.has_work or not self.role.at_rest or not self.outbox.flush()
            self._poll.poll(1000 * (WAIT_S if waiting_for_time else HEARTBEAT_S))
        else:
            self.outbox.flush()
        now = self._news_at = self.clock()
        for event in self.inbox.read():
            self._event(event, now)
        for report in self.reports.read():
            self.role.report(report, now)
        self.role.tick(now)
        plan = self.role.schedule(now)
        self._carry_out(self.role.drain())
        if plan is not None:
            begun = now
            result = self.runner.run(plan)
            now = self.clock()
            self.role.commit(plan, result, now)
            self._carry_out(self.role.drain())
            self.role.costs.observe(plan, self.clock() - begun)
        self._tell_load(now)
        self._tell_kv(now, idle=plan is None)
        self._check_at_rest(now)
        return plan is not None

    def _event(self, event: ToEngine, now: float) -> None:
        if isinstance(event, Shutdown):
            self._stop = True
        elif isinstance(event, ReadLedger):
            self._say(ledger_view.read(self.role, event, now))
        else:
            if isinstance(event, FromPeer):
                failpoints.saw(event.message)
            self.role.handle(event, now)

    def _carry_out(self, actions: list[Action]) -> None:
        for action in actions:
            if isinstance(action, MoverJob):
                assert self.mover is not None, "a role without a transport asked for one"
                self.mover.submit(action)
            else:
                if isinstance(action, ToPeer):
                    failpoints.saw(action.message)
                self._say(action)
        expecting = self.role.expecting
        if self.mover is not None and expecting != self._expecting:
            self._expecting = expecting
            self.mover.expecting(expecting)

    def _say(self, message: FromEngine) -> None:
        self.outbox.send(message)

    def _tell_load(self, now: float) -> None:
        if now < self._load_at:
            return
        load = self.role.load()
        costs = self.role.costs.costs
        self._share.add(self.role.costs.prompt_s, now)
        load = msgspec.structs.replace(
            load,
            queue=msgspec.structs.replace(load.queue, busy=self._share.value, age_s=now - self._news_at),
            costs=None if costs is self._told_costs else costs,
        )
        if (
            self._last_load is None
            or now >= self._load_at - LOAD_PERIOD_S + HEARTBEAT_S
            or _differ(load, self._last_load)
        ):
            self._last_load = load
            self._told_costs = costs
            self._load_at = now + LOAD_PERIOD_S
            self._say(load)

    def _tell_kv(self, now: float, *, idle: bool) -> None:
        """One batch a turn; the last ones of a busy time at once, since nothing else would wake an idle loop."""
        if now < self._kv_at and not idle:
            return
        events = self.role.kv_events(KV_BATCH)
        if events is not None:
            self._kv_at = now + KV_PERIOD_S
            self._say(events)

    def _check_at_rest(self, now: float) -> None:
        """The integrity check, once for each rest."""
        if not self.role.at_rest:
            self._busy_at = now
        elif self._busy_at is not None and now >= self._busy_at + REST_S:
            self._busy_at = None
            self.role.check()


def _differ(one: Load, other: Load) -> bool:
    # Age and share change all the time and are worth no message of their own.
    queue = msgspec.structs.replace(one.queue, age_s=other.queue.age_s, busy=other.queue.busy)
    return msgspec.structs.replace(one, queue=queue) != other


class _Share:
    """The share of the last seconds that went into something whose seconds are counted up."""

    def __init__(self, now: float) -> None:
        self.value = 0.0
        self._spent = 0.0
        self._at = now

    def add(self, spent: float, now: float) -> None:
        """`spent` seconds in all, as of `now`."""
        elapsed = now - self._at
        if elapsed <= 0:
            return
        keep = math.exp(-elapsed / SHARE_S)
        self.value = keep * self.value + (1 - keep) * min(1.0, (spent - self._spent) / elapsed)
        self._spent, self._at = spent, now
