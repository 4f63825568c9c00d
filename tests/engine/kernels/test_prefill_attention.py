"""Prefill attention against the definition: chunks, windows, poisoned slots, and bits that do not depend on cuts."""

from __future__ import annotations

import dataclasses
import itertools
import random

import numpy as np
import pytest
import torch

from engine.kernels import prefill_attention as kernels
from engine.kernels.launch import Tables
from engine.kernels.prefill_attention import Spans, tile_queries, tiles_of

TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


class Batch:
    """Spans (start, count) over a pool that is NaN wherever no row ever wrote, and where no query looks any more."""

    def __init__(
        self,
        spans: list[tuple[int, int]],
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
        self.window = window
        used = [-(-(start + count) // block_size) for start, count in spans]
        ids = rng.sample(range(1, sum(used) + 4), sum(used))
        cache = torch.full((2, sum(used) + 4, block_size, heads[1], dim), torch.nan, dtype=dtype)
        tables = torch.full((len(spans), max(used) + 2), 1 << 30, dtype=torch.int32)
        for row, (start, count) in enumerate(spans):
            mine = [ids.pop() for _ in range(used[row])]
            tables[row, : used[row]] = torch.tensor(mine, dtype=torch.int32)
            positions = torch.arange(max(0, start - window + 1) if window else 0, start + count)
            blocks = tables[row, positions // block_size].long()
            fresh = torch.randn(2, len(positions), heads[1], dim, generator=noise).to(dtype)
            cache[:, blocks, positions % block_size] = fresh
        self.cache, self.tables = cache.to(device), tables.to(device)
        starts, counts = (np.array(column, np.int32) for column in zip(*spans, strict=True))
        firsts = np.concatenate(([0], np.cumsum(counts))).astype(np.int32)
        fused = torch.randn(int(firsts[-1]), heads[0] + 2 * heads[1], dim, generator=noise).to(device, dtype)
        self.q = fused[:, : heads[0]]
        tiles = tiles_of(starts, counts, tile_queries(heads[0] // heads[1], dim, dtype))
        arrays = (torch.from_numpy(array).to(device) for array in (starts, firsts, tiles))
        self.spans = Spans(*arrays)

    def run(self, reference: bool = False, mask_all: bool | None = None) -> torch.Tensor:
        out = torch.full(self.q.shape, 7.0, dtype=self.q.dtype, device=self.q.device)
        attend = kernels.prefill_attention_reference if reference else kernels.prefill_attention
        starts = torch.arange(len(self.tables), dtype=torch.int32, device=self.q.device)
        tables = Tables(self.tables.flatten(), starts * self.tables.shape[1])
        if mask_all is not None:
            launch = kernels.prefill_launch(self.q, self.cache, tables, self.spans, out, window=0, scale=None)
            dataclasses.replace(launch, constants={**launch.constants, "MASK_ALL": mask_all})()
            return out
        return attend(self.q, self.cache, tables, self.spans, out, window=self.window)

    def check(self, tolerance: float | None = None) -> None:
        tolerance = tolerance or TOLERANCE[self.q.dtype]
        torch.testing.assert_close(self.run(), self.run(reference=True), atol=tolerance, rtol=tolerance)


def test_the_reference_is_sdpa(device: torch.device) -> None:
    batch = Batch([(0, 9), (20, 5)], device, block_size=4)
    out = batch.run(reference=True)
    for span, (start, count) in enumerate([(0, 9), (20, 5)]):
        blocks = batch.tables[span, : -(-(start + count) // 4)].long()
        k, v = (
            batch.cache[:, blocks].flatten(1, 2)[:, : start + count].transpose(1, 2).repeat_interleave(2, 1)
        )
        mask = torch.ones(count, start + count, dtype=torch.bool, device=device).tril(start)
        first = 9 * span
        q = batch.q[first : first + count].transpose(0, 1)
        expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        torch.testing.assert_close(out[first : first + count], expected.transpose(0, 1))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("block_size", [8, 16, 64, 5])
def test_prompts_chunks_and_single_tokens(dtype: torch.dtype, block_size: int, device: torch.device) -> None:
    spans = [
        (0, 1),
        (0, block_size),
        (block_size, block_size + 1),
        (3, 70),
        (2 * block_size - 1, 1),
        (130, 9),
    ]
    Batch(spans, device, block_size=block_size, dtype=dtype).check()


@pytest.mark.parametrize("dim", [32, 64, 96, 128, 256])
def test_dimensions(dim: int, device: torch.device) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        Batch([(37, 40), (0, 3)], device, dim=dim, dtype=dtype, heads=(2, 1)).check()


@pytest.mark.parametrize("heads", [(1, 1), (3, 3), (6, 2), (5, 1), (14, 2), (16, 1), (20, 1)])
def test_groups(heads: tuple[int, int], device: torch.device) -> None:
    Batch([(33, 20), (0, 7)], device, heads=heads).check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("window", [1, 5, 31, 64, 150])
def test_windows(window: int, dtype: torch.dtype, device: torch.device) -> None:
    spans = [(0, 90), (200, 70), (window, 1), (window - 1, 3)]
    Batch(spans, device, window=window, block_size=32, heads=(2, 1), dtype=dtype).check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("window", [0, 50])
def test_a_query_is_the_same_to_the_last_bit_however_its_prompt_is_cut(
    window: int, dtype: torch.dtype, device: torch.device
) -> None:
    total = 150
    whole = Batch([(0, total)], device, heads=(3, 1), dtype=dtype, seed=4)
    whole.window = window
    expected = whole.run()
    for cuts in ([64, 128], [1, 2, 77], [149], [50]):
        edges = [0, *cuts, total]
        spans = [(first, last - first) for first, last in itertools.pairwise(edges)]
        cut = Batch(spans, device, heads=(3, 1), dtype=dtype)
        cut.window, cut.cache, cut.q = window, whole.cache, whole.q
        cut.tables = whole.tables.expand(len(spans), -1)
        assert torch.equal(cut.run(), expected)


def test_masks_change_no_bit(device: torch.device) -> None:
    """Whether a tile of keys is masked depends on where a query's chunk begins."""
    batch = Batch([(100, 50), (31, 40)], device, block_size=32)
    assert torch.equal(batch.run(mask_all=True), batch.run(mask_all=False))


def test_large_scores_do_not_overflow(device: torch.device) -> None:
    batch = Batch([(40, 30)], device)
    batch.q.mul_(1000)
    batch.check(1e-3)  # of scores near 10,000 in fp32


def test_tiles_cover_each_query_once_longest_context_first() -> None:
    starts, counts = np.array([5, 0, 900], np.int32), np.array([70, 0, 33], np.int32)
    tiles = tiles_of(starts, counts, 32)
    assert sorted(map(tuple, tiles.tolist())) == [(0, 0), (0, 32), (0, 64), (2, 0), (2, 32)]
    assert tiles[0].tolist() == [2, 32] and tiles[-1].tolist() == [0, 0]
    assert tiles_of(np.zeros(0, np.int32), np.zeros(0, np.int32), 32).shape == (0, 2)


def test_what_does_not_fit_is_refused(device: torch.device) -> None:
    with pytest.raises(ValueError, match="66 query heads share a kv head: at most 32"):
        Batch([(0, 3)], device, heads=(66, 1)).run()
    batch = Batch([(0, 3)], device)
    batch.cache = batch.cache[..., :16]
    with pytest.raises(ValueError, match="queries of 32 against a cache of 16"):
        batch.run()
