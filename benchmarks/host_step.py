"""What one decode step costs the host, with the forward pass stubbed: scheduling, booking, outputs.

    python benchmarks/host_step.py

For 1, 64 and 512 running sequences: microseconds a step and a sequence. The second figure is what must stay flat: a
step costs what its sequences weigh. "with idle" adds 500 waiting requests, a prefix cache of 50,000 blocks and 40 past
sessions, which must change nothing.
"""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path

import msgspec
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from decode.role import DecodeRole
from engine.api import RequestKey, SamplingParams, Submit
from engine.ledger import BlockLedger, SlotLedger
from engine.plan import StepResult
from engine.scheduler import Limits
from kvtransfer.messages import Hello, KvSpec
from worker.loop import KV_BATCH

STEPS = 300
PROMPT = 128


def make_role(running: int, *, idle: bool) -> DecodeRole:
    """A role with `running` sequences decoding."""
    kv = KvSpec(
        model="",
        layers=1,
        q_heads=1,
        kv_heads=1,
        head_dim=1,
        dtype="float32",
        block_size=16,
        chunk_tokens=256,
    )
    hello = Hello(worker_id="d", incarnation="d", kv=kv, transport="", endpoints=[])
    ledger = BlockLedger(100_000, 16)
    limits = Limits(max(2048, running), running)
    role = DecodeRole(hello, ledger, SlotLedger(0), limits, max_waiting=10_000)
    if idle:
        blocks = ledger.take(50_000)
        assert blocks is not None
        for block in blocks:
            ledger.publish(block, block.to_bytes(16, "little"))
        ledger.release(blocks)
    for number in range(running + (500 if idle else 0)):
        prompt = [number] * PROMPT
        sampling = SamplingParams(temperature=0, max_tokens=100_000)
        key = RequestKey(number % 41, number)
        # A waiting request must not fit, or it would run: there is no place beside `running`.
        role.handle(Submit(request=key, request_id=str(number), prompt=prompt, sampling=sampling), 0.0)
    while role.scheduler.running < running or any(s.remaining != 1 for s in role.scheduler._running):
        step(role)
    return role


def step(role: DecodeRole) -> None:
    """One turn of the step loop without its I/O; the output is encoded as the ring would."""
    role.tick(0.0)
    plan = role.schedule(0.0)
    assert plan is not None
    role.commit(plan, StepResult([5] * len(plan.rows)), 0.0)
    msgspec.msgpack.encode(role.drain())
    msgspec.msgpack.encode(role.kv_events(KV_BATCH))


def measure(running: int, *, idle: bool) -> float:
    """Median microseconds of one step."""
    role = make_role(running, idle=idle)
    times = []
    for _ in range(STEPS):
        begun = time.perf_counter()
        step(role)
        times.append(1e6 * (time.perf_counter() - begun))
    return statistics.median(times)


def main() -> None:
    table = Table(title="host time of one decode step, forward stubbed")
    for name in ("sequences", "us a step", "us a sequence", "us a step, with idle", "ratio"):
        table.add_column(name, justify="right")
    for running in (1, 64, 512):
        plain, idle = measure(running, idle=False), measure(running, idle=True)
        table.add_row(
            str(running), f"{plain:.0f}", f"{plain / running:.2f}", f"{idle:.0f}", f"{idle / plain:.2f}"
        )
    Console().print(table)


if __name__ == "__main__":
    main()
