"""What steps cost on this machine, before the first request: a few synthetic steps, or a profile of an earlier life.

Called by the rank process between loading the model and saying that it is ready. The steps write KV into blocks that
nobody has taken yet and that nobody will read before they are written again: ledger and prefix cache are not touched.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import msgspec

from engine.api import Costs, SamplingParams
from engine.costs import StepModel
from engine.ledger import BlockLedger
from engine.plan import BlockTable, Row, StepPlan, StepResult
from engine.scheduler import Limits
from worker.spec import WorkerSpec

log = logging.getLogger("baton.rank")

ROUNDS = 3  # of all sizes, as far as the time goes
WARM_UP = 2  # steps that do not count
CONTEXT = 512  # tokens of KV before a synthetic decode, at most
SEQUENCES = 64  # in a synthetic step, at most


class Runner(Protocol):
    def run(self, plan: StepPlan) -> StepResult:
        """Computes one step."""


@dataclass(frozen=True, slots=True)
class Profile:
    """A file that holds `Costs`. `path` None: there is none."""

    path: Path | None

    @classmethod
    def of(cls, spec: WorkerSpec, model: str, dtype: str) -> Profile:
        """Workers that compute the same model in the same way share one."""
        if not spec.profile_dir:
            return cls(None)
        how = f"{spec.device}-{dtype}-{spec.threads}threads-tp{spec.tensor_parallel}"
        return cls(Path(spec.profile_dir) / f"{model}-{how}.json")

    def load(self) -> Costs | None:
        """None when there is none, or none that can be read, which is logged."""
        if self.path is None or not self.path.exists():
            return None
        try:
            return msgspec.json.decode(self.path.read_bytes(), type=Costs)
        except (OSError, msgspec.DecodeError) as error:
            log.warning("the profile %s cannot be used (%s): measuring anew", self.path, error)
            return None

    def save(self, costs: Costs) -> None:
        """Whole or not at all. Hand-offs are left out: other peers will have the same names."""
        if self.path is None or not costs.seen:
            return
        temporary = self.path.with_suffix(f".{os.getpid()}.tmp")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(msgspec.json.encode(msgspec.structs.replace(costs, handoffs=[])))
            temporary.replace(self.path)
        except OSError as error:
            log.warning("the profile %s cannot be written: %s", self.path, error)


def starting_costs(
    runner: Runner,
    blocks: BlockLedger,
    limits: Limits,
    calibrate_s: float,
    profile: Profile,
    clock: Callable[[], float] = time.perf_counter,
) -> StepModel:
    """From the profile where there is one, else measured for at most about `calibrate_s`, else guessed."""
    found = profile.load()
    if found is not None:
        log.info("step costs from the profile %s (%d steps)", profile.path, found.seen)
        return StepModel(found)
    model = StepModel()
    if calibrate_s > 0:
        begun = clock()
        steps = calibrate(model, runner, blocks, limits, calibrate_s, clock)
        log.info("measured %d steps in %.2f s: %s", steps, clock() - begun, model.costs.step)
        # The spreads were those of guesses. What was found is where learning from real steps begins.
        model = StepModel(Costs(step=model.step, seen=steps))
        profile.save(model.costs)
    return model


def calibrate(
    model: StepModel,
    runner: Runner,
    blocks: BlockLedger,
    limits: Limits,
    limit_s: float,
    clock: Callable[[], float],
) -> int:
    """Runs synthetic steps, small ones first, until the rounds or `limit_s` are over; returns how many counted.

    No step is begun that, by what is known so far, would end after the limit.
    """
    begun, done, slowest = clock(), 0, 0.0
    plans = _plans(blocks, limits)
    for plan in plans[:1] * WARM_UP + plans * ROUNDS:
        at = clock()
        if at - begun + slowest > limit_s:
            break
        runner.run(plan)
        seconds = clock() - at
        done += 1
        if done > WARM_UP:
            slowest = max(slowest, seconds)
            model.observe(plan, seconds)
    return max(0, done - WARM_UP)


def _plans(blocks: BlockLedger, limits: Limits) -> list[StepPlan]:
    """Steps of a few sizes that fit into the memory and the limits, small ones first: where the time is short, some of
    each kind come."""
    size, total = blocks.block_size, blocks.total
    longest = min(limits.max_batch_tokens, total * size)
    most = min(SEQUENCES, limits.max_running, limits.max_batch_tokens, max(1, total // 2))
    found = []
    for sequences in sorted({1, max(1, most // 4), most}):
        room = (total - sequences) * size
        contexts = sorted({size, min(CONTEXT, room)})
        found += [_decodes(size, sequences, context) for context in contexts if size <= context <= room]
    for tokens in sorted({longest // 16, longest // 4, longest}):
        for start in sorted({0, min(CONTEXT, total * size - tokens) // size * size}):
            if tokens > 1:
                table = _table(range(-(-(start + tokens) // size)))
                # It draws, or a GPU would still be computing when the step seems over.
                row = Row(start, [0] * tokens, table, SamplingParams(temperature=0))
                found.append(StepPlan(0, [row]))
    return sorted(found, key=lambda plan: plan.token_count)


def _decodes(size: int, sequences: int, context: int) -> StepPlan:
    """All read the same `context` tokens (whole blocks); each writes its one token into a block of its own."""
    shared = context // size
    sampling = SamplingParams(temperature=0)
    rows = [
        Row(shared * size, [0], _table([*range(shared), shared + number]), sampling, [0])
        for number in range(sequences)
    ]
    return StepPlan(0, rows)


def _table(blocks: range | list[int]) -> BlockTable:
    table = BlockTable()
    table.extend(list(blocks))
    return table
