"""The prefill role: every decision of a prefill worker, pure. Events and `now` in, actions out.

    begin -> the scheduler computes the prompt -> each chunk leaves as soon as it is computed and credited
          -> all written and settled: done -> blocks released (they stay in the prefix cache)
    abort, lost peer, deadline, failed write -> stop posting, let writes settle, then quiet -> blocks released

Source blocks stay pinned until every write from them has settled. It never samples a token.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter, OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field

from engine.api import KvEvents, Load, PeerLink, RequestKey
from engine.costs import StepModel
from engine.ledger import BlockLedger, counts
from engine.plan import StepPlan, StepResult
from engine.scheduler import Limits, Scheduler
from engine.sequence import Phase, Sequence
from kvtransfer.chunks import Chunk, chunks, seeds
from kvtransfer.handshake import Mismatch, agree
from kvtransfer.messages import (
    Abort,
    Begin,
    Connect,
    Connected,
    ControlMessage,
    Credit,
    Disconnect,
    Done,
    Failed,
    Hello,
    Lease,
    Linked,
    Measured,
    MoverReport,
    Quiet,
    SendChunk,
    Sent,
)
from kvtransfer.plan import Plan
from kvtransfer.preflight import refusal
from prefill.states import HANDOFFS, State
from worker.messages import FromPeer, PeerLost, PeerRefused, PeerUp, ToEngine, ToPeer
from worker.role import Action, HeldLease, Owner

REMEMBERED_ABORTS = 4096
STARVED_S = 1.0  # no step and no write has ended for so long, although prompts wait

Key = tuple[str, int]  # incarnation of the decode worker, its hand-off id


@dataclass(slots=True)
class Peer:
    """A decode worker's incarnation. `number` names it in request keys, `plan` says how hand-offs to it are cut.

    `quiet_owed` > 0: the control streams up to that epoch broke, and once no write of theirs is in flight the peer is
    to be told so; its quarantined slots wait for that.
    """

    hello: Hello
    plan: Plan
    number: int
    alive: bool = True
    connected: bool = False
    link: PeerLink | None = None
    quiet_owed: int = 0


@dataclass(slots=True)
class Handoff:
    """One hand-off as the prefill worker sees it."""

    key: Key
    epoch: int
    sequence: Sequence
    chunks: list[Chunk]
    seeds: list[int]
    began: float
    deadline: float
    state: State = State.COMPUTING
    leases: dict[int, tuple[Lease, float]] = field(
        default_factory=dict
    )  # by chunk, with its end; not posted yet
    posted: int = 0  # leading chunks given to the mover
    in_flight: set[int] = field(default_factory=set)
    settled: int = 0
    cached: int = 0
    scheduled: float | None = None
    computed: float | None = None


class PrefillRole:
    """State of one prefill worker."""

    def __init__(
        self,
        hello: Hello,
        blocks: BlockLedger,
        limits: Limits,
        *,
        max_waiting: int = 512,
        min_bandwidth: float = 0.0,
    ) -> None:
        """`min_bandwidth`: decode workers to which less GB/s were measured are refused; 0: none is."""
        self.hello = hello
        self.blocks = blocks
        self.scheduler = Scheduler(blocks, limits, urgent_preempts=False)
        self.counters: Counter[str] = Counter()
        self.costs = StepModel()
        self._max_waiting = max_waiting
        self._min_bandwidth = min_bandwidth
        self._actions: list[Action] = []
        self._peers: dict[str, Peer] = {}
        self._handoffs: dict[Key, Handoff] = {}
        self._of_request: dict[RequestKey, Handoff] = {}
        self._deadlines: list[tuple[float, Key]] = []
        self._aborted: OrderedDict[Key, None] = OrderedDict()
        self._next_peer = 1
        self._starved_since: float | None = None

    # ---- what the step loop asks -------------------------------------------------------------------------------

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    @property
    def expecting(self) -> bool:
        return False  # nobody writes into a prefill worker

    @property
    def at_rest(self) -> bool:
        return not self._handoffs

    def drain(self) -> list[Action]:
        actions = self._actions[:]
        self._actions.clear()
        return actions

    def load(self) -> Load:
        return Load(
            step=self.scheduler.step,
            waiting=self.scheduler.waiting,
            running=self.scheduler.running,
            waiting_tokens=self.scheduler.waiting_tokens,
            handoffs=len(self._handoffs),
            ledger=counts(self.blocks),
            peers=[name for name, peer in self._peers.items() if peer.alive and peer.connected],
            links=[peer.link for peer in self._peers.values() if peer.alive and peer.link is not None],
            counters={**self.counters, "evictions": self.blocks.evictions},
            queue=self.scheduler.queue(self._max_waiting - self.scheduler.waiting, self.hello.kv.token_bytes),
        )

    def kv_events(self, limit: int) -> KvEvents | None:
        return self.blocks.journal.take(limit)

    def owners(self) -> Iterator[Owner]:
        for handoff in self._handoffs.values():
            yield Owner(
                name=f"{handoff.key[0]}/{handoff.key[1]}",
                kind="hand-off",
                state=handoff.state.value,
                blocks=handoff.sequence.held,
                since=handoff.began,
                # Writes in flight settle within the transport's own time.
                deadline=math.inf if handoff.state is State.ENDING else handoff.deadline,
            )

    def leases(self) -> Iterator[HeldLease]:
        return iter(())  # nobody writes into a prefill worker

    def check(self) -> None:
        self.blocks.check(at_rest=self.at_rest)
        self.blocks.check_owners([owner.blocks for owner in self.owners()], [])

    # ---- events ------------------------------------------------------------------------------------------------

    def handle(self, event: ToEngine, now: float) -> None:
        if isinstance(event, PeerUp):
            self._peer_up(event.hello, now)
        elif isinstance(event, PeerLost):
            self._peer_lost(event.peer, event.epoch, now)
        elif isinstance(event, FromPeer):
            self._from_peer(event, now)

    def report(self, report: MoverReport, now: float) -> None:
        if isinstance(report, Sent):
            self._sent(report, now)
        elif isinstance(report, Connected):
            self._connected(report)

    def tick(self, now: float) -> None:
        while self._deadlines and self._deadlines[0][0] <= now:
            _, key = heapq.heappop(self._deadlines)
            handoff = self._handoffs.get(key)
            if handoff is not None and handoff.state is not State.ENDING:
                self.counters["handoffs_expired"] += 1
                self._give_up(handoff, now, "not complete within its deadline")

    # ---- one step ----------------------------------------------------------------------------------------------

    def schedule(self, now: float) -> StepPlan | None:
        plan = self.scheduler.schedule()
        while plan is None and self._unstick(now):
            plan = self.scheduler.schedule()
        if plan is not None:
            self._starved_since = None
            for sequence in self.scheduler.admitted:
                handoff = self._of_request[sequence.request]
                handoff.scheduled = now
                handoff.cached = sequence.computed
                self.counters["cached_tokens"] += sequence.computed
                self._pump(handoff, now)
        return plan

    def commit(self, plan: StepPlan, result: StepResult, now: float) -> None:
        for progress in self.scheduler.commit(plan, result):
            handoff = self._of_request[progress.sequence.request]
            self.counters["prompt_tokens"] += (
                0 if progress.sequence.remaining else progress.sequence.prompt_length
            )
            if not progress.sequence.remaining:
                self.scheduler.detach(progress.sequence)
                handoff.state = HANDOFFS.move(handoff.state, State.SENDING)
                handoff.computed = now
            self._pump(handoff, now)

    def _unstick(self, now: float) -> bool:
        """No prompt finds a block: the youngest that holds some gives way, unless others will release theirs soon.

        Two decode workers may wait for one another through two prefill workers, each of which is full of what is not
        the other's oldest: so even what only waits for credit gives way in the end.
        """
        if not self.scheduler.has_work:
            self._starved_since = None
            return False
        if self._starved_since is None:
            self._starved_since = now
        holders = [handoff for handoff in self._handoffs.values() if len(handoff.sequence.block_table)]
        leaving = any(handoff.in_flight or handoff.state is not State.COMPUTING for handoff in holders)
        if leaving and now < self._starved_since + STARVED_S:
            return False
        youngest = next((handoff for handoff in reversed(holders) if handoff.state is not State.ENDING), None)
        if youngest is None:
            return False
        self._starved_since = now
        self.counters["starved"] += 1
        self._give_up(youngest, now, "the prefill worker is short of KV blocks")
        return True

    # ---- peers -------------------------------------------------------------------------------------------------

    def _peer_up(self, hello: Hello, now: float) -> None:
        try:
            plan = agree(self.hello, hello, "prefill")
        except Mismatch as wrong:
            self.counters["peers_refused"] += 1
            self._actions.append(PeerRefused(hello.incarnation, str(wrong)))
            return
        former = self._peers.get(hello.incarnation)
        if former is not None and hello.epoch <= former.hello.epoch:
            self.counters["late_messages"] += 1  # overtaken by the hello of a newer stream
            return
        if former is not None and former.alive:  # it noticed the break of the old stream before we did
            self._peer_lost(hello.incarnation, former.hello.epoch, now)
        peer = self._peers.get(hello.incarnation)
        if peer is None:
            peer = Peer(hello, plan, self._next_peer)
            self._next_peer += 1
            self._peers[hello.incarnation] = peer
        else:
            peer.hello, peer.plan = hello, plan
            peer.alive = True
        peer.quiet_owed = max(0, hello.epoch - 1)
        self._actions.append(Connect(hello))
        self._pay_quiet(peer)

    def _connected(self, report: Connected) -> None:
        peer = self._peers.get(report.peer)
        if peer is None:
            return
        measured = report.measured or Measured()
        error = report.error or (
            refusal(measured, self._min_bandwidth) if report.measured is not None else ""
        )
        peer.link = PeerLink(
            peer.hello.worker_id,
            measured.bytes_per_s,
            measured.latency_s,
            report.devices,
            error or measured.error,
            report.warning,
        )
        peer.connected = not error
        if peer.connected:
            self._say(report.peer, peer.hello.epoch, Linked())
        else:
            self.counters["peers_refused"] += 1
            self._actions.append(PeerRefused(report.peer, error))

    def _peer_lost(self, incarnation: str, epoch: int, now: float) -> None:
        peer = self._peers.get(incarnation)
        if peer is None or peer.hello.epoch != epoch:
            return
        peer.alive = False
        for handoff in [h for h in self._handoffs.values() if h.key[0] == incarnation]:
            if handoff.state is not State.ENDING:
                self._give_up(handoff, now, "")
        self._forget(peer)

    def _pay_quiet(self, peer: Peer) -> None:
        """After a reconnect: says so once no write of the broken stream's hand-offs is in flight."""
        incarnation = peer.hello.incarnation
        if not peer.alive or not peer.quiet_owed:
            return
        if all(h.key[0] != incarnation or h.epoch > peer.quiet_owed for h in self._handoffs.values()):
            self._say(incarnation, peer.hello.epoch, Quiet(0, peer.quiet_owed))
            peer.quiet_owed = 0

    def _forget(self, peer: Peer) -> None:
        """Forgets a lost peer once nothing is in flight to it."""
        incarnation = peer.hello.incarnation
        if peer.alive or incarnation not in self._peers:
            return
        if all(h.key[0] != incarnation for h in self._handoffs.values()):
            del self._peers[incarnation]
            self._actions.append(Disconnect(incarnation))

    # ---- hand-offs ---------------------------------------------------------------------------------------------

    def _from_peer(self, event: FromPeer, now: float) -> None:
        peer = self._peers.get(event.peer)
        message = event.message
        if peer is None or not peer.alive or peer.hello.epoch != event.epoch:
            self.counters["late_messages"] += 1
        elif isinstance(message, Begin):
            self._begin(peer, message, now)
        elif isinstance(message, Credit):
            handoff = self._handoffs.get((event.peer, message.handoff_id))
            if handoff is None or handoff.state is State.ENDING:
                self.counters["late_messages"] += 1
                return
            slots = peer.hello.slot_count
            for lease in message.leases:
                if lease.slot >= slots:
                    self._give_up(handoff, now, f"a lease on slot {lease.slot} of a worker with {slots}")
                    return
                handoff.leases[lease.chunk] = (lease, now + lease.deadline_s)
            self._pump(handoff, now)
        elif isinstance(message, Abort):
            self._abort(peer, message, now)

    def _begin(self, peer: Peer, begin: Begin, now: float) -> None:
        key = (peer.hello.incarnation, begin.handoff_id)
        refusal = self._refusal(peer, key, begin)
        if refusal:
            self.counters["refused"] += 1
            self._say(key[0], peer.hello.epoch, Failed(begin.handoff_id, refusal))
            self._say(key[0], peer.hello.epoch, Quiet(begin.handoff_id, peer.hello.epoch))
            return
        chunk_tokens = peer.plan.chunk_tokens
        request = RequestKey(peer.number, begin.handoff_id)
        handoff = Handoff(
            key=key,
            epoch=peer.hello.epoch,
            sequence=Sequence(request, begin.tokens, None, begin.salt, begin.priority),
            chunks=chunks(begin.start, len(begin.tokens), chunk_tokens),
            seeds=seeds(begin.tokens, begin.salt, begin.start, chunk_tokens),
            began=now,
            deadline=now + begin.deadline_s,
        )
        self._handoffs[key] = handoff
        self._of_request[request] = handoff
        heapq.heappush(self._deadlines, (handoff.deadline, key))
        self.counters["accepted"] += 1
        self.scheduler.add(handoff.sequence)

    def _refusal(self, peer: Peer, key: Key, begin: Begin) -> str:
        if key in self._aborted or key in self._handoffs:
            return "this hand-off was aborted or begun before"
        if not peer.connected:
            return "the transport to this decode worker is not connected"
        if not 0 <= begin.start < len(begin.tokens):
            return f"nothing to hand off: start {begin.start} of {len(begin.tokens)} tokens"
        if not math.isfinite(begin.deadline_s):  # not-a-number would put the heap of deadlines out of order
            return f"deadline_s={begin.deadline_s}: a hand-off ends in finite time"
        needed = self.blocks.blocks_for(len(begin.tokens))
        if needed > self.blocks.total:
            return f"the prompt needs {needed} KV blocks, this prefill worker has {self.blocks.total}"
        if self.scheduler.waiting >= self._max_waiting:
            return f"no room: {self._max_waiting} hand-offs wait already"
        return ""

    def _pump(self, handoff: Handoff, now: float) -> None:
        """Gives the mover every chunk that is computed and credited, in order; none under a lease that is over."""
        sequence = handoff.sequence
        while handoff.posted < len(handoff.chunks) and handoff.posted in handoff.leases:
            chunk = handoff.chunks[handoff.posted]
            end = chunk.first_token + chunk.tokens
            if end > sequence.computed:
                break
            lease, until = handoff.leases.pop(handoff.posted)
            if (
                now >= until
            ):  # so is the hand-off, at the next tick: its sequence may be in a step that is planned
                heapq.heappush(self._deadlines, (now, handoff.key))
                return
            first_block = chunk.first_token // self.blocks.block_size
            last_block = self.blocks.blocks_for(end)
            self._actions.append(
                SendChunk(
                    peer=handoff.key[0],
                    handoff_id=handoff.key[1],
                    lease=lease,
                    blocks=sequence.block_table.ids[first_block:last_block].tolist(),
                    blocks_start=first_block * self.blocks.block_size,
                    first_token=chunk.first_token,
                    tokens=chunk.tokens,
                    seed=handoff.seeds[handoff.posted],
                )
            )
            handoff.in_flight.add(handoff.posted)
            handoff.posted += 1

    def _sent(self, report: Sent, now: float) -> None:
        handoff = self._handoffs.get((report.peer, report.handoff_id))
        if handoff is None:
            raise AssertionError(
                f"a write of unknown hand-off {report.handoff_id} settled: its blocks were not pinned"
            )
        handoff.in_flight.discard(report.chunk)
        self._starved_since = None
        if not report.error:
            handoff.settled += 1
            self.counters["chunks_sent"] += 1
            self.counters["handoff_bytes"] += report.size_bytes
        elif handoff.state is not State.ENDING:
            self.counters["writes_failed"] += 1
            self._give_up(handoff, now, f"write failed: {report.error}")
            return
        if handoff.state is State.ENDING:
            self._finish_ending(handoff)
        elif handoff.settled == len(handoff.chunks):
            self._done(handoff)

    def _done(self, handoff: Handoff) -> None:
        handoff.state = HANDOFFS.move(handoff.state, State.ENDED)
        scheduled = handoff.scheduled if handoff.scheduled is not None else handoff.began
        computed = handoff.computed if handoff.computed is not None else scheduled
        done = Done(handoff.key[1], handoff.cached, scheduled - handoff.began, computed - scheduled)
        self._say(handoff.key[0], handoff.epoch, done)
        self.counters["done"] += 1
        self._remove(handoff)

    def _abort(self, peer: Peer, abort: Abort, now: float) -> None:
        key = (peer.hello.incarnation, abort.handoff_id)
        self._aborted[key] = None
        if len(self._aborted) > REMEMBERED_ABORTS:
            self._aborted.popitem(last=False)
        handoff = self._handoffs.get(key)
        if handoff is None:
            self._say(key[0], peer.hello.epoch, Quiet(abort.handoff_id, peer.hello.epoch))
        elif handoff.state is not State.ENDING:
            self.counters["aborted"] += 1
            self._give_up(handoff, now, "")

    def _give_up(self, handoff: Handoff, now: float, reason: str) -> None:
        """Stops posting; tells the peer why unless it knows; the rest follows when writes in flight have settled."""
        handoff.state = HANDOFFS.move(handoff.state, State.ENDING)
        handoff.leases.clear()
        sequence = handoff.sequence
        if sequence.phase is Phase.RUNNING:
            self.scheduler.detach(sequence)  # not `remove`: writes in flight may read its blocks
        elif sequence.phase is Phase.WAITING:
            self.scheduler.remove(sequence)
        if reason:
            self.counters["failed"] += 1
            self._say(handoff.key[0], handoff.epoch, Failed(handoff.key[1], reason))
        self._finish_ending(handoff)

    def _finish_ending(self, handoff: Handoff) -> None:
        if handoff.in_flight:
            return
        handoff.state = HANDOFFS.move(handoff.state, State.ENDED)
        self._say(handoff.key[0], handoff.epoch, Quiet(handoff.key[1], handoff.epoch))
        self._remove(handoff)

    def _remove(self, handoff: Handoff) -> None:
        handoff.sequence.drop_blocks(self.blocks)
        del self._handoffs[handoff.key]
        del self._of_request[handoff.sequence.request]
        peer = self._peers[handoff.key[0]]
        self._pay_quiet(peer)
        self._forget(peer)

    def _say(self, incarnation: str, epoch: int, message: ControlMessage) -> None:
        """Says it on the stream of `epoch`; after a break there is nobody to hear it."""
        peer = self._peers.get(incarnation)
        if peer is not None and peer.alive and peer.hello.epoch == epoch:
            self._actions.append(ToPeer(incarnation, epoch, message))
