"""The step loop times its steps, and tells what they cost when that is news."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from decode.role import DecodeRole
from engine.api import Load, RequestKey, SamplingParams, Submit
from engine.ledger import BlockLedger, SlotLedger
from engine.plan import StepPlan, StepResult
from engine.scheduler import Limits
from tests.decode.desk import hello
from worker import ring
from worker.loop import ReportQueue, StepLoop
from worker.messages import FromEngine, ToEngine


class SlowRunner:
    """Each token takes a millisecond on the clock that it keeps."""

    now = 0.0

    def clock(self) -> float:
        return self.now

    def run(self, plan: StepPlan) -> StepResult:
        self.now += 1e-3 * plan.token_count
        return StepResult([5] * len(plan.rows))


class Bench:
    def __init__(self, loop: StepLoop, inbox: ring.RingWriter, outbox: ring.RingReader) -> None:
        self.loop, self._inbox, self._outbox = loop, inbox, outbox

    def submit(self, prompt: int, tokens: int) -> None:
        sampling = SamplingParams(max_tokens=tokens)
        self._inbox.send(
            Submit(request=RequestKey(1, 1), request_id="r", prompt=[1] * prompt, sampling=sampling)
        )
        self._inbox.flush()

    def loads(self) -> list[Load]:
        return [message for message in self._outbox.read() if isinstance(message, Load)]


@contextmanager
def bench(runner: SlowRunner) -> Iterator[Bench]:
    to_engine, from_engine = ring.create(), ring.create()
    role = DecodeRole(hello("d", "d"), BlockLedger(500, 4), SlotLedger(0), Limits(64, 8))
    outbox = ring.RingWriter(from_engine)
    inbox = ring.RingReader(to_engine, ToEngine)
    loop = StepLoop(role, runner, None, ReportQueue(), inbox, outbox, runner.clock)
    yield Bench(loop, ring.RingWriter(to_engine), ring.RingReader(from_engine, FromEngine))


def test_steps_are_timed_and_told_when_they_are_news() -> None:
    runner = SlowRunner()
    with bench(runner) as at:
        at.submit(prompt=200, tokens=900)
        loads = []
        for _ in range(900):
            at.loop.turn(may_block=False)
            loads += at.loads()
        costs = [load.costs for load in loads if load.costs is not None]
        assert costs and loads[0].costs is not None, "the first says what it begins with"
        assert all(load.costs is None for load in loads[-3:]), "nothing has changed any more"
        found = costs[-1].step
        per_token = found.base_s + found.sequence_s + 500 * found.kv_token_s
        assert 0.8e-3 < per_token < 1.2e-3
        assert costs[-1].seen > 500


def test_a_load_says_how_old_its_news_are() -> None:
    runner = SlowRunner()
    with bench(runner) as at:
        at.submit(prompt=200, tokens=1)
        at.loop.turn(may_block=False)
        (load,) = at.loads()
        assert load.queue.age_s == 64e-3, "it read its inbox before a step of 64 tokens"
        assert load.queue.prompt_tokens == 200 - 64
        assert load.queue.attention == 136 * (68 + 64)
        assert (load.queue.room, load.queue.step_tokens, load.queue.capacity_tokens) == (512, 64, 2000)
        assert load.queue.busy > 0
