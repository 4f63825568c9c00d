"""A deployment as a Ray job (token authentication on): `ray job submit --working-dir . -- python -m cluster.cli`."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import grpc.aio
import pytest

from baton.v1 import inference_pb2 as api
from baton.v1 import inference_pb2_grpc
from cluster.config import CHECKOUT, load
from tests.cluster.helpers import LIMIT_S, carrying, eventually
from tests.support import ray_node
from tests.support.ray_node import RayNode, free_port

JOB_S = 120.0
OURS = re.compile(rb"cluster\.cli|guard\.py|-m\0router|prefill\.rank|decode\.rank")


def test_a_job_joins_the_ray_that_runs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless it says otherwise: a second Ray inside of a job is hardly ever meant."""
    assert load().cluster.address == "local"
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert load().cluster.address == "auto"
    assert load(None, ["cluster.address=local"]).cluster.address == "local"
    assert load(None, ["cluster.launcher=plain"]).cluster.address == "local"


class Cluster:
    """A head with its dashboard, which takes jobs, and the `ray job` commands against it."""

    def __init__(self, node: RayNode, dashboard: int) -> None:
        self.node = node
        self.environment = {**node.environment, "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}"}

    def submit(self, job: str, log: Path, *entry: str) -> subprocess.Popen[bytes]:
        """From the checkout, and follows the job's log."""
        with log.open("wb") as sink:
            return subprocess.Popen(
                [*self.command("submit", "--submission-id", job, "--working-dir", "."), "--", *entry],
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=sink,
                env=self.environment,
                cwd=CHECKOUT,
            )

    def stop(self, job: str) -> str:
        return subprocess.run(
            self.command("stop", job),
            env=self.environment, cwd="/", capture_output=True, text=True, timeout=JOB_S, check=True,
        ).stdout  # fmt: skip

    def command(self, verb: str, *arguments: str) -> list[str]:
        return [str(Path(sys.executable).with_name("ray")), "job", verb, *arguments]

    def processes(self) -> dict[int, Path]:
        """What runs there of Baton, and in which folder."""
        found = {}
        for pid in carrying(ray_node.MARK, self.node.mark):
            try:
                command, folder = (
                    Path(f"/proc/{pid}/cmdline").read_bytes(),
                    Path(os.readlink(f"/proc/{pid}/cwd")),
                )
            except OSError:
                continue
            if OURS.search(command):
                found[pid] = folder
        return found


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    dashboard = free_port()
    arguments = ["--include-dashboard=true", f"--dashboard-port={dashboard}", "--dashboard-host=127.0.0.1"]
    arguments += [f"--dashboard-agent-listen-port={free_port()}"]
    # The code must be that of the upload, whatever is installed on the node.
    for room in ("cluster", "worker", "engine"):
        (tmp_path / "stale" / room).mkdir(parents=True)
        (tmp_path / "stale" / room / "__init__.py").write_text("raise ImportError('stale')\n")
    with RayNode(*arguments, python_path=tmp_path / "stale") as node:
        yield Cluster(node, dashboard)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.e2e
@pytest.mark.timeout(400)
async def test_a_deployment_as_a_job(cluster: Cluster, tmp_path: Path) -> None:
    job, log, config = f"baton-{uuid.uuid4().hex[:8]}", tmp_path / "job.txt", tmp_path / "job.yaml"
    config.write_text(
        "{router: {http: '0.0.0.0:0', grpc: '0.0.0.0:0', policy: always-remote},"
        " prefill: {kv_cache_gib: 0.03125}, decode: {kv_cache_gib: 0.03125}, cluster: {start_timeout_s: 60}}"
    )
    submit = cluster.submit(job, log, "python", "-m", "cluster.cli", "serve", str(config))
    try:

        def ready() -> re.Match[str] | None:
            assert submit.poll() is None, log.read_text()
            return re.search(r"^baton ready http=(\S+) grpc=(\S+)$", log.read_text(), re.MULTILINE)

        found = await eventually(ready, "the job's log says that it is ready", JOB_S)
        assert found is not None
        assert found[2].partition(":")[0] == cluster.node.ip
        async with grpc.aio.insecure_channel(found[2]) as channel:
            stub = inference_pb2_grpc.InferenceStub(channel)
            request = api.GenerateRequest(
                text="one two three " * 30, sampling=api.SamplingParams(max_tokens=4, temperature=0)
            )
            events = [event async for event in stub.Generate(request, timeout=LIMIT_S)]
        assert events[-1].finished.trace.prefilled == "remote"
        running = cluster.processes()
        engines = [pid for pid in running if b".rank" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        assert len(engines) == 2
        assert all("working_dir_files" in str(running[pid]) for pid in engines), running
        uploaded = {path.name for path in running[engines[0]].iterdir()}
        assert {"cluster", "engine", "models", "pyproject.toml"} <= uploaded
        assert not uploaded & {".git", ".venv", ".run", "tests", "docs", "benchmarks"}, uploaded
        size = sum(
            path.stat().st_size for path in running[engines[0]].rglob("*") if "__pycache__" not in str(path)
        )
        print(f"uploaded {size / (1 << 20):.1f} MiB")
        assert size < 50 << 20
        said = await asyncio.to_thread(cluster.stop, job)
        assert "was stopped" in said, said
        await eventually(lambda: submit.poll() is not None, "the follower of the log ends", JOB_S)
        await eventually(lambda: not cluster.processes(), f"nothing is left: {cluster.processes()}")
        assert "stopped in" in log.read_text(), f"it was killed instead of asked:\n{log.read_text()}"
    finally:
        submit.kill()
        submit.wait()
    assert cluster.node.process.poll() is None
