"""Which process an endpoint lives in, and whether that process is certainly dead. Linux, /proc.

A process id alone says nothing: ids are reused, and the same number means another process in another container. So an
identity is (host boot, pid namespace), pid and start time.
"""

from __future__ import annotations

import os
from pathlib import Path

import msgspec


class ProcessIdentity(msgspec.Struct, frozen=True, array_like=True):
    """`namespace`: the host's boot id and pid namespace; `started`: clock ticks since boot."""

    namespace: str
    pid: int
    started: int


def this_process() -> ProcessIdentity:
    """The identity of the calling process."""
    pid = os.getpid()
    stat = _stat(pid)
    if stat is None:  # /proc not mounted: such a process can never be called dead by others
        return ProcessIdentity(namespace="", pid=pid, started=0)
    return ProcessIdentity(namespace=_namespace(), pid=pid, started=int(stat[19]))


def dead(process: ProcessIdentity) -> bool | None:
    """True: it cannot execute another instruction. False: it can, even if stopped. None: not to be seen from here."""
    if not process.namespace or process.namespace != _namespace():
        return None
    stat = _stat(process.pid)
    if stat is None:
        return None if _exists(process.pid) else True
    if int(stat[19]) != process.started:
        return True
    # A zombie has run to its end only when it was the last thread: others may still be inside a copying system call.
    return stat[0] in ("Z", "X") and int(stat[17]) <= 1


def same_host(one: ProcessIdentity, other: ProcessIdentity) -> bool:
    """Whether both run under one kernel, in whatever containers."""
    boot = one.namespace.partition("/")[0]
    return bool(boot) and boot == other.namespace.partition("/")[0]


def _namespace() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _stat(pid: int) -> list[str] | None:
    """Fields 3.. of /proc/<pid>/stat (proc(5)): [0] state, [17] threads, [19] start time. None: not to be read."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    return text[text.rindex(")") + 2 :].split()


def _exists(pid: int) -> bool:
    """Whether there is such a process, even one that /proc hides from this user (mount option hidepid)."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
