"""The decoder: one forward over all tokens of a step, whichever requests they belong to.

Called by the runner only. Rounds where transformers rounds (norms in fp32, products in the model's dtype), so that
greedy tokens agree. Knows nothing of requests, only of token, position and attention plan. A rank of a tensor-parallel
replica is the same decoder with fewer heads in its weights and an all-reduce for `reduce`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

from engine.attention import AttentionPlan, PagedAttention
from engine.kv_cache import KVCache
from engine.model_config import ModelConfig, RopeConfig
from engine.weights import LayerWeights, Weights

Reduce = Callable[[torch.Tensor], torch.Tensor]
"""Sums partial results over the ranks: after the output and the down projection. With one rank, the identity."""


def _alone(partial: torch.Tensor) -> torch.Tensor:
    return partial


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> torch.Tensor:
    """Rotary frequencies [head_dim / 2], fp32, in the order of operations of transformers' modeling_rope_utils."""
    frequencies = 1.0 / (
        rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64).to(torch.float) / head_dim)
    )
    if rope.kind == "linear":
        return frequencies / rope.factor
    if rope.kind == "llama3":
        longest = rope.original_max_positions / rope.low_freq_factor
        shortest = rope.original_max_positions / rope.high_freq_factor
        wavelength = 2 * math.pi / frequencies
        stretched = torch.where(wavelength > longest, frequencies / rope.factor, frequencies)
        smooth = (rope.original_max_positions / wavelength - rope.low_freq_factor) / (
            rope.high_freq_factor - rope.low_freq_factor
        )
        blended = (1 - smooth) * stretched / rope.factor + smooth * stretched
        medium = ~(wavelength < shortest) & ~(wavelength > longest)
        return torch.where(medium, blended, stretched)
    return frequencies


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Normalised in fp32, rounded to the dtype of x, then scaled: F.rms_norm with a weight would round only once."""
    return F.rms_norm(x, (x.shape[-1],), None, eps).mul_(weight)


def rotate(x: torch.Tensor, cos: torch.Tensor, signed_sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of x [tokens, heads, dim]; cos, signed_sin [tokens, 1, dim], the first half of sin negated."""
    return (x * cos).add_(x.roll(x.shape[-1] // 2, -1).mul_(signed_sin))


class Decoder:
    """The model's mathematics over given weights and cache; keeps no state of requests."""

    def __init__(
        self, config: ModelConfig, weights: Weights, cache: KVCache, reduce: Reduce = _alone
    ) -> None:
        if cache.kv_heads != weights.kv_heads:
            raise ValueError(f"the cache has {cache.kv_heads} kv heads, the weights {weights.kv_heads}")
        self.config = config
        self._weights = weights
        self._cache = cache
        self._reduce = reduce
        self._attention = PagedAttention()
        self._frequencies = inverse_frequencies(config.rope, config.head_dim).to(weights.device)

    def forward(
        self, tokens: torch.Tensor, positions: torch.Tensor, plan: AttentionPlan, wanted: torch.Tensor | None
    ) -> torch.Tensor | None:
        """Computes the step's KV into the cache, and logits [wanted, vocab] after the tokens at indices `wanted`.

        tokens, positions, wanted: int64 [tokens], [tokens], [wanted], the last ascending. With `wanted` None there are
        no logits, and what lies behind the last layer's keys and values is not computed.
        """
        x = F.embedding(tokens, self._weights.embedding)
        cos, sin = self._rotary(positions, x.dtype)
        final = len(self._weights.layers) - 1
        for index, layer in enumerate(self._weights.layers):
            attended = self._attend(
                index, layer, x, cos, sin, plan, keys_only=index == final and wanted is None
            )
            if attended is None:
                return None
            if index == final and wanted is not None and len(wanted) < len(x):
                x, attended = x.index_select(0, wanted), attended.index_select(0, wanted)
            x = x + self._reduce(layer.output(attended))
            x = x + self._feed_forward(layer, x)
        return self._weights.head(rms_norm(x, self._weights.norm, self.config.rms_eps))

    def _rotary(self, positions: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        angles = positions.unsqueeze(1).float() * self._frequencies
        cos, sin = angles.cos(), angles.sin()
        doubled = torch.cat((cos, cos), 1), torch.cat((-sin, sin), 1)
        return doubled[0].to(dtype).unsqueeze(1), doubled[1].to(dtype).unsqueeze(1)

    def _attend(
        self,
        index: int,
        layer: LayerWeights,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        plan: AttentionPlan,
        keys_only: bool,
    ) -> torch.Tensor | None:
        """Attention of one layer before the output projection, [tokens, q_heads * head_dim]; None if keys_only."""
        q_heads, kv_heads = self._weights.q_heads, self._weights.kv_heads
        normed = rms_norm(x, layer.input_norm, self.config.rms_eps)
        qkv = layer.qkv(normed).view(len(x), q_heads + 2 * kv_heads, self.config.head_dim)
        rotated = rotate(qkv[:, : q_heads + kv_heads], cos, sin)
        q, k, v = rotated[:, :q_heads], rotated[:, q_heads:], qkv[:, q_heads + kv_heads :]
        self._cache.write(index, plan.slots, k, v)
        if keys_only:
            return None
        return self._attention(q, k, v, self._cache.layers[index], plan).view(len(x), -1)

    def _feed_forward(self, layer: LayerWeights, x: torch.Tensor) -> torch.Tensor:
        normed = rms_norm(x, layer.post_norm, self.config.rms_eps)
        gate, up = layer.gate_up(normed).chunk(2, dim=-1)
        return self._reduce(layer.down(F.silu(gate).mul_(up)))
