"""What the sections of `benchmarks.gpu` share: the model's shape, the clock, the limits, how a figure is told."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

BLOCK = 16  # tokens


@dataclass(frozen=True)
class Shape:
    """A llama of random weights."""

    layers: int
    hidden: int
    inner: int
    q_heads: int
    kv_heads: int
    vocab: int

    @property
    def dim(self) -> int:
        return self.hidden // self.q_heads

    @property
    def streamed(self) -> int:
        """Parameters that every step reads: all but the embedding."""
        heads = self.q_heads + 2 * self.kv_heads
        attention = self.hidden * heads * self.dim + self.hidden * self.q_heads * self.dim
        return self.layers * (attention + 3 * self.hidden * self.inner) + self.head

    @property
    def head(self) -> int:
        return self.hidden * self.vocab

    @property
    def token_bytes(self) -> int:
        return 2 * self.layers * self.kv_heads * self.dim * 2

    def raw(self) -> dict[str, Any]:
        """As config.json says it."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "hidden_size": self.hidden,
            "intermediate_size": self.inner,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.q_heads,
            "num_key_value_heads": self.kv_heads,
            "vocab_size": self.vocab,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5,
            "rope_theta": 500000.0,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
        }


LLAMA_8B = Shape(32, 4096, 14336, 32, 8, 128256)
TINY = Shape(2, 64, 128, 4, 2, 320)


class Bench:
    """What all sections share: the form, the device, the machine's limits, and how figures are told."""

    def __init__(self, form: str, limits: dict[str, float]) -> None:
        self.form, self.smoke = form, form == "smoke"
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        if self.device == "cpu" and not self.smoke:
            raise RuntimeError(f"PyTorch {torch.__version__} sees no CUDA device here; --smoke runs without")
        self.shape = TINY if self.smoke else LLAMA_8B
        self.limits = limits

    def figure(
        self,
        key: str,
        name: str,
        value: float | None,
        unit: str,
        *,
        bar: float | None = None,
        stretch: float | None = None,
        limit: float | None = None,
        more_is_better: bool = True,
        note: str = "",
        section_limit: bool = False,
    ) -> None:
        """`limit` in the figure's unit; `section_limit`: the figure itself is one, for later sections."""
        if section_limit and value is not None:
            self.limits[key] = value
        if self.smoke:
            bar = stretch = None  # they are of other shapes
        told = {"key": key, "name": name, "value": value, "unit": unit, "bar": bar, "stretch": stretch}
        told |= {
            "limit": limit,
            "more_is_better": more_is_better,
            "note": note,
            "section_limit": section_limit,
        }
        print("figure " + json.dumps(told), flush=True)

    def say(self, text: str) -> None:
        print(text, flush=True)

    def sync(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def repeats(self, full: int) -> int:
        return 1 if self.smoke else max(3, full // 2) if self.form == "quick" else full

    def timed(self, step: Callable[[], object], repeats: int = 10, warm: int = 2) -> float:
        """Median seconds of one call, until the device is done."""
        times = []
        for index in range(warm + self.repeats(repeats)):
            began = time.perf_counter()
            step()
            self.sync()
            if index >= warm:
                times.append(time.perf_counter() - began)
        return statistics.median(times)

    def seconds_for(self, *, read_bytes: float = 0, operations: float = 0) -> float | None:
        """The least that reading and computing so much takes, each at the machine's rate, one beside the other."""
        if not self.limits.get("read") or not self.limits.get("gemm"):
            return None
        return max(read_bytes / (self.limits["read"] * 1e9), operations / (self.limits["gemm"] * 1e12))
