"""Small KV pools with random content, for tests of the mover."""

from __future__ import annotations

import numpy as np
import torch

from kvtransfer.messages import KvSpec


def kv_spec(
    layers: int = 3, kv_heads: int = 2, head_dim: int = 16, block_size: int = 4, chunk_tokens: int = 32
) -> KvSpec:
    return KvSpec(
        model="test",
        layers=layers,
        kv_heads=kv_heads,
        head_dim=head_dim,
        dtype="float32",
        block_size=block_size,
        chunk_tokens=chunk_tokens,
    )


def random_layers(kv: KvSpec, seed: int, blocks: int = 64) -> list[torch.Tensor]:
    generator = np.random.default_rng(seed)
    shape = (2, blocks, kv.block_size, kv.kv_heads, kv.head_dim)
    return [torch.from_numpy(generator.random(shape, np.float32)) for _ in range(kv.layers)]


def tokens_of(layers: list[torch.Tensor], blocks: list[int], first_token: int, tokens: int) -> torch.Tensor:
    """[layers, 2, tokens, kv_heads, head_dim]: KV of these positions of a sequence that starts in blocks[0]."""
    picked = torch.stack([layer[:, blocks].flatten(1, 2) for layer in layers])
    return picked[:, :, first_token : first_token + tokens]
