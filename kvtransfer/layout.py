"""Pool <-> wire: gathers a chunk's pieces out of the paged pool in the canonical layout, and scatters them back.

The mover's thread calls it. Pool of a rank: one tensor a layer, [2 (k, v), num_blocks, block_size, kv_heads, head_dim].
A piece on the wire, contiguous, of T tokens (only valid bytes, T need not be whole blocks):

    [kv_head, layer, k/v, token, head_dim]   when quantised, behind its fp32 scales [kv_head, layer, k/v, group]

Kv heads come first so that what one tensor-parallel rank needs is one piece. Block sizes never show on the wire. Values
are converted only where the pool's dtype is not the wire's. A few large operations a layer, no token loops; pools on a
GPU go through the kernels of `kvtransfer.kernels`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from kvtransfer import transcode
from kvtransfer.direct import PoolPlace
from kvtransfer.plan import SCALED, Piece, wire_bytes

# Moving 16 bytes at a time halves the time of torch's indexed copies; values are copied, never computed with.
_WORDS = ((16, torch.complex128), (8, torch.int64), (4, torch.int32), (2, torch.int16), (1, torch.uint8))
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

Bytes = npt.NDArray[np.uint8]


def token_bytes(layers: Sequence[torch.Tensor]) -> int:
    """Bytes of KV of one token as stored here, all layers, keys and values."""
    _, _, _, kv_heads, head_dim = layers[0].shape
    return 2 * len(layers) * kv_heads * head_dim * layers[0].element_size()


@dataclass(frozen=True, slots=True)
class Span:
    """Where some tokens of a sequence are: `blocks` cover them, the first of them at `offset` in the first block."""

    blocks: list[int]
    offset: int
    tokens: int


def span(
    layers: Sequence[torch.Tensor],
    blocks: Sequence[int],
    blocks_start: int,
    first_token: int,
    tokens: int,
) -> Span:
    """Where positions first_token .. first_token+tokens-1 are in the pool.

    `blocks` are the sequence's block ids from the one that holds position `blocks_start` (block-aligned) on. Raises
    ValueError when they do not cover the tokens or name no block of the pool.
    """
    num_blocks, block_size = layers[0].shape[1], layers[0].shape[2]
    if tokens <= 0 or blocks_start % block_size or not 0 <= blocks_start <= first_token:
        raise ValueError(
            f"no chunk: {tokens} tokens at {first_token}, blocks of {block_size} tokens that start at {blocks_start}"
        )
    skipped, offset = divmod(first_token - blocks_start, block_size)
    used = [int(block) for block in blocks[skipped : skipped + -(-(offset + tokens) // block_size)]]
    if len(used) * block_size < offset + tokens:
        end = blocks_start + len(blocks) * block_size
        raise ValueError(f"blocks hold positions {blocks_start}..{end}, the chunk is {first_token}+{tokens}")
    if min(used) < 0 or max(used) >= num_blocks:
        raise ValueError(
            f"block {min(used) if min(used) < 0 else max(used)} is not in a pool of {num_blocks}"
        )
    return Span(used, offset, tokens)


def gather(
    layers: Sequence[torch.Tensor], where: Span, pieces: Sequence[Piece], wire_dtype: str, out: Bytes
) -> None:
    """Writes each piece of the chunk at `where` into out[piece.offset:], piece.size_bytes long.

    Raises ValueError when a piece is no part of the chunk or of `out`.
    """
    _check(layers, where, pieces, wire_dtype, out)
    if layers[0].device.type != "cpu":
        return _gather_on_device(layers, where, pieces, wire_dtype, out)
    first, heads, tokens, cut = _bounds(where, pieces, layers[0].shape[2])
    ids = torch.tensor(cut.blocks, dtype=torch.int64)
    if wire_dtype in SCALED:
        pool = list(layers)
        outs = [_scaled(piece, out, pool) for piece in pieces]
    else:
        pool, dtype = _as_moved(layers, wire_dtype)
        shapes = [(piece.heads, len(pool), 2, piece.tokens, pool[0].shape[-1]) for piece in pieces]
        parts = [_values(piece, out, dtype, shape) for piece, shape in zip(pieces, shapes, strict=True)]
    whole = heads == range(pool[0].shape[3])
    for index, layer in enumerate(pool):
        source = layer if whole else layer[:, :, :, heads.start : heads.stop]
        picked = source.index_select(1, ids).flatten(1, 2)[:, cut.offset : cut.offset + tokens]
        for at, piece in enumerate(pieces):
            begin, head = piece.first - first, piece.head - heads.start
            values = picked[:, begin : begin + piece.tokens, head : head + piece.heads].permute(2, 0, 1, 3)
            if wire_dtype in SCALED:
                codes, scales = outs[at]
                transcode.encode(values, wire_dtype, codes[:, index], scales[:, index])
            else:
                parts[at][:, index].copy_(values)


def scatter(
    layers: Sequence[torch.Tensor], where: Span, pieces: Sequence[Piece], wire_dtype: str, source: Bytes
) -> None:
    """Writes the chunk into its blocks: each piece is in source[piece.offset:]; together they are all tokens of `where`
    and all heads of the pool, each once.

    Nothing but the chunk's own positions is changed, and nothing at all when it raises ValueError.
    """
    _check(layers, where, pieces, wire_dtype, source)
    heads = layers[0].shape[3]
    if sum(piece.heads * piece.tokens for piece in pieces) != heads * where.tokens:
        raise ValueError(
            f"pieces {list(pieces)} are not the {where.tokens} tokens x {heads} heads of this chunk"
        )
    if layers[0].device.type != "cpu":
        return _scatter_on_device(layers, where, pieces, wire_dtype, source)
    if wire_dtype in SCALED:
        pool = list(layers)
        sources = [_scaled(piece, source, pool) for piece in pieces]
    else:
        pool, dtype = _as_moved(layers, wire_dtype)
        shapes = [(piece.heads, len(pool), 2, piece.tokens, pool[0].shape[-1]) for piece in pieces]
        parts = [_values(piece, source, dtype, shape) for piece, shape in zip(pieces, shapes, strict=True)]
    values = torch.empty((2, where.tokens, heads, pool[0].shape[-1]), dtype=pool[0].dtype)
    for index, layer in enumerate(pool):
        for at, piece in enumerate(pieces):
            target = values[
                :, piece.first : piece.first + piece.tokens, piece.head : piece.head + piece.heads
            ]
            if wire_dtype in SCALED:
                codes, scales = sources[at]
                decoded = transcode.decode(codes[:, index], scales[:, index], wire_dtype)
            else:
                decoded = parts[at][:, index]
            target.copy_(decoded.permute(1, 2, 0, 3))
        _scatter_layer(layer, where, values)


def place(layers: Sequence[torch.Tensor], region: Bytes) -> PoolPlace | None:
    """Where the pool lies in `region`, for `kvtransfer.direct`; None when it lies elsewhere."""
    first = layers[0]
    if first.device.type != "cpu" or not region.nbytes:
        return None
    offsets = [layer.data_ptr() - region.ctypes.data for layer in layers]
    inside = min(offsets) >= 0 and all(
        at + layer.nbytes <= region.nbytes for at, layer in zip(offsets, layers, strict=True)
    )
    if not inside or not all(layer.is_contiguous() for layer in layers):
        return None
    kv, block, token, head, _ = (stride * first.element_size() for stride in first.stride())
    return PoolPlace(
        layers=tuple(offsets),
        num_blocks=first.shape[1],
        block_size=first.shape[2],
        kv_stride=kv,
        block_stride=block,
        token_stride=token,
        head_stride=head,
        head_bytes=first.shape[4] * first.element_size(),
    )


# ---- on the CPU --------------------------------------------------------------------------------------------------


def _scatter_layer(layer: torch.Tensor, where: Span, values: torch.Tensor) -> None:
    """`values` [2, tokens, kv_heads, words] into one layer: whole blocks at once, partial ones by slices."""
    block_size = layer.shape[2]
    head = min(where.tokens, -where.offset % block_size)
    whole = (where.tokens - head) // block_size
    tail = where.tokens - head - whole * block_size
    if head:
        layer[:, where.blocks[0], where.offset : where.offset + head] = values[:, :head]
    if whole:
        first = 1 if head else 0
        ids = torch.tensor(where.blocks[first : first + whole], dtype=torch.int64)
        middle = values[:, head : head + whole * block_size]
        layer[:, ids] = middle.reshape(2, whole, *layer.shape[2:])
    if tail:
        layer[:, where.blocks[-1], :tail] = values[:, where.tokens - tail :]


def _bounds(where: Span, pieces: Sequence[Piece], block_size: int) -> tuple[int, range, int, Span]:
    """First token, heads and tokens of the smallest rectangle that holds all pieces, and where its tokens are."""
    first = min(piece.first for piece in pieces)
    end = max(piece.first + piece.tokens for piece in pieces)
    heads = range(min(piece.head for piece in pieces), max(piece.head + piece.heads for piece in pieces))
    skipped, offset = divmod(where.offset + first, block_size)
    needed = -(-(offset + end - first) // block_size)
    return first, heads, end - first, Span(where.blocks[skipped : skipped + needed], offset, end - first)


def _as_moved(layers: Sequence[torch.Tensor], wire_dtype: str) -> tuple[list[torch.Tensor], torch.dtype]:
    """The pool as it is copied, and the dtype of the copies: as the widest words that fill a head, unless values have
    to be converted."""
    if DTYPES[wire_dtype] != layers[0].dtype:
        return list(layers), DTYPES[wire_dtype]
    head_bytes = layers[0].shape[-1] * layers[0].element_size()
    word = next(dtype for size, dtype in _WORDS if head_bytes % size == 0)
    return [layer.view(word) for layer in layers], word


def _values(piece: Piece, buffer: Bytes, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    part = buffer[piece.offset : piece.offset + piece.size_bytes]
    return torch.from_numpy(part).view(dtype).view(shape)


def _scaled(piece: Piece, buffer: Bytes, layers: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [heads, layers, 2, tokens, head_dim] as bytes and fp32 scales [heads, layers, 2, groups] of a piece."""
    part = torch.from_numpy(buffer[piece.offset : piece.offset + piece.size_bytes])
    return split(piece, part, len(layers), layers[0].shape[-1])


def split(piece: Piece, part: torch.Tensor, layers: int, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The codes and the scales in the bytes of a quantised piece, as views."""
    scales = 2 * layers * piece.heads * transcode.groups(piece.tokens)
    return (
        part[4 * scales :].view(piece.heads, layers, 2, piece.tokens, dim),
        part[: 4 * scales].view(torch.float32).view(piece.heads, layers, 2, -1),
    )


# ---- on a GPU ----------------------------------------------------------------------------------------------------


def _gather_on_device(
    layers: Sequence[torch.Tensor], where: Span, pieces: Sequence[Piece], wire_dtype: str, out: Bytes
) -> None:
    """Each piece is put in order on the device first, then crosses in one copy."""
    from kvtransfer.kernels import move

    for piece in pieces:
        part = torch.empty(piece.size_bytes, dtype=torch.uint8, device=layers[0].device)
        move.gather(layers, where.blocks, where.offset, piece, wire_dtype, part)
        torch.from_numpy(out[piece.offset : piece.offset + piece.size_bytes]).copy_(part)


def _scatter_on_device(
    layers: Sequence[torch.Tensor], where: Span, pieces: Sequence[Piece], wire_dtype: str, source: Bytes
) -> None:
    from kvtransfer.kernels import move

    for piece in pieces:
        part = torch.from_numpy(source[piece.offset : piece.offset + piece.size_bytes])
        move.scatter(layers, where.blocks, where.offset, piece, wire_dtype, part.to(layers[0].device))


def _check(
    layers: Sequence[torch.Tensor], where: Span, pieces: Sequence[Piece], wire_dtype: str, buffer: Bytes
) -> None:
    _, _, _, kv_heads, dim = layers[0].shape
    if buffer.dtype != np.uint8 or buffer.ndim != 1 or not pieces:
        raise ValueError(f"{len(pieces)} pieces in a buffer of {buffer.dtype}{buffer.shape}")
    for piece in pieces:
        size = wire_bytes(wire_dtype, len(layers), dim, piece.heads, piece.tokens)
        inside = (
            piece.offset >= 0
            and piece.offset + size <= len(buffer)
            and piece.first >= 0
            and 0 < piece.tokens <= where.tokens - piece.first
            and piece.head >= 0
            and 0 < piece.heads <= kv_heads - piece.head
        )
        if not inside or piece.size_bytes != size:
            raise ValueError(
                f"{piece} of {size} bytes is no part of {where.tokens} tokens x {kv_heads} heads "
                f"in a buffer of {len(buffer)} bytes"
            )
