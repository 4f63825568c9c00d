"""Where a request runs: the pure heart of the router. No I/O, no clock, no randomness of its own.

A policy is a function (ask, view, now) -> Decision, found by name in `POLICIES`. To add one: write the function,
enter it there, and test it with a view made by hand.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from router.view import Ints, Pool, View

# A worker may have so many requests more than the least loaded one and still be chosen for what it has cached.
AFFINITY_SLACK = 4


def _nothing() -> Ints:
    return np.zeros(0, dtype=np.int64)


@dataclass(frozen=True, slots=True)
class Ask:
    """What a policy knows of a request, and the limits it is configured with.

    `uncached_tokens` is the most that may have to be prefilled: the decode worker checks again with exact numbers.
    `decode_cached` and `prefill_cached` are leading tokens of the prompt that each worker has, as far as this router
    knows: shape [workers], in the order of the view's pools, or empty when nothing is known.
    """

    prompt_tokens: int
    uncached_tokens: int
    local_below_tokens: int
    max_prefill_waiting: int
    prompt_logprobs: bool = False
    decode_cached: Ints = field(default_factory=_nothing, compare=False)
    prefill_cached: Ints = field(default_factory=_nothing, compare=False)


@dataclass(frozen=True, slots=True)
class Decision:
    """Where the request decodes, who prefills (None: the decode worker itself), and why, in words.

    `local_below_tokens`: the decode worker prefills a shorter uncached suffix itself whatever is said here.
    `code`: the reason as one of a few fixed words (`[a-z_]+`, never a number of the request), for metrics.
    """

    decode_worker: str
    prefill_worker: str | None
    reason: str
    local_below_tokens: int
    code: str

    @property
    def kind(self) -> Literal["local", "remote"]:
        return "local" if self.prefill_worker is None else "remote"


class NoWorker(Exception):
    """No decode worker can be reached."""


Policy = Callable[[Ask, View, float], Decision]


def choose(policy: Policy, ask: Ask, view: View, now: float) -> Decision:
    """The policy's decision, or what no policy can decide otherwise."""
    if ask.prompt_logprobs:
        reason = "local: log-probabilities of the prompt need the logits of all its tokens here"
        return Decision(_least_loaded(view.decode), None, reason, ask.local_below_tokens, "prompt_logprobs")
    return policy(ask, view, now)


def threshold(ask: Ask, view: View, now: float) -> Decision:
    """The peers' rule: remote when the uncached suffix is long enough and the prefill queue short enough."""
    decode_at = _decode_index(ask, view)
    decode_worker = view.decode.ids[decode_at]
    uncached = ask.uncached_tokens
    if ask.decode_cached.size:
        uncached = max(0, uncached - int(ask.decode_cached[decode_at]))
    if uncached < ask.local_below_tokens:
        reason = f"local: {uncached} tokens < {ask.local_below_tokens}"
        return Decision(decode_worker, None, reason, ask.local_below_tokens, "short")
    at = _index(view.prefill, ask.prefill_cached)
    if at is None:
        return Decision(
            decode_worker, None, "local: no prefill worker", ask.local_below_tokens, "no_prefill_worker"
        )
    queue = int(view.prefill.load[at])
    if queue >= ask.max_prefill_waiting:  # what it has cached is not worth that wait
        at = _least_loaded_index(view.prefill)
        assert at is not None
        queue = int(view.prefill.load[at])
    if queue >= ask.max_prefill_waiting:
        reason = f"local: {queue} hand-offs at the least loaded prefill worker >= {ask.max_prefill_waiting}"
        return Decision(decode_worker, None, reason, ask.local_below_tokens, "prefill_busy")
    reason = f"remote: {uncached} tokens >= {ask.local_below_tokens}, {queue} hand-offs ahead"
    return Decision(decode_worker, view.prefill.ids[at], reason, ask.local_below_tokens, "long")


def always_remote(ask: Ask, view: View, now: float) -> Decision:
    """Remote whenever there is a prefill worker and something to prefill."""
    decode_worker = view.decode.ids[_decode_index(ask, view)]
    at = _index(view.prefill, ask.prefill_cached)
    if at is None:
        return Decision(decode_worker, None, "local: no prefill worker", 0, "no_prefill_worker")
    return Decision(decode_worker, view.prefill.ids[at], "remote: always", 0, "always")


def always_local(ask: Ask, view: View, now: float) -> Decision:
    """Never remote."""
    return Decision(view.decode.ids[_decode_index(ask, view)], None, "local: always", 0, "always")


POLICIES: dict[str, Policy] = {
    "threshold": threshold,
    "always-remote": always_remote,
    "always-local": always_local,
}


def _least_loaded(pool: Pool) -> str:
    at = _least_loaded_index(pool)
    if at is None:
        raise NoWorker("no decode worker can be reached")
    return pool.ids[at]


def _decode_index(ask: Ask, view: View) -> int:
    at = _index(view.decode, ask.decode_cached)
    if at is None:
        raise NoWorker("no decode worker can be reached")
    return at


def _index(pool: Pool, cached: Ints) -> int | None:
    """The usable worker that has most of the prompt among those that are hardly busier than the least loaded; among
    equals the least loaded, then the first. None when none is usable."""
    least = _least_loaded_index(pool)
    if least is None or not cached.size or not cached.any():
        return least
    load = pool.load
    near = pool.usable & (load <= load[least] + AFFINITY_SLACK)
    most = np.where(near, cached, -1)
    return int(np.argmin(np.where(most == most.max(), load, np.iinfo(np.int64).max)))


def _least_loaded_index(pool: Pool) -> int | None:
    """The usable worker with the least work, the first among equals; None when none is usable."""
    if not pool.usable.any():
        return None
    return int(np.argmin(np.where(pool.usable, pool.load, np.iinfo(np.int64).max)))
