"""How a prefill rank's share of a chunk leaves: gathered into a staging buffer, or straight from the pool.

The mover's thread calls it. Either way the same bytes arrive in the same places under the same digests: the digest of
what is sent from the pool is that of the pool's bytes in wire order, without a staging buffer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

import numpy as np
import torch

from kvtransfer import direct, layout
from kvtransfer.digest import RunningDigest, digest, piece_seed
from kvtransfer.memory import Gather, TransferMemory
from kvtransfer.messages import KvSpec, SendChunk
from kvtransfer.plan import Outgoing, Piece, Plan, PlanError
from kvtransfer.rows import merged
from kvtransfer.transport import Region, Rows

DIRECT_BYTES = 64 << 10  # of a row on average: smaller ones are slower than gathering
_HASHED_IN_PLACE_BYTES = 2 << 10  # smaller runs are copied together before they are hashed


@dataclass(frozen=True, slots=True)
class Prepared:
    """Of one chunk: the digest of each of `Outgoing.parts`, the rows of each of `Outgoing.writes` to slot 0."""

    digests: list[bytes]
    rows: list[Rows]


class Sending:
    """See the module's text."""

    def __init__(
        self, memory: TransferMemory, layers: Sequence[torch.Tensor], kv: KvSpec, gather: str
    ) -> None:
        """Raises ValueError when the pool does not lie where `gather` needs it."""
        if gather not in get_args(Gather):
            raise ValueError(f"gather={gather!r}: choose one of {', '.join(get_args(Gather))}")
        self._memory = memory
        self._layers = layers
        self._kv = kv
        self._never_gathers = gather == "never"
        self._place = None if gather == "always" else layout.place(layers, memory.endpoint.staging)
        if self._never_gathers and self._place is None:
            raise ValueError("gather='never' needs the KV pool in the transport's memory: use 'auto'")
        self._tile: Region = np.zeros(0, dtype=np.uint8)

    def check(self, made: Plan) -> None:
        """Raises PlanError when this pair cannot be served without gathering, and it must be."""
        if self._never_gathers and made.wire_dtype != self._kv.dtype:
            raise PlanError(
                f"gather='never' cannot send {self._kv.dtype} as {made.wire_dtype}, as "
                f"{made.decode.dtype} at the decode worker needs it: use 'auto'"
            )

    def prepare(self, job: SendChunk, made: Plan, outgoing: Outgoing, buffer: int) -> Prepared:
        """Gathers into staging buffer `buffer`, or points at the pool. Raises ValueError for blocks that are not of
        the pool or do not cover the chunk, and a share that does not fit into a buffer."""
        place = self._place if made.wire_dtype == self._kv.dtype else None
        if place is not None:
            runs = [
                direct.runs(place, job.blocks, job.blocks_start, job.first_token + part.first, part.tokens)
                for part in outgoing.parts
            ]
            rows = sum(
                2 * len(self._layers) * p.heads * len(r) for p, r in zip(outgoing.parts, runs, strict=True)
            )
            if self._never_gathers or outgoing.staging_bytes >= DIRECT_BYTES * rows:
                return self._point(job, outgoing, place, runs)
        return self._gather(job, made, outgoing, buffer)

    def _gather(self, job: SendChunk, made: Plan, outgoing: Outgoing, buffer: int) -> Prepared:
        limit = self._memory.slot_bytes
        if outgoing.staging_bytes > limit:
            raise ValueError(f"{outgoing.staging_bytes} bytes do not fit into a staging buffer of {limit}")
        begin = buffer * limit
        view = self._memory.endpoint.staging[begin : begin + outgoing.staging_bytes]
        where = layout.span(self._layers, job.blocks, job.blocks_start, job.first_token, job.tokens)
        layout.gather(self._layers, where, outgoing.parts, made.wire_dtype, view)
        return Prepared(
            [
                digest(view[part.offset : part.offset + part.size_bytes], self._seed(job, part))
                for part in outgoing.parts
            ],
            [_moved(write.rows, begin) for write in outgoing.writes],
        )

    def _point(
        self, job: SendChunk, outgoing: Outgoing, place: direct.PoolPlace, runs: list[direct.Runs]
    ) -> Prepared:
        digests = []
        for part, found in zip(outgoing.parts, runs, strict=True):
            running = RunningDigest(self._seed(job, part))
            if int(found.sizes.sum()) < _HASHED_IN_PLACE_BYTES * len(found):
                self._hash_copied(running, job, part)
            else:
                staging = self._memory.endpoint.staging
                for at, _, size in direct.rows(place, found, part.local_heads, 0).tolist():
                    running.update(staging[at : at + size])
            digests.append(running.digest())
        rows = [
            merged(
                np.concatenate(
                    [
                        direct.rows(place, runs[part], outgoing.parts[part].local_heads, offset)
                        for part, offset in zip(write.parts, write.offsets, strict=True)
                    ]
                )
            )
            for write in outgoing.writes
        ]
        return Prepared(digests, rows)

    def _hash_copied(self, running: RunningDigest, job: SendChunk, part: Piece) -> None:
        """Head by head and layer by layer through a tile that stays in the cache: the wire's order."""
        size = part.size_bytes // (part.heads * len(self._layers))
        if len(self._tile) < size:
            self._tile = np.zeros(size, dtype=np.uint8)
        first = job.first_token + part.first
        where = layout.span(self._layers, job.blocks, job.blocks_start, first, part.tokens)
        for head in part.local_heads:
            piece = Piece(0, head, 1, 0, part.tokens, 0, size, range(1))
            for layer in self._layers:
                layout.gather([layer], where, [piece], self._kv.dtype, self._tile)
                running.update(self._tile[:size])

    def _seed(self, job: SendChunk, part: Piece) -> int:
        first = job.first_token + part.first
        return piece_seed(job.seed, first, part.tokens, range(self._kv.layers), part.model_heads)


def _moved(rows: Rows, staging: int) -> Rows:
    return rows + np.array([staging, 0, 0], dtype=np.uint64)
