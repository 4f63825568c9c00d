"""Pool <-> wire: gathers a chunk's KV out of the paged pool into the canonical layout, and scatters it back.

The mover's thread calls it. Pool: one tensor a layer, [2 (k, v), num_blocks, block_size, kv_heads, head_dim]. Wire,
contiguous, of T tokens (only valid bytes, T need not be whole blocks):

    [kv_head, layer, k/v, token, head_dim]

Kv heads come first so that what one tensor-parallel rank needs is one piece. Block sizes never show on the wire. Bytes
are moved, never converted. A few large torch operations a layer (they release the interpreter lock), no token loops.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

# Moving 16 bytes at a time halves the time of torch's indexed copies; values are copied, never computed with.
_WORDS = ((16, torch.complex128), (8, torch.int64), (4, torch.int32), (2, torch.int16), (1, torch.uint8))

Bytes = npt.NDArray[np.uint8]


def token_bytes(layers: Sequence[torch.Tensor]) -> int:
    """Bytes of KV of one token, all layers, keys and values."""
    _, _, _, kv_heads, head_dim = layers[0].shape
    return 2 * len(layers) * kv_heads * head_dim * layers[0].element_size()


@dataclass(frozen=True, slots=True)
class _Span:
    """Where a chunk's tokens are: `blocks` cover them, the first of them at `offset` within the first block."""

    blocks: list[int]
    offset: int
    tokens: int


def gather(
    layers: Sequence[torch.Tensor],
    blocks: Sequence[int],
    blocks_start: int,
    first_token: int,
    tokens: int,
    out: Bytes,
) -> None:
    """Writes the KV of positions first_token .. first_token+tokens-1 into `out` (tokens * token_bytes bytes).

    `blocks` are the sequence's block ids from the one that holds position `blocks_start` (block-aligned) on. Raises
    ValueError when they do not cover the chunk, name no block of the pool, or `out` has another size.
    """
    words = _pool_words(layers)
    span = _span(words[0], blocks, blocks_start, first_token, tokens)
    wire = _wire_words(words, tokens, out)
    device = words[0].device
    # Off the CPU the chunk is put in order on the device first, then crosses in one copy.
    ordered = wire if device.type == "cpu" else torch.empty(wire.shape, dtype=wire.dtype, device=device)
    ids = torch.tensor(span.blocks, dtype=torch.int64, device=device)
    for index, layer in enumerate(words):
        picked = layer.index_select(1, ids).flatten(1, 2)[:, span.offset : span.offset + tokens]
        ordered[:, index].copy_(picked.permute(2, 0, 1, 3))
    if ordered is not wire:
        wire.copy_(ordered)


def scatter(
    layers: Sequence[torch.Tensor],
    blocks: Sequence[int],
    blocks_start: int,
    first_token: int,
    tokens: int,
    source: Bytes,
) -> None:
    """Writes the chunk in `source` (wire layout) into the blocks; the inverse of `gather`, same arguments, same errors.

    Nothing but the chunk's own positions is changed, and nothing at all when it raises.
    """
    words = _pool_words(layers)
    span = _span(words[0], blocks, blocks_start, first_token, tokens)
    wire = _wire_words(words, tokens, source)
    if wire.device != words[0].device:
        wire = wire.to(words[0].device)
    for index, layer in enumerate(words):
        _scatter_layer(layer, span, wire[:, index].permute(1, 2, 0, 3).contiguous())


def _scatter_layer(layer: torch.Tensor, span: _Span, values: torch.Tensor) -> None:
    """`values` [2, tokens, kv_heads, words] into one layer: whole blocks at once, partial ones by slices."""
    block_size = layer.shape[2]
    head = min(span.tokens, -span.offset % block_size)
    whole = (span.tokens - head) // block_size
    tail = span.tokens - head - whole * block_size
    if head:
        layer[:, span.blocks[0], span.offset : span.offset + head] = values[:, :head]
    if whole:
        first = 1 if head else 0
        ids = torch.tensor(span.blocks[first : first + whole], dtype=torch.int64, device=layer.device)
        middle = values[:, head : head + whole * block_size]
        layer[:, ids] = middle.reshape(2, whole, *layer.shape[2:])
    if tail:
        layer[:, span.blocks[-1], :tail] = values[:, span.tokens - tail :]


def _pool_words(layers: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The layers seen as the widest words that fill a head: [2, num_blocks, block_size, kv_heads, words]."""
    head_bytes = layers[0].shape[-1] * layers[0].element_size()
    word = next(dtype for size, dtype in _WORDS if head_bytes % size == 0)
    return [layer.view(word) for layer in layers]


def _wire_words(words: list[torch.Tensor], tokens: int, buffer: Bytes) -> torch.Tensor:
    """`buffer` seen as [kv_heads, layers, 2, tokens, words]; shares its memory."""
    _, _, _, kv_heads, head_words = words[0].shape
    size = 2 * len(words) * tokens * kv_heads * head_words * words[0].element_size()
    if buffer.dtype != np.uint8 or buffer.shape != (size,):
        raise ValueError(
            f"a chunk of {tokens} tokens has {size} bytes, the buffer is {buffer.dtype}{buffer.shape}"
        )
    return torch.from_numpy(buffer).view(words[0].dtype).view(kv_heads, len(words), 2, tokens, head_words)


def _span(
    layer: torch.Tensor, blocks: Sequence[int], blocks_start: int, first_token: int, tokens: int
) -> _Span:
    num_blocks, block_size = layer.shape[1], layer.shape[2]
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
    return _Span(used, offset, tokens)
