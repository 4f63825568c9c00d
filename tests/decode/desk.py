"""A decode role on the table: one call a turn, time by hand, and a prefill worker that says what a test lets it say."""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec
import numpy as np

from decode.role import DecodeRole
from engine.api import Cancel, RequestEnd, RequestKey, SamplingParams, StepOutput, Submit
from engine.ledger import BlockLedger, SlotLedger
from engine.scheduler import Limits
from kvtransfer.chunks import chunks, seeds
from kvtransfer.digest import copy_and_digest, digest, piece_seed
from kvtransfer.handshake import CAPABILITIES
from kvtransfer.messages import (
    Begin,
    ChunkDone,
    Connect,
    Connected,
    ControlMessage,
    Copied,
    CopyOut,
    Credit,
    Hello,
    KvSpec,
    Lease,
    Linked,
    MoverJob,
)
from simulation.model import KV_BYTES, VOCABULARY, Kv, Model, kv_of, right_answer
from worker.messages import FromPeer, PeerLost, PeerRefused, PeerUp, ToPeer

BLOCK, CHUNK = 4, 8
Message = TypeVar("Message")


def hello(
    worker_id: str,
    incarnation: str,
    epoch: int = 0,
    *,
    slots: int = 0,
    model: str = "m",
    block_size: int = BLOCK,
    chunk_tokens: int = CHUNK,
    wire_dtype: str = "",
) -> Hello:
    kv = KvSpec(
        model=model,
        layers=1,
        q_heads=1,
        kv_heads=1,
        head_dim=1,
        dtype="float32",
        block_size=block_size,
        chunk_tokens=chunk_tokens,
        wire_dtype=wire_dtype,
    )
    return Hello(
        worker_id=worker_id,
        incarnation=incarnation,
        kv=kv,
        transport="t",
        endpoints=[b""],
        epoch=epoch,
        capabilities=list(CAPABILITIES),
        slot_count=slots,
        slot_bytes=[chunk_tokens * KV_BYTES],
    )


def prompt_of(length: int, first: int = 0) -> list[int]:
    return [(first + position) % VOCABULARY for position in range(length)]


class Desk:
    """`said`: control messages, `jobs`: for the mover, both since they were last read; tokens and ends by request."""

    def __init__(
        self,
        *,
        blocks: int = 60,
        slots: int = 8,
        timeout_s: float = 10.0,
        max_waiting: int = 50,
        limits: Limits | None = None,
        wire_dtype: str = "",
    ) -> None:
        self.now = 0.0
        self.slots: Kv = np.zeros((slots, CHUNK), dtype=np.int64)
        self.model = Model(blocks, BLOCK)
        self.ledger = BlockLedger(blocks, BLOCK)
        self.role = DecodeRole(
            hello("decode", "d1", slots=slots, wire_dtype=wire_dtype),
            self.ledger,
            SlotLedger(slots),
            limits or Limits(64, 8),
            max_waiting=max_waiting,
            handoff_timeout_s=timeout_s,
        )
        self.said: list[ToPeer] = []
        self.jobs: list[MoverJob] = []
        self.refused: list[PeerRefused] = []
        self.tokens: dict[RequestKey, list[int]] = {}
        self.ends: dict[RequestKey, RequestEnd] = {}
        self.taken: list[int] = []  # blocks that the test itself holds
        self.copies = True  # the mover copies out at once
        self._next = 1

    # ---- the router's side -----------------------------------------------------------------------------------------

    def submit(
        self,
        prompt: list[int],
        max_tokens: int = 3,
        *,
        to: str = "",
        local_below: int = 0,
        session: int = 1,
        local: bool = False,
        handoff_s: float = 0.0,
    ) -> Submit:
        submit = Submit(
            request=RequestKey(session, self._next),
            request_id=f"r{self._next}",
            prompt=prompt,
            sampling=SamplingParams(max_tokens=max_tokens, seed=self._next),
            prefill_worker=to,
            local_below_tokens=local_below,
            local=local,
            handoff_s=handoff_s,
        )
        self._next += 1
        self.role.handle(submit, self.now)
        return submit

    def cancel(self, submit: Submit) -> None:
        self.role.handle(Cancel(submit.request), self.now)

    def right(self, submit: Submit) -> bool:
        """It has ended, with the tokens that every worker must answer."""
        answer, reason = right_answer(submit.prompt, submit.sampling, submit.salt)
        return self.tokens.get(submit.request) == answer and self.ends[submit.request].reason == reason

    # ---- turns -----------------------------------------------------------------------------------------------------

    def turn(self) -> bool:
        """One turn of the step loop; True when a step was computed."""
        self.role.tick(self.now)
        plan = self.role.schedule(self.now)
        self._carry_out()
        if plan is not None:
            self.role.commit(plan, self.model.run(plan, self.role.scheduler.planned), self.now)
            self._carry_out()
        if self.taken:  # the role cannot know their owner
            self.ledger.check()
            self.role.slots.check()
        else:
            self.role.check()
        return plan is not None

    def run(self) -> None:
        """Turns until nothing happens by itself any more."""
        for _ in range(1000):
            before = (len(self.said), len(self.jobs))
            if not self.turn() and before == (len(self.said), len(self.jobs)):
                return
        raise AssertionError("it never comes to an end")

    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.run()

    def at_rest(self) -> bool:
        self.role.check()
        counts = self.role.load().ledger
        return self.role.at_rest and counts.blocks_free + counts.blocks_cached == counts.blocks_total

    def take(self, count: int) -> None:
        """The test holds so many blocks, as if others were using them."""
        blocks = self.ledger.take(count)
        assert blocks is not None
        self.taken += blocks

    def give_back(self) -> None:
        self.ledger.release(self.taken)
        self.taken = []

    def _carry_out(self) -> None:
        for action in self.role.drain():
            if isinstance(action, ToPeer):
                self.said.append(action)
            elif isinstance(action, StepOutput):
                for entry in action.tokens:
                    answer = self.tokens.setdefault(entry.request, [])
                    assert entry.first_index == len(answer)
                    answer += entry.ids
                for end in action.ends:
                    self._end(end)
            elif isinstance(action, RequestEnd):
                self._end(action)
            elif isinstance(action, PeerRefused):
                self.refused.append(action)
            else:
                self.jobs.append(action)
                if isinstance(action, CopyOut) and self.copies:
                    self.copy_out(action)

    def _end(self, end: RequestEnd) -> None:
        assert end.request not in self.ends, "a second end"
        self.ends[end.request] = end

    def copy_out(self, job: CopyOut) -> None:
        """As the mover does: copy, verify the copy, scatter, report. One rank, one head, one piece."""
        copy = np.empty(job.tokens, dtype=np.int64)
        found = copy_and_digest(
            self.slots[job.slot, : job.tokens].view(np.uint8),
            copy.view(np.uint8),
            piece_seed(job.seed, job.first_token, job.tokens, range(1), range(1)),
        )
        if [found] == job.digests:
            self.model.scatter(job.blocks, job.blocks_start, job.first_token, copy[None])
        self.role.report(Copied(job.handoff_id, job.lease_id, [found] == job.digests), self.now)

    def read(self, kind: type[Message]) -> list[Message]:
        """The control messages of this kind that were said since the last read of the kind."""
        found: list[Message] = [said.message for said in self.said if isinstance(said.message, kind)]
        self.said = [said for said in self.said if not isinstance(said.message, kind)]
        return found

    def read_jobs(self, kind: type[Message]) -> list[Message]:
        found: list[Message] = [job for job in self.jobs if isinstance(job, kind)]
        self.jobs = [job for job in self.jobs if not isinstance(job, kind)]
        return found

    # ---- the prefill worker's side -----------------------------------------------------------------------------------

    def peer_up(self, worker_id: str = "prefill", incarnation: str = "p1", epoch: int = 1, **kv: Any) -> None:
        """Hello, and both transports connected."""
        said = hello(worker_id, incarnation, epoch, **kv)
        self.role.handle(PeerUp(said), self.now)
        self.turn()
        assert self.read_jobs(Connect)[-1].hello == said
        self.role.report(Connected(incarnation), self.now)
        self.say(Linked(), incarnation, epoch)

    def peer_lost(self, incarnation: str = "p1", epoch: int = 1) -> None:
        self.role.handle(PeerLost(incarnation, epoch), self.now)

    def say(self, message: ControlMessage, peer: str = "p1", epoch: int = 1) -> None:
        self.role.handle(FromPeer(peer, epoch, message), self.now)

    def write(self, begin: Begin, lease: Lease, *, flip: bool = False) -> ChunkDone:
        """Writes the chunk into its slot, and returns what the writer would say; `flip`: with one bit wrong."""
        first, count = chunks(begin.start, len(begin.tokens), CHUNK)[lease.chunk]
        payload = np.array(kv_of(begin.tokens, begin.salt, [])[first : first + count], dtype=np.int64)
        seed = seeds(begin.tokens, begin.salt, begin.start, CHUNK)[lease.chunk]
        checksum = digest(payload.view(np.uint8), piece_seed(seed, first, count, range(1), range(1)))
        if flip:
            payload[count // 2] ^= 1 << 17
        self.slots[lease.slot, :count] = payload
        return ChunkDone(
            begin.handoff_id, lease.lease_id, lease.epoch, lease.chunk, count * KV_BYTES, [checksum]
        )

    def begun(self) -> tuple[Begin, list[Lease]]:
        """Turns once; the one hand-off that was begun, and its leases so far."""
        self.turn()
        (begin,) = self.read(Begin)
        return begin, self.credits(begin)

    def credits(self, begin: Begin) -> list[Lease]:
        """The leases offered to this hand-off since they were last read."""
        leases, rest = [], []
        for said in self.said:
            if isinstance(said.message, Credit) and said.message.handoff_id == begin.handoff_id:
                leases += said.message.leases
            else:
                rest.append(said)
        self.said = rest
        return leases

    def deliver(self, begin: Begin, leases: list[Lease], peer: str = "p1", epoch: int = 1) -> None:
        """All chunks well and in order, with the credits that come meanwhile."""
        while leases:
            for lease in leases:
                self.say(self.write(begin, lease), peer, epoch)
            self.turn()
            self.turn()
            leases = self.credits(begin)


def with_epoch(done: ChunkDone, epoch: int) -> ChunkDone:
    return msgspec.structs.replace(done, epoch=epoch)
