"""What must hold at every moment of a run, and at its end. See the design, section 6."""

from __future__ import annotations

import math

from decode.role import DecodeRole
from engine.ledger import LedgerError
from kvtransfer.messages import Credit, Lease
from prefill.states import State
from simulation.node import Node
from simulation.world import World
from worker.messages import ToPeer


class Invariants:
    """Told of every turn, message and landing; reports violations to the world."""

    def __init__(self, world: World) -> None:
        self.world = world
        # By incarnation and slot: the lease under which it was offered last.
        self._lease_of: dict[tuple[str, int], int] = {}

    def turned(self, node: Node) -> None:
        """Books add up after every turn; `check` asks for more when the role is at rest."""
        try:
            node.role.check()
        except LedgerError as error:
            self.world.violate(f"{node.incarnation}: {error}")

    def ticked(self, node: Node) -> None:
        """Whatever waits for another process does so until a deadline, and no longer."""
        for owner in node.role.owners():
            if owner.kind != "hand-off":
                continue
            if owner.deadline <= self.world.now:
                late_s = self.world.now - owner.deadline
                self.world.violate(f"{node.incarnation}: {owner.name} waits {late_s:g} s past its deadline")
            elif owner.deadline == math.inf and owner.state != State.ENDING.value:
                self.world.violate(f"{node.incarnation}: {owner.name} waits without a deadline")

    def said(self, node: Node, message: ToPeer) -> None:
        if isinstance(message.message, Credit):
            for lease in message.message.leases:
                self._lease_of[node.incarnation, lease.slot] = lease.lease_id

    def landed(self, node: Node, lease: Lease) -> None:
        """No slot is offered again while bytes for it may still arrive."""
        latest = self._lease_of.get((node.incarnation, lease.slot))
        if latest != lease.lease_id:
            self.world.violate(
                f"{node.incarnation}: bytes of lease {lease.lease_id} landed in slot {lease.slot}, "
                f"which was leased again as {latest}"
            )

    def at_rest(self, nodes: list[Node]) -> list[str]:
        """What is not at rest yet in these living, reachable nodes; empty at the end of every good run."""
        unrest = []
        for node in nodes:
            role = node.role
            counts = role.load().ledger
            if not role.at_rest or role.has_work:
                unrest.append(f"{node.incarnation} has work left")
            elif counts.blocks_held or counts.blocks_landing:
                unrest.append(f"{node.incarnation} holds {counts.blocks_held + counts.blocks_landing} blocks")
            elif counts.slots_leased or counts.slots_quarantined:
                unrest.append(
                    f"{node.incarnation}: {counts.slots_leased} slots leased, "
                    f"{counts.slots_quarantined} quarantined"
                )
            elif isinstance(role, DecodeRole) and role.landing.leases.open_count:
                unrest.append(f"{node.incarnation}: {role.landing.leases.open_count} leases open")
        return unrest
