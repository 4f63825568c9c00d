"""Rotary position embedding: frequencies, the angles of a step's positions, and the rotation itself.

In the order of operations of transformers' modeling_rope_utils, so that fp32 agrees to the last bits.
"""

from __future__ import annotations

import math

import torch

from engine.rope_config import RopeConfig


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> torch.Tensor:
    """Rotary frequencies [head_dim / 2], fp32."""
    powers = rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64).to(torch.float) / head_dim)
    if rope.kind == "linear":
        return 1.0 / powers / rope.factor
    if rope.kind == "llama3":
        return _llama3(rope, 1.0 / powers)
    if rope.kind == "yarn":
        return _yarn(rope, head_dim, powers)
    return 1.0 / powers


def _llama3(rope: RopeConfig, frequencies: torch.Tensor) -> torch.Tensor:
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


def _yarn(rope: RopeConfig, head_dim: int, powers: torch.Tensor) -> torch.Tensor:
    """Low frequencies are interpolated, high ones kept, with a linear ramp between (arXiv 2309.00071, section 3.2)."""

    def dimension(rotations: float) -> float:
        """Which dimension turns that often within the original length."""
        turns = rope.original_max_positions / (rotations * 2 * math.pi)
        return head_dim * math.log(turns) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001  # as transformers does, against a division by zero
    ramp = torch.clamp((torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low), 0, 1)
    kept = 1 - ramp
    return 1.0 / (rope.factor * powers) * (1 - kept) + 1.0 / powers * kept


def rotate(x: torch.Tensor, cos: torch.Tensor, signed_sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of x [tokens, heads, dim]; cos, signed_sin [tokens, 1, dim], the first half of sin negated."""
    return (x * cos).add_(x.roll(x.shape[-1] // 2, -1).mul_(signed_sin))


class Rotary:
    """Angles of positions for one model."""

    def __init__(self, rope: RopeConfig, head_dim: int, device: torch.device) -> None:
        self._frequencies = inverse_frequencies(rope, head_dim).to(device)
        self._scale = rope.attention_factor

    def __call__(self, positions: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """positions [tokens] -> cos and signed sin for `rotate`, each [tokens, 1, dim] in `dtype`."""
        angles = positions.unsqueeze(1).float() * self._frequencies
        cos, sin = angles.cos(), angles.sin()
        if self._scale != 1.0:
            cos, sin = cos.mul_(self._scale), sin.mul_(self._scale)
        doubled = torch.cat((cos, cos), 1), torch.cat((-sin, sin), 1)
        return doubled[0].to(dtype).unsqueeze(1), doubled[1].to(dtype).unsqueeze(1)
