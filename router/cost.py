"""The `cost` policy: of all ways to serve a request, the one that should miss the fewest SLOs, and of equals the
cheapest. Pure; the numbers are made in `router.estimates`.

It also says up to which uncached length the decode worker should prefill by itself, since only that knows its cache
exactly: where the two ways break even.
"""

from __future__ import annotations

import numpy as np

from router.estimates import Local, Remote, estimate, local_scores
from router.policy import Ask, Decision
from router.view import View

HYSTERESIS = 0.002  # in scores: nearer than that, local or remote stays what it was last
MATTERS = 0.01  # difference in expected misses that is a reason by itself
TURN = 4  # the decode worker turns a decision only where the uncached length is off by such a factor
_STEPS = (TURN, TURN**2, TURN**3)


def cost(ask: Ask, view: View, now: float) -> Decision:
    """Fewest expected SLO misses, then least cost."""
    local, remote = estimate(ask, view)
    here = int(np.argmin(local.score))
    if remote is None:
        reason, code = "local: no prefill worker", "no_prefill_worker"
        if ask.prompt_tokens == 1:
            reason, code = "local: a single token", "short"
        elif view.prefill.usable.any():
            reason, code = "local: every prefill worker is full", "prefill_busy"
        worker, ttft_s = view.decode.ids[local.at[here]], float(local.ttft_s[here])
        best_s = float(local.ttft_s.min())
        return Decision(worker, None, reason, ask.prompt_tokens + 1, code, ttft_s=ttft_s, best_s=best_s)
    there, by = divmod(int(np.argmin(remote.score)), len(remote.to))
    gain = float(local.score[here] - remote.score[there, by])
    goes = gain > (-HYSTERESIS if view.last_remote else HYSTERESIS)
    misses = float(local.late[here] + local.harm[here] - remote.late[there, by] - remote.harm[there])
    code = "slo" if abs(misses) > MATTERS and (misses > 0) == goes else "cost"
    best_s = float(min(local.ttft_s.min(), remote.ttft_s.min()))
    if goes:
        return _go(ask, view, remote, there, by, code, best_s, float(local.ttft_s[here]))
    return _stay(ask, view, local, remote, here, code, best_s, float(remote.ttft_s[there, by]))


def _go(
    ask: Ask,
    view: View,
    remote: Remote,
    there: int,
    by: int,
    code: str,
    best_s: float,
    other_s: float,
) -> Decision:
    worker, ttft_s = view.prefill.ids[remote.to[by]], float(remote.ttft_s[there, by])
    bound = _turning_point(ask, view, int(remote.at[there]), float(remote.score[there, by]), True)
    return Decision(
        view.decode.ids[remote.at[there]],
        worker,
        f"remote: {ttft_s:.3f} s by {worker}, {other_s:.3f} s here",
        bound,
        code,
        ttft_s=ttft_s,
        handoff_s=ttft_s - float(remote.tail_s[there]),
        best_s=best_s,
        other_s=other_s,
    )


def _stay(
    ask: Ask,
    view: View,
    local: Local,
    remote: Remote,
    here: int,
    code: str,
    best_s: float,
    other_s: float,
) -> Decision:
    ttft_s = float(local.ttft_s[here])
    worker = view.decode.ids[local.at[here]]
    reason = f"local: {ttft_s:.3f} s here, {other_s:.3f} s remote"
    bound, alternative, handoff_s = ask.prompt_tokens + 1, None, 0.0
    row = np.flatnonzero(remote.at == local.at[here])
    if len(row):
        by = int(np.argmin(remote.score[row[0]]))
        bound = _turning_point(ask, view, int(local.at[here]), float(remote.score[row[0], by]), False)
        alternative = view.prefill.ids[remote.to[by]] if bound < ask.prompt_tokens else None
        handoff_s = float(remote.ttft_s[row[0], by] - remote.tail_s[row[0]])
    return Decision(
        worker,
        None,
        reason,
        bound,
        code,
        alternative,
        ttft_s=ttft_s,
        handoff_s=handoff_s if alternative else 0.0,
        best_s=best_s,
        other_s=other_s,
    )


def _turning_point(ask: Ask, view: View, at: int, score: float, remote: bool) -> int:
    """The uncached length from which the decode worker at `at` should hand off, a hand-off being worth `score`.

    Looked for only where what is missing is off by `TURN` or more from what the router believes; a hand-off's own worth
    hardly changes with it, since its prefill worker computes from its own cache.
    """
    prompt = ask.prompt_tokens
    believed = prompt - (int(ask.decode_cached[at]) if ask.decode_cached.size else 0)
    believed = min(max(1, believed), prompt)
    if remote:
        lengths = [believed / step for step in _STEPS]  # falling: the longest at which it is better here
        for length, here in zip(lengths, local_scores(ask, view, at, lengths), strict=True):
            if here <= score:
                return int(length)
        return 0
    lengths = [min(believed * step, prompt) for step in _STEPS]
    for length, here in zip(lengths, local_scores(ask, view, at, lengths), strict=True):
        if here > score:
            return max(believed + 1, int(length))
    return prompt + 1
