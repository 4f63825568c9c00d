"""Where hand-offs arrive: peers, leases, credits, landed chunks, and what happens when any of it goes wrong. Pure.

    begin -> credits out -> chunk done -> blocks taken -> copied out and verified -> next credit ... -> complete
      `-> anything wrong, late or lost: the verified chunks stay, the rest is computed here

Credit rule (why this cannot deadlock): blocks are taken when a chunk has landed, not before. A chunk is credited only
while free and evictable blocks cover all that the oldest hand-off still needs, plus one block for each running
sequence; the last free slot is the oldest hand-off's alone. So the oldest one can always finish.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from decode.handoff import Handoff, Landing
from engine.api import Submit
from engine.ledger import BlockLedger, SlotLedger
from engine.sequence import Sequence
from kvtransfer.chunks import chunks, seeds
from kvtransfer.handshake import Mismatch, agree
from kvtransfer.leases import LeaseBook
from kvtransfer.messages import (
    Abort,
    Begin,
    ChunkDone,
    Connect,
    Connected,
    ControlMessage,
    Copied,
    CopyOut,
    Credit,
    Disconnect,
    Done,
    Failed,
    Hello,
    Linked,
    MoverReport,
    Probe,
    Probed,
    Quiet,
)
from kvtransfer.plan import Plan
from worker.messages import FromPeer, PeerRefused, ToPeer
from worker.role import Action, Owner

PROBE_PERIOD_S = 0.25
MEASURE_S = (
    10.0  # the longest that a new peer, which measures its link to us, gets our transport's full attention
)
CREDITS_PER_HANDOFF = 4  # enough to hide a round trip behind a chunk's write; more would only hold slots

OnEnd = Callable[[Sequence, int, int, str, float], None]
OnTimed = Callable[
    [str, int, float], None
]  # worker_id, size_bytes, seconds beyond the peer's queue and compute
UNTIMED = 256  # finished hand-offs whose Done is awaited, at most
PATIENCE = 2.0  # times its estimate, with nothing landed: the hand-off is looked at again
LEAST_PATIENCE_S = 0.05


@dataclass(slots=True)
class Peer:
    """A prefill worker's incarnation, as long as its control stream lives; `plan` says how its hand-offs are cut."""

    hello: Hello
    plan: Plan
    reaches: bool = False  # our transport has connected to it
    linked: bool = False  # its transport has connected to us

    @property
    def connected(self) -> bool:
        return self.reaches and self.linked

    @property
    def incarnation(self) -> str:
        return self.hello.incarnation


class LandingZone:
    """All open hand-offs of one decode worker. `on_end(sequence, remote_tokens, size_bytes, failure, now)` is called
    once for each hand-off that was begun and not cancelled."""

    def __init__(
        self,
        hello: Hello,
        blocks: BlockLedger,
        slots: SlotLedger,
        timeout_s: float,
        counters: Counter[str],
        actions: list[Action],
        *,
        on_end: OnEnd,
        on_timed: OnTimed = lambda *_: None,
        local_s: Callable[[int, int], float] = lambda *_: math.inf,
    ) -> None:
        """`local_s(uncached, cached)`: how long it would take to prefill that here."""
        if slots.total and hello.kv.chunk_tokens < blocks.block_size:
            raise ValueError(
                f"landing slots hold chunks of {hello.kv.chunk_tokens} tokens, less than a block of "
                f"{blocks.block_size}: make the block size smaller or kvtransfer.chunk_tokens larger"
            )
        self.hello = hello
        self.blocks = blocks
        self.leases = LeaseBook(slots)
        self.timeout_s = timeout_s
        self._slots = slots
        self._counters = counters
        self._actions = actions
        self._on_end = on_end
        self._on_timed = on_timed
        self._local_s = local_s
        self._untimed: OrderedDict[int, tuple[str, str, int, float]] = OrderedDict()  # by hand-off id
        self._slips: list[tuple[float, int]] = []  # heap: when to look again, hand-off id
        self._peers: dict[str, Peer] = {}  # by incarnation
        self._by_worker: dict[str, Peer] = {}  # the latest incarnation of each worker
        # Incarnations without a control stream that may still guard quarantined slots. In order: runs can be replayed.
        self._lost: dict[str, None] = {}
        self._handoffs: dict[int, Handoff] = {}  # oldest first
        self._of_sequence: dict[int, Handoff] = {}  # id(sequence) -> hand-off
        self._copying: dict[int, tuple[Handoff, int, list[int]]] = {}  # lease id -> hand-off, chunk, blocks
        self._next_id = 1
        self._next_probe = 0.0
        self._measured_until = 0.0  # until then peers that are not linked yet may be measuring

    # ---- state -------------------------------------------------------------------------------------------------

    @property
    def open_count(self) -> int:
        """Hand-offs and copies that still use slots or blocks."""
        return len(self._handoffs) + len(self._copying)

    @property
    def handoffs(self) -> int:
        """Hand-offs under way."""
        return len(self._handoffs)

    @property
    def expecting(self) -> bool:
        return bool(self._handoffs or self._copying or self._slots.quarantined or self._measured_until)

    @property
    def reserved_blocks(self) -> int:
        """Blocks that newcomers must leave to the oldest hand-off."""
        oldest = self._oldest()
        return max(0, oldest.remaining_blocks(self.blocks)) if oldest else 0

    def connected_peers(self) -> list[str]:
        return [peer.incarnation for peer in self._peers.values() if peer.connected]

    def stuck(self, others_wait: bool) -> bool:
        """While nothing runs: somebody waits for blocks that only a hand-off which gives way can give back.

        That is the oldest hand-off, or, with `others_wait`, a sequence that holds blocks and finds no more.
        """
        oldest = self._oldest()
        if oldest is None or self._copying:
            return False
        waits_for_blocks = oldest.outstanding == 0 or any(
            not landing.blocks for landing in oldest.landing.values()
        )
        return others_wait or (
            waits_for_blocks and self.blocks.available < oldest.remaining_blocks(self.blocks)
        )

    def owners(self) -> Iterator[Owner]:
        """Hand-offs with the verified chunks that wait for an earlier one, and copies. What is in order is the
        request's, as is the cached prefix."""
        for handoff in self._handoffs.values():
            yield Owner(
                name=f"{handoff.peer}/{handoff.handoff_id}",
                kind="hand-off",
                state=f"{handoff.verified} of {len(handoff.chunks)} chunks",
                blocks=[block for blocks in handoff.ready.values() for block in blocks],
                since=handoff.began,
                deadline=handoff.deadline,
            )
        for handoff, chunk, blocks in self._copying.values():
            name = f"{handoff.peer}/{handoff.handoff_id}"
            yield Owner(name, "chunk", f"chunk {chunk}", blocks, handoff.began, landing=True)

    # ---- peers -------------------------------------------------------------------------------------------------

    def peer_up(self, hello: Hello, now: float) -> None:
        """A prefill worker said hello on a new control stream."""
        try:
            if not self._slots.total:
                raise Mismatch("this worker has no landing slots (kvtransfer.slots is 0)")
            plan = agree(self.hello, hello, "decode")
        except Mismatch as wrong:
            self._counters["peers_refused"] += 1
            self._actions.append(PeerRefused(hello.incarnation, str(wrong)))
            return
        peer = Peer(hello, plan)
        self._peers[hello.incarnation] = peer
        self._by_worker[hello.worker_id] = peer
        self._lost.pop(hello.incarnation, None)
        self._measured_until = now + MEASURE_S
        self._actions.append(Connect(hello))

    def peer_lost(self, incarnation: str, epoch: int, now: float) -> None:
        """Its control stream broke: its leases are over, its slots wait until it is quiet or certainly gone."""
        peer = self._peers.get(incarnation)
        if peer is None or peer.hello.epoch != epoch:
            return
        del self._peers[incarnation]
        if self._by_worker.get(peer.hello.worker_id) is peer:
            del self._by_worker[peer.hello.worker_id]
        for handoff in [h for h in self._handoffs.values() if h.peer == incarnation]:
            self._fail(handoff, f"lost {peer.hello.worker_id}", now)
        self._lost[incarnation] = None

    # ---- begin and end -----------------------------------------------------------------------------------------

    def begin(self, submit: Submit, sequence: Sequence, cached: int, now: float) -> str:
        """Asks the submitted prefill worker for what `sequence.wanted` of it lies beyond `cached` tokens.

        Returns why that cannot be done now, or empty when the hand-off is open.
        """
        peer = self._by_worker.get(submit.prefill_worker)
        if peer is None or not peer.connected:
            return f"not connected to {submit.prefill_worker}"
        if not self._slots.total - self._slots.quarantined:
            return "every landing slot is quarantined"
        wanted = sequence.wanted
        sequence.take_prefix(self.blocks, cached)
        chunk_tokens = peer.plan.chunk_tokens
        handoff = Handoff(
            handoff_id=self._next_id,
            peer=peer.incarnation,
            epoch=peer.hello.epoch,
            sequence=sequence,
            plan=peer.plan,
            chunks=chunks(cached, wanted, chunk_tokens),
            seeds=seeds(sequence.tokens[:wanted], submit.salt, cached, chunk_tokens),
            began=now,
            deadline=now + self.timeout_s,
        )
        self._next_id += 1
        self._handoffs[handoff.handoff_id] = handoff
        self._of_sequence[id(sequence)] = handoff
        if submit.handoff_s:
            again = now + max(LEAST_PATIENCE_S, PATIENCE * submit.handoff_s)
            heapq.heappush(self._slips, (again, handoff.handoff_id))
        message = Begin(
            handoff_id=handoff.handoff_id,
            request_id=submit.request_id,
            tokens=sequence.tokens[:wanted],
            start=cached,
            deadline_s=self.timeout_s,
            salt=submit.salt,
            priority=submit.priority,
        )
        self._say(handoff, message)
        return ""

    def cancel(self, sequence: Sequence, reason: str) -> None:
        """The request is over: its hand-off is aborted. The caller drops the sequence's blocks."""
        self._close(self._of_sequence[id(sequence)], reason)

    def give_up_youngest(self, now: float) -> Sequence:
        """Short of blocks: the youngest hand-off's prompt is computed here instead, when there is room."""
        youngest = next(reversed(self._handoffs.values()))
        self._fail(youngest, "short of KV blocks", now)
        return youngest.sequence

    def _fail(self, handoff: Handoff, reason: str, now: float, *, expired: bool = False) -> None:
        self._close(handoff, reason, expired=expired)
        self._end(handoff, reason, now)

    def _close(self, handoff: Handoff, reason: str, *, expired: bool = False) -> None:
        """Forgets an unfinished hand-off: its writer is told, its slots quarantined, its loose blocks freed."""
        del self._handoffs[handoff.handoff_id]
        del self._of_sequence[id(handoff.sequence)]
        if handoff.peer in self._peers:
            self._say(handoff, Abort(handoff.handoff_id, reason))
        self.leases.abandon(handoff.handoff_id, expired=expired)
        for chunk, landing in list(handoff.landing.items()):
            if landing.blocks is None:  # landed, still in its slot: settled, so the slot is free at once
                self.leases.copied_out(landing.done.lease_id, used=False)
                del handoff.landing[chunk]
        for blocks in handoff.ready.values():
            self.blocks.release(blocks)
        handoff.ready.clear()

    def _end(self, handoff: Handoff, failure: str, now: float) -> None:
        if failure:
            self._counters["handoffs_failed"] += 1
        remote = sum(chunk.tokens for chunk in handoff.chunks[: handoff.verified])
        self._on_end(handoff.sequence, remote, handoff.size_bytes if remote else 0, failure, now)

    # ---- events ------------------------------------------------------------------------------------------------

    def from_peer(self, event: FromPeer, now: float) -> None:
        message = event.message
        if isinstance(message, Linked):
            peer = self._peers.get(event.peer)
            if peer is not None and peer.hello.epoch == event.epoch:
                peer.linked = True
            return
        if isinstance(message, Quiet):
            self.leases.quiet(event.peer, message.handoff_id, message.epoch)
            return
        handoff = self._handoffs.get(getattr(message, "handoff_id", 0))
        if isinstance(message, Done):
            self._timed(event.peer, message, handoff)
        if handoff is None or handoff.peer != event.peer or handoff.epoch != event.epoch:
            self.leases.late_messages += not isinstance(
                message, Done
            )  # usually the copy was quicker than Done
        elif isinstance(message, ChunkDone):
            self._chunk_done(handoff, message, now)
        elif isinstance(message, Failed):
            self._fail(handoff, message.reason, now)
        elif isinstance(message, Done) and handoff.verified + len(handoff.landing) + len(handoff.ready) < len(
            handoff.chunks
        ):
            # The stream is ordered: what was not announced before Done never will be.
            self._fail(handoff, "a chunk was never announced", now)

    def _timed(self, incarnation: str, done: Done, handoff: Handoff | None) -> None:
        """Done tells what the prefill worker's queue and compute were; usually the copy was quicker than that."""
        if handoff is not None:
            handoff.done = done
            return
        peer, worker_id, size_bytes, total_s = self._untimed.pop(done.handoff_id, ("", "", 0, 0.0))
        if peer == incarnation:
            self._on_timed(worker_id, size_bytes, total_s - done.queue_s - done.compute_s)

    def _finished(self, handoff: Handoff, now: float) -> None:
        """All of it came: what it took is learned from, now or when Done comes."""
        peer = self._peers.get(handoff.peer)
        if peer is None:
            return
        total_s = now - handoff.began
        record = (handoff.peer, peer.hello.worker_id, handoff.size_bytes, total_s)
        self._untimed[handoff.handoff_id] = record
        if len(self._untimed) > UNTIMED:
            self._untimed.popitem(last=False)
        if handoff.done is not None:
            self._timed(handoff.peer, handoff.done, None)

    def _look_again(self, now: float) -> None:
        """Hand-offs of which nothing has come long after all should have: computed here when that is quicker than
        what they have waited already, which is the best guess of what they have yet to wait."""
        while self._slips and self._slips[0][0] <= now:
            _, handoff_id = heapq.heappop(self._slips)
            handoff = self._handoffs.get(handoff_id)
            if handoff is None or handoff.verified or handoff.landing or handoff.ready:
                continue
            waited_s = now - handoff.began
            cached = handoff.sequence.computed
            if self._local_s(handoff.sequence.wanted - cached, cached) < waited_s:
                self._counters["handoffs_slipped"] += 1
                self._fail(handoff, f"nothing came for {waited_s:.3f} s; here it is quicker", now)
            else:
                heapq.heappush(self._slips, (now + waited_s, handoff_id))

    def _chunk_done(self, handoff: Handoff, done: ChunkDone, now: float) -> None:
        record = self.leases.landed(handoff.peer, done)
        if record is None:
            return
        handoff.landing[done.chunk] = Landing(done, record.lease.slot)
        pieces, size_bytes = handoff.expected(done.chunk)
        if (len(done.digests), done.size_bytes) != (pieces, size_bytes):
            self._counters["digest_refused"] += 1
            what = f"{len(done.digests)} pieces of {done.size_bytes} bytes, not {pieces} of {size_bytes}"
            self._fail(handoff, f"chunk {done.chunk} has {what}", now)

    def report(self, report: MoverReport, now: float) -> None:
        if isinstance(report, Connected):
            self._connected(report)
        elif isinstance(report, Copied):
            self._copied(report, now)
        elif isinstance(report, Probed) and report.gone and report.peer in self._lost:
            del self._lost[report.peer]
            self._counters["slots_reclaimed"] += self.leases.gone(report.peer)
            self._actions.append(Disconnect(report.peer))

    def _connected(self, report: Connected) -> None:
        peer = self._peers.get(report.peer)
        if peer is None:
            return
        peer.reaches = not report.error
        if report.error:
            self._counters["peers_refused"] += 1
            self._actions.append(PeerRefused(report.peer, report.error))

    def _copied(self, report: Copied, now: float) -> None:
        handoff, chunk, blocks = self._copying.pop(report.lease_id)
        open_still = handoff.handoff_id in self._handoffs
        self.leases.copied_out(report.lease_id, used=report.verified and open_still)
        if open_still and report.verified:
            handoff.accept(self.blocks, chunk)
            self._counters["chunks_verified"] += 1
            if handoff.complete:
                del self._handoffs[handoff.handoff_id]
                del self._of_sequence[id(handoff.sequence)]
                self._finished(handoff, now)
                self._end(handoff, "", now)
            return
        self.blocks.refuse_landing(blocks)
        if not report.verified:
            self._counters["digest_refused"] += 1
        if open_still:
            del handoff.landing[chunk]
            self._fail(handoff, f"chunk {chunk} failed its digest", now)

    # ---- time and credits --------------------------------------------------------------------------------------

    def tick(self, now: float, running: int) -> None:
        while (oldest := self._oldest()) is not None and now >= oldest.deadline:
            self._counters["handoffs_expired"] += 1
            self._fail(oldest, f"not complete after {self.timeout_s:g} s", now, expired=True)
        self._look_again(now)
        if now >= self._measured_until or all(peer.linked for peer in self._peers.values()):
            self._measured_until = 0.0
        if self._handoffs:
            self._take_blocks()
            self._grant(running, now)
        if self._lost and now >= self._next_probe:
            self._next_probe = now + PROBE_PERIOD_S
            guarding = set(self.leases.quarantined_peers())
            for incarnation in list(self._lost):
                if incarnation in guarding:
                    self._actions.append(Probe(incarnation))
                else:
                    del self._lost[incarnation]
                    self._actions.append(Disconnect(incarnation))

    def _take_blocks(self) -> None:
        """Gives landed chunks their blocks, the oldest hand-off first, and has them copied out."""
        oldest = self._oldest()
        assert oldest is not None
        for handoff in self._handoffs.values():
            for chunk, landing in sorted(handoff.landing.items()):
                if landing.blocks is not None:
                    continue
                needed = handoff.chunk_blocks(self.blocks, chunk)
                kept = 0 if handoff is oldest else oldest.remaining_blocks(self.blocks)
                if needed + kept > self.blocks.available:
                    break
                landing.blocks = self.blocks.take_landing(needed)
                assert landing.blocks is not None
                self._copy_out(handoff, chunk, landing)

    def _copy_out(self, handoff: Handoff, chunk: int, landing: Landing) -> None:
        assert landing.blocks is not None
        covered = handoff.chunks[chunk]
        done = landing.done
        self._copying[done.lease_id] = (handoff, chunk, landing.blocks)
        self._actions.append(
            CopyOut(
                peer=handoff.peer,
                handoff_id=handoff.handoff_id,
                lease_id=done.lease_id,
                chunk=chunk,
                slot=landing.slot,
                blocks=landing.blocks,
                blocks_start=covered.first_token,
                first_token=covered.first_token,
                tokens=covered.tokens,
                seed=handoff.seeds[chunk],
                size_bytes=done.size_bytes,
                digests=done.digests,
            )
        )

    def _grant(self, running: int, now: float) -> None:
        oldest = self._oldest()
        assert oldest is not None
        needs = oldest.remaining_blocks(self.blocks) + running
        promised = 0  # blocks of younger hand-offs' chunks that were credited and are not being copied yet
        for handoff in self._handoffs.values():
            leases = []
            if handoff is not oldest:
                promised += self._promised(handoff)
            while handoff.credited < len(handoff.chunks) and handoff.outstanding < CREDITS_PER_HANDOFF:
                needed = handoff.chunk_blocks(self.blocks, handoff.credited)
                extra = 0 if handoff is oldest else promised + needed
                if needs + extra > self.blocks.available or self._slots.free <= (handoff is not oldest):
                    break
                remaining_s = max(0.0, handoff.deadline - now)
                lease = self.leases.grant(
                    handoff.handoff_id, handoff.peer, handoff.epoch, handoff.credited, remaining_s, now
                )
                assert lease is not None
                handoff.credited += 1
                promised += 0 if handoff is oldest else needed
                leases.append(lease)
            if leases:
                self._say(handoff, Credit(handoff.handoff_id, leases))
            if not self._slots.free:
                break

    def _promised(self, handoff: Handoff) -> int:
        """Blocks that the hand-off's credited chunks will take and have not taken yet."""
        taken = {chunk for chunk, landing in handoff.landing.items() if landing.blocks is not None}
        pending = set(range(handoff.verified, handoff.credited)) - taken - handoff.ready.keys()
        return sum(handoff.chunk_blocks(self.blocks, chunk) for chunk in pending)

    # ---- helpers -----------------------------------------------------------------------------------------------

    def _oldest(self) -> Handoff | None:
        return next(iter(self._handoffs.values()), None)

    def _say(self, handoff: Handoff, message: ControlMessage) -> None:
        self._actions.append(ToPeer(handoff.peer, handoff.epoch, message))
