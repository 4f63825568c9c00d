"""Train the demo model: a small Llama that recalls from its context, so that KV damage becomes a wrong answer.

    nice python scripts/train_demo_model.py                # about two hours on 2 CPU cores, minutes on a GPU
    python scripts/train_demo_model.py --export-only       # write the model folder from the last checkpoint

The same seed gives the same rows in the same order: each step draws from a generator seeded by its number, so
a run resumed from a checkpoint continues as if it had not stopped.  On a CPU the rows of a step are shared out
to single-threaded workers that meet once per step; threads would meet at each of its thousand small operations,
which is slow on a machine that has other things to do.
"""

from __future__ import annotations

import json
import math
import random
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, TextIO

import torch
import torch.nn.functional as F
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, distributed, multiprocessing

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

import demo_data  # noqa: E402
from demo_export import draw_loss, export_model  # noqa: E402
from demo_net import Llama, Shape, make_optimizers  # noqa: E402

RATE = 5e-3
WARM_UP = 60


@dataclass(frozen=True)
class Phase:
    """A stretch of training; it ends after `steps`, or once recall reaches `until`.

    Each step draws one of the row lengths and takes as many rows as make `tokens`.
    """

    name: str
    steps: int
    lengths: tuple[int, ...]
    mix: dict[str, float]
    dense: float = 0.6
    until: float = 2.0
    decay: bool = False
    tokens: int = 4096


FORM = {"recall": 0.6, "copy": 0.4}
MIXED = {"recall": 0.7, "copy": 0.1, "chain": 0.08, "sum": 0.07, "story": 0.05}
FULL = {"recall": 0.4, "copy": 0.16, "chain": 0.14, "sum": 0.25, "story": 0.05}
# Short rows first: attention finds induction soonest where there is little to look at, and later phases only
# stretch what it found.  The last phase takes the learning rate to zero.
PHASES = [
    Phase("form", 3000, (64,), FORM, 0.8, until=0.9),
    Phase("grow", 1500, (128,), FORM, 0.7, until=0.95),
    Phase("mix", 1000, (256,), MIXED, until=0.97),
    Phase("widen", 1000, (512,), MIXED, until=0.97),
    Phase("reach", 600, (1024,), MIXED, until=0.98),
    Phase("far", 1000, (256, 1088, 2176, 2176), FULL, decay=True, tokens=4352),
]


def make_batch(
    maker: demo_data.RowMaker, phase: Phase, step: str, rank: int, workers: int, device: str
) -> tuple[Tensor, Tensor, list[str]]:
    """One worker's rows of one step: token ids, loss weights, and the task of each row."""
    length = random.Random(step).choice(phase.lengths) if len(phase.lengths) > 1 else phase.lengths[0]
    rng = random.Random(f"{step} {rank}")
    count = max(1, phase.tokens // length // workers)
    tasks = rng.choices(list(phase.mix), list(phase.mix.values()), k=count)
    rows = [maker.row(rng, task, length, phase.dense) for task in tasks]
    ids = torch.tensor([row[0] for row in rows], device=device)
    weights = torch.tensor([row[1] for row in rows], device=device)
    return ids, weights[:, 1:], tasks


def batch_loss(net: Llama, ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted loss where there is any weight; also which predictions were right, and where they stood."""
    chosen = weights > 0
    with torch.autocast(ids.device.type, torch.bfloat16):
        logits = net.logits(net(ids[:, :-1])[chosen])
    targets, weight = ids[:, 1:][chosen], weights[chosen]
    loss = (F.cross_entropy(logits, targets, reduction="none") * weight).sum() / weight.sum()
    return loss, logits.detach().argmax(-1) == targets, chosen


def task_hits(tasks: list[str], right: Tensor, chosen: Tensor, weights: Tensor) -> dict[str, float]:
    """Share of the tokens that matter (values, copies) predicted right, by task."""
    grid = torch.zeros_like(chosen)
    grid[chosen] = right
    hits = {}
    for task in sorted(set(tasks)):
        rows = torch.tensor([name == task for name in tasks], device=chosen.device)
        matter = (
            (weights >= demo_data.VALUE / 2) & rows[:, None] if task != "story" else chosen & rows[:, None]
        )
        if matter.any():
            hits[task] = grid[matter].float().mean().item()
    return hits


@torch.no_grad()
def probe(net: Llama, maker: demo_data.RowMaker, device: str, tokens: int = 16_384) -> dict[str, float]:
    """Teacher-forced recall on rows never trained on, at several lengths: the number to watch."""
    scores = {}
    for length in (128, 512, 1024, 2048):
        phase = Phase("probe", 1, (length,), {"recall": 1.0}, tokens=max(4 * length, tokens // 4))
        ids, weights, tasks = make_batch(maker, phase, f"probe {length}", 0, 1, device)
        _, right, chosen = batch_loss(net, ids, weights)
        scores[f"recall@{length}"] = round(task_hits(tasks, right, chosen, weights)["recall"], 4)
    return scores


class Run:
    """The state of a training run: network, optimizers, step, history; saved and restored as one."""

    COUNTERS = ("step", "tokens", "seconds", "phase", "phase_step", "recall", "history")

    def __init__(self, folder: Path, seed: int, device: str, rank: int = 0, workers: int = 1) -> None:
        self.path, self.seed, self.device = folder / "checkpoint.pt", seed, device
        self.rank, self.workers = rank, workers
        torch.manual_seed(seed)
        self.tokenizer = demo_data.build_tokenizer()
        self.maker = demo_data.RowMaker(self.tokenizer)
        self.net = Llama(Shape(self.tokenizer.get_vocab_size())).to(device)
        self.optimizers = make_optimizers(self.net, RATE)
        self.step, self.tokens, self.seconds = 0, 0, 0.0
        self.phase, self.phase_step, self.recall = 0, 0, 0.0
        self.history: list[dict[str, float | str]] = []
        if self.path.exists():
            self.load()

    def load(self) -> None:
        """Continue from the last checkpoint."""
        state = torch.load(self.path, map_location=self.device, weights_only=True)
        self.net.load_state_dict(state["net"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        for name in self.COUNTERS:
            setattr(self, name, state[name])

    def save(self) -> None:
        """Write the checkpoint beside the old one, then replace it, so that a kill never leaves half a file."""
        state = {
            "net": self.net.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        } | {name: getattr(self, name) for name in self.COUNTERS}
        torch.save(state, self.path.with_suffix(".new"))
        self.path.with_suffix(".new").replace(self.path)

    def share(self, recall: float) -> float:
        """Average the gradients, and the number that ends a phase, over the workers: one message per step."""
        if self.workers == 1:
            return recall
        gradients = [p.grad for p in self.net.parameters() if p.grad is not None]
        flat = torch.cat([*(g.flatten() for g in gradients), torch.tensor([recall])])
        distributed.all_reduce(flat)
        flat /= self.workers
        for gradient, mean in zip(gradients, flat[:-1].split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(mean.view_as(gradient))
        return float(flat[-1])

    def advance(self, phases: list[Phase]) -> dict[str, float | str]:
        """One optimizer step; returns what to log about it."""
        began = time.perf_counter()
        phase = phases[self.phase]
        factor = min(1.0, (self.step + 1) / WARM_UP)
        if phase.decay:
            factor *= 1.0 - self.phase_step / phase.steps
        ids, weights, tasks = make_batch(
            self.maker, phase, f"{self.seed} {self.step}", self.rank, self.workers, self.device
        )
        loss, right, chosen = batch_loss(self.net, ids, weights)
        loss.backward()
        hits = task_hits(tasks, right, chosen, weights)
        recall = self.share(hits.get("recall", self.recall))
        norm = torch.nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = RATE * factor
            if math.isfinite(norm.item()):
                optimizer.step()
            optimizer.zero_grad()
        self.step += 1
        self.tokens += ids[:, 1:].numel() * self.workers
        self.seconds += time.perf_counter() - began
        entry: dict[str, float | str] = {
            "step": self.step,
            "phase": phase.name,
            "loss": round(loss.item(), 4),
        }
        self.recall = 0.95 * self.recall + 0.05 * recall
        self.phase_step += 1
        if self.phase_step >= phase.steps or (self.phase_step > 100 and self.recall > phase.until):
            self.phase, self.phase_step, self.recall = self.phase + 1, 0, 0.0
        return entry | {name: round(value, 4) for name, value in hits.items()}


def note(run: Run, entry: dict[str, float | str], lines: TextIO) -> None:
    """Keep an entry for the loss curve, and let a person watch it in the log."""
    run.history.append(entry)
    lines.write(json.dumps(entry) + "\n")
    lines.flush()


def train(run: Run, phases: list[Phase], log: Path, probe_every: int, save_every: float) -> None:
    """Run every remaining step; the first worker logs each tenth, and probes and saves now and then."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    saved = time.monotonic()
    first = run.rank == 0
    with Progress(*columns, disable=not first) as progress, log.open("a") as lines:
        bar = progress.add_task("training", total=sum(phase.steps for phase in phases))
        while run.phase < len(phases):
            entry = run.advance(phases)
            if not first:
                continue
            last = run.phase == len(phases)
            if run.step % 10 == 0:
                note(run, entry, lines)
            if run.step % probe_every == 0 or last:
                scores = probe(run.net, run.maker, run.device)
                note(
                    run,
                    scores | {"step": run.step, "tokens": run.tokens, "seconds": round(run.seconds)},
                    lines,
                )
            left = sum(phase.steps for phase in phases[run.phase :]) - run.phase_step
            total, name = run.step + left, f"{entry['phase']} loss {entry['loss']:.3f}"
            progress.update(bar, completed=run.step, total=total, description=name)
            if time.monotonic() - saved > save_every or last:
                run.save()
                saved = time.monotonic()


def train_worker(
    rank: int, workers: int, work: Path, seed: int, phases: list[Phase], probe_every: int
) -> None:
    """One of several processes that each work through their share of every step's rows."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", f"file://{work / 'meeting'}", rank=rank, world_size=workers)
    train(Run(work, seed, "cpu", rank, workers), phases, work / "log.jsonl", probe_every, save_every=60.0)
    distributed.destroy_process_group()


def main(
    out: Annotated[Path, typer.Option(help="Model folder to write.")] = ROOT / "models" / "baton-demo",
    work: Annotated[Path, typer.Option(help="Checkpoints and log; never committed.")] = ROOT
    / ".run"
    / "demo-model",
    seed: Annotated[int, typer.Option(help="Seed of data and weights.")] = 1,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cuda"
    if torch.cuda.is_available()
    else "cpu",
    workers: Annotated[int, typer.Option(help="Single-threaded processes, on a CPU.")] = 2,
    scale: Annotated[float, typer.Option(help="Multiplies every phase; 0.01 is a smoke run.")] = 1.0,
    probe_every: Annotated[int, typer.Option(help="Steps between probes.")] = 250,
    export_only: Annotated[bool, typer.Option(help="Write the folder from the last checkpoint.")] = False,
) -> None:
    """Train (or continue), then export."""
    phases = [replace(phase, steps=max(1, round(phase.steps * scale))) for phase in PHASES]
    work.mkdir(parents=True, exist_ok=True)
    workers = workers if device == "cpu" else 1
    if not export_only and workers == 1:
        train(Run(work, seed, device), phases, work / "log.jsonl", probe_every, save_every=60.0)
    elif not export_only:
        (work / "meeting").unlink(missing_ok=True)
        multiprocessing.spawn(train_worker, (workers, work, seed, phases, probe_every), workers)
    run = Run(work, seed, "cpu")
    export_model(run.net, run.tokenizer, out)
    draw_loss(run.history, out / "loss.png")
    print(f"{run.step} steps, {run.tokens} tokens, {run.seconds / 60:.1f} minutes -> {out}")


if __name__ == "__main__":
    typer.run(main)
