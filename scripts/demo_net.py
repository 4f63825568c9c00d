"""A plain Llama in a hundred lines, with the parameter names of transformers, and its optimizers.

Training on a CPU is bound by overhead as much as by arithmetic, so this network does only what training needs;
`state_dict` loads into `LlamaForCausalLM` as it is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Shape:
    """Sizes of the network; everything else about it is Llama."""

    vocab: int
    hidden: int = 192
    layers: int = 4
    heads: int = 8
    kv_heads: int = 4
    head_dim: int = 32
    inner: int = 384
    theta: float = 500_000.0
    context: int = 4096

    def hf_config(self) -> dict[str, object]:
        """The same sizes as a transformers `LlamaConfig`."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": self.vocab,
            "hidden_size": self.hidden,
            "intermediate_size": self.inner,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "max_position_embeddings": self.context,
            "rope_theta": self.theta,
            "rope_parameters": {"rope_type": "default", "rope_theta": self.theta},
            "rms_norm_eps": 1e-5,
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
        }


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding in the half-split layout of transformers."""
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


def attend(q: Tensor, k: Tensor, v: Tensor, chunk: int = 128) -> Tensor:
    """Causal attention; on a CPU and for short rows by blocks of queries, which beats the fused kernel 2 to 4 times.

    Each block sees the keys up to its own end, so that about half of the score matrix is never made.
    """
    length = q.shape[2]
    if q.is_cuda or length > 1024:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    q = q * q.shape[-1] ** -0.5
    future = torch.full((chunk, chunk), float("-inf"), dtype=q.dtype).triu(1)
    out = []
    for start in range(0, length, chunk):
        stop = min(start + chunk, length)
        scores = q[:, :, start:stop] @ k[:, :, :stop].transpose(-1, -2)
        past, present = scores[..., :start], scores[..., start:] + future[: stop - start, : stop - start]
        out.append(torch.softmax(torch.cat((past, present), -1), -1) @ v[:, :, :stop])
    return torch.cat(out, 2)


class RMSNorm(nn.Module):
    """Root-mean-square norm whose weight follows the dtype of its input, so that the fused kernel is taken."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        """Normalize the last dimension."""
        return F.rms_norm(x, (x.shape[-1],), self.weight.to(x.dtype), 1e-5)


class Attention(nn.Module):
    """Causal grouped-query attention."""

    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.s = s
        self.q_proj = nn.Linear(s.hidden, s.heads * s.head_dim, bias=False)
        self.k_proj = nn.Linear(s.hidden, s.kv_heads * s.head_dim, bias=False)
        self.v_proj = nn.Linear(s.hidden, s.kv_heads * s.head_dim, bias=False)
        self.o_proj = nn.Linear(s.heads * s.head_dim, s.hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """One fused projection, then attention with the kv heads expanded (faster than `enable_gqa` here)."""
        s, (rows, length, _) = self.s, x.shape
        weight = torch.cat((self.q_proj.weight, self.k_proj.weight, self.v_proj.weight))
        qkv = F.linear(x, weight).view(rows, length, -1, s.head_dim).transpose(1, 2)
        q, k, v = qkv.split((s.heads, s.kv_heads, s.kv_heads), 1)
        group = s.heads // s.kv_heads
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        out = attend(q, k, v)
        return self.o_proj(out.transpose(1, 2).reshape(rows, length, -1))


class Mlp(nn.Module):
    """SwiGLU."""

    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(s.hidden, s.inner, bias=False)
        self.up_proj = nn.Linear(s.hidden, s.inner, bias=False)
        self.down_proj = nn.Linear(s.inner, s.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Gate, multiply, project back."""
        gate, up = F.linear(x, torch.cat((self.gate_proj.weight, self.up_proj.weight))).chunk(2, -1)
        return self.down_proj(F.silu(gate) * up)


class Layer(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(s.hidden)
        self.self_attn = Attention(s)
        self.post_attention_layernorm = RMSNorm(s.hidden)
        self.mlp = Mlp(s)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Residual attention, residual MLP."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    """The network up to its last norm; the head is the embedding, and is applied where there is a loss."""

    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.s = s
        self.model = nn.ModuleDict(
            {
                "embed_tokens": nn.Embedding(s.vocab, s.hidden),
                "layers": nn.ModuleList(Layer(s) for _ in range(s.layers)),
                "norm": RMSNorm(s.hidden),
            }
        )
        self.start()

    @torch.no_grad()
    def start(self) -> None:
        """Initial weights that keep the token readable in the residual stream.

        Branches start at zero and the embedding large, so that every layer first sees which token stands where;
        a small last norm keeps the scores of the tied head near zero all the same.
        """
        for name, parameter in self.named_parameters():
            if "embed" in name:
                nn.init.normal_(parameter, std=0.4)
            elif name.endswith(("o_proj.weight", "down_proj.weight")):
                nn.init.zeros_(parameter)
            elif parameter.ndim == 2:
                nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
        self.model["norm"].weight.fill_(0.1)

    def forward(self, ids: Tensor) -> Tensor:
        """Final hidden states of every position."""
        s = self.s
        steps = torch.arange(0, s.head_dim, 2, device=ids.device) / s.head_dim
        angles = torch.outer(torch.arange(ids.shape[1], device=ids.device).float(), s.theta**-steps)
        angles = torch.cat((angles, angles), -1)
        x = self.model["embed_tokens"](ids)
        if torch.is_autocast_enabled(ids.device.type):
            x = x.to(torch.get_autocast_dtype(ids.device.type))
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        for layer in self.model["layers"]:
            x = layer(x, cos, sin)
        return self.model["norm"](x)

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores over the vocabulary, in fp32."""
        return F.linear(hidden, self.model["embed_tokens"].weight).float()


def make_optimizers(net: Llama, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices, AdamW for embedding and norms: about half the tokens AdamW alone needs."""
    matrices = [p for n, p in net.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in net.named_parameters() if p.ndim != 2 or "embed" in n]
    return [
        torch.optim.Muon(matrices, lr=rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]
