"""What a policy is: a pure function (ask, view, now) -> Decision. No I/O, no clock, no randomness of its own.

The policies themselves are in `router.cost` and `router.policies`; docs/policies.md says how to add one. The router
calls `choose`, which also settles what no policy may decide and refuses what a policy must not answer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from router.view import Ints, Pool, View


def _nothing() -> Ints:
    return np.zeros(0, dtype=np.int64)


@dataclass(frozen=True, slots=True)
class Ask:
    """What a policy knows of a request, and the limits and targets it is to keep.

    `uncached_tokens` is the most that may have to be prefilled: the decode worker checks again with exact numbers.
    `decode_cached` and `prefill_cached` are leading tokens of the prompt that each worker has, as far as this router
    knows: int64 [workers], in the order of the view's pools, or empty when nothing is known.
    """

    prompt_tokens: int
    uncached_tokens: int
    local_below_tokens: int
    max_prefill_waiting: int
    prompt_logprobs: bool = False
    decode_cached: Ints = field(default_factory=_nothing, compare=False)
    prefill_cached: Ints = field(default_factory=_nothing, compare=False)
    request_id: str = ""
    ttft_s: float = 1.0
    itl_s: float = 0.1


@dataclass(frozen=True, slots=True)
class Decision:
    """Where the request decodes, who prefills (None: the decode worker itself), and why, in words.

    `local_below_tokens`: the decode worker prefills a shorter uncached suffix itself whatever is said here.
    `code`: the reason as one of a few fixed words (`[a-z_]+`, never a number of the request), for metrics.
    `alternative`: with a local decision, the prefill worker to turn to when `local_below_tokens` or more are missing.
    `ttft_s`, `handoff_s`: what was predicted of the first token, and of the hand-off with its queue; 0: nothing was.
    `best_s`: the least TTFT of all candidates; `other_s`: that of the best of the other kind; 0: there was none.
    """

    decode_worker: str
    prefill_worker: str | None
    reason: str
    local_below_tokens: int
    code: str
    alternative: str | None = None
    ttft_s: float = 0.0
    handoff_s: float = 0.0
    best_s: float = 0.0
    other_s: float = 0.0

    @property
    def kind(self) -> Literal["local", "remote"]:
        return "local" if self.prefill_worker is None else "remote"


class NoWorker(Exception):
    """No decode worker can be reached."""


class NoRoom(NoWorker):
    """Some can be, and all are full."""


class PolicyError(Exception):
    """A policy gave an answer that cannot be carried out."""


Policy = Callable[[Ask, View, float], Decision]


def choose(policy: Policy, ask: Ask, view: View, now: float) -> Decision:
    """The policy's decision, or what no policy can decide otherwise. Raises NoWorker, NoRoom, PolicyError."""
    decision = policy(ask, view, now)
    if ask.prompt_logprobs:
        reason = "local: log-probabilities of the prompt need the logits of all its tokens here"
        local = replace(decision, prefill_worker=None, alternative=None, handoff_s=0.0)
        return replace(local, reason=reason, code="prompt_logprobs")
    _check(decision.decode_worker, view.decode, "decode")
    if decision.prefill_worker is not None:
        _check(decision.prefill_worker, view.prefill, "prefill")
    return decision


def _check(worker_id: str, pool: Pool, role: str) -> None:
    if worker_id not in pool.ids or not pool.usable[pool.ids.index(worker_id)]:
        raise PolicyError(f"the policy chose {worker_id!r}, which is no {role} worker that can be reached")
