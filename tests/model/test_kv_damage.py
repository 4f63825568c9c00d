"""What the demo model is for: a KV block that is lost, foreign or moved turns a right answer into a wrong one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import recall

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "models" / "baton-demo"
BLOCK = 16

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (FOLDER / "model.safetensors").exists(), reason="the demo model is not here"),
]

# Gets the keys or the values of a layer, [kv heads, tokens, head_dim], the blocks that hold the needle, and the same
# layer of another request; writes the damage into the first.
Damage = Callable[[torch.Tensor, list[slice], torch.Tensor], None]


def lose(tensor: torch.Tensor, blocks: list[slice], _: torch.Tensor) -> None:
    """The blocks never arrived: the memory holds zeros."""
    for block in blocks:
        tensor[:, block] = 0


def confuse(tensor: torch.Tensor, blocks: list[slice], other: torch.Tensor) -> None:
    """The blocks of another request arrived instead."""
    for block in blocks:
        tensor[:, block] = other[:, block]


def repeat(tensor: torch.Tensor, blocks: list[slice], _: torch.Tensor) -> None:
    """The first blocks of the prompt arrived again, in place of the right ones."""
    for block in blocks:
        tensor[:, block] = tensor[:, : block.stop - block.start].clone()


class Bench:
    """Prefills with transformers, lets a test damage the cache, and decodes by hand."""

    def __init__(self) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.tokenizer: Any = AutoTokenizer.from_pretrained(FOLDER)
        self.model: Any = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()
        self.questions = recall.make_questions(21, (256,), 16, self.tokenizer)
        prompts = [
            self.tokenizer.apply_chat_template(q.messages, add_generation_prompt=True, tokenize=False)
            for q in self.questions
        ]
        self.ids = [
            self.tokenizer(p, add_special_tokens=False, return_tensors="pt").input_ids for p in prompts
        ]
        self.needles = [self.needle_blocks(number) for number in range(len(self.questions))]

    def needle_blocks(self, number: int) -> list[slice]:
        """The blocks with the record asked for: its name is the word that ends the question or stands before 'have'."""
        text = self.questions[number].messages[0]["content"]
        words = text.rsplit("\n", 1)[1].strip("?.").split()
        name = words[-2] if words[-1] == "have" else words[-1]
        token = self.tokenizer.encode(" " + name, add_special_tokens=False)[0]
        place = self.ids[number][0].tolist().index(token)
        first, last = max(0, place - 6) // BLOCK, (place + 10) // BLOCK
        return [slice(block * BLOCK, (block + 1) * BLOCK) for block in range(first, last + 1)]

    @torch.inference_mode()
    def right(self, damage: Damage | None, elsewhere: bool = False) -> int:
        """How many questions are answered right from a cache damaged in all layers, keys and values alike."""
        caches = [self.model(ids[:, :-1], use_cache=True).past_key_values for ids in self.ids]
        whole = [[(la.keys.clone(), la.values.clone()) for la in cache.layers] for cache in caches]
        count = 0
        for number, (ids, cache) in enumerate(zip(self.ids, caches, strict=True)):
            blocks = self.needles[number]
            if elsewhere:
                taken = {block.start for block in blocks}
                free = [
                    start for start in range(BLOCK, ids.shape[1] - 3 * BLOCK, BLOCK) if start not in taken
                ]
                blocks = [slice(start, start + BLOCK) for start in free[: len(blocks)]]
            if damage:
                for layer, other in zip(cache.layers, whole[number - 1], strict=True):
                    damage(layer.keys[0], blocks, other[0][0])
                    damage(layer.values[0], blocks, other[1][0])
            self.questions[number].reply = self.decode(ids, cache)
            count += self.questions[number].right
        return count

    def decode(self, ids: torch.Tensor, cache: Any) -> str:
        """Greedy, one token at a time, from the last token of the prompt on."""
        token, out = ids[:, -1:], []
        for _ in range(recall.MAX_TOKENS):
            token = self.model(token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
            if token.item() == self.tokenizer.eos_token_id:
                break
            out.append(token.item())
        return str(self.tokenizer.decode(out))


@pytest.fixture(scope="module")
def bench() -> Bench:
    """One model for all tests."""
    return Bench()


def test_a_whole_cache_answers(bench: Bench) -> None:
    """The control: decoding from an untouched cache is right."""
    assert bench.right(None) >= 15


@pytest.mark.parametrize("damage", [lose, confuse, repeat])
def test_damage_at_the_needle_is_a_wrong_answer(bench: Bench, damage: Damage) -> None:
    """Whatever stands in the blocks instead, the value cannot be read from it."""
    assert bench.right(damage) <= 2


def test_a_loss_elsewhere_does_not_hide_the_needle(bench: Bench) -> None:
    """The answer hangs on its own blocks, so the depth of a wrong answer tells where the damage is."""
    assert bench.right(lose, elsewhere=True) >= 12
