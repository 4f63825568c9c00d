"""The decoder: one forward over all tokens of a step, whichever requests they belong to.

Called by the runner only. Rounds where transformers rounds (norms in fp32, products in the model's dtype), so that
greedy tokens agree. Knows nothing of requests, only of token, position and attention plan. A rank of a tensor-parallel
replica is the same decoder with less in its weights and a `Collective`: it sums the embeddings, and what the output
and down projections give, over the ranks, and gathers the logits on rank 0. Which sums a step makes depends on its
tokens and `wanted` alone, so that the ranks cannot get out of step.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from engine.attention import AttentionPlan, PagedAttention
from engine.collective import Collective
from engine.kv_cache import KVCache
from engine.model_config import ModelConfig
from engine.rotary import Rotary, rotate
from engine.weights import LayerWeights, Weights


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Normalised in fp32, rounded to the dtype of x, then scaled: F.rms_norm with a weight would round only once."""
    return F.rms_norm(x, (x.shape[-1],), None, eps).mul_(weight)


class Decoder:
    """The model's mathematics over given weights and cache; keeps no state of requests."""

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        cache: KVCache,
        collective: Collective | None = None,
    ) -> None:
        if cache.kv_heads != weights.kv_heads:
            raise ValueError(f"the cache has {cache.kv_heads} kv heads, the weights {weights.kv_heads}")
        self.config = config
        self._weights = weights
        self._cache = cache
        self._collective = collective
        self._attention = PagedAttention()
        self._rotary = Rotary(config.rope, config.head_dim, weights.device)
        self._windows = config.windows
        self._qk_norms = [self._qk_norm(layer) for layer in weights.layers]

    def forward(
        self, tokens: torch.Tensor, positions: torch.Tensor, plan: AttentionPlan, wanted: torch.Tensor | None
    ) -> torch.Tensor | None:
        """Computes the step's KV into the cache, and logits [wanted, vocab] after the tokens at indices `wanted`.

        None when nothing is wanted, and on all ranks but the first.
        """
        hidden = self.hidden(tokens, positions, plan, wanted)
        return None if hidden is None else self.head(hidden)

    def head(self, hidden: torch.Tensor) -> torch.Tensor | None:
        """Logits [rows, vocab] of some rows of what `hidden` returned; None on all ranks but the first."""
        local = self._weights.head(hidden)
        if self._collective is None:
            return local
        return self._collective.gather_columns(local, self.config.vocab_size)

    def hidden(
        self, tokens: torch.Tensor, positions: torch.Tensor, plan: AttentionPlan, wanted: torch.Tensor | None
    ) -> torch.Tensor | None:
        """`forward` but for the head: [wanted, hidden], for callers that cannot hold the logits of all at once.

        tokens, positions, wanted: int64 [tokens], [tokens], [wanted], the last ascending. With `wanted` None there are
        no logits, and what lies behind the last layer's keys and values is not computed.
        """
        x = self._embed(tokens)
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
        return rms_norm(x, self._weights.norm, self.config.rms_eps)

    def _embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """[tokens, hidden]; of several ranks each knows some ids, and gives zeros for the others."""
        if self._collective is None:
            return F.embedding(tokens, self._weights.embedding)
        vocabulary = self._weights.vocabulary
        elsewhere = (tokens < vocabulary.start) | (tokens >= vocabulary.stop)
        known = (tokens - vocabulary.start).masked_fill_(elsewhere, 0)
        x = F.embedding(known, self._weights.embedding).masked_fill_(elsewhere.unsqueeze(1), 0)
        return self._collective.all_reduce(x)

    def _reduce(self, partial: torch.Tensor) -> torch.Tensor:
        """Sums partial results over the ranks."""
        return partial if self._collective is None else self._collective.all_reduce(partial)

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
        turned, qk_norm = qkv[:, : q_heads + kv_heads], self._qk_norms[index]
        if qk_norm is not None:
            turned = rms_norm(turned, qk_norm, self.config.rms_eps)
        rotated = rotate(turned, cos, sin)
        q, k, v = rotated[:, :q_heads], rotated[:, q_heads:], qkv[:, q_heads + kv_heads :]
        self._cache.write(index, plan.slots, k, v)
        if keys_only:
            return None
        reads = plan.reads[self._windows[index]]
        return self._attention(q, k, v, self._cache.layers[index], reads).view(len(x), -1)

    def _qk_norm(self, layer: LayerWeights) -> torch.Tensor | None:
        """The scales of queries and keys as one [q_heads + kv_heads, head_dim], so that both are normed at once."""
        if layer.q_norm is None or layer.k_norm is None:
            return None
        queries = layer.q_norm.expand(self._weights.q_heads, -1)
        return torch.cat((queries, layer.k_norm.expand(self._weights.kv_heads, -1)))

    def _feed_forward(self, layer: LayerWeights, x: torch.Tensor) -> torch.Tensor:
        normed = rms_norm(x, layer.post_norm, self.config.rms_eps)
        gate, up = layer.gate_up(normed).chunk(2, dim=-1)
        return self._reduce(layer.down(F.silu(gate).mul_(up)))
