"""What this machine offers to move bytes between processes, and what UCX says that it uses. Linux, /sys and /proc.

For the NIXL transport, which warns when a slow way was taken though a fast one is there, and for `baton doctor`.
"""

from __future__ import annotations

import ctypes
import os
import re
from pathlib import Path

from kvtransfer import processes
from kvtransfer.processes import ProcessIdentity

_LANE = re.compile(r"([a-z0-9_]+)/([\w:.\-@]+)")


def rdma_devices(root: Path = Path("/sys/class/infiniband")) -> tuple[str, ...]:
    """RDMA devices (InfiniBand, RoCE, iWARP) with an active port, such as "mlx5_0:1"."""
    active = []
    for state in sorted(root.glob("*/ports/*/state")):
        try:
            if "ACTIVE" in state.read_text():
                active.append(f"{state.parts[-4]}:{state.parts[-2]}")
        except OSError:  # it was unplugged
            continue
    return tuple(active)


def ptrace_scope(path: Path = Path("/proc/sys/kernel/yama/ptrace_scope")) -> int:
    """Yama's restriction of who may read another process's memory; 0: none."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return 0


def reads_memory_of(process: ProcessIdentity, address: int) -> bool:
    """Whether this process may copy from that one's memory (CMA, process_vm_readv(2)), tried with one byte."""
    if processes.dead(process) is not False:
        return False

    class Extent(ctypes.Structure):
        _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))

    byte = ctypes.create_string_buffer(1)
    here, there = Extent(ctypes.addressof(byte), 1), Extent(address, 1)
    try:
        read = ctypes.CDLL(None, use_errno=True).process_vm_readv
    except (OSError, AttributeError):
        return False
    read.restype = ctypes.c_ssize_t
    number = (ctypes.c_ulong(1), ctypes.c_ulong(0))
    return bool(
        read(process.pid, ctypes.byref(here), number[0], ctypes.byref(there), number[0], number[1]) == 1
    )


def lanes(line: str) -> tuple[str, ...]:
    """The transports and devices of one connection, like "cma/memory", from UCX's line about it ("... cfg#1 ...")."""
    found = re.search(r"cfg#\d+ (.*)", line)
    if found is None or " self cfg#" in line:
        return ()
    return tuple(dict.fromkeys(f"{name}/{device}" for name, device in _LANE.findall(found[1])))


def slow_way(
    used: tuple[str, ...],
    *,
    same_host: bool,
    reads_memory: bool,
    ours: tuple[str, ...],
    theirs: tuple[str, ...],
) -> str:
    """What is wrong when only TCP is used though there is better, with the remedy; else empty.

    `used`: see `lanes`. `ours`, `theirs`: active RDMA devices of both hosts.
    """
    if not used or not all(lane.startswith("tcp/") for lane in used):
        return ""
    what = f"UCX moves KV by TCP only ({', '.join(used)})"
    chosen = os.environ.get("UCX_TLS")
    remedy = f"UCX_TLS={chosen} forbids it: unset it" if chosen else ""
    if ours and theirs and not same_host:
        remedy = (
            remedy or "check that the wheel's UCX sees them (UCX_LOG_LEVEL=debug), and ulimit -l (unlimited)"
        )
        return (
            f"{what}, though both hosts have RDMA devices ({', '.join(ours)}; {', '.join(theirs)}): {remedy}"
        )
    if not same_host:
        return ""
    if reads_memory:
        remedy = remedy or "UCX_LOG_LEVEL=debug may say why"
        return f"{what}, though both processes are on one host and may read each other's memory: {remedy}"
    scope = ptrace_scope()
    remedy = (
        f"kernel.yama.ptrace_scope is {scope}: set it to 0"
        if scope
        else ("run both as one user in one pid namespace, in a container with the capability SYS_PTRACE")
    )
    return f"{what} on one host, because the two processes may not read each other's memory: {remedy}"


class UcxLog:
    """Collects what UCX logs in this process, which is the only way to learn which devices it chose.

    UCX reads where to log when it is loaded, so `start` and `started` go around that. What it says when it crashes is
    lost this way: set UCX_LOG_LEVEL to see it.
    """

    def __init__(self) -> None:
        self._file = -1
        self._read_bytes = 0

    def start(self) -> None:
        """No effect when somebody has chosen by himself what UCX logs, or where."""
        if self._file >= 0 or {"UCX_LOG_LEVEL", "UCX_LOG_FILE"} & os.environ.keys():
            return
        self._file = os.memfd_create("ucx-log", os.MFD_CLOEXEC)
        os.environ["UCX_LOG_LEVEL"] = "info"
        os.environ["UCX_LOG_FILE"] = f"/proc/self/fd/{self._file}"

    def started(self) -> None:
        """Child processes must not inherit it."""
        if self._file >= 0:
            for name in ("UCX_LOG_LEVEL", "UCX_LOG_FILE"):
                os.environ.pop(name, None)

    def new_lines(self) -> list[str]:
        """What was logged since the last call: some lines for each kind of connection."""
        if self._file < 0:
            return []
        ctypes.CDLL(None).fflush(None)
        text = os.pread(self._file, os.fstat(self._file).st_size - self._read_bytes, self._read_bytes)
        self._read_bytes += len(text)
        return text.decode(errors="replace").splitlines()
