"""`baton serve --address`: a deployment in a Ray that runs already, with token authentication on."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc.aio
import pytest

from baton.v1 import inference_pb2 as api
from baton.v1 import inference_pb2_grpc
from cluster.config import CHECKOUT
from cluster.specs import reachable
from tests.cluster.helpers import LIMIT_S, carrying, clear_away, eventually
from tests.support.ray_node import RayNode

MARK = "BATON_TEST_RUN"
MODEL = CHECKOUT / "models" / "baton-tiny"
SMALL = [
    f"model.path={MODEL}",
    "prefill.kv_cache_gib=0.03125",
    "decode.kv_cache_gib=0.03125",
    "router.policy=always-remote",
]

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def node() -> Iterator[RayNode]:
    with RayNode("--include-dashboard=false", resources='{"prefill": 1, "decode": 1}') as node:
        yield node


class Joined:
    """`baton serve --address` as a process of its own."""

    def __init__(self, node: RayNode, folder: Path, address: str, settings: list[str]) -> None:
        self.mark = uuid.uuid4().hex
        self.errors = folder / "stderr.txt"
        sets = [f"--set={setting}" for setting in [*SMALL, *settings]]
        with self.errors.open("wb") as sink:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "cluster.cli", "serve", "--address", address, *sets],
                stdout=subprocess.PIPE,
                stderr=sink,
                env={**node.environment, MARK: self.mark},
                cwd=CHECKOUT,
            )

    async def first_line(self) -> str:
        assert self.process.stdout is not None
        return (await asyncio.to_thread(self.process.stdout.readline)).decode()


@asynccontextmanager
async def joined(node: RayNode, folder: Path, address: str, *settings: str) -> AsyncIterator[Joined]:
    deployment = Joined(node, folder, address, list(settings))
    try:
        yield deployment
    finally:
        await asyncio.to_thread(clear_away, deployment.process, MARK, deployment.mark)


def test_what_clients_are_told() -> None:
    assert reachable("127.0.0.1:8000", "", "10.1.2.3") == "127.0.0.1:8000", (
        "only what listens everywhere is reached there"
    )
    assert reachable("0.0.0.0:8000", "", "10.1.2.3") == "10.1.2.3:8000"
    assert reachable("0.0.0.0:8000", "", "") == "0.0.0.0:8000"
    assert reachable("0.0.0.0:8000", "baton.example", "10.1.2.3") == "baton.example:8000"


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.e2e
async def test_it_joins_serves_on_the_nodes_address_and_stops(node: RayNode, tmp_path: Path) -> None:
    settings = ["router.http=0.0.0.0:0", "router.grpc=0.0.0.0:0"]
    settings += ["prefill.resources={prefill: 1}", "decode.resources={decode: 1}"]
    async with joined(node, tmp_path, node.address, *settings) as deployment:
        line = await deployment.first_line()
        ready = re.fullmatch(r"baton ready http=(\S+):\d+ grpc=((\S+):\d+)\n", line)
        assert ready, deployment.errors.read_text()
        assert ready[1] == ready[3] == node.ip, "the router tells an address that others can reach"
        async with grpc.aio.insecure_channel(ready[2]) as channel:
            stub = inference_pb2_grpc.InferenceStub(channel)
            request = api.GenerateRequest(
                text="one two three " * 30, sampling=api.SamplingParams(max_tokens=4, temperature=0)
            )
            events = [event async for event in stub.Generate(request, timeout=LIMIT_S)]
            assert events[-1].finished.trace.prefilled == "remote"
            workers = (await stub.Status(api.StatusRequest(), timeout=LIMIT_S)).workers
        assert {worker.worker_id for worker in workers} == {"prefill-0", "decode-0"}
        assert {worker.address.partition(":")[0] for worker in workers} == {node.ip}
        pids = [worker.pid for worker in workers]
        deployment.process.send_signal(signal.SIGTERM)
        await eventually(lambda: deployment.process.poll() is not None, "baton serve ends")
        assert deployment.process.returncode == 0, deployment.errors.read_text()
        await eventually(lambda: not carrying(MARK, deployment.mark), "nothing of the driver is left")
        await eventually(lambda: not any(map(lives, pids)), "the workers ended")
    assert node.process.poll() is None, "the cluster is not ours to stop"


def lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.e2e
async def test_auto_finds_the_cluster_and_a_killed_driver_leaves_nothing(
    node: RayNode, tmp_path: Path
) -> None:
    async with joined(
        node, tmp_path, "auto", "router.http=127.0.0.1:0", "router.grpc=127.0.0.1:0"
    ) as deployment:
        line = await deployment.first_line()
        assert re.fullmatch(r"baton ready http=127\.0\.0\.1:\d+ grpc=127\.0\.0\.1:\d+\n", line), (
            deployment.errors.read_text()
        )
        engines = [pid for pid in carrying("BATON_TEST_NODE", node.mark) if b".rank" in command_line(pid)]
        assert len(engines) == 2
        deployment.process.kill()
        await eventually(lambda: not carrying(MARK, deployment.mark), "nothing of the driver is left")
        await eventually(lambda: not any(map(lives, engines)), "the engines ended")


def command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


@pytest.mark.ray
@pytest.mark.slow
async def test_a_wrong_token_is_refused(node: RayNode, tmp_path: Path) -> None:
    other = tmp_path / "token"
    other.write_text("0" * 64)
    node_with_it = {**node.environment, "RAY_AUTH_TOKEN_PATH": str(other)}
    answer = await asyncio.to_thread(serve, node_with_it, node.address)
    assert answer.returncode == 1 and answer.stdout == ""
    assert f"cluster.address = '{node.address}': cannot use the Ray at {node.address}" in answer.stderr
    assert "oken" in answer.stderr and "Traceback" not in answer.stderr, answer.stderr


@pytest.mark.ray
@pytest.mark.slow
def test_a_node_without_the_model_and_a_resource_without_a_node_are_named(
    node: RayNode, tmp_path: Path
) -> None:
    """The driver sees the model, or it would have refused it before: so the launcher is asked directly."""
    answer = subprocess.run(
        [sys.executable, "-c", ASK_THE_LAUNCHER, node.address, str(tmp_path)],
        env=node.environment, cwd=CHECKOUT, capture_output=True, text=True, timeout=2 * LIMIT_S, check=False,
    )  # fmt: skip
    assert re.search(
        rf"decode-0 did not start: FileNotFoundError: model.path = '/no/such/model': no config.json there on node "
        rf"{re.escape(node.ip)} \(\S+\); the model must be in the same place on every node",
        answer.stdout,
    ), answer.stdout + answer.stderr
    assert "Ray has no room for 0.25 CPU, 2 nowhere (the cluster has 4 CPU, 0 GPU, 0 nowhere" in answer.stdout
    waited = re.search(
        r"or add nodes that have what decode.resources asks for \(after (\S+) s\)", answer.stdout
    )
    assert waited and 1.0 <= float(waited[1]) < 10.0, answer.stdout


ASK_THE_LAUNCHER = """
import asyncio, sys, time
from pathlib import Path
from cluster.process import StartError
from cluster.ray_launcher import RayLauncher
from cluster.specs import Place
from worker.spec import WorkerSpec

async def main():
    folder = Path(sys.argv[2])
    launcher = RayLauncher({"decode": "decode.shell:open_shell"}, address=sys.argv[1], private_dir=folder,
                           log_dir=folder, start_timeout_s=60, mark="")
    await launcher.open()
    spec = WorkerSpec(role="decode", worker_id="decode-0", incarnation="i", token="t", model_path="/no/such/model")
    for resources in {}, {"nowhere": 2.0}:
        begun = time.monotonic()
        try:
            await launcher.start_worker(spec, Place(0.25, 0, resources=resources))
        except StartError as error:
            print(error, f"(after {time.monotonic() - begun:.1f} s)", flush=True)
        launcher._start_timeout_s = 1.0
    await launcher.close()

asyncio.run(main())
"""


def serve(environment: dict[str, str], address: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "cluster.cli", "serve", "--address", address],
        env=environment, cwd=CHECKOUT, capture_output=True, text=True, timeout=2 * LIMIT_S, check=False,
    )  # fmt: skip
