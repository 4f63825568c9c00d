"""A whole deployment as a user starts it: `baton serve` in a process of its own, and what it says of itself."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc.aio

from baton.v1 import inference_pb2 as api
from baton.v1 import inference_pb2_grpc
from cluster.config import CHECKOUT
from tests.cluster.helpers import carrying, clear_away

MARK = "BATON_TEST_RUN"
TINY = CHECKOUT / "models" / "baton-tiny"
WAIT_S = 60.0


class Deployment:
    """`baton serve` with settings given as section.key = value; ports are free ones unless set."""

    def __init__(
        self, folder: Path, settings: dict[str, Any], environment: dict[str, str] | None = None
    ) -> None:
        self.mark = uuid.uuid4().hex
        self.errors = folder / "stderr.txt"
        self.http = self.grpc = ""
        every = {"model.path": TINY, "router.http": "127.0.0.1:0", "router.grpc": "127.0.0.1:0", **settings}
        arguments = [part for key, value in every.items() for part in ("--set", f"{key}={value}")]
        with self.errors.open("wb") as sink:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "cluster.cli", "serve", *arguments],
                stdout=subprocess.PIPE,
                stderr=sink,
                env={**os.environ, **(environment or {}), MARK: self.mark},
                cwd=CHECKOUT,
            )

    async def wait_ready(self) -> None:
        assert self.process.stdout is not None
        line = (await asyncio.to_thread(self.process.stdout.readline)).decode()
        ready = re.fullmatch(r"baton ready http=(127\.0\.0\.1:\d+) grpc=(127\.0\.0\.1:\d+)\n", line)
        assert ready, self.errors.read_text()
        self.http, self.grpc = ready.groups()
        self._channel = grpc.aio.insecure_channel(self.grpc)
        self.stub = inference_pb2_grpc.InferenceStub(self._channel)

    async def workers(self) -> dict[str, api.WorkerStatus]:
        status = await self.stub.Status(api.StatusRequest(), timeout=10)
        return {worker.worker_id: worker for worker in status.workers}

    async def until(
        self, predicate: Callable[[dict[str, api.WorkerStatus]], bool]
    ) -> dict[str, api.WorkerStatus]:
        """Asks for the workers' state until the predicate holds."""
        async with asyncio.timeout(WAIT_S):
            while not predicate(workers := await self.workers()):
                await asyncio.sleep(0.05)
        return workers

    async def at_rest(self) -> dict[str, api.WorkerStatus]:
        """Waits until, on every worker, each block is free or cached and each slot free."""

        def resting(workers: dict[str, api.WorkerStatus]) -> bool:
            return all(
                worker.alive
                and not worker.running
                and not worker.waiting
                and not worker.handoffs
                and worker.ledger.blocks_free + worker.ledger.blocks_cached == worker.ledger.blocks_total
                and worker.ledger.slots_free == worker.ledger.slots_total
                for worker in workers.values()
            )

        return await self.until(resting)

    async def kill(self, worker_id: str) -> api.WorkerStatus:
        """kill -9 of the worker's process; returns what it was."""
        worker = (await self.workers())[worker_id]
        os.kill(worker.pid, signal.SIGKILL)
        return worker

    async def generate(
        self, prompt: list[int] | str, tokens: int, **sampling: Any
    ) -> tuple[list[int], api.Finished]:
        """Over gRPC; greedy and to the full length unless said otherwise."""
        request = api.GenerateRequest(
            sampling=api.SamplingParams(
                **{"temperature": 0.0, "max_tokens": tokens, "ignore_eos": True, **sampling}
            )
        )
        if isinstance(prompt, str):
            request.text = prompt
        else:
            request.token_ids.ids.extend(prompt)
        ids: list[int] = []
        async for event in self.stub.Generate(request, timeout=WAIT_S):
            if event.HasField("finished"):
                return ids, event.finished
            assert event.tokens.first_index == len(ids)
            ids += event.tokens.ids
        raise AssertionError("the stream ended without a terminal event")

    def left(self) -> list[int]:
        """Processes of this deployment that still run."""
        return carrying(MARK, self.mark)

    async def close(self) -> None:
        if self.grpc:
            await self._channel.close()
        await asyncio.to_thread(clear_away, self.process, MARK, self.mark)


@asynccontextmanager
async def deployed(folder: Path, **settings: Any) -> AsyncIterator[Deployment]:
    """A ready deployment; `a__b=c` sets a.b. Whatever happens, none of its processes outlives the test."""
    deployment = Deployment(folder, {key.replace("__", "."): value for key, value in settings.items()})
    try:
        await deployment.wait_ready()
        yield deployment
    finally:
        await deployment.close()
