"""How fast each stage of moving KV is, between two processes of this host, against one memcpy of the same bytes.

    python -m benchmarks.kvtransfer_stages [--transport nixl --transport shm] [--repeats 9]

Every number is the median of `--repeats` runs in which the stages take turns, so that a busy machine slows all alike:
trust the ratios more than the GB/s. `send` is what a prefill rank does for a chunk (gather, digest, write until
settled), `receive` what a decode rank does (copy out, verify, scatter). A sample is cut into chunks as in a hand-off.
"""

from __future__ import annotations

import argparse
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from kvtransfer import layout
from kvtransfer.chunks import chunk_tokens_for, chunks
from kvtransfer.digest import copy_and_digest, digest
from kvtransfer.plan import Piece
from kvtransfer.transport import Region, TransportError
from kvtransfer.transports import Endpoint, open_transport


@dataclass(frozen=True)
class Shape:
    name: str
    layers: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    block_size: int = 16


SHAPES = [
    Shape("4 layers, 4 x 64, fp32", 4, 4, 64, torch.float32),
    Shape("32 layers, 8 x 128, bf16", 32, 8, 128, torch.bfloat16),
]
LENGTHS = (512, 4096)
WANTED_CHUNK_TOKENS = 512
KINDS = ["nixl", "distributed", "shm"]


class Sample:
    """The KV of one prompt in random blocks of a pool, and one transport to a receiver in another process."""

    def __init__(self, shape: Shape, tokens: int, endpoint: Endpoint) -> None:
        needed = -(-tokens // shape.block_size)
        self.pool_blocks = needed * 2
        size = (2, self.pool_blocks, shape.block_size, shape.kv_heads, shape.head_dim)
        self.layers = [torch.randn(size).to(shape.dtype) for _ in range(shape.layers)]
        self.blocks = random.Random(0).sample(range(self.pool_blocks), needed)
        self.dtype = str(shape.dtype).removeprefix("torch.")
        self.token_bytes = layout.token_bytes(self.layers)
        chunk_tokens = chunk_tokens_for(self.token_bytes, [shape.block_size], WANTED_CHUNK_TOKENS)
        self.chunks = chunks(0, tokens, chunk_tokens)
        self.chunk_bytes = chunk_tokens * self.token_bytes
        self.total_bytes = tokens * self.token_bytes
        self.endpoint = endpoint
        self.wire = endpoint.staging[: self.chunk_bytes]
        self.copy: Region = np.zeros(self.chunk_bytes, dtype=np.uint8)

    def piece(self, tokens: int, size: int) -> Piece:
        """All heads of a chunk, as between two workers of one rank each."""
        heads = self.layers[0].shape[3]
        return Piece(0, 0, heads, 0, tokens, 0, size, range(heads))

    def each_chunk(self, step: Callable[[int, int, int], object]) -> Callable[[], None]:
        def run() -> None:
            for first, tokens in self.chunks:
                step(first, tokens, tokens * self.token_bytes)

        return run

    def gather(self, first: int, tokens: int, size: int) -> None:
        where = layout.span(self.layers, self.blocks, 0, first, tokens)
        layout.gather(self.layers, where, [self.piece(tokens, size)], self.dtype, self.wire[:size])

    def digest(self, first: int, tokens: int, size: int) -> None:
        digest(self.wire[:size], first)

    def write(self, first: int, tokens: int, size: int) -> None:
        ticket = self.endpoint.write("receiver", np.array([[0, 0, size]], dtype=np.uint64))
        while not (settled := self.endpoint.poll()):
            pass
        if settled[0].ticket != ticket or settled[0].error:
            raise TransportError(settled[0].error or "another ticket settled")

    def send(self, first: int, tokens: int, size: int) -> None:
        self.gather(first, tokens, size)
        self.digest(first, tokens, size)
        self.write(first, tokens, size)

    def copy_out(self, first: int, tokens: int, size: int) -> None:
        copy_and_digest(self.wire[:size], self.copy[:size], first)

    def scatter(self, first: int, tokens: int, size: int) -> None:
        where = layout.span(self.layers, self.blocks, 0, first, tokens)
        layout.scatter(self.layers, where, [self.piece(tokens, size)], self.dtype, self.copy[:size])

    def receive(self, first: int, tokens: int, size: int) -> None:
        self.copy_out(first, tokens, size)
        self.scatter(first, tokens, size)


def measure(stages: dict[str, Callable[[], None]], repeats: int) -> dict[str, float]:
    """Median seconds of each stage; the stages take turns."""
    times: dict[str, list[float]] = {name: [] for name in stages}
    for round_ in range(repeats + 1):
        for name, stage in stages.items():
            began = time.perf_counter()
            stage()
            if round_:  # the first round only warms up
                times[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in times.items()}


def run(shape: Shape, tokens: int, endpoint: Endpoint, repeats: int) -> tuple[Sample, dict[str, float]]:
    sample = Sample(shape, tokens, endpoint)
    source, target = (np.ones(sample.total_bytes, dtype=np.uint8) for _ in range(2))
    names = ("gather", "digest", "write", "send", "copy_out", "scatter", "receive")
    stages: dict[str, Callable[[], None]] = {"memcpy": lambda: np.copyto(target, source)}
    stages |= {name: sample.each_chunk(getattr(sample, name)) for name in names}
    return sample, measure(stages, repeats)


def receive_for_ever(kind: str, size: int) -> None:
    """The other process: lands what comes until standard input ends."""
    import select

    endpoint = open_transport(kind, 0, size, "receiver")
    print(endpoint.describe().hex(), flush=True)
    while not select.select([sys.stdin], [], [], 0.0002)[0]:
        endpoint.poll()


def benchmark(kind: str, repeats: int, table: Table) -> None:
    size = 16 << 20
    receiver = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.kvtransfer_stages", "--receive", kind, str(size)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert receiver.stdout is not None
    endpoint = open_transport(kind, size, 0, "sender")
    try:
        endpoint.connect("receiver", bytes.fromhex(receiver.stdout.readline()))
        for shape in SHAPES:
            for tokens in LENGTHS:
                sample, seconds = run(shape, tokens, endpoint, repeats)
                rates = [f"{sample.total_bytes / one / 1e9:.1f}" for one in seconds.values()]
                ratios = [f" [dim]{seconds['memcpy'] / one:.2f}[/]" for one in seconds.values()]
                table.add_row(
                    endpoint.name,
                    shape.name,
                    str(tokens),
                    f"{sample.total_bytes / 2**20:.0f} / {len(sample.chunks)}",
                    *[rate + ratio for rate, ratio in zip(rates, ratios, strict=True)],
                )
        table.add_section()
    finally:
        receiver.kill()
        receiver.communicate()
        endpoint.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--transport", action="append", choices=KINDS, help="may be repeated; all")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--receive", nargs=2, metavar=("KIND", "BYTES"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.receive:
        return receive_for_ever(arguments.receive[0], int(arguments.receive[1]))
    torch.set_num_threads(1)
    table = Table(title="KV transfer on this host, GB/s (and share of memcpy)")
    for column in ("transport", "KV", "tokens", "MiB / chunks"):
        table.add_column(column)
    for column in ("memcpy", "gather", "digest", "write", "= send", "copy+verify", "scatter", "= receive"):
        table.add_column(column, justify="right")
    for kind in arguments.transport or KINDS:
        benchmark(kind, arguments.repeats, table)
    Console(width=None if sys.stdout.isatty() else 180).print(table)


if __name__ == "__main__":
    main()
