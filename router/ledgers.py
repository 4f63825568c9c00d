"""`baton.v1.Ledgers`: asks every worker who holds its blocks and landing slots, and puts the answers together.

Operators call it through the router's gRPC door; no request waits for it. It remembers nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Any

import grpc
import grpc.aio

from baton import rpc
from baton.v1 import inference_pb2 as api
from baton.v1 import inference_pb2_grpc, worker_pb2_grpc

LEDGERS_SERVICE = "baton.v1.Ledgers"
ASK_S = 12.0  # longer than a worker waits for its engine


class Ledgers(inference_pb2_grpc.LedgersServicer):
    """`workers()`: the state of every worker that the router knows."""

    def __init__(self, workers: Callable[[], Iterable[api.WorkerStatus]], token: str) -> None:
        self._workers = workers
        self._token = token

    async def Read(self, request: api.LedgerRequest, context: Any) -> api.LedgerResponse:
        """All are asked at once. A worker that does not answer is told of with the reason."""
        asked = sorted(self._workers(), key=lambda worker: worker.worker_id)
        return api.LedgerResponse(
            workers=await asyncio.gather(*(self._ask(worker, request) for worker in asked))
        )

    async def _ask(self, worker: api.WorkerStatus, request: api.LedgerRequest) -> api.WorkerLedger:
        try:
            async with rpc.channel(worker.address) as channel:
                answer: api.WorkerLedger = await worker_pb2_grpc.WorkerStub(channel).ReadLedger(
                    request, timeout=ASK_S, metadata=rpc.credentials(self._token)
                )
                return answer
        except grpc.aio.AioRpcError as error:
            return api.WorkerLedger(
                worker_id=worker.worker_id,
                role=worker.role,
                incarnation=worker.incarnation,
                unreachable=f"{error.code().name}: {error.details()}",
            )
