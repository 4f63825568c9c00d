"""Small KV pools with random content, for tests of the movers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
import torch

from kvtransfer.layout import DTYPES
from kvtransfer.messages import KvSpec
from kvtransfer.plan import kv_heads

BLOCKS = 64


def kv_spec(**changes: Any) -> KvSpec:
    """2 kv heads of 2 query heads each, blocks of 4 tokens, chunks of at most 32."""
    base = KvSpec(
        model="test",
        layers=3,
        q_heads=4,
        kv_heads=2,
        head_dim=16,
        dtype="float32",
        block_size=4,
        chunk_tokens=32,
    )
    return msgspec.structs.replace(base, **changes)


def random_layers(
    kv: KvSpec, seed: int, rank: int = 0, storage: torch.Tensor | None = None
) -> list[torch.Tensor]:
    """A rank's pool. What ranks store twice is NOT the same on both: see `random_worker`."""
    generator = np.random.default_rng(seed)
    shape = (2, BLOCKS, kv.block_size, len(kv_heads(kv, rank)), kv.head_dim)
    values = [
        torch.from_numpy(generator.standard_normal(shape, np.float32)).to(DTYPES[kv.dtype])
        for _ in range(kv.layers)
    ]
    if storage is None:
        return values
    size = values[0].nbytes
    pool = [
        storage[layer * size : (layer + 1) * size].view(DTYPES[kv.dtype]).view(shape)
        for layer in range(kv.layers)
    ]
    for target, value in zip(pool, values, strict=True):
        target.copy_(value)
    return pool


def pool_bytes(kv: KvSpec, rank: int) -> int:
    return BLOCKS * kv.block_size * kv.token_bytes // kv.kv_heads * len(kv_heads(kv, rank))


def random_worker(
    kv: KvSpec, seed: int, storages: Sequence[torch.Tensor | None] | None = None
) -> list[list[torch.Tensor]]:
    """The pools of all ranks, with the same content where they store the same heads."""
    ranks = range(kv.tensor_parallel)
    storages = storages or [None] * kv.tensor_parallel
    whole = random_layers(msgspec.structs.replace(kv, tensor_parallel=1), seed)
    pools = [random_layers(kv, seed, rank, storages[rank]) for rank in ranks]
    for rank in ranks:
        heads = kv_heads(kv, rank)
        for pool, layer in zip(pools[rank], whole, strict=True):
            pool.copy_(layer[:, :, :, heads.start : heads.stop])
    return pools


def tokens_of(layers: list[torch.Tensor], blocks: list[int], first_token: int, tokens: int) -> torch.Tensor:
    """[layers, 2, tokens, kv_heads, head_dim]: KV of these positions of a sequence that starts in blocks[0]."""
    picked = torch.stack([layer[:, blocks].flatten(1, 2) for layer in layers])
    return picked[:, :, first_token : first_token + tokens]


def worker_tokens(
    kv: KvSpec, pools: list[list[torch.Tensor]], blocks: list[int], first_token: int, tokens: int
) -> torch.Tensor:
    """The same of a worker of several ranks, all its heads; asserts that ranks agree on what they share."""
    parts = [tokens_of(pool, blocks, first_token, tokens) for pool in pools]
    shape = (kv.layers, 2, tokens, kv.kv_heads, kv.head_dim)
    whole = torch.full(shape, torch.nan, dtype=parts[0].dtype)
    for rank, part in enumerate(parts):
        heads = kv_heads(kv, rank)
        for index, head in enumerate(heads):
            seen = whole[:, :, :, head]
            assert seen.isnan().all() or torch.equal(seen, part[:, :, :, index])
            whole[:, :, :, head] = part[:, :, :, index]
    return whole
