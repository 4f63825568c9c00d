"""What steps and hand-offs cost on this machine, learned from those that ran. Pure: seconds in, coefficients out.

A step costs base + sequence * N + kv_token * K + token * u + attention * u * (u/2 + cached): one joint model, so that
mixed steps teach all of it. Fitted by least squares of relative errors that forgets exponentially, stays non-negative
and leans on a prior (a calibration or a saved profile) where nothing was seen. The step loop of rank 0 feeds it a tuple
a step; everything else is done many steps at a time. Never reads a clock.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, Protocol

import msgspec
import numpy as np
import numpy.typing as npt

from engine.api import Costs, HandoffCost, Spread, StepCosts
from engine.plan import StepPlan

Floats = npt.NDArray[np.float64]

MEMORY = 400  # observations of one kind after which an older one counts e times less
PRIOR_WEIGHT = (
    0.02  # of one coefficient being off by its own size, against one observation off by its own size
)
HUBER = 3.0  # typical errors beyond which an observation counts linearly
WINDOW = 256  # errors of one kind from which quantiles are taken
FOLD = 64  # observations that are folded in together
NOTICEABLE = 0.03  # change of a prediction that is worth telling
PEERS = 4096  # hand-off fits that are kept

Features = tuple[float, float, float, float, float]


def features(plan: StepPlan) -> Features:
    """1, N, K, u and u * (u/2 + cached) of a step. A row of one token counts as a decode, whatever it is."""
    sequences = kv_tokens = tokens = 0
    attention = 0.0
    for row in plan.rows:
        count = len(row.tokens)
        if count == 1:
            sequences += 1
            kv_tokens += row.start
        else:
            tokens += count
            attention += count * (count / 2 + row.start)
    return 1.0, sequences, kv_tokens, tokens, attention


class Window:
    """The latest `WINDOW` ratios of measured to predicted, and their quantiles."""

    def __init__(self, spread: Spread) -> None:
        self._ratios: Floats = np.ones(WINDOW)
        self.seen = 0
        self._prior = spread

    def add(self, ratios: Floats) -> None:
        ratios = ratios[-WINDOW:]
        at = (self.seen + np.arange(len(ratios))) % WINDOW
        self._ratios[at] = ratios
        self.seen += len(ratios)

    @property
    def spread(self) -> Spread:
        """Mixed with the prior's while there are few."""
        if not self.seen:
            return self._prior
        known = self._ratios[: min(self.seen, WINDOW)]
        trust = min(1.0, len(known) / 32)
        found = np.quantile(known, (0.5, 0.9, 0.99))
        prior = (self._prior.p50, self._prior.p90, self._prior.p99)
        return Spread(
            *(float(trust * new + (1 - trust) * old) for new, old in zip(found, prior, strict=True))
        )

    @property
    def typical(self) -> float:
        """The usual relative error; large while too little is known to call anything an outlier."""
        if self.seen < 16:
            return np.inf
        known = self._ratios[: min(self.seen, WINDOW)]
        return max(0.02, float(np.median(np.abs(np.log(known)))))


class Fit:
    """Non-negative coefficients [n] of `seconds ~ features . coefficients`, by kinds of observations.

    Each kind forgets only when more of its own comes: an hour of decodes does not wash out what prefills taught.
    """

    def __init__(self, prior: Sequence[float], spreads: Sequence[Spread] = (Spread(),)) -> None:
        self.prior: Floats = np.maximum(np.asarray(prior, dtype=np.float64), 1e-15)
        self.coefficients: Floats = self.prior.copy()
        self.windows = [Window(spread) for spread in spreads]
        size = len(self.prior)
        self._grams: Floats = np.zeros((len(spreads), size, size))
        self._moments: Floats = np.zeros((len(spreads), size))

    def add(self, features: Floats, seconds: Floats, kind: int = 0) -> None:
        """Observations of one kind in their order: features [m, n], seconds [m] above 0."""
        window = self.windows[kind]
        predicted = np.maximum(features @ self.coefficients, 1e-9)
        # Divided by the geometric mean of both: a prior that is off by 100 times either way is left as quickly.
        error = np.abs(seconds - predicted) / np.sqrt(seconds * predicted)
        weight = 1 / (seconds * predicted)
        weight *= np.minimum(1.0, HUBER * window.typical / np.maximum(error, 1e-9))
        count = len(seconds)
        keep = np.exp(-1 / MEMORY)
        weight *= keep ** np.arange(count - 1, -1, -1)
        weighted = features * weight[:, None]
        self._grams[kind] = self._grams[kind] * keep**count + weighted.T @ features
        self._moments[kind] = self._moments[kind] * keep**count + weighted.T @ seconds
        window.add(seconds / predicted)
        self._solve()

    def _solve(self) -> None:
        precision = PRIOR_WEIGHT / np.maximum(self.prior, self.coefficients) ** 2
        gram = self._grams.sum(axis=0) + np.diag(precision)
        moment = self._moments.sum(axis=0) + precision * self.prior
        self.coefficients = non_negative(gram, moment)


def non_negative(gram: Floats, moment: Floats) -> Floats:
    """Least squares with all coefficients at least 0: `gram` [n, n] positive definite, n small.

    Tries which coefficients are 0 and takes the set whose solution fulfils the conditions of Kuhn and Tucker; there is
    exactly one (Lawson and Hanson, Solving Least Squares Problems, chapter 23).
    """
    scale = 1 / np.sqrt(np.diag(gram))
    gram, moment = gram * scale * scale[:, None], moment * scale
    count = len(moment)
    for zeros in range(count + 1):
        for absent in itertools.combinations(range(count), zeros):
            present = [at for at in range(count) if at not in absent]
            found = np.zeros(count)
            found[present] = np.linalg.solve(gram[np.ix_(present, present)], moment[present])
            if (found >= 0).all() and (gram[list(absent)] @ found >= moment[list(absent)] - 1e-9).all():
                return found * scale
    raise AssertionError("a positive definite problem has a solution")


class StepModel:
    """Learns `Costs` from steps. `observe` is on the step loop's path and only appends."""

    def __init__(self, prior: Costs | None = None) -> None:
        prior = prior or Costs()
        self._fit = Fit(msgspec.structs.astuple(prior.step), (prior.decode, prior.prefill))
        self._pending: tuple[list[tuple[Features, float]], ...] = ([], [])
        self._handoffs = {
            cost.peer: Fit((cost.latency_s, cost.byte_s), (cost.spread,)) for cost in prior.handoffs
        }
        self._seen = prior.seen
        self.prompt_s = 0.0  # seconds of all steps with prompt tokens
        self._handoffs_changed = False
        self._told = self._now(prior.seen)

    # ---- what was measured -------------------------------------------------------------------------------------

    def observe(self, plan: StepPlan, seconds: float) -> None:
        """A step took so long."""
        found = features(plan)
        if found[3] > 0:
            self.prompt_s += seconds
        pending = self._pending[found[3] > 0]
        pending.append((found, seconds))
        if len(pending) >= FOLD:
            self._fold()

    def _fold(self) -> None:
        for kind, pending in enumerate(self._pending):
            if pending:
                seconds = np.array([max(second, 1e-7) for _, second in pending])
                self._fit.add(np.array([found for found, _ in pending]), seconds, kind)
                self._seen += len(pending)
                pending.clear()

    def handed_off(self, peer: str, size_bytes: int, exposed_s: float) -> None:
        """A hand-off from `peer` (a worker_id) took so much longer than its queue and compute there."""
        fit = self._handoffs.get(peer)
        if fit is None:
            if len(self._handoffs) >= PEERS:
                return
            plain = HandoffCost(peer)
            fit = self._handoffs[peer] = Fit((plain.latency_s, plain.byte_s))
        fit.add(np.array([[1.0, float(size_bytes)]]), np.array([max(exposed_s, 1e-4)]))
        self._handoffs_changed = True

    # ---- what follows from it ----------------------------------------------------------------------------------

    @property
    def step(self) -> StepCosts:
        """As of the latest observation."""
        self._fold()
        return StepCosts(*self._fit.coefficients.tolist())

    def _now(self, seen: int) -> Costs:
        decode, prefill = (window.spread for window in self._fit.windows)
        handoffs = [
            HandoffCost(
                peer,
                float(fit.coefficients[0]),
                float(fit.coefficients[1]),
                fit.windows[0].spread,
                fit.windows[0].seen,
            )
            for peer, fit in self._handoffs.items()
        ]
        return Costs(StepCosts(*self._fit.coefficients.tolist()), decode, prefill, handoffs, seen)

    @property
    def costs(self) -> Costs:
        """The very object of last time, unless something has changed noticeably."""
        had = self._seen
        self._fold()
        if self._seen != had or self._handoffs_changed:
            self._handoffs_changed = False
            now = self._now(self._seen)
            if bool(now.seen) != bool(self._told.seen) or _differ(now, self._told):
                self._told = now
        return self._told


# Steps whose prediction must be about the same for coefficients to count as unchanged: N, K, u, u * (u/2 + cached).
_PROBES: Floats = np.array(
    [
        [1, 1, 100, 0, 0],
        [1, 32, 16e3, 0, 0],
        [1, 256, 256e3, 0, 0],
        [1, 0, 0, 64, 2e3],
        [1, 8, 4e3, 2048, 2e6],
    ]
)


def _differ(now: Costs, told: Costs) -> bool:
    one, other = (_PROBES @ np.array(msgspec.structs.astuple(costs.step)) for costs in (now, told))
    if (np.abs(one - other) > NOTICEABLE * other).any() or len(now.handoffs) != len(told.handoffs):
        return True
    spreads = [(now.decode, told.decode), (now.prefill, told.prefill)]
    for new, old in zip(now.handoffs, told.handoffs, strict=True):
        spreads.append((new.spread, old.spread))
        for size in (0, 1 << 20, 1 << 26):
            was = old.latency_s + size * old.byte_s
            if abs(new.latency_s + size * new.byte_s - was) > NOTICEABLE * was:
                return True
    return any(
        abs(a - b) > 3 * NOTICEABLE * b
        for new, old in spreads
        for a, b in zip(msgspec.structs.astuple(new), msgspec.structs.astuple(old), strict=True)
    )


class Coefficients(Protocol):
    """`StepCosts`, or arrays of the same over many workers."""

    @property
    def base_s(self) -> Any: ...
    @property
    def sequence_s(self) -> Any: ...
    @property
    def kv_token_s(self) -> Any: ...
    @property
    def token_s(self) -> Any: ...
    @property
    def attention_s(self) -> Any: ...


def decode_step_s(costs: Coefficients, sequences: Any, kv_tokens: Any) -> Any:
    """A step that only decodes; numbers, or arrays that broadcast."""
    return costs.base_s + costs.sequence_s * sequences + costs.kv_token_s * kv_tokens


def prompts_s(
    costs: Coefficients, sequences: Any, kv_tokens: Any, tokens: Any, attention: Any, room: Any
) -> Any:
    """Until `tokens` prompt tokens are computed, `room` in each step, beside so many decodes; as `decode_step_s`."""
    steps = -(-tokens // room)
    return (
        steps * decode_step_s(costs, sequences, kv_tokens)
        + costs.token_s * tokens
        + costs.attention_s * attention
    )


def prompt_attention(uncached: Any, cached: Any) -> Any:
    """The quadratic feature of a prompt's rest; the sum over its chunks is the same, however it is cut."""
    return uncached * (uncached / 2 + cached)
