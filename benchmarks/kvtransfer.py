"""How fast a hand-off moves KV between two workers of this host, for each pair of tensor-parallel sizes.

    python -m benchmarks.kvtransfer [--transport nixl] [--gather auto] [--tokens 512 --tokens 4096] [--png FILE]

Each rank is a process with its pool, its transport and its mover; this one plays both roles: it hands out chunks as
slots become free, joins the ranks' reports, and has landed chunks copied out. GB/s is what all decode ranks got over
the time from the first chunk asked for to the last one verified and scattered, against one memcpy of the same bytes in
the same run; both are medians of `--repeats` turns. All ranks share this machine's cores: trust the ratios, and compare
pairs with as many ranks. `planning` is the plan's share of the time of all ranks together, after the first hand-off.
"""

from __future__ import annotations

import argparse
import os
import random
import select
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
from rich.console import Console
from rich.table import Table

from kvtransfer.chunks import chunk_tokens_for, chunks, seeds
from kvtransfer.direct import PoolPlace, rows, runs
from kvtransfer.join import Join
from kvtransfer.messages import (
    ChunkDone,
    Connect,
    Copied,
    CopyOut,
    Hello,
    KvSpec,
    Lease,
    MoverJob,
    MoverReport,
    SendChunk,
    Sent,
)
from kvtransfer.plan import Plan, kv_heads

Side = Literal["prefill", "decode"]
SLOTS = 4
LIMIT_S = 120.0
# (prefill ranks, decode ranks, kv heads): of a model with 32 layers and heads of 128 in bf16
PAIRS = [(1, 1, 8), (1, 2, 8), (2, 1, 8), (2, 2, 8), (4, 1, 8), (1, 4, 8), (4, 4, 2)]


class Setup(msgspec.Struct, frozen=True):
    kind: str
    kv: KvSpec
    rank: int
    role: Side
    gather: str
    blocks: int
    incarnation: str


class Opened(msgspec.Struct, frozen=True):
    endpoint: bytes
    slot_bytes: int
    name: str


# ---- a rank --------------------------------------------------------------------------------------------------------


def send(sock: socket.socket, message: Any) -> None:
    data = msgspec.msgpack.encode(message)
    sock.sendall(len(data).to_bytes(8, "little") + data)


def receive(sock: socket.socket) -> bytes:
    def exactly(size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            part = sock.recv(min(size - len(data), 1 << 20))
            if not part:
                raise EOFError("the other side has ended")
            data += part
        return bytes(data)

    return exactly(int.from_bytes(exactly(8), "little"))


def rank_process(sock: socket.socket) -> None:
    """A rank: opens what the first message says, then does the jobs that follow until the socket closes."""
    import torch

    from kvtransfer.layout import DTYPES
    from kvtransfer.memory import TransferMemory
    from kvtransfer.mover import Mover

    torch.set_num_threads(1)
    setup = msgspec.msgpack.decode(receive(sock), type=Setup)
    kv = setup.kv
    shape = (kv.layers, 2, setup.blocks, kv.block_size, len(kv_heads(kv, setup.rank)), kv.head_dim)
    dtype = DTYPES[kv.dtype]
    size = int(np.prod(shape)) * dtype.itemsize
    memory = TransferMemory.open(
        setup.kind,
        kv,
        setup.rank,
        role=setup.role,
        slots=SLOTS,
        gather=setup.gather,
        incarnation=setup.incarnation,
        pool_bytes=size,
    )
    storage = torch.empty(size, dtype=torch.uint8) if memory.storage is None else memory.storage[:size]
    pool = storage.random_(0, 255).view(dtype).view(shape)
    lock = threading.Lock()

    def report(message: MoverReport) -> None:
        with lock:
            send(sock, message)

    mover = Mover(
        memory,
        list(pool),
        kv,
        rank=setup.rank,
        role=setup.role,
        on_report=report,
        on_fatal=lambda error: os._exit(3),
        gather=setup.gather,
    )
    mover.expecting(setup.role == "decode")
    send(sock, Opened(memory.describe(), memory.slot_bytes, memory.name))
    try:
        while True:
            mover.submit(msgspec.msgpack.decode(receive(sock), type=MoverJob))
    except EOFError:
        os._exit(0)


class Worker:
    """All ranks of one worker, each in its process, with their reports joined."""

    def __init__(self, role: Side, kv: KvSpec, kind: str, gather: str, blocks: int) -> None:
        self.kv = kv
        self.reports: deque[MoverReport] = deque()
        self.done: deque[ChunkDone] = deque()
        self.join = Join(
            kv.tensor_parallel, self.reports.append, lambda peer, message: self.done.append(message)
        )
        self.sockets: list[socket.socket] = []
        self.processes: list[subprocess.Popen[bytes]] = []
        for rank in range(kv.tensor_parallel):
            mine, theirs = socket.socketpair()
            self.sockets.append(mine)
            mine.settimeout(LIMIT_S)
            arguments = ["-m", "benchmarks.kvtransfer", "--rank", str(theirs.fileno())]
            self.processes.append(subprocess.Popen([sys.executable, *arguments], pass_fds=[theirs.fileno()]))
            theirs.close()
            send(mine, Setup(kind, kv, rank, role, gather, blocks, role))
        opened = [msgspec.msgpack.decode(receive(sock), type=Opened) for sock in self.sockets]
        self.hello = Hello(
            worker_id=role,
            incarnation=role,
            kv=kv,
            transport=opened[0].name,
            endpoints=[one.endpoint for one in opened],
            slot_count=SLOTS,
            slot_bytes=[one.slot_bytes for one in opened],
        )

    def submit(self, job: MoverJob) -> None:
        for sock in self.sockets:
            send(sock, job)

    def read(self, sock: socket.socket) -> None:
        self.join.put(self.sockets.index(sock), msgspec.msgpack.decode(receive(sock), type=MoverReport))

    def end(self) -> None:
        for sock, process in zip(self.sockets, self.processes, strict=True):
            sock.close()
            process.kill()
            process.wait()


# ---- a pair --------------------------------------------------------------------------------------------------------


class Pair:
    """A prefill and a decode worker, connected."""

    def __init__(self, kind: str, gather: str, sizes: tuple[int, int, int], most_tokens: int) -> None:
        prefill_ranks, decode_ranks, heads = sizes
        kv = KvSpec(
            model="benchmark",
            layers=32,
            q_heads=32,
            kv_heads=heads,
            head_dim=128,
            dtype="bfloat16",
            block_size=16,
            chunk_tokens=0,
        )
        kv = msgspec.structs.replace(kv, chunk_tokens=chunk_tokens_for(kv.token_bytes, [16], wanted=256))
        self.blocks = most_tokens // 16 + 16
        sides = [
            msgspec.structs.replace(kv, tensor_parallel=ranks) for ranks in (prefill_ranks, decode_ranks)
        ]
        self.plan = Plan(*sides)
        self.prefill = Worker("prefill", sides[0], kind, gather, self.blocks)
        self.decode = Worker("decode", sides[1], kind, gather, self.blocks)
        self.name = self.decode.hello.transport
        self.prefill.submit(Connect(self.decode.hello))
        self.decode.submit(Connect(self.prefill.hello))
        self.wait(lambda: bool(self.prefill.reports and self.decode.reports))
        for report in (self.prefill.reports.popleft(), self.decode.reports.popleft()):
            if getattr(report, "error", ""):
                raise RuntimeError(f"{report}")
        self._lease = 0

    def wait(self, met: Callable[[], bool]) -> None:
        end = time.monotonic() + LIMIT_S
        workers = {sock: worker for worker in (self.prefill, self.decode) for sock in worker.sockets}
        while not met():
            ready = select.select(list(workers), [], [], end - time.monotonic())[0]
            if not ready:
                raise TimeoutError(f"nothing was reported for {LIMIT_S} s")
            for sock in ready:
                workers[sock].read(sock)

    def hand_off(self, tokens: int, prompt: int) -> None:
        """One prompt from random blocks into random blocks, as the roles do it: a chunk for each free slot."""
        rng = random.Random(prompt)
        tables = [rng.sample(range(self.blocks), -(-tokens // 16)) for _ in range(2)]
        grid = chunks(0, tokens, self.plan.chunk_tokens)
        seeded = seeds(range(tokens), str(prompt), 0, self.plan.chunk_tokens)
        free, slots = list(range(SLOTS)), {}  # by lease
        sent = copied = 0
        while copied < len(grid):
            while free and sent < len(grid):
                self._lease += 1
                slots[self._lease] = free.pop()
                self.prefill.submit(
                    SendChunk(
                        peer="decode",
                        handoff_id=prompt,
                        lease=Lease(self._lease, 1, sent, slots[self._lease], 60.0),
                        blocks=tables[0],
                        blocks_start=0,
                        first_token=grid[sent].first_token,
                        tokens=grid[sent].tokens,
                        seed=seeded[sent],
                    )
                )
                sent += 1
            self.wait(lambda: bool(self.prefill.done or self.decode.reports or self.prefill.reports))
            while self.prefill.reports:
                report = self.prefill.reports.popleft()
                if not isinstance(report, Sent) or report.error:
                    raise RuntimeError(f"{report}")
            while self.prefill.done:
                done = self.prefill.done.popleft()
                self.decode.submit(
                    CopyOut(
                        peer="prefill",
                        handoff_id=prompt,
                        lease_id=done.lease_id,
                        chunk=done.chunk,
                        slot=slots[done.lease_id],
                        blocks=tables[1],
                        blocks_start=0,
                        first_token=grid[done.chunk].first_token,
                        tokens=grid[done.chunk].tokens,
                        seed=seeded[done.chunk],
                        size_bytes=done.size_bytes,
                        digests=done.digests,
                    )
                )
            while self.decode.reports:
                report = self.decode.reports.popleft()
                if not isinstance(report, Copied) or not report.verified:
                    raise RuntimeError(f"{report}")
                free.append(slots.pop(report.lease_id))
                copied += 1

    def end(self) -> None:
        self.prefill.end()
        self.decode.end()


@dataclass(frozen=True)
class Result:
    pair: tuple[int, int, int]
    tokens: int
    size_bytes: int
    chunks: int
    descriptors: int
    handoff_s: float
    memcpy_s: float
    planning_s: float

    @property
    def rates(self) -> tuple[float, float]:
        return self.size_bytes / self.handoff_s / 1e9, self.size_bytes / self.memcpy_s / 1e9


def planning(made: Plan, tokens: int) -> tuple[float, int]:
    """Seconds that all ranks together spend on the plan of one hand-off, and the descriptors when it is gathered."""
    count = 0
    began = time.perf_counter()
    for index, (_, length) in enumerate(chunks(0, tokens, made.chunk_tokens)):
        for rank in range(made.prefill.tensor_parallel):
            for write in made.outgoing(rank, index, length).writes:
                count += len(write.rows + np.array([rank << 24, index << 24, 0], dtype=np.uint64))
        for rank in range(made.decode.tensor_parallel):
            made.incoming(rank, index, length)
    return time.perf_counter() - began, count


def measure(pair: Pair, sizes: tuple[int, int, int], tokens: int, repeats: int) -> Result:
    grid = chunks(0, tokens, pair.plan.chunk_tokens)
    size = sum(
        int(pair.plan.pieces(index, chunk.tokens).size_bytes.sum()) for index, chunk in enumerate(grid)
    )
    source, target = (np.ones(size, dtype=np.uint8) for _ in range(2))
    times: dict[str, list[float]] = {"handoff": [], "memcpy": []}
    for turn in range(repeats + 1):
        for name, run in (
            ("handoff", lambda turn=turn: pair.hand_off(tokens, turn)),
            ("memcpy", lambda: np.copyto(target, source)),
        ):
            began = time.perf_counter()
            run()
            if turn:  # the first only warms up
                times[name].append(time.perf_counter() - began)
    planning_s = statistics.median(planning(pair.plan, tokens)[0] for _ in range(9))
    descriptors = planning(pair.plan, tokens)[1]
    medians = {name: statistics.median(values) for name, values in times.items()}
    return Result(
        sizes, tokens, size, len(grid), descriptors, medians["handoff"], medians["memcpy"], planning_s
    )


def plan_times() -> list[str]:
    """Of 8,192 tokens x 32 layers: without I/O, for a table of random blocks."""
    base = KvSpec(
        model="m",
        layers=32,
        q_heads=32,
        kv_heads=8,
        head_dim=128,
        dtype="bfloat16",
        block_size=16,
        chunk_tokens=128,
    )
    lines = []
    for prefill, decode in ((4, 2), (8, 8)):
        sides = [msgspec.structs.replace(base, tensor_parallel=ranks) for ranks in (prefill, decode)]
        firsts, made = [], Plan(*sides)
        for _ in range(5):
            made = Plan(*sides)
            firsts.append(planning(made, 8192)[0])
        later = min(planning(made, 8192)[0] for _ in range(20))
        lines.append(
            f"plan of 8192 tokens x 32 layers, tp {prefill} -> {decode}, all ranks, gathered: "
            f"first {min(firsts) * 1e3:.2f} ms, later {later * 1e3:.2f} ms, {planning(made, 8192)[1]} descriptors"
        )
    place = PoolPlace(tuple(range(0, 32 << 20, 1 << 20)), 1024, 16, 512 << 10, 4096, 256, 4096, 256)
    table = random.Random(0).sample(range(1024), 512)
    for kind, blocks in (("scattered", table), ("neighbouring", list(range(512)))):
        times, count = [], 0
        for _ in range(5):
            began = time.perf_counter()
            found = [
                rows(place, runs(place, blocks, 0, first, length), range(1), 0)
                for first, length in chunks(0, 8192, 128)
            ]
            times.append(time.perf_counter() - began)
            count = sum(map(len, found))
        lines.append(
            f"rows of the same straight from a pool of one kv head, {kind} blocks: "
            f"{min(times) * 1e3:.2f} ms, {count} descriptors"
        )
    return lines


def draw(results: list[Result], path: Path) -> None:
    import matplotlib.pyplot as plt

    tokens = sorted({result.tokens for result in results})
    figure, axes = plt.subplots(figsize=(9, 4), layout="constrained")
    for index, length in enumerate(tokens):
        mine = [result for result in results if result.tokens == length]
        places = np.arange(len(mine)) + 0.4 * index
        ratios = [result.memcpy_s / result.handoff_s for result in mine]
        bars = axes.bar(places, ratios, width=0.38, label=f"{length} tokens")
        axes.bar_label(bars, [f"{result.rates[0]:.2f}" for result in mine], fontsize=8)
    names = [label(result.pair) for result in results if result.tokens == tokens[0]]
    axes.set_xticks(np.arange(len(names)) + 0.2 * (len(tokens) - 1), names)
    axes.set_ylabel("share of one memcpy (GB/s above)")
    axes.set_xlabel("prefill ranks -> decode ranks")
    axes.legend()
    figure.savefig(path, dpi=120)


def label(pair: tuple[int, int, int]) -> str:
    return f"{pair[0]} -> {pair[1]}" + (f", {pair[2]} kv heads" if pair[2] != 8 else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--transport", default="nixl", choices=["nixl", "distributed", "shm"])
    parser.add_argument("--gather", default="auto", choices=["auto", "always", "never"])
    parser.add_argument("--tokens", action="append", type=int, help="may be repeated; 512 and 4096")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--pair", action="append", help="PREFILL,DECODE ranks, may be repeated; seven pairs")
    parser.add_argument("--png", type=Path, help="draws the shares of a memcpy")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank is not None:
        return rank_process(socket.socket(fileno=arguments.rank))
    wanted = arguments.pair and [tuple(int(ranks) for ranks in pair.split(",")) for pair in arguments.pair]
    console = Console(width=None if sys.stdout.isatty() else 150)
    for line in plan_times():
        console.print(line)
    lengths = arguments.tokens or [512, 4096]
    results: list[Result] = []
    name = ""
    for sizes in PAIRS:
        if wanted and sizes[:2] not in wanted:
            continue
        pair = Pair(arguments.transport, arguments.gather, sizes, max(lengths))
        name = pair.name
        try:
            results += [measure(pair, sizes, tokens, arguments.repeats) for tokens in lengths]
        finally:
            pair.end()
    table = Table(title=f"hand-offs over {name}, gather {arguments.gather}, 32 layers, heads of 128, bf16")
    for column in ("ranks", "tokens", "MiB", "chunks", "descriptors", "GB/s", "memcpy", "share", "planning"):
        table.add_column(column, justify="right")
    for result in results:
        rate, memcpy = result.rates
        table.add_row(
            label(result.pair),
            str(result.tokens),
            f"{result.size_bytes / 2**20:.0f}",
            str(result.chunks),
            str(result.descriptors),
            f"{rate:.2f}",
            f"{memcpy:.1f}",
            f"{rate / memcpy:.2f}",
            f"{result.planning_s / result.handoff_s:.2%}",
        )
    console.print(table)
    if arguments.png:
        draw(results, arguments.png)


if __name__ == "__main__":
    main()
