"""Both roles over a loopback fabric, in any order of events that hypothesis can think of.

One thing happens at a time: a request, a message, a job, a tick, half a step, a break, a death. After each rule the
books add up, no slot belongs to two, and what was answered is right. At the end everything comes to rest; only a lost
write or a frozen peer may hold a slot or a block until it is dead. The parts are in `loopback_workers` and
`loopback_cluster`.

`BATON_LOOPBACK_EXAMPLES=5000 pytest tests/simulation/test_roles_over_loopback.py` hunts, with new examples each time.
"""

from __future__ import annotations

import os
import sys
from collections import Counter

import pytest
from hypothesis import HealthCheck, note, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from decode.role import DecodeRole
from engine.api import Cancel, RequestEnd, RequestKey
from engine.scheduler import Limits
from prefill.role import PrefillRole
from tests.simulation.loopback_cluster import Cluster
from tests.simulation.loopback_requests import Answer, Wish, who, wishes
from tests.simulation.loopback_workers import DIRTY, FAULTS, Size, Worker
from worker.messages import SessionLost

QUIET_ROUNDS = 15  # longer than anything but a hand-off's deadline: starving, probing, the slowest write
ROUND_S = 0.1
LONG_S = 1000.0
HUNT = int(os.environ.get("BATON_LOOPBACK_EXAMPLES", "0"))  # examples
FACTS: Counter[str] = Counter()

# What happens before an event: each number picks one of all moves that are possible then; -1: everybody moves. They are
# no rule of their own, so that every rule finds work in every stage.
moves = st.lists(st.integers(-1, 30), max_size=16)


def weathers() -> st.SearchStrategy[list[str]]:
    return st.lists(st.sampled_from(("slow", "", *FAULTS)), max_size=5)


def sizes() -> st.SearchStrategy[Size]:
    return st.builds(
        Size,
        decodes=st.integers(1, 2),
        prefills=st.integers(1, 2),
        decode_blocks=st.sampled_from((60, 12)),
        decode_block_size=st.sampled_from((4, 4, 8)),
        decode_ranks=st.sampled_from((1, 1, 2, 3, 4)),
        prefill_blocks=st.sampled_from((60, 12)),
        prefill_block_size=st.sampled_from((4, 3, 8)),
        prefill_ranks=st.sampled_from((1, 1, 2, 3, 4)),
        gather=st.sampled_from(("auto", "always", "never")),
        slots=st.integers(1, 4),
        staging=st.integers(2, 3),
        limits=st.sampled_from((Limits(32, 8), Limits(5, 2), Limits(9, 4))),
        max_waiting=st.sampled_from((100, 100, 3)),
        timeout_s=st.sampled_from((LONG_S, 2.0)),
    )


# So often and no more: what is cancelled and killed all the time comes nowhere.
trouble = precondition(lambda self: self.troubles > 0)


class RolesOverLoopback(RuleBasedStateMachine):
    """See the module's text."""

    cluster: Cluster

    @initialize(
        size=sizes(),
        seed=st.integers(0, 1000),
        linked=st.sampled_from((True, True, True, False)),
        requests=st.lists(wishes(), min_size=1, max_size=5),
        weather=weathers(),
        troubles=st.sampled_from((2, 5, 12, 0)),
        kill_senders=st.booleans(),
        last_frozen=st.none() | who,
    )
    def start(
        self,
        size: Size,
        seed: int,
        linked: bool,
        requests: list[Wish],
        weather: list[str],
        troubles: int,
        kill_senders: bool,
        last_frozen: int | None,
    ) -> None:
        self.cluster = Cluster(size, seed)
        self.troubles = troubles
        self.kill_senders = kill_senders
        self.last_frozen = last_frozen
        self.answers: dict[RequestKey, Answer] = {}
        self.session = 1
        self.retired: list[Worker] = []
        if linked:
            for _ in range(6):
                self.cluster.round(0.0, ticks=0)
        for wish in requests:
            self.submit([], wish)
        self.cluster.fabric.coming.extend(weather)

    # ---- requests ------------------------------------------------------------------------------------------------

    @rule(before=moves, wish=wishes())
    def submit(self, before: list[int], wish: Wish) -> None:
        self.move(before)
        decodes = [worker for worker in self.cluster.workers if worker.decode]
        worker = decodes[wish.at % len(decodes)]
        key = RequestKey(self.session, len(self.answers))
        submit = wish.submit(key, self.cluster.size)
        self.answers[key] = Answer(submit, worker, tokens=[[] for _ in range(wish.choices)])
        worker.inbox.append(submit)

    @trouble
    @rule(before=moves, which=who)
    def cancel(self, before: list[int], which: int) -> None:
        self._strikes("cancel", before)
        waiting = self.open_answers()
        if waiting:
            answer = waiting[which % len(waiting)]
            answer.cancelled = True
            answer.worker.inbox.append(Cancel(answer.submit.request))

    @trouble
    @rule(before=moves)
    def lose_session(self, before: list[int]) -> None:
        self._strikes("lose_session", before)
        for answer in self.open_answers():
            answer.cancelled = True
        for worker in self.cluster.workers:
            if worker.decode:
                worker.inbox.append(SessionLost(self.session))
        self.session += 1

    def _strikes(self, what: str, before: list[int]) -> None:
        self.move(before)
        self.troubles -= 1
        FACTS[what] += 1

    def open_answers(self) -> list[Answer]:
        return [answer for answer in self.answers.values() if answer.end is None and answer.worker.alive]

    # ---- moves, time and trouble ---------------------------------------------------------------------------------

    @rule(before=moves)
    def move(self, before: list[int]) -> None:
        for number in before:
            possible = self.cluster.moves()
            if number < 0 or not possible:
                note("everybody moves")
                self.cluster.round(0.01, ticks=0)
            else:
                name, act = possible[number % len(possible)]
                note(name)
                act()

    @rule(before=moves, faults=weathers())
    def weather(self, before: list[int], faults: list[str]) -> None:
        """What happens to the next writes, whoever posts them."""
        self.move(before)
        self.cluster.fabric.coming.extend(faults)

    @rule(before=moves, seconds=st.sampled_from((0.05, 0.3, 1.1, 2.5)))
    def pass_time(self, before: list[int], seconds: float) -> None:
        self.move(before)
        self.cluster.now += seconds

    @trouble
    @rule(before=moves, which=who, back=st.booleans())
    def break_stream(self, before: list[int], which: int, back: bool) -> None:
        """`back`: the decode worker dials again at once, maybe before the other end has noticed."""
        self._strikes("break_stream", before)
        whole = [stream for stream in self.cluster.streams if not stream.cut]
        if not whole:
            return
        stream = whole[which % len(whole)]
        stream.cut = True
        if back and stream.decode.moves:
            stream.learn(stream.ends[0])
            again = self.cluster.dial(stream.decode, stream.prefill)
            if stream.prefill.moves:
                again.deliver(again.ends[1])

    @trouble
    @rule(before=moves, which=who)
    def kill(self, before: list[int], which: int) -> None:
        self._strikes("kill", before)
        self.end(self.cluster.workers[which % len(self.cluster.workers)])

    def end(self, worker: Worker) -> None:
        self.retired.append(worker)
        self.cluster.kill(worker)

    @trouble
    @rule(before=moves, which=who)
    def freeze(self, before: list[int], which: int) -> None:
        self._strikes("freeze", before)
        worker = self.cluster.workers[which % len(self.cluster.workers)]
        self.cluster.freeze(worker, True)

    @precondition(lambda self: any(worker.frozen for worker in self.cluster.workers))
    @rule(before=moves, which=who)
    def resume(self, before: list[int], which: int) -> None:
        self.move(before)
        frozen = [worker for worker in self.cluster.workers if worker.frozen]
        self.cluster.freeze(frozen[which % len(frozen)], False)

    # ---- what must hold ------------------------------------------------------------------------------------------

    @invariant()
    def all_is_well(self) -> None:
        self.answers_are_right()
        self.books_add_up()
        self.nothing_is_refused_without_cause()

    def answers_are_right(self) -> None:
        for worker in self.cluster.workers:
            for said in worker.said:
                if isinstance(said, RequestEnd):
                    self.answers[said.request].close(said, self.cluster.size)
                    continue
                for entry in said.tokens:
                    self.answers[entry.request].add(entry)
                for end in said.ends:
                    self.answers[end.request].close(end, self.cluster.size)
            worker.said.clear()

    def books_add_up(self) -> None:
        for worker in self.cluster.workers:
            worker.role.check()
            if isinstance(worker.role, DecodeRole):
                counts = worker.role.load().ledger
                taken = [record.lease.slot for record in worker.leases.values()]
                assert len(set(taken)) == len(taken), f"a slot is leased twice: {worker.leases}"
                assert counts.slots_leased == worker.role.landing.leases.open_count
                assert counts.slots_leased + counts.slots_quarantined == len(taken)
                assert counts.slots_free + len(taken) == counts.slots_total

    def nothing_is_refused_without_cause(self) -> None:
        """Falling back would hide from all other checks that KV came spoilt, or could not be sent at all."""
        seen = self.cluster.fabric.seen
        for worker in self.cluster.workers:
            counters = worker.role.counters
            assert not counters["digest_refused"] or seen.intersection(DIRTY), "a clean write was refused"
            if not self.retired:
                assert not counters["writes_failed"] or "fail" in seen, "a write failed on a good fabric"
                assert not counters["peers_refused"]

    # ---- the end -------------------------------------------------------------------------------------------------

    def teardown(self) -> None:
        if sys.exc_info()[0] is not None or not hasattr(self, "cluster"):
            return  # it has failed already, or was given up before it began
        cluster = self.cluster
        cluster.fabric.coming.clear()
        if self.last_frozen is not None:
            cluster.freeze(cluster.workers[self.last_frozen % len(cluster.workers)], True)
        self.come_to_rest()
        for worker in cluster.workers:
            if worker.frozen:
                cluster.freeze(worker, False)
        self.come_to_rest()
        while cluster.fabric.lost():
            doomed = cluster.fabric.lost()[0][not self.kill_senders]
            self.end(next(worker for worker in cluster.workers if worker.incarnation == doomed))
            self.drive()
        self.assert_at_rest(set())
        for worker in [*cluster.workers, *self.retired]:
            FACTS.update(worker.role.counters)
            if isinstance(worker.role, DecodeRole):
                FACTS["preemptions"] += worker.role.scheduler.preemptions
                FACTS["late_messages"] += worker.role.landing.leases.late_messages
                if worker.hello.kv.tensor_parallel > 1:
                    FACTS["verified_by_ranks"] += worker.role.counters["chunks_verified"]
                    FACTS["refused_by_ranks"] += worker.role.counters["digest_refused"]
        FACTS.update(f"end_{answer.end.reason}" for answer in self.answers.values() if answer.end)
        FACTS.update({f"fault_{fault}": 1 for fault in cluster.fabric.seen})

    def come_to_rest(self) -> None:
        """Only where a write was lost or a worker is frozen may a wait end by a deadline of `LONG_S`."""
        cluster = self.cluster
        frozen = {worker.incarnation for worker in cluster.workers if worker.frozen}
        self.drive()
        if frozen or cluster.fabric.lost():
            # Each may have waited for the one before it to compute their prefix, and then begun a hand-off of its own.
            for _ in range(1 + len(self.open_answers())):
                cluster.now += cluster.size.timeout_s
                self.drive()
        self.assert_at_rest(frozen)

    def drive(self) -> None:
        """Until nothing happens any more, in each worker that is not frozen."""
        quiet = 0
        for _ in range(600):
            quiet = 0 if self.cluster.round(ROUND_S, ticks=10) else quiet + 1
            self.all_is_well()
            if quiet == QUIET_ROUNDS:
                return
        raise AssertionError("it never comes to rest")

    def assert_at_rest(self, frozen: set[str]) -> None:
        """All is free or cached, but for what a frozen peer or a lost write, which nobody may call settled, holds."""
        held_up = self.cluster.fabric.lost()
        for worker in self.cluster.workers:
            if worker.frozen:
                continue
            answers = [answer for answer in self.open_answers() if answer.worker is worker]
            assert not answers, f"never answered: {[answer.submit for answer in answers]}"
            role, counts = worker.role, worker.role.load().ledger
            assert not counts.blocks_landing and not counts.slots_leased
            if isinstance(role, PrefillRole):
                peers = {target for source, target in held_up if source == worker.incarnation} | frozen
                assert {peer for peer, _ in role._handoffs} <= peers
                assert all(handoff.in_flight for handoff in role._handoffs.values())
                assert role._handoffs or not counts.blocks_held
            else:
                peers = {source for source, target in held_up if target == worker.incarnation} | frozen
                assert {record.peer for record in worker.leases.values()} <= peers, worker.leases
                assert role.at_rest and not counts.blocks_held
            assert not role.has_work


def how() -> settings:
    """The same examples each time; or, when asked for, many new ones."""
    return settings(
        max_examples=HUNT or 300,
        stateful_step_count=60,
        derandomize=not HUNT,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


# Without these the test would pass for nothing. All but the rare: they must not hang on what hypothesis draws.
COMMON = (
    *("end_stop", "end_length", "end_cancelled", "end_no_room"),
    *("prefilled_remote", "prefilled_mixed", "prefilled_local", "prefilled_cached"),
    *("handoffs_failed", "handoffs_expired", "aborted", "digest_refused", "slots_reclaimed", "late_messages"),
    *("verified_by_ranks", "refused_by_ranks"),
    *("preemptions", "forks", "kill", "freeze", *(f"fault_{fault}" for fault in FAULTS)),
)


@pytest.mark.slow
@pytest.mark.timeout(0 if HUNT else 600)  # shrinking a failure may take 300 s
def test_any_order_of_events_ends_well() -> None:
    FACTS.clear()
    run_state_machine_as_test(RolesOverLoopback, settings=how())
    assert not [fact for fact in COMMON if not FACTS[fact]], f"never happened; what did: {FACTS}"
