"""What the sum over ranks costs in each layer: shared memory against gloo, on this host.

    python benchmarks/all_reduce.py [--ranks 2] [--hidden 4096]

Microseconds of one sum of [tokens, hidden] for decode- and prefill-sized steps, best and median of batches that take
turns, so that what else the machine does meets both. A step makes two sums for each layer and one for the embedding.
With more ranks than free cores the figures show the operating system, not the method.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import socket
import statistics
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from engine.collective import Collective, SharedMemory
from engine.distributed import Distributed

TOKENS = (1, 8, 32, 128, 512)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
BATCHES = 12
TIMEOUT_S = 60.0


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=4096)
    options = parser.parse_args()
    descriptor = SharedMemory.create(options.ranks)
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    context = multiprocessing.get_context("spawn")
    results, theirs = context.Pipe(duplex=False)
    memory = f"/proc/{os.getpid()}/fd/{descriptor}"
    ranks = [
        context.Process(
            target=run_rank,
            args=(rank, options.ranks, options.hidden, memory, address, None if rank else theirs),
        )
        for rank in range(options.ranks)
    ]
    for rank in ranks:
        rank.start()
    theirs.close()
    table = Table(title=f"sum over {options.ranks} ranks, {os.cpu_count()} cores, us: best (median)")
    for name in ("tokens", "dtype", "size", "shared memory", "gloo", "gloo / shared memory"):
        table.add_column(name, justify="right")
    try:
        while True:
            table.add_row(*results.recv())
    except EOFError:
        pass
    for rank in ranks:
        rank.join(TIMEOUT_S)
    Console().print(table)


def run_rank(
    rank: int, size: int, hidden: int, memory: str, address: str, results: Connection[Any, Any] | None
) -> None:
    """One rank's turns; rank 0 sends a row of the table for each size."""
    torch.set_num_threads(1)
    descriptor = os.open(memory, os.O_RDWR)
    shared = SharedMemory(descriptor, rank, size, TIMEOUT_S)
    gloo = Distributed("gloo", address, rank, size, TIMEOUT_S)
    for name, dtype in DTYPES.items():
        for tokens in TOKENS:
            partial = torch.full((tokens, hidden), float(rank + 1), dtype=dtype)
            assert torch.equal(shared.all_reduce(partial.clone()), gloo.all_reduce(partial.clone()))
            taken: dict[str, list[float]] = {"shared": [], "gloo": []}
            repeats = {"shared": max(5, 20_000 // (tokens + 50)), "gloo": 10}
            for _ in range(BATCHES):
                for method, group in (("shared", shared), ("gloo", gloo)):
                    taken[method].append(time_of(group, partial.zero_(), repeats[method]))
            if results is not None:
                size_kib = partial.nbytes / 1024
                best = {method: min(times) for method, times in taken.items()}
                shown = [f"{min(each):,.1f} ({statistics.median(each):,.1f})" for each in taken.values()]
                ratio = f"{best['gloo'] / best['shared']:.1f}"
                results.send((str(tokens), name, f"{size_kib:,.0f} KiB", *shown, ratio))
    if results is not None:
        results.close()
    gloo.close()
    shared.close()


def time_of(group: Collective, partial: torch.Tensor, repeats: int) -> float:
    """Microseconds of one sum, of many back to back, begun together."""
    group.all_reduce(partial[:1])
    began = time.perf_counter()
    for _ in range(repeats):
        group.all_reduce(partial)
    return (time.perf_counter() - began) / repeats * 1e6


if __name__ == "__main__":
    main()
