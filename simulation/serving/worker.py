"""The step loop of a simulated worker: turns as in `worker.loop`, steps that take what the profile says.

While a worker only decodes and nothing reaches it, its steps are taken together as one *run*: their ends are computed
at once, and the books are brought up to date when the run ends, or is cut by news at the next end of a step. What the
router would have been told in between is made up when it looks. With `batch` False each step of a run is planned and
committed by itself: the same results, slower, which the tests compare.
"""

from __future__ import annotations

import math
from array import array
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from engine.api import KvEvents, Load, StepCosts
from engine.costs import features
from engine.ledger import BlockLedger
from engine.plan import StepPlan, StepResult
from engine.scheduler import Scheduler
from engine.sequence import Sequence
from simulation.serving.agenda import Agenda
from simulation.serving.profiles import NOISES, Floats
from worker.loop import HEARTBEAT_S, KV_BATCH, KV_PERIOD_S, LOAD_PERIOD_S, SHARE_S

LONGEST_RUN = 1024  # steps
TOKEN = 1  # what every simulated step draws


class Side(Protocol):
    """A role, as far as the loop needs one."""

    blocks: BlockLedger
    scheduler: Scheduler
    counters: Counter[str]

    def load(self) -> Load: ...
    def kv_events(self, limit: int) -> KvEvents | None: ...
    def schedule(self, now: float) -> StepPlan | None: ...
    def commit(self, plan: StepPlan, result: StepResult, now: float) -> None: ...


@dataclass(slots=True)
class Run:
    """Decode steps in a row. `ends` [steps]: when each ends; `starts` [sequences]: tokens with KV before the first."""

    begun: float
    plan: StepPlan
    ends: Floats
    starts: Floats
    sequences: list[Sequence]
    steps: int
    done: int = 0  # steps committed one by one
    kv_tokens: float = 0.0
    late: float = math.inf  # from when the router knows that a gap was too long
    told: int = 0  # leading steps whose reports were made up
    load: Load | None = None  # while it runs, but for what decoding changes


class Report(NamedTuple):
    """A load as it is told. `kv_tokens`, `available_tokens`: by how much these have changed since `load` was made."""

    load: Load
    busy: float
    news_at: float
    kv_tokens: int = 0
    available_tokens: int = 0


News = tuple[float, str, Any]  # when the router has it, "load" | "kv" | "late", content


class Worker:
    """One incarnation. `news` is what the router will have heard by the times it says."""

    def __init__(
        self,
        agenda: Agenda,
        worker_id: str,
        costs: StepCosts,
        noise: Floats,
        message_s: float,
        side: Side,
        *,
        itl_s: float,
        batch: bool = True,
    ) -> None:
        self.agenda = agenda
        self.worker_id = worker_id
        self.side = side
        self.message_s = message_s
        self.batch = batch
        self.alive = True
        self.steps = 0
        self.busy_s = 0.0
        self.prompt_s = 0.0  # of that, steps with prompt tokens
        self.computed_tokens = 0
        self.token_times: array[float] = array("d")  # of each step that drew tokens
        self.news: deque[News] = deque()
        self.on_news: Callable[[Worker], None] = lambda worker: None
        self._costs = costs
        self._noise = noise
        self._itl_s = itl_s
        self._inbox: list[tuple[Callable[..., None], tuple[Any, ...]]] = []
        self._run: Run | None = None
        self._computing = False
        self._version = 0  # of the planned end; earlier ones are void
        self._load_at = 0.0
        self._kv_at = 0.0
        self._news_at = 0.0
        self._look_at = math.inf
        self._share, self._share_at, self._share_spent = 0.0, 0.0, 0.0

    # ---- what comes in -----------------------------------------------------------------------------------------

    def receive(self, what: Callable[..., None], *args: Any) -> None:
        """`what(*args, now)` at the begin of the next turn."""
        if not self.alive:
            return
        self._inbox.append((what, args))
        self.wake()

    def wake(self) -> None:
        """There is something to look at: now, or when the step under way ends."""
        if not self._computing:
            self._turn()
        elif self._run is not None:
            self._cut(self._run)

    def stop(self) -> None:
        """The process is dead."""
        self.alive = False
        self._version += 1

    # ---- turns -------------------------------------------------------------------------------------------------

    def before_step(self, now: float) -> None:
        """Deadlines; what the kind of worker does before each plan."""

    def after_schedule(self, now: float) -> None:
        """A plan was made, or could not be."""

    def after_commit(self, now: float, steps: int) -> None:
        """What came of the latest `steps` steps, that have all drawn for the same sequences."""

    def next_look(self) -> float | None:
        """When to look although nothing comes."""
        return None

    def targets(self, sequences: list[Sequence]) -> Any:
        """What the router is told when those sequences have had a gap beyond their target."""
        return None

    def _turn(self) -> None:
        now = self._news_at = self.agenda.now
        self._version += 1
        inbox, self._inbox = self._inbox, []
        for what, args in inbox:
            what(*args, now)
        self.before_step(now)
        plan = self.side.schedule(now)
        self.after_schedule(now)
        if plan is not None:
            self._begin(plan, now)
        else:
            self._computing = False
            self._tell(now, idle=True)
        look = self.next_look()
        if look is not None and not now < self._look_at <= look:
            self._look_at = look
            self.agenda.at(look, self._looked)

    def _looked(self) -> None:
        self._look_at = math.inf
        if self.alive:
            self.wake()

    def _begin(self, plan: StepPlan, now: float) -> None:
        self._computing = True
        one, sequences, kv_tokens, tokens, attention = features(plan)
        costs = self._costs
        planned = self.side.scheduler.planned
        steps = self._run_length(planned) if not tokens else 1
        fixed = costs.base_s * one + costs.sequence_s * sequences
        if steps > 1:
            places = np.arange(steps)
            seconds = fixed + costs.kv_token_s * (kv_tokens + sequences * places)
            seconds = seconds * self._noise[(self.steps + places) % NOISES]
            starts = np.array([sequence.computed for sequence in planned], dtype=np.float64)
            ends = now + np.cumsum(seconds)
            run = self._run = Run(now, plan, ends, starts, list(planned), steps, kv_tokens=kv_tokens)
            long = seconds > self._itl_s
            if long.any():
                run.late = float(ends[int(np.argmax(long))]) + self.message_s
            self._plan_end(run)
            self.on_news(self)
        else:
            found = (
                fixed + costs.kv_token_s * kv_tokens + costs.token_s * tokens + costs.attention_s * attention
            )
            found *= float(self._noise[self.steps % NOISES])
            self.agenda.at(now + found, self._ended, self._version, plan, now, tokens > 0)

    def _run_length(self, planned: list[Sequence]) -> int:
        """Steps that may be taken together: all only decode, none has yet to draw its first token, none ends before
        the last, and there are blocks for all."""
        scheduler = self.side.scheduler
        if len(planned) != scheduler.running:
            return 1
        most = LONGEST_RUN
        for sequence in planned:
            if sequence.sampling is None or len(sequence.tokens) - sequence.computed != 1:
                return 1
            generated = len(sequence.tokens) - sequence.prompt_length
            if not generated:
                return 1
            most = min(most, sequence.sampling.max_tokens - generated)
        if most > 1:
            ledger = self.side.blocks
            starts = np.array([sequence.computed for sequence in planned])
            have = int((-(-(starts + 1) // ledger.block_size)).sum())

            def fits(steps: int) -> bool:
                return int((-(-(starts + steps) // ledger.block_size)).sum()) - have <= ledger.available

            if not fits(most):
                low, high = 1, most
                while high - low > 1:
                    middle = (low + high) // 2
                    low, high = (middle, high) if fits(middle) else (low, middle)
                most = low
        return most

    def _ended(self, version: int, plan: StepPlan, begun: float, prompt: bool) -> None:
        """A step by itself is over."""
        if version != self._version:
            return
        now = self.agenda.now
        seconds = now - begun
        self._took(seconds, 1, plan.token_count, prompt)
        self.side_step(seconds)
        if seconds > self._itl_s:
            told = self.targets([one for one in self.side.scheduler.planned if one.generated])
            if told:
                self._say(now, "late", told)
        self._commit(plan, now)
        if any(row.sampling is not None for row in plan.rows):
            self.token_times.append(now)
        self.after_commit(now, 1)
        self._tell(now)
        self._turn()

    def side_step(self, seconds: float) -> None:
        """The step that is about to be committed took so long."""

    def _commit(self, plan: StepPlan, now: float) -> None:
        self.side.commit(plan, StepResult([TOKEN if row.sampling else -1 for row in plan.rows]), now)

    # ---- runs --------------------------------------------------------------------------------------------------

    def _plan_end(self, run: Run) -> None:
        self._version += 1
        if self.batch:
            self.agenda.at(float(run.ends[run.steps - 1]), self._run_ended, self._version)
        else:
            self.agenda.at(float(run.ends[run.done]), self._stepped, self._version)

    def _cut(self, run: Run) -> None:
        """Something waits for the end of the step under way."""
        under_way = int(np.searchsorted(run.ends[: run.steps], self.agenda.now)) + 1
        if under_way < run.steps:
            run.steps = under_way
            self._plan_end(run)

    def _stepped(self, version: int) -> None:
        """Without `batch`: one step of a run is over."""
        run = self._run
        if version != self._version or run is None:
            return
        run.done += 1
        if run.done == run.steps:
            self._run_ended(version)
            return
        now = self.agenda.now
        self._commit(run.plan, now)
        self._report_run(run, run.done)
        plan = self.side.schedule(now)
        assert plan is not None and plan.token_count == len(plan.rows) == len(run.sequences)
        run.plan = plan
        self._plan_end(run)

    def _run_ended(self, version: int) -> None:
        run = self._run
        if version != self._version or run is None:
            return
        now, steps = self.agenda.now, run.steps
        ends = run.ends[:steps]
        self._report_run(run, steps - 1)
        if self.batch and steps > 1:
            self._commit(run.plan, float(ends[0]))
            if steps > 2:
                self.side.scheduler.decode_ahead(steps - 2, TOKEN)
            plan = self.side.schedule(float(ends[-2]))
            assert plan is not None and plan.token_count == len(plan.rows) == len(run.sequences)
            run.plan = plan
        self._run = None
        self._took(now - run.begun, steps, steps * len(run.sequences), False)
        if run.late - self.message_s <= now:
            told = self.targets(run.sequences)
            if told:
                self.news.append((run.late, "late", told))
                self.on_news(self)
        self._news_at = float(ends[-2]) if steps > 1 else run.begun
        self._commit(run.plan, now)
        self.token_times.extend(ends.tolist())
        self.after_commit(now, steps)
        self._tell(now)
        self._turn()

    def _took(self, seconds: float, steps: int, tokens: int, prompt: bool) -> None:
        self.busy_s += seconds
        self.prompt_s += seconds if prompt else 0.0
        self.steps += steps
        self.computed_tokens += tokens

    # ---- what the router hears ---------------------------------------------------------------------------------

    def catch_up(self, now: float) -> None:
        """The router is about to look: what it would have heard from within the run under way."""
        run = self._run
        if run is not None and self.batch:
            heard = now - self.message_s
            self._report_run(run, min(int(np.searchsorted(run.ends, heard, side="right")), run.steps - 1))
        if run is not None and run.late <= now:
            told = self.targets(run.sequences)
            if told:
                self.news.append((run.late, "late", told))
            run.late = math.inf

    @property
    def in_run(self) -> bool:
        return self._run is not None

    def _report_run(self, run: Run, steps: int) -> None:
        """The reports that were due at the ends of the leading `steps` steps of a run."""
        at, ends = run.told, run.ends
        run.told = max(at, steps)
        due: list[tuple[float, float, int]] = []
        while at < steps:
            at = max(at, int(np.searchsorted(ends[:steps], self._load_at)))
            if at >= steps:
                break
            end = float(ends[at])
            self._load_at = end + LOAD_PERIOD_S
            self._add_share(end)
            due.append((end, float(ends[at - 1]) if at else run.begun, at + 1))
            at += 1
        # What came before the last one matters only while that is under way.
        keep = 2 if due and due[-1][0] + self.message_s > self.agenda.now else 1
        for end, news_at, done in due[-keep:]:
            self._say(end, "load", self._report_in_run(run, done, news_at))

    def _report_in_run(self, run: Run, done: int, news_at: float) -> Report:
        if not self.batch:
            return Report(self.side.load(), self._share, news_at)
        if run.load is None:
            run.load = self.side.load()
        size = self.side.blocks.block_size
        grown = int((-(-(run.starts + done) // size)).sum() - (-(-(run.starts + 1) // size)).sum())
        return Report(run.load, self._share, news_at, done * len(run.sequences), -grown * size)

    def _tell(self, now: float, *, idle: bool = False) -> None:
        """As `StepLoop._tell_load` and `_tell_kv`."""
        if now >= self._load_at:
            self._load_at = now + LOAD_PERIOD_S
            self._add_share(now)
            self._say(now, "load", Report(self.side.load(), self._share, self._news_at))
        elif idle:
            self.agenda.at(now + HEARTBEAT_S, self._heartbeat, self._version)
        if now >= self._kv_at or idle:
            events = self.side.kv_events(KV_BATCH)
            if events is not None:
                self._kv_at = now + KV_PERIOD_S
                self._say(now, "kv", events)

    def _heartbeat(self, version: int) -> None:
        if version == self._version and self.alive:
            self._news_at = self.agenda.now
            self._tell(self.agenda.now, idle=True)

    def _say(self, now: float, kind: str, what: Any) -> None:
        self.news.append((now + self.message_s, kind, what))
        self.on_news(self)

    def _add_share(self, now: float) -> None:
        elapsed = now - self._share_at
        if elapsed > 0:
            keep = math.exp(-elapsed / SHARE_S)
            spent = self.prompt_s - self._share_spent
            self._share = keep * self._share + (1 - keep) * min(1.0, spent / elapsed)
            self._share_spent, self._share_at = self.prompt_s, now
