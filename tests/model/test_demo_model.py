"""The demo model recalls from its context; these tests hold it to that, with transformers as the engine."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from benchmarks import recall, recall_data

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "models" / "baton-demo"

pytestmark = pytest.mark.skipif(
    not (FOLDER / "model.safetensors").exists(), reason="the demo model is not here"
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """The exported tokenizer, as transformers loads it."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(FOLDER)


def test_it_is_a_small_plain_llama() -> None:
    """Size and shape are promises to whoever loads the folder."""
    from transformers import AutoModelForCausalLM, LlamaForCausalLM

    config = json.loads((FOLDER / "config.json").read_text())
    model, notes = AutoModelForCausalLM.from_pretrained(FOLDER, output_loading_info=True)
    assert isinstance(model, LlamaForCausalLM)
    assert not notes["missing_keys"] and not notes["unexpected_keys"] and not notes["mismatched_keys"]
    assert (config["num_attention_heads"], config["num_key_value_heads"]) == (8, 4)
    assert config["head_dim"] >= 32 and config["max_position_embeddings"] >= 2048
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 12 * 2**20


def test_end_of_turn_is_the_stop_token(tokenizer: Any) -> None:
    """A server that reads generation_config.json stops where the training rows stop."""
    generation = json.loads((FOLDER / "generation_config.json").read_text())
    assert generation["eos_token_id"] == tokenizer.convert_tokens_to_ids("<|end|>") == tokenizer.eos_token_id


@pytest.mark.parametrize(
    "text", ["plain words", " two  spaces\n\tand a tab", "héllo, wörld", "日本語 🙂", "\r\n\x00"]
)
def test_any_text_survives_the_tokenizer(tokenizer: Any, text: str) -> None:
    """Bytes are the fallback, so nothing is unknown and nothing changes on the way back."""
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_every_value_is_few_tokens(tokenizer: Any) -> None:
    """Names and words are one token each: what makes the model small enough to train on a CPU."""
    for word in recall_data.NAMES + recall_data.WORDS:
        assert len(tokenizer.encode(" " + word, add_special_tokens=False)) == 1, word


@pytest.mark.parametrize("task", ["recall", "copy", "chain", "sum", "story"])
def test_chat_template_is_the_training_format(tokenizer: Any, task: str) -> None:
    """What a client sends as messages becomes, token for token, what the training rows hold."""
    from scripts import demo_data

    turns = demo_data.TASKS[task](random.Random(5), 60)
    messages = []
    for user, answer in turns:
        messages.append({"role": "user", "content": "".join(user)})
        messages.append({"role": "assistant", "content": "".join(text for text, _ in answer)})
    rendered = tokenizer.apply_chat_template(messages, tokenize=False)
    maker = demo_data.RowMaker(tokenizer.backend_tokenizer)
    row: list[int] = maker.encode(demo_data.BOS)[:]
    for user, answer in turns:
        for piece in (demo_data.USER, *user, demo_data.END, demo_data.ASSISTANT):
            row += maker.encode(piece)
        for text in [text for text, _ in answer] + [demo_data.END]:
            row += maker.encode(text)
    assert tokenizer.encode(rendered, add_special_tokens=False) == row


def test_a_question_fits_its_length_and_depth(tokenizer: Any) -> None:
    """The prompt is never longer than asked for, nearly fills it, and holds its needle at the depth asked for."""
    rng = random.Random(3)
    for length in (128, 512, 2048):
        for depth in (0.0, 0.99):
            messages, expected = recall_data.make_question(rng, length, depth, tokenizer)
            prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
            count = len(tokenizer.encode(prompt, add_special_tokens=False))
            assert length - 24 <= count <= length
            text = messages[0]["content"]
            assert abs(text.index(f" {expected}") / len(text) - depth) < 0.35


@pytest.mark.parametrize(
    ("reply", "right"),
    [("The code of Mira is 41.", True), ("41", True), ("The code of Mira is 417.", False), ("", False)],
)
def test_only_the_exact_value_counts(reply: str, right: bool) -> None:
    """A longer number that begins with the right digits is wrong: that is what a torn block looks like."""
    assert recall_data.is_correct(reply, "41") is right


@pytest.mark.slow
def test_it_recalls(tokenizer: Any) -> None:
    """100 fixed questions; below the floor, the weights or the tokenizer are not the ones that were measured."""
    questions = recall.make_questions(11, (128, 256, 384, 512), 22, tokenizer)
    questions += recall.make_questions(12, (1024, 1536, 2048), 4, tokenizer)
    recall.ask_transformers(FOLDER, questions)
    wrong = [(q.length, q.expected, q.reply) for q in questions if not q.right]
    assert len(questions) == 100
    assert len(wrong) <= 4, wrong


def test_a_missing_record_is_a_wrong_answer(tokenizer: Any) -> None:
    """The answer is in the context and nowhere else: without the needle's sentence the model cannot know it."""
    questions = recall.make_questions(13, (256,), 20, tokenizer)
    for question in questions:
        content = question.messages[0]["content"]
        question.messages = [{"role": "user", "content": content.replace(f" {question.expected}", " lamp")}]
    recall.ask_transformers(FOLDER, questions)
    assert recall.accuracy(questions) <= 0.1
