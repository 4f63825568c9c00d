"""One worker of the simulation: a real role, run by the same turn as `worker.loop` runs it, in virtual time.

Its ranks have a KV pool, landing slots and a mover each, whose reports the real `Join` puts together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from decode.role import DecodeRole
from engine.api import RequestEnd, StepOutput
from engine.ledger import BlockLedger, SlotLedger
from engine.plan import StepPlan
from engine.scheduler import Limits
from kvtransfer.handshake import CAPABILITIES
from kvtransfer.join import Join
from kvtransfer.messages import (
    ControlMessage,
    Hello,
    KvSpec,
    Lease,
    MoverJob,
    MoverReport,
)
from kvtransfer.plan import kv_heads, slot_bytes
from prefill.role import PrefillRole
from simulation.model import KV_BYTES, Kv, Model, WrongKv
from simulation.world import World
from worker.loop import HEARTBEAT_S, WAIT_S
from worker.messages import PeerRefused, ToEngine, ToPeer
from worker.role import Action

if TYPE_CHECKING:
    from simulation.network import Stream

SimRole = DecodeRole | PrefillRole


@dataclass(frozen=True, slots=True)
class NodeSpec:
    """How large and how quick a node is."""

    worker_id: str
    decode: bool
    blocks: int
    block_size: int
    chunk_tokens: int
    slots: int
    limits: Limits
    max_waiting: int
    handoff_timeout_s: float
    step_s: tuple[float, float]
    token_s: float
    heads: tuple[int, int] = (1, 1)  # query and kv heads of the model, the same at all nodes
    tensor_parallel: int = 1


class Watch(Protocol):
    """What is told of all that a node does; see `simulation.invariants`."""

    def turned(self, node: Node) -> None:
        """A turn of the node has ended."""

    def ticked(self, node: Node) -> None:
        """The node's role has just looked at its deadlines."""

    def said(self, node: Node, message: ToPeer) -> None:
        """The node's role said something to a peer."""

    def landed(self, node: Node, lease: Lease) -> None:
        """Bytes written under `lease` are about to land in the node's slot."""


class JobTaker(Protocol):
    def submit(self, job: MoverJob) -> None:
        """See `simulation.mover`."""


class Shell(Protocol):
    """What a node's actions go to."""

    def send(self, sender: Node, peer: str, epoch: int, message: ControlMessage) -> None:
        """A control message for a peer."""

    def output(self, node: Node, output: StepOutput | RequestEnd) -> None:
        """Tokens and ends for the router."""


MakeRole = Callable[[NodeSpec, Hello, BlockLedger], SimRole]


def make_role(spec: NodeSpec, hello: Hello, blocks: BlockLedger) -> SimRole:
    if not spec.decode:
        return PrefillRole(hello, blocks, spec.limits, max_waiting=spec.max_waiting)
    return DecodeRole(
        hello,
        blocks,
        SlotLedger(spec.slots),
        spec.limits,
        max_waiting=spec.max_waiting,
        handoff_timeout_s=spec.handoff_timeout_s,
    )


def kv_spec(spec: NodeSpec) -> KvSpec:
    return KvSpec(
        model="simulated",
        layers=1,
        q_heads=spec.heads[0],
        kv_heads=spec.heads[1],
        head_dim=1,
        dtype="float32",
        block_size=spec.block_size,
        chunk_tokens=spec.chunk_tokens,
        tensor_parallel=spec.tensor_parallel,
    )


class Node:
    """One incarnation of a worker. `movers`, one for each rank, are set by who builds it."""

    movers: Sequence[JobTaker]

    def __init__(
        self,
        world: World,
        spec: NodeSpec,
        incarnation: str,
        shell: Shell,
        watch: Watch,
        make: MakeRole,
        join: type[Join] = Join,
    ) -> None:
        self.world = world
        self.spec = spec
        self.incarnation = incarnation
        self.shell = shell
        self.watch = watch
        self.alive = True
        self.frozen_until = 0.0
        self.streams: dict[str, Stream] = {}  # by the peer's incarnation
        kv = kv_spec(spec)
        ranks = range(spec.tensor_parallel)
        self.model = Model(spec.blocks, spec.block_size, [kv_heads(kv, rank) for rank in ranks])
        sizes = [slot_bytes(kv, rank) for rank in ranks]
        # By rank: what landed in the slots.
        self.landing: list[Kv] = [np.zeros((spec.slots, size // KV_BYTES), dtype=np.int64) for size in sizes]
        self.hello = Hello(
            worker_id=spec.worker_id,
            incarnation=incarnation,
            kv=kv,
            transport="simulated",
            endpoints=[b""] * spec.tensor_parallel,
            capabilities=list(CAPABILITIES),
            slot_count=spec.slots,
            slot_bytes=sizes,
        )
        self.role = make(spec, self.hello, BlockLedger(spec.blocks, spec.block_size))
        self.join = join(
            spec.tensor_parallel,
            on_report=self._report,
            send_control=lambda peer, done: self.send(peer, done.epoch, done),
        )
        self._inbox: list[ToEngine] = []
        self._reports: list[MoverReport] = []
        self._computing = False
        self._wake = 0  # number of the latest planned turn; earlier ones are void
        self._sleep(0.0)

    # ---- what comes in -------------------------------------------------------------------------------------------

    def receive(self, event: ToEngine) -> None:
        self._inbox.append(event)
        self._wake_up()

    def _report(self, report: MoverReport) -> None:
        self._reports.append(report)
        self._wake_up()

    def send(self, peer: str, epoch: int, message: ControlMessage) -> None:
        self.shell.send(self, peer, epoch, message)

    # ---- the step loop -------------------------------------------------------------------------------------------

    def _wake_up(self) -> None:
        if not self._computing:
            self._sleep(0.0)

    def _sleep(self, seconds: float) -> None:
        self._wake += 1
        turn = self._wake
        self.world.after(seconds, lambda: self._turn() if turn == self._wake else None, self)

    def _turn(self) -> None:
        """One turn, as `StepLoop.turn`: news, deadlines, a plan; the step itself ends later."""
        role, now = self.role, self.world.now
        events, self._inbox = self._inbox, []
        reports, self._reports = self._reports, []
        for event in events:
            role.handle(event, now)
        for report in reports:
            role.report(report, now)
        role.tick(now)
        self.watch.ticked(self)
        plan = role.schedule(now)
        self._carry_out(role.drain())
        if plan is None:
            self.watch.turned(self)
            self._sleep(WAIT_S if role.has_work or not role.at_rest else HEARTBEAT_S)
            return
        self._computing = True
        seconds = self.world.between(*self.spec.step_s) + self.spec.token_s * plan.token_count
        self.world.after(seconds, lambda: self._computed(plan), self)

    def _computed(self, plan: StepPlan) -> None:
        self._computing = False
        try:
            result = self.model.run(plan, self.role.scheduler.planned)
        except WrongKv as error:
            self.world.violate(f"{self.incarnation}: {error}")
            return
        self.role.commit(plan, result, self.world.now)
        self._carry_out(self.role.drain())
        self.watch.turned(self)
        self._sleep(0.0)

    def _carry_out(self, actions: list[Action]) -> None:
        for action in actions:
            if isinstance(action, MoverJob):
                for mover in self.movers:
                    mover.submit(action)
            elif isinstance(action, ToPeer):
                self.watch.said(self, action)
                self.send(action.peer, action.epoch, action.message)
            elif isinstance(action, PeerRefused):
                self.world.facts["peers_refused"] += 1
            else:
                self.shell.output(self, action)
