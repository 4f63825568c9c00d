"""The control streams between decode and prefill workers, as both shells need them. asyncio and gRPC, no decisions.

A decode worker dials each prefill incarnation that the membership names, says hello, and keeps the stream; a break is
told to its engine, then it dials again under the next epoch. What an engine says for a stream that has broken since
is dropped: epochs fence it anyway.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc.aio
import msgspec

from baton import rpc
from baton.v1 import worker_pb2 as pb
from baton.v1 import worker_pb2_grpc
from kvtransfer.messages import ControlMessage, Hello
from kvtransfer.wire import WireError, from_proto, to_proto

log = logging.getLogger("baton.links")

DIAL_TIMEOUT_S = 5.0
BACKOFF_S = (0.05, 1.0)


class LinkEvents:
    """What a shell does with a link's news; `epoch` names the stream."""

    def __init__(
        self,
        up: Callable[[Hello], None],
        message: Callable[[str, int, ControlMessage], None],
        lost: Callable[[str, int], None],
    ) -> None:
        self.up = up
        self.message = message
        self.lost = lost


class OpenLink:
    """The writing half of one control stream."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch
        self.queue: asyncio.Queue[pb.Control] = asyncio.Queue()

    def send(self, message: ControlMessage) -> None:
        self.queue.put_nowait(to_proto(message))

    async def write_to(self, stream: Any) -> None:
        """Writes what is sent, in order, until cancelled or the stream breaks."""
        while True:
            await stream.write(await self.queue.get())


class Links:
    """The open links of one worker, by the peer's incarnation."""

    def __init__(self) -> None:
        self._links: dict[str, OpenLink] = {}

    def open(self, peer: str, link: OpenLink) -> None:
        self._links[peer] = link

    def close(self, peer: str, link: OpenLink) -> None:
        if self._links.get(peer) is link:
            del self._links[peer]

    def send(self, peer: str, epoch: int, message: ControlMessage) -> None:
        link = self._links.get(peer)
        if link is not None and link.epoch == epoch:
            link.send(message)


class Dialer:
    """The decode side: one task for each prefill incarnation."""

    def __init__(self, token: str, hello: Hello, events: LinkEvents) -> None:
        self.links = Links()
        self._token = token
        self._hello = hello
        self._events = events
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def set_peers(self, peers: dict[str, str]) -> None:
        """The prefill incarnations that exist now, with their addresses. Others are hung up on."""
        for incarnation in list(self._tasks):
            if incarnation not in peers:
                self._tasks.pop(incarnation).cancel()
        for incarnation, address in peers.items():
            if incarnation not in self._tasks:
                self._tasks[incarnation] = asyncio.create_task(self._keep(incarnation, address))

    async def close(self) -> None:
        tasks = list(self._tasks.values())
        self.set_peers({})
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _keep(self, incarnation: str, address: str) -> None:
        epoch = 0
        backoff = BACKOFF_S[0]
        while True:
            epoch += 1
            try:
                said_hello = await self._talk(incarnation, address, epoch)
            except (grpc.aio.AioRpcError, WireError, TimeoutError) as error:
                said_hello = False
                log.info("control stream to %s at %s: %s", incarnation, address, _brief(error))
            backoff = BACKOFF_S[0] if said_hello else min(2 * backoff, BACKOFF_S[1])
            await asyncio.sleep(backoff)

    async def _talk(self, incarnation: str, address: str, epoch: int) -> bool:
        """One stream from hello to break; True when it got past hello."""
        link = OpenLink(epoch)
        link.send(msgspec.structs.replace(self._hello, epoch=epoch))
        up = False
        async with rpc.channel(address) as channel:
            stub = worker_pb2_grpc.HandoffPeerStub(channel)
            call = stub.Link(metadata=rpc.credentials(self._token))
            writer = asyncio.create_task(link.write_to(call))
            try:
                hello = await asyncio.wait_for(_read(call), DIAL_TIMEOUT_S)
                if not isinstance(hello, Hello) or hello.incarnation != incarnation:
                    raise WireError(f"expected the hello of {incarnation}, got {hello}")
                self.links.open(incarnation, link)
                up = True
                self._events.up(msgspec.structs.replace(hello, epoch=epoch))
                while (message := await _read(call)) is not None:
                    self._events.message(incarnation, epoch, message)
            except grpc.aio.AioRpcError as error:
                if not up:
                    raise
                log.info("control stream to %s broke: %s", incarnation, _brief(error))
            finally:
                call.cancel()
                await _ended(writer)
                self.links.close(incarnation, link)
                if up:
                    self._events.lost(incarnation, epoch)
        return up


class HandoffService:
    """The prefill side: `baton.v1.HandoffPeer`."""

    def __init__(self, hello: Hello, events: LinkEvents) -> None:
        self.links = Links()
        self._hello = hello
        self._events = events

    async def Link(self, requests: AsyncIterator[pb.Control], context: Any) -> None:
        first = await anext(aiter(requests), None)
        hello = from_proto(first) if first is not None else None
        if not isinstance(hello, Hello):
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "a control stream begins with a hello")
            return
        link = OpenLink(hello.epoch)
        link.send(msgspec.structs.replace(self._hello, epoch=hello.epoch))
        self.links.open(hello.incarnation, link)
        self._events.up(hello)
        writer = asyncio.create_task(link.write_to(context))
        try:
            async for control in requests:
                self._events.message(hello.incarnation, hello.epoch, from_proto(control))
        finally:
            await _ended(writer)
            self.links.close(hello.incarnation, link)
            self._events.lost(hello.incarnation, hello.epoch)


async def _read(call: Any) -> ControlMessage | None:
    control = await call.read()
    return None if control is grpc.aio.EOF else from_proto(control)


async def _ended(writer: asyncio.Task[None]) -> None:
    """Ends a writer; why it could not write is known from reading."""
    writer.cancel()
    await asyncio.gather(writer, return_exceptions=True)


def _brief(error: BaseException) -> str:
    if isinstance(error, grpc.aio.AioRpcError):
        return f"{error.code().name} {error.details()}"
    return f"{type(error).__name__} {error}"
