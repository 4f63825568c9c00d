"""What a decision costs the router: `choose` over views of many workers, each with 256 running requests.

    python benchmarks/policy.py [--calls 2000]

Microseconds of CPU time at the median and the 99th percentile, for each policy and size of the cluster (half of the
workers prefill). The decision must not cost more than 200 us at 64 workers and 1000 us at 1000 (p99).
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from engine.api import HandoffCost
from router.policies import POLICIES
from router.policy import Ask, choose
from router.view import ClusterView

RUNNING = 256


def make_cluster(workers: int, seed: int = 0) -> ClusterView:
    """A busy cluster: every pair has been seen, every decode worker has `RUNNING` requests with targets."""
    rng = np.random.default_rng(seed)
    cluster = ClusterView()
    decode = [f"decode-{number}" for number in range(workers // 2)]
    prefill = [f"prefill-{number}" for number in range(workers - len(decode))]
    cluster.set_workers(decode, prefill)
    for book, ids in ((cluster.decode, decode), (cluster.prefill, prefill)):
        for worker_id in ids:
            running = RUNNING if book is cluster.decode else 0
            book.set_usable(worker_id, True)
            book.report(worker_id, running)
            numbers = {
                "running": running,
                "kv_tokens": running * rng.integers(200, 2000),
                "waiting_tokens": rng.integers(0, 4096),
                "max_running": 512,
                "step_tokens": 2048,
                "room": 512,
                "token_bytes": 1 << 17,
                "busy": rng.random(),
            }
            book.tell(worker_id, {name: float(number) for name, number in numbers.items()})
            for _ in range(running):
                book.count_target(worker_id, float(rng.choice([0.03, 0.05, 0.1])), 1)
    for worker_id in decode:
        costs = [HandoffCost(peer, 1e-3 * rng.random(), 1e-10, seen=9) for peer in prefill]
        cluster.told_handoffs(worker_id, costs)
    return cluster


def measure(name: str, workers: int, calls: int) -> tuple[float, float]:
    """Median and 99th percentile of microseconds."""
    cluster = make_cluster(workers)
    rng = np.random.default_rng(1)
    policy = POLICIES[name]
    half = workers // 2
    times = []
    gc.disable()
    for number in range(calls):
        prompt = int(rng.integers(16, 8192))
        ask = Ask(
            prompt,
            prompt - 1,
            256,
            8,
            decode_cached=rng.integers(0, prompt, half),
            prefill_cached=rng.integers(0, prompt, workers - half),
            request_id=str(number),
        )
        begun = time.thread_time()
        choose(policy, ask, cluster.view, 0.0)
        times.append(1e6 * (time.thread_time() - begun))
    gc.enable()
    p50, p99 = np.quantile(times[calls // 10 :], (0.5, 0.99)).tolist()
    return p50, p99


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--calls", type=int, default=2000)
    calls = parser.parse_args().calls
    table = Table(title=f"one decision, {RUNNING} running requests at each decode worker, in us")
    for name in ("policy", "workers", "p50", "p99"):
        table.add_column(name, justify="right")
    for name in POLICIES:
        for workers in (2, 64, 1000):
            p50, p99 = measure(name, workers, calls)
            table.add_row(name, str(workers), f"{p50:.0f}", f"{p99:.0f}")
    Console().print(table)


if __name__ == "__main__":
    main()
