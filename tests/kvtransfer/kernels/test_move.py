"""The kernels give what the torch twins give, bit for bit, and touch nothing else of the pool."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from kvtransfer import layout
from kvtransfer.kernels import move
from kvtransfer.layout import DTYPES, Span
from kvtransfer.plan import Piece, wire_bytes


def pool(
    device: torch.device, dtype: torch.dtype, apart: bool, shape: tuple[int, ...] = (2, 9, 8, 3, 20)
) -> list[torch.Tensor]:
    """Three layers of one allocation, or (apart) of three."""
    generator = torch.Generator().manual_seed(1)
    count = math.prod(shape)
    whole = (torch.randn(3 * (count + 64), generator=generator) * 3).to(dtype).to(device)
    found = [whole[at * (count + 64) :][:count].view(shape) for at in range(3)]
    return [found[1].clone(), found[0], found[2].clone()] if apart else found


def piece_of(layers: list[torch.Tensor], wire: str, heads: range, tokens: range) -> Piece:
    size = wire_bytes(wire, len(layers), layers[0].shape[-1], len(heads), len(tokens))
    return Piece(0, heads.start, len(heads), tokens.start, len(tokens), 0, size, heads)


def same_bits(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return torch.equal(found.cpu().view(torch.uint8), expected.view(torch.uint8))


CASES = [
    ("float32", "float32", False),
    ("bfloat16", "bfloat16", True),
    ("float32", "bfloat16", False),
    ("bfloat16", "float16", False),
    ("bfloat16", "int8", False),
    ("float32", "fp8_e4m3", True),
    ("float16", "fp8_e4m3", False),
]


@pytest.mark.parametrize(("stored", "wire", "apart"), CASES)
def test_a_piece_is_gathered_and_scattered_as_by_the_twin(
    device: torch.device, stored: str, wire: str, apart: bool
) -> None:
    layers = pool(device, DTYPES[stored], apart)
    blocks, offset = random.Random(2).sample(range(9), 5), 5
    where = Span(blocks, offset, 33)
    piece = piece_of(layers, wire, range(1, 3), range(4, 33))
    part = torch.full((piece.size_bytes,), 0xAA, dtype=torch.uint8, device=device)
    move.gather(layers, blocks, offset, piece, wire, part)
    expected = np.zeros(piece.size_bytes, dtype=np.uint8)
    layout.gather([layer.cpu() for layer in layers], where, [piece], wire, expected)
    assert torch.equal(part.cpu(), torch.from_numpy(expected))

    # All heads and tokens but those of the piece stay as they were.
    target = [layer.flip(1).contiguous() for layer in layers]
    twin = [layer.cpu().clone() for layer in target]
    whole = [
        piece,
        piece_of(layers, wire, range(1, 3), range(4)),
        piece_of(layers, wire, range(1), range(33)),
    ]
    at, pieces = 0, []
    for one in whole:
        pieces.append(Piece(0, one.head, one.heads, one.first, one.tokens, at, one.size_bytes, range(1)))
        at += one.size_bytes
    wired = np.zeros(at, dtype=np.uint8)
    layout.gather([layer.cpu() for layer in layers], where, pieces, wire, wired)
    layout.scatter(twin, where, pieces, wire, wired)
    for one in pieces:
        piece_bytes = torch.from_numpy(wired[one.offset : one.offset + one.size_bytes].copy())
        move.scatter(target, blocks, offset, one, wire, piece_bytes.to(device))
    for mine, theirs in zip(target, twin, strict=True):
        assert same_bits(mine, theirs)


def test_only_the_piece_is_written(device: torch.device) -> None:
    layers = pool(device, torch.float32, False)
    before = [layer.clone() for layer in layers]
    piece = piece_of(layers, "float32", range(2, 3), range(3, 12))
    part = torch.ones(piece.size_bytes // 4, device=device).view(torch.uint8)
    move.scatter(layers, [7, 2], 3, piece, "float32", part)
    for layer, old in zip(layers, before, strict=True):
        changed = (layer != old).any(-1)
        assert changed[:, 7, 6:8, 2].all() and changed[:, 2, :7, 2].all() and changed.sum() == 2 * 9
        assert (layer[:, 2, :7, 2] == 1).all()


def test_groups_without_a_scale(device: torch.device) -> None:
    """All zeros, tiny values, and such that are not finite, each in a group of its own."""
    layers = pool(device, torch.float32, False)
    layers[0].zero_()
    layers[1][0, 0, 3, 1, 2] = torch.inf
    layers[1][1, 1, 3, 0, 2] = torch.nan
    layers[2].mul_(1e-38)
    for wire in ("int8", "fp8_e4m3"):
        piece = piece_of(layers, wire, range(3), range(16))
        part = torch.zeros(piece.size_bytes, dtype=torch.uint8, device=device)
        move.gather(layers, [0, 1], 0, piece, wire, part)
        expected = np.zeros(piece.size_bytes, dtype=np.uint8)
        layout.gather([layer.cpu() for layer in layers], Span([0, 1], 0, 16), [piece], wire, expected)
        mine, theirs = (layout.split(piece, x, 3, 20) for x in (part.cpu(), torch.from_numpy(expected)))
        assert torch.equal(mine[0], theirs[0])
        assert torch.equal(mine[1].isnan(), theirs[1].isnan()) and int(mine[1].isnan().sum()) == 2
        assert torch.equal(mine[1].nan_to_num(), theirs[1].nan_to_num())


@triton.jit
def _codes(source, target, COUNT: tl.constexpr):
    at = tl.arange(0, COUNT)
    tl.store(target + at, move._encode_fp8(tl.load(source + at)))


@triton.jit
def _numbers(source, target, COUNT: tl.constexpr):
    at = tl.arange(0, COUNT)
    tl.store(target + at, move._decode_fp8(tl.load(source + at)))


def test_e4m3_is_as_torch_converts_it(device: torch.device) -> None:
    """Every code; and numbers on, between and beside the codes, ties among them."""
    codes = torch.arange(256, dtype=torch.uint8)
    numbers = torch.empty(256, device=device)
    _numbers[(1,)](codes.to(device), numbers, COUNT=256)
    expected = codes.view(torch.float8_e4m3fn).float()
    finite = expected.isfinite()
    assert torch.equal(numbers.cpu()[finite], expected[finite]) and int(finite.sum()) == 254
    exact = expected[finite].sort().values
    between = (exact[1:] + exact[:-1]) / 2
    beside = torch.cat([torch.nextafter(between, torch.full_like(between, side)) for side in (-1e9, 1e9)])
    tried = torch.cat([exact, between, beside])[:1008]
    tried = torch.nn.functional.pad(tried, (0, 1024 - len(tried)))
    found = torch.empty(1024, dtype=torch.uint8, device=device)
    _codes[(1,)](tried.to(device), found, COUNT=1024)
    assert torch.equal(found.cpu(), tried.to(torch.float8_e4m3fn).view(torch.uint8))


def test_a_pool_on_the_gpu_goes_through_the_kernels(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`layout` with a pool on a device gives what it gives on the CPU. In the interpreter the device is the CPU."""
    layers = pool(device, torch.bfloat16, False)
    where = Span([4, 1, 8], 2, 20)
    pieces: list[Any] = []
    at = 0
    for heads in (range(1), range(1, 3)):
        one = piece_of(layers, "int8", heads, range(20))
        pieces.append(Piece(0, one.head, one.heads, 0, 20, at, one.size_bytes, heads))
        at += one.size_bytes
    found, expected = np.zeros(at, dtype=np.uint8), np.zeros(at, dtype=np.uint8)
    layout.gather([layer.cpu() for layer in layers], where, pieces, "int8", expected)
    twin = [layer.cpu().flip(1).contiguous() for layer in layers]
    target = [layer.flip(1).contiguous() for layer in layers]
    layout._gather_on_device(layers, where, pieces, "int8", found)
    assert np.array_equal(found, expected)
    layout.scatter(twin, where, pieces, "int8", expected)
    layout._scatter_on_device(target, where, pieces, "int8", found)
    assert all(same_bits(mine, theirs) for mine, theirs in zip(target, twin, strict=True))
