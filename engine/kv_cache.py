"""The memory that holds keys and values: one tensor for each layer, views of one flat allocation.

Who owns which block is the ledger's business; here are only the bytes. Written by the model, read by attention and by
the transfer. Layer i is [2 (k, v), num_blocks, block_size, kv_heads, head_dim]: the slots of a block lie together, so
that attention gathers whole blocks, and a block of one layer is two pieces for the transfer.

All layer groups of a model (`ModelConfig.groups`) share the block ids: a layer with a sliding window keeps the blocks
that have left its window as long as the others need theirs. It reads none of them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from engine.model_config import ModelConfig
from engine.shards import shards

Storage = torch.Tensor | Callable[[int], torch.Tensor]
"""Memory for a cache: a flat uint8 tensor, or what makes one of so many bytes (or more)."""

_ALIGNMENT = 64  # bytes, of each layer: a cache line, and what a fresh allocation of torch has


def block_bytes(config: ModelConfig, block_size: int, dtype: torch.dtype, kv_heads: int | None = None) -> int:
    """Bytes of one block over all layers; `kv_heads` when a rank stores fewer than the model has."""
    heads = config.kv_heads if kv_heads is None else kv_heads
    return 2 * config.layers * block_size * heads * config.head_dim * dtype.itemsize


def blocks_in(size_bytes: int, config: ModelConfig, block_size: int, dtype: torch.dtype, tp: int = 1) -> int:
    """How many blocks fit into `size_bytes` on every one of `tp` ranks, which all have the same number.

    ValueError when not even one does.
    """
    widest = max(len(shard.kv_heads(config.q_heads, config.kv_heads)) for shard in shards(tp))
    needed = block_bytes(config, block_size, dtype, widest)
    if size_bytes < needed:
        raise ValueError(f"{size_bytes} bytes hold no KV block: one of {block_size} tokens takes {needed}")
    return size_bytes // needed


def storage_bytes(
    config: ModelConfig, num_blocks: int, block_size: int, dtype: torch.dtype, kv_heads: int | None = None
) -> int:
    """Bytes of the memory of a `KVCache`: its blocks, each layer's start aligned."""
    layer = num_blocks * block_bytes(config, block_size, dtype, kv_heads) // config.layers
    return config.layers * _aligned(layer)


class KVCache:
    """Keys and values of `num_blocks` blocks; zeros at first, so that no slot was ever uninitialised memory.

    `storage` gives it memory, at least `storage_bytes` on `device`, which others may know too: registered with a
    transport, for example. ValueError when that does not serve.
    """

    def __init__(
        self,
        config: ModelConfig,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: str | torch.device = "cpu",
        kv_heads: int | None = None,
        storage: Storage | None = None,
    ) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"num_blocks={num_blocks}, block_size={block_size}: both must be at least 1")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.kv_heads = config.kv_heads if kv_heads is None else kv_heads
        self.head_dim = config.head_dim
        self.dtype = dtype
        self.device = torch.device(device)
        size = storage_bytes(config, num_blocks, block_size, dtype, self.kv_heads)
        if storage is None:
            self.storage = torch.zeros(size, dtype=torch.uint8, device=self.device)
        else:
            given = storage if isinstance(storage, torch.Tensor) else storage(size)
            self.storage = _checked(given, size, self.device).zero_()
        shape = (2, num_blocks, block_size, self.kv_heads, self.head_dim)
        layer_bytes = block_bytes(config, block_size, dtype, self.kv_heads) // config.layers * num_blocks
        self.layers = [
            self.storage[start : start + layer_bytes].view(dtype).view(shape)
            for start in range(0, size, size // config.layers)
        ]
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


def _aligned(size_bytes: int) -> int:
    return -(-size_bytes // _ALIGNMENT) * _ALIGNMENT


def _checked(given: torch.Tensor, size_bytes: int, device: torch.device) -> torch.Tensor:
    """The first `size_bytes` of what was given for a cache."""
    if given.dtype is not torch.uint8 or given.dim() != 1 or not given.is_contiguous():
        raise ValueError(f"storage is {given.dtype} {list(given.shape)}: expected contiguous uint8 [bytes]")
    if given.device.type != device.type:
        raise ValueError(f"storage is on {given.device}, the cache on {device}")
    if len(given) < size_bytes:
        raise ValueError(f"storage has {len(given)} bytes, the KV blocks take {size_bytes}")
    if given.data_ptr() % _ALIGNMENT:
        raise ValueError(f"storage starts at {given.data_ptr():#x}: expected a multiple of {_ALIGNMENT}")
    return given[:size_bytes]
