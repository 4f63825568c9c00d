"""The checksum of a piece's valid bytes: xxh3-128, seeded with what the bytes claim to be.

It tells damaged, late and misplaced bytes from right ones; it is no signature (peers are authenticated elsewhere).
xxhash releases the interpreter lock for large buffers, numpy for large copies; nothing here imports torch.
"""

from __future__ import annotations

import struct

import numpy as np
import numpy.typing as npt
import xxhash

DIGEST_BYTES = 16
_PIECE_BYTES = 256 << 10  # stays in the cache between being copied and being hashed
_CHUNK = struct.Struct("<QQ")
_PIECE = struct.Struct("<QQQIIII")

Bytes = npt.NDArray[np.uint8]


def chunk_seed(prefix: bytes, first_token: int, tokens: int) -> int:
    """64 bits which commit to the prefix (a hash of all token ids up to the chunk's end) and to the chunk's tokens.

    Raises struct.error for numbers that are negative or too large.
    """
    return xxhash.xxh3_64_intdigest(_CHUNK.pack(first_token, tokens) + prefix)


def piece_seed(seed: int, first_token: int, tokens: int, layers: range, heads: range) -> int:
    """64 bits which commit to the chunk's seed and to one piece of it: its tokens (`first_token` is a position of the
    prompt), its layers and its kv heads (of the model's). Whoever sends it, and to whom, does not matter.

    Raises ValueError for a range with steps, struct.error for numbers that are negative or too large.
    """
    if layers.step != 1 or heads.step != 1:
        raise ValueError("layer and head ranges have no steps")
    return xxhash.xxh3_64_intdigest(
        _PIECE.pack(seed, first_token, tokens, layers.start, layers.stop, heads.start, heads.stop)
    )


def digest(buffer: Bytes, seed: int) -> bytes:
    """xxh3-128 of a contiguous buffer under a 64-bit seed: 16 bytes."""
    return xxhash.xxh3_128_digest(buffer.data, seed=seed)


class RunningDigest:
    """`digest` of bytes that come in parts, each contiguous."""

    def __init__(self, seed: int) -> None:
        self._state = xxhash.xxh3_128(seed=seed)

    def update(self, part: Bytes) -> None:
        self._state.update(part.data)

    def digest(self) -> bytes:
        return self._state.digest()


def copy_and_digest(source: Bytes, target: Bytes, seed: int) -> bytes:
    """Copies `source` to `target` (same length, no overlap) and returns `digest(target)`.

    Piece by piece, each hashed from the copy while it is still in the cache. Whatever happens to `source` afterwards,
    or while this runs: the digest is that of the bytes that are in `target`.
    """
    if source.shape != target.shape or source.ndim != 1:
        raise ValueError(f"cannot copy shape {source.shape} to {target.shape}")
    state = xxhash.xxh3_128(seed=seed)
    for at in range(0, len(source), _PIECE_BYTES):
        piece = target[at : at + _PIECE_BYTES]
        np.copyto(piece, source[at : at + _PIECE_BYTES])
        state.update(piece.data)
    return state.digest()
