"""Kills and stops workers of a live deployment under load, at named points of a hand-off and at random moments.

`scripts/kill-hunt` runs it. Each answer is compared with the undisturbed one; afterwards every block and slot must be
free or cached. Prompts are the same all the time, under a new `cache_salt` each, so that every one is handed off.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import grpc.aio

from baton.v1 import inference_pb2 as api
from baton.v1 import inference_pb2_grpc
from cluster.config import CHECKOUT
from kvtransfer import failpoints
from tests.support.deployment import Deployment

STREAMS = 16
REPLICAS = 2  # of each role
PROMPTS = 24
ANSWER = 16  # tokens
STOPPED_S = 5.0
STRIKE_S = 30.0  # until an armed point is reached
BACK_S = 60.0  # until a killed worker is there again
REST_S = 60.0
POINTS = [f"prefill.{point}" for point in failpoints.SENDING] + [
    f"decode.{point}" for point in failpoints.RECEIVING
]


@dataclass(slots=True)
class Stream:
    """One request under way."""

    began: float
    prompt: int
    ids: list[int] = field(default_factory=list)
    arrivals: list[float] = field(default_factory=list)
    end: api.Finished | None = None

    def resumed_s(self, struck: float) -> float | None:
        """From the strike until tokens came again; None when it was over, had not begun, or nothing came."""
        if self.began > struck:
            return None
        return next((at - struck for at in self.arrivals if at >= struck), None)


@dataclass(slots=True)
class Strike:
    """`what`: a point, or "random"; `how`: "kill" or "stop"."""

    what: str
    how: str
    at: float
    worker: str


@dataclass(slots=True)
class Report:
    """What came of it all."""

    requests: int = 0
    remote: int = 0  # whose KV was handed off, at least in part
    fell_back: int = 0
    asked_again: int = 0  # refused as UNAVAILABLE, since their decode worker was struck
    lost: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    leaked: list[str] = field(default_factory=list)
    strikes: Counter[str] = field(default_factory=Counter)
    missed: list[str] = field(default_factory=list)
    resumed_s: dict[str, list[float]] = field(default_factory=dict)  # by "how": of the last affected request

    @property
    def good(self) -> bool:
        return not (self.lost or self.wrong or self.leaked or self.missed)

    def lines(self) -> list[str]:
        told = [
            f"{self.requests} requests, {self.remote} handed off, {self.fell_back} fell back, "
            f"{self.asked_again} told to ask again when a decode worker died; "
            f"{len(self.lost)} lost, {len(self.wrong)} wrong, {len(self.leaked)} leaks",
            "strikes: " + ", ".join(f"{name} {times}" for name, times in sorted(self.strikes.items())),
        ]
        for how, seconds in sorted(self.resumed_s.items()):
            if seconds:
                ordered = sorted(seconds)
                p50, p99 = (ordered[min(len(ordered) - 1, int(q * len(ordered)))] for q in (0.5, 0.99))
                told.append(
                    f"{how}: the last affected request streams again after p50 {p50:.2f} s, p99 {p99:.2f} s, "
                    f"most {ordered[-1]:.2f} s ({len(ordered)} strikes that hit a request)"
                )
        for kind, found in (("LOST", self.lost), ("WRONG", self.wrong), ("LEAK", self.leaked)):
            told += [f"{kind}: {each}" for each in found[:10]]
        return told + [f"NEVER REACHED: {each}" for each in self.missed]


class Hunt:
    """Load on a deployment, and strikes at its workers."""

    def __init__(self, deployment: Deployment, points: Path, seed: int) -> None:
        self.deployment = deployment
        self.points = points
        self.random = random.Random(seed)
        self.report = Report()
        self.prompts = [
            [self.random.randrange(3, 256) for _ in range(self.random.randrange(150, 700))]
            for _ in range(PROMPTS)
        ]
        self._right: list[list[int]] = []
        self._streams: list[Stream] = []
        self._strikes: list[Strike] = []
        self._salt = 0
        self._stopping = False

    # ---- load ------------------------------------------------------------------------------------------------------

    async def undisturbed(self) -> None:
        """What the answers must be."""
        for prompt in range(len(self.prompts)):
            stream = Stream(time.monotonic(), prompt)
            await self._ask(stream)
            assert stream.end is not None and len(stream.ids) == ANSWER
            self._right.append(stream.ids)

    @asynccontextmanager
    async def load(self, streams: int = STREAMS) -> AsyncIterator[None]:
        """So many requests at any time; at the end all under way are waited for."""
        self._stopping = False
        tasks = [asyncio.create_task(self._keep_asking()) for _ in range(streams)]
        try:
            yield
        finally:
            self._stopping = True
            await asyncio.gather(*tasks)

    async def _keep_asking(self) -> None:
        while not self._stopping:
            stream = Stream(time.monotonic(), self.random.randrange(len(self.prompts)))
            self._streams.append(stream)
            self.report.requests += 1
            try:
                await self._ask(stream)
            except grpc.aio.AioRpcError as error:
                if self._decode_worker_lost(error):
                    self.report.asked_again += 1
                else:
                    self.report.lost.append(f"{error.code().name}: {error.details()}")
                continue
            if stream.end is None:
                self.report.lost.append("the stream ended without a terminal event")
            elif stream.ids != self._right[stream.prompt]:
                self.report.wrong.append(f"{stream.ids} instead of {self._right[stream.prompt]}")
            else:
                self.report.remote += stream.end.trace.remote_tokens > 0
                self.report.fell_back += bool(stream.end.trace.fallback)

    def _decode_worker_lost(self, error: grpc.aio.AioRpcError) -> bool:
        """The router tells the client to ask again, since the worker with its tokens was struck."""
        struck = any(strike.worker.startswith("decode") for strike in self._strikes)
        return struck and error.code() is grpc.StatusCode.UNAVAILABLE

    async def _ask(self, stream: Stream) -> None:
        self._salt += 1
        request = api.GenerateRequest(
            token_ids=api.TokenIds(ids=self.prompts[stream.prompt]),
            sampling=api.SamplingParams(temperature=0.0, max_tokens=ANSWER, ignore_eos=True),
            cache_salt=f"{os.getpid()}.{self._salt}",
        )
        async for event in self.deployment.stub.Generate(request, timeout=120):
            stream.arrivals.append(time.monotonic())
            if event.HasField("finished"):
                stream.end = event.finished
                return
            stream.ids += event.tokens.ids

    # ---- strikes ---------------------------------------------------------------------------------------------------

    async def at_point(self, point: str, how: str, *, patient: bool = True) -> None:
        """Arms a point; whichever worker comes to it first is struck there. Then waits until all workers are back,
        or, not `patient`, until one of each role is there."""
        armed = self.points / point
        armed.with_suffix(armed.suffix + ".new").write_text(how)
        armed.with_suffix(armed.suffix + ".new").rename(armed)
        until = time.monotonic() + STRIKE_S
        while not (claimed := list(self.points.glob(f"{point}.*.claimed"))):
            if time.monotonic() > until:
                armed.unlink(missing_ok=True)
                self.report.missed.append(f"{point} within {STRIKE_S:g} s")
                return
            await asyncio.sleep(0.002)
        pid = int(claimed[0].name.split(".")[-2])
        claimed[0].unlink()
        self._note(Strike(point, how, time.monotonic(), point.partition(".")[0]))
        if how == "stop":
            await self._go_on(pid)
        await self.whole(pid if how == "kill" else 0, of_each=REPLICAS if patient else 1)

    async def at_random(self, role: str, how: str) -> None:
        """SIGKILL or SIGSTOP at a random moment: of an engine, and half of the kills of a shell."""
        await asyncio.sleep(self.random.uniform(0.0, 0.5))
        workers = await self.deployment.workers()
        victim = workers[self.random.choice(sorted(w for w in workers if w.startswith(role)))]
        pid = victim.engine_pid if how == "stop" else self.random.choice((victim.engine_pid, victim.pid))
        os.kill(pid, signal.SIGSTOP if how == "stop" else signal.SIGKILL)
        self._note(Strike("random", how, time.monotonic(), victim.worker_id))
        if how == "stop":
            await self._go_on(pid)
        await self.whole(pid if how == "kill" else 0)

    def _note(self, strike: Strike) -> None:
        self._strikes.append(strike)
        print(
            f"{time.strftime('%X')} {strike.how} {strike.what} ({strike.worker})", file=sys.stderr, flush=True
        )
        self.report.strikes[f"{strike.what} {strike.how}"] += 1

    async def _go_on(self, pid: int) -> None:
        await asyncio.sleep(STOPPED_S)
        os.kill(pid, signal.SIGCONT)

    async def whole(self, gone: int = 0, of_each: int = REPLICAS) -> None:
        """Until so many workers of each role are alive, can hand off to as many, and are not what was killed."""

        def whole(workers: dict[str, api.WorkerStatus]) -> bool:
            there = Counter(
                w.role
                for w in workers.values()
                if w.alive and gone not in (w.pid, w.engine_pid) and len(w.peers) >= of_each
            )
            return min(there["prefill"], there["decode"]) >= of_each

        async with asyncio.timeout(BACK_S):
            await self.deployment.until(whole)

    # ---- what is left ----------------------------------------------------------------------------------------------

    async def settle(self) -> None:
        """Without load: every block must be free or cached, every slot free, and each engine has looked."""
        ledgers = inference_pb2_grpc.LedgersStub(self.deployment._channel)
        until = time.monotonic() + REST_S
        while True:
            answer = await ledgers.Read(api.LedgerRequest(), timeout=30)
            if not (left := [each for worker in answer.workers for each in _left(worker)]):
                break
            if time.monotonic() > until:
                self.report.leaked += left
                break
            await asyncio.sleep(0.1)
        for strike in self._strikes:
            role = strike.worker.partition("-")[0]
            waits = [
                waited
                for stream in self._streams
                if stream.end is not None
                and (stream.end.trace.fallback or role == "decode")
                and (waited := stream.resumed_s(strike.at)) is not None
            ]
            found = self.report.resumed_s.setdefault(strike.how, [])
            if waits:
                found.append(max(waits))
        self._streams.clear()
        self._strikes.clear()


def _left(worker: api.WorkerLedger) -> list[str]:
    """What is not as it must be at rest."""
    counts, name = worker.counts, worker.worker_id
    if worker.unreachable or worker.broken or not worker.checked:
        return [f"{name}: {worker.unreachable or worker.broken or 'not at rest'}"]
    found = []
    if counts.blocks_free + counts.blocks_cached != counts.blocks_total:
        found.append(f"{name}: {counts.blocks_held} blocks held, {counts.blocks_landing} landing")
    if counts.slots_free != counts.slots_total:
        found.append(f"{name}: {counts.slots_leased} slots leased, {counts.slots_quarantined} quarantined")
    return found


@asynccontextmanager
async def hunting(folder: Path, model: Path, seed: int = 0) -> AsyncIterator[Hunt]:
    """A deployment of two workers of each role whose fail points can be armed, and the right answers."""
    points = folder / "points"
    points.mkdir(parents=True)
    settings = {
        "model.path": model,
        "model.dtype": "float32",  # in bf16 a near-tie may turn with the batch, which is no fault
        "cluster.launcher": "plain",
        "cluster.calibrate_s": 0,
        "cluster.restart_backoff_s": 0.01,
        "cluster.restart_backoff_max_s": 0.02,
        "prefill.replicas": REPLICAS,
        "decode.replicas": REPLICAS,
        "prefill.kv_cache_gib": 0.05,
        "decode.kv_cache_gib": 0.05,
        "router.policy": "threshold",
        "router.local_below_tokens": 1,
        "kvtransfer.chunk_tokens": 64,
        "kvtransfer.handoff_timeout_s": 2.0,
    }
    deployment = Deployment(folder, settings, {failpoints.VARIABLE: str(points)})
    try:
        await deployment.wait_ready()
        hunt = Hunt(deployment, points, seed)
        await hunt.whole()
        await hunt.undisturbed()
        yield hunt
    finally:
        await deployment.close()


async def run(arguments: argparse.Namespace, report: Report) -> None:
    """Every point so often with kill and with stop, and random strikes; at rest after each round."""
    until = time.monotonic() + arguments.seconds if arguments.seconds else float("inf")
    with tempfile.TemporaryDirectory() as folder:
        async with hunting(Path(folder), arguments.model, arguments.seed) as hunt:
            hunt.report = report
            rounds = _rounds(arguments)
            for number, strikes in enumerate(rounds, 1):
                if time.monotonic() > until:
                    hunt.report.missed.append(f"{len(rounds) - number + 1} of {len(rounds)} rounds: no time")
                    break
                async with hunt.load():
                    for what, how in strikes:
                        if what in POINTS:
                            await hunt.at_point(what, how)
                        else:
                            await hunt.at_random(what, how)
                await hunt.settle()
                print(f"round {number} of {len(rounds)}: {hunt.report.lines()[0]}", flush=True)


def _rounds(arguments: argparse.Namespace) -> list[Sequence[tuple[str, str]]]:
    """Each point once a round, and its share of the random strikes."""
    count = max(1, arguments.each)
    rounds: list[Sequence[tuple[str, str]]] = []
    for number in range(count):
        strikes = [(point, "kill") for point in POINTS] if arguments.each else []
        strikes += [("prefill", "kill")] * len(range(number, arguments.kills, count))
        strikes += [(POINTS[each % len(POINTS)], "stop") for each in range(number, arguments.stops, count)]
        random.Random(f"{arguments.seed}.{number}").shuffle(strikes)
        rounds.append(strikes)
    return rounds


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/kill-hunt", description=__doc__)
    parser.add_argument("--each", type=int, default=20, help="kills at each fail point")
    parser.add_argument("--kills", type=int, default=200, help="kills of prefill workers at random moments")
    parser.add_argument("--stops", type=int, default=20, help="SIGSTOP for 5 s at fail points, in turn")
    parser.add_argument("--seconds", type=float, help="no new round after so long")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", type=Path, default=CHECKOUT / "models" / "baton-demo")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    report = Report()
    try:
        asyncio.run(run(parser.parse_args(), report))
    except KeyboardInterrupt:
        report.missed.append("the rest: stopped")
    print("\n".join(report.lines()))
    return 0 if report.good else 1


if __name__ == "__main__":
    sys.exit(main())
