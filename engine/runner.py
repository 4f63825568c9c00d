"""Runs step plans: rows become index tensors, one forward, one draw for each row that samples.

The only door between the bookkeeping and the tensors of a replica. Never decides anything: which rows, blocks and
tokens is the scheduler's plan.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import torch

from engine.attention import GATHER_BYTES, AttentionPlan, Rows
from engine.kv_cache import KVCache, block_bytes
from engine.logits import shaped
from engine.model import Decoder
from engine.model_config import ModelConfig
from engine.plan import Row, StepPlan, StepResult
from engine.sampler import sample
from engine.weights import Progress, Weights, load_weights

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Runner:
    """One replica's model, parameters and KV memory."""

    def __init__(self, config: ModelConfig, weights: Weights, kv_cache: KVCache) -> None:
        self.config = config
        self.kv_cache = kv_cache
        self._device = weights.device
        token_bytes = 2 * kv_cache.kv_heads * kv_cache.head_dim * kv_cache.dtype.itemsize
        self._gather_tokens = GATHER_BYTES // token_bytes if self._device.type == "cpu" else 1 << 40
        self._windows = tuple(sorted(set(config.windows)))
        self._decoder = Decoder(config, weights, kv_cache)

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> StepResult:
        """Computes one step. IndexError where a block table is too short or a token id is outside the vocabulary."""
        sampled = [-1] * len(plan.rows)
        order = _order(plan.rows)
        rows = [plan.rows[index] for index in order]
        logits = self._forward(rows)
        drawing = [place for place, row in enumerate(rows) if row.sampling is not None]
        if logits is not None:
            params = [row.sampling for row in rows if row.sampling is not None]
            positions = [rows[place].start + len(rows[place].tokens) for place in drawing]
            logits = shaped(logits, [rows[place] for place in drawing])
            drawn = sample(logits, params, positions).tolist()
            for place, token in zip(drawing, drawn, strict=True):
                sampled[order[place]] = token
        return StepResult(sampled)

    @torch.inference_mode()
    def logits(self, plan: StepPlan) -> torch.Tensor:
        """As `run`, but gives the logits [rows, vocab] of all rows instead of drawing; for tests and evaluation."""
        order = _order(plan.rows)
        rows = [plan.rows[index] for index in order]
        logits = self._forward(rows, everywhere=True)
        if logits is None:
            return torch.empty(0, self.config.vocab_size)
        return logits[np.argsort(order).tolist()]

    def _forward(self, rows: list[Row], everywhere: bool = False) -> torch.Tensor | None:
        """Logits of the rows that sample (or of all rows); `rows` as ordered by `_order`."""
        if not rows:
            return None
        counts = [len(row.tokens) for row in rows]
        starts = [row.start for row in rows]
        decodes = next((place for place, count in enumerate(counts) if count != 1), len(rows))
        ends = np.cumsum(counts)
        tokens = np.fromiter(
            itertools.chain.from_iterable(row.tokens for row in rows), np.int64, int(ends[-1])
        )
        offsets = np.asarray(starts, dtype=np.int64) - ends + counts
        positions = np.arange(len(tokens)) + np.repeat(offsets, counts)
        tables = [row.block_table.ids for row in rows]
        plan = AttentionPlan.build(
            Rows(starts, counts, tables, decodes, self.kv_cache.block_size),
            self.kv_cache.dtype,
            self._device,
            self._gather_tokens,
            self._windows,
        )
        drawing = np.array([everywhere or row.sampling is not None for row in rows])
        wanted = self._to_device(ends[drawing] - 1) if drawing.any() else None
        return self._decoder.forward(self._to_device(tokens), self._to_device(positions), plan, wanted)

    def _to_device(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self._device, non_blocking=True)


def _order(rows: list[Row]) -> list[int]:
    """Row indices as they are computed: decodes by length, so that similar ones stand together, then the prefills."""
    decodes = [index for index, row in enumerate(rows) if len(row.tokens) == 1]
    decodes.sort(key=lambda index: rows[index].start)
    return decodes + [index for index, row in enumerate(rows) if len(row.tokens) != 1]


def load_runner(
    path: str | Path,
    dtype: str = "auto",
    *,
    num_blocks: int | None = None,
    kv_bytes: int | None = None,
    block_size: int = 16,
    device: str = "cpu",
    progress: Progress | None = None,
) -> Runner:
    """Reads a Hugging Face folder into a runner that is ready for its first step.

    Exactly one of `num_blocks` and `kv_bytes` sizes the KV cache. dtype "auto" is what the folder says. `progress` is
    called with (bytes read, bytes in all) of the weights.
    """
    if (num_blocks is None) == (kv_bytes is None):
        raise ValueError("give exactly one of num_blocks and kv_bytes")
    if dtype != "auto" and dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r}: expected 'auto' or one of {sorted(DTYPES)}")
    config = ModelConfig.from_folder(path)
    resolved = DTYPES[config.dtype if dtype == "auto" else dtype]
    if num_blocks is None:
        assert kv_bytes is not None
        num_blocks = kv_bytes // block_bytes(config, block_size, resolved)
        if num_blocks < 1:
            raise ValueError(
                f"kv_bytes={kv_bytes} hold no block of {block_bytes(config, block_size, resolved)} bytes"
            )
    weights = load_weights(path, config, resolved, device, progress)
    return Runner(config, weights, KVCache(config, num_blocks, block_size, resolved, device))
