"""The decoder and the sampler as the kernels compute them: the same mathematics as engine.model, fused for a GPU.

Called by the runner in place of `Decoder` and `sample` where the device is a GPU. Matrix products are torch's; norms
with the residual sum, rotary embedding with the KV write, attention, SiLU and the draw are Triton's. Nothing between
the upload of a plan and the drawn tokens waits for the GPU. Rounds where engine.model rounds.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from engine.api import SamplingParams
from engine.attention import Rows
from engine.collective import Collective
from engine.gpu_plan import GpuPlan, GpuPlanner
from engine.kernels import sampling
from engine.kernels.activation import silu_mul
from engine.kernels.decode_attention import decode_attention
from engine.kernels.norm import rms_norm
from engine.kernels.prefill_attention import prefill_attention
from engine.kernels.rope import angle_table, rotate_and_write
from engine.kv_cache import KVCache
from engine.model import Decoder
from engine.model_config import ModelConfig
from engine.weights import LayerWeights, Weights

_PROGRAMS_EACH = 4  # decode-attention programs for each multiprocessor; two or three run at once


class GpuDecoder(Decoder):
    """`Decoder` for plans that `compute` makes itself."""

    def __init__(
        self, config: ModelConfig, weights: Weights, cache: KVCache, collective: Collective | None = None
    ) -> None:
        super().__init__(config, weights, cache, collective)
        self._planner = GpuPlanner(cache, weights.q_heads, config.windows)
        longest = min(config.max_positions, cache.num_blocks * cache.block_size)
        self._angles = angle_table(self._rotary, longest, weights.dtype, weights.device)
        self._programs = _PROGRAMS_EACH * _multiprocessors(weights.device)

    def compute(
        self,
        tokens: npt.NDArray[np.int64],
        positions: npt.NDArray[np.int64],
        rows: Rows,
        wanted: npt.NDArray[np.int64],
    ) -> torch.Tensor | None:
        """As `Decoder.hidden`, from arrays of the host; IndexError beyond the model's positions or a row's table."""
        if len(positions) and positions.max() >= len(self._angles):
            raise IndexError(f"position {positions.max()}: the model has {len(self._angles)}")
        plan = self._planner.plan(tokens, positions, rows, wanted)
        eps, layers = self.config.rms_eps, self._weights.layers
        x = self._embed(plan.tokens)
        normed = rms_norm(x, layers[0].input_norm, eps, torch.empty_like(x))
        for index, layer in enumerate(layers):
            final = index == len(layers) - 1
            q = self._project(index, layer, normed, plan)
            if final and plan.wanted is None:
                return None
            attended = self._attention_of(index, q, plan)
            if final and plan.wanted is not None and len(plan.wanted) < len(x):
                x, attended = x.index_select(0, plan.wanted), attended.index_select(0, plan.wanted)
            partial = self._reduce(layer.output(attended))
            normed = rms_norm(partial, layer.post_norm, eps, torch.empty_like(x), x)
            fused = layer.gate_up(normed)
            activated = silu_mul(fused, fused.new_empty(len(fused), fused.shape[1] // 2))
            partial = self._reduce(layer.down(activated))
            following = self._weights.norm if final else layers[index + 1].input_norm
            normed = rms_norm(partial, following, eps, torch.empty_like(x), x)
        return normed

    def _project(self, index: int, layer: LayerWeights, normed: torch.Tensor, plan: GpuPlan) -> torch.Tensor:
        """The queries [tokens, q_heads, dim] of a layer, whose keys and values are now in the cache."""
        heads = self._weights.q_heads + 2 * self._weights.kv_heads
        fused = layer.qkv(normed).view(len(normed), heads, self.config.head_dim)
        norms = None if layer.q_norm is None or layer.k_norm is None else (layer.q_norm, layer.k_norm)
        cache, eps = self._cache.layers[index], self.config.rms_eps
        return rotate_and_write(fused, plan.positions, plan.slots, self._angles, cache, norms, eps)

    def _attention_of(self, index: int, q: torch.Tensor, plan: GpuPlan) -> torch.Tensor:
        """[tokens, q_heads * dim]."""
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        cache, window, decodes = self._cache.layers[index], self._windows[index], plan.decodes
        if decodes:
            decode_attention(
                q[:decodes],
                cache,
                plan.decode_tables,
                plan.lengths,
                plan.parts[window],
                plan.partials,
                out[:decodes],
                window=window,
                programs=self._programs,
            )
        if len(plan.spans.starts):
            prefill_attention(q, cache, plan.span_tables, plan.spans, out, window=window)
        return out.view(len(q), -1)


class GpuSampler:
    """`engine.sampler.sample` on the GPU. Keeps its scratch, and the parameters while the batch stays the same."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._params: list[SamplingParams] = []
        self._draws = sampling.Draws.of([], device)
        self._scratch = sampling.Scratch.empty(0, 1, device)

    def __call__(
        self, logits: torch.Tensor, params: Sequence[SamplingParams], positions: Sequence[int]
    ) -> torch.Tensor:
        """One token for each row of logits [rows, vocab] -> int64 [rows], on the device."""
        rows, vocab = logits.shape
        if list(params) != self._params:
            self._params, self._draws = list(params), sampling.Draws.of(params, self._device)
        wanted = sampling.Scratch.parts(vocab)
        if self._scratch.maxima.shape[1] != wanted or len(self._scratch.maxima) < rows:
            self._scratch = sampling.Scratch.empty(max(rows, 64), vocab, self._device)
        where = torch.tensor(positions, dtype=torch.int64).to(self._device, non_blocking=True)
        out = torch.empty(rows, dtype=torch.int64, device=self._device)
        return sampling.sample(logits, self._draws, where, self._scratch, out)


def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1  # the interpreter, which runs one program after the other
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
