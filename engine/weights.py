"""The parameters of one rank, read from safetensors.

Every parameter is allocated once in its final dtype and fused form; of each tensor of the checkpoint the rank's slices
are then copied into their places from the mapped file, so that memory never holds the model twice, and never more of
it than the rank's share. A name that is missing, unknown, doubled or of another shape is an error that says which.

A rank of several has the rows of its heads in q, k and v and their columns in the output projection, its part of gate
and up (rows) and down (columns), and of the vocabulary in embedding and head. The norms are everybody's; the biases
behind a sum over the ranks are rank 0's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from engine.linear import Linear
from engine.model_config import ModelConfig, UnsupportedModel, weight_files
from engine.shards import Shard

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
    """One decoder layer; matrices are [out, in]. Heads and columns are those of this rank."""

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
    """All parameters; `q_heads` and `kv_heads` are those stored here, `vocabulary` the ids.

    Attention wants as many query heads for each kv head. Where this rank's are not as many (9 heads over 3, two ranks:
    its kv heads have 3 and 1), zero heads fill up: rows of zeros in qkv, columns of zeros in the output projection.
    """

    q_heads: int
    kv_heads: int
    vocabulary: range
    embedding: torch.Tensor  # [vocabulary, hidden]
    layers: list[LayerWeights]
    norm: torch.Tensor  # [hidden]
    head: Linear  # [vocabulary, hidden]; when tied, packed from the embedding

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.dtype

    @property
    def device(self) -> torch.device:
        return self.embedding.device


_Cut = tuple[slice, slice]  # rows (or columns) of a checkpoint's matrix, and where they are here


@dataclass(slots=True)
class _Place:
    """Where a tensor of the checkpoint goes: slices of it (rows, or columns of all rows) into views of parameters."""

    shape: list[int]  # of the whole tensor
    pieces: list[tuple[slice | tuple[slice, slice], torch.Tensor]]


def load_weights(
    path: str | Path,
    config: ModelConfig,
    dtype: torch.dtype,
    device: str | torch.device = "cpu",
    progress: Progress | None = None,
    shard: Shard = Shard(0, 1),  # noqa: B008 (frozen)
) -> Weights:
    """Reads the folder's safetensors (one file, or the shards of the index); UnsupportedModel names what is wrong."""
    layout = _Layout(config, shard)
    weights = layout.allocate(dtype, torch.device(device))
    places = layout.places(weights)
    files = weight_files(path)
    total, done = sum(file.stat().st_size for file in files), 0
    filled: set[str] = set()
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a dict)
                if name.endswith(_IGNORED_SUFFIXES) or (config.tie_embeddings and name == "lm_head.weight"):
                    continue
                done += _fill(name, tensors.get_slice(name), places, filled, file)
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


def _fill(name: str, tensor: Any, places: dict[str, _Place], filled: set[str], file: Path) -> int:
    """Copies this rank's slices of a tensor, which is mapped and read only there; returns the bytes of all of it."""
    shape: list[int] = tensor.get_shape()
    place = places.get(name)
    if place is None:
        raise UnsupportedModel(f"{file}: unexpected tensor {name!r} {shape}")
    if name in filled:
        raise UnsupportedModel(f"{file}: tensor {name!r} occurs twice in the checkpoint")
    if place.shape != shape:
        raise UnsupportedModel(f"{file}: {name!r} is {shape}, the config says {place.shape}")
    dtype: torch.dtype = tensor[:0].dtype
    if dtype not in _PLAIN_DTYPES:
        raise UnsupportedModel(f"{file}: {name!r} is {dtype}; quantised weights are not supported")
    for part, target in place.pieces:
        target.copy_(tensor[part])
    filled.add(name)
    return math.prod(shape) * dtype.itemsize


class _Layout:
    """Which part of each parameter one rank has, and where it lies in the fused forms."""

    def __init__(self, config: ModelConfig, shard: Shard) -> None:
        self.config = config
        self.first = shard.rank == 0
        self.groups = shard.groups(config.q_heads, config.kv_heads)
        self.kv_heads = shard.kv_heads(config.q_heads, config.kv_heads)
        self.padded = max(map(len, self.groups))  # query heads for each kv head
        self.q_heads = self.padded * len(self.groups)
        self.inner = shard.part(config.intermediate_size, "intermediate columns")
        self.vocabulary = shard.part(config.vocab_size, "vocabulary rows")

    def allocate(self, dtype: torch.dtype, device: torch.device) -> Weights:
        def empty(*shape: int) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        def linear(rows: int, columns: int, bias: bool, padded: bool = False) -> Linear:
            weight, offset = empty(rows, columns), empty(rows) if bias else None
            if padded:
                weight.zero_()
                if offset is not None:
                    offset.zero_()
            return Linear(weight, offset)

        config = self.config
        hidden, inner, q_rows = config.hidden_size, len(self.inner), self.q_heads * config.head_dim
        kv_rows = len(self.kv_heads) * config.head_dim
        uneven = self.q_heads != sum(map(len, self.groups))
        norms = config.head_dim if config.qk_norm else None
        layers = [
            LayerWeights(
                input_norm=empty(hidden),
                qkv=linear(q_rows + 2 * kv_rows, hidden, config.qkv_bias, uneven),
                q_norm=empty(norms) if norms else None,
                k_norm=empty(norms) if norms else None,
                output=linear(hidden, q_rows, config.output_bias and self.first, uneven),
                post_norm=empty(hidden),
                gate_up=linear(2 * inner, hidden, config.mlp_bias),
                down=linear(hidden, inner, config.mlp_bias and self.first),
            )
            for _ in range(config.layers)
        ]
        embedding = empty(len(self.vocabulary), hidden)
        head = embedding if config.tie_embeddings else empty(len(self.vocabulary), hidden)
        return Weights(
            self.q_heads, len(self.kv_heads), self.vocabulary, embedding, layers, empty(hidden), Linear(head)
        )

    def places(self, weights: Weights) -> dict[str, _Place]:
        """Checkpoint name -> where its tensor goes."""
        config, dim = self.config, self.config.head_dim
        q_rows, kv_rows = config.q_heads * dim, config.kv_heads * dim
        places = {"model.norm.weight": _whole(weights.norm)}
        places |= self._rows(
            "model.embed_tokens", weights.embedding, config.vocab_size, [_cut(self.vocabulary)]
        )
        if not config.tie_embeddings:
            places |= self._rows("lm_head", weights.head.weight, config.vocab_size, [_cut(self.vocabulary)])
        queries, inner = self._queries(), _cut(self.inner)
        keys = _cut(self.kv_heads, self.q_heads * dim, dim)
        values = _cut(self.kv_heads, (self.q_heads + len(self.kv_heads)) * dim, dim)
        up = _cut(self.inner, len(self.inner))
        for index, layer in enumerate(weights.layers):
            prefix = f"model.layers.{index}."
            places[prefix + "input_layernorm.weight"] = _whole(layer.input_norm)
            places[prefix + "post_attention_layernorm.weight"] = _whole(layer.post_norm)
            if layer.q_norm is not None and layer.k_norm is not None:
                places[prefix + "self_attn.q_norm.weight"] = _whole(layer.q_norm)
                places[prefix + "self_attn.k_norm.weight"] = _whole(layer.k_norm)
            for name, linear, rows, cuts in (
                ("self_attn.q_proj", layer.qkv, q_rows, queries),
                ("self_attn.k_proj", layer.qkv, kv_rows, [keys]),
                ("self_attn.v_proj", layer.qkv, kv_rows, [values]),
                ("mlp.gate_proj", layer.gate_up, config.intermediate_size, [inner]),
                ("mlp.up_proj", layer.gate_up, config.intermediate_size, [up]),
            ):
                places |= self._rows(prefix + name, linear.weight, rows, cuts, linear.bias)
            for name, linear, columns, cuts, bias in (
                ("self_attn.o_proj", layer.output, q_rows, queries, config.output_bias),
                ("mlp.down_proj", layer.down, config.intermediate_size, [inner], config.mlp_bias),
            ):
                places |= self._columns(prefix + name, linear, columns, cuts, bias)
        return places

    def _queries(self) -> list[_Cut]:
        """The rows of this rank's query heads: all at once, or for each kv head where zero heads stand between."""
        dim, padded = self.config.head_dim, self.padded
        if self.q_heads == sum(map(len, self.groups)):
            return [_cut(range(self.groups[0].start, self.groups[-1].stop), 0, dim)]
        return [_cut(group, place * padded * dim, dim) for place, group in enumerate(self.groups)]

    def _rows(
        self, name: str, weight: torch.Tensor, rows: int, cuts: list[_Cut], bias: torch.Tensor | None = None
    ) -> dict[str, _Place]:
        """A matrix [rows, hidden], and its bias, of which some rows are here."""
        columns = self.config.hidden_size
        places = {f"{name}.weight": _Place([rows, columns], [(there, weight[here]) for there, here in cuts])}
        if bias is not None:
            places[f"{name}.bias"] = _Place([rows], [(there, bias[here]) for there, here in cuts])
        return places

    def _columns(
        self, name: str, linear: Linear, columns: int, cuts: list[_Cut], bias: bool
    ) -> dict[str, _Place]:
        """A matrix [hidden, columns] of which some columns are here; its bias is rank 0's, others only know of it."""
        rows = self.config.hidden_size
        pieces = [((slice(None), there), linear.weight[:, here]) for there, here in cuts]
        places = {f"{name}.weight": _Place([rows, columns], [*pieces])}
        if bias:
            places[f"{name}.bias"] = _Place(
                [rows], [] if linear.bias is None else [(slice(None), linear.bias)]
            )
        return places


def _cut(part: range, start: int = 0, width: int = 1) -> _Cut:
    """The things `part`, each `width` rows: their rows in the checkpoint, and here, where they begin at `start`."""
    return slice(part.start * width, part.stop * width), slice(start, start + len(part) * width)


def _whole(parameter: torch.Tensor) -> _Place:
    return _Place(list(parameter.shape), [(slice(None), parameter)])
