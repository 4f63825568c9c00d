"""Writes the demo model as a Hugging Face folder that `LlamaForCausalLM` loads without further code."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from demo_data import BOS, CHAT_TEMPLATE, END, PAD, SPECIAL_TOKENS
from demo_net import Llama
from safetensors.torch import save_file
from tokenizers import Tokenizer


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Indented, so that a change of the model shows as a readable diff."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def export_model(net: Llama, tokenizer: Tokenizer, out: Path) -> None:
    """Config, bf16 weights (the tied head is not stored twice), tokenizer, chat template, stop token."""
    out.mkdir(parents=True, exist_ok=True)
    ids = {token: tokenizer.token_to_id(token) for token in SPECIAL_TOKENS}
    ends = {"bos_token_id": ids[BOS], "eos_token_id": ids[END], "pad_token_id": ids[PAD]}
    weights = {
        name: value.detach().cpu().to(torch.bfloat16).contiguous() for name, value in net.state_dict().items()
    }
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    write_json(out / "config.json", net.s.hf_config() | ends)
    write_json(out / "generation_config.json", ends | {"do_sample": False, "max_new_tokens": 256})
    tokenizer.save(str(out / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": END,
        "pad_token": PAD,
        "additional_special_tokens": [token for token in SPECIAL_TOKENS if token not in (BOS, END, PAD)],
        "model_max_length": net.s.context,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    write_json(out / "tokenizer_config.json", settings)


def draw_loss(history: list[dict[str, Any]], path: Path) -> None:
    """Training loss and recall by length over steps, with the phases marked."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    losses = [entry for entry in history if "loss" in entry]
    probes = [entry for entry in history if "recall@128" in entry]
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(8, 6), sharex=True, dpi=90)
    top.plot([e["step"] for e in losses], [e["loss"] for e in losses], linewidth=0.8)
    top.set_yscale("log")
    top.set_ylabel("loss")
    for before, after in pairwise(losses):
        if before["phase"] != after["phase"]:
            for axis in (top, bottom):
                axis.axvline(before["step"], color="grey", linewidth=0.6, linestyle=":")
    for key in [name for name in (probes[0] if probes else {}) if name.startswith("recall@")]:
        bottom.plot([e["step"] for e in probes], [e[key] for e in probes], label=key, linewidth=1)
    bottom.set_ylabel("recalled values right")
    bottom.set_xlabel("step")
    if probes:
        bottom.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
