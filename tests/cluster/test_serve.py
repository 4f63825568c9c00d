"""`baton serve` with the real workers and router: it starts, answers, stops, and leaves no process."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from cluster.config import CHECKOUT
from tests.cluster.helpers import LIMIT_S, eventually
from tests.support.deployment import TINY, Deployment

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(not TINY.is_dir(), reason="the tiny model is not in this checkout"),
]
launchers = pytest.mark.parametrize(
    "launcher", ["plain", pytest.param("ray", marks=[pytest.mark.ray, pytest.mark.slow])]
)


COMMAND = [sys.executable, "-m", "cluster.cli"]


def call(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *arguments], capture_output=True, text=True, timeout=LIMIT_S, check=False, cwd=CHECKOUT
    )


class Baton(Deployment):
    """The command line against one deployment."""

    async def call(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return await asyncio.to_thread(call, *arguments, "--grpc", self.grpc)

    async def status(self) -> dict[str, Any]:
        answer: dict[str, Any] = json.loads((await self.call("status", "--json")).stdout)
        return answer


@asynccontextmanager
async def served(folder: Path, launcher: str) -> AsyncIterator[Baton]:
    settings = {
        "cluster.launcher": launcher,
        "router.policy": "always-remote",
        "prefill.kv_cache_gib": 0.03125,
        "decode.kv_cache_gib": 0.03125,
    }
    baton = Baton(folder, settings)
    try:
        await baton.wait_ready()
        yield baton
    finally:
        await baton.close()


@launchers
async def test_it_starts_answers_and_stops(tmp_path: Path, launcher: str) -> None:
    async with served(tmp_path, launcher) as baton:
        answer = await baton.call(
            "generate", "one two three " * 20, "--max-tokens", "8", "--temperature", "0"
        )
        assert answer.returncode == 0, answer.stderr
        line = answer.stderr.strip().splitlines()[-1]
        assert re.fullmatch(
            r"\[prefilled remote on prefill-0, \d+ tokens handed to decode-0 in \d+ ms; \d+ \+ \d+ tokens, "
            r"ended by \w+; TTFT \d+ ms, ITL [\d.]+ ms, [\d.]+ tokens/s\]",
            line,
        ), line
        chat = await baton.call("generate", "--chat", "hi", "--max-tokens", "4", "--http", baton.http)
        assert chat.returncode == 0 and "tokens" in chat.stderr, chat.stderr
        status = await baton.status()
        assert status["ready"] and {worker["worker_id"] for worker in status["workers"]} == {
            "prefill-0",
            "decode-0",
        }
        table = await baton.call("status", "--ledger")
        assert table.returncode == 0 and table.stdout.count(" ok") == 2, table.stdout
        assert table.stdout.count("checked") == 2, table.stdout
        baton.process.send_signal(signal.SIGTERM)
        begun = time.monotonic()
        await eventually(lambda: baton.process.poll() is not None, "baton serve ends")
        assert time.monotonic() - begun < 10 and baton.process.returncode == 0, baton.errors.read_text()
        assert "***" not in baton.errors.read_text(), "Ray printed a stack for SIGTERM"
        await eventually(lambda: not baton.left(), "nothing is left")


@launchers
async def test_a_killed_worker_comes_back_and_a_killed_supervisor_leaves_nothing(
    tmp_path: Path, launcher: str
) -> None:
    async with served(tmp_path, launcher) as baton:
        before = {worker["worker_id"]: worker for worker in (await baton.status())["workers"]}
        os.kill(before["decode-0"]["pid"], signal.SIGKILL)
        deadline = time.monotonic() + LIMIT_S
        while True:
            now = {worker["worker_id"]: worker for worker in (await baton.status())["workers"]}
            decode = now.get("decode-0")
            if decode and decode["incarnation"] != before["decode-0"]["incarnation"] and decode["alive"]:
                break
            assert time.monotonic() < deadline, baton.errors.read_text()
        answer = await baton.call("generate", "again " * 30, "--max-tokens", "4")
        assert answer.returncode == 0 and "remote on prefill-0" in answer.stderr, answer.stderr
        baton.process.kill()
        await eventually(lambda: not baton.left(), "nothing is left")


def test_without_a_deployment_the_commands_say_so() -> None:
    for command in (["status"], ["generate", "hi"]):
        answer = call(*command, "--grpc", "127.0.0.1:9")
        assert answer.returncode == 1
        assert "nothing listens on 127.0.0.1:9; start `baton serve`" in answer.stderr


def test_a_bad_configuration_is_one_line_and_status_2() -> None:
    answer = call("serve", "--set", "decode.replcas=2")
    assert answer.returncode == 2 and answer.stdout == ""
    assert answer.stderr == "baton: defaults: decode.replcas = 2: unknown key; did you mean 'replicas'?\n"
