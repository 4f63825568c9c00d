"""Rotary position embedding as a folder describes it: which rule stretches it, and with which numbers. No torch.

Each rule is computed in `rotary` exactly as transformers' modeling_rope_utils does; a rule, or a number of a rule, that
is not known there is refused, because ignoring it would give a model that is nearly right.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from engine.config_fields import UnsupportedModel, boolean, integer, number

RopeKind = Literal["default", "linear", "dynamic", "llama3", "yarn"]

_COMMON_KEYS = {
    "rope_type",
    "type",
    "rope_theta",
    "partial_rotary_factor",
    "original_max_position_embeddings",
}
_KEYS: dict[RopeKind, set[str]] = {
    "default": {"factor"},  # some folders write a factor that means nothing
    "linear": {"factor"},
    "dynamic": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor"},
    "yarn": {
        "factor",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
    },
}


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary embedding: base, and the rule that stretches it with its numbers (unused ones keep their defaults).

    "dynamic" is computed like "default": it stretches only beyond the original length, to which such a model is held.
    """

    theta: float = 10000.0
    kind: RopeKind = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0
    original_max_positions: int = 0  # llama3, yarn
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0  # scales cos and sin


def read_rope(raw: Mapping[str, Any], max_positions: int) -> tuple[RopeConfig, int]:
    """The rule of a config.json, and how many positions it is good for.

    `rope_parameters` (transformers 5) or `rope_theta` + `rope_scaling` (before); the latter wins, as in transformers.
    """
    key = "rope_scaling" if raw.get("rope_scaling") else "rope_parameters"
    rope = raw.get(key) or {}
    if not isinstance(rope, Mapping):
        raise UnsupportedModel(f"{key}={rope!r}: expected an object")
    for name, value in rope.items():
        if isinstance(value, Mapping):
            raise UnsupportedModel(f"{key}.{name}={value!r}: a rotary embedding for each layer type")
    partial = rope.get("partial_rotary_factor", raw.get("partial_rotary_factor"))
    if partial not in (None, 1):
        raise UnsupportedModel(f"partial_rotary_factor={partial!r}: only 1.0 is supported")
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in _KEYS:
        raise UnsupportedModel(f"{key}.rope_type={kind!r}: supported are {', '.join(get_args(RopeKind))}")
    unknown = sorted(rope.keys() - _COMMON_KEYS - _KEYS[kind])
    if unknown:
        raise UnsupportedModel(f"{key}.{unknown[0]}={rope[unknown[0]]!r}: not known for rope_type={kind!r}")
    theta = number(rope, "rope_theta", number(raw, "rope_theta", 10000.0))
    original = _original(raw, rope)
    if kind == "dynamic":
        number(rope, "factor")
        return RopeConfig(theta, "dynamic"), min(max_positions, original or max_positions)
    if kind == "linear":
        return RopeConfig(theta, "linear", factor=number(rope, "factor")), max_positions
    if kind == "llama3":
        return _llama3(rope, theta, original or max_positions), max_positions
    if kind == "yarn":
        config = _yarn(rope, theta, original or max_positions)
        # Its documented use is to add the rule to a config whose max_position_embeddings stays what it was.
        return config, max(max_positions, int(original * config.factor))
    return RopeConfig(theta), max_positions


def _original(raw: Mapping[str, Any], rope: Mapping[str, Any]) -> int:
    """The length before stretching, or 0 where the folder names none."""
    key = "original_max_position_embeddings"
    given = {integer(where, key) for where in (rope, raw) if where.get(key) is not None}
    if len(given) > 1:
        raise UnsupportedModel(f"{key} is {rope[key]!r} in the rope's object and {raw[key]!r} beside it")
    return given.pop() if given else 0


def _llama3(rope: Mapping[str, Any], theta: float, original: int) -> RopeConfig:
    low, high = number(rope, "low_freq_factor"), number(rope, "high_freq_factor")
    if low >= high:
        raise UnsupportedModel(f"low_freq_factor={low}: not below high_freq_factor={high}")
    return RopeConfig(
        theta,
        "llama3",
        factor=number(rope, "factor"),
        low_freq_factor=low,
        high_freq_factor=high,
        original_max_positions=original,
    )


def _yarn(rope: Mapping[str, Any], theta: float, original: int) -> RopeConfig:
    """YaRN (Peng et al. 2023, arXiv 2309.00071), with the defaults of transformers."""
    factor = number(rope, "factor")
    if rope.get("attention_factor") is not None:
        attention_factor = number(rope, "attention_factor")
    elif rope.get("mscale") and rope.get("mscale_all_dim"):
        attention_factor = _mscale(factor, number(rope, "mscale")) / _mscale(
            factor, number(rope, "mscale_all_dim")
        )
    else:
        attention_factor = _mscale(factor, 1.0)
    return RopeConfig(
        theta,
        "yarn",
        factor=factor,
        original_max_positions=original,
        beta_fast=number(rope, "beta_fast", 32.0),
        beta_slow=number(rope, "beta_slow", 1.0),
        truncate=boolean(rope, "truncate", True),
        attention_factor=attention_factor,
    )


def _mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0
