"""What each way of serving a request would come to: seconds to its first token, SLOs missed, and the price. Pure.

For every decode worker that may be chosen: prefilling there; and for the best of them with each of the best prefill
workers: a hand-off. All are arrays over the candidates; nothing is looked at one by one. Called by `router.cost` for
each request, and by `router.explain` over recorded views.

    local:  the step under way, what is queued, the prompt beside the running decodes
    remote: the prefill worker's queue and compute, the hand-off that computing does not hide, the last token's step
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from router.policy import Ask, NoRoom, NoWorker
from router.view import MAX_PRICE, TARGET_BINS, Floats, Ints, Pool, View, pool_of

SHORTLIST = 16  # workers of each pool that are paired with one another
REST_TOKENS = (
    64  # that a running answer is guessed to have yet to draw, when a place or memory must become free
)
COST_WEIGHT = 0.05  # of a price as large as the target for the first token, in missed SLOs
_SHARES = (0.7, 0.25, 0.05)  # of the p50, p90 and p99 of a gap
_WEIGHTS: Floats = np.array(_SHARES)
_NO_ARRAYS: tuple[Any, ...] = (None, None, None)
# The same for one target, by how many of the three quantiles of a gap keep it.
_OWN: Floats = np.array([1.0, 0.3, 0.05, 0.0])
_EDGES: Floats = np.array(TARGET_BINS)


@dataclass(frozen=True, slots=True)
class Local:
    """Prefilling at decode workers, arrays [decode]. `at`: their places in the view's pool."""

    at: Ints
    wait_s: Floats  # step under way, queue, room that must become free
    compute_s: Floats  # of this prompt alone
    ttft_s: Floats
    late: Floats  # probability that the first token misses its target
    harm: Floats  # expected misses of ITL targets, of running requests and its own
    cost_s: Floats  # own time, time of others, price of the worker
    score: Floats


@dataclass(frozen=True, slots=True)
class Remote:
    """Hand-offs, arrays [decode, prefill] over the shortlists `at` and `to` (places in the view's pools)."""

    at: Ints
    to: Ints
    wait_s: Floats  # [prefill]: step under way, queue, base of its own steps
    compute_s: Floats  # [prefill]
    handoff_s: Floats
    tail_s: Floats  # [decode]: the last token
    ttft_s: Floats
    late: Floats
    harm: Floats  # [decode]
    cost_s: Floats
    score: Floats


def estimate(ask: Ask, view: View) -> tuple[Local, Remote | None]:
    """All candidates; Remote None when no prefill worker may be chosen. Raises NoWorker, NoRoom."""
    decode, at = _open(view.decode)
    if not len(at):
        if view.decode.usable.any():
            raise NoRoom("every decode worker is full")
        raise NoWorker("no decode worker can be reached")
    cached = np.minimum(_cached(ask.decode_cached, at), ask.prompt_tokens - 1.0)
    local, step_s, step_harm = _local(ask, view, decode, at, ask.prompt_tokens - cached)
    if ask.prompt_tokens == 1:
        return local, None
    prefill, to = _open(view.prefill)
    if not len(to):
        return local, None
    tail_s = local.wait_s - decode.queue_s + step_s
    tail_s += decode.token_s * np.minimum(decode.step_room, decode.queue_tokens)
    size_bytes = (ask.prompt_tokens - 1.0 - cached) * decode.token_bytes
    return local, _remote(ask, view, at, prefill, to, tail_s, size_bytes, step_harm)


def local_scores(ask: Ask, view: View, at: int, lengths: Sequence[float]) -> list[float]:
    """What prefilling at one decode worker (its place in the pool) would be worth, were so many tokens missing.

    The same as `_local` for a single worker, in plain numbers: arrays of one element cost three times as much.
    """
    pool, prompt = view.decode, float(ask.prompt_tokens)
    one: Any = Pool((), *_NO_ARRAYS, *pool.numbers[:, at].tolist())
    below = pool.below[at].tolist()
    step_s = one.step_s + one.kv_token_s * prompt
    missing = max(0.0, one.queue_tokens + (prompt - one.available_tokens)) / one.capacity_tokens
    wait_s = one.begun_s + REST_TOKENS * (one.crowd + missing) * step_s + one.queue_s
    own = float(_OWN[bisect_left(view.step_spread, ask.itl_s / step_s)])
    pressure = min(step_s / ask.itl_s, MAX_PRICE / (1 + MAX_PRICE))
    others = one.others + pressure / (1 - pressure)
    scale = COST_WEIGHT / ask.ttft_s
    scores, times = [], []
    for uncached in lengths:
        chunk = min(one.step_room, uncached)
        spike_s = step_s + chunk * (one.token_s + one.attention_s * (prompt - 0.5 * chunk))
        harm = own
        for weight, ratio in zip(_SHARES, view.step_spread, strict=True):
            harm += weight * below[bisect_left(TARGET_BINS, ratio * spike_s)]
        compute_s = uncached * (one.token_s + one.attention_s * (prompt - 0.5 * uncached))
        ttft_s = wait_s + compute_s + math.ceil((one.queue_tokens + uncached) / one.step_room) * step_s
        times.append(ttft_s)
        scores.append(harm + scale * (ttft_s + others * compute_s))
    late = _missed(np.array(times), ask.ttft_s, view.local_spread).tolist()
    return [score + missed for score, missed in zip(scores, late, strict=True)]


def _local(ask: Ask, view: View, decode: Pool, at: Ints, uncached: Floats) -> tuple[Local, Floats, Floats]:
    """Beside the estimates: the seconds of a step with this request in it, and whom those harm."""
    prompt = float(ask.prompt_tokens)
    # Of a step that has this request in it too, so soon as it decodes.
    step_s = decode.step_s + decode.kv_token_s * prompt
    missing = np.maximum(0, decode.queue_tokens + (prompt - decode.available_tokens)) / decode.capacity_tokens
    wait_s = decode.begun_s + REST_TOKENS * (decode.crowd + missing) * step_s
    # The longest of the steps that the prompt makes longer is its last full one.
    chunk = np.minimum(decode.step_room, uncached)
    spike_s = step_s + chunk * (decode.token_s + decode.attention_s * (prompt - 0.5 * chunk))
    harm, step_harm = _late(decode, spike_s, view), _late(decode, step_s, view)
    own = _OWN[
        np.array(view.step_spread).searchsorted(ask.itl_s / step_s)
    ]  # its gaps, wherever it is prefilled
    compute_s = uncached * (decode.token_s + decode.attention_s * (prompt - 0.5 * uncached))
    ttft_s = wait_s + decode.queue_s + compute_s
    ttft_s += np.ceil((decode.queue_tokens + uncached) / decode.step_room) * step_s
    pressure = np.minimum(step_s / ask.itl_s, MAX_PRICE / (1 + MAX_PRICE))
    others = decode.others + pressure / (1 - pressure)
    late = _missed(ttft_s, ask.ttft_s, view.local_spread)
    cost_s = ttft_s + others * compute_s
    harm = harm + own
    score = late + harm + (COST_WEIGHT / ask.ttft_s) * cost_s
    found = Local(at, wait_s + decode.queue_s, compute_s, ttft_s, late, harm, cost_s, score)
    return found, step_s, step_harm + own


def _remote(
    ask: Ask,
    view: View,
    at: Ints,
    prefill: Pool,
    to: Ints,
    tail_s: Floats,
    size_bytes: Floats,
    harm: Floats,
) -> Remote:
    wanted = ask.prompt_tokens - 1.0
    uncached = wanted - np.minimum(_cached(ask.prefill_cached, to), wanted)
    compute_s = uncached * (prefill.token_s + prefill.attention_s * (wanted - 0.5 * uncached))
    steps = np.ceil((prefill.queue_tokens + uncached) / prefill.step_room)
    done_s = prefill.begun_s + prefill.queue_s + compute_s + steps * prefill.base_s
    price_s = prefill.price * compute_s
    scale = COST_WEIGHT / ask.ttft_s
    # Only the best are paired: of decode workers those where it ends soonest and harms least, of prefill workers those
    # that are done soonest.
    if len(at) > SHORTLIST:
        best = (harm + scale * tail_s).argsort(kind="stable")[:SHORTLIST]
        at, tail_s, size_bytes, harm = at[best], tail_s[best], size_bytes[best], harm[best]
    if len(to) > SHORTLIST:
        best = (done_s + price_s).argsort(kind="stable")[:SHORTLIST]
        to, done_s, compute_s, price_s = to[best], done_s[best], compute_s[best], price_s[best]
    latency_s, byte_s = view.pairs[:, at[:, None], to]
    handoff_s = latency_s + byte_s * size_bytes[:, None]
    ttft_s = done_s + handoff_s + tail_s[:, None]
    late = _missed(ttft_s, ask.ttft_s, view.remote_spread)
    cost_s = ttft_s + price_s
    score = late + harm[:, None] + scale * cost_s
    return Remote(at, to, done_s - compute_s, compute_s, handoff_s, tail_s, ttft_s, late, harm, cost_s, score)


def _open(pool: Pool) -> tuple[Pool, Ints]:
    """The workers that may be chosen, as a pool of their own, and their places."""
    candidates = pool.candidates
    at = candidates.nonzero()[0]
    if len(at) == len(pool.ids):
        return pool, at
    return pool_of((), candidates[at], pool.below[at], pool.numbers[:, at]), at


def _cached(cached: Ints, at: Ints) -> Floats | float:
    return cached[at].astype(np.float64) if cached.size else 0.0


def _late(decode: Pool, gaps_s: Floats, view: View) -> Floats:
    """How many running requests should miss their ITL target when such a gap comes, [decode]."""
    reached = _EDGES.searchsorted(np.multiply.outer(view.step_spread, gaps_s))  # [3, decode]
    found: Floats = _WEIGHTS @ decode.below[np.arange(len(gaps_s)), reached]
    return found


def _missed(seconds: Floats, target_s: float, spread: tuple[float, float, float]) -> Floats:
    """The probability that something predicted to take `seconds` takes longer than `target_s`."""
    p50 = spread[0]
    p90 = max(spread[1], 1.001 * p50)
    p99 = max(spread[2], 1.001 * p90)
    ratios = [math.log(ratio) for ratio in (p50 / 2, p50, p90, p99, 2 * p99)]
    found: Floats = np.interp(np.log(target_s / seconds), ratios, (1.0, 0.5, 0.1, 0.01, 0.0))
    return found
