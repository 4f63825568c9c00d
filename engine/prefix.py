"""Names of prefixes: a chained hash for each full block of tokens.

blake2b rather than a fast non-cryptographic hash: whoever can craft a collision could make one tenant decode from
another's KV. It costs about half a microsecond a block.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from hashlib import blake2b

HASH_BYTES = 16
# Of a name, as routers hear it. Two names of one hint are harmless: a router only guesses who has a prefix, and the
# worker looks at its own cache by the whole name.
HINT_BYTES = 8

_STRIDE = 32  # blocks whose tokens are made bytes at once


def root(salt: str) -> bytes:
    """The hash before the first block. Different salts never share a block."""
    return blake2b(salt.encode(), digest_size=HASH_BYTES).digest()


def salted(salt: str, wire_dtype: str) -> str:
    """The salt of a worker that takes KV which crossed the wire with loss ("int8", "fp8_e4m3"; "" is without).

    Such KV is never found under the name of the exact one. Who names a worker's prefixes from outside does the same.
    """
    return f"{wire_dtype}\0{salt}" if wire_dtype else salt


def names(tokens: list[int], block_size: int, salt: str = "") -> Iterator[bytes]:
    """The hashes of the full blocks of `tokens`, each computed when it is asked for."""
    return _chain(root(salt), tokens, block_size, 0, len(tokens))


def extend(
    hashes: list[bytes], tokens: list[int], block_size: int, salt: str = "", limit: int | None = None
) -> None:
    """Appends the hashes of the full blocks of `tokens[:limit]` that `hashes` does not name yet."""
    previous = hashes[-1] if hashes else root(salt)
    end = len(tokens) if limit is None else min(limit, len(tokens))
    hashes.extend(_chain(previous, tokens, block_size, len(hashes) * block_size, end))


def _chain(previous: bytes, tokens: list[int], block_size: int, start: int, end: int) -> Iterator[bytes]:
    end -= (end - start) % block_size
    stride, width = _STRIDE * block_size, 4 * block_size
    for first in range(start, end, stride):
        data = array("I", tokens[first : min(first + stride, end)]).tobytes()
        for at in range(0, len(data), width):
            previous = blake2b(previous + data[at : at + width], digest_size=HASH_BYTES).digest()
            yield previous
