"""What the router's prefix index costs: matching a prompt, keeping an entry, following events.

    python benchmarks/prefix_index.py

For 16, 64 and 1,000 workers and prompts of 8,192 tokens in blocks of 16: microseconds to hash and match a prompt of
which one worker has all, of which every worker has a quarter, of which nobody has anything; the same without hashing;
and to expect it where it was placed. Then bytes an entry, events a second, and the time to forget one worker.
"""

from __future__ import annotations

import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from router.prefix_index import PrefixIndex
from router.prompt_hints import HintChain, PromptHints

BLOCK = 16
PROMPT = 8192
EACH = 2000  # other blocks at each worker
ROUNDS = 200


def prompt(number: int) -> list[int]:
    return [(number * 7919 + at * 31) % 150_000 for at in range(PROMPT)]


def hints(tokens: list[int]) -> list[int]:
    chain = HintChain(tokens, "", BLOCK)
    return [chain[at] for at in range(chain.blocks)]


def build(workers: int) -> PrefixIndex:
    """Prompt 1 is at one worker, a quarter of prompt 2 at every one, prompt 3 nowhere."""
    index = PrefixIndex(10_000_000)
    index.set_workers([(f"d{at}", "") for at in range(workers)], [])
    one, shared = hints(prompt(1)), hints(prompt(2))[: PROMPT // BLOCK // 4]
    for at in range(workers):
        others = [(at << 40) + number for number in range(EACH)]
        have = [*others, *shared, *(one if at == workers // 2 else [])]
        index.snapshot(f"d{at}", "", 0, BLOCK, 0, 1, have)
    return index


def median_us(make: Callable[[], Callable[[], object]]) -> float:
    times = []
    for _ in range(ROUNDS):
        action = make()
        begun = time.perf_counter()
        action()
        times.append(1e6 * (time.perf_counter() - begun))
    return statistics.median(times)


def measure(workers: int) -> list[str]:
    index = build(workers)
    row = []
    for number in (1, 2, 3):
        tokens = prompt(number)
        known = PromptHints(tokens)
        for _ in range(2):
            index.match(known, 0.0)
        with_hash = median_us(lambda tokens=tokens: lambda: index.match(PromptHints(tokens), 0.0))  # type: ignore[misc]
        without = median_us(lambda known=known: lambda: index.match(known, 0.0))  # type: ignore[misc]
        row += [f"{with_hash:.0f}", f"{without:.0f}"]
    known = PromptHints(prompt(3))
    clock = iter(range(10_000_000))

    def placed() -> Callable[[], object]:
        now = 100.0 * next(clock)  # what was placed before is forgotten
        return lambda: index.expect(known, "d0", 0, now)

    row.append(f"{median_us(placed):.1f}")
    begun = time.perf_counter()
    index.set_workers([(f"d{at}", "") for at in range(1, workers)], [])
    row.append(f"{1e3 * (time.perf_counter() - begun):.1f}")
    return row


def memory_and_rate() -> tuple[float, float]:
    """Bytes of an entry that only one worker has, and entries added or evicted in a second, in batches of 64."""
    index = PrefixIndex(10_000_000)
    index.set_workers([("d0", ""), ("d1", "")], [])
    for worker_id in ("d0", "d1"):
        index.snapshot(worker_id, "", 0, BLOCK, 0, 1, [])
    count, batch = 1_000_000, 64
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    names = [(number * 0x9E3779B97F4A7C15) % (1 << 64) for number in range(count)]
    batches = [names[at : at + batch] for at in range(0, count, batch)]
    begun = time.perf_counter()
    for seq, part in enumerate(batches, 1):
        index.events("d0", "", seq, part, [], False)
    took = time.perf_counter() - begun
    size = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    begun = time.perf_counter()
    for seq, part in enumerate(batches, len(batches) + 1):
        index.events("d0", "", seq, [], part, False)
    took += time.perf_counter() - begun
    return size / count, 2 * count / took


def main() -> None:
    table = Table(title=f"us for a prompt of {PROMPT} tokens: to hash and match it, and to match it again")
    names = ("workers", "one has all", "again", "all have 1/4", "again", "nobody", "again", "to expect")
    for name in (*names, "ms to forget a worker"):
        table.add_column(name, justify="right", no_wrap=True)
    size, rate = memory_and_rate()
    for workers in (16, 64, 1000):
        table.add_row(str(workers), *measure(workers))
    console = Console(width=120)
    console.print(table)
    console.print(f"{size:.0f} bytes an entry, {rate / 1e6:.2f} million entries a second added or evicted")


if __name__ == "__main__":
    main()
