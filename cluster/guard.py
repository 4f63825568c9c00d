"""The last resort against left-over processes: a tiny process that outlives the supervisor by a second.

Every process of a deployment inherits one environment variable with the deployment's mark. The guard waits for its
standard input to close, which happens however the supervisor ends, kill -9 included; gives the others a moment to end
by themselves (most do: their own standard input closed too) and kills what still carries the mark. Ray needs this:
its agents outlive a killed driver, and actors outlive a raylet that nobody reaped.

Only the standard library, only Linux's /proc; elsewhere it finds nothing and does nothing.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

MARK = "BATON_DEPLOYMENT"
_GRACE_S = 1.0
_GIVE_UP_S = 10.0


class Guard:
    """The supervisor's side: starts the guard process, and ends it when all is stopped."""

    def __init__(self, mark: str, private_dir: Path) -> None:
        # By path and not by module name: it must start wherever this file lies, installed or not.
        self._process = subprocess.Popen(
            [sys.executable, "-S", "-E", str(Path(__file__).resolve()), mark, str(private_dir)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
            cwd="/",
        )

    def dismiss(self, timeout_s: float) -> None:
        """All should be over: the guard looks a last time, removes the private folder, and ends."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(b"stopped\n")
            self._process.stdin.close()
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def marked(mark: str) -> list[int]:
    """The processes that were started with this mark, zombies left out."""
    wanted = f"{MARK}={mark}".encode()
    return [pid for pid in _all_pids() if _carries(pid, wanted)]


def kill_marked(pid: int, mark: str) -> bool:
    """Kills one process if it carries the mark; False when it is gone or someone else's."""
    try:
        descriptor = os.pidfd_open(pid)
    except (OSError, AttributeError):
        return False
    try:
        # The descriptor was opened first, so the process that is looked at is the one that is signalled.
        if not _carries(pid, f"{MARK}={mark}".encode()):
            return False
        signal.pidfd_send_signal(descriptor, signal.SIGKILL)
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)


def sweep(mark: str, give_up_s: float = _GIVE_UP_S) -> None:
    """Kills all that carry the mark until none is left; a process may have started another meanwhile."""
    deadline = time.monotonic() + give_up_s
    while (found := marked(mark)) and time.monotonic() < deadline:
        for pid in found:
            kill_marked(pid, mark)
        time.sleep(0.02)


def _carries(pid: int, wanted: bytes) -> bool:
    # A zombie's environment is empty.
    try:
        return wanted in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return False


def _all_pids() -> list[int]:
    try:
        return [int(name) for name in os.listdir("/proc") if name.isdigit()]
    except OSError:
        return []


def _main(mark: str, private_dir: str) -> None:
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)
    orderly = bool(sys.stdin.buffer.read())
    deadline = time.monotonic() + _GRACE_S
    while not orderly and marked(mark) and time.monotonic() < deadline:
        time.sleep(0.05)
    sweep(mark)
    if private_dir:
        shutil.rmtree(private_dir, ignore_errors=True)


if __name__ == "__main__":
    _main(sys.argv[1], sys.argv[2])
