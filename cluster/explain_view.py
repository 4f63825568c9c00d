"""How `baton explain` and `baton replay` show decisions: as tables for people, as JSON for machines."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from rich.console import Console
from rich.table import Table

from baton.v1 import inference_pb2 as api
from router.decisions import Record
from router.explain import predicted_ttft_s, same
from router.policy import Decision

DIFFERENCES = 20  # told one by one
_PIPE_COLUMNS = 200  # nothing is cut where nobody looks at a screen


def console() -> Console:
    found = Console(highlight=False)
    return found if found.is_terminal else Console(highlight=False, width=_PIPE_COLUMNS)


def show(told: api.Explanation, out: Console) -> None:
    """The decision in words, the candidates as a table, and how it ended."""
    out.print(
        f"request {told.request_id}: {told.prompt_tokens} prompt tokens, to have its first within "
        f"{_ms(told.ttft_target_s)} and each further one within {_ms(told.itl_target_s)}",
        soft_wrap=True,
        markup=False,
    )
    by = f" by {told.prefill_worker}" if told.prefill_worker else ""
    out.print(
        f"policy {told.policy}: {told.decode_worker}{by}; {told.reason} (view {told.view_digest})",
        soft_wrap=True,
        markup=False,
    )
    if told.alternative:
        out.print(
            f"with {told.local_below_tokens} tokens or more to compute, {told.alternative} was to do it",
            soft_wrap=True,
        )
    elif told.prefill_worker and told.local_below_tokens:
        out.print(
            f"with fewer than {told.local_below_tokens} tokens to compute, {told.decode_worker} was to do it"
        )
    out.print(_candidates(told.candidates))
    out.print(_outcome(told), soft_wrap=True, markup=False)


def _candidates(candidates: Iterable[api.Candidate]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("")
    for name in ("decode", "prefill"):
        table.add_column(name)
    for name in (
        "TTFT",
        "wait",
        "compute",
        "hand-off",
        "last token",
        "late",
        "gaps missed",
        "cost s",
        "score",
    ):
        table.add_column(name, justify="right")
    for one in candidates:
        remote = bool(one.prefill_worker)
        table.add_row(
            "->" if one.chosen else "",
            one.decode_worker,
            one.prefill_worker or "(itself)",
            _ms(one.ttft_s),
            _ms(one.wait_s),
            _ms(one.compute_s),
            _ms(one.handoff_s) if remote else "-",
            _ms(one.tail_s) if remote else "-",
            f"{100 * one.late:.0f} %",
            f"{one.harm:.2f}",
            f"{one.cost_s:.3f}",
            f"{one.score:.4f}",
            style="bold" if one.chosen else "",
        )
    return table


def _outcome(told: api.Explanation) -> str:
    if not told.HasField("outcome"):
        return "it runs"
    outcome = told.outcome
    words = [f"ended: {outcome.outcome}"]
    if outcome.ttft_s:
        predicted = f", {_ms(told.predicted_ttft_s)} predicted" if told.predicted_ttft_s else ""
        words.append(f"first token after {_ms(outcome.ttft_s)}{predicted}")
    if outcome.prefilled:
        words.append(
            f"prefilled {outcome.prefilled}: {outcome.cached_tokens} cached, {outcome.remote_tokens} remote"
        )
        words.append(f"queue {_ms(outcome.queue_s)}, hand-off {_ms(outcome.handoff_s)}")
    if outcome.fallback:
        words.append(f"fell back: {outcome.fallback}")
    return "; ".join(words)


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.1f} ms" if seconds < 10 else f"{seconds:.1f} s"


@dataclass(slots=True)
class Comparison:
    """What was decided, against what another policy (or the same) decides on what was seen."""

    policy: str
    decisions: int = 0
    equal: int = 0
    kinds: Counter[str] = field(default_factory=Counter)  # "local -> remote"
    predicted_s: list[tuple[float, float]] = field(default_factory=list)  # TTFT of both, where both are known
    differences: list[tuple[Record, Decision | None]] = field(default_factory=list)

    def add(self, record: Record, other: Decision | None) -> None:
        self.decisions += 1
        kind = "no worker" if other is None else other.kind
        self.kinds[f"{record.decision.kind} -> {kind}"] += 1
        if same(record.decision, other):
            self.equal += 1
        elif len(self.differences) < DIFFERENCES:
            self.differences.append((record, other))
        if other is not None:
            both = predicted_ttft_s(record, record.decision), predicted_ttft_s(record, other)
            if not any(map(math.isnan, both)):
                self.predicted_s.append(both)

    def means_s(self) -> tuple[float, float]:
        """Mean predicted TTFT of what was decided and of what would be."""
        count = max(1, len(self.predicted_s))
        return sum(was for was, _ in self.predicted_s) / count, sum(
            now for _, now in self.predicted_s
        ) / count

    def as_dict(self) -> dict[str, object]:
        was, now = self.means_s()
        return {
            "policy": self.policy,
            "decisions": self.decisions,
            "equal": self.equal,
            "kinds": dict(self.kinds),
            "predicted_ttft_s": {"recorded": was, "replayed": now},
        }

    def show(self, out: Console) -> None:
        share = 100 * self.equal / max(1, self.decisions)
        was, now = self.means_s()
        out.print(
            f"{self.decisions} decisions, {self.equal} the same under {self.policy} ({share:.1f} %); "
            f"mean predicted TTFT {_ms(was)} as recorded, {_ms(now)} under {self.policy}",
            soft_wrap=True,
            markup=False,
        )
        out.print(", ".join(f"{kinds}: {count}" for kinds, count in self.kinds.most_common()), markup=False)
        if self.differences:
            table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
            for name in ("request", "recorded", self.policy):
                table.add_column(name)
            for record, other in self.differences:
                told = "no worker" if other is None else f"{other.decode_worker}, {other.reason}"
                table.add_row(
                    record.request_id, f"{record.decision.decode_worker}, {record.decision.reason}", told
                )
            out.print(table)
