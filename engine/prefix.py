"""Names of prefixes: a chained hash for each full block of tokens.

blake2b rather than a fast non-cryptographic hash: whoever can craft a collision could make one tenant decode from
another's KV. It costs about a microsecond a block.
"""

from __future__ import annotations

from array import array
from hashlib import blake2b

HASH_BYTES = 16


def root(salt: str) -> bytes:
    """The hash before the first block. Different salts never share a block."""
    return blake2b(salt.encode(), digest_size=HASH_BYTES).digest()


def salted(salt: str, wire_dtype: str) -> str:
    """The salt of a worker that takes KV which crossed the wire with loss ("int8", "fp8_e4m3"; "" is without).

    Such KV is never found under the name of the exact one. Who names a worker's prefixes from outside does the same.
    """
    return f"{wire_dtype}\0{salt}" if wire_dtype else salt


def extend(
    hashes: list[bytes], tokens: list[int], block_size: int, salt: str = "", limit: int | None = None
) -> None:
    """Appends the hashes of the full blocks of `tokens[:limit]` that `hashes` does not name yet."""
    previous = hashes[-1] if hashes else root(salt)
    end = len(tokens) if limit is None else min(limit, len(tokens))
    for start in range(len(hashes) * block_size, end - block_size + 1, block_size):
        block = array("I", tokens[start : start + block_size])
        previous = blake2b(previous + block.tobytes(), digest_size=HASH_BYTES).digest()
        hashes.append(previous)
