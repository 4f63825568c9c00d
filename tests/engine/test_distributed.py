"""The group over torch.distributed, gloo between processes: right sums, equal bits, and no wait without an end."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from typing import Any

import pytest
import torch

from engine.collective import CollectiveError
from engine.distributed import Distributed
from engine.shards import Shard

SIZE = 3

_RANK = """
import hashlib, json, os, sys, threading
import torch
from engine.collective import CollectiveError
from engine.distributed import Distributed
from engine.shards import Shard

torch.set_num_threads(1)
rank, size, address, listener, end = json.loads(sys.argv[1])
group = Distributed("gloo", address, rank, size, 3.0, join_timeout_s=60.0, listener=listener)
said = []
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    for shape in ((1, 7), (30, 64), (512, 96)):
        parts = [torch.randn(shape, generator=torch.Generator().manual_seed(each)).to(dtype) for each in range(size)]
        with torch.inference_mode():
            total = group.all_reduce(parts[rank])
        exact = sum(torch.randn(shape, generator=torch.Generator().manual_seed(each)) for each in range(size))
        torch.testing.assert_close(total.float(), exact, atol=1e-5 if dtype == torch.float32 else 5e-2, rtol=1e-2)
        said.append(hashlib.sha256(total.view(torch.uint8).numpy().tobytes()).hexdigest())
    whole = torch.arange(55.0).view(5, 11).to(dtype)
    part = Shard(rank, size).part(11)
    gathered = group.gather_columns(whole[:, part.start : part.stop], 11)
    assert (gathered is None) if rank else torch.equal(gathered, whole)
print(json.dumps(said), flush=True)
if rank == size - 1:
    if end == "killed":
        os.kill(os.getpid(), 9)
    sys.stdin.read()  # never comes to the next sum
    os._exit(0)
if end == "stuck" and rank == 1:  # the one waits its time, the other is told
    threading.Timer(0.2, group.abort, ("rank 2 is dead",)).start()
    group.timeout_s = 60.0
error = None
try:
    group.all_reduce(torch.ones(4))
except CollectiveError as raised:
    error = [type(raised).__name__, str(raised)]
try:
    group.gather_columns(torch.ones(1, 1), size)
except CollectiveError as raised:
    error.append(type(raised).__name__)
print(json.dumps(error), flush=True)
group.close()
os._exit(0)
"""


@pytest.mark.parametrize(
    ("end", "errors"),
    [
        ("killed", [("RankStuck", "a rank has gone")] * 2),
        (
            "stuck",
            [("RankStuck", "rank 0 of 3 waited 3 s for the others"), ("GroupAborted", "rank 2 is dead")],
        ),
    ],
)
def test_sums_gathers_and_how_it_ends(end: str, errors: list[tuple[str, str]]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        ranks = [
            subprocess.Popen(
                [sys.executable, "-c", _RANK, _arguments(rank, address, listener, end)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                pass_fds=[listener.fileno()] if rank == 0 else [],
            )
            for rank in range(SIZE)
        ]
    try:
        sums = [_line(rank) for rank in ranks]
        assert sums[0] == sums[1] == sums[2]
        for rank, (error, text) in zip(ranks, errors, strict=False):
            kind, why, afterwards = _line(rank)
            assert kind == error and text in why and afterwards == "GroupAborted"
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate(timeout=20)


def _arguments(rank: int, address: str, listener: socket.socket, end: str) -> str:
    return json.dumps([rank, SIZE, address, None if rank else listener.fileno(), end])


def _line(rank: subprocess.Popen[bytes]) -> Any:
    assert rank.stdout is not None
    line = rank.stdout.readline()
    assert line, "the rank has ended"
    return json.loads(line)


def test_who_cannot_join_says_where() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(CollectiveError, match=f"rank 1 of 2 cannot join gloo at {address}"):
        Distributed("gloo", address, 1, 2, 1.0, join_timeout_s=1.0)
    with pytest.raises(ValueError, match="rank=2 of tensor_parallel=2"):
        Distributed("gloo", address, 2, 2, 1.0)


def test_alone_it_is_the_identity() -> None:
    """One rank, in this process: what `close` leaves behind can be joined anew."""
    for _ in range(2):
        with socket.create_server(("127.0.0.1", 0)) as listener:
            group = Distributed(
                "gloo", f"127.0.0.1:{listener.getsockname()[1]}", 0, 1, 5.0, listener=listener.detach()
            )
        local = torch.arange(6.0).view(2, 3)
        assert torch.equal(group.all_reduce(local.clone()), local)
        gathered = group.gather_columns(local, len(Shard(0, 1).part(3)))
        assert gathered is not None and torch.equal(gathered, local)
        with pytest.raises(ValueError, match=r"rank 0 has 3 of 4 columns, not 4"):
            group.gather_columns(local, 4)
        group.close()
