"""Who computes what in a step: budgets, fairness, pre-emption, sharing, admission, and no deadlock in tiny pools."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from engine.api import RequestKey, SamplingParams
from engine.ledger import BlockLedger
from engine.plan import Row, StepPlan
from engine.scheduler import Limits, Scheduler
from engine.sequence import Phase, Sequence
from simulation.model import VOCABULARY, Model, right_answer

BLOCK = 4


class Bench:
    """A scheduler over a small pool, with the simulator's model, which checks all KV that a step reads."""

    def __init__(self, blocks: int, budget: int = 16, running: int = 8) -> None:
        self.ledger = BlockLedger(blocks, BLOCK)
        self.scheduler = Scheduler(self.ledger, Limits(budget, running))
        self.model = Model(blocks, BLOCK)
        self.ended: list[Sequence] = []
        self._next = 0

    def sequence(self, prompt: list[int], max_tokens: int = 4, *, samples: bool = True) -> Sequence:
        self._next += 1
        sampling = SamplingParams(max_tokens=max_tokens, seed=self._next) if samples else None
        return Sequence(RequestKey(1, self._next), prompt, sampling)

    def add(self, prompt: list[int], max_tokens: int = 4) -> Sequence:
        sequence = self.sequence(prompt, max_tokens)
        self.scheduler.add(sequence)
        return sequence

    def land(self, prompt: list[int], computed: int, max_tokens: int = 4) -> Sequence:
        """A sequence whose first `computed` tokens came by a hand-off."""
        sequence = self.sequence(prompt, max_tokens)
        blocks = self.ledger.take(self.ledger.blocks_for(computed))
        assert blocks is not None
        sequence.block_table.extend(blocks)
        row = Row(0, sequence.tokens[:computed], sequence.block_table, None)
        self.model.run(StepPlan(0, [row]), [sequence])
        sequence.advance(self.ledger, computed)
        self.scheduler.add(sequence)
        return sequence

    def step(self) -> StepPlan | None:
        """Schedules, computes and commits; checks the budget and the books."""
        plan = self.scheduler.schedule()
        if plan is None:
            return None
        assert 0 < plan.token_count <= self.scheduler.limits.max_batch_tokens
        assert all(row.tokens for row in plan.rows)
        result = self.model.run(plan, self.scheduler.planned)
        progress = self.scheduler.commit(plan, result)
        self.ended += [one.sequence for one in progress if one.end is not None]
        self.ledger.check(at_rest=not self.scheduler.has_work)
        return plan

    def finish(self, steps: int = 10_000) -> None:
        """Runs until nothing is left; whoever waits in vain is let give way, as the decode role does."""
        for _ in range(steps):
            if self.step() is None:
                if not self.scheduler.has_work:
                    return
                assert self.scheduler.give_way() is not None, "nothing runs and nothing can give way"
        raise AssertionError(f"work is left after {steps} steps")

    def right(self, sequence: Sequence) -> bool:
        assert sequence.sampling is not None
        prompt = sequence.tokens[: sequence.prompt_length]
        answer, _ = right_answer(prompt, sequence.sampling, sequence.salt)
        return sequence.tokens[sequence.prompt_length :] == answer


def prompt_of(length: int, first: int = 0) -> list[int]:
    return [(first + position) % VOCABULARY for position in range(length)]


def test_running_decodes_never_wait_for_a_whole_prompt() -> None:
    bench = Bench(100, budget=8)
    decoding = bench.add(prompt_of(3), max_tokens=30)
    bench.step()
    long = bench.add(prompt_of(60, first=1))
    steps = 0
    while not long.generated:
        before, left = decoding.generated, long.remaining
        plan = bench.step()
        assert plan is not None
        assert decoding.generated == before + 1
        assert plan.token_count == 1 + min(7, left)  # the prompt gets all that the decode leaves
        steps += 1
    assert steps == 9  # 60 tokens, seven at a time


def test_prompts_share_a_step_and_go_in_order() -> None:
    bench = Bench(100, budget=16)
    first, second, third = (bench.add(prompt_of(7, first=i)) for i in range(3))
    bench.step()
    assert (first.remaining, second.remaining, third.remaining) == (1, 1, 5)
    assert (first.generated, second.generated, third.generated) == (1, 1, 0)


def test_no_more_run_than_the_limits_allow() -> None:
    bench = Bench(100, budget=3, running=8)
    for i in range(5):
        bench.add(prompt_of(1, first=i), max_tokens=3)
    bench.step()
    assert bench.scheduler.running == 3  # each may need one token of every step
    assert bench.scheduler.waiting == 2
    bench = Bench(100, budget=64, running=2)
    for i in range(5):
        bench.add(prompt_of(1, first=i), max_tokens=3)
    bench.step()
    assert bench.scheduler.running == 2


def test_a_decode_without_a_block_preempts_the_youngest_which_recomputes() -> None:
    bench = Bench(6, budget=32)
    old = bench.add(prompt_of(8), max_tokens=8)
    young = bench.add(prompt_of(8, first=9), max_tokens=8)
    while not young.preemptions:
        assert bench.step() is not None
    assert old.phase is Phase.RUNNING
    assert old.preemptions == 0
    assert (young.phase, young.computed, len(young.block_table)) == (Phase.WAITING, 0, 0)
    bench.finish()
    assert bench.ended == [old, young]
    assert bench.right(old)
    assert bench.right(young)


def test_the_preempted_goes_before_newcomers() -> None:
    bench = Bench(6, budget=32)
    bench.add(prompt_of(8), max_tokens=8)
    young = bench.add(prompt_of(8, first=9), max_tokens=8)
    newcomer = bench.add(prompt_of(20, first=20))
    bench.finish()
    assert bench.ended.index(young) < bench.ended.index(newcomer)
    assert all(bench.right(sequence) for sequence in bench.ended)


def test_whole_blocks_of_a_prefix_are_shared_while_their_owner_runs_and_after() -> None:
    bench = Bench(40, budget=64)
    prompt = prompt_of(10)
    owner = bench.add(prompt, max_tokens=6)
    bench.step()
    twin = bench.add(prompt, max_tokens=6)
    bench.step()
    assert twin.block_table.ids[:2].tolist() == owner.block_table.ids[:2].tolist()
    assert twin.block_table.ids[2] != owner.block_table.ids[2]  # the partial block is private
    bench.finish()
    assert bench.ledger.held == 0
    late = bench.add(prompt, max_tokens=6)
    plan = bench.step()
    assert plan is not None
    assert [row.start for row in plan.rows] == [8]
    bench.finish()
    assert all(bench.right(sequence) for sequence in (owner, twin, late))


def test_a_fully_cached_prompt_computes_its_last_block_again() -> None:
    """The next token is drawn from the logits of the last prompt token: one token at least is computed."""
    bench = Bench(40, budget=64)
    bench.add(prompt_of(8), max_tokens=1)
    bench.finish()
    again = bench.add(prompt_of(8), max_tokens=1)
    plan = bench.step()
    assert plan is not None
    assert [row.start for row in plan.rows] == [4]
    assert bench.right(again)


def test_salted_prompts_share_nothing() -> None:
    bench = Bench(40, budget=64)
    one = Sequence(RequestKey(1, 100), prompt_of(9), SamplingParams(max_tokens=1), "one tenant")
    other = Sequence(RequestKey(1, 101), prompt_of(9), SamplingParams(max_tokens=1), "another")
    for sequence in (one, other):
        bench.scheduler.add(sequence)
        plan = bench.step()
        assert plan is not None
        assert plan.rows[0].start == 0
        assert bench.right(sequence)


def test_cached_blocks_are_not_counted_as_cache_and_as_room() -> None:
    """A newcomer whose prefix is idle in the cache: taking the prefix uses up the very blocks that seemed available."""
    bench = Bench(4, budget=64)
    bench.add(prompt_of(8), max_tokens=1)
    bench.finish()
    assert bench.ledger.available == 4
    holder = bench.ledger.take(1)
    assert holder is not None
    newcomer = bench.add(prompt_of(13), max_tokens=1)  # 4 blocks, 2 of them cached, 3 available
    assert bench.step() is None
    assert newcomer.phase is Phase.WAITING
    bench.ledger.release(holder)
    bench.finish()
    assert bench.right(newcomer)


def test_newcomers_leave_reserved_blocks_and_one_for_each_that_runs() -> None:
    bench = Bench(10, budget=64)
    bench.scheduler.reserved = 5
    bench.add(prompt_of(7), max_tokens=2)
    second = bench.add(prompt_of(7, first=9), max_tokens=2)
    bench.step()
    assert bench.scheduler.running == 1
    assert second.phase is Phase.WAITING  # 8 available, 2 needed, 5 reserved, 2 would run: one too few
    bench.scheduler.reserved = 4
    bench.step()
    assert second.phase is not Phase.WAITING


def test_landed_sequences_go_before_newcomers_and_ignore_the_reserve() -> None:
    bench = Bench(10, budget=64)
    newcomer = bench.add(prompt_of(8), max_tokens=1)
    landed = bench.land(prompt_of(9, first=9), 8, max_tokens=1)
    bench.scheduler.reserved = 8
    plan = bench.step()
    assert plan is not None
    assert [row.start for row in plan.rows] == [8]
    assert bench.right(landed)
    assert newcomer.phase is Phase.WAITING


def test_newcomers_do_not_take_what_a_landed_sequence_waits_for() -> None:
    bench = Bench(8, budget=64)
    running = bench.add(prompt_of(16), max_tokens=3)
    bench.step()
    landed = bench.land(prompt_of(20, first=20), 4, max_tokens=1)  # needs 4 more of 2 or 3
    newcomers = [bench.add(prompt_of(4, first=9 + i), max_tokens=1) for i in range(3)]
    bench.step()
    assert landed.phase is Phase.WAITING
    assert all(newcomer.phase is Phase.WAITING for newcomer in newcomers)
    bench.finish()
    assert bench.ended[:2] == [running, landed]


def test_two_landed_sequences_that_hold_the_pool_do_not_deadlock() -> None:
    bench = Bench(8, budget=64)
    first = bench.land(prompt_of(20), 16, max_tokens=4)
    second = bench.land(prompt_of(20, first=20), 16, max_tokens=4)
    assert bench.step() is None
    assert bench.scheduler.give_way() is second
    bench.finish()
    assert bench.ended == [first, second]
    assert bench.right(first)
    assert bench.right(second)


def test_a_sequence_may_fill_the_whole_pool() -> None:
    bench = Bench(5, budget=7)
    sequence = bench.add(prompt_of(8), max_tokens=12)
    bench.finish()
    assert bench.right(sequence)


def test_a_prompt_of_one_token() -> None:
    bench = Bench(5)
    sequence = bench.add([7], max_tokens=1)
    bench.finish()
    assert bench.right(sequence)


def test_sequences_that_draw_nothing_preempt_nobody() -> None:
    """In a prefill worker a mover may be reading a running sequence's blocks: not even its own may be taken."""
    bench = Bench(4, budget=8)
    sequence = bench.sequence(prompt_of(9), samples=False)
    bench.scheduler.add(sequence)
    bench.step()
    others = bench.ledger.take(2)
    assert others is not None
    assert sequence.remaining == 1
    assert bench.step() is None
    assert (sequence.phase, len(sequence.block_table)) == (Phase.RUNNING, 2)
    bench.ledger.release(others)
    bench.step()
    assert sequence.remaining == 0
    bench.scheduler.detach(sequence)
    assert len(sequence.block_table) == 3
    sequence.drop_blocks(bench.ledger)
    bench.ledger.check(at_rest=True)


def test_a_cancelled_sequence_leaves_at_once_and_everywhere() -> None:
    bench = Bench(10, budget=8)
    running = bench.add(prompt_of(12), max_tokens=4)
    bench.step()
    waiting = bench.add(prompt_of(8, first=9))
    landed = bench.land(prompt_of(9, first=20), 8)
    for sequence in (running, waiting, landed):
        bench.scheduler.remove(sequence)
        assert sequence.phase is Phase.FINISHED
    assert not bench.scheduler.has_work
    assert bench.scheduler.waiting_tokens == 0
    bench.ledger.check(at_rest=True)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_load_in_any_pool_is_answered_rightly(data: st.DataObject) -> None:
    """Random prompts with shared prefixes, pools just large enough for the largest, cancels and landed sequences."""
    requests = data.draw(
        st.lists(st.tuples(st.integers(1, 24), st.integers(1, 12), st.integers(0, 2)), min_size=1, max_size=8)
    )
    largest = max(-(-(length + answer) // BLOCK) for length, answer, _ in requests)
    bench = Bench(
        largest + data.draw(st.integers(0, 6)), data.draw(st.integers(1, 20)), data.draw(st.integers(1, 6))
    )
    sequences = []
    for length, answer, kind in requests:
        prompt = prompt_of(length, first=data.draw(st.integers(0, 1)))
        if kind == 2 and length > 1 and bench.ledger.blocks_for(length - 1) <= bench.ledger.available:
            sequences.append(bench.land(prompt, length - 1, answer))
        else:
            sequences.append(bench.add(prompt, answer))
        for _ in range(data.draw(st.integers(0, 3))):
            if bench.step() is None:
                break
        if kind == 1 and data.draw(st.booleans()):
            bench.scheduler.remove(sequences.pop())
    bench.finish()
    assert all(bench.right(sequence) for sequence in sequences)
    assert bench.scheduler.waiting_tokens == 0
    bench.ledger.check(at_rest=True)
