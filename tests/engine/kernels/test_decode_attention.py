"""Decode attention against the definition: shapes, windows, poisoned slots, company."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch

from engine.kernels import decode_attention as kernels
from engine.kernels.decode_attention import Partials, Parts, capacity_of, parts_of
from engine.kernels.launch import Tables

TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


class Batch:
    """Rows of given lengths over a pool that is NaN wherever no row ever wrote, and in what a window left behind."""

    def __init__(
        self,
        lengths: list[int],
        device: torch.device,
        heads: tuple[int, int] = (4, 2),
        dim: int = 32,
        block_size: int = 16,
        dtype: torch.dtype = torch.float32,
        window: int = 0,
        seed: int = 0,
    ) -> None:
        rng = random.Random(seed)
        noise = torch.Generator().manual_seed(seed)
        self.window, self.lengths_list = window, lengths
        used = [-(-length // block_size) for length in lengths]
        ids = rng.sample(range(1, sum(used) + 4), sum(used))  # block 0 is nobody's
        cache = torch.full((2, sum(used) + 4, block_size, heads[1], dim), torch.nan, dtype=dtype)
        tables = torch.zeros(len(lengths), max(used, default=0) + 2, dtype=torch.int32)
        for row, length in enumerate(lengths):
            tables[row, : used[row]] = torch.tensor([ids.pop() for _ in range(used[row])], dtype=torch.int32)
            tables[row, used[row] :] = 1 << 30  # never to be followed
            positions = torch.arange(max(0, length - window) if window else 0, length)
            blocks = tables[row, positions // block_size].long()
            fresh = torch.randn(2, len(positions), heads[1], dim, generator=noise).to(dtype)
            cache[:, blocks, positions % block_size] = fresh
        self.cache, self.tables = cache.to(device), tables.to(device)
        starts = torch.arange(len(lengths), dtype=torch.int32) * tables.shape[1]
        self.flat = Tables(self.tables.flatten(), starts.to(device))
        # As the fused projection leaves them: queries between other columns.
        fused = torch.randn(len(lengths), heads[0] + 2 * heads[1], dim, generator=noise).to(device, dtype)
        self.q = fused[:, : heads[0]]
        self.lengths = torch.tensor(lengths, dtype=torch.int32, device=device)
        rows, firsts = parts_of(np.array(lengths, np.int32), window)
        padded = np.full(capacity_of(len(lengths), sum(lengths)), 1 << 30, np.int32)
        padded[: len(rows)] = rows
        self.parts = Parts(torch.from_numpy(padded).to(device), torch.from_numpy(firsts).to(device))
        self.partials = Partials.empty(len(padded), heads[0], dim, device)
        for partial in (self.partials.values, self.partials.levels, self.partials.weights):
            partial.fill_(torch.nan)

    def run(self, programs: int = 3, reference: bool = False) -> torch.Tensor:
        out = torch.full(self.q.shape, 7.0, dtype=self.q.dtype, device=self.q.device)
        attend = kernels.decode_attention_reference if reference else kernels.decode_attention
        return attend(
            self.q,
            self.cache,
            self.flat,
            self.lengths,
            self.parts,
            self.partials,
            out,
            window=self.window,
            programs=programs,
        )

    def check(self, tolerance: float | None = None) -> None:
        tolerance = tolerance or TOLERANCE[self.q.dtype]
        torch.testing.assert_close(self.run(), self.run(reference=True), atol=tolerance, rtol=tolerance)


def test_the_reference_is_the_definition(device: torch.device) -> None:
    batch = Batch([5, 0, 1], device, heads=(4, 2), block_size=4, dim=8)
    out = batch.run(reference=True)
    for head in range(4):
        blocks = batch.tables[0, :2].tolist()
        k, v = (batch.cache[which, blocks].reshape(-1, 2, 8)[:5, head // 2] for which in (0, 1))
        weights = torch.softmax((k @ batch.q[0, head]) / math.sqrt(8), 0)
        torch.testing.assert_close(out[0, head], weights @ v)
        torch.testing.assert_close(out[2, head], batch.cache[1, int(batch.tables[2, 0]), 0, head // 2])
    assert not out[1].any()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("block_size", [8, 16, 64, 5])
def test_lengths_around_blocks_and_splits(dtype: torch.dtype, block_size: int, device: torch.device) -> None:
    lengths = [1, block_size, block_size + 1, 0, 2 * block_size - 1, 255 + block_size % 3]
    Batch(lengths, device, block_size=block_size, dtype=dtype, heads=(2, 1)).check()


@pytest.mark.parametrize("dim", [32, 64, 96, 128, 256])
def test_dimensions(dim: int, device: torch.device) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        Batch([37, 3], device, dim=dim, dtype=dtype, heads=(2, 1)).check()


@pytest.mark.parametrize("heads", [(1, 1), (3, 3), (6, 2), (5, 1), (14, 2), (16, 1), (20, 1)])
def test_groups(heads: tuple[int, int], device: torch.device) -> None:
    Batch([33, 1], device, heads=heads).check()


@pytest.mark.parametrize("window", [1, 5, 16, 100, 256, 299])
def test_windows(window: int, device: torch.device) -> None:
    """Also shorter than a block, and ones that cut a split at each end."""
    Batch([1, window, window + 1, 300, 517], device, heads=(2, 1), window=window, block_size=32).check()


def test_a_long_row_among_short_ones(device: torch.device) -> None:
    """More parts than one merge loads at once."""
    length = kernels.SPLIT * (kernels._MERGED + 1) + 3
    batch = Batch([3, length, 1, 0], device, heads=(1, 1), block_size=64)
    assert int(batch.parts.firsts[-1]) == kernels._MERGED + 4
    batch.check()


def test_a_row_is_the_same_to_the_last_bit_in_any_company(device: torch.device) -> None:
    lengths = [300, 256, 1]
    for window in (0, 270):
        alone = [Batch([length], device, window=window, seed=9) for length in lengths]
        for index, (length, single) in enumerate(zip(lengths, alone, strict=True)):
            company = Batch([40, length, 257], device, window=window, seed=index)
            # The same row: its keys, values and query copied into the other pool.
            blocks = -(-length // 16)
            company.cache[:, company.tables[1, :blocks].long()] = single.cache[
                :, single.tables[0, :blocks].long()
            ]
            company.q[1] = single.q[0]
            for programs in (1, 5):
                assert torch.equal(company.run(programs)[1], single.run()[0])


def test_large_scores_do_not_overflow(device: torch.device) -> None:
    batch = Batch([300, 40], device)
    batch.q.mul_(1000)
    batch.check(1e-3)  # of scores near 10,000 in fp32


def test_padding_rows_give_zeros_and_no_rows_are_no_launch(device: torch.device) -> None:
    batch = Batch([0, 0, 0], device)
    assert not batch.run().any()
    empty = Batch([], device)
    assert empty.run().shape == (0, 4, 32)


def test_parts_cover_each_position_once() -> None:
    rng = random.Random(3)
    for _ in range(200):
        lengths = np.array(
            [rng.choice([0, 1, 255, 256, 257, rng.randrange(3000)]) for _ in range(7)], np.int32
        )
        window = rng.choice([0, 1, 100, 256, 700])
        rows, firsts = parts_of(lengths, window)
        assert firsts[-1] == len(rows) <= capacity_of(len(lengths), int(lengths.sum()))
        for row, length in enumerate(lengths.tolist()):
            oldest = max(0, length - window) if window else 0
            splits = range(oldest // kernels.SPLIT, -(-length // kernels.SPLIT)) if length else range(0)
            assert (rows[firsts[row] : firsts[row + 1]] == row).all()
            assert firsts[row + 1] - firsts[row] == len(splits)


def test_what_does_not_fit_is_refused(device: torch.device) -> None:
    batch = Batch([5, 6], device)
    with pytest.raises(ValueError, match="3 query heads over 2 kv heads"):
        batch.q = batch.q[:, :3]
        batch.run()
    batch = Batch([5, 6], device)
    batch.q = batch.q[:1]
    with pytest.raises(ValueError, match="1 rows, parts of 2"):
        batch.run()
