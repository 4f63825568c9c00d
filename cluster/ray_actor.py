"""What runs in the process of a worker's Ray actor: it becomes the worker that its spec describes.

Created by `cluster.ray_launcher`, perhaps on another machine; nothing that is only on the driver's may be used here.
"""

from __future__ import annotations

import asyncio
import importlib
import os
import socket
import sys
import threading
from pathlib import Path

import msgspec

from worker.spec import WorkerSpec


class WorkerActor:
    """Runs in the actor's process: opens the role's shell and keeps it. It is rank 0 of the worker."""

    _listener: socket.socket | None = None

    def listen(self) -> str:
        """For a worker whose ranks are on several nodes: where they will find rank 0, HOST:PORT."""
        import ray

        host = ray.util.get_node_ip_address()
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.create_server((host, 0), family=family)
        return f"{host}:{self._listener.getsockname()[1]}"

    async def start(self, spec_json: bytes, shell_name: str, environment: dict[str, str], log: str) -> bytes:
        """Becomes the worker of this spec; returns its Started message as JSON."""
        spec = _prepare(spec_json, environment, log)
        module, _, function = shell_name.partition(":")
        open_shell = getattr(importlib.import_module(module), function)
        self._shell = open_shell(spec, self._listener)
        return msgspec.json.encode(await self._shell.start())

    async def wait_closed(self) -> str:
        """Waits until the shell gave up, and says why."""
        return str(await self._shell.wait_closed())

    async def stop(self) -> None:
        await self._shell.stop()


class RankActor:
    """Runs in the actor's process of another rank: keeps the process that computes, which ends when this one does."""

    async def start(self, spec_json: bytes, environment: dict[str, str], log: str) -> int:
        """Starts the rank and waits until it has met rank 0; returns its process id."""
        spec = _prepare(spec_json, environment, log)
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-u",
            "-m",
            "worker.follower",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(msgspec.json.encode(spec) + b"\n")
        await self._process.stdin.drain()
        if not await self._process.stdout.readline():
            raise RuntimeError(
                f"rank {spec.rank} ended with {await self._process.wait()} before it met rank 0"
            )
        return self._process.pid


def _prepare(spec_json: bytes, environment: dict[str, str], log: str) -> WorkerSpec:
    """Makes this process ready to be a rank, before anything is imported that loads torch."""
    if log:
        _log_to(log)
    else:
        # A joined Ray; it prints what its workers print: nothing of that may come to our standard output.
        os.dup2(2, 1)
    os.environ |= environment
    spec = msgspec.json.decode(spec_json, type=WorkerSpec)
    if not log:
        spec = _on_this_node(spec)
    _end_with_parent()
    return spec


def _on_this_node(spec: WorkerSpec) -> WorkerSpec:
    """With this node's address where the spec leaves it open; raises FileNotFoundError when the model is not here."""
    import ray

    host = ray.util.get_node_ip_address()
    if not (Path(spec.model_path) / "config.json").is_file():
        raise FileNotFoundError(
            f"model.path = {spec.model_path!r}: no config.json there on node {host} ({socket.gethostname()}); "
            "the model must be in the same place on every node"
        )
    return msgspec.structs.replace(
        spec, bind_host=spec.bind_host or host, advertise_host=spec.advertise_host or host
    )


def _log_to(path: str) -> None:
    """Sends this process's output to the worker's own log instead of Ray's."""
    sys.stdout.flush()
    sys.stderr.flush()
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)


def _end_with_parent() -> None:
    """Ends this process soon after its raylet is gone or a zombie: Ray itself waits until the raylet was reaped."""
    parent = os.getppid()

    def watch() -> None:
        pause = threading.Event()
        while os.getppid() == parent and _state(parent) not in ("Z", "X", ""):
            pause.wait(1.0)
        os._exit(1)

    threading.Thread(target=watch, name="raylet watch", daemon=True).start()


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""
