"""The parameters of one replica (later: of one rank), read from safetensors.

Every parameter is allocated once in its final dtype and fused form; each tensor of the checkpoint is then copied into
its place from the mapped file, so that memory never holds the model twice. A name that is missing, unknown, doubled or
of another shape is an error that says which.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open

from engine.model_config import ModelConfig, UnsupportedModel, weight_files

Progress = Callable[[int, int], None]
"""Called with (bytes read, bytes in all) of the checkpoint."""

_IGNORED_SUFFIXES = (".rotary_emb.inv_freq",)  # a buffer that old checkpoints carry; computed from the config


@dataclass(slots=True)
class LayerWeights:
    """One decoder layer. Matrices are [out, in], as torch's linear wants them."""

    input_norm: torch.Tensor  # [hidden]
    qkv: torch.Tensor  # [(q_heads + 2 * kv_heads) * head_dim, hidden]: all queries, then keys, then values
    qkv_bias: torch.Tensor | None
    output: torch.Tensor  # [hidden, q_heads * head_dim]
    output_bias: torch.Tensor | None
    post_norm: torch.Tensor  # [hidden]
    gate_up: torch.Tensor  # [2 * intermediate, hidden]: gate, then up
    gate_up_bias: torch.Tensor | None
    down: torch.Tensor  # [hidden, intermediate]
    down_bias: torch.Tensor | None


@dataclass(slots=True)
class Weights:
    """All parameters; `q_heads` and `kv_heads` are those stored here."""

    q_heads: int
    kv_heads: int
    embedding: torch.Tensor  # [vocab, hidden]
    layers: list[LayerWeights]
    norm: torch.Tensor  # [hidden]
    head: torch.Tensor  # [vocab, hidden]; the embedding itself when tied

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.dtype

    @property
    def device(self) -> torch.device:
        return self.embedding.device


def load_weights(
    path: str | Path,
    config: ModelConfig,
    dtype: torch.dtype,
    device: str | torch.device = "cpu",
    progress: Progress | None = None,
) -> Weights:
    """Reads the folder's safetensors (one file, or the shards of the index); UnsupportedModel names what is wrong."""
    weights = _allocate(config, dtype, torch.device(device))
    places = _places(config, weights)
    files = weight_files(path)
    total, done = sum(file.stat().st_size for file in files), 0
    filled: set[str] = set()
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a dict)
                if name.endswith(_IGNORED_SUFFIXES) or (config.tie_embeddings and name == "lm_head.weight"):
                    continue
                _fill(name, tensors.get_tensor(name), places, filled, file)
                done += places[name].numel() * dtype.itemsize
                if progress is not None:
                    progress(min(done, total), total)
    missing = sorted(places.keys() - filled)
    if missing:
        raise UnsupportedModel(f"{path}: tensors missing from the checkpoint: {missing}")
    if progress is not None:
        progress(total, total)
    return weights


def _fill(
    name: str, tensor: torch.Tensor, places: dict[str, torch.Tensor], filled: set[str], file: Path
) -> None:
    place = places.get(name)
    if place is None:
        raise UnsupportedModel(f"{file}: unexpected tensor {name!r} {list(tensor.shape)}")
    if name in filled:
        raise UnsupportedModel(f"{file}: tensor {name!r} occurs twice in the checkpoint")
    if place.shape != tensor.shape:
        raise UnsupportedModel(
            f"{file}: {name!r} is {list(tensor.shape)}, the config says {list(place.shape)}"
        )
    if not tensor.is_floating_point():
        raise UnsupportedModel(f"{file}: {name!r} is {tensor.dtype}; quantised weights are not supported")
    place.copy_(tensor)
    filled.add(name)


def _allocate(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> Weights:
    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    hidden, inner = config.hidden_size, config.intermediate_size
    qkv_rows = (config.q_heads + 2 * config.kv_heads) * config.head_dim
    layers = [
        LayerWeights(
            input_norm=empty(hidden),
            qkv=empty(qkv_rows, hidden),
            qkv_bias=empty(qkv_rows) if config.qkv_bias else None,
            output=empty(hidden, config.q_heads * config.head_dim),
            output_bias=empty(hidden) if config.output_bias else None,
            post_norm=empty(hidden),
            gate_up=empty(2 * inner, hidden),
            gate_up_bias=empty(2 * inner) if config.mlp_bias else None,
            down=empty(hidden, inner),
            down_bias=empty(hidden) if config.mlp_bias else None,
        )
        for _ in range(config.layers)
    ]
    embedding = empty(config.vocab_size, hidden)
    head = embedding if config.tie_embeddings else empty(config.vocab_size, hidden)
    return Weights(config.q_heads, config.kv_heads, embedding, layers, empty(hidden), head)


def _places(config: ModelConfig, weights: Weights) -> dict[str, torch.Tensor]:
    """Checkpoint name -> the view of the parameter that it fills."""
    q, kv, inner = (
        config.q_heads * config.head_dim,
        config.kv_heads * config.head_dim,
        config.intermediate_size,
    )
    places = {"model.embed_tokens.weight": weights.embedding, "model.norm.weight": weights.norm}
    if not config.tie_embeddings:
        places["lm_head.weight"] = weights.head
    for index, layer in enumerate(weights.layers):
        prefix = f"model.layers.{index}."
        places[prefix + "input_layernorm.weight"] = layer.input_norm
        places[prefix + "post_attention_layernorm.weight"] = layer.post_norm
        for kind, qkv, output, gate_up, down in (
            ("weight", layer.qkv, layer.output, layer.gate_up, layer.down),
            ("bias", layer.qkv_bias, layer.output_bias, layer.gate_up_bias, layer.down_bias),
        ):
            if qkv is not None:
                places[f"{prefix}self_attn.q_proj.{kind}"] = qkv[:q]
                places[f"{prefix}self_attn.k_proj.{kind}"] = qkv[q : q + kv]
                places[f"{prefix}self_attn.v_proj.{kind}"] = qkv[q + kv :]
            if output is not None:
                places[f"{prefix}self_attn.o_proj.{kind}"] = output
            if gate_up is not None:
                places[f"{prefix}mlp.gate_proj.{kind}"] = gate_up[:inner]
                places[f"{prefix}mlp.up_proj.{kind}"] = gate_up[inner:]
            if down is not None:
                places[f"{prefix}mlp.down_proj.{kind}"] = down
    return places
