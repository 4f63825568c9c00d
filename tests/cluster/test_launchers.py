"""One contract for both launchers: a worker starts, its end is seen, and nothing of it is left. Workers are fakes."""

from __future__ import annotations

import asyncio
import os
import signal
import tempfile
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import pytest_asyncio

from cluster import guard
from cluster.launchers import Launcher, PlainLauncher
from cluster.process import StartError
from cluster.ray_launcher import RayLauncher
from cluster.specs import Place
from tests.cluster import fakes
from tests.cluster.helpers import eventually, running
from worker.spec import WorkerSpec

pytestmark = pytest.mark.asyncio(loop_scope="module")

PLACE = Place(num_cpus=0.25, num_gpus=0)


@dataclass
class Bench:
    launcher: Launcher
    folder: Path
    mark: str

    def spec(self, worker_id: str) -> WorkerSpec:
        return WorkerSpec(
            role="prefill",
            worker_id=worker_id,
            incarnation=uuid.uuid4().hex,
            token="secret",
            model_path=str(self.folder),
        )

    def own_processes(self) -> int:
        """How many processes run under this bench's mark; Ray's own are among them."""
        return len(guard.marked(self.mark))


@pytest_asyncio.fixture(
    params=["plain", pytest.param("ray", marks=pytest.mark.ray)], scope="module", loop_scope="module"
)
async def bench(request: pytest.FixtureRequest) -> AsyncIterator[Bench]:
    before = dict(os.environ)
    mark = uuid.uuid4().hex
    with tempfile.TemporaryDirectory(prefix="baton-test-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        launcher: Launcher
        if request.param == "plain":
            launcher = PlainLauncher(fakes.COMMANDS, log_dir=folder, start_timeout_s=30, mark=mark)
        else:
            launcher = RayLauncher(
                fakes.SHELLS,
                address="local",
                private_dir=folder,
                log_dir=folder,
                start_timeout_s=30,
                mark=mark,
            )
        try:
            await launcher.open()
            yield Bench(launcher, folder, mark)
            await launcher.close()
            await eventually(lambda: not guard.marked(mark), "no process after close")
        finally:
            await asyncio.to_thread(guard.sweep, mark)
            os.environ.clear()
            os.environ.update(before)


async def test_a_worker_says_who_it_is_and_ends_gracefully(bench: Bench) -> None:
    spec = bench.spec("graceful")
    handle = await bench.launcher.start_worker(spec, PLACE)
    started = handle.started
    assert (started.worker_id, started.incarnation) == ("graceful", spec.incarnation)
    assert running(started.pid) and running(started.engine_pid)
    await handle.stop(20)
    assert (bench.folder / "stopped-graceful").exists(), "it was killed instead of asked"
    await eventually(
        lambda: not running(started.pid) and not running(started.engine_pid), "both processes ended"
    )
    await handle.stop(20)  # again: nothing happens


async def test_a_killed_worker_is_noticed_and_leaves_no_engine(bench: Bench) -> None:
    handle = await bench.launcher.start_worker(bench.spec("killed"), PLACE)
    death = asyncio.create_task(handle.wait_dead())
    os.kill(handle.started.pid, signal.SIGKILL)
    reason = await asyncio.wait_for(death, 20)
    assert "SIGKILL" in reason or "actor" in reason
    await handle.kill()
    await eventually(lambda: not running(handle.started.engine_pid), "its engine ended")


async def test_a_shell_that_gives_up_says_why(bench: Bench) -> None:
    """The plain process can only end; under Ray the reason itself arrives."""
    import grpc.aio

    from baton import rpc
    from baton.v1 import worker_pb2, worker_pb2_grpc

    handle = await bench.launcher.start_worker(bench.spec("quitter"), PLACE)
    death = asyncio.create_task(handle.wait_dead())
    (bench.folder / "give-up-quitter").touch()
    async with rpc.channel(handle.started.address) as channel:
        describe = worker_pb2_grpc.WorkerStub(channel).Describe
        try:
            await describe(worker_pb2.DescribeRequest(), timeout=20, metadata=rpc.credentials("secret"))
        except grpc.aio.AioRpcError:
            pass  # it may end before its answer is out
    reason = await asyncio.wait_for(death, 20)
    assert "status 0" in reason or "the engine said goodbye" in reason
    await handle.kill()


async def test_a_worker_that_will_not_stop_is_killed(bench: Bench) -> None:
    (bench.folder / "stubborn-stubborn").touch()
    handle = await bench.launcher.start_worker(bench.spec("stubborn"), PLACE)
    await asyncio.wait_for(handle.stop(0.2), 20)
    pids = (handle.started.pid, handle.started.engine_pid)
    await eventually(lambda: not any(map(running, pids)), "both processes killed")


async def test_a_failed_start_quotes_the_log_and_leaves_nothing(bench: Bench) -> None:
    (bench.folder / "crash-broken").touch()
    with pytest.raises(StartError, match="(?s)broken.*no weights for broken") as error:
        await bench.launcher.start_worker(bench.spec("broken"), PLACE)
    assert str(bench.launcher.log_tail("broken")) in str(error.value)


async def test_an_answer_of_another_incarnation_is_refused(bench: Bench) -> None:
    (bench.folder / "impostor-double").touch()
    before = bench.own_processes()
    with pytest.raises(StartError, match="double answered as double, incarnation someone-else"):
        await bench.launcher.start_worker(bench.spec("double"), PLACE)
    if bench.launcher.name == "plain":
        await eventually(lambda: bench.own_processes() == before, "the impostor is gone")


async def test_a_cancelled_start_leaves_nothing(bench: Bench) -> None:
    (bench.folder / "mute-mute").touch()
    log = bench.folder / "mute.log"
    start = asyncio.create_task(bench.launcher.start_worker(bench.spec("mute"), PLACE))
    await eventually(log.exists, "the worker's process runs")
    start.cancel()
    with pytest.raises(asyncio.CancelledError):
        await start
    if bench.launcher.name == "plain":
        await eventually(lambda: bench.own_processes() == 0, "the mute worker is gone")


async def test_a_silent_start_is_bounded(tmp_path: Path) -> None:
    (tmp_path / "mute-mute").touch()
    launcher = PlainLauncher(fakes.COMMANDS, log_dir=tmp_path, start_timeout_s=0.1, mark=uuid.uuid4().hex)
    with pytest.raises(StartError, match="mute was not ready within 0.1 s"):
        await launcher.start_worker(Bench(launcher, tmp_path, "").spec("mute"), PLACE)


async def test_each_plain_worker_sees_its_own_gpu(tmp_path: Path) -> None:
    show = ["/bin/sh", "-c", 'read line; echo "gpu=$CUDA_VISIBLE_DEVICES omp=$OMP_NUM_THREADS" >&2']
    launcher = PlainLauncher({"prefill": show}, log_dir=tmp_path, start_timeout_s=20, mark=uuid.uuid4().hex)
    with pytest.raises(StartError, match="gpu=3 omp=1"):
        await launcher.start_worker(Bench(launcher, tmp_path, "").spec("w"), Place(1, 1, gpu=3))


@pytest.mark.parametrize("bench", ["ray"], indirect=True)
@pytest.mark.ray
async def test_a_worker_without_room_is_refused_with_numbers(bench: Bench) -> None:
    with pytest.raises(
        StartError, match=r"huge: Ray has no room for 10000 CPU \(the cluster has [\d.]+ CPU.*num_cpus"
    ):
        await bench.launcher.start_worker(bench.spec("huge"), Place(num_cpus=10000, num_gpus=0))


@pytest.mark.parametrize("bench", ["ray"], indirect=True)
@pytest.mark.ray
async def test_every_process_of_a_private_ray_carries_the_mark(bench: Bench) -> None:
    """Or the guard would not find those that outlive a killed supervisor; renaming themselves must not hide it."""
    handle = await bench.launcher.start_worker(bench.spec("marked"), PLACE)
    marked = set(guard.marked(bench.mark))
    assert {handle.started.pid, handle.started.engine_pid} <= marked
    names = {pid: psutil.Process(pid).name() for pid in marked}
    assert {"raylet", "gcs_server"} <= set(names.values())
    raylet = next(pid for pid, name in names.items() if name == "raylet")
    below = {child.pid: child.name() for child in psutil.Process(raylet).children(recursive=True)}
    assert len(below) >= 3, "its two agents and the worker"
    assert set(below) <= set(guard.marked(bench.mark)), below
    await handle.kill()
