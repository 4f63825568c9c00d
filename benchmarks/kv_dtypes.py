"""What is lost when KV crosses in fewer bits: error of the KV, tokens that change, questions that go wrong.

    .venv/bin/python -m benchmarks.kv_dtypes [--model models/baton-demo] [--each 50] [--length 256 --length 1024]

In one process: a prompt's KV (all tokens but the last, as in a hand-off) is computed once, then gathered out of its
blocks and scattered into others as a mover does it, in chunks, once for each way to cross; from each copy the answer is
decoded greedily. `stored` is the reference: those bits arrive as they are.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.recall import MAX_TOKENS, Question, make_questions
from engine.api import SamplingParams
from engine.plan import BlockTable, Row, StepPlan
from engine.runner import Runner, load_runner
from kvtransfer import layout
from kvtransfer.chunks import chunks
from kvtransfer.plan import Piece, wire_bytes

ROOT = Path(__file__).resolve().parents[1]
WIRES = ("stored", "bfloat16", "int8", "fp8_e4m3")
CHUNK_TOKENS = 256
BLOCK_SIZE = 16
STEP_TOKENS = 512


@dataclass
class Tally:
    """What one way to cross did to all questions."""

    wire: str
    questions: list[Question] = field(default_factory=list)
    same_replies: int = 0
    squared_error: float = 0.0
    squared: float = 0.0
    worst_error: float = 0.0  # of a value, over the largest of its layer, keys or values
    worst_logit: float = 0.0

    @property
    def relative_error(self) -> float:
        """Root mean square of the errors over that of the values."""
        return float(np.sqrt(self.squared_error / self.squared)) if self.squared else 0.0


class Crossing:
    """A runner with room for a prompt's blocks twice: `home`, where they are computed, and `away`."""

    def __init__(self, folder: Path, dtype: str = "float32", most_tokens: int = 2304) -> None:
        from transformers import AutoTokenizer

        blocks = -(-most_tokens // BLOCK_SIZE)
        self.runner: Runner = load_runner(folder, dtype, num_blocks=2 * blocks, block_size=BLOCK_SIZE)
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self.dtype = str(self.runner.kv_cache.dtype).removeprefix("torch.")
        self.layers = self.runner.kv_cache.layers
        order = torch.randperm(2 * blocks, generator=torch.Generator().manual_seed(0)).tolist()
        self.home, self.away = order[:blocks], order[blocks:]
        self.stop = self.tokenizer.convert_tokens_to_ids("<|end|>")

    def prompt(self, question: Question) -> list[int]:
        text = self.tokenizer.apply_chat_template(
            question.messages, add_generation_prompt=True, tokenize=False
        )
        ids: list[int] = self.tokenizer(text, add_special_tokens=False).input_ids
        return ids

    def prefill(self, prompt: list[int]) -> None:
        """All tokens but the last, into the blocks at home."""
        for start in range(0, len(prompt) - 1, STEP_TOKENS):
            part = prompt[start : min(start + STEP_TOKENS, len(prompt) - 1)]
            self.runner.run(StepPlan(0, [Row(start, part, _table(self.home), None)]))

    def cross(self, tokens: int, wire: str) -> None:
        """Copies the KV of so many tokens from home to away, chunk by chunk, as it crosses in `wire`."""
        _, _, _, heads, dim = self.layers[0].shape
        name = self.dtype if wire == "stored" else wire
        for first, count in chunks(0, tokens, CHUNK_TOKENS):
            size = wire_bytes(name, len(self.layers), dim, heads, count)
            piece = Piece(0, 0, heads, 0, count, 0, size, range(heads))
            buffer = np.zeros(size, dtype=np.uint8)
            here, there = (
                layout.span(self.layers, blocks, 0, first, count) for blocks in (self.home, self.away)
            )
            layout.gather(self.layers, here, [piece], name, buffer)
            layout.scatter(self.layers, there, [piece], name, buffer)

    def errors(self, tokens: int, tally: Tally) -> None:
        for layer in self.layers:
            for kv in layer.float():
                here, there = (kv[blocks].flatten(0, 1)[:tokens] for blocks in (self.home, self.away))
                error = (there - here).abs()
                tally.squared_error += float(error.square().sum())
                tally.squared += float(here.square().sum())
                tally.worst_error = max(tally.worst_error, float(error.max() / here.abs().max()))

    def answer(self, prompt: list[int]) -> tuple[list[int], torch.Tensor]:
        """The tokens that follow, greedily, from the KV away; and the logits of the first of them."""
        table, greedy = _table(self.away), SamplingParams(temperature=0.0)
        first = self.runner.logits(StepPlan(0, [Row(len(prompt) - 1, prompt[-1:], table, None)]))[0]
        reply = [int(first.argmax())]
        while len(reply) < MAX_TOKENS and reply[-1] != self.stop:
            row = Row(len(prompt) - 1 + len(reply), reply[-1:], table, greedy)
            reply += self.runner.run(StepPlan(0, [row])).sampled
        return reply, first


def _table(blocks: list[int]) -> BlockTable:
    table = BlockTable()
    table.extend(blocks)
    return table


def measure(
    crossing: Crossing, questions: Sequence[Question], wires: Sequence[str] = WIRES, show: bool = False
) -> list[Tally]:
    """What each way to cross does to these questions; "stored" is added in front when it is not among them."""
    tallies = [Tally(wire) for wire in dict.fromkeys(("stored", *wires))]
    for question in track(questions, "asking", disable=not show):
        prompt = crossing.prompt(question)
        crossing.prefill(prompt)
        reference: tuple[list[int], torch.Tensor] | None = None
        for tally in tallies:
            crossing.cross(len(prompt) - 1, tally.wire)
            crossing.errors(len(prompt) - 1, tally)
            reply, logits = crossing.answer(prompt)
            reference = reference or (reply, logits)
            tally.same_replies += reply == reference[0]
            tally.worst_logit = max(tally.worst_logit, float((logits - reference[1]).abs().max()))
            text = crossing.tokenizer.decode(reply, skip_special_tokens=True)
            tally.questions.append(
                Question(question.length, question.depth, question.messages, question.expected, text)
            )
    return tallies


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "baton-demo")
    parser.add_argument("--dtype", default="float32", help="of the model and its KV")
    parser.add_argument(
        "--length", type=int, action="append", help="of prompts, in tokens; 256, 1024 and 2048"
    )
    parser.add_argument("--each", type=int, default=50, help="questions of each length")
    parser.add_argument("--seed", type=int, default=2026)
    arguments = parser.parse_args()
    crossing = Crossing(arguments.model, arguments.dtype)
    lengths = arguments.length or [256, 1024, 2048]
    questions = make_questions(arguments.seed, lengths, arguments.each, crossing.tokenizer)
    tallies = measure(crossing, questions, show=True)
    _, _, _, heads, dim = crossing.layers[0].shape
    table = Table(title=f"{arguments.model.name}, KV in {crossing.dtype}, {len(questions)} questions")
    columns = ("crosses as", "bytes", "RMS error", "worst", "worst logit", "same replies")
    for column in (*columns, *(f"right of {arguments.each} at {length}" for length in lengths)):
        table.add_column(column, justify="right")
    whole = wire_bytes(crossing.dtype, 1, dim, heads, 1024)
    for tally in tallies:
        name = crossing.dtype if tally.wire == "stored" else tally.wire
        table.add_row(
            tally.wire,
            f"{wire_bytes(name, 1, dim, heads, 1024) / whole:.1%}",
            f"{tally.relative_error:.2%}",
            f"{tally.worst_error:.2%}",
            f"{tally.worst_logit:.3f}",
            f"{tally.same_replies} of {len(questions)}",
            *(str(sum(q.right for q in tally.questions if q.length == length)) for length in lengths),
        )
    Console(width=None if Console().is_terminal else 150).print(table)


if __name__ == "__main__":
    main()
