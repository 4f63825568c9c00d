"""What a model is: the facts of a Hugging Face folder that the engine needs, checked once, without torch.

Read by the runner, the scheduler's sizing, the transfer layout and the hand-shake. Whatever the decoder cannot compute
exactly is refused here with the key and the value named: a model that loads is a model that is right.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

RopeKind = Literal["default", "linear", "llama3"]

_DTYPES = ("float32", "bfloat16", "float16")
_WHOLE_FILE_BYTES = 64 << 20  # below this every byte of a weight file enters the fingerprint
_SAMPLES, _SAMPLE_BYTES = 256, 64 << 10


class UnsupportedModel(ValueError):
    """The folder is not a model that this engine computes exactly; the message names the key and the value."""


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary embedding: base, and the rule that stretches it with its numbers (unused ones keep their defaults)."""

    theta: float = 10000.0
    kind: RopeKind = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 0


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """One configurable decoder: pre-norm, RoPE, grouped-query attention, gated MLP (SiLU).

    Families differ only in these fields, so a new one is a function that fills them in (`_FAMILIES`), not a new model.
    """

    architecture: str
    hidden_size: int
    layers: int
    q_heads: int
    kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    rms_eps: float
    rope: RopeConfig
    tie_embeddings: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    max_positions: int
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    dtype: str

    @property
    def group(self) -> int:
        """Query heads that share one kv head."""
        return self.q_heads // self.kv_heads

    @classmethod
    def from_folder(cls, path: str | Path) -> ModelConfig:
        """Reads config.json and generation_config.json; raises UnsupportedModel, or FileNotFoundError."""
        folder = Path(path)
        raw = _read_json(folder / "config.json")
        generation_file = folder / "generation_config.json"
        generation = _read_json(generation_file) if generation_file.exists() else {}
        return cls.from_dict(raw, generation)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], generation: Mapping[str, Any] | None = None) -> ModelConfig:
        """The same from the parsed files."""
        architectures = raw.get("architectures") or []
        if len(architectures) != 1 or architectures[0] not in _FAMILIES:
            raise UnsupportedModel(f"architectures={architectures!r}: supported are {sorted(_FAMILIES)}")
        return _FAMILIES[architectures[0]](raw, generation or {})


# --- families -------------------------------------------------------------------------------------------------------


def _llama(raw: Mapping[str, Any], generation: Mapping[str, Any]) -> ModelConfig:
    bias = _boolean(raw, "attention_bias", False)
    return _decoder(
        raw, generation, qkv_bias=bias, output_bias=bias, mlp_bias=_boolean(raw, "mlp_bias", False)
    )


_FAMILIES: dict[str, Callable[[Mapping[str, Any], Mapping[str, Any]], ModelConfig]] = {
    "LlamaForCausalLM": _llama
}


def _decoder(
    raw: Mapping[str, Any],
    generation: Mapping[str, Any],
    *,
    qkv_bias: bool,
    output_bias: bool,
    mlp_bias: bool,
) -> ModelConfig:
    """The fields that all families share, checked."""
    _refuse(raw, "quantization_config", allowed=(None,))
    _refuse(raw, "hidden_act", allowed=(None, "silu"))
    _refuse(raw, "sliding_window", allowed=(None,))
    _refuse(raw, "is_encoder_decoder", allowed=(None, False))
    hidden, q_heads = _integer(raw, "hidden_size"), _integer(raw, "num_attention_heads")
    kv_heads = _integer(raw, "num_key_value_heads", q_heads)
    if q_heads % kv_heads:
        raise UnsupportedModel(
            f"num_key_value_heads={kv_heads} does not divide num_attention_heads={q_heads}"
        )
    if raw.get("head_dim") is None and hidden % q_heads:
        raise UnsupportedModel(f"hidden_size={hidden} is no multiple of num_attention_heads={q_heads}")
    head_dim = _integer(raw, "head_dim", hidden // q_heads)
    if head_dim % 2:
        raise UnsupportedModel(f"head_dim={head_dim} is odd; rotary embedding needs pairs")
    eos = generation.get("eos_token_id")
    dtype = raw.get("dtype") or raw.get("torch_dtype") or "float32"
    if dtype not in _DTYPES:
        raise UnsupportedModel(f"dtype={dtype!r}: supported are {_DTYPES}")
    max_positions = _integer(raw, "max_position_embeddings")
    return ModelConfig(
        architecture=raw["architectures"][0],
        hidden_size=hidden,
        layers=_integer(raw, "num_hidden_layers"),
        q_heads=q_heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=_integer(raw, "intermediate_size"),
        vocab_size=_integer(raw, "vocab_size"),
        rms_eps=_number(raw, "rms_norm_eps", 1e-6),
        rope=_rope(raw, max_positions),
        tie_embeddings=_boolean(raw, "tie_word_embeddings", False),
        qkv_bias=qkv_bias,
        output_bias=output_bias,
        mlp_bias=mlp_bias,
        max_positions=max_positions,
        eos_token_ids=_token_ids("eos_token_id", raw.get("eos_token_id") if eos is None else eos),
        bos_token_id=next(iter(_token_ids("bos_token_id", raw.get("bos_token_id"))), None),
        dtype=dtype,
    )


def _rope(raw: Mapping[str, Any], max_positions: int) -> RopeConfig:
    """`rope_parameters` (transformers 5) or `rope_theta` + `rope_scaling` (before); the newer key wins."""
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    key = "rope_parameters" if raw.get("rope_parameters") else "rope_scaling"
    if not isinstance(rope, Mapping):
        raise UnsupportedModel(f"{key}={rope!r}: expected an object")
    partial = rope.get("partial_rotary_factor", raw.get("partial_rotary_factor"))
    if partial not in (None, 1, 1.0):
        raise UnsupportedModel(f"partial_rotary_factor={partial!r}: only 1.0 is supported")
    theta = float(rope.get("rope_theta") or raw.get("rope_theta") or 10000.0)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return RopeConfig(theta)
    if kind == "linear":
        return RopeConfig(theta, "linear", factor=_number(rope, "factor"))
    if kind == "llama3":
        original = rope.get("original_max_position_embeddings") or raw.get("original_max_position_embeddings")
        return RopeConfig(
            theta,
            "llama3",
            factor=_number(rope, "factor"),
            low_freq_factor=_number(rope, "low_freq_factor"),
            high_freq_factor=_number(rope, "high_freq_factor"),
            original_max_positions=int(original or max_positions),
        )
    raise UnsupportedModel(f"{key}.rope_type={kind!r}: supported are default, linear, llama3")


# --- reading with errors that name the key --------------------------------------------------------------------------


def _read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UnsupportedModel(f"{file}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise UnsupportedModel(f"{file}: expected an object, found {type(value).__name__}")
    return value


def _refuse(raw: Mapping[str, Any], key: str, allowed: tuple[Any, ...]) -> None:
    if raw.get(key) not in allowed:
        raise UnsupportedModel(f"{key}={raw[key]!r}: not supported")


def _integer(raw: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = raw.get(key)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UnsupportedModel(f"{key}={value!r}: expected a positive integer")
    return value


def _number(raw: Mapping[str, Any], key: str, default: float | None = None) -> float:
    value = raw.get(key)
    value = default if value is None else value
    if not isinstance(value, (int, float)) or isinstance(value, bool) or value <= 0:
        raise UnsupportedModel(f"{key}={value!r}: expected a positive number")
    return float(value)


def _boolean(raw: Mapping[str, Any], key: str, default: bool) -> bool:
    value = raw.get(key)
    value = default if value is None else value
    if not isinstance(value, bool):
        raise UnsupportedModel(f"{key}={value!r}: expected true or false")
    return value


def _token_ids(key: str, value: Any) -> tuple[int, ...]:
    ids = () if value is None else tuple(value) if isinstance(value, list) else (value,)
    if not all(isinstance(one, int) and not isinstance(one, bool) and one >= 0 for one in ids):
        raise UnsupportedModel(f"{key}={value!r}: expected token ids")
    return ids


# --- identity -------------------------------------------------------------------------------------------------------


def weight_files(path: str | Path) -> list[Path]:
    """The safetensors files of a folder, by name: the single file, or the shards that the index names."""
    folder = Path(path)
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists():
        return [single]
    if not index.exists():
        raise UnsupportedModel(
            f"{folder}: neither {single.name} nor {index.name}; only safetensors weights are read"
        )
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UnsupportedModel(f"{index}: weight_map is missing or empty")
    files = [folder / name for name in sorted(set(weight_map.values()))]
    missing = [file.name for file in files if not file.exists()]
    if missing:
        raise UnsupportedModel(f"{index} names shards that are not there: {missing}")
    return files


def fingerprint(path: str | Path) -> str:
    """Names the model's numbers: 32 hex digits, equal on every host that has the same config and the same weights.

    Config keys that say only who wrote the file are left out. A weight file enters with its size, its header and its
    content: whole when small, otherwise evenly spaced samples (a fine-tune changes nearly all of it).
    """
    folder = Path(path)
    config = _read_json(folder / "config.json")
    for provenance in ("transformers_version", "_name_or_path"):
        config.pop(provenance, None)
    digest = hashlib.blake2b(json.dumps(config, sort_keys=True).encode(), digest_size=16)
    for file in weight_files(folder):
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}:".encode())
        with file.open("rb") as stream:
            if size <= _WHOLE_FILE_BYTES:
                while block := stream.read(1 << 20):
                    digest.update(block)
                continue
            header_bytes = int.from_bytes(stream.read(8), "little")
            digest.update(stream.read(min(header_bytes, _WHOLE_FILE_BYTES)))
            for sample in range(_SAMPLES):
                stream.seek((size - _SAMPLE_BYTES) * sample // (_SAMPLES - 1))
                digest.update(stream.read(_SAMPLE_BYTES))
    return digest.hexdigest()
