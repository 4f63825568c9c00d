"""Gather and scatter: bit-exact over different block sizes, dtypes and random blocks, and nothing else is touched."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtransfer import layout, transcode
from kvtransfer.layout import DTYPES
from kvtransfer.plan import Piece, wire_bytes

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


def whole(pool: list[torch.Tensor], tokens: int, wire: str = "") -> Piece:
    """All heads of so many tokens, as one piece."""
    _, _, _, heads, dim = pool[0].shape
    size = wire_bytes(wire or name_of(pool), len(pool), dim, heads, tokens)
    return Piece(0, 0, heads, 0, tokens, 0, size, range(heads))


def name_of(pool: list[torch.Tensor]) -> str:
    return str(pool[0].dtype).removeprefix("torch.")


def tiles(heads: int, tokens: int, rng: random.Random) -> list[tuple[range, range]]:
    """A chunk cut into rectangles of heads x tokens, at random."""
    found = []
    edges = sorted({0, heads, *(rng.randint(0, heads) for _ in range(2))})
    for first, end in pairwise(edges):
        cuts = sorted({0, tokens, *(rng.randint(0, tokens) for _ in range(2))})
        found += [(range(first, end), range(start, stop)) for start, stop in pairwise(cuts)]
    rng.shuffle(found)
    return found


def pieces_of(pool: list[torch.Tensor], cut: list[tuple[range, range]], wire: str) -> list[Piece]:
    at, pieces = 0, []
    for index, (heads, tokens) in enumerate(cut):
        size = wire_bytes(wire, len(pool), pool[0].shape[-1], len(heads), len(tokens))
        pieces.append(Piece(index, heads.start, len(heads), tokens.start, len(tokens), at, size, heads))
        at += size
    return pieces


@settings(max_examples=150, deadline=None)
@given(
    shapes, sizes, sizes, st.integers(0, 3), st.integers(0, 20), st.integers(1, 40), st.booleans(), st.data()
)
def test_what_is_gathered_here_is_scattered_there(
    shape: Shape,
    from_size: int,
    to_size: int,
    skipped_blocks: int,
    ahead: int,
    tokens: int,
    in_pieces: bool,
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
    cut = tiles(shape.kv_heads, tokens, rng) if in_pieces else [(range(shape.kv_heads), range(tokens))]
    pieces = pieces_of(source, cut, name_of(source))

    wire = np.zeros(tokens * layout.token_bytes(source), dtype=np.uint8)
    layout.gather(
        source, layout.span(source, from_blocks, from_start, first, tokens), pieces, name_of(source), wire
    )
    expected = naive_wire(source, from_blocks, from_start, first, tokens)
    boxes = expected.view(shape.kv_heads, shape.layers, 2, tokens, -1)
    for piece in pieces:
        box = boxes[piece.head : piece.head + piece.heads, :, :, piece.first : piece.first + piece.tokens]
        found = torch.from_numpy(wire[piece.offset : piece.offset + piece.size_bytes])
        assert torch.equal(found, box.flatten())

    some = rng.sample(pieces, rng.randint(1, len(pieces)))  # as a rank does that shares its heads with others
    part = np.zeros_like(wire)
    layout.gather(
        source, layout.span(source, from_blocks, from_start, first, tokens), some, name_of(source), part
    )
    for piece in pieces:
        at = slice(piece.offset, piece.offset + piece.size_bytes)
        assert np.array_equal(part[at], wire[at] if piece in some else np.zeros(piece.size_bytes, np.uint8))

    layout.scatter(
        target, layout.span(target, to_blocks, to_start, first, tokens), pieces, name_of(target), wire
    )
    assert torch.equal(naive_wire(target, to_blocks, to_start, first, tokens), expected)
    untouched = torch.ones(110, to_size, dtype=torch.bool)
    for position in range(first, end):
        untouched[to_blocks[position // to_size], position % to_size] = False
    for layer, old in zip(target, before, strict=True):
        assert torch.equal(bits(layer)[:, untouched], old[:, untouched])


@pytest.mark.parametrize("wire", ["bfloat16", "float16", "int8", "fp8_e4m3"])
def test_values_are_converted_piece_by_piece(wire: str) -> None:
    """What arrives is what a piece alone gives, whatever the others: sender and receiver need not agree on more."""
    shape = Shape(layers=2, kv_heads=3, head_dim=5, dtype=torch.float32)
    rng = random.Random(1)
    source = [torch.randn((2, 12, 4, 3, 5)) for _ in range(2)]
    target = random_pool(Shape(2, 3, 5, torch.float32), 9, 8, 2)
    where, there = layout.span(source, range(2, 12), 0, 3, 37), layout.span(target, range(9), 0, 11, 37)
    cut = tiles(3, 37, rng)
    pieces = pieces_of(source, cut, wire)
    buffer = np.zeros(sum(piece.size_bytes for piece in pieces), dtype=np.uint8)
    layout.gather(source, where, pieces, wire, buffer)
    layout.scatter(target, there, pieces, wire, buffer)
    values = naive_wire(source, list(range(2, 12)), 0, 3, 37).view(torch.float32).view(3, 2, 2, 37, 5)
    found = naive_wire(target, list(range(9)), 0, 11, 37).view(torch.float32).view(3, 2, 2, 37, 5)
    for heads, tokens in cut:
        here = (slice(heads.start, heads.stop), slice(None), slice(None), slice(tokens.start, tokens.stop))
        expected = values[here]
        if wire in DTYPES:
            expected = expected.to(DTYPES[wire]).float()
        else:
            expected = torch.stack([coded(expected[:, layer], wire) for layer in range(2)], 1)
        assert torch.equal(found[here], expected)
    assert shape.layers == len(source)


def coded(values: torch.Tensor, wire: str) -> torch.Tensor:
    codes = torch.empty(values.shape, dtype=torch.uint8)
    scales = torch.empty((*values.shape[:2], transcode.groups(values.shape[2])))
    transcode.encode(values, wire, codes, scales)
    return transcode.decode(codes, scales, wire)


@pytest.mark.parametrize(("wire", "half_a_step"), [("int8", 1 / 254), ("fp8_e4m3", 1 / 28)])
def test_a_code_is_at_most_half_a_step_off_the_largest_of_its_group(wire: str, half_a_step: float) -> None:
    values = torch.randn((3, 2, 50, 16)) * torch.logspace(-6, 6, 50)[:, None]
    error = (coded(values, wire) - values).abs()
    for start in range(0, 50, 16):
        group = slice(start, start + 16)
        largest = values[:, :, group].abs().amax((2, 3), keepdim=True)
        assert (error[:, :, group] <= largest * half_a_step * 1.0001).all()
        # What has the largest magnitude itself survives but for rounding.
        at_most = values[:, :, group].abs() == largest
        assert (error[:, :, group][at_most] <= 1e-6 * largest.expand_as(error[:, :, group])[at_most]).all()


def test_zeros_stay_zeros_and_what_is_not_finite_stays_so() -> None:
    for wire in ("int8", "fp8_e4m3"):
        assert not coded(torch.zeros(1, 2, 20, 4), wire).any()
        for odd in (torch.inf, -torch.inf, torch.nan):
            values = torch.ones(1, 2, 20, 4)
            values[0, 0, 3, 1] = odd
            found = coded(values, wire)
            assert found[0, 0, :16].isnan().all()
            assert torch.allclose(found[0, 0, 16:], values[0, 0, 16:]) and found[0, 1].isfinite().all()


def test_refuses_what_does_not_fit_and_changes_nothing() -> None:
    shape = Shape(layers=2, kv_heads=2, head_dim=8, dtype=torch.float32)
    pool = random_pool(shape, 8, 4, 0)
    before = [bits(layer).clone() for layer in pool]
    for blocks, start, first, tokens in [
        ([1, 2], 0, 3, 6),  # the blocks end at 8
        ([1, 2, 3], 4, 3, 6),  # before the blocks' start
        ([1, 2, 3], 2, 3, 6),  # not block-aligned
        ([1, 2, 8], 0, 3, 6),  # not in the pool
        ([1, -2, 3], 0, 3, 6),
        ([1, 2, 3], 0, 3, 0),
    ]:
        with pytest.raises(ValueError):
            layout.span(pool, blocks, start, first, tokens)
    where = layout.span(pool, [1, 2, 3], 0, 3, 6)
    good = whole(pool, 6)
    buffer = np.zeros(6 * layout.token_bytes(pool), dtype=np.uint8)
    bad: list[tuple[list[Piece], Any]] = [
        ([good], buffer[:-1]),
        ([good], buffer.astype(np.int8)),
        ([], buffer),
        ([replace(good, offset=1)], buffer),
        ([replace(good, offset=-1)], buffer),
        ([replace(good, size_bytes=good.size_bytes - 1)], buffer),
        ([replace(good, heads=3)], buffer),
        ([replace(good, head=1)], buffer),
        ([replace(good, tokens=7)], buffer),
        ([replace(good, first=1)], buffer),
        ([replace(good, first=-1)], buffer),
    ]
    for pieces, odd in bad:
        with pytest.raises(ValueError):
            layout.scatter(pool, where, pieces, "float32", odd)
        with pytest.raises(ValueError):
            layout.gather(pool, where, pieces, "float32", odd)
    half = pieces_of(pool, [(range(1), range(6))], "float32")
    with pytest.raises(ValueError, match="are not the 6 tokens x 2 heads"):
        layout.scatter(pool, where, half, "float32", buffer)
    assert all(torch.equal(bits(layer), old) for layer, old in zip(pool, before, strict=True))
    layout.scatter(pool, where, [good], "float32", buffer)


def test_a_head_of_odd_size_in_an_unaligned_buffer() -> None:
    shape = Shape(layers=1, kv_heads=1, head_dim=3, dtype=torch.bfloat16)
    source, target = random_pool(shape, 4, 4, 1), random_pool(shape, 4, 4, 2)
    backing = np.zeros(4 * layout.token_bytes(source) + 1, dtype=np.uint8)
    piece = whole(source, 4)
    layout.gather(source, layout.span(source, [3], 0, 0, 4), [piece], "bfloat16", backing[1:])
    layout.scatter(target, layout.span(target, [1], 0, 0, 4), [piece], "bfloat16", backing[1:])
    assert torch.equal(bits(target[0][:, 1]), bits(source[0][:, 3]))


def test_a_pool_is_found_where_it_lies() -> None:
    shape = Shape(layers=2, kv_heads=2, head_dim=8, dtype=torch.bfloat16)
    region = np.zeros(100_000, dtype=np.uint8)
    inside = [
        torch.from_numpy(region[at : at + 4096]).view(torch.bfloat16).view(2, 16, 4, 2, 8)
        for at in (64, 8192)
    ]
    found = layout.place(inside, region)
    assert found is not None and found.layers == (64, 8192)
    assert (found.kv_stride, found.block_stride, found.token_stride, found.head_stride) == (2048, 128, 32, 16)
    assert layout.place(random_pool(shape, 4, 4, 1), region) is None
    assert layout.place(inside, region[:9000]) is None and layout.place(inside, region[100:]) is None
    assert layout.place(inside, region[:0]) is None
