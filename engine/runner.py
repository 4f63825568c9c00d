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
from engine.logprobs import drawn_logprobs, score
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
        result = StepResult([-1] * len(plan.rows))
        if plan.copies:
            self.kv_cache.copy_blocks(plan.copies)
        order = _order(plan.rows)
        rows = [plan.rows[index] for index in order]
        ends = _ends(rows)
        drawing = [place for place, row in enumerate(rows) if row.sampling is not None]
        scored = {place: _scored(rows[place], ends[place]) for place, row in enumerate(rows) if row.targets}
        drawn_from = ends[drawing] - 1
        wanted = np.sort(np.concatenate((drawn_from, *scored.values()))) if scored else drawn_from
        hidden = self._hidden(rows, wanted)
        if hidden is None:
            return result
        for place, indices in scored.items():
            row, part = rows[place], hidden[self._to_device(np.searchsorted(wanted, indices))]
            result.scores[order[place]] = score(
                part, self._decoder.head, row.targets, row.top, self.config.vocab_size
            )
        if scored:
            hidden = hidden[self._to_device(np.searchsorted(wanted, drawn_from))]
        if drawing:
            logits = self._decoder.head(hidden)
            self._draw(
                logits, [rows[place] for place in drawing], [order[place] for place in drawing], result
            )
        return result

    def _draw(self, logits: torch.Tensor, rows: list[Row], indices: list[int], result: StepResult) -> None:
        """Draws from logits [rows, vocab] and enters what came of it into `result` at `indices`."""
        params = [row.sampling for row in rows if row.sampling is not None]
        positions = [row.start + len(row.tokens) for row in rows]
        asking = [at for at, each in enumerate(params) if each.logprobs is not None]
        raw = logits[asking] if asking else logits  # a copy: shaping works in place
        drawn = sample(shaped(logits, rows), params, positions)
        for index, token in zip(indices, drawn.tolist(), strict=True):
            result.sampled[index] = token
        if asking:
            result.logprobs = drawn_logprobs(
                raw,
                drawn[asking],
                [indices[at] for at in asking],
                [params[at].logprobs or 0 for at in asking],
            )

    @torch.inference_mode()
    def logits(self, plan: StepPlan) -> torch.Tensor:
        """As `run`, but gives the logits [rows, vocab] of all rows instead of drawing; for tests and evaluation."""
        order = _order(plan.rows)
        rows = [plan.rows[index] for index in order]
        hidden = self._hidden(rows, _ends(rows) - 1)
        if hidden is None:
            return torch.empty(0, self.config.vocab_size)
        return self._decoder.head(hidden)[np.argsort(order).tolist()]

    def _hidden(self, rows: list[Row], wanted: np.ndarray) -> torch.Tensor | None:
        """Computes the rows, as ordered by `_order`; what the head makes logits of, at the tokens `wanted` of all."""
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
        places = self._to_device(wanted) if len(wanted) else None
        return self._decoder.hidden(self._to_device(tokens), self._to_device(positions), plan, places)

    def _to_device(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self._device, non_blocking=True)


def _order(rows: list[Row]) -> list[int]:
    """Row indices as they are computed: decodes by length, so that similar ones stand together, then the prefills."""
    decodes = [index for index, row in enumerate(rows) if len(row.tokens) == 1]
    decodes.sort(key=lambda index: rows[index].start)
    return decodes + [index for index, row in enumerate(rows) if len(row.tokens) != 1]


def _ends(rows: list[Row]) -> np.ndarray:
    """Where each row ends among the tokens of all, int64 [rows]."""
    return np.cumsum([len(row.tokens) for row in rows], dtype=np.int64)


def _scored(row: Row, end: int) -> np.ndarray:
    """The places among all tokens from which the row's targets are scored; the row ends at `end`."""
    first = end - len(row.tokens) + row.scored_from
    return np.arange(first, first + len(row.targets))


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
