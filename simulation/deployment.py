"""The nodes of a simulated cluster and what holds them together: membership, streams, fabric, router, invariants."""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import Protocol

from engine.api import RequestEnd, StepOutput
from kvtransfer.join import Join
from kvtransfer.messages import ControlMessage
from simulation.invariants import Invariants
from simulation.mover import Fabric, SimulatedMover
from simulation.network import Network
from simulation.node import MakeRole, Node, NodeSpec, make_role
from simulation.world import World

NEWS_S = (0.001, 0.1)  # until the membership has told a node of another


class Router(Protocol):
    def output(self, node: Node, output: StepOutput | RequestEnd) -> None:
        """Tokens and ends of its requests."""

    def died(self, node: Node) -> None:
        """A decode node is gone, and what it was doing with it."""


class Deployment:
    """Starts, kills and restarts nodes. A restarted worker keeps its name and gets a new incarnation."""

    router: Router

    def __init__(
        self,
        world: World,
        specs: list[NodeSpec],
        make: MakeRole = make_role,
        mover: type[SimulatedMover] = SimulatedMover,
        join: type[Join] = Join,
    ) -> None:
        self.world = world
        self.network = Network(world)
        self.fabric = Fabric(world, self.network.reachable)
        self.watch = Invariants(world)
        self._make = make
        self._mover = mover
        self._join = join
        self._lives: Counter[str] = Counter()
        self.nodes: list[Node] = []  # the latest incarnation of each worker
        for spec in specs:
            self._start(spec)

    # ---- for nodes -----------------------------------------------------------------------------------------------

    def send(self, sender: Node, peer: str, epoch: int, message: ControlMessage) -> None:
        self.network.send(sender, peer, epoch, message)

    def output(self, node: Node, output: StepOutput | RequestEnd) -> None:
        self.router.output(node, output)

    # ---- life and death --------------------------------------------------------------------------------------------

    def alive(self, *, decode: bool) -> list[Node]:
        return [node for node in self.nodes if node.alive and node.spec.decode is decode]

    def _start(self, spec: NodeSpec) -> None:
        self._lives[spec.worker_id] += 1
        incarnation = f"{spec.worker_id}.{self._lives[spec.worker_id]}"
        node = Node(self.world, spec, incarnation, self, self.watch, self._make, self._join)
        node.movers = [
            self._mover(self.world, self.fabric, node, rank) for rank in range(spec.tensor_parallel)
        ]
        self.fabric.nodes[incarnation] = node
        self.nodes = [other for other in self.nodes if other.spec.worker_id != spec.worker_id] + [node]
        for other in self.alive(decode=not spec.decode):
            decode, prefill = (node, other) if spec.decode else (other, node)
            self.world.after(self.world.between(*NEWS_S), partial(self.network.dial, decode, prefill), decode)

    def kill(self, node: Node, restart_s: float) -> None:
        """As SIGKILL: no word of farewell; bytes that it had posted may still land."""
        if not node.alive:
            return
        node.alive = False
        self.network.died(node)
        if node.spec.decode:
            self.router.died(node)
        self.world.after(restart_s, lambda: self._start(node.spec))
