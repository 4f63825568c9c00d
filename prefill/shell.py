"""The prefill worker's shell: `baton.v1.HandoffPeer`, where decode workers open their control streams."""

from __future__ import annotations

import logging
import socket

import grpc.aio

from baton.v1 import worker_pb2_grpc
from kvtransfer.links import HandoffService, LinkEvents
from kvtransfer.messages import Begin, ControlMessage, Done, Failed, Quiet
from worker.messages import FromPeer, PeerLost, PeerUp, ToPeer
from worker.shell import WorkerShell
from worker.spec import WorkerSpec

log = logging.getLogger("baton.shell")


class PrefillShell(WorkerShell):
    rank_module = "prefill.rank"
    _handoffs: HandoffService

    def __init__(self, spec: WorkerSpec, listener: socket.socket | None = None) -> None:
        super().__init__(spec, listener)
        self._request_ids: dict[tuple[str, int, int], str] = {}  # by peer, epoch and hand-off, for the log

    def add_services(self, server: grpc.aio.Server) -> None:
        assert self.ready is not None
        events = LinkEvents(
            up=lambda hello: self.send(PeerUp(hello)),
            message=self._message,
            lost=self._lost,
        )
        self._handoffs = HandoffService(self.ready.hello, events)
        worker_pb2_grpc.add_HandoffPeerServicer_to_server(self._handoffs, server)

    def to_peer(self, message: ToPeer) -> None:
        said = message.message
        if isinstance(said, Failed):
            request_id = self._request_ids.get((message.peer, message.epoch, said.handoff_id), "")
            log.warning("request %s: its hand-off failed: %s", request_id, said.reason)
        elif isinstance(said, Done | Quiet):  # each is the last that is said of a hand-off
            self._request_ids.pop((message.peer, message.epoch, said.handoff_id), None)
        self._handoffs.links.send(message.peer, message.epoch, message.message)

    def _message(self, peer: str, epoch: int, message: ControlMessage) -> None:
        if isinstance(message, Begin):
            self._request_ids[peer, epoch, message.handoff_id] = message.request_id
        self.send(FromPeer(peer, epoch, message))

    def _lost(self, peer: str, epoch: int) -> None:
        for key in [key for key in self._request_ids if key[:2] == (peer, epoch)]:
            del self._request_ids[key]
        self.send(PeerLost(peer, epoch))


def open_shell(spec: WorkerSpec, listener: socket.socket | None = None) -> PrefillShell:
    return PrefillShell(spec, listener)
