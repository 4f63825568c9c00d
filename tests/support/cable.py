"""Two "hosts" with a decode worker on one and a prefill worker on the other, whose cable is cut, slow or lossy.

`scripts/cut-links` runs it, as root. Outside somebody has the cable in hand; inside the decode worker's host a client
asks, compares every answer with the one that was computed there, and waits until every block and slot is free again.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec

from cluster.config import CHECKOUT
from tests.support import hosts
from tests.support.hosts import Host
from tests.support.workers import TOKEN, Answer, DecodeClient, Worker, introduced, start_worker
from worker.spec import Started, WorkerSpec

TINY = CHECKOUT / "models" / "baton-tiny"
PROMPTS, ANSWER = 8, 12
SETTINGS: dict[str, Any] = {"chunk_tokens": 32, "kv_cache_bytes": 32 << 20, "transport": "nixl"}
DEADLINE_S = 2.0  # of a hand-off
CUT_S = (0.2, 4.0)
REST_S = 90.0  # after a cut: TCP tries again at longer and longer intervals
WEATHERS = {"slow": ["delay", "50ms"], "narrow": ["rate", "100mbit"], "lossy": ["loss", "1%"]}


# ---- inside the decode worker's host -------------------------------------------------------------------------------


async def inside(ip: str, peer: str, rounds: int, kinds: list[str]) -> None:
    """Says what to do with the cable on standard output, and in the end what came of it."""
    spec, started = msgspec.json.decode(peer, type=tuple[WorkerSpec, Started])
    process: Any = None  # the other host's to end
    prefill = Worker(spec, started, process)
    decode = await start_worker(
        "decode", TINY, bind_host=ip, advertise_host=ip, handoff_timeout_s=DEADLINE_S, **SETTINGS
    )
    try:
        async with DecodeClient(decode) as client:
            await introduced(decode, client, [prefill])
            told = await _rounds(client, rounds, kinds)
            print(json.dumps(told), flush=True)
    finally:
        await decode.stop()


async def _rounds(client: DecodeClient, rounds: int, kinds: list[str]) -> dict[str, Any]:
    draw = random.Random(3)
    prompts = [[draw.randrange(1, 250) for _ in range(draw.randrange(300, 900))] for _ in range(PROMPTS)]
    right = [(await client.ask(prompt, tokens=ANSWER, salt="right")).ids for prompt in prompts]
    count: Counter[str] = Counter()
    slowest_s = 0.0
    for number, kind in enumerate(kinds * rounds):
        verified = (await client.describe()).counters["chunks_verified"]
        keys = [
            await client.submit(prompt, prefill="prefill-0", tokens=ANSWER, salt=f"{number}")
            for prompt in prompts
        ]
        if kind == "cut":  # in the middle: some chunks have come, more are on their way
            await client.until(lambda status, before=verified: status.counters["chunks_verified"] > before)
        began = time.monotonic()
        if kind == "cut":
            await _hands("cut")
            await asyncio.sleep(draw.uniform(*CUT_S))
            await _hands("mend")
        answers = [await asyncio.wait_for(asyncio.shield(client._ended[key]), REST_S) for key in keys]
        slowest_s = max(slowest_s, time.monotonic() - began)
        _count(count, kind, answers, right)
        await client.until(_rests, timeout_s=REST_S)
        held = await client.ledger()
        count["broken"] += bool(held.broken or not held.checked or held.leases)
        if kind == "cut":  # hand-offs go on over the mended cable
            await client.until(lambda status: bool(status.peers), timeout_s=REST_S)
    return {**count, "slowest_s": round(slowest_s, 2)}


def _count(count: Counter[str], kind: str, answers: list[Answer], right: list[list[int]]) -> None:
    for answer, ids in zip(answers, right, strict=True):
        assert answer.end is not None
        count["requests"] += 1
        count["wrong"] += answer.ids != ids or answer.end.reason not in ("length", "stop")
        count[f"{kind}: {answer.trace.prefilled}"] += 1


def _rests(status: Any) -> bool:
    counts = status.ledger
    return (
        not (status.running or status.waiting or status.handoffs)
        and counts.blocks_free + counts.blocks_cached == counts.blocks_total
        and counts.slots_free == counts.slots_total
    )


async def _hands(what: str) -> None:
    """Asks for it and waits until it is done."""
    print(what, flush=True)
    line = await asyncio.to_thread(sys.stdin.readline)
    assert line == "done\n", "nobody is at the cable"


# ---- outside ---------------------------------------------------------------------------------------------------------


def run(rounds: int, kinds: list[str]) -> dict[str, Any]:
    """`rounds` of each kind: "calm", "cut", or one of `WEATHERS`. Removes all that it made, whatever happens."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("UCX_", "BATON_"))}
    with (
        tempfile.TemporaryDirectory(prefix="bt-") as folder,
        hosts.two_hosts({**clean, "PYTHONPATH": str(CHECKOUT), "HOME": folder}) as (near, far),
    ):
        prefill, spec, started = _start_prefill(far, Path(folder))
        try:
            told: dict[str, Any] = {}
            peer = msgspec.json.encode((spec, started)).decode()
            weathers = [kind for kind in kinds if kind in WEATHERS]
            plain = [kind for kind in kinds if kind not in WEATHERS]
            for weather in ["", *weathers] if plain else weathers:
                chosen = [weather] if weather else plain
                if weather and not _weather(far, weather):
                    told[f"{weather}: this kernel has no netem"] = 1
                    continue
                found = _ask(near, far, peer, rounds, chosen)
                slowest_s = max(told.get("slowest_s", 0.0), found.pop("slowest_s"))
                for name, number in found.items():
                    told[name] = told.get(name, 0) + number
                told["slowest_s"] = slowest_s
                if weather:
                    _tc(far, "del")
            return told
        finally:
            assert prefill.stdin is not None and prefill.stdout is not None
            prefill.stdin.close()
            prefill.stdout.close()
            prefill.wait(30)


def _start_prefill(host: Host, folder: Path) -> tuple[subprocess.Popen[str], WorkerSpec, Started]:
    spec = WorkerSpec(
        role="prefill",
        worker_id="prefill-0",
        incarnation=str(uuid.uuid4()),
        token=TOKEN,
        model_path=str(TINY),
        bind_host=host.ip,
        advertise_host=host.ip,
        max_batch_tokens=64,
        **SETTINGS,
    )
    with (folder / "prefill.txt").open("w") as errors:
        process = subprocess.Popen(
            host.command([sys.executable, "-m", "prefill"]),
            env=host.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(msgspec.json.encode(spec).decode() + "\n")
    process.stdin.flush()
    line = process.stdout.readline()
    assert line, (folder / "prefill.txt").read_text()
    return process, spec, msgspec.json.decode(line, type=Started)


def _ask(near: Host, far: Host, peer: str, rounds: int, kinds: list[str]) -> dict[str, Any]:
    """Runs `inside` on its host and does with the cable what it asks for."""
    program = [sys.executable, "-m", "tests.support.cable", "inside", near.ip, peer, str(rounds), *kinds]
    process = subprocess.Popen(
        near.command(program), env=near.environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None and process.stdout is not None
    try:
        for line in process.stdout:
            if line.startswith("{"):
                found: dict[str, Any] = json.loads(line)
                return found
            if line in ("cut\n", "mend\n"):
                (far.cut if line == "cut\n" else far.mend)()
                process.stdin.write("done\n")
                process.stdin.flush()
        raise AssertionError("it ended without an answer; see above")
    finally:
        process.stdin.close()
        process.stdout.close()
        process.wait(60)


def _weather(host: Host, kind: str) -> bool:
    """False where the kernel has no netem."""
    return _tc(host, "add", "netem", *WEATHERS[kind])


def _tc(host: Host, verb: str, *how: str) -> bool:
    command = ["tc", "-netns", host.name, "qdisc", verb, "dev", host.name, "root", *how]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def main() -> int:
    if sys.argv[1:2] == ["inside"]:
        ip, peer, rounds, *kinds = sys.argv[2:]
        asyncio.run(inside(ip, peer, int(rounds), kinds))
        return 0
    parser = argparse.ArgumentParser(prog="scripts/cut-links", description=__doc__)
    parser.add_argument("--rounds", type=int, default=10, help="of each kind, with 8 hand-offs each")
    parser.add_argument("--kinds", nargs="+", choices=["calm", "cut", *WEATHERS], default=["cut", *WEATHERS])
    arguments = parser.parse_args()
    if reason := hosts.missing():
        print(f"skipped: {reason}")
        return 0
    told = run(arguments.rounds, arguments.kinds)
    for name, number in sorted(told.items()):
        print(f"{name}: {number}")
    return 1 if told.get("wrong") or told.get("broken") else 0


if __name__ == "__main__":
    sys.exit(main())
