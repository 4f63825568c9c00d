"""The decode worker's shell: learns from the membership which prefill workers there are and keeps a stream to each."""

from __future__ import annotations

import socket
from typing import Any

import grpc.aio

from baton.v1 import worker_pb2 as pb
from baton.v1 import worker_pb2_grpc
from kvtransfer.links import Dialer, LinkEvents
from kvtransfer.messages import ControlMessage
from worker.messages import FromPeer, PeerLost, PeerUp, ToPeer
from worker.shell import WorkerShell
from worker.spec import WorkerSpec


class DecodeShell(WorkerShell):
    rank_module = "decode.rank"
    _dialer: Dialer
    _members_version = 0

    def add_services(self, server: grpc.aio.Server) -> None:
        assert self.ready is not None
        events = LinkEvents(
            up=lambda hello: self.send(PeerUp(hello)),
            message=self._message,
            lost=lambda peer, epoch: self.send(PeerLost(peer, epoch)),
        )
        self._dialer = Dialer(self.spec.token, self.ready.hello, events)
        worker_pb2_grpc.add_MembershipServicer_to_server(self, server)

    async def close_links(self) -> None:
        if self.ready is not None:
            await self._dialer.close()

    def to_peer(self, message: ToPeer) -> None:
        self._dialer.links.send(message.peer, message.epoch, message.message)

    async def SetMembers(self, members: pb.Members, context: Any) -> pb.MembersAck:
        """`baton.v1.Membership`: an older version than the last is ignored."""
        if members.version >= self._members_version:
            self._members_version = members.version
            prefill = {m.incarnation: m.address for m in members.members if m.role == "prefill"}
            self._dialer.set_peers(prefill)
        return pb.MembersAck(version=self._members_version)

    def _message(self, peer: str, epoch: int, message: ControlMessage) -> None:
        self.send(FromPeer(peer, epoch, message))


def open_shell(spec: WorkerSpec, listener: socket.socket | None = None) -> DecodeShell:
    return DecodeShell(spec, listener)
