"""A prefill worker that breaks the rules on purpose: real gRPC and a real transport, but a test says what it does.

It shows that a decode worker believes nothing that it cannot verify.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import msgspec
import numpy as np

from baton import rpc
from baton.v1 import worker_pb2 as pb
from baton.v1 import worker_pb2_grpc
from kvtransfer.handshake import CAPABILITIES
from kvtransfer.links import HandoffService, LinkEvents
from kvtransfer.messages import Abort, Begin, ChunkDone, ControlMessage, Credit, Hello, KvSpec, Lease, Linked
from kvtransfer.transports import Endpoint, open_transport
from tests.support.workers import TOKEN, DecodeClient, Worker

Misbehave = Callable[["Rogue", Begin, Lease], None]


@dataclass
class Rogue:
    """For each lease that it is granted it calls `act(rogue, begin, lease)`."""

    kv: KvSpec
    act: Misbehave
    incarnation: str = field(default_factory=lambda: str(uuid.uuid4()))
    worker_id: str = "prefill-0"
    aborts: list[Abort] = field(default_factory=list)
    leases: list[Lease] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.slot_bytes = self.kv.chunk_tokens * self.kv.token_bytes
        self.endpoint: Endpoint = open_transport("nixl", self.slot_bytes, 0, self.incarnation)
        self._begins: dict[int, Begin] = {}
        self.peer: Hello | None = None
        hello = Hello(
            worker_id=self.worker_id,
            incarnation=self.incarnation,
            kv=self.kv,
            transport=self.endpoint.name,
            endpoints=[self.endpoint.describe()],
            capabilities=list(CAPABILITIES),
        )
        events = LinkEvents(up=self._up, message=self._message, lost=lambda peer, epoch: None)
        self.service = HandoffService(hello, events)

    def say(self, message: ControlMessage) -> None:
        assert self.peer is not None
        self.service.links.send(self.peer.incarnation, self.peer.epoch, message)

    def write(self, lease: Lease, data: bytes) -> None:
        """Writes into the lease's slot and waits until that has settled."""
        assert self.peer is not None
        self.endpoint.staging[: len(data)] = np.frombuffer(data, dtype=np.uint8)
        rows = np.array([[0, lease.slot * self.slot_bytes, len(data)]], dtype=np.uint64)
        self.endpoint.write(self.peer.incarnation, rows)
        while not self.endpoint.poll():
            pass

    def done(self, begin: Begin, lease: Lease, size: int, digest: bytes, **changes: int) -> None:
        done = ChunkDone(begin.handoff_id, lease.lease_id, lease.epoch, lease.chunk, size, [digest])
        self.say(msgspec.structs.replace(done, **changes))

    def chunk_bytes(self, begin: Begin, lease: Lease) -> int:
        first = begin.start + lease.chunk * self.kv.chunk_tokens
        return min(self.kv.chunk_tokens, len(begin.tokens) - first) * self.kv.token_bytes

    def _up(self, hello: Hello) -> None:
        self.peer = hello
        self.endpoint.connect(hello.incarnation, hello.endpoints[0])
        self.say(Linked())

    def _message(self, peer: str, epoch: int, message: ControlMessage) -> None:
        if isinstance(message, Begin):
            self._begins[message.handoff_id] = message
        elif isinstance(message, Credit):
            for lease in message.leases:
                self.leases.append(lease)
                self.act(self, self._begins[message.handoff_id], lease)
        elif isinstance(message, Abort):
            self.aborts.append(message)


@asynccontextmanager
async def rogue_for(decode: Worker, client: DecodeClient, kv: KvSpec, act: Misbehave) -> AsyncIterator[Rogue]:
    """Opens a rogue and makes it the decode worker's only prefill worker."""
    rogue = Rogue(kv, act)
    server = rpc.server(TOKEN)
    worker_pb2_grpc.add_HandoffPeerServicer_to_server(rogue.service, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    member = pb.Member(
        worker_id=rogue.worker_id, role="prefill", incarnation=rogue.incarnation, address=f"127.0.0.1:{port}"
    )
    async with rpc.channel(decode.started.address) as channel:
        stub = worker_pb2_grpc.MembershipStub(channel)
        await stub.SetMembers(
            pb.Members(version=1, members=[member]), metadata=rpc.credentials(TOKEN), timeout=10
        )
    try:
        await client.until(lambda status: rogue.incarnation in status.peers)
        yield rogue
    finally:
        await server.stop(None)
        rogue.endpoint.close()
        await asyncio.sleep(0)
