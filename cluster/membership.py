"""Who is in the cluster now, and telling it to routers and decode workers: the whole list, on each change and again
every two seconds, so that a lost message or a restarted receiver mends itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging

import grpc
import grpc.aio

from baton import rpc
from baton.v1 import worker_pb2, worker_pb2_grpc
from worker.spec import Started

_REPEAT_S = 2.0
_CALL_S = 2.0
_RETRY_S = 0.2

log = logging.getLogger(__name__)


class Membership:
    """The list and its version. Only the supervisor changes it."""

    def __init__(self) -> None:
        self._members: dict[str, Started] = {}
        self._restarts: dict[str, int] = {}
        self._version = 1
        self._changed = asyncio.Event()

    @property
    def version(self) -> int:
        return self._version

    def join(self, started: Started, restarts: int = 0) -> None:
        """`restarts`: how often this worker was started again so far."""
        self._members[started.worker_id] = started
        self._restarts[started.worker_id] = restarts
        self._bump()

    def leave(self, started: Started) -> None:
        """Removes this life of the worker; a newer one of the same name stays."""
        current = self._members.get(started.worker_id)
        if current is not None and current.incarnation == started.incarnation:
            del self._members[started.worker_id]
            self._bump()

    def role(self, role: str) -> list[Started]:
        return [member for member in self._members.values() if member.role == role]

    def message(self) -> worker_pb2.Members:
        members = [
            worker_pb2.Member(
                worker_id=member.worker_id,
                role=member.role,
                incarnation=member.incarnation,
                address=member.address,
                restarts=self._restarts[member.worker_id],
            )
            for member in self._members.values()
        ]
        return worker_pb2.Members(version=self._version, members=members)

    async def changed_since(self, version: int, timeout_s: float) -> None:
        """Returns when the list is newer than `version`, or after `timeout_s`."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while self._version <= version:
                    await self._changed.wait()

    def _bump(self) -> None:
        self._version += 1
        self._changed.set()
        # Wakes all who wait now; who comes later compares versions first.
        self._changed = asyncio.Event()


async def push_members(address: str, token: str, membership: Membership) -> None:
    """Keeps one receiver informed until cancelled. A receiver that cannot be reached is tried again soon."""
    async with rpc.channel(address) as channel:
        stub = worker_pb2_grpc.MembershipStub(channel)
        while True:
            message = membership.message()
            try:
                await stub.SetMembers(message, timeout=_CALL_S, metadata=rpc.credentials(token))
                pause_s = _REPEAT_S
            except grpc.aio.AioRpcError as error:
                log.debug("members not delivered to %s: %s", address, error.code())
                pause_s = _RETRY_S
            await membership.changed_since(message.version, pause_s)
