"""Two "hosts" on one machine: each with network, process, IPC and host name of its own, joined by one cable (veth).

Needs root. Separate process namespaces matter: with a common one UCX would copy through CMA and nothing would cross
the cable. Everything is named after one random word; what is made is removed, whatever happens.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# The first process of each host: reaps what others leave, as an init does. Ray waits for that.
INIT = """
import os, socket, sys, time
socket.sethostname(sys.argv[1])
print("up", flush=True)
while True:
    try:
        os.wait()
    except ChildProcessError:
        time.sleep(0.05)
"""
START_S = 20.0

# Removes the hosts when its standard input closes, which also happens when the tests are killed.
KEEPER = """
import os, signal, subprocess, sys
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
sys.stdin.read()
for name in sys.argv[1:]:
    found = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True)
    for pid in found.stdout.split():
        try:
            os.kill(int(pid), signal.SIGKILL)
        except ProcessLookupError:
            pass
    subprocess.run(["ip", "netns", "del", name], capture_output=True)
"""


def missing() -> str:
    """Why there can be no such hosts here; empty when there can."""
    if os.geteuid() != 0:
        return "needs root"
    tools = [tool for tool in ("ip", "unshare", "nsenter", "ps") if shutil.which(tool) is None]
    if tools:
        return f"needs {', '.join(tools)}"
    probe = f"bt{secrets.token_hex(4)}"
    try:
        made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True, check=False)
        entered = [
            "ip",
            "netns",
            "exec",
            probe,
            "unshare",
            "--pid",
            "--ipc",
            "--uts",
            "--fork",
            "--mount-proc",
            "true",
        ]
        made = (
            made if made.returncode else subprocess.run(entered, capture_output=True, text=True, check=False)
        )
        return f"no namespaces here: {made.stderr.strip()}" if made.returncode else ""
    finally:
        subprocess.run(["ip", "netns", "del", probe], capture_output=True, check=False)


@dataclass
class Host:
    name: str  # of its network namespace, its end of the cable and itself
    ip: str
    init: subprocess.Popen[str]
    environment: dict[str, str] = field(default_factory=dict)

    def command(self, arguments: list[str]) -> list[str]:
        """The same command, run on this host."""
        children = Path(f"/proc/{self.init.pid}/task/{self.init.pid}/children").read_text().split()
        return ["nsenter", "--target", children[0], "--all", *arguments]

    @staticmethod
    def inside(process: subprocess.Popen[Any]) -> int:
        """The process that a `command` runs: nsenter starts it, and passes no signals on. 0: it has ended."""
        try:
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        except OSError:
            return 0
        return int(children[0]) if children else 0

    def run(self, *arguments: str, timeout_s: float) -> str:
        """Runs a command to its end and returns its standard output; AssertionError with all it said when it fails."""
        done = subprocess.run(
            self.command([*arguments]),
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        assert done.returncode == 0, f"{arguments}: {done.stdout}\n{done.stderr}"
        return done.stdout

    def received_bytes(self) -> int:
        """What came over the cable so far."""
        shown = subprocess.run(
            ["ip", "-netns", self.name, "-json", "-statistics", "link", "show", self.name],
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
        link: dict[str, Any] = json.loads(shown)[0]
        return int(link["stats64"]["rx"]["bytes"])

    def cut(self) -> None:
        """Takes the cable out."""
        _ip("-netns", self.name, "link", "set", self.name, "down")

    def mend(self) -> None:
        """Puts the cable back; the kernel forgot the route that went over it."""
        _ip("-netns", self.name, "link", "set", self.name, "up")
        _ip("-netns", self.name, "route", "replace", "default", "dev", self.name)

    def processes(self) -> list[str]:
        """Command lines of all that runs there besides its init and the question itself."""
        lines = self.run("ps", "-e", "-o", "pid=,stat=,args=", timeout_s=START_S).splitlines()
        rows = [line.split(None, 2) for line in lines]
        return [
            row[2] for row in rows if row[0] != "1" and row[1][0] != "Z" and not row[2].startswith("ps -e")
        ]


@contextlib.contextmanager
def two_hosts(environment: Mapping[str, str]) -> Iterator[tuple[Host, Host]]:
    """Two hosts which reach each other and nothing else."""
    word = f"bt{secrets.token_hex(4)}"
    net = f"10.{64 + secrets.randbelow(64)}.{secrets.randbelow(256)}"
    hosts: list[Host] = []
    names = [word + end for end in "ab"]
    keeper = subprocess.Popen(
        [sys.executable, "-S", "-c", KEEPER, *names], stdin=subprocess.PIPE, start_new_session=True, cwd="/"
    )
    try:
        for name in names:
            _ip("netns", "add", name)
        _ip(
            "link",
            "add",
            names[0],
            "netns",
            names[0],
            "type",
            "veth",
            "peer",
            "name",
            names[1],
            "netns",
            names[1],
        )
        for number, name in enumerate(names, 1):
            inside = ("-netns", name)
            _ip(*inside, "addr", "add", f"{net}.{number}/24", "dev", name)
            for device in ("lo", name):
                _ip(*inside, "link", "set", device, "up")
            # Ray asks for the way to the outside to learn its own address.
            _ip(*inside, "route", "add", "default", "dev", name)
            hosts.append(Host(name, f"{net}.{number}", _start_init(name), dict(environment)))
        yield hosts[0], hosts[1]
    finally:
        assert keeper.stdin is not None
        keeper.stdin.close()
        keeper.wait(START_S)
        for host in hosts:
            host.init.communicate()


def _start_init(name: str) -> subprocess.Popen[str]:
    alone = ["unshare", "--pid", "--ipc", "--uts", "--mount", "--fork", "--kill-child", "--mount-proc"]
    init = subprocess.Popen(
        ["ip", "netns", "exec", name, *alone, sys.executable, "-S", "-c", INIT, name],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        cwd="/",
    )
    assert init.stdout is not None
    begun = time.monotonic()
    if init.stdout.readline() != "up\n":
        init.kill()
        raise AssertionError(f"no host within {time.monotonic() - begun:.1f} s")
    return init


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], capture_output=True, text=True, check=True)
