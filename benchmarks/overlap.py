"""How much of a hand-off hides behind the prefill, by layer groups, on a link slower than prefill makes KV.

    python -m benchmarks.overlap [--tokens 512 --tokens 2048] [--rounds 3] [--png overlap.png]

Real rank processes of both roles over shared memory whose writes settle no sooner than a link of the given rate would
let them; only the shells between them are played by this process. One prefill worker, one decode worker for each number
of layer groups; the runs take turns. TTFT is the decode engine's. With P the time that the prompt computes for and T =
bytes / rate, a hand-off that hides nothing takes TTFT_null + T, where null is a link that takes no time:

    hidden = 1 - (TTFT - TTFT_null) / T          of which a perfect overlap has at most min(1, P / T)
"""

from __future__ import annotations

import argparse
import asyncio
import mmap
import os
import random
import statistics
import struct
import sys
import tempfile
import time
import uuid
from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from engine.api import Load, RequestEnd, RequestKey, SamplingParams, StepOutput, Submit, Trace
from kvtransfer import memory
from kvtransfer.messages import Done, Hello
from kvtransfer.transport import Rows, Settled
from kvtransfer.transports import Endpoint, open_transport
from worker.engine_process import EngineProcess
from worker.messages import Fatal, FromEngine, FromPeer, PeerUp, Ready, ToPeer
from worker.spec import Role, WorkerSpec

LENGTHS = (256, 512, 1024, 2048, 4096)
SHARE = 0.5  # of the rate at which prefill makes KV
LIMIT_S = 300.0
_RATE_FILE = "BATON_BENCHMARK_RATE"  # where a rank finds bytes a second, a double; 0: no limit
_RATE = struct.Struct("<d")
_LAYERS, _HIDDEN, _HEADS, _DIM, _VOCABULARY = 8, 256, 4, 64, 512
_TOKEN_BYTES = 2 * _LAYERS * _HEADS * _DIM * 4
_CHUNK_TOKENS = 256


class Throttled:
    """An endpoint whose writes settle when a link of that rate would have carried them, one after another."""

    def __init__(self, inner: Endpoint, rate: mmap.mmap) -> None:
        self._inner = inner
        self._rate = rate
        self._free_at = 0.0
        self._due: dict[int, float] = {}
        self._settled: list[Settled] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def write(self, peer: str, rows: Rows) -> int:
        (rate,) = _RATE.unpack_from(self._rate)
        ticket = self._inner.write(peer, rows)
        if rate:
            self._free_at = max(self._free_at, time.monotonic()) + float(rows[:, 2].sum()) / rate
            self._due[ticket] = self._free_at
        return ticket

    def poll(self) -> list[Settled]:
        self._settled += self._inner.poll()
        now = time.monotonic()
        over = [one for one in self._settled if self._due.get(one.ticket, 0.0) <= now]
        for one in over:
            self._settled.remove(one)
            self._due.pop(one.ticket, None)
        return over


def run_rank() -> None:
    """A rank process of either role, its transport throttled."""
    from decode.rank import make_role as make_decode
    from prefill.rank import make_role as make_prefill
    from worker.rank import main as run

    with open(os.environ[_RATE_FILE], "rb") as file:
        rate = mmap.mmap(file.fileno(), _RATE.size, access=mmap.ACCESS_READ)

    def opened(*arguments: Any) -> Any:
        return Throttled(open_transport(*arguments), rate)

    memory.open_transport = opened
    role = msgspec.json.decode(sys.argv[1])["spec"]["role"]
    run(make_prefill if role == "prefill" else make_decode)


@dataclass(eq=False)
class Worker:
    """A rank process, and what this process knows of it as its shell."""

    spec: WorkerSpec
    engine: EngineProcess
    ready: asyncio.Future[Hello]
    peers: list[str] = field(default_factory=list)
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    ends: dict[RequestKey, asyncio.Future[Trace]] = field(default_factory=dict)


class Bench:
    """One prefill worker, a decode worker for each number of groups, and the streams between them."""

    def __init__(self, model: Path, rate: mmap.mmap, threads: int) -> None:
        self._model = model
        self._rate = rate
        self._threads = threads
        self._workers: dict[str, Worker] = {}  # by incarnation
        self._done: dict[str, asyncio.Future[Done]] = {}  # by decode incarnation
        self._next = 1
        self._random = random.Random(0)

    async def start(self, role: Role, groups: int = 1, most: int = max(LENGTHS)) -> Worker:
        slots = 4 * groups * max(1, min(4, most // _CHUNK_TOKENS))
        spec = WorkerSpec(
            role=role,
            worker_id=f"{role}-{groups}",
            incarnation=str(uuid.uuid4()),
            token="",
            model_path=str(self._model),
            dtype="float32",
            kv_cache_bytes=_TOKEN_BYTES * (2 * most + 1024),
            transport="shm",
            slots=slots,
            chunk_tokens=_CHUNK_TOKENS,
            layer_groups=groups,
            handoff_timeout_s=LIMIT_S,
            threads=self._threads,
        )
        ready = asyncio.get_running_loop().create_future()

        def died(reason: str) -> None:
            if not ready.done():
                ready.set_exception(RuntimeError(f"{spec.worker_id}: {reason}"))

        engine = EngineProcess(
            spec, "benchmarks.overlap", lambda said: self._hear(spec.incarnation, said), died
        )
        worker = self._workers[spec.incarnation] = Worker(spec, engine, ready)
        await asyncio.wait_for(asyncio.shield(ready), LIMIT_S)
        return worker

    def _hear(self, incarnation: str, said: FromEngine) -> None:
        worker = self._workers[incarnation]
        if isinstance(said, Ready):
            worker.ready.set_result(said.hello)
        elif isinstance(said, Fatal):
            raise RuntimeError(f"{worker.spec.worker_id}: {said.reason}")
        elif isinstance(said, ToPeer):
            if isinstance(said.message, Done) and not self._done[said.peer].done():
                self._done[said.peer].set_result(said.message)
            self._workers[said.peer].engine.send(FromPeer(incarnation, said.epoch, said.message))
        elif isinstance(said, Load):
            worker.peers = said.peers
            worker.changed.set()
        elif isinstance(said, StepOutput | RequestEnd):
            for end in [said] if isinstance(said, RequestEnd) else said.ends:
                if end.trace is None:
                    raise RuntimeError(f"a request ended with {end.reason}: {end.detail}")
                worker.ends.pop(end.request).set_result(end.trace)

    async def link(self, decode: Worker, prefill: Worker) -> None:
        for one, other in ((decode, prefill), (prefill, decode)):
            one.engine.send(PeerUp(msgspec.structs.replace(await other.ready, epoch=1)))
        async with asyncio.timeout(LIMIT_S):
            while prefill.spec.incarnation not in decode.peers:
                decode.changed.clear()
                await decode.changed.wait()

    async def ask(self, decode: Worker, prefill: Worker, tokens: int, rate: float) -> tuple[float, float]:
        """TTFT and compute seconds of one new prompt of which so many tokens are handed off, over such a link."""
        _RATE.pack_into(self._rate, 0, rate)
        key = RequestKey(1, self._next)
        self._next += 1
        loop = asyncio.get_running_loop()
        end = decode.ends[key] = loop.create_future()
        done = self._done[decode.spec.incarnation] = loop.create_future()
        submit = Submit(
            request=key,
            request_id=f"r{key.key}",
            prompt=[self._random.randrange(_VOCABULARY) for _ in range(tokens + 1)],
            sampling=SamplingParams(temperature=0.0, max_tokens=1),
            prefill_worker=prefill.spec.worker_id,
        )
        decode.engine.send(submit)
        async with asyncio.timeout(LIMIT_S):
            trace = await end
            compute_s = (await done).compute_s
        if trace.remote_tokens != tokens:
            raise RuntimeError(f"{trace.remote_tokens} of {tokens} tokens were handed off: {trace.fallback}")
        return trace.ttft_s, compute_s

    async def stop(self) -> None:
        await asyncio.gather(*(worker.engine.stop(5.0) for worker in self._workers.values()))


@dataclass(frozen=True)
class Result:
    """Medians in seconds; `hidden` and `most` are shares of the transfer."""

    tokens: int
    groups: int
    null_s: float
    compute_s: float
    transfer_s: float
    ttft_s: float

    @property
    def exposed_s(self) -> float:
        return self.ttft_s - self.null_s

    @property
    def hidden(self) -> float:
        return 1 - self.exposed_s / self.transfer_s

    @property
    def most(self) -> float:
        return min(1.0, self.compute_s / self.transfer_s)


async def measure(
    model: Path,
    rate: mmap.mmap,
    lengths: list[int],
    groups: list[int],
    rounds: int,
    share: float,
    threads: int,
) -> list[Result]:
    bench, most = Bench(model, rate, threads), max(lengths)
    try:
        prefill = await bench.start("prefill", most=most)
        decodes = {count: await bench.start("decode", count, most) for count in groups}
        for decode in decodes.values():
            await bench.link(decode, prefill)
            await bench.ask(decode, prefill, min(lengths), 0.0)  # warms up
        results = []
        for tokens in lengths:
            size_bytes = tokens * _TOKEN_BYTES
            first = [await bench.ask(decodes[groups[0]], prefill, tokens, 0.0) for _ in range(2)]
            link = share * size_bytes / min(compute_s for _, compute_s in first)
            nulls: list[tuple[float, float]] = []
            times: defaultdict[int, list[float]] = defaultdict(list)
            for _ in range(rounds):
                nulls.append(await bench.ask(decodes[groups[0]], prefill, tokens, 0.0))
                for count, decode in decodes.items():
                    times[count].append((await bench.ask(decode, prefill, tokens, link))[0])
            null_s, compute_s = (statistics.median(each) for each in zip(*nulls, strict=True))
            for count in groups:
                ttft_s = statistics.median(times[count])
                results.append(Result(tokens, count, null_s, compute_s, size_bytes / link, ttft_s))
                show(results[-1])
        return results
    finally:
        await bench.stop()


def show(result: Result) -> None:
    print(
        f"{result.tokens:6} {result.groups:6} {result.null_s:9.3f} {result.compute_s:9.3f} {result.transfer_s:9.3f} "
        f"{result.ttft_s:9.3f} {result.exposed_s:9.3f} {result.hidden:7.2f} {result.hidden / result.most:8.2f}",
        flush=True,
    )


def plot(results: list[Result], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    for count in sorted({result.groups for result in results}):
        mine = [result for result in results if result.groups == count]
        axes.plot(
            [r.tokens for r in mine], [r.hidden / r.most for r in mine], "o-", label=f"{count} layer groups"
        )
    axes.axhline(1.0, color="grey", linewidth=0.5)
    axes.set(xscale="log", xlabel="prompt tokens", ylabel="hidden, of what can be hidden", ylim=(0, 1.1))
    axes.set_xticks([r.tokens for r in results], [str(r.tokens) for r in results], minor=False)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def make_model(folder: Path) -> None:
    """A random model whose KV is large beside what it computes."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=_VOCABULARY,
        hidden_size=_HIDDEN,
        intermediate_size=2 * _HIDDEN,
        num_hidden_layers=_LAYERS,
        num_attention_heads=_HEADS,
        num_key_value_heads=_HEADS,
        head_dim=_DIM,
        max_position_embeddings=max(LENGTHS) + 64,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, action="append", help="handed off; default: 256 to 4,096")
    parser.add_argument("--groups", type=int, action="append", help=f"default: 1, 4 and {_LAYERS}")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--share", type=float, default=SHARE, help="of the rate at which prefill makes KV")
    parser.add_argument("--threads", type=int, default=1, help="of each rank")
    parser.add_argument("--png", type=Path, help="a plot of the table")
    options = parser.parse_args()
    lengths, groups = options.tokens or list(LENGTHS), options.groups or [1, 4, _LAYERS]
    print("tokens groups      null   compute  transfer      TTFT   exposed  hidden  of most")
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder) / "model")
        path = Path(folder) / "rate"
        path.write_bytes(_RATE.pack(0.0))
        os.environ[_RATE_FILE] = str(path)
        with open(path, "r+b") as file:
            rate = mmap.mmap(file.fileno(), _RATE.size)
        measured = measure(
            Path(folder) / "model", rate, lengths, groups, options.rounds, options.share, options.threads
        )
        results = asyncio.run(measured)
    if options.png:
        plot(results, options.png)


if __name__ == "__main__":
    if len(sys.argv) == 2 and sys.argv[1].startswith("{"):
        run_rank()
    else:
        with suppress(KeyboardInterrupt):
            main()
