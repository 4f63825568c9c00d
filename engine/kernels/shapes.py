"""Launches of every kernel at the shapes of known models, for `ahead`: nothing is computed, no memory is taken.

A case is a model's shape and dtype; its launches are those of one decode step and one prefill chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from engine.kernels.activation import silu_launch
from engine.kernels.decode_attention import Partials, Parts, capacity_of, decode_launches
from engine.kernels.launch import Launch, Tables
from engine.kernels.norm import norm_launch
from engine.kernels.prefill_attention import Spans, prefill_launch
from engine.kernels.rope import rope_launch
from engine.kernels.sampling import Draws, Scratch, sample_launches


@dataclass(frozen=True, slots=True)
class Case:
    """A model's sizes; `window` 0 is none."""

    name: str
    hidden: int
    q_heads: int
    kv_heads: int
    dim: int
    intermediate: int
    vocab: int
    dtype: torch.dtype = torch.bfloat16
    qk_norm: bool = False
    window: int = 0
    block_size: int = 16


CASES = (
    Case("Llama-3.1-8B", 4096, 32, 8, 128, 14336, 128256),
    Case("Qwen3-8B", 4096, 32, 8, 128, 12288, 151936, qk_norm=True, block_size=32),
    Case("Qwen3-14B", 5120, 40, 8, 128, 17408, 151936, qk_norm=True),  # a group of 5
    Case(
        "Qwen2.5-0.5B fp16", 896, 14, 2, 64, 4864, 151936, torch.float16
    ),  # a group of 7, a hidden size of 7 * 128
    Case("Mistral-7B window", 4096, 32, 8, 128, 14336, 32000, window=4096, block_size=64),
    Case("dim 96", 3072, 32, 32, 96, 8192, 32064),
    Case("dim 256", 3072, 16, 16, 256, 24576, 256000),
    Case("Llama-3.1-8B fp32", 4096, 32, 8, 128, 14336, 128256, torch.float32),
)


def launches(case: Case, rows: int = 64, tokens: int = 2048) -> Iterator[Launch]:
    """Those of a step with `rows` decode rows and of a chunk of `tokens`; tensors are on the "meta" device."""

    def empty(*shape: int, dtype: torch.dtype = case.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    int32 = torch.int32
    heads = case.q_heads + 2 * case.kv_heads
    fused = empty(tokens, heads, case.dim)
    q, out = fused[:, : case.q_heads], empty(tokens, case.q_heads, case.dim)
    cache = empty(2, 8192, case.block_size, case.kv_heads, case.dim)
    tables = Tables(empty(8192, dtype=int32), empty(rows, dtype=int32))
    capacity = capacity_of(rows, 8192 * case.block_size)
    yield from decode_launches(
        q[:rows],
        cache,
        tables,
        empty(rows, dtype=int32),
        Parts(empty(capacity, dtype=int32), empty(rows + 1, dtype=int32)),
        Partials.empty(capacity, case.q_heads, case.dim, "meta"),
        out[:rows],
        window=case.window,
        scale=None,
        programs=528,
    )
    spans = Spans(empty(1, dtype=int32), empty(2, dtype=int32), empty(64, 2, dtype=int32))
    yield prefill_launch(q, cache, tables, spans, out, window=case.window, scale=None)
    norms = (empty(case.dim), empty(case.dim)) if case.qk_norm else None
    positions, slots = empty(tokens, dtype=torch.int64), empty(tokens, dtype=torch.int64)
    yield rope_launch(fused, positions, slots, empty(8192, case.dim), cache, norms, 1e-6)
    x = empty(tokens, case.hidden)
    yield norm_launch(x, empty(case.hidden), 1e-5, empty(tokens, case.hidden), empty(tokens, case.hidden))
    yield silu_launch(empty(tokens, 2 * case.intermediate), empty(tokens, case.intermediate))
    fp64 = empty(3, rows, dtype=torch.float64)
    draws = Draws(fp64[0], fp64[1], fp64[2], empty(rows, dtype=int32), empty(rows, dtype=torch.int64))
    scratch = Scratch.empty(rows, case.vocab, "meta")
    yield from sample_launches(
        empty(rows, case.vocab), draws, positions[:rows], scratch, empty(rows, dtype=torch.int64)
    )
