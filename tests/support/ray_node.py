"""A real Ray head on this machine, in the foreground of a child process, with a token and folders of its own.

Never `ray stop`: that ends every Ray of the machine. Here only what this node started is ended, found by a mark in the
environment.
"""

from __future__ import annotations

import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

from cluster.config import CHECKOUT
from tests.cluster.helpers import LIMIT_S, carrying

MARK = "BATON_TEST_NODE"
STORE_BYTES = 80 << 20


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


class RayNode:
    """`ray start --head --block`. Use as a context; the folder's name is short, since Ray puts sockets below it.

    `python_path` is where its workers look for Baton, besides the working directory of a job.
    """

    def __init__(self, *arguments: str, resources: str = "{}", python_path: Path = CHECKOUT) -> None:
        self.mark = uuid.uuid4().hex
        self._folder = tempfile.TemporaryDirectory(prefix="bn-", dir="/tmp", ignore_cleanup_errors=True)
        self.folder = Path(self._folder.name)
        token = self.folder / "token"
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32))
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_TMPDIR": str(self.folder),  # or it would write the machine's /tmp/ray/ray_current_cluster
            "PYTHONPATH": str(python_path),
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        }
        self.log = self.folder / "ray.log"
        command = [
            str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--num-cpus=4",
            f"--port={free_port()}", f"--ray-client-server-port={free_port()}",
            f"--object-store-memory={STORE_BYTES}", f"--resources={resources}",
            f"--temp-dir={self.folder / 'ray'}", *arguments,
        ]  # fmt: skip
        with self.log.open("wb") as sink:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=sink,
                env={**self.environment, MARK: self.mark, "SPT_NOENV": "1"},
                cwd="/",
            )

    def __enter__(self) -> RayNode:
        deadline = time.monotonic() + 2 * LIMIT_S
        while "runtime started" not in self.log.read_text():
            if self.process.poll() is not None or time.monotonic() > deadline:
                said = self.log.read_text()
                self.__exit__()
                raise AssertionError(f"the Ray head did not start:\n{said}")
            time.sleep(0.1)
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        try:
            self.process.wait(LIMIT_S)
        except subprocess.TimeoutExpired:
            pass
        for pid in carrying(MARK, self.mark):
            os.kill(pid, signal.SIGKILL)
        self.process.wait()
        self._folder.cleanup()

    @property
    def address(self) -> str:
        """HOST:PORT, the host being the address by which Ray knows this machine."""
        found = re.search(r"ray start --address='([^']+)'", self.log.read_text())
        assert found, self.log.read_text()
        return found[1]

    @property
    def ip(self) -> str:
        return self.address.partition(":")[0]
