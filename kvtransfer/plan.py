"""Who sends which KV heads and tokens to whom: the transfer plan of one pair of workers. Pure, numpy only.

`plan(prefill, decode)` is computed once for a pair; `Plan.pieces(chunk, tokens)` gives the pieces of one chunk, the
same list on both sides, so that it never crosses the wire. A piece is a rectangle of heads x tokens (of all layers)
that one prefill rank writes to one decode rank with the canonical layout [kv_head, layer, k/v, token, head_dim].
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvtransfer.messages import KvSpec

Ints = npt.NDArray[np.int64]


class PlanError(ValueError):
    """These two workers cannot hand KV to each other; names both values."""


@dataclass(frozen=True, slots=True)
class Pieces:
    """The pieces of one chunk as columns, int64 [pieces], in the order of their digests: by target, then offset."""

    source: Ints  # prefill rank
    target: Ints  # decode rank
    head: Ints  # first kv head, of the model's
    heads: Ints
    first: Ints  # first token, within the chunk
    tokens: Ints
    offset: Ints  # bytes, within the target's slot
    size_bytes: Ints


class Plan:
    """See the module's text."""

    prefill: KvSpec
    decode: KvSpec
    chunk_tokens: int  # of the grid that both sides cut hand-offs by: whole blocks of the decode side

    def targets(self, prefill_rank: int) -> tuple[int, ...]:
        """Decode ranks that this prefill rank ever writes to."""
        raise NotImplementedError

    def sources(self, decode_rank: int) -> tuple[int, ...]:
        """Prefill ranks that ever write to this decode rank."""
        raise NotImplementedError

    def pieces(self, chunk: int, tokens: int) -> Pieces:
        """The pieces of the chunk with this index (replicas take turns by it) and so many tokens."""
        raise NotImplementedError


def plan(prefill: KvSpec, decode: KvSpec) -> Plan:
    """The plan of a pair; cached. Raises PlanError."""
    raise NotImplementedError


def slot_bytes(kv: KvSpec, rank: int) -> int:
    """Bytes of a landing slot of this rank: its heads of `kv.chunk_tokens` tokens as they cross the wire."""
    raise NotImplementedError
