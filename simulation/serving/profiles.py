"""What a device takes for steps and hand-offs, in the terms of `engine.costs`, and how that follows tensor parallelism.

A profile is measured (a worker's own profile or status) or derived from rooflines, which it says. Pure; files are read
by who builds it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from engine.api import Spread, StepCosts

Floats = npt.NDArray[np.float64]

NOISES = 4096  # different ratios of measured to predicted that steps have, over and over
_EXACT = Spread(1.0, 1.0, 1.0)


@dataclass(frozen=True, slots=True)
class Profile:
    """One device (times `tensor_parallel`) with one model. `derived`: nobody measured it."""

    name: str
    step: StepCosts
    kv_token_bytes: int  # of KV of one token, all layers
    derived: bool = True
    prefill_step: StepCosts | None = None  # of prefill workers, where they were measured apart
    tensor_parallel: int = 1  # of the workers whose steps cost that
    decode_spread: Spread = _EXACT
    prefill_spread: Spread = _EXACT
    handoff_latency_s: float = 1e-3
    handoff_byte_s: float = 2.5e-11  # over the link of one rank
    layer_groups: int = 1  # in so many parts a step's KV leaves while the step runs; 1: when it has ended
    message_s: float = 5e-4  # between two processes, one way
    # Tensor parallelism: each doubling of ranks makes a step shorter by 2 * `doubling_efficiency`, and its collectives
    # take `collective_s` whatever its size.
    doubling_efficiency: float = 0.9
    collective_s: float = 0.0
    # For plans and prices.
    memory_gib: float = 0.0  # of one rank, for weights and KV; 0: unknown
    weights_gib: float = 0.0  # of the whole model
    gpu_hour_usd: float = 0.0  # 0: unknown

    def __post_init__(self) -> None:
        if self.kv_token_bytes < 1 or self.layer_groups < 1 or self.tensor_parallel < 1:
            raise ValueError(
                f"profile {self.name}: kv_token_bytes, layer_groups and tensor_parallel must be at least 1"
            )
        if not 0.5 <= self.doubling_efficiency <= 1:
            raise ValueError(
                f"profile {self.name}: doubling_efficiency = {self.doubling_efficiency} must be from 0.5 (a second "
                "rank gains nothing) to 1 (it halves every step)"
            )

    def costs(self, tensor_parallel: int, role: Literal["prefill", "decode"] = "decode") -> StepCosts:
        """Of a worker of so many ranks."""
        step = self.prefill_step if role == "prefill" and self.prefill_step is not None else self.step
        if tensor_parallel == self.tensor_parallel:
            return step
        own = self.collective_s if self.tensor_parallel > 1 else 0.0
        then = self.collective_s if tensor_parallel > 1 else 0.0
        doublings = math.log2(tensor_parallel / self.tensor_parallel)
        speed = (2 * self.doubling_efficiency) ** doublings
        return StepCosts(
            max(0.0, step.base_s - own) / speed + then,
            step.sequence_s / speed,
            step.kv_token_s / speed,
            step.token_s / speed,
            step.attention_s / speed,
        )

    def handoff(self, prefill_ranks: int, decode_ranks: int) -> tuple[float, float]:
        """Latency and seconds for each byte: the ranks of the smaller side send beside each other."""
        return self.handoff_latency_s, self.handoff_byte_s / min(prefill_ranks, decode_ranks)

    def kv_gib(self, tensor_parallel: int) -> float:
        """What a rank has left for KV; 0 or less: the model does not fit. Raises ValueError where memory is unknown."""
        if not self.memory_gib:
            raise ValueError(f"profile {self.name} does not say memory_gib: sizes cannot be planned")
        return self.memory_gib - self.weights_gib / tensor_parallel


def noise(spread: Spread, seed: int) -> Floats:
    """[NOISES] ratios with these quantiles, in an order drawn from `seed`. Below the median they mirror those above."""
    p50 = spread.p50
    p90, p99 = max(p50, spread.p90), max(p50, spread.p90, spread.p99)
    if p50 == p90 == p99 == 1.0:
        return np.ones(NOISES)
    middle = np.log([p50 * p50 / p99, p50 * p50 / p90, p50, p90, p99])
    low, high = middle[0] - 0.2 * (middle[1] - middle[0]), middle[4] + 0.2 * (middle[4] - middle[3])
    ranks = (np.arange(NOISES) + 0.5) / NOISES
    ratios: Floats = np.exp(np.interp(ranks, [0.0, 0.01, 0.1, 0.5, 0.9, 0.99, 1.0], [low, *middle, high]))
    return np.random.default_rng(seed).permutation(ratios)
