"""Why a request was sent where it was: its candidates with their estimates, from its record; and decisions repeated.

Called for `baton explain`, `baton replay` and the doors. Estimates are not recorded: they follow from what the policy
saw, which is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from baton.v1 import inference_pb2 as api
from router.decisions import Record
from router.estimates import Local, Remote, estimate
from router.policy import Decision, NoWorker, Policy, PolicyError, choose
from router.view import View

CANDIDATES = 24  # told, the best of them


def explanation(record: Record) -> api.Explanation:
    """The record as people and programs are told of it."""
    ask, decision, outcome = record.ask, record.decision, record.outcome
    told = api.Explanation(
        request_id=record.request_id,
        policy=record.policy,
        unix_s=record.at,
        view_version=record.view.version,
        view_digest=record.view_digest,
        prompt_tokens=ask.prompt_tokens,
        ttft_target_s=ask.ttft_s,
        itl_target_s=ask.itl_s,
        decode_worker=decision.decode_worker,
        prefill_worker=decision.prefill_worker or "",
        alternative=decision.alternative or "",
        local_below_tokens=decision.local_below_tokens,
        reason=decision.reason,
        predicted_ttft_s=decision.ttft_s,
        candidates=candidates(record),
    )
    if outcome is not None:
        told.outcome.CopyFrom(
            api.DecisionOutcome(
                outcome=outcome.outcome,
                ttft_s=outcome.ttft_s,
                e2e_s=outcome.e2e_s,
                generated_tokens=outcome.generated_tokens,
                prefilled=outcome.prefilled,
                cached_tokens=outcome.cached_tokens,
                remote_tokens=outcome.remote_tokens,
                queue_s=outcome.queue_s,
                handoff_s=outcome.handoff_s,
                prefill_s=outcome.prefill_s,
                fallback=outcome.fallback,
            )
        )
    return told


def candidates(record: Record) -> list[api.Candidate]:
    """What `cost` makes of the best of them, whatever policy decided, the best first; the chosen one is among them."""
    try:
        local, remote = estimate(record.ask, record.view)
    except NoWorker:
        return []
    found = [*_local(record.view, local), *(_remote(record.view, remote) if remote is not None else ())]
    decision = record.decision
    chosen = (decision.decode_worker, decision.prefill_worker or "")
    for one in found:
        one.chosen = (one.decode_worker, one.prefill_worker) == chosen
    found.sort(key=lambda one: (one.score, not one.chosen))
    return [one for at, one in enumerate(found) if at < CANDIDATES or one.chosen]


def _local(view: View, local: Local) -> Iterator[api.Candidate]:
    for row, at in enumerate(local.at.tolist()):
        yield api.Candidate(
            decode_worker=view.decode.ids[at],
            ttft_s=local.ttft_s[row],
            wait_s=local.wait_s[row],
            compute_s=local.compute_s[row],
            late=local.late[row],
            harm=local.harm[row],
            cost_s=local.cost_s[row],
            score=local.score[row],
        )


def _remote(view: View, remote: Remote) -> Iterator[api.Candidate]:
    for row, at in enumerate(remote.at.tolist()):
        for column, to in enumerate(remote.to.tolist()):
            yield api.Candidate(
                decode_worker=view.decode.ids[at],
                prefill_worker=view.prefill.ids[to],
                ttft_s=remote.ttft_s[row, column],
                wait_s=remote.wait_s[column],
                compute_s=remote.compute_s[column],
                handoff_s=remote.handoff_s[row, column],
                tail_s=remote.tail_s[row],
                late=remote.late[row, column],
                harm=remote.harm[row],
                cost_s=remote.cost_s[row, column],
                score=remote.score[row, column],
            )


def replay(records: Iterable[Record], policy: Policy) -> Iterator[tuple[Record, Decision | None]]:
    """What `policy` decides on what was seen then; None where it finds no worker."""
    for record in records:
        try:
            yield record, choose(policy, record.ask, record.view, record.now)
        except (NoWorker, PolicyError):
            yield record, None


def same(one: Decision, other: Decision | None) -> bool:
    """They send the request the same way."""
    return other is not None and (one.decode_worker, one.prefill_worker) == (
        other.decode_worker,
        other.prefill_worker,
    )


def predicted_ttft_s(record: Record, decision: Decision) -> float:
    """What the estimates of then make of another decision; nan where they did not look at it."""
    view = record.view
    local, remote = estimate(record.ask, view)
    row = view.decode.ids.index(decision.decode_worker)
    if decision.prefill_worker is None:
        found = local.ttft_s[local.at == row]
    elif remote is None:
        return float("nan")
    else:
        column = view.prefill.ids.index(decision.prefill_worker)
        found = remote.ttft_s[np.ix_(remote.at == row, remote.to == column)].ravel()
    return float(found[0]) if len(found) else float("nan")
