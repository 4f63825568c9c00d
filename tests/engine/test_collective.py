"""The ranks' sums and gathers over shared memory: right to the last bit, and no wait without an end.

Most tests run the ranks as threads: the memory and the waiting are the same, and nothing has to be started.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import collective
from engine.collective import CollectiveError, GroupAborted, RankStuck, SharedMemory
from engine.shards import shards

torch.set_num_threads(1)

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@contextmanager
def group(size: int, piece_bytes: int = 256, timeout_s: float = 30.0) -> Iterator[list[SharedMemory]]:
    """All ranks of a group in this process."""
    descriptor = SharedMemory.create(size, piece_bytes)
    ranks = [SharedMemory(descriptor, rank, size, timeout_s) for rank in range(size)]
    os.close(descriptor)
    try:
        yield ranks
    finally:
        for rank in ranks:
            rank.close()


def together(ranks: list[SharedMemory], work: Callable[[SharedMemory], Any]) -> list[Any]:
    """What each rank's `work` returns, run at the same time."""
    with ThreadPoolExecutor(len(ranks)) as pool:
        futures = [pool.submit(work, rank) for rank in ranks]
        return [future.result(60) for future in futures]


def in_rank_order(parts: list[torch.Tensor]) -> torch.Tensor:
    """The sum as promised: left to right, half types in fp32 when there are more than two."""
    dtype = parts[0].dtype
    wide = torch.float32 if dtype.itemsize == 2 else dtype
    total = parts[0].to(wide)
    for part in parts[1:]:
        total = total + part.to(wide)
    return total.to(dtype)


@st.composite
def programs(draw: st.DrawFn) -> tuple[int, int, list[tuple[str, int, int, torch.dtype]]]:
    """(ranks, bytes of a piece, operations): sums [rows, columns] and gathers of rows of so many columns in all."""
    size = draw(st.integers(1, 4))
    operation = st.tuples(
        st.sampled_from(["sum", "gather"]), st.integers(0, 9), st.integers(size, 90), st.sampled_from(DTYPES)
    )
    return size, draw(st.sampled_from([64, 256, 4096])), draw(st.lists(operation, min_size=1, max_size=8))


@settings(max_examples=60, deadline=None)
@given(programs(), st.sampled_from([40, 1 << 20]), st.integers(0, 99))
def test_any_sequence_of_operations(
    program: tuple[int, int, list[tuple[str, int, int, torch.dtype]]], split_bytes: int, seed: int
) -> None:
    size, piece_bytes, operations = program
    generator = torch.Generator().manual_seed(seed)
    inputs, expected = [], []
    for kind, rows, columns, dtype in operations:
        if kind == "sum":
            parts = [torch.randn(rows, columns, generator=generator).to(dtype) for _ in range(size)]
            inputs.append(parts)
            expected.append(in_rank_order(parts))
        else:
            whole = torch.randn(rows, columns, generator=generator).to(dtype)
            cuts = [shard.part(columns) for shard in shards(size)]
            inputs.append([whole[:, cut.start : cut.stop] for cut in cuts])
            expected.append(whole)

    def work(rank: SharedMemory) -> list[torch.Tensor | None]:
        return [
            rank.all_reduce(parts[rank.rank].clone())
            if kind == "sum"
            else rank.gather_columns(parts[rank.rank], columns)
            for (kind, _, columns, _), parts in zip(operations, inputs, strict=True)
        ]

    with pytest.MonkeyPatch.context() as patch, group(size, piece_bytes) as ranks:
        patch.setattr(collective, "_SPLIT_BYTES", split_bytes)
        found = together(ranks, work)
    for place, (kind, *_) in enumerate(operations):
        for rank in range(size):
            answer = found[rank][place]
            if kind == "gather" and rank:
                assert answer is None
            else:
                assert torch.equal(answer, expected[place]), (kind, rank)


def test_works_in_and_out_of_inference_mode_and_for_parts_of_tensors() -> None:
    """The same views serve a model's step and whoever calls outside of one."""

    def work(rank: SharedMemory) -> list[torch.Tensor]:
        base = torch.arange(64.0).view(8, 8) * (rank.rank + 1)
        with torch.inference_mode():
            first = rank.all_reduce(base.t().clone())
        return [first, rank.all_reduce(base.t()), rank.all_reduce(base[2:5, 1:4])]

    with group(3) as ranks:
        for first, second, third in together(ranks, work):
            whole = torch.arange(64.0).view(8, 8)
            assert torch.equal(first, whole.t() * 6) and torch.equal(second, whole.t() * 6)
            assert torch.equal(third, whole[2:5, 1:4] * 6)


def test_a_late_rank_is_named_and_ends_the_group() -> None:
    """The one that noticed tells the others, who then do not wait their own time."""
    with group(4, timeout_s=60.0) as ranks:
        ranks[0].timeout_s = 0.2

        def work(rank: SharedMemory) -> BaseException | None:
            if rank.rank in (1, 3):
                return None  # never comes
            try:
                rank.all_reduce(torch.ones(4))
            except CollectiveError as error:
                return error
            return None

        found = together(ranks, work)
        assert isinstance(found[0], RankStuck) and found[0].ranks == (1, 3)
        assert "rank 0 of 4 waited 0.2 s for rank 1, 3" in str(found[0])
        assert isinstance(found[2], GroupAborted) and "rank 0: rank 0 of 4 waited" in str(found[2])
        with pytest.raises(GroupAborted):
            ranks[0].all_reduce(torch.ones(4))
        with pytest.raises(GroupAborted):  # comes too late, and gets no wrong sum
            ranks[1].all_reduce(torch.ones(4))


@pytest.mark.parametrize("kind", ["own", "other"])
def test_abort_wakes_who_waits(kind: str) -> None:
    """From another thread of the waiting rank, or by another rank."""
    with group(2, timeout_s=60.0) as ranks:
        failed: list[BaseException] = []

        def work() -> None:
            try:
                ranks[0].all_reduce(torch.ones(4))
            except GroupAborted as error:
                failed.append(error)

        thread = threading.Thread(target=work)
        thread.start()
        while not ranks[0]._stage:  # it waits for rank 1 from here on
            threading.Event().wait(0.001)
        ranks[0 if kind == "own" else 1].abort("rank 1 is dead: signal 9")
        thread.join(20)
        assert not thread.is_alive() and "rank 1 is dead: signal 9" in str(failed[0])


def test_a_fast_rank_does_not_overwrite_what_others_still_read() -> None:
    """Followers run ahead of a gather by one operation; the second must wait until rank 0 has read the first."""
    with group(2, timeout_s=30.0) as ranks:
        rounds = 50

        def work(rank: SharedMemory) -> list[torch.Tensor | None]:
            return [
                rank.gather_columns(torch.full((3, 4), float(turn * 2 + rank.rank)), 8)
                for turn in range(rounds)
            ]

        found = together(ranks, work)[0]
        for turn, answer in enumerate(found):
            assert torch.equal(answer[:, :4], torch.full((3, 4), float(turn * 2)))
            assert torch.equal(answer[:, 4:], torch.full((3, 4), float(turn * 2 + 1)))


def test_mistakes_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    descriptor = SharedMemory.create(2, 256)
    with pytest.raises(CollectiveError, match=r"no group of 3 ranks \(made for 2\)"):
        SharedMemory(descriptor, 0, 3, 1.0)
    with pytest.raises(ValueError, match="rank=2 of tensor_parallel=2"):
        SharedMemory(descriptor, 2, 2, 1.0)
    with pytest.raises(ValueError, match="multiple of 64"):
        SharedMemory.create(2, 100)
    rank = SharedMemory(descriptor, 1, 2, 1.0)
    with pytest.raises(ValueError, match=r"rank 1 has 3 of 8 columns, not range\(4, 8\)"):
        rank.gather_columns(torch.ones(2, 3), 8)
    rank.close()
    with pytest.raises(GroupAborted, match="closed"):
        rank.all_reduce(torch.ones(2))
    rank.abort("too late to matter")
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    with pytest.raises(CollectiveError, match="this is aarch64: use gloo"):
        SharedMemory(descriptor, 0, 2, 1.0)
    os.close(descriptor)


_PEER = """
import sys
import torch
from engine.collective import SharedMemory

torch.set_num_threads(1)
rank = SharedMemory(int(sys.argv[1]), int(sys.argv[2]), 3, 60.0)
print("ready", flush=True)
while True:
    rank.all_reduce(torch.full((1000,), float(rank.rank)))
"""


@pytest.mark.parametrize("how", [signal.SIGSTOP, signal.SIGKILL])
def test_a_stopped_or_killed_process_is_named_in_time(how: signal.Signals) -> None:
    descriptor = SharedMemory.create(3)
    peers = [
        subprocess.Popen(
            [sys.executable, "-c", _PEER, str(descriptor), str(rank)],
            pass_fds=[descriptor],
            stdout=subprocess.PIPE,
        )
        for rank in (1, 2)
    ]
    mine = SharedMemory(descriptor, 0, 3, 60.0)
    os.close(descriptor)
    try:
        for peer in peers:
            assert peer.stdout is not None and peer.stdout.readline() == b"ready\n"
        for _ in range(20):
            assert mine.all_reduce(torch.zeros(1000)).eq(3).all()
        peers[1].send_signal(how)
        mine.timeout_s = 3.0
        with pytest.raises(RankStuck) as raised:
            while True:
                mine.all_reduce(torch.zeros(1000))
        assert raised.value.ranks == (2,)
        assert peers[0].wait(30) == 1  # it was told, long before its own time was over
    finally:
        for peer in peers:
            peer.kill()
            peer.wait(10)
            assert peer.stdout is not None
            peer.stdout.close()
        mine.close()
