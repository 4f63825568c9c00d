"""Which sequences compute how many tokens in the next step. Pure: no clock, no I/O, no torch.

Running decodes come first and never wait for a whole prompt; then prompts in progress; then those that wait with
blocks of their own (a hand-off landed in them); then newcomers, by priority and arrival: all under one budget of
tokens. A decode that finds no block preempts the least urgent sequence, the youngest among equals, which recomputes
later (its published blocks are usually still cached). A prompt that finds none waits; when nothing at all could run,
the caller lets the youngest give way. A newcomer that is more urgent than a running sequence preempts it rather than
wait. Cost per step is that of the sequences that run in it.
"""

from __future__ import annotations

import bisect
import itertools
from collections import deque
from dataclasses import dataclass

from engine.api import EndReason, Logprobs, Queue
from engine.ledger import BlockLedger
from engine.plan import Row, StepPlan, StepResult
from engine.sequence import PHASES, Phase, Sequence
from engine.waiting import WaitingQueue


@dataclass(frozen=True, slots=True)
class Limits:
    """max_batch_tokens: tokens of one step; max_running: sequences that hold blocks at once."""

    max_batch_tokens: int = 512
    max_running: int = 256

    def __post_init__(self) -> None:
        if self.max_batch_tokens < 1 or self.max_running < 1:
            raise ValueError(f"limits must be positive: {self}")


@dataclass(frozen=True, slots=True)
class Progress:
    """What one step did to one sequence."""

    sequence: Sequence
    token: int | None  # drawn in this step
    end: EndReason | None
    logprobs: Logprobs | None = None  # of the drawn token
    scores: Logprobs | None = None  # of tokens of the prompt, the last of them at `sequence.scored` - 1


class Scheduler:
    """Continuous batching with chunked prefill over one ledger.

    `reserved` blocks, and one for each running sequence beside them, are kept from newcomers: the role sets it to what
    the oldest open hand-off still needs. Without the latter the running ones would grow into it again and again.
    """

    def __init__(self, ledger: BlockLedger, limits: Limits, *, urgent_preempts: bool = True) -> None:
        """`urgent_preempts` False: a running sequence never gives way to a more urgent newcomer (its blocks may be
        read by writes in flight)."""
        self.ledger = ledger
        self.limits = limits
        # A decode is one token: more running sequences than budget would make some of them starve.
        self._max_running = min(limits.max_running, limits.max_batch_tokens)
        self.reserved = 0
        # Wait with blocks of their own: first, or they could starve the rest.
        self._landed: deque[Sequence] = deque()
        self._waiting = WaitingQueue()
        self._running: list[Sequence] = []  # the most urgent first, among equals the first to arrive
        self._urgent_preempts = urgent_preempts
        self._arrivals = 0
        self._waiting_tokens = 0
        self._planned: list[Sequence] = []
        self._copied: list[int] = []  # blocks that the plan copies from: held until it is committed
        self.admitted: list[Sequence] = []  # by the latest `schedule`
        self._step = 0
        self.preemptions = 0

    # ---- state -------------------------------------------------------------------------------------------------

    @property
    def step(self) -> int:
        return self._step

    @property
    def waiting(self) -> int:
        return len(self._waiting) + len(self._landed)

    @property
    def landed_waiting(self) -> int:
        """Those that wait with blocks of their own."""
        return len(self._landed)

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def waiting_tokens(self) -> int:
        """Tokens of waiting sequences that have no KV yet."""
        return self._waiting_tokens

    def queue(self, room: int, token_bytes: int) -> Queue:
        """For `Load`; the role knows its `room` and the size of its KV. A pass over all sequences: ask now and then."""
        kv_tokens = prompt_tokens = 0
        attention = 0.0
        for sequence in self._running:
            kv_tokens += sequence.computed
            remaining = len(sequence.tokens) - sequence.computed
            if remaining > 1:
                prompt_tokens += remaining
                attention += remaining * (remaining / 2 + sequence.computed)
        for sequence in itertools.chain(self._waiting, self._landed):
            remaining = len(sequence.tokens) - sequence.computed
            attention += remaining * (remaining / 2 + sequence.computed)
        return Queue(
            kv_tokens=kv_tokens,
            prompt_tokens=prompt_tokens,
            attention=attention,
            room=max(0, room),
            max_running=self._max_running,
            step_tokens=self.limits.max_batch_tokens,
            capacity_tokens=self.ledger.total * self.ledger.block_size,
            available_tokens=self.ledger.available * self.ledger.block_size,
            token_bytes=token_bytes,
        )

    @property
    def has_work(self) -> bool:
        return bool(self._running or len(self._waiting) or self._landed)

    @property
    def planned(self) -> list[Sequence]:
        """The sequences of the plan that is not committed yet, in the order of its rows."""
        return self._planned

    @property
    def copied(self) -> list[int]:
        """Blocks that the plan which is not committed yet copies forks from, held until then."""
        return self._copied

    def youngest(self) -> Sequence | None:
        """The running sequence that gives way first: the least urgent, among equals the last to arrive."""
        return self._running[-1] if self._running else None

    # ---- events ------------------------------------------------------------------------------------------------

    def add(self, sequence: Sequence) -> None:
        """Queues a sequence. It may hold blocks already (a hand-off landed in them)."""
        assert sequence.phase is Phase.WAITING and sequence.remaining > 0
        self._arrivals += 1
        sequence.arrival = self._arrivals
        if sequence.has_blocks:
            self._landed.append(sequence)
        else:
            self._waiting.add(sequence)
        self._waiting_tokens += sequence.remaining

    def remove(self, sequence: Sequence) -> None:
        """Takes a sequence out and lets go of its blocks: finished, cancelled or given up."""
        if sequence.phase is Phase.RUNNING:
            self._leave_running(sequence)
        elif sequence in self._landed:
            self._landed.remove(sequence)
            self._waiting_tokens -= sequence.remaining
        elif self._waiting.discard(sequence):
            self._waiting_tokens -= sequence.remaining
        sequence.phase = PHASES.move(sequence.phase, Phase.FINISHED)
        sequence.drop_blocks(self.ledger)

    def detach(self, sequence: Sequence) -> None:
        """Takes a running sequence out but leaves it its blocks; whoever detached it releases them."""
        self._leave_running(sequence)
        sequence.phase = PHASES.move(sequence.phase, Phase.FINISHED)

    # ---- one step ----------------------------------------------------------------------------------------------

    def schedule(self) -> StepPlan | None:
        """The next step, or None when nothing can run now. Follow each plan with one `commit`."""
        assert not self._planned, "the previous step was not committed"
        self._step += 1
        self.admitted = []
        plan = StepPlan(self._step)
        if self._urgent_preempts:
            self._make_room_for_urgent()
        budget = self._plan_decodes(plan, self.limits.max_batch_tokens)
        budget = self._plan_prompts(plan, budget)
        self._admit(plan, budget)
        if not plan.rows:
            self._step -= 1
            return None
        return plan

    def commit(self, plan: StepPlan, result: StepResult) -> list[Progress]:
        """Books what the step computed and returns it, in the plan's order. Ended sequences are removed."""
        progress = []
        for at, (sequence, row, token) in enumerate(
            zip(self._planned, plan.rows, result.sampled, strict=True)
        ):
            if sequence.phase is not Phase.RUNNING:  # cancelled while the step ran
                continue
            sequence.advance(self.ledger, len(row.tokens))
            end = None
            if row.sampling is not None:
                end = sequence.append(token)
            sequence.scored += len(row.targets)
            drawn = token if row.sampling is not None else None
            progress.append(Progress(sequence, drawn, end, result.logprobs.get(at), result.scores.get(at)))
            if end is not None:
                self.remove(sequence)
        self._planned = []
        self.ledger.release(self._copied)
        self._copied = []
        return progress

    def decode_ahead(self, steps: int, token: int) -> None:
        """What `steps` times `schedule` and `commit` would do while every running sequence decodes, none ends, nothing
        can be admitted and the blocks suffice, with `token` drawn each time. For simulations: one pass for all steps.
        """
        assert not self._planned
        for sequence in self._running:
            if not _decodes(sequence) or not self._grow(sequence, steps):
                raise ValueError(f"{sequence.request} cannot decode {steps} steps ahead")
            sequence.tokens.extend([token] * steps)
            sequence.advance(self.ledger, steps)
        self._step += steps

    def give_way(self) -> Sequence | None:
        """For callers that found that nothing could run: the youngest sequence that holds blocks loses them."""
        youngest = self.youngest()
        if youngest is not None:
            self._preempt(youngest)
        elif self._landed:
            youngest = self._landed.pop()
            self._waiting_tokens -= youngest.remaining
            self._send_back(youngest)
        return youngest

    # ---- the three passes --------------------------------------------------------------------------------------

    def _make_room_for_urgent(self) -> None:
        """Preempts less urgent sequences until the first in the queue fits, if that is what it takes."""
        first = self._waiting.first()
        if first is None or self._landed or not self._running:
            return
        while self._running and self._running[-1].priority > first.priority:
            room = len(self._running) < self._max_running
            if room and self._fits(first, self._kept()) is not None:
                return
            self._preempt(self._running[-1])

    def _kept(self) -> int:
        """Blocks that newcomers leave alone."""
        return self.reserved + len(self._running) + 1 if self.reserved else 0

    def _plan_decodes(self, plan: StepPlan, budget: int) -> int:
        for sequence in list(self._running):
            if sequence.phase is not Phase.RUNNING or not _decodes(sequence):
                continue  # preempted in this very loop, or a prompt in progress
            while not self._grow(sequence, 1):
                victim = self.youngest()
                assert victim is not None  # `sequence` itself is running
                self._preempt(victim)
                if victim is sequence:
                    break
            if sequence.phase is Phase.RUNNING:
                self._plan(plan, sequence, 1)
                budget -= 1
        return budget

    def _plan_prompts(self, plan: StepPlan, budget: int) -> int:
        if budget <= 0 or len(plan.rows) == len(self._running):
            return budget
        for sequence in self._running:
            if budget <= 0:
                break
            if _decodes(sequence):
                continue
            tokens = self._affordable(sequence, min(sequence.remaining, budget))
            if tokens and self._grow(sequence, tokens):
                self._plan(plan, sequence, tokens)
                budget -= tokens
        return budget

    def _admit(self, plan: StepPlan, budget: int) -> None:
        while budget > 0 and len(self._running) < self._max_running:
            # A newcomer must not take the blocks that a landed one waits for.
            sequence = self._landed[0] if self._landed else self._waiting.first()
            if sequence is None:
                break
            cached = self._fits(sequence, 0 if self._landed else self._kept())
            if cached is None:
                break
            if self._landed:
                self._landed.popleft()
            else:
                self._waiting.discard(sequence)
            budget -= self._start(plan, sequence, cached, budget)

    def _start(self, plan: StepPlan, sequence: Sequence, cached: int, budget: int) -> int:
        """A sequence that fits begins to run; returns the tokens planned for it."""
        self._waiting_tokens -= sequence.remaining
        if cached:
            sequence.take_prefix(self.ledger, cached)
        sequence.phase = PHASES.move(sequence.phase, Phase.RUNNING)
        bisect.insort(self._running, sequence, key=_order)
        self.admitted.append(sequence)
        if sequence.fork_block is not None:
            self._copy_fork(plan, sequence)
        tokens = min(sequence.remaining, budget)
        if not self._grow(sequence, tokens):
            raise AssertionError("admission counted the blocks")
        self._plan(plan, sequence, tokens)
        return tokens

    def _fits(self, sequence: Sequence, reserved: int) -> int | None:
        """The cached tokens to begin with when all of the sequence's tokens fit beside `reserved` blocks, else None."""
        needed = self.ledger.blocks_for(len(sequence.tokens)) - len(sequence.block_table)
        if sequence.has_blocks:
            return 0 if needed <= self.ledger.available - reserved else None
        # At least one token is computed anew: its logits are what the next one is drawn from.
        cached = sequence.match_prefix(self.ledger, len(sequence.tokens) - 1)
        hashes = sequence.hashes[: cached // self.ledger.block_size]
        # Cached blocks that nobody holds count as available until they are taken: do not spend them twice.
        spare = self.ledger.available - self.ledger.idle_among(hashes)
        return cached if needed - len(hashes) <= spare - reserved else None

    # ---- helpers -----------------------------------------------------------------------------------------------

    def _plan(self, plan: StepPlan, sequence: Sequence, tokens: int) -> None:
        start = sequence.computed
        samples = sequence.sampling if tokens == sequence.remaining else None
        computed = sequence.tokens[start : start + tokens]
        row = Row(start, computed, sequence.block_table, samples, sequence.tokens, sequence.prompt_length)
        if sequence.scored < len(sequence.targets):
            row.scored_from, row.targets = sequence.targets_of(start, tokens)
            row.top = sequence.top
        plan.rows.append(row)
        self._planned.append(sequence)

    def _grow(self, sequence: Sequence, tokens: int) -> bool:
        """Gives the sequence the blocks for `tokens` more tokens; False (and nothing taken) when there are too few."""
        needed = self.ledger.blocks_for(sequence.computed + tokens) - len(sequence.block_table)
        if needed <= 0:
            return True
        blocks = self.ledger.take(needed)
        if blocks is None:
            return False
        sequence.block_table.extend(blocks)
        return True

    def _affordable(self, sequence: Sequence, tokens: int) -> int:
        """How many of `tokens` more tokens fit into the sequence's own and the available blocks."""
        capacity = (len(sequence.block_table) + self.ledger.available) * self.ledger.block_size
        return max(0, min(tokens, capacity - sequence.computed))

    def _copy_fork(self, plan: StepPlan, sequence: Sequence) -> None:
        """Copy on write: the block that the sequence shares in part becomes its own before it writes."""
        target = self.ledger.take(1)
        assert target is not None, "admission counted the block"
        sequence.block_table.extend(target)
        sequence.computed += sequence.fork_tokens
        source = sequence.leave_fork()
        plan.copies.append((source, target[0]))
        self._copied.append(source)

    def _leave_running(self, sequence: Sequence) -> None:
        at = bisect.bisect_left(self._running, _order(sequence), key=_order)
        assert self._running[at] is sequence
        del self._running[at]

    def _preempt(self, sequence: Sequence) -> None:
        self._leave_running(sequence)
        sequence.phase = PHASES.move(sequence.phase, Phase.WAITING)
        self._send_back(sequence)

    def _send_back(self, sequence: Sequence) -> None:
        sequence.preemptions += 1
        self.preemptions += 1
        sequence.drop_blocks(self.ledger)
        self._waiting.add(sequence)
        self._waiting_tokens += sequence.remaining


def _order(sequence: Sequence) -> tuple[int, int]:
    return sequence.priority, sequence.arrival


def _decodes(sequence: Sequence) -> bool:
    """One token to go, and one to be drawn. A sequence that draws none must never preempt another for a block."""
    return sequence.remaining == 1 and sequence.sampling is not None
