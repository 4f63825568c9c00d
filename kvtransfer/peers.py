"""The other workers as one rank's mover knows them: their plan, and which of their ranks it is connected to.

Only the mover's thread calls it. A worker's ranks are endpoints of their own, named incarnation/rank.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

from kvtransfer.messages import Hello, KvSpec
from kvtransfer.plan import Plan, PlanError, plan
from kvtransfer.sending import Sending
from kvtransfer.transport import TransportError
from kvtransfer.transports import Endpoint

log = logging.getLogger(__name__)

REMEMBERED = 1024  # what has landed may still be copied out after its sender was disconnected
_MEMORY_BYTES = 1 << 62  # offsets into what a peer says that it has must not overflow in the rows of a write


@dataclass(frozen=True, slots=True)
class Peer:
    """Another worker. `partners` are its ranks that this rank may write to, or be written by."""

    hello: Hello
    plan: Plan
    partners: tuple[int, ...]

    def name(self, rank: int) -> str:
        return f"{self.hello.incarnation}/{rank}"


class Peers:
    """By incarnation. `sending`: of a prefill rank, whose peers are decode workers; None: the other way round."""

    def __init__(self, endpoint: Endpoint, kv: KvSpec, rank: int, sending: Sending | None) -> None:
        self._endpoint = endpoint
        self._kv = kv
        self._rank = rank
        self._sending = sending
        self._peers: dict[str, Peer] = {}
        self._plans: dict[str, Plan] = {}  # of these, and of some that were disconnected

    def get(self, incarnation: str) -> Peer | None:
        return self._peers.get(incarnation)

    def plan_of(self, incarnation: str) -> Plan | None:
        """Also of one that was disconnected not long ago."""
        return self._plans.get(incarnation)

    def connect(self, hello: Hello) -> str:
        """Connects to the ranks that the plan pairs with this one. Returns what went wrong: then a worker that was
        connected before stays as it was."""
        try:
            peer = self._peer_of(hello)
            for rank in peer.partners:
                self._endpoint.connect(peer.name(rank), hello.endpoints[rank])
        except (TransportError, PlanError) as error:
            problem = str(error)
        except Exception as error:
            log.exception("connecting %s", hello.incarnation)
            problem = f"{type(error).__name__}: {error}"
        else:
            self._remember(peer)
            return ""
        if hello.incarnation not in self._peers:
            for rank in range(len(hello.endpoints)):
                self._endpoint.disconnect(f"{hello.incarnation}/{rank}")
        return problem

    def disconnect(self, incarnation: str) -> None:
        """Unknown ones are ignored."""
        peer = self._peers.pop(incarnation, None)
        if peer is not None:
            for rank in peer.partners:
                self._endpoint.disconnect(peer.name(rank))

    def gone(self, incarnation: str) -> bool:
        """Are all those ranks certainly gone? Also False for who is not connected: nothing is certain about it."""
        peer = self._peers.get(incarnation)
        if peer is None:
            return False
        # Every one is asked: some transports learn from being asked again.
        gone = [self._endpoint.gone(peer.name(rank)) for rank in peer.partners]
        return all(gone)

    def _peer_of(self, hello: Hello) -> Peer:
        """Raises PlanError."""
        ranks = hello.kv.tensor_parallel
        if len(hello.endpoints) != ranks:
            raise PlanError(f"{hello.worker_id} has {len(hello.endpoints)} endpoints for {ranks} ranks")
        if self._sending is None:
            made = plan(hello.kv, self._kv)
            return Peer(hello, made, made.sources(self._rank))
        made = plan(self._kv, hello.kv)
        self._sending.check(made)
        if len(hello.slot_bytes) != ranks:
            raise PlanError(f"{hello.worker_id} has slots of {len(hello.slot_bytes)} for {ranks} ranks")
        largest = max(hello.slot_bytes)
        if hello.slot_count * largest >= _MEMORY_BYTES:
            raise PlanError(
                f"{hello.worker_id} says that it has {hello.slot_count} slots of {largest} bytes: no machine has"
            )
        return Peer(hello, made, made.targets(self._rank))

    def _remember(self, peer: Peer) -> None:
        incarnation = peer.hello.incarnation
        self._peers[incarnation] = peer
        self._plans.pop(incarnation, None)
        self._plans[incarnation] = peer.plan
        while len(self._plans) > REMEMBERED + len(self._peers):
            del self._plans[next(name for name in self._plans if name not in self._peers)]
