"""Ask fresh recall questions of a running server (or of transformers) and count the right answers.

    python benchmarks/recall.py --url http://127.0.0.1:8000
    python benchmarks/recall.py --transformers models/baton-demo

Each question puts a document of 128 to 2,048 tokens in the prompt and asks for one record of it.  The demo model
answers nearly all of them when its KV cache is whole, so a share of wrong answers that transformers does not have
is damage done on the way: a block lost, torn, or delivered to the wrong request.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.recall_data import is_correct, make_question  # noqa: E402

LENGTHS = (128, 256, 512, 1024, 1536, 2048)
DEPTHS = 5
MAX_TOKENS = 16
Messages = list[dict[str, str]]


@dataclass
class Question:
    """One question, where its answer stands, and (once asked) what came back."""

    length: int
    depth: int
    messages: Messages
    expected: str
    reply: str = ""
    error: str = ""
    seconds: float = 0.0

    @property
    def right(self) -> bool:
        """Whether the reply is the recorded value."""
        return not self.error and is_correct(self.reply, self.expected)


def make_questions(seed: int, lengths: Sequence[int], each: int, tokenizer: Any) -> list[Question]:
    """`each` questions per length, spread evenly over the depths of the needle."""
    rng = random.Random(seed)
    questions = []
    for length in lengths:
        for number in range(each):
            depth = number % DEPTHS
            where = (depth + rng.random()) / DEPTHS
            messages, expected = make_question(rng, length, where, tokenizer)
            questions.append(Question(length, depth, messages, expected))
    return questions


def accuracy(questions: Sequence[Question]) -> float:
    """Share of right answers; no questions count as none right."""
    return sum(question.right for question in questions) / max(1, len(questions))


async def ask_server(url: str, model: str, questions: Sequence[Question], concurrency: int) -> None:
    """Send every question to `/v1/chat/completions`, at most `concurrency` at a time, and note the replies."""
    gate = asyncio.Semaphore(concurrency)

    async def ask(client: httpx.AsyncClient, question: Question) -> None:
        body = {
            "model": model,
            "messages": question.messages,
            "temperature": 0,
            "max_tokens": MAX_TOKENS,
        }
        async with gate:
            began = time.perf_counter()
            try:
                response = await client.post("/v1/chat/completions", json=body)
                response.raise_for_status()
                question.reply = response.json()["choices"][0]["message"]["content"] or ""
            except (httpx.HTTPError, ValueError, KeyError, IndexError, TypeError) as error:
                question.error = f"{type(error).__name__}: {error}"
            question.seconds = time.perf_counter() - began

    async with httpx.AsyncClient(base_url=url, timeout=300.0) as client:
        await asyncio.gather(*(ask(client, question) for question in questions))


def first_model(url: str) -> str:
    """The name of the first model the server lists, for when none was given."""
    response = httpx.get(f"{url.rstrip('/')}/v1/models", timeout=30.0)
    response.raise_for_status()
    return str(response.json()["data"][0]["id"])


def ask_transformers(
    folder: Path, questions: Sequence[Question], batch: int = 20, show: bool = False
) -> None:
    """Answer in this process with transformers, greedily, in left-padded batches: the reference."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    starts = range(0, len(questions), batch)
    for start in track(starts, "answering", disable=not show):
        part = questions[start : start + batch]
        began = time.perf_counter()
        prompts = [
            tokenizer.apply_chat_template(q.messages, add_generation_prompt=True, tokenize=False)
            for q in part
        ]
        inputs = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
        with torch.inference_mode():
            output = model.generate(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                max_new_tokens=MAX_TOKENS,
                do_sample=False,
            )
        replies = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for question, reply in zip(part, replies, strict=True):
            question.reply, question.seconds = reply, (time.perf_counter() - began) / len(part)


def share(questions: Sequence[Question]) -> str:
    """A table cell: percent right, coloured by how good that is."""
    if not questions:
        return "-"
    value = accuracy(questions)
    colour = "green" if value >= 0.97 else "yellow" if value >= 0.9 else "red"
    return f"[{colour}]{value:.0%}[/]"


def result_table(questions: Sequence[Question]) -> Table:
    """Accuracy by length (rows) and by depth of the needle (columns)."""
    table = Table(title="Recall: right answers by prompt tokens and depth of the needle in %", box=box.SIMPLE)
    table.add_column("tokens", justify="right")
    for depth in range(DEPTHS):
        table.add_column(f"{100 * depth // DEPTHS}-{100 * (depth + 1) // DEPTHS}", justify="right")
    for heading in ("all", "asked", "errors", "mean s"):
        table.add_column(heading, justify="right")
    for length in sorted({question.length for question in questions}):
        row = [question for question in questions if question.length == length]
        cells = [share([question for question in row if question.depth == depth]) for depth in range(DEPTHS)]
        mean = sum(question.seconds for question in row) / len(row)
        errors = sum(bool(question.error) for question in row)
        table.add_row(str(length), *cells, share(row), str(len(row)), str(errors), f"{mean:.2f}")
    return table


def draw_heat_map(questions: Sequence[Question], path: Path) -> None:
    """The same table as a picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    lengths = sorted({question.length for question in questions})
    grid = [
        [accuracy([q for q in questions if q.length == length and q.depth == depth]) for length in lengths]
        for depth in range(DEPTHS)
    ]
    figure, axis = plt.subplots(figsize=(1.2 * len(lengths) + 2, 4), dpi=100)
    image = axis.imshow(grid, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
    axis.set_xticks(range(len(lengths)), [str(length) for length in lengths])
    axis.set_yticks(
        range(DEPTHS), [f"{100 * d // DEPTHS}-{100 * (d + 1) // DEPTHS} %" for d in range(DEPTHS)]
    )
    axis.set_xlabel("prompt tokens")
    axis.set_ylabel("depth of the needle")
    for row, values in enumerate(grid):
        for column, value in enumerate(values):
            axis.text(column, row, f"{100 * value:.0f}", ha="center", va="center", fontsize=9)
    figure.colorbar(image, label="right answers")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)


def main(
    url: Annotated[str, typer.Option(help="Base address of an OpenAI-compatible server.")] = "",
    transformers: Annotated[
        Path | None, typer.Option(help="Answer in-process from this model folder.")
    ] = None,
    model: Annotated[str, typer.Option(help="Model name to send; default: the first the server lists.")] = "",
    tokenizer: Annotated[Path, typer.Option(help="tokenizer.json that measures lengths.")] = ROOT
    / "models"
    / "baton-demo"
    / "tokenizer.json",
    lengths: Annotated[str, typer.Option(help="Prompt lengths in tokens.")] = ",".join(map(str, LENGTHS)),
    each: Annotated[int, typer.Option(help="Questions per length.")] = 50,
    concurrency: Annotated[int, typer.Option(help="Requests in flight.")] = 8,
    seed: Annotated[int, typer.Option(help="Seed of the questions; default: new ones each time.")] = -1,
    heat_map: Annotated[Path | None, typer.Option(help="Write the heat map to this PNG.")] = None,
    output: Annotated[Path | None, typer.Option(help="Write every question and reply to this JSON.")] = None,
    floor: Annotated[float, typer.Option(help="Exit with 1 if any length is below this.")] = 0.0,
) -> None:
    """Ask, count, print."""
    from tokenizers import Tokenizer

    console = Console()
    if bool(url) == bool(transformers):
        raise typer.BadParameter("give either --url or --transformers")
    seed = random.SystemRandom().randrange(2**31) if seed < 0 else seed
    sizes = [int(length) for length in lengths.split(",")]
    questions = make_questions(seed, sizes, each, Tokenizer.from_file(str(tokenizer)))
    if transformers:
        ask_transformers(transformers, questions, show=True)
    else:
        asyncio.run(ask_server(url, model or first_model(url), questions, concurrency))
    console.print(result_table(questions))
    console.print(f"seed {seed}, {len(questions)} questions, {accuracy(questions):.2%} right")
    for question in [q for q in questions if q.error][:3]:
        console.print(f"[red]{question.length} tokens: {question.error}[/]")
    if heat_map:
        draw_heat_map(questions, heat_map)
    if output:
        output.write_text(json.dumps([asdict(q) | {"right": q.right} for q in questions], indent=1) + "\n")
    worst = min(accuracy([q for q in questions if q.length == size]) for size in sizes)
    raise typer.Exit(code=int(worst < floor))


if __name__ == "__main__":
    typer.run(main)
