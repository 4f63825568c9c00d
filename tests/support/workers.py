"""Real workers as plain processes, of one rank or several, and a client that speaks to a decode worker as a router
does."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec

from baton import rpc
from baton.v1 import inference_pb2 as api
from baton.v1 import worker_pb2 as pb
from baton.v1 import worker_pb2_grpc
from worker.spec import Role, Started, WorkerSpec

TOKEN = "a cluster token for tests"
START_TIMEOUT_S = 120.0
WAIT_TIMEOUT_S = 30.0


@dataclass
class Worker:
    """One worker process tree: rank 0 with its shell, and a process for each further rank."""

    spec: WorkerSpec
    started: Started
    process: asyncio.subprocess.Process
    followers: list[asyncio.subprocess.Process] = field(default_factory=list)  # ranks 1 and on

    def rank_pid(self, rank: int) -> int:
        """The process in which this rank computes."""
        return self.followers[rank - 1].pid if rank else self.started.engine_pid

    def kill(self, *, engine_only: bool = False) -> None:
        """kill -9 of the shell (its engine follows by itself), or of the engine alone."""
        os.kill(self.started.engine_pid if engine_only else self.started.pid, signal.SIGKILL)

    async def ended(self) -> None:
        """Waits until all of its processes have ended by themselves."""
        for process in (self.process, *self.followers):
            await asyncio.wait_for(process.wait(), WAIT_TIMEOUT_S)

    async def stop(self) -> None:
        """Closes its standard input, as a parent that ends does, and waits. The other ranks hear it from rank 0."""
        if self.process.stdin is not None:
            self.process.stdin.close()
        await self.ended()


async def start_worker(role: Role, model: Path, **changes: Any) -> Worker:
    """Starts `python -m prefill|decode`, and the further ranks of `tensor_parallel`; waits until it is ready."""
    spec = WorkerSpec(
        role=role,
        worker_id=changes.pop("worker_id", f"{role}-0"),
        incarnation=str(uuid.uuid4()),
        token=TOKEN,
        model_path=str(model),
        kv_cache_bytes=changes.pop("kv_cache_bytes", 32 << 20),
        **changes,
    )
    process, *followers = await asyncio.gather(
        *(_start_rank(msgspec.structs.replace(spec, rank=rank)) for rank in range(spec.tensor_parallel))
    )
    assert process.stdout is not None
    line = await asyncio.wait_for(process.stdout.readline(), START_TIMEOUT_S)
    assert line, f"{role} ended before it was ready"
    return Worker(spec, msgspec.json.decode(line, type=Started), process, list(followers))


async def _start_rank(spec: WorkerSpec) -> asyncio.subprocess.Process:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "worker.follower" if spec.rank else spec.role,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdin is not None
    process.stdin.write(msgspec.json.encode(spec) + b"\n")
    await process.stdin.drain()
    return process


async def set_members(address: str, version: int, workers: list[Worker]) -> None:
    """What the supervisor does."""
    members = [
        pb.Member(
            worker_id=w.spec.worker_id,
            role=w.spec.role,
            incarnation=w.spec.incarnation,
            address=w.started.address,
        )
        for w in workers
    ]
    async with rpc.channel(address) as channel:
        await worker_pb2_grpc.MembershipStub(channel).SetMembers(
            pb.Members(version=version, members=members), metadata=rpc.credentials(TOKEN), timeout=10
        )


async def introduced(decode: Worker, client: DecodeClient, prefills: list[Worker], version: int = 1) -> None:
    """Makes these the decode worker's only prefill workers, and waits until they can hand off to it."""
    await set_members(decode.started.address, version, [*prefills, decode])
    wanted = {worker.spec.incarnation for worker in prefills}
    await client.until(lambda status: set(status.peers) >= wanted)


@dataclass
class Answer:
    """What came of one request."""

    choices: list[list[int]] = field(default_factory=lambda: [[]])
    logprobs: list[float] = field(default_factory=list)  # of the tokens of the first choice, where asked for
    reasons: dict[int, str] = field(default_factory=dict)  # of the choices that have ended
    end: pb.RequestEnd | None = None

    @property
    def ids(self) -> list[int]:
        """Of the first choice."""
        return self.choices[0]

    @property
    def trace(self) -> api.Trace:
        assert self.end is not None
        return self.end.trace


class DecodeClient:
    """One session with a decode worker."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self._channel = rpc.channel(worker.started.address)
        self.stub = worker_pb2_grpc.WorkerStub(self._channel)
        self._call = self.stub.Session(metadata=rpc.credentials(TOKEN))
        self._answers: dict[int, Answer] = {}
        self._ended: dict[int, asyncio.Future[Answer]] = {}
        self._changed = asyncio.Event()
        self._next = 1
        self._writing = asyncio.Lock()  # grpc.aio takes one write at a time
        self._reader = asyncio.create_task(self._read())

    async def __aenter__(self) -> DecodeClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        self._reader.cancel()
        await asyncio.gather(self._reader, return_exceptions=True)
        self._call.cancel()
        await self._channel.close()

    async def describe(self) -> api.WorkerStatus:
        status: api.WorkerStatus = await self.stub.Describe(
            pb.DescribeRequest(), metadata=rpc.credentials(TOKEN), timeout=10
        )
        return status

    async def ledger(self) -> api.WorkerLedger:
        """Who holds what in it."""
        found: api.WorkerLedger = await self.stub.ReadLedger(
            api.LedgerRequest(), metadata=rpc.credentials(TOKEN), timeout=10
        )
        return found

    async def until(self, predicate: Any, *, timeout_s: float = WAIT_TIMEOUT_S) -> api.WorkerStatus:
        """Asks for the worker's status until the predicate holds."""
        async with asyncio.timeout(timeout_s):
            while not predicate(status := await self.describe()):
                await asyncio.sleep(0.02)
        return status

    async def at_rest(self) -> api.WorkerStatus:
        """Waits until nothing is held, landing, leased or quarantined; fails when that never comes."""
        return await self.until(
            lambda s: (
                not (
                    s.ledger.blocks_held
                    or s.ledger.blocks_landing
                    or s.ledger.slots_leased
                    or s.ledger.slots_quarantined
                    or s.running
                    or s.waiting
                    or s.handoffs
                )
            )
        )

    async def submit(
        self,
        prompt: list[int],
        *,
        prefill: str = "",
        tokens: int = 64,
        salt: str = "",
        n: int = 1,
        **sampling: Any,
    ) -> int:
        """Sends a request and returns its key. Greedy unless said otherwise."""
        key = self._next
        self._next += 1
        self._answers[key] = Answer([[] for _ in range(n)])
        self._ended[key] = asyncio.get_running_loop().create_future()
        settings = {"temperature": 0.0, "top_p": 1.0, "max_tokens": tokens, **sampling}
        submit = pb.Submit(
            key=key,
            request_id=f"r{key}",
            prompt=prompt,
            prefill_worker=prefill,
            local_below_tokens=1,
            salt=salt,
            n=n,
            sampling=pb.EngineSampling(**settings),
        )
        await self._write(pb.ToWorker(submit=submit))
        return key

    async def cancel(self, key: int) -> None:
        await self._write(pb.ToWorker(cancel=pb.Cancel(key=key)))

    async def _write(self, message: pb.ToWorker) -> None:
        async with self._writing:
            await self._call.write(message)

    async def answer(self, key: int) -> Answer:
        return await asyncio.wait_for(asyncio.shield(self._ended[key]), WAIT_TIMEOUT_S)

    async def tokens(self, key: int, count: int) -> list[int]:
        """Waits until that many tokens have come."""
        async with asyncio.timeout(WAIT_TIMEOUT_S):
            while len(self._answers[key].ids) < count:
                self._changed.clear()
                await self._changed.wait()
        return self._answers[key].ids

    async def ask(self, prompt: list[int], **how: Any) -> Answer:
        return await self.answer(await self.submit(prompt, **how))

    async def _read(self) -> None:
        while (message := await self._call.read()) is not None and hasattr(message, "tokens"):
            for entry in message.tokens:
                answer = self._answers[entry.key]
                ids = answer.choices[entry.choice]
                assert entry.first_index == len(ids), "tokens were lost, doubled or reordered"
                ids += entry.ids
                if not entry.choice:
                    answer.logprobs += entry.logprobs.chosen
            for end in message.ends:
                answer = self._answers[end.key]
                answer.reasons[end.choice] = end.reason
                if not end.more:
                    answer.end = end
                    self._ended[end.key].set_result(answer)
            self._changed.set()


@dataclass
class Pair:
    """One prefill and one decode worker, connected."""

    prefill: Worker
    decode: Worker
    client: DecodeClient
    version: int = 1

    async def replace_prefill(self, worker: Worker) -> None:
        """What the supervisor does after a death: the new incarnation takes the old one's place."""
        self.prefill = worker
        self.version += 1
        await introduced(self.decode, self.client, [worker], self.version)


@asynccontextmanager
async def open_pair(
    model: Path,
    *,
    prefill_tp: int = 1,
    decode_tp: int = 1,
    prefill: dict[str, Any] | None = None,
    decode: dict[str, Any] | None = None,
) -> AsyncIterator[Pair]:
    """Starts both, introduces them, waits until they can hand off; stops both in the end."""
    prefill_worker, decode_worker = await asyncio.gather(
        start_worker("prefill", model, tensor_parallel=prefill_tp, **(prefill or {})),
        start_worker("decode", model, tensor_parallel=decode_tp, **(decode or {})),
    )
    try:
        async with DecodeClient(decode_worker) as client:
            pair = Pair(prefill_worker, decode_worker, client)
            await introduced(decode_worker, client, [prefill_worker])
            yield pair
    finally:
        await asyncio.gather(pair.prefill.stop(), pair.decode.stop())
