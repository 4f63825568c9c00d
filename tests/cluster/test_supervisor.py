"""The supervisor with fake workers: it gets ready, replaces what dies, gives up on what cannot start, leaves none."""

from __future__ import annotations

import asyncio
import io
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from baton import rpc
from baton.v1 import inference_pb2, inference_pb2_grpc
from cluster import guard, specs
from cluster.backoff import Backoff
from cluster.config import from_tree
from cluster.launchers import PlainLauncher
from cluster.membership import Membership
from cluster.report import Report
from cluster.supervisor import Supervisor, SupervisorError
from router.spec import RouterStarted
from tests.cluster import fakes
from tests.cluster.helpers import LIMIT_S, carrying, clear_away, eventually, make_model, members, running
from worker.spec import Started

# ---- pure parts ------------------------------------------------------------------------------------------------


def test_the_pause_doubles_is_bounded_and_starts_again_after_a_long_life() -> None:
    backoff = Backoff(first_s=0.5, most_s=3.0, reset_s=60.0)
    assert [backoff.after(1.0) for _ in range(5)] == [0.5, 1.0, 2.0, 3.0, 3.0]
    assert backoff.after(60.0) == 0.5
    assert backoff.after(59.0) == 1.0


def started(worker_id: str, incarnation: str) -> Started:
    return Started(
        worker_id=worker_id, role="decode", incarnation=incarnation, address="a:1", pid=1, engine_pids=[2]
    )


async def test_membership_versions_grow_and_an_old_life_cannot_remove_the_new_one() -> None:
    membership = Membership()
    versions = [membership.version]
    membership.join(started("decode-0", "old"))
    versions.append(membership.version)
    membership.join(started("decode-0", "new"))
    membership.leave(started("decode-0", "old"))
    versions.append(membership.version)
    assert [member.incarnation for member in membership.message().members] == ["new"]
    membership.leave(started("decode-0", "new"))
    versions.append(membership.version)
    assert not membership.message().members
    assert versions == sorted(set(versions))


async def test_a_change_wakes_who_waits_for_it() -> None:
    membership = Membership()
    waiting = asyncio.create_task(membership.changed_since(membership.version, LIMIT_S))
    await asyncio.sleep(0)
    membership.join(started("decode-0", "x"))
    await asyncio.wait_for(waiting, 1)


# ---- a deployment in this process --------------------------------------------------------------------------------


class Deployment:
    """A running supervisor and what it said."""

    def __init__(self, folder: Path, *, routers: int = 1, **cluster: object) -> None:
        self.folder = make_model(folder / "model")
        self.mark = uuid.uuid4().hex
        fast = {
            "launcher": "plain",
            "restart_backoff_s": 0.05,
            "stop_timeout_s": 5.0,
            "start_timeout_s": 30.0,
        }
        config = from_tree(
            {
                "model": {"path": str(self.folder)},
                "prefill": {"replicas": 2},
                "router": {"grpc": "127.0.0.1:0", "replicas": routers},
                "cluster": fast | cluster,
            },
            "test",
        )
        facts = specs.model_config(config)
        self.supervisor = Supervisor(
            config.cluster,
            specs.seats(config, facts, "secret"),
            specs.router_specs(config, facts, "secret"),
            PlainLauncher(fakes.COMMANDS, log_dir=folder, start_timeout_s=30.0, mark=self.mark),
            log_dir=folder,
            mark=self.mark,
            report=Report(Console(file=io.StringIO(), width=200)),
            router_command=fakes.ROUTER,
        )
        self.stop = asyncio.Event()
        self.ready: asyncio.Future[list[RouterStarted]] = asyncio.get_running_loop().create_future()

    async def run(self) -> None:
        await self.supervisor.run(self.stop, self.ready.set_result)

    def pids(self) -> dict[str, int]:
        """Shell processes by worker, from /proc: fakes are told apart by their log files."""
        found = {}
        for handle in self.supervisor._handles:
            found[handle.started.worker_id] = handle.started.pid
        return found


@asynccontextmanager
async def deployed(folder: Path, *, routers: int = 1, **cluster: object) -> AsyncIterator[Deployment]:
    deployment = Deployment(folder, routers=routers, **cluster)
    run = asyncio.create_task(deployment.run())
    try:
        either: set[asyncio.Future[Any]] = {run, deployment.ready}
        done, _ = await asyncio.wait(either, timeout=LIMIT_S, return_when=asyncio.FIRST_COMPLETED)
        assert done, "neither ready nor failed"
        if run in done:
            run.result()
        yield deployment
        deployment.stop.set()
        await asyncio.wait_for(run, LIMIT_S)
        assert guard.marked(deployment.mark) == []
    finally:
        run.cancel()
        await asyncio.gather(run, return_exceptions=True)
        guard.sweep(deployment.mark)


async def test_ready_means_linked_and_everybody_knows_everybody(tmp_path: Path) -> None:
    async with deployed(tmp_path) as deployment:
        told = members(deployment.folder, "decode-0")["members"]
        assert set(told) == {"prefill-0", "prefill-1", "decode-0"}
        assert set(deployment.supervisor._peers) == {told["decode-0"]}
        await eventually(
            lambda: members(deployment.folder, "router")["members"] == told, "the router knows the same"
        )
        async with rpc.channel(deployment.ready.result()[0].grpc) as channel:
            status = await inference_pb2_grpc.InferenceStub(channel).Status(
                inference_pb2.StatusRequest(), timeout=10
            )
        assert status.ready
    assert (deployment.folder / "stopped-decode-0").exists(), "workers are asked before they are killed"


async def test_not_ready_while_a_pair_is_not_linked(tmp_path: Path) -> None:
    make_model(tmp_path / "model")
    (tmp_path / "model" / "unlinked-decode-0").touch()
    with pytest.raises(
        SupervisorError, match=r"not ready within 3 s.*decode-0 is not linked with prefill-\d, prefill-\d"
    ):
        async with deployed(tmp_path, start_timeout_s=3.0):
            pytest.fail("it said that it was ready")


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
async def test_a_lost_worker_is_replaced_by_a_new_incarnation(tmp_path: Path, how: signal.Signals) -> None:
    """Killed, or frozen so that only its silence shows."""
    async with deployed(tmp_path, silence_s=0.5) as deployment:
        before = members(deployment.folder, "router")
        pid = deployment.pids()["prefill-1"]
        os.kill(pid, how)

        def replaced() -> bool:
            now = members(deployment.folder, "router")["members"].get("prefill-1")
            return now not in (None, before["members"]["prefill-1"])

        await eventually(replaced, "the router knows a new incarnation")
        after = members(deployment.folder, "router")
        assert after["version"] >= before["version"] + 2, "it left before it came back"
        assert set(before["restarts"].values()) == {0}
        assert after["restarts"] == {**before["restarts"], "prefill-1": 1}
        assert after["members"]["decode-0"] == before["members"]["decode-0"]
        await eventually(lambda: members(deployment.folder, "decode-0") == after, "so does the decode worker")
        assert not running(pid)


async def test_a_dead_worker_leaves_the_members_before_it_is_replaced(tmp_path: Path) -> None:
    async with deployed(tmp_path, restart_backoff_s=LIMIT_S, restart_backoff_max_s=LIMIT_S) as deployment:
        os.kill(deployment.pids()["decode-0"], signal.SIGKILL)
        await eventually(
            lambda: set(members(deployment.folder, "router")["members"]) == {"prefill-0", "prefill-1"},
            "the router knows of the death while the worker waits for its next life",
        )


async def test_a_dead_router_comes_back_at_the_same_address_and_is_told_the_members(tmp_path: Path) -> None:
    async with deployed(tmp_path) as deployment:
        (router,) = deployment.supervisor._routers
        (started,) = deployment.ready.result()
        expected = members(deployment.folder, "router")["members"]
        (deployment.folder / "members-router.json").unlink()
        assert router.child is not None
        router.child.kill_now()
        await eventually(
            lambda: members(deployment.folder, "router")["members"] == expected, "the new one was told"
        )
        assert router.started is not None and router.started.grpc == started.grpc


async def test_routers_side_by_side_are_each_told_the_members_and_live_by_themselves(tmp_path: Path) -> None:
    async with deployed(tmp_path, routers=2) as deployment:
        first, second = deployment.supervisor._routers
        told = members(deployment.folder, "router")["members"]
        assert members(deployment.folder, "router-1")["members"] == told and len(told) == 3
        started = deployment.ready.result()
        assert [router.started for router in (first, second)] == started
        assert len({router.grpc for router in started}) == 2
        assert [(tmp_path / f"router-{index}.log").exists() for index in range(2)] == [True, True]
        (deployment.folder / "members-router-1.json").unlink()
        assert second.child is not None
        second.child.kill_now()
        await eventually(
            lambda: members(deployment.folder, "router-1")["members"] == told, "the new one was told"
        )
        assert second.started is not None and second.started.grpc == started[1].grpc
        assert first.started == started[0]


@pytest.mark.parametrize(
    ("who", "words"),
    [("decode-0", "no weights for decode-0"), ("router", "no router today")],
)
async def test_a_crash_loop_at_the_start_is_an_error_with_the_log(
    tmp_path: Path, who: str, words: str
) -> None:
    make_model(tmp_path / "model")
    (tmp_path / "model" / f"crash-{who}").touch()
    with pytest.raises(SupervisorError, match=f"(?s){who} exited with status 1.*{words}.*attempt 2 of 2"):
        async with deployed(tmp_path):
            pytest.fail("it said that it was ready")


async def test_a_crash_loop_later_is_tried_again_until_it_mends(tmp_path: Path) -> None:
    async with deployed(tmp_path, restart_backoff_max_s=0.1) as deployment:
        fault = deployment.folder / "crash-prefill-0"
        fault.touch()
        old = members(deployment.folder, "router")["members"]["prefill-0"]
        os.kill(deployment.pids()["prefill-0"], signal.SIGKILL)
        log = tmp_path / "prefill-0.log"
        await eventually(
            lambda: log.exists() and log.read_text().count("no weights") >= 6, "more lives than at start"
        )
        fault.unlink()
        await eventually(
            lambda: members(deployment.folder, "router")["members"].get("prefill-0", old) != old,
            "it came back",
        )


async def test_a_stop_during_the_start_leaves_nothing(tmp_path: Path) -> None:
    make_model(tmp_path / "model")
    (tmp_path / "model" / "mute-decode-0").touch()
    deployment = Deployment(tmp_path)
    run = asyncio.create_task(deployment.run())
    try:
        await eventually(lambda: "prefill-0" in deployment.pids(), "a worker is up")
        deployment.stop.set()
        await asyncio.wait_for(run, LIMIT_S)
        assert guard.marked(deployment.mark) == []
        assert not deployment.ready.done()
    finally:
        guard.sweep(deployment.mark)


# ---- `baton serve` as a process ----------------------------------------------------------------------------------


class Served:
    """`baton serve` with fakes, in a process of its own; all that it starts carries `variable`=`value`."""

    variable = "BATON_TEST_RUN"

    def __init__(self, folder: Path, launcher: str, *settings: str) -> None:
        self.folder = make_model(folder / "model")
        self.value = uuid.uuid4().hex
        self.errors = folder / "stderr.txt"
        overrides = [
            f"model.path={self.folder}",
            "router.grpc=127.0.0.1:0",
            f"cluster.launcher={launcher}",
            *settings,
        ]
        with self.errors.open("wb") as sink:
            self.process = subprocess.Popen(
                [sys.executable, fakes.__file__, "serve", *overrides],
                stdout=subprocess.PIPE,
                stderr=sink,
                env={**os.environ, self.variable: self.value, "PYTHONPATH": str(Path.cwd())},
            )

    async def wait_ready(self) -> str:
        assert self.process.stdout is not None
        line = await asyncio.wait_for(asyncio.to_thread(self.process.stdout.readline), LIMIT_S)
        assert line, self.errors.read_text()
        return line.decode()

    async def wait_end(self, limit_s: float = LIMIT_S) -> int:
        status = await eventually(
            lambda: (self.process.poll(),) if self.process.poll() is not None else None, "end", limit_s
        )
        assert status is not None and status[0] is not None
        return status[0]

    def left(self) -> list[int]:
        return carrying(self.variable, self.value)


@pytest.fixture
def serving(tmp_path: Path) -> Iterator[Callable[..., Served]]:
    made: list[Served] = []

    def make(launcher: str, *settings: str) -> Served:
        made.append(Served(tmp_path, launcher, *settings))
        return made[-1]

    yield make
    for served in made:
        clear_away(served.process, served.variable, served.value)


launchers = pytest.mark.parametrize(
    "launcher", ["plain", pytest.param("ray", marks=[pytest.mark.ray, pytest.mark.slow])]
)


@launchers
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_stops_everything_within_ten_seconds(
    serving: Callable[..., Served], launcher: str, how: signal.Signals
) -> None:
    served = serving(launcher)
    line = await served.wait_ready()
    assert line.startswith("baton ready http=127.0.0.1:8000 grpc=127.0.0.1:") and line.count("\n") == 1
    served.process.send_signal(how)
    begun = time.monotonic()
    assert await served.wait_end() == 0
    assert time.monotonic() - begun < 10, served.errors.read_text()
    assert (served.folder / "stopped-decode-0").exists() and (served.folder / "stopped-prefill-0").exists()
    assert served.process.stdout is not None and served.process.stdout.read() == b"", "one line only"
    await eventually(lambda: not served.left(), "nothing is left")


@launchers
async def test_killing_the_supervisor_leaves_nothing(serving: Callable[..., Served], launcher: str) -> None:
    served = serving(launcher)
    await served.wait_ready()
    assert len(served.left()) > 4
    served.process.kill()
    await eventually(lambda: not served.left(), "nothing is left")


async def test_the_second_ctrl_c_does_not_wait(serving: Callable[..., Served]) -> None:
    served = serving("plain", "cluster.stop_timeout_s=600")
    (served.folder / "stubborn-decode-0").touch()
    await served.wait_ready()

    def ended() -> bool:
        served.process.send_signal(signal.SIGINT)
        return served.process.poll() is not None

    await eventually(ended, "the second one kills")
    assert served.process.returncode == 130
    await eventually(lambda: not served.left(), "nothing is left")


async def test_a_failed_start_exits_with_1_and_the_reason(serving: Callable[..., Served]) -> None:
    served = serving("plain", "cluster.start_attempts=1")
    (served.folder / "crash-decode-0").touch()
    assert await served.wait_end() == 1
    assert "no weights for decode-0" in served.errors.read_text()
    await eventually(lambda: not served.left(), "nothing is left")
