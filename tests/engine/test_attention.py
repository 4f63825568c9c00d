"""Paged attention against the definition, computed one query at a time in fp64."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from engine.attention import AttentionPlan, PagedAttention, Reads, Rows

torch.set_num_threads(1)

CPU = torch.device("cpu")


class Batch:
    """Rows (start, count) over a cache that is NaN wherever no row ever wrote."""

    def __init__(
        self, rows: list[tuple[int, int]], heads: tuple[int, int], block_size: int, seed: int = 0
    ) -> None:
        rng = random.Random(seed)
        torch.manual_seed(seed)
        (q_heads, kv_heads), dim = heads, 16
        self.rows, self.block_size = rows, block_size
        self.decodes = sum(count == 1 for _, count in rows)
        widths = [-(-(start + count) // block_size) for start, count in rows]
        ids = rng.sample(range(1, sum(widths) + 5), sum(widths))  # block 0 is nobody's
        self.tables = [np.array([ids.pop() for _ in range(width)], dtype=np.int32) for width in widths]
        self.cache = torch.full((2, sum(widths) + 5, block_size, kv_heads, dim), torch.nan)
        self.contexts = [torch.randn(2, start + count, kv_heads, dim) for start, count in rows]
        for table, context in zip(self.tables, self.contexts, strict=True):
            for position in range(context.shape[1]):
                slot = context[:, position]
                self.cache[:, int(table[position // block_size]), position % block_size] = slot
        tokens = sum(count for _, count in rows)
        self.q = torch.randn(tokens, q_heads, dim)
        news = [context[:, start:] for context, (start, _) in zip(self.contexts, rows, strict=True)]
        self.k, self.v = torch.cat(news, dim=1)

    def reads(self, window: int = 0, **changes: int) -> Reads:
        starts, counts = zip(*self.rows, strict=True)
        rows = Rows(starts, counts, self.tables, self.decodes, self.block_size)
        return AttentionPlan.build(rows, self.q.dtype, CPU, windows=[window], **changes).reads[window]

    def expected(self, window: int = 1 << 40) -> torch.Tensor:
        out, token = torch.empty_like(self.q), 0
        for (start, count), context in zip(self.rows, self.contexts, strict=True):
            for position in range(start, start + count):
                seen = context[:, max(0, position + 1 - window) : position + 1].double()
                k, v = seen.repeat_interleave(self.q.shape[1] // self.k.shape[1], 2)
                weights = torch.softmax(torch.einsum("hd,thd->ht", self.q[token].double(), k) / 4, -1)
                out[token] = torch.einsum("ht,thd->hd", weights, v)
                token += 1
        return out


ROWS = {
    "decodes of one length": [(40, 1)] * 5,
    "decodes of all lengths": [(n, 1) for n in (0, 1, 7, 15, 16, 17, 130, 200, 255, 256, 300, 511, 900)],
    "prefill": [(0, 33)],
    "long prefill": [(0, 600)],
    "chunks": [(16, 20), (600, 70), (3, 300), (500, 13)],
    "mixed": [(0, 1), (64, 1), (5, 1), (0, 2), (70, 90), (0, 64)],
}


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("heads", [(8, 2), (3, 3), (6, 1)])
@pytest.mark.parametrize("block_size", [16, 5])
def test_equals_the_definition(rows: str, heads: tuple[int, int], block_size: int) -> None:
    ordered = sorted(ROWS[rows], key=lambda row: (row[1] != 1, row[0] if row[1] == 1 else 0))
    batch = Batch(ordered, heads, block_size)
    attention = PagedAttention()
    for gather_tokens in (1 << 40, 700, 1):
        reads = batch.reads(gather_tokens=gather_tokens)
        got = attention(batch.q, batch.k, batch.v, batch.cache, reads)
        torch.testing.assert_close(got, batch.expected(), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("window", [1, 37, 299])
@pytest.mark.parametrize("block_size", [16, 5])
def test_a_window_hides_what_is_older(rows: str, window: int, block_size: int) -> None:
    """And nothing older is read: those blocks may hold NaN, but for the slots beside the window in its first block."""
    ordered = sorted(ROWS[rows], key=lambda row: (row[1] != 1, row[0] if row[1] == 1 else 0))
    batch = Batch(ordered, (4, 2), block_size)
    for (start, _), table in zip(batch.rows, batch.tables, strict=True):
        oldest = max(0, start - window + 1) // block_size
        batch.cache[:, table[:oldest].tolist()] = torch.nan
    attention = PagedAttention()
    for gather_tokens in (1 << 40, 700):
        reads = batch.reads(window, gather_tokens=gather_tokens)
        got = attention(batch.q, batch.k, batch.v, batch.cache, reads)
        torch.testing.assert_close(got, batch.expected(window), atol=2e-5, rtol=2e-5)


def test_a_window_costs_what_it_holds() -> None:
    """However long the contexts: a decode row gathers the window's blocks, a chunk those and its own."""
    tables = [np.arange(1000, dtype=np.int32)] * 3
    rows = Rows([5000, 15000, 8000], [1, 1, 100], tables, 2, 16)
    reads = AttentionPlan.build(rows, torch.float32, CPU, windows=[64]).reads[64]
    assert [len(group.blocks) for group in reads.groups] == [2 * 5]
    assert [span.blocks.tolist() for span in reads.spans if span.blocks is not None] == [
        list(range(496, 507))
    ]


def test_a_tile_of_a_long_prompt_sees_one_window_and_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = Batch([(0, 1000)], (4, 2), 16)
    seen: list[tuple[int, int]] = []
    attend = F.scaled_dot_product_attention

    def spy(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> torch.Tensor:
        seen.append((q.shape[-2], k.shape[-2]))
        return attend(q, k, v, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    PagedAttention()(batch.q, batch.k, batch.v, batch.cache, batch.reads(100))
    assert sum(queries for queries, _ in seen) == 1000
    assert all(keys <= queries + 99 for queries, keys in seen)


def test_a_window_that_nobody_outgrew_is_none() -> None:
    table = np.arange(1000, dtype=np.int32)
    for start, window, shared in ((99, 100, True), (100, 100, False)):
        reads = AttentionPlan.build(
            Rows([start], [1], [table], 1, 16), torch.float32, CPU, windows=[0, window]
        ).reads
        assert (reads[window] is reads[0]) is shared


def test_buffers_of_one_step_do_not_show_in_the_next() -> None:
    """The gather buffer and the causal strips are reused: long, short, other shapes and windows, in any order."""
    attention = PagedAttention()
    shapes = [ROWS["chunks"], ROWS["prefill"], [(1500, 60)], ROWS["chunks"], [(10, 1), (300, 1)]]
    for seed, rows in enumerate(shapes):
        batch = Batch(rows, (4, 2), 16, seed)
        for window in (0, 90, 7, 0):
            got = attention(batch.q, batch.k, batch.v, batch.cache, batch.reads(window))
            torch.testing.assert_close(got, batch.expected(window or 1 << 40), atol=2e-5, rtol=2e-5)


def test_groups_waste_little_and_cover_every_row_once() -> None:
    rng = random.Random(1)
    for _ in range(50):
        starts = sorted(rng.randrange(3000) for _ in range(rng.randint(1, 60)))
        tables = [np.arange(200, dtype=np.int32)] * len(starts)
        rows = Rows(starts, [1] * len(starts), tables, len(starts), 16)
        groups = AttentionPlan.build(rows, torch.float32, CPU, gather_tokens=8000).reads[0].groups
        assert [row for group in groups for row in range(group.first, group.last)] == list(range(len(starts)))
        for group in groups:
            contexts = [start + 1 for start in starts[group.first : group.last]]
            assert (group.low, group.high) == (0, max(contexts))
            assert group.high <= 128 or group.high <= 2 * min(contexts)
            assert group.high * len(contexts) <= 8000


def test_slots_are_where_the_block_table_says() -> None:
    table = np.array([7, 2, 9], dtype=np.int32)
    rows = Rows([5, 3], [1, 6], [table, table[::-1].copy()], 1, 4)
    plan = AttentionPlan.build(rows, torch.float32, CPU)
    assert plan.slots.tolist() == [2 * 4 + 1, 9 * 4 + 3, 2 * 4, 2 * 4 + 1, 2 * 4 + 2, 2 * 4 + 3, 7 * 4]
    with pytest.raises(IndexError):
        AttentionPlan.build(Rows([12], [1], [table], 1, 4), torch.float32, CPU)
