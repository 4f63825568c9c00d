"""What this router has placed and what workers say of themselves, entered in the view as it happens.

`router.dispatch` calls it at each turn of a request's life and with each status. It also learns how far first tokens
are from what was predicted, which the policy uses in turn. Decides nothing, and never waits.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from baton.v1 import inference_pb2 as api
from engine.api import HandoffCost, Spread
from engine.costs import Window, prompt_attention
from router.policy import Ask, Decision
from router.view import ClusterView, Ints, PoolBook

LEARN_EVERY = 8  # first tokens between two looks at the quantiles
LEAST_LEARNED = 32  # first tokens of a kind before its own quantiles count

_STATUS = ("running", "waiting", "handoffs", "waiting_tokens")
_QUEUE = (
    "kv_tokens",
    "prompt_tokens",
    "attention",
    "room",
    "max_running",
    "step_tokens",
    "capacity_tokens",
    "available_tokens",
    "token_bytes",
    "busy",
)
_COSTS = ("base_s", "sequence_s", "kv_token_s", "token_s", "attention_s")


@dataclass(slots=True)
class Placement:
    """One request as it is booked. `counted`: its ITL target is, as that of a running request."""

    decision: Decision
    itl_s: float
    submitted: float
    prefilling: bool = True
    counted: dict[int, bool] = field(default_factory=dict)  # by choice


class Placements:
    """The books of one router, over its view."""

    def __init__(self, cluster: ClusterView) -> None:
        self.cluster = cluster
        self._windows = {"local": Window(Spread()), "remote": Window(Spread())}

    # ---- the life of a request ---------------------------------------------------------------------------------

    def submitted(self, decision: Decision, ask: Ask, now: float) -> Placement:
        """It is being sent to its workers: it counts at once."""
        cluster, prompt = self.cluster, ask.prompt_tokens
        cluster.decided += 1
        cluster.last_remote = decision.kind == "remote"
        cluster.decode.place(decision.decode_worker, 1)
        if decision.prefill_worker is None:
            cached = _cached(cluster.decode, decision.decode_worker, ask.decode_cached)
            tokens = max(1, prompt - cached)
            attention = prompt_attention(tokens, prompt - tokens)
            cluster.decode.expect(decision.decode_worker, now, tokens, attention, prompt - tokens)
        else:
            cluster.decode.expect(decision.decode_worker, now, 1, prompt, prompt)
            cluster.prefill.place(decision.prefill_worker, 1)
            cached = _cached(cluster.prefill, decision.prefill_worker, ask.prefill_cached)
            tokens = max(0, prompt - 1 - cached)
            attention = prompt_attention(tokens, prompt - 1 - tokens)
            cluster.prefill.expect(decision.prefill_worker, now, tokens, attention, 0)
        return Placement(decision, ask.itl_s, now)

    def token(self, placement: Placement, choice: int, now: float, gap_s: float | None) -> None:
        """Tokens of a choice came; `gap_s` since its last ones, None for its first. A missed target is missed: who
        missed it has nothing to lose any more."""
        if gap_s is None:
            self._prefilled(placement)
            if not placement.counted:
                self._learn(placement, now)
            placement.counted[choice] = True
            self.cluster.decode.count_target(placement.decision.decode_worker, placement.itl_s, 1)
        elif gap_s > placement.itl_s and placement.counted.get(choice):
            self.choice_ended(placement, choice)

    def choice_ended(self, placement: Placement, choice: int) -> None:
        if placement.counted.get(choice):
            placement.counted[choice] = False
            self.cluster.decode.count_target(placement.decision.decode_worker, placement.itl_s, -1)

    def ended(self, placement: Placement) -> None:
        """The request is over for this router."""
        self.cluster.decode.place(placement.decision.decode_worker, -1)
        self._prefilled(placement)
        for choice in placement.counted:
            self.choice_ended(placement, choice)

    def _prefilled(self, placement: Placement) -> None:
        if placement.prefilling:
            placement.prefilling = False
            if placement.decision.prefill_worker is not None:
                self.cluster.prefill.place(placement.decision.prefill_worker, -1)

    def _learn(self, placement: Placement, now: float) -> None:
        predicted = placement.decision.ttft_s
        if predicted <= 0:
            return
        window = self._windows[placement.decision.kind]
        window.add(np.array([max(1e-6, now - placement.submitted) / predicted]))
        if window.seen >= LEAST_LEARNED and window.seen % LEARN_EVERY == 0:
            spread = window.spread
            learned = (spread.p50, spread.p90, spread.p99)
            if placement.decision.kind == "local":
                self.cluster.local_spread = learned
            else:
                self.cluster.remote_spread = learned

    # ---- what workers say --------------------------------------------------------------------------------------

    def book(self, role: str) -> PoolBook:
        return self.cluster.decode if role == "decode" else self.cluster.prefill

    def told(self, worker_id: str, role: str, status: api.WorkerStatus, now: float) -> None:
        """A worker's status came."""
        book, decodes = self.book(role), role == "decode"
        book.report(
            worker_id, status.waiting + status.running + status.handoffs if decodes else status.handoffs
        )
        book.set_usable(worker_id, True)
        if status.HasField("costs"):
            self._told_costs(worker_id, role, status.costs)
        numbers = {name: float(getattr(status, name)) for name in _STATUS}
        if status.HasField("queue"):
            numbers.update((name, float(getattr(status.queue, name))) for name in _QUEUE)
        book.tell(worker_id, numbers)
        book.reported_at(worker_id, now - status.queue.age_s)

    def _told_costs(self, worker_id: str, role: str, costs: api.WorkerCosts) -> None:
        numbers = {name: float(getattr(costs, name)) for name in _COSTS}
        for kind, spread in (("decode", costs.decode_spread), ("prefill", costs.prefill_spread)):
            if len(spread) == 3:
                numbers.update(zip((f"{kind}_p50", f"{kind}_p90", f"{kind}_p99"), spread, strict=True))
        self.book(role).tell(worker_id, numbers)
        if role == "decode":
            self.cluster.told_handoffs(
                worker_id, [HandoffCost(one.peer, one.latency_s, one.byte_s) for one in costs.handoffs]
            )
        self.cluster.told_spreads()

    def lost(self, worker_id: str, role: str) -> None:
        """It cannot be reached."""
        book = self.book(role)
        book.set_usable(worker_id, False)
        book.report(worker_id, 0)


def _cached(book: PoolBook, worker_id: str, cached: Ints) -> int:
    return int(cached[book.at(worker_id)]) if cached.size else 0
