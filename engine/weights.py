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

from engine.linear import Linear
from engine.model_config import ModelConfig, UnsupportedModel, weight_files

Progress = Callable[[int, int], None]
"""Called with (bytes read, bytes in all) of the checkpoint."""

_IGNORED_SUFFIXES = (".rotary_emb.inv_freq",)  # a buffer that old checkpoints carry; computed from the config
_PLAIN_DTYPES = (
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
)  # fp8 is quantised: it lacks its scales


@dataclass(slots=True)
class LayerWeights:
    """One decoder layer; matrices are [out, in]."""

    input_norm: torch.Tensor  # [hidden]
    qkv: Linear  # [(q_heads + 2 * kv_heads) * head_dim, hidden]: all queries, then keys, then values
    q_norm: torch.Tensor | None  # [head_dim], as k_norm; None where the family has none
    k_norm: torch.Tensor | None
    output: Linear  # [hidden, q_heads * head_dim]
    post_norm: torch.Tensor  # [hidden]
    gate_up: Linear  # [2 * intermediate, hidden]: gate, then up
    down: Linear  # [hidden, intermediate]


@dataclass(slots=True)
class Weights:
    """All parameters; `q_heads` and `kv_heads` are those stored here."""

    q_heads: int
    kv_heads: int
    embedding: torch.Tensor  # [vocab, hidden]
    layers: list[LayerWeights]
    norm: torch.Tensor  # [hidden]
    head: Linear  # [vocab, hidden]; when tied, packed from the embedding

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
                tensor = tensors.get_tensor(name)
                _fill(name, tensor, places, filled, file)
                done += tensor.nbytes
                if progress is not None:
                    progress(min(done, total), total)
    missing = sorted(places.keys() - filled)
    if missing:
        raise UnsupportedModel(f"{path}: tensors missing from the checkpoint: {missing}")
    places.clear()  # or it would keep the plain matrices alive
    for layer in weights.layers:
        for linear in (layer.qkv, layer.output, layer.gate_up, layer.down):
            linear.pack()
    weights.head.pack()
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
    if tensor.dtype not in _PLAIN_DTYPES:
        raise UnsupportedModel(f"{file}: {name!r} is {tensor.dtype}; quantised weights are not supported")
    place.copy_(tensor)
    filled.add(name)


def _allocate(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> Weights:
    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    def linear(rows: int, columns: int, bias: bool) -> Linear:
        return Linear(empty(rows, columns), empty(rows) if bias else None)

    hidden, inner, q_rows = config.hidden_size, config.intermediate_size, config.q_heads * config.head_dim
    norms = config.head_dim if config.qk_norm else None
    layers = [
        LayerWeights(
            input_norm=empty(hidden),
            qkv=linear(q_rows + 2 * config.kv_heads * config.head_dim, hidden, config.qkv_bias),
            q_norm=empty(norms) if norms else None,
            k_norm=empty(norms) if norms else None,
            output=linear(hidden, q_rows, config.output_bias),
            post_norm=empty(hidden),
            gate_up=linear(2 * inner, hidden, config.mlp_bias),
            down=linear(hidden, inner, config.mlp_bias),
        )
        for _ in range(config.layers)
    ]
    embedding = empty(config.vocab_size, hidden)
    head = embedding if config.tie_embeddings else empty(config.vocab_size, hidden)
    return Weights(config.q_heads, config.kv_heads, embedding, layers, empty(hidden), Linear(head))


def _places(config: ModelConfig, weights: Weights) -> dict[str, torch.Tensor]:
    """Checkpoint name -> the view of the parameter that it fills."""
    q, kv, inner = (
        config.q_heads * config.head_dim,
        config.kv_heads * config.head_dim,
        config.intermediate_size,
    )
    places = {"model.embed_tokens.weight": weights.embedding, "model.norm.weight": weights.norm}
    if not config.tie_embeddings:
        places["lm_head.weight"] = weights.head.weight
    for index, layer in enumerate(weights.layers):
        prefix = f"model.layers.{index}."
        places[prefix + "input_layernorm.weight"] = layer.input_norm
        places[prefix + "post_attention_layernorm.weight"] = layer.post_norm
        if layer.q_norm is not None and layer.k_norm is not None:
            places[prefix + "self_attn.q_norm.weight"] = layer.q_norm
            places[prefix + "self_attn.k_norm.weight"] = layer.k_norm
        fused_parts: tuple[tuple[Linear, tuple[str, ...], list[int]], ...] = (
            (layer.qkv, ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), [q, kv, kv]),
            (layer.output, ("self_attn.o_proj",), [config.hidden_size]),
            (layer.gate_up, ("mlp.gate_proj", "mlp.up_proj"), [inner, inner]),
            (layer.down, ("mlp.down_proj",), [config.hidden_size]),
        )
        for linear, names, cuts in fused_parts:
            for kind, fused in (("weight", linear.weight), ("bias", linear.bias)):
                if fused is not None:
                    parts = torch.split(fused, cuts)
                    places |= {
                        f"{prefix}{name}.{kind}": part for name, part in zip(names, parts, strict=True)
                    }
    return places
