"""Runs step plans: rows become index tensors, one forward, one draw for each row that samples.

The only door between the bookkeeping and the tensors of a replica. Never decides anything: which rows, blocks and
tokens is the scheduler's plan. Of a tensor-parallel replica every rank has a runner and runs the same plans in the
same order; only rank 0 draws.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import torch

from engine.attention import GATHER_BYTES, AttentionPlan, Rows
from engine.collective import Collective, SharedMemory
from engine.kv_cache import KVCache, Storage, blocks_in
from engine.logits import shaped
from engine.logprobs import drawn_logprobs, score
from engine.model import Decoder
from engine.model_config import ModelConfig
from engine.plan import Row, StepPlan, StepResult
from engine.sampler import sample
from engine.shards import Shard
from engine.weights import Progress, Weights, load_weights

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Runner:
    """One rank's model, parameters and KV memory; `shard` says which part of the replica it is."""

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        kv_cache: KVCache,
        collective: Collective | None = None,
    ) -> None:
        self.config = config
        self.kv_cache = kv_cache
        self.shard = _shard(collective)
        self._device = weights.device
        token_bytes = 2 * kv_cache.kv_heads * kv_cache.head_dim * kv_cache.dtype.itemsize
        self._gather_tokens = GATHER_BYTES // token_bytes
        self._windows = tuple(sorted(set(config.windows)))
        self._gpu, self._sample = None, sample
        if _has_kernels(self._device):
            from engine.gpu_model import GpuDecoder, GpuSampler

            self._gpu = GpuDecoder(config, weights, kv_cache, collective)
            self._sample = GpuSampler(self._device)
        self._decoder = self._gpu or Decoder(config, weights, kv_cache, collective)

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> StepResult:
        """Computes one step. IndexError where a block table is too short or a token id is outside the vocabulary.

        Ranks but the first give an empty result. Of `sampling`, `targets` and `top` they need to know whether there is
        one, how many and nothing; of `history` and `prompt_length` nothing. CollectiveError when a rank fails.
        """
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
            scores = score(part, self._decoder.head, row.targets, row.top, self.config.vocab_size)
            if scores is not None:
                result.scores[order[place]] = scores
        if scored:
            hidden = hidden[self._to_device(np.searchsorted(wanted, drawn_from))]
        if drawing:
            logits = self._decoder.head(hidden)
            if logits is not None:
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
        drawn = self._sample(shaped(logits, rows), params, positions)
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
        """As `run`, but gives the logits [rows, vocab] of all rows instead of drawing; for tests and evaluation.

        Ranks but the first give [0, vocab].
        """
        order = _order(plan.rows)
        rows = [plan.rows[index] for index in order]
        hidden = self._hidden(rows, _ends(rows) - 1)
        logits = None if hidden is None else self._decoder.head(hidden)
        if logits is None:
            return torch.empty(0, self.config.vocab_size)
        return logits[np.argsort(order).tolist()]

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
        # Here and not in the embedding: a rank must not fail alone, nor a GPU long after.
        if tokens.min() < 0 or tokens.max() >= self.config.vocab_size:
            wrong = int(tokens.min() if tokens.min() < 0 else tokens.max())
            raise IndexError(f"token id {wrong} is outside the vocabulary of {self.config.vocab_size}")
        offsets = np.asarray(starts, dtype=np.int64) - ends + counts
        positions = np.arange(len(tokens)) + np.repeat(offsets, counts)
        tables = [row.block_table.ids for row in rows]
        layout = Rows(starts, counts, tables, decodes, self.kv_cache.block_size)
        if self._gpu is not None:
            return self._gpu.compute(tokens, positions, layout, wanted)
        plan = AttentionPlan.build(
            layout,
            self.kv_cache.dtype,
            self._device,
            self._gather_tokens,
            self._windows,
        )
        places = self._to_device(wanted) if len(wanted) else None
        return self._decoder.hidden(self._to_device(tokens), self._to_device(positions), plan, places)

    def _to_device(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self._device, non_blocking=True)


def _has_kernels(device: torch.device) -> bool:
    """Triton's kernels compute there."""
    return device.type == "cuda"


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
    collective: Collective | None = None,
    storage: Storage | None = None,
) -> Runner:
    """Reads a Hugging Face folder into a runner that is ready for its first step.

    Exactly one of `num_blocks` and `kv_bytes` sizes the KV cache. dtype "auto" is what the folder says. `progress` is
    called with (bytes read, bytes in all) of the weights. With `collective` this is one rank of several: only its
    slices are read, its cache has its kv heads, and `kv_bytes` are those of each rank, all of which get as many blocks.
    The cache lies in `storage` if given. ValueError when there are more ranks than query heads.
    """
    if (num_blocks is None) == (kv_bytes is None):
        raise ValueError("give exactly one of num_blocks and kv_bytes")
    if dtype != "auto" and dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r}: expected 'auto' or one of {sorted(DTYPES)}")
    if isinstance(collective, SharedMemory) and torch.device(device).type != "cpu":
        raise ValueError(
            f"device={device!r}: shared memory is for ranks on CPUs, engine.distributed for others"
        )
    config = ModelConfig.from_folder(path)
    resolved = DTYPES[config.dtype if dtype == "auto" else dtype]
    shard = _shard(collective)
    if num_blocks is None:
        assert kv_bytes is not None
        num_blocks = blocks_in(kv_bytes, config, block_size, resolved, shard.tp)
    weights = load_weights(path, config, resolved, device, progress, shard)
    cache = KVCache(config, num_blocks, block_size, resolved, device, weights.kv_heads, storage)
    return Runner(config, weights, cache, collective)


def _shard(collective: Collective | None) -> Shard:
    return Shard(0, 1) if collective is None else Shard(collective.rank, collective.size)
