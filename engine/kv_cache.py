"""The memory that holds keys and values: one tensor for each layer, allocated once.

Who owns which block is the ledger's business; here are only the bytes. Written by the model, read by attention and by
the transfer. Layer i is [2 (k, v), num_blocks, block_size, kv_heads, head_dim]: the slots of a block lie together, so
that attention gathers whole blocks, and a block of one layer is two pieces for the transfer.

All layer groups of a model (`ModelConfig.groups`) share the block ids: a layer with a sliding window keeps the blocks
that have left its window as long as the others need theirs. It reads none of them.
"""

from __future__ import annotations

import torch

from engine.model_config import ModelConfig


def block_bytes(config: ModelConfig, block_size: int, dtype: torch.dtype, kv_heads: int | None = None) -> int:
    """Bytes of one block over all layers; `kv_heads` when a rank stores fewer than the model has."""
    heads = config.kv_heads if kv_heads is None else kv_heads
    return 2 * config.layers * block_size * heads * config.head_dim * dtype.itemsize


def blocks_in(budget_gib: float, config: ModelConfig, block_size: int, dtype: torch.dtype) -> int:
    """How many blocks fit into a budget given in GiB; ValueError when not even one does."""
    count = int(budget_gib * (1 << 30)) // block_bytes(config, block_size, dtype)
    if count < 1:
        raise ValueError(
            f"{budget_gib} GiB hold no KV block: one of {block_size} tokens takes "
            f"{block_bytes(config, block_size, dtype)} bytes"
        )
    return count


class KVCache:
    """Keys and values of `num_blocks` blocks; zeros at first, so that no slot was ever uninitialised memory."""

    def __init__(
        self,
        config: ModelConfig,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: str | torch.device = "cpu",
        kv_heads: int | None = None,
    ) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"num_blocks={num_blocks}, block_size={block_size}: both must be at least 1")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.kv_heads = config.kv_heads if kv_heads is None else kv_heads
        self.head_dim = config.head_dim
        self.dtype = dtype
        self.device = torch.device(device)
        shape = (2, num_blocks, block_size, self.kv_heads, self.head_dim)
        self.layers = [torch.zeros(shape, dtype=dtype, device=self.device) for _ in range(config.layers)]
        # [2, slots, kv_heads, head_dim] views of the same memory: slot = block * block_size + offset.
        self._slots = [
            layer.view(2, num_blocks * block_size, self.kv_heads, self.head_dim) for layer in self.layers
        ]

    @property
    def size_bytes(self) -> int:
        """Bytes of all layers."""
        return sum(layer.nbytes for layer in self.layers)

    def copy_blocks(self, copies: list[tuple[int, int]]) -> None:
        """Copies whole blocks, (source, target), in all layers; no target may be a source or occur twice."""
        sources, targets = torch.tensor(copies, device=self.device).unbind(1)
        for layer in self.layers:
            layer.index_copy_(1, targets, layer.index_select(1, sources))

    def write(self, layer: int, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        """Stores k, v [tokens, kv_heads, head_dim] at `slots` [tokens] (int64, distinct)."""
        both = self._slots[layer]
        both[0].index_copy_(0, slots, k)
        both[1].index_copy_(0, slots, v)
