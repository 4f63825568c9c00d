"""Small random Llamas made with transformers, and what transformers answers with them: the reference of all parity."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

REFERENCE_TOKENS = 64


def make_llama(folder: Path, *, seed: int = 0, **changes: Any) -> Path:
    """Writes a random fp32 Llama. Small embedding and large layers: a plain random init repeats one token for ever."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    settings = {
        "vocab_size": 320,
        "hidden_size": 96,
        "intermediate_size": 192,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 24,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **changes,
    }
    model = LlamaForCausalLM(LlamaConfig(**settings)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                std = 0.02 if "embed" in name else 2 / parameter.shape[1] ** 0.5
                parameter.normal_(0, std)
    model.save_pretrained(folder, safe_serialization=True)
    return folder


def prompts(count: int = 20, longest: int = 1500, vocab: int = 320) -> list[list[int]]:
    """Prompts of 1 to `longest` tokens, seeded; lengths around block and chunk borders are among them."""
    generator = torch.Generator().manual_seed(7)
    borders = [1, 2, 15, 16, 17, 31, 32, 33, 64, 127, 128, 129, 255, 256, 257, 512, 513, 777, 1100, longest]
    lengths = borders[-count:] if count < len(borders) else borders[:count]
    return [torch.randint(3, vocab, (n,), generator=generator).tolist() for n in lengths]


def transformers_greedy(
    folder: Path, asked: list[list[int]], tokens: int = REFERENCE_TOKENS
) -> list[list[int]]:
    """What `generate` of transformers says to each prompt, greedily, end-of-sequence ignored."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    answers = []
    for prompt in asked:
        ids = torch.tensor([prompt])
        with torch.no_grad():
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=tokens,
                min_new_tokens=tokens,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
        answers.append(out[0, len(prompt) :].tolist())
    return answers
