"""Gather and scatter: bit-exact over different block sizes, dtypes and random blocks, and nothing else is touched."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtransfer import layout

torch.set_num_threads(1)


@dataclass(frozen=True)
class Shape:
    layers: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype


shapes = st.builds(
    Shape,
    layers=st.integers(1, 3),
    kv_heads=st.integers(1, 4),
    head_dim=st.sampled_from([1, 3, 4, 6, 8, 16]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
sizes = st.integers(1, 9)


def random_pool(shape: Shape, num_blocks: int, block_size: int, seed: int) -> list[torch.Tensor]:
    """Random bit patterns, not-a-number ones among them: moving must not care what the bits mean."""
    generator = np.random.default_rng(seed)
    size = (2, num_blocks, block_size, shape.kv_heads, shape.head_dim * shape.dtype.itemsize)
    return [
        torch.from_numpy(generator.integers(0, 256, size, np.uint8)).view(shape.dtype)
        for _ in range(shape.layers)
    ]


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


def naive_wire(
    pool: list[torch.Tensor], blocks: list[int], blocks_start: int, first_token: int, tokens: int
) -> torch.Tensor:
    """The wire layout by definition, one position at a time, as bytes."""
    block_size = pool[0].shape[2]
    picked = []
    for position in range(first_token, first_token + tokens):
        block, offset = divmod(position - blocks_start, block_size)
        picked.append(
            torch.stack([layer[:, blocks[block], offset] for layer in pool])
        )  # [layer, kv, head, dim]
    return bits(torch.stack(picked).permute(3, 1, 2, 0, 4)).flatten()


@settings(max_examples=150, deadline=None)
@given(shapes, sizes, sizes, st.integers(0, 3), st.integers(0, 20), st.integers(1, 40), st.data())
def test_what_is_gathered_here_is_scattered_there(
    shape: Shape,
    from_size: int,
    to_size: int,
    skipped_blocks: int,
    ahead: int,
    tokens: int,
    data: st.DataObject,
) -> None:
    rng = random.Random(data.draw(st.integers(0, 2**32), label="seed"))
    from_start, to_start = skipped_blocks * from_size, 0
    first = from_start + ahead
    end = first + tokens
    from_blocks = rng.sample(range(60), -(-(end - from_start) // from_size))
    to_blocks = rng.sample(range(110), -(-end // to_size))
    source = random_pool(shape, 60, from_size, rng.randrange(2**32))
    target = random_pool(shape, 110, to_size, rng.randrange(2**32))
    before = [bits(layer).clone() for layer in target]

    wire = np.zeros(tokens * layout.token_bytes(source), dtype=np.uint8)
    layout.gather(source, from_blocks, from_start, first, tokens, wire)
    expected = naive_wire(source, from_blocks, from_start, first, tokens)
    assert torch.equal(torch.from_numpy(wire), expected)

    layout.scatter(target, to_blocks, to_start, first, tokens, wire)
    assert torch.equal(naive_wire(target, to_blocks, to_start, first, tokens), expected)
    untouched = torch.ones(110, to_size, dtype=torch.bool)
    for position in range(first, end):
        untouched[to_blocks[position // to_size], position % to_size] = False
    for layer, old in zip(target, before, strict=True):
        assert torch.equal(bits(layer)[:, untouched], old[:, untouched])


def test_refuses_what_does_not_fit_and_changes_nothing() -> None:
    shape = Shape(layers=2, kv_heads=2, head_dim=8, dtype=torch.float32)
    pool = random_pool(shape, 8, 4, 0)
    before = [bits(layer).clone() for layer in pool]
    size = layout.token_bytes(pool)
    good = np.zeros(6 * size, dtype=np.uint8)
    bad: list[tuple[list[int], int, int, int, Any]] = [
        ([1, 2], 0, 3, 6, good),  # the blocks end at 8
        ([1, 2, 3], 4, 3, 6, good),  # before the blocks' start
        ([1, 2, 3], 2, 3, 6, good),  # not block-aligned
        ([1, 2, 8], 0, 3, 6, good),  # not in the pool
        ([1, -2, 3], 0, 3, 6, good),
        ([1, 2, 3], 0, 3, 0, good),
        ([1, 2, 3], 0, 3, 6, good[:-1]),
        ([1, 2, 3], 0, 3, 6, good.astype(np.int8)),
    ]
    for blocks, start, first, tokens, buffer in bad:
        with pytest.raises(ValueError):
            layout.scatter(pool, blocks, start, first, tokens, buffer)
        with pytest.raises(ValueError):
            layout.gather(pool, blocks, start, first, tokens, buffer)
    assert all(torch.equal(bits(layer), old) for layer, old in zip(pool, before, strict=True))
    layout.scatter(pool, [1, 2, 3], 0, 3, 6, good)


def test_a_head_of_odd_size_in_an_unaligned_buffer() -> None:
    shape = Shape(layers=1, kv_heads=1, head_dim=3, dtype=torch.bfloat16)
    source, target = random_pool(shape, 4, 4, 1), random_pool(shape, 4, 4, 2)
    backing = np.zeros(4 * layout.token_bytes(source) + 1, dtype=np.uint8)
    layout.gather(source, [3], 0, 0, 4, backing[1:])
    layout.scatter(target, [1], 0, 0, 4, backing[1:])
    assert torch.equal(bits(target[0][:, 1]), bits(source[0][:, 3]))
