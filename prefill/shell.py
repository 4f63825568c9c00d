"""The prefill worker's shell: `baton.v1.HandoffPeer`, where decode workers open their control streams."""

from __future__ import annotations

import grpc.aio

from baton.v1 import worker_pb2_grpc
from kvtransfer.links import HandoffService, LinkEvents
from kvtransfer.messages import ControlMessage
from worker.messages import FromPeer, PeerLost, PeerUp, ToPeer
from worker.shell import WorkerShell
from worker.spec import WorkerSpec


class PrefillShell(WorkerShell):
    rank_module = "prefill.rank"
    _handoffs: HandoffService

    def add_services(self, server: grpc.aio.Server) -> None:
        assert self.ready is not None
        events = LinkEvents(
            up=lambda hello: self.send(PeerUp(hello)),
            message=self._message,
            lost=lambda peer, epoch: self.send(PeerLost(peer, epoch)),
        )
        self._handoffs = HandoffService(self.ready.hello, events)
        worker_pb2_grpc.add_HandoffPeerServicer_to_server(self._handoffs, server)

    def to_peer(self, message: ToPeer) -> None:
        self._handoffs.links.send(message.peer, message.epoch, message.message)

    def _message(self, peer: str, epoch: int, message: ControlMessage) -> None:
        self.send(FromPeer(peer, epoch, message))


def open_shell(spec: WorkerSpec) -> PrefillShell:
    return PrefillShell(spec)
