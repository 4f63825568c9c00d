"""How a decode rank's pieces of a landed chunk get from the slot into its blocks: copied, verified, scattered.

The mover's thread calls it. It never lets a byte into a block that was not part of a verified copy, and trusts nothing
that the peer says: sizes and pieces are the plan's.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import torch

from kvtransfer import failpoints, layout
from kvtransfer.digest import copy_and_digest, piece_seed
from kvtransfer.memory import TransferMemory
from kvtransfer.messages import CopyOut, KvSpec
from kvtransfer.plan import Piece, Plan
from kvtransfer.transport import Region

log = logging.getLogger(__name__)


class Receiving:
    """See the module's text."""

    def __init__(self, memory: TransferMemory, layers: Sequence[torch.Tensor], kv: KvSpec, rank: int) -> None:
        self._memory = memory
        self._layers = layers
        self._kv = kv
        self._rank = rank
        self._scratch: Region = np.zeros(memory.slot_bytes if memory.slots else 0, dtype=np.uint8)

    def copy_out(self, job: CopyOut, made: Plan) -> bool:
        """Whether this rank's pieces were what they should be and are now in its blocks; if not, no block was touched.

        Copy first, then verify the copy: a write that was given up may still change the slot at any time. Raises
        ValueError for blocks that are not of the pool or do not cover the chunk, and a chunk that no plan has.
        """
        if not 0 <= job.slot < self._memory.slots:
            log.error("hand-off %d: no slot %d here", job.handoff_id, job.slot)
            return False
        whole = made.pieces(job.chunk, job.tokens)
        expected = (int(whole.size_bytes.sum()), len(whole))
        if (job.size_bytes, len(job.digests)) != expected:
            log.warning(
                "hand-off %d: a chunk of %d bytes in %d pieces, not of %d in %d",
                *(job.handoff_id, job.size_bytes, len(job.digests), *expected),
            )
            return False
        pieces = made.incoming(self._rank, job.chunk, job.tokens)
        where = layout.span(self._layers, job.blocks, job.blocks_start, job.first_token, job.tokens)
        if not all(self._verified_copy(job, piece) for piece in pieces):
            return False
        failpoints.reached("copying-out")
        layout.scatter(self._layers, where, pieces, made.wire_dtype, self._scratch)
        return True

    def _verified_copy(self, job: CopyOut, piece: Piece) -> bool:
        """Copies a piece to the same place of the scratch memory."""
        begin = job.slot * self._memory.slot_bytes + piece.offset
        source = self._memory.endpoint.landing[begin : begin + piece.size_bytes]
        copy = self._scratch[piece.offset : piece.offset + piece.size_bytes]
        first = job.first_token + piece.first
        seed = piece_seed(job.seed, first, piece.tokens, range(self._kv.layers), piece.model_heads)
        if copy_and_digest(source, copy, seed) == job.digests[piece.index]:
            return True
        log.warning("hand-off %d: a piece at %d has another digest", job.handoff_id, first)
        return False
