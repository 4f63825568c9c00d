"""What runs in the process of a worker's Ray actor: it becomes the worker that its spec describes.

Created by `cluster.ray_launcher`, perhaps on another machine; nothing that is only on the driver's may be used here.
"""

from __future__ import annotations

import importlib
import os
import socket
import sys
import threading
from pathlib import Path

import msgspec

from worker.spec import WorkerSpec


class WorkerActor:
    """Runs in the actor's process: opens the role's shell and keeps it."""

    async def start(self, spec_json: bytes, shell_name: str, environment: dict[str, str], log: str) -> bytes:
        """Becomes the worker of this spec; returns its Started message as JSON."""
        if log:
            _log_to(log)
        else:
            # A joined Ray; it prints what its workers print: nothing of that may come to our standard output.
            os.dup2(2, 1)
        # Before the shell is imported, because that loads torch.
        os.environ |= environment
        spec = msgspec.json.decode(spec_json, type=WorkerSpec)
        if not log:
            spec = _on_this_node(spec)
        _end_with_parent()
        module, _, function = shell_name.partition(":")
        open_shell = getattr(importlib.import_module(module), function)
        self._shell = open_shell(spec)
        return msgspec.json.encode(await self._shell.start())

    async def wait_closed(self) -> str:
        """Waits until the shell gave up, and says why."""
        return str(await self._shell.wait_closed())

    async def stop(self) -> None:
        await self._shell.stop()


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
