"""The policies by name, and the plain ones among them. Pure but for `find`, which imports a policy of one's own.

Each is a function (ask, view, now) -> Decision; how to add one is in docs/policies.md. All but `cost` choose the decode
worker with the least work, or one hardly busier that has more of the prompt cached.
"""

from __future__ import annotations

import importlib
import re
from zlib import crc32

import numpy as np

from router.cost import cost
from router.policy import Ask, Decision, NoRoom, NoWorker, Policy
from router.view import Ints, Pool, View

# A worker may have so many requests more than the least loaded one and still be chosen for what it has cached.
AFFINITY_SLACK = 4
DOTTED = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


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
        return _alone(decode_worker, view, ask.local_below_tokens)
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
        return _alone(decode_worker, view, 0)
    return Decision(decode_worker, view.prefill.ids[at], "remote: always", 0, "always")


def always_local(ask: Ask, view: View, now: float) -> Decision:
    """Never remote."""
    return Decision(view.decode.ids[_decode_index(ask, view)], None, "local: always", 0, "always")


def random(ask: Ask, view: View, now: float) -> Decision:
    """Any decode worker, any prefill worker or none, by the request's id: the same request draws the same."""
    drawn = crc32(ask.request_id.encode())
    return _pick(view, drawn & 0xFFFF, (drawn >> 16) & 0xFF, bool(drawn >> 24 & 1), "random")


def round_robin(ask: Ask, view: View, now: float) -> Decision:
    """All decode workers in turn, and for each round the next prefill worker; always remote where there is one."""
    decode = max(1, int(view.decode.candidates.sum()))
    return _pick(view, view.decided, view.decided // decode + view.decided, True, "turn")


def _pick(view: View, decode: int, prefill: int, remote: bool, code: str) -> Decision:
    """The so-maniest of those that may be chosen, modulo their number."""
    decoders = np.flatnonzero(view.decode.candidates)
    if not len(decoders):
        raise _nobody(view)
    decode_worker = view.decode.ids[decoders[decode % len(decoders)]]
    prefillers = np.flatnonzero(view.prefill.candidates)
    if not len(prefillers):
        return _alone(decode_worker, view, 0)
    if not remote:
        return Decision(decode_worker, None, f"local: {code}", 0, code)
    worker = view.prefill.ids[prefillers[prefill % len(prefillers)]]
    return Decision(decode_worker, worker, f"remote: {code}", 0, code)


POLICIES: dict[str, Policy] = {
    "cost": cost,
    "threshold": threshold,
    "always-remote": always_remote,
    "always-local": always_local,
    "random": random,
    "round-robin": round_robin,
}


def find(name: str) -> Policy:
    """The policy of this name, or `package.module:function`. Raises ValueError, which says what is wrong."""
    if name in POLICIES:
        return POLICIES[name]
    if not DOTTED.fullmatch(name):
        raise ValueError(f"must be one of {', '.join(POLICIES)}, or package.module:function")
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{error}: it must be importable where Baton runs (PYTHONPATH)") from None
    if not callable(found):
        raise ValueError(f"{name} is a {type(found).__name__}, not a function (ask, view, now) -> Decision")
    policy: Policy = found
    return policy


def _alone(decode_worker: str, view: View, below: int) -> Decision:
    """There is no prefill worker to choose."""
    if view.prefill.usable.any():
        return Decision(decode_worker, None, "local: every prefill worker is full", below, "prefill_busy")
    return Decision(decode_worker, None, "local: no prefill worker", below, "no_prefill_worker")


def _nobody(view: View) -> NoWorker:
    if view.decode.usable.any():
        return NoRoom("every decode worker is full")
    return NoWorker("no decode worker can be reached")


def _decode_index(ask: Ask, view: View) -> int:
    at = _index(view.decode, ask.decode_cached)
    if at is None:
        raise _nobody(view)
    return at


def _index(pool: Pool, cached: Ints) -> int | None:
    """The worker that has most of the prompt among those that are hardly busier than the least loaded; among equals
    the least loaded, then the first. None when none may be chosen."""
    least = _least_loaded_index(pool)
    if least is None or not cached.size or not cached.any():
        return least
    load = pool.load
    near = pool.candidates & (load <= load[least] + AFFINITY_SLACK)
    most = np.where(near, cached, -1)
    return int(np.argmin(np.where(most == most.max(), load, np.inf)))


def _least_loaded_index(pool: Pool) -> int | None:
    """The worker with the least work, the first among equals; None when none may be chosen."""
    candidates = pool.candidates
    if not candidates.any():
        return None
    return int(np.argmin(np.where(candidates, pool.load, np.inf)))
