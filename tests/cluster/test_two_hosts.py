"""A deployment over two "hosts", set up by scripts/cluster/up.sh, with the KV crossing the cable between them.

The hosts are namespaces of this machine; see `tests.support.hosts`. Nothing but their cable carries any traffic.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from cluster.config import CHECKOUT
from engine.api import SamplingParams
from tests.cluster.helpers import eventually
from tests.support import hosts
from tests.support.hosts import Host
from tests.support.local_engine import LocalEngine

TINY = CHECKOUT / "models" / "baton-tiny"
UP = str(CHECKOUT / "scripts" / "cluster" / "up.sh")
DOWN = str(CHECKOUT / "scripts" / "cluster" / "down.sh")
UP_S = 120.0
PORT = 26379
TOKENS = 12

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.nixl, pytest.mark.e2e, pytest.mark.timeout(400)]


@pytest.fixture
def pair() -> Iterator[tuple[Host, Host]]:
    """Two hosts without anything on them but this checkout and its environment."""
    reason = hosts.missing()
    if reason:
        pytest.skip(f"two hosts: {reason}")
    clean = {
        name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "UCX_", "BATON_"))
    }
    with (
        # Short, because Ray puts sockets below it.
        tempfile.TemporaryDirectory(prefix="bt-", dir="/tmp", ignore_cleanup_errors=True) as name,
        hosts.two_hosts({**clean, "BATON_VENV": sys.prefix, "RAY_AUTH_MODE": "token"}) as pair,
    ):
        for host, letter in zip(pair, "ab", strict=True):
            folder = Path(name, letter)
            folder.mkdir()
            host.environment |= {
                "HOME": str(folder),
                "TMPDIR": str(folder),
                "RAY_TMPDIR": str(folder),
                "BATON_CLUSTER_DIR": str(folder / "node"),
                "PYTHONPATH": str(CHECKOUT),
            }
        yield pair


def bring_up(pair: tuple[Host, Host], roles: tuple[str, str]) -> str:
    """Both machines as docs/cluster.md says; the one resource that each has is named after its role."""
    head, other = pair
    told = head.run(
        UP,
        "head",
        f"--port={PORT}",
        *node_arguments(head, roles[0]),
        "--include-dashboard=false",
        timeout_s=UP_S,
    )
    join = re.search(r"scripts/cluster/up\.sh join (\S+)$", told, re.MULTILINE)
    assert join and join[1] == f"{head.ip}:{PORT}", told
    # Without the token nobody joins; the operator copies it.
    with pytest.raises(AssertionError, match="no token at"):
        other.run(UP, "join", join[1], timeout_s=UP_S)
    token = Path(".ray/auth_token")
    copied = Path(other.environment["HOME"]) / token
    copied.parent.mkdir(mode=0o700)
    shutil.copy(Path(head.environment["HOME"]) / token, copied)
    other.run(UP, "join", join[1], *node_arguments(other, roles[1]), timeout_s=UP_S)
    return join[1]


def node_arguments(host: Host, role: str) -> list[str]:
    ray = ["--num-cpus=1", f"--resources={json.dumps({role: 1})}", "--object-store-memory=80000000"]
    return ["--ip", host.ip, "--", *ray]


@asynccontextmanager
async def served(
    host: Host, address: str, errors: Path, *more: str
) -> AsyncIterator[tuple[subprocess.Popen[bytes], str]]:
    """`baton serve --address` on that host, prefill on one and decode on the other; yields its gRPC door."""
    settings = [
        f"model.path={TINY}",
        "prefill.resources={prefill: 1}", "decode.resources={decode: 1}",
        "prefill.kv_cache_gib=0.03125", "decode.kv_cache_gib=0.03125",
        "router.http=0.0.0.0:0", "router.grpc=0.0.0.0:0", "router.policy=always-remote",
        "kvtransfer.transport=nixl",
    ]  # fmt: skip
    command = [sys.executable, "-m", "cluster.cli", "serve", "--address", address]
    with errors.open("wb") as sink:
        process = subprocess.Popen(
            host.command([*command, *(f"--set={setting}" for setting in [*settings, *more])]),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=sink,
            env=host.environment,
        )
    try:
        assert process.stdout is not None
        line = (await asyncio.to_thread(process.stdout.readline)).decode()
        ready = re.fullmatch(r"baton ready http=(\S+):\d+ grpc=((\S+):\d+)\n", line)
        assert ready, errors.read_text()
        assert ready[1] == ready[3] == host.ip
        yield process, ready[2]
    finally:
        if pid := host.inside(process):
            os.kill(pid, signal.SIGKILL)
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def ask(host: Host, *arguments: str, stdin: str = "") -> Any:
    command = host.command([sys.executable, "-m", "tests.support.ask", *arguments])
    done = subprocess.run(
        command, env=host.environment, input=stdin, capture_output=True, text=True, timeout=90, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def draw_prompts(seed: int, *lengths: int) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(1, 250) for _ in range(length)] for length in lengths]


def answer_locally(prompts: list[list[int]]) -> list[list[int]]:
    greedy = SamplingParams(temperature=0.0, max_tokens=TOKENS)
    return LocalEngine(TINY).generate([(prompt, greedy) for prompt in prompts])


async def test_kv_crosses_the_cable(pair: tuple[Host, Host], tmp_path: Path) -> None:
    head, other = pair
    address = await asyncio.to_thread(bring_up, pair, ("prefill", "decode"))
    prompts = draw_prompts(7, 333, 700, 480, 64, 901, 350)
    local = answer_locally(prompts)
    async with served(head, address, tmp_path / "stderr.txt") as (process, door):
        workers = {worker["worker_id"]: worker for worker in ask(head, door, "status")["workers"]}
        where = {name: worker["address"].partition(":")[0] for name, worker in workers.items()}
        assert where == {"prefill-0": head.ip, "decode-0": other.ip}
        assert {worker["transport"] for worker in workers.values()} == {"nixl/UCX"}
        before = other.received_bytes()
        answers = ask(head, door, "generate", str(TOKENS), stdin=json.dumps(prompts))
        crossed = other.received_bytes() - before
        assert [answer["prefilled"] for answer in answers] == ["remote"] * len(prompts), answers
        assert [answer["tokens"] for answer in answers] == local
        handed = sum(answer["handoff_bytes"] for answer in answers)
        print(f"{handed} bytes handed off, {crossed} bytes over the cable, ms for each hand-off: "
              f"{[round(1000 * answer['handoff_s']) for answer in answers]}")  # fmt: skip
        assert handed > 2000 * sum(map(len, prompts)) and handed < crossed < 2 * handed
        await stop(process, tmp_path / "stderr.txt")
    for host in pair:
        await asyncio.to_thread(host.run, DOWN, timeout_s=UP_S)
    await eventually(lambda: not any(host.processes() for host in pair), "both hosts are empty")


async def stop(process: subprocess.Popen[bytes], errors: Path) -> None:
    os.kill(Host.inside(process), signal.SIGTERM)
    await eventually(lambda: process.poll() is not None, "baton serve ends")
    assert process.returncode == 0, errors.read_text()


async def test_a_cut_cable_costs_time_and_no_token(pair: tuple[Host, Host], tmp_path: Path) -> None:
    """The prefill host vanishes and comes back: prompts are prefilled locally, then its keeper brings its node back."""
    head, other = pair
    address = await asyncio.to_thread(bring_up, pair, ("decode", "prefill"))
    prompts = draw_prompts(8, 500, 700, 300)
    local = answer_locally(prompts)

    def answers(*chosen: int) -> list[dict[str, Any]]:
        told: list[dict[str, Any]] = ask(
            head, door, "generate", str(TOKENS), stdin=json.dumps([prompts[index] for index in chosen])
        )
        assert [answer["tokens"] for answer in told] == [local[index] for index in chosen]
        return told

    settings = ["kvtransfer.handoff_timeout_s=3", "cluster.start_timeout_s=60"]
    async with served(head, address, tmp_path / "stderr.txt", *settings) as (process, door):
        assert answers(0)[0]["prefilled"] == "remote"
        other.cut()
        cut_at = time.monotonic()
        assert answers(1)[0]["prefilled"] in ("local", "mixed")
        first_s = time.monotonic() - cut_at
        await eventually(
            lambda: "prefill-0 actor lost" in (tmp_path / "stderr.txt").read_text(), "Ray noticed", 60
        )
        noticed_s = time.monotonic() - cut_at
        other.mend()
        mended_at = time.monotonic()

        def back() -> bool:
            workers = ask(head, door, "status")["workers"]
            return any(worker["worker_id"] == "prefill-0" and worker.get("alive") for worker in workers)

        await eventually(back, "the prefill worker is back", 150)
        back_s = time.monotonic() - mended_at
        assert answers(2)[0]["prefilled"] == "remote"
        print(
            f"first answer after the cut {first_s:.1f} s, Ray noticed in {noticed_s:.1f} s, back {back_s:.1f} s later"
        )
        await stop(process, tmp_path / "stderr.txt")
