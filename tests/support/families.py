"""Small random models of every supported family, made with transformers, whose features all matter to the answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

BASE: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WINDOW: dict[str, Any] = {"use_sliding_window": True, "sliding_window": 64}


def _rope(kind: str, **numbers: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **numbers}}


_YARN: dict[str, Any] = {"factor": 4.0, "original_max_position_embeddings": 512}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"head_dim": 24, "attention_bias": True, "mlp_bias": True}),
    "llama, linear rope": ("Llama", _rope("linear", factor=4.0)),
    "llama, llama3 rope": (
        "Llama",
        _rope(
            "llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=256,
        ),
    ),
    "llama, yarn": ("Llama", _rope("yarn", **_YARN)),
    "llama, yarn with every number": (
        "Llama",
        _rope("yarn", **_YARN, beta_fast=16.0, beta_slow=2.0, mscale=1.3, mscale_all_dim=0.7, truncate=False),
    ),
    "llama, yarn with a factor for attention": ("Llama", _rope("yarn", **_YARN, attention_factor=0.8)),
    "llama, dynamic rope": ("Llama", _rope("dynamic", factor=4.0)),
    "mistral": ("Mistral", {"sliding_window": 64}),
    "mistral without window": ("Mistral", {"sliding_window": None}),
    "qwen2, tied": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2, window from a layer on": ("Qwen2", {**WINDOW, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"head_dim": 24}),
    "qwen3, tied, windows by layer": (
        "Qwen3",
        {
            "head_dim": 24,
            "tie_word_embeddings": True,
            **WINDOW,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
}


def make_model(folder: Path, family: str, seed: int = 3, **more: Any) -> Path:
    """Writes the model, with `more` of its configuration changed.

    Large layers, and norms and biases far from one and zero, or a fault in them would not show.
    """
    import transformers

    name, changes = FAMILIES[family]
    torch.manual_seed(seed)
    config = getattr(transformers, name + "Config")(**{**BASE, **changes, **more})
    model = getattr(transformers, name + "ForCausalLM")(config)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.ndim == 2:
                # A tied embedding must be small next to the layers, or each token predicts itself.
                parameter.normal_(0, 0.02 if "embed" in key else 2 / parameter.shape[1] ** 0.5)
            elif "bias" in key:
                parameter.normal_(0, 0.5)
            else:
                parameter.normal_(1.0, 0.2)
    model.save_pretrained(folder, safe_serialization=True)
    return folder


def prompts(lengths: list[int], vocab: int = 320) -> list[list[int]]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(3, vocab, (length,), generator=generator).tolist() for length in lengths]
