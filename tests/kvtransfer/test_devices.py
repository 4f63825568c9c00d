"""What a machine offers to move bytes, what UCX says that it uses, and when that deserves a warning."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from kvtransfer import devices, processes
from tests.kvtransfer.peer import PeerProcess
from tests.kvtransfer.test_transport_contract import needs_nixl

CMA = "[1.2] [vm:1:0] ucp_worker.c:1997 UCX  INFO  h/7 intra-node cfg#1 rma_am(tcp/lo)  am(tcp/lo cma/memory)"
MLX = "[1.2] [a:1:0]  ucp_worker.c:1997 UCX  INFO    h/7 inter-node cfg#3 rma(rc_mlx5/mlx5_0:1)  am(rc_mlx5/mlx5_0:1)"
SELF = "[1.2] [vm:1:0] ucp_worker.c:1997 UCX  INFO    h/7 self cfg#0 am(tcp/lo cma/memory)"


def test_lanes_of_ucx() -> None:
    assert devices.lanes(CMA) == ("tcp/lo", "cma/memory")
    assert devices.lanes(MLX) == ("rc_mlx5/mlx5_0:1",)
    assert devices.lanes(SELF) == () and devices.lanes("UCX  INFO  Version 1.23.0 (loaded from /a/b)") == ()


def test_active_rdma_ports(tmp_path: Path) -> None:
    for device, port, state in (
        ("mlx5_0", "1", "4: ACTIVE\n"),
        ("mlx5_1", "1", "1: DOWN\n"),
        ("rxe0", "2", "4: ACTIVE"),
    ):
        folder = tmp_path / device / "ports" / port
        folder.mkdir(parents=True)
        (folder / "state").write_text(state)
    assert devices.rdma_devices(tmp_path) == ("mlx5_0:1", "rxe0:2")
    assert devices.rdma_devices(tmp_path / "none") == ()


@pytest.mark.parametrize(
    ("used", "same_host", "reads", "ours", "theirs", "said"),
    [
        ((), True, True, (), (), ""),
        (("tcp/lo", "cma/memory"), True, True, (), (), ""),
        (("rc_mlx5/mlx5_0:1", "tcp/eth0"), False, False, ("mlx5_0:1",), ("mlx5_0:1",), ""),
        (("tcp/eth0",), False, False, (), (), ""),
        (("tcp/eth0",), False, False, ("mlx5_0:1",), (), ""),
        (
            ("tcp/eth0",),
            False,
            False,
            ("mlx5_0:1",),
            ("mlx5_1:1",),
            "both hosts have RDMA devices (mlx5_0:1; mlx5_1:1)",
        ),
        (("tcp/lo",), True, True, (), (), "may read each other's memory"),
        (("tcp/lo",), True, False, (), (), "SYS_PTRACE"),
    ],
)
def test_a_slow_way_is_one_where_a_fast_one_is_there(
    used: tuple[str, ...], same_host: bool, reads: bool, ours: tuple[str, ...], theirs: tuple[str, ...], said: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.delenv("UCX_TLS", raising=False)
    monkeypatch.setattr(devices, "ptrace_scope", lambda: 0)
    text = devices.slow_way(used, same_host=same_host, reads_memory=reads, ours=ours, theirs=theirs)
    assert bool(text) == bool(said) and said in text


def test_the_remedy_is_the_one_that_helps(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "scope").write_text("1\n")
    assert devices.ptrace_scope(tmp_path / "scope") == 1 and devices.ptrace_scope(tmp_path / "none") == 0
    monkeypatch.setattr(devices, "ptrace_scope", lambda: 1)
    blocked = devices.slow_way(("tcp/lo",), same_host=True, reads_memory=False, ours=(), theirs=())
    assert "kernel.yama.ptrace_scope is 1: set it to 0" in blocked
    monkeypatch.setenv("UCX_TLS", "tcp")
    forbidden = devices.slow_way(("tcp/lo",), same_host=True, reads_memory=True, ours=(), theirs=())
    assert "UCX_TLS=tcp forbids it" in forbidden


def test_reading_another_processs_memory() -> None:
    mine = np.ones(8, np.uint8)
    me = processes.this_process()
    assert devices.reads_memory_of(me, mine.ctypes.data)
    assert not devices.reads_memory_of(me, 1)
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    child.wait()
    assert not devices.reads_memory_of(
        processes.ProcessIdentity(me.namespace, child.pid, 1), mine.ctypes.data
    )
    elsewhere = processes.ProcessIdentity("another host/x", os.getpid(), me.started)
    assert not devices.reads_memory_of(elsewhere, mine.ctypes.data)


@pytest.mark.nixl
@needs_nixl[1]
@pytest.mark.parametrize("tls", ["", "tcp"])
def test_nixl_says_which_devices_it_uses_and_complains_of_tcp_on_one_host(tls: str, tmp_path: Path) -> None:
    """In a process of its own: UCX reads where to log when it is loaded."""
    with (tmp_path / "log").open("w") as log:
        environment = {"UCX_TLS": tls} if tls else {}
        here, there = PeerProcess(environment, stderr=log), PeerProcess(environment)
        try:
            here.call("open", "nixl", 4096, 4096, "here")
            here.call("connect", "there", there.call("open", "nixl", 4096, 4096, "there"))
            used = here.call("devices").split(", ")
        finally:
            here.end()
            there.end()
    assert ("cma/memory" in used) == (not tls) and "tcp/lo" in used
    complaints = [
        line for line in (tmp_path / "log").read_text().splitlines() if "SLOW TRANSPORT to there" in line
    ]
    assert len(complaints) == bool(tls)
    assert all("UCX_TLS=tcp forbids it" in line for line in complaints)
