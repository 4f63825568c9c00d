"""Raw bandwidth of each transport by the size of its pieces, against one memcpy of the same bytes.

    python -m benchmarks.transports [--transport nixl --transport shm] [--repeats 9] [--png FILE]

A write carries TOTAL_BYTES in scattered pieces of one size, from this process into another, until it has settled. All
transports and the memcpy take turns in each round, so that a busy machine slows all alike: trust the ratios more than
the GB/s. `nixl-tcp` is NIXL held to TCP, as between two hosts without RDMA.
"""

from __future__ import annotations

import argparse
import os
import select
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from kvtransfer.transport import Rows, TransportError
from kvtransfer.transports import Endpoint, open_transport

TOTAL_BYTES = 16 << 20
SIZES = tuple(1 << shift for shift in range(11, 25))  # 2 KiB .. 16 MiB
KINDS = ("shm", "nixl", "nixl-tcp", "distributed")
MEMCPY = "memcpy"
POLL_S = 0.0002  # of a receiver, as the mover's


def scattered(size: int, seed: int) -> Rows:
    """TOTAL_BYTES in pieces of `size`, in random places on both sides."""
    rng = np.random.default_rng(seed)
    count = TOTAL_BYTES // size
    rows = np.empty((count, 3), dtype=np.uint64)
    rows[:, 0], rows[:, 1], rows[:, 2] = rng.permutation(count) * size, rng.permutation(count) * size, size
    return rows


class Lane:
    """A sender and a receiver, each in a process of its own: UCX_TLS is read once in each."""

    def __init__(self, kind: str) -> None:
        environment = os.environ | ({"UCX_TLS": "tcp"} if kind == "nixl-tcp" else {})
        self.kind = kind
        self.sender = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.transports", "--send", kind],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self.about = self._answer()

    def seconds(self, size: int, seed: int) -> float:
        assert self.sender.stdin is not None
        self.sender.stdin.write(f"{size} {seed}\n")
        self.sender.stdin.flush()
        return float(self._answer())

    def close(self) -> None:
        assert self.sender.stdin is not None
        self.sender.stdin.close()
        self.sender.wait()

    def _answer(self) -> str:
        assert self.sender.stdout is not None
        answer = self.sender.stdout.readline().strip()
        if not answer:
            raise TransportError(f"{self.kind}: its process has ended")
        return answer


def send(kind: str) -> None:
    receiver = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.transports", "--receive", kind],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert receiver.stdin is not None and receiver.stdout is not None
    endpoint = open_transport(kind.removesuffix("-tcp"), TOTAL_BYTES, 0, "sender")
    endpoint.staging[:] = 1
    endpoint.connect("receiver", bytes.fromhex(receiver.stdout.readline()))
    settle(endpoint, scattered(TOTAL_BYTES, 0))
    print(f"{endpoint.name} ({endpoint.devices})", flush=True)
    for line in sys.stdin:
        size, seed = (int(word) for word in line.split())
        print(settle(endpoint, scattered(size, seed)), flush=True)
    receiver.stdin.close()
    receiver.wait()
    os._exit(0)


def settle(endpoint: Endpoint, rows: Rows) -> float:
    """Seconds from posting to settling."""
    began = time.perf_counter()
    endpoint.write("receiver", rows)
    while not (settled := endpoint.poll()):
        time.sleep(0)
    took_s = time.perf_counter() - began
    if settled[0].error:
        raise TransportError(settled[0].error)
    return took_s


def receive(kind: str) -> None:
    endpoint = open_transport(kind.removesuffix("-tcp"), 0, TOTAL_BYTES, "receiver")
    print(endpoint.describe().hex(), flush=True)
    while not select.select([sys.stdin], [], [], POLL_S)[0]:
        endpoint.poll()
    os._exit(0)


def memcpy() -> Callable[[], float]:
    source, target = (np.ones(TOTAL_BYTES, dtype=np.uint8) for _ in range(2))

    def run() -> float:
        began = time.perf_counter()
        np.copyto(target, source)
        return time.perf_counter() - began

    return run


def measure(lanes: list[Lane], repeats: int) -> dict[str, dict[int, float]]:
    """GB/s by name and size of a piece, medians; the first round only warms up."""
    copy = memcpy()
    taken: dict[str, dict[int, list[float]]] = {name: {} for name in (MEMCPY, *(lane.kind for lane in lanes))}
    for round_ in range(repeats + 1):
        for size in SIZES:
            turn = {MEMCPY: copy()} | {lane.kind: lane.seconds(size, round_) for lane in lanes}
            for name, seconds in turn.items():
                if round_:
                    taken[name].setdefault(size, []).append(seconds)
    return {
        name: {size: TOTAL_BYTES / 1e9 / statistics.median(values) for size, values in sizes.items()}
        for name, sizes in taken.items()
    }


def show(speeds: dict[str, dict[int, float]], about: dict[str, str]) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("piece", justify="right")
    for name in speeds:
        table.add_column(name, justify="right")
    for size in SIZES:
        cells = [f"{speed[size]:.2f}" for speed in speeds.values()]
        ratios = [""] + [f" {speed[size] / speeds[MEMCPY][size]:.2f}x" for speed in list(speeds.values())[1:]]
        table.add_row(label(size), *(cell + ratio for cell, ratio in zip(cells, ratios, strict=True)))
    console = Console(highlight=False, width=140 if not sys.stdout.isatty() else None)
    console.print(
        f"GB/s of {TOTAL_BYTES >> 20} MiB in scattered pieces, and its share of one memcpy of the same bytes"
    )
    console.print(table)
    for kind, name in about.items():
        console.print(f"{kind}: {name}")


def label(size: int) -> str:
    return f"{size >> 20} MiB" if size >= 1 << 20 else f"{size >> 10} KiB"


def plot(speeds: dict[str, dict[int, float]], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    for name, by_size in speeds.items():
        axes.plot(list(by_size), list(by_size.values()), "k--" if name == MEMCPY else "o-", label=name)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(SIZES, [label(size) for size in SIZES], rotation=45)
    axes.set_xlabel("size of a piece")
    axes.set_ylabel(f"GB/s ({TOTAL_BYTES >> 20} MiB a write)")
    axes.grid(visible=True, which="both", alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--transport", action="append", choices=KINDS)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--png", type=Path, help="a plot of the table")
    parser.add_argument("--send", help=argparse.SUPPRESS)
    parser.add_argument("--receive", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.send:
        return send(options.send)
    if options.receive:
        return receive(options.receive)
    lanes: list[Lane] = []
    for kind in options.transport or KINDS:
        try:
            lanes.append(Lane(kind))
        except TransportError as error:
            print(f"{error}; left out", file=sys.stderr)
    try:
        speeds = measure(lanes, options.repeats)
    finally:
        for lane in lanes:
            lane.close()
    show(speeds, {lane.kind: lane.about for lane in lanes})
    if options.png:
        plot(speeds, options.png)
    return None


if __name__ == "__main__":
    main()
