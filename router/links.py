"""The router's streams to workers: one long-lived session each, tokens of all requests in one message per step.

A link dials its worker as long as the membership names it. It is up while the stream is open and the worker's engine
shows life; a silent engine is as lost as a dead one. Decides nothing.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Any

import grpc.aio

from baton import rpc
from baton.v1 import inference_pb2 as api
from baton.v1 import worker_pb2 as pb
from baton.v1 import worker_pb2_grpc

log = logging.getLogger("baton.router")

# A worker speaks every 200 ms between steps; a step of a long prompt chunk on a slow CPU takes seconds.
SILENCE_S = 15.0
BACKOFF_S = (0.05, 1.0)
RESYNC_S = 2.0  # for the next piece of a snapshot; then it is asked for again


class WorkerLink:
    """One incarnation of one worker."""

    def __init__(
        self,
        member: pb.Member,
        token: str,
        on_message: Callable[[WorkerLink, pb.FromWorker], None],
        on_down: Callable[[WorkerLink, str], None],
    ) -> None:
        self.member = member
        self.status = api.WorkerStatus(
            worker_id=member.worker_id,
            role=member.role,
            incarnation=member.incarnation,
            address=member.address,
            alive=False,
        )
        self.costs = api.WorkerCosts()  # the latest that it told
        self.up = False
        self.kv_heard = 0.0  # when a snapshot of its prefix cache was asked for, or a piece of it came
        self._token = token
        self._on_message = on_message
        self._on_down = on_down
        self._outbox: asyncio.Queue[pb.ToWorker] = asyncio.Queue()
        self._task = asyncio.create_task(self._keep())

    def whole_status(self) -> api.WorkerStatus:
        """The latest, with the costs that were told with an earlier one."""
        whole = api.WorkerStatus()
        whole.CopyFrom(self.status)
        if self.costs.seen:
            whole.costs.CopyFrom(self.costs)
        return whole

    def send(self, message: pb.ToWorker) -> None:
        """Queues a message for the open stream; without one it is dropped (its requests have been told so)."""
        if self.up:
            self._outbox.put_nowait(message)

    def resubscribe(self, now: float) -> None:
        """Asks for the content of the worker's prefix cache again, unless it was asked for a moment ago."""
        if self.up and now >= self.kv_heard + RESYNC_S:
            self._outbox.put_nowait(self._subscription())

    def _subscription(self) -> pb.ToWorker:
        self.kv_heard = time.monotonic()
        return pb.ToWorker(kv_subscribe=pb.KvSubscribe())

    def retire(self) -> asyncio.Task[None]:
        """The worker left the cluster: down from this moment. Returns the task that is ending."""
        self._set_down("it left the cluster")
        self._task.cancel()
        return self._task

    async def close(self) -> None:
        await asyncio.gather(self.retire(), return_exceptions=True)

    async def _keep(self) -> None:
        backoff = BACKOFF_S[0]
        while True:
            reason = ""
            try:
                reason = await self._talk()
            except grpc.aio.AioRpcError as error:
                reason = f"{error.code().name}: {error.details()}"
            finally:
                was_up = self._set_down(reason)
            backoff = BACKOFF_S[0] if was_up else min(2 * backoff, BACKOFF_S[1])
            await asyncio.sleep(backoff)

    def _set_down(self, reason: str) -> bool:
        was_up, self.up, self.status.alive = self.up, False, False
        if was_up:
            log.warning("%s is lost: %s", self.member.worker_id, reason)
            self._on_down(self, reason)
        return was_up

    async def _talk(self) -> str:
        self._outbox = asyncio.Queue()
        self._outbox.put_nowait(self._subscription())
        async with rpc.channel(self.member.address) as channel:
            stub = worker_pb2_grpc.WorkerStub(channel)
            call = stub.Session(metadata=rpc.credentials(self._token))
            writer = asyncio.create_task(_write(self._outbox, call))
            try:
                while True:
                    message = await self._next(call)
                    if message is None:
                        return "the worker closed the stream"
                    if message.HasField("status"):
                        if (
                            message.status.engine_silent_s > SILENCE_S
                        ):  # said on opening the stream, by the shell
                            return f"its engine is silent since {message.status.engine_silent_s:.0f} s"
                        self.status.CopyFrom(message.status)
                        if message.status.HasField("costs"):  # told when they change
                            self.costs.CopyFrom(message.status.costs)
                    self.up = True
                    self._on_message(self, message)
            except TimeoutError:
                return f"its engine was silent for {SILENCE_S:g} s"
            finally:
                call.cancel()
                writer.cancel()
                await asyncio.gather(writer, return_exceptions=True)  # why it ended is known from reading

    async def _next(self, call: Any) -> pb.FromWorker | None:
        async with asyncio.timeout(SILENCE_S):
            message = await call.read()
        return None if message is grpc.aio.EOF else message


async def _write(outbox: asyncio.Queue[pb.ToWorker], call: Any) -> None:
    while True:
        await call.write(await outbox.get())
