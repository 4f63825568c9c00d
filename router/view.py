"""The cluster as a policy sees it: numbers of every worker as arrays, versioned, changed in place, never copied. Pure.

What a worker reported is old by the time it is read. So the router books each placement at once: as a request until it
is over, and as tokens until a report comes that was made later. Stale reports cause no herd.

    PoolBook._numbers  float64 [columns, workers], one row for each field of `Pool`      one copy records all of it
    ClusterView._pairs float64 [2, decode, prefill], what hand-offs cost
    PoolBook.below     float64 [workers, bins + 1], running requests whose ITL target is in a lower bin
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

import msgspec
import numpy as np
import numpy.typing as npt

from engine.api import HandoffCost, Spread, StepCosts
from engine.costs import decode_step_s

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

SETTLE_S = 0.02  # between a router's placement and the moment from which the worker's reports count it
# Lower edges of the bins of ITL targets, in seconds: 1 ms to 3.4 s, a fifth apart. A target counts as its bin's edge.
TARGET_BINS: tuple[float, ...] = tuple(1e-3 * 2 ** (step / 4) for step in range(48))
UNLIMITED = 1e9  # of something that a worker has not told


@dataclass(frozen=True, slots=True)
class Pool:
    """The workers of one role, read-only arrays over them, shape [workers]; in the terms of `engine.api.Queue`,
    `StepCosts` and `Spread` where no other is said.

    usable: alive, reachable and not draining. reported: requests (decode) or hand-offs (prefill) it said it has.
    placed: those this router has placed and not seen the end of (prefill: the first token of). new_*: of those, what
    no report can have counted yet. `below` [workers, bins + 1]: running requests whose ITL target is in a lower bin.
    """

    ids: tuple[str, ...]
    usable: Bools
    below: Floats
    numbers: Floats  # [columns, workers]: all that follows
    reported: Floats
    placed: Floats
    running: Floats
    waiting: Floats
    handoffs: Floats
    waiting_tokens: Floats
    kv_tokens: Floats
    prompt_tokens: Floats
    attention: Floats
    room: Floats
    max_running: Floats
    step_tokens: Floats
    capacity_tokens: Floats
    available_tokens: Floats
    token_bytes: Floats
    busy: Floats
    new_requests: Floats
    new_tokens: Floats
    new_attention: Floats
    new_kv_tokens: Floats
    base_s: Floats
    sequence_s: Floats
    kv_token_s: Floats
    token_s: Floats
    attention_s: Floats
    decode_p50: Floats
    decode_p90: Floats
    decode_p99: Floats
    prefill_p50: Floats
    prefill_p90: Floats
    prefill_p99: Floats
    # What follows from the above, kept up with every change so that no decision computes it anew.
    sequences: Floats  # that decode, or will
    others: Floats  # of them, those whose next token a prompt would delay
    queue_tokens: Floats  # prompt tokens that come first
    queue_s: Floats  # they take, beside the base of their steps
    step_s: Floats  # of a step with all sequences and one more
    begun_s: Floats  # half of the step under way
    step_room: Floats  # prompt tokens in a step
    crowd: Floats  # sequences too many, as a share of those that may run
    price: Floats  # of a second of it, in seconds of those who come later (prefill workers)
    open: Floats  # 1 where it is not full

    @property
    def load(self) -> Floats:
        """Work at each worker, shape [workers]."""
        return np.maximum(self.reported, self.placed)

    @property
    def candidates(self) -> Bools:
        """Usable, and not full as far as is known."""
        found: Bools = self.usable & (self.open > 0)
        return found


MAX_PRICE = 20.0  # of a second on the busiest worker, in seconds of others
COLUMNS = tuple(field.name for field in fields(Pool))[4:]
_AT = {name: at for at, name in enumerate(COLUMNS)}
_UNKNOWN = {
    "room": UNLIMITED,
    "max_running": 256.0,
    "step_tokens": 512.0,
    "capacity_tokens": UNLIMITED,
    "available_tokens": UNLIMITED,
    "step_room": 512.0,
    "open": 1.0,
    **msgspec.structs.asdict(StepCosts()),
    **{
        f"{kind}_{name}": value
        for kind in ("decode", "prefill")
        for name, value in msgspec.structs.asdict(Spread()).items()
    },
}
_LIMITS = ("max_running", "step_tokens", "capacity_tokens")  # 0 means that they were not told
_BLANK: Floats = np.array([_UNKNOWN.get(name, 0.0) for name in COLUMNS])


@dataclass(frozen=True, slots=True)
class View:
    """What a policy decides on. `pairs` [2, decode, prefill]: latency_s and byte_s of hand-offs, the mean of all
    where none was seen. `local_spread`, `remote_spread`, `step_spread`:
    (p50, p90, p99) of measured over predicted TTFT, and of decode steps. `decided`: decisions of this router so far;
    `last_remote`: what the latest was."""

    version: int
    decode: Pool
    prefill: Pool
    pairs: Floats
    local_spread: tuple[float, float, float] = (1.0, 1.5, 2.5)
    remote_spread: tuple[float, float, float] = (1.0, 1.5, 2.5)
    step_spread: tuple[float, float, float] = (1.0, 1.5, 2.5)
    decided: int = 0
    last_remote: bool = False


class PoolBook:
    """The writable side of a `Pool`. Adding or removing a worker rebuilds it; everything else is a few array writes."""

    def __init__(self, role: Literal["decode", "prefill"]) -> None:
        self._decodes = role == "decode"
        self._index: dict[str, int] = {}
        self._alive: set[str] = set()
        self._draining: set[str] = set()
        self._unreported: dict[str, deque[tuple[float, float, float, float]]] = {}
        self._resize([])
        self.pool = self._publish()

    def _resize(self, ids: list[str]) -> None:
        self._usable: Bools = np.zeros(len(ids), dtype=bool)
        self._numbers: Floats = np.repeat(_BLANK[:, None], len(ids), axis=1)
        self._below: Floats = np.zeros((len(ids), len(TARGET_BINS) + 1))

    def set_workers(self, ids: list[str]) -> None:
        """The workers that exist now; those that stay keep their numbers."""
        before, numbers, below = self._index, self._numbers, self._below
        self._index = {worker_id: at for at, worker_id in enumerate(ids)}
        self._resize(ids)
        now = [at for worker_id, at in self._index.items() if worker_id in before]
        then = [before[worker_id] for worker_id in self._index if worker_id in before]
        self._numbers[:, now] = numbers[:, then]
        self._below[now] = below[then]
        self._alive &= self._index.keys()
        self._draining &= self._index.keys()
        self._unreported = {one: self._unreported.get(one, deque()) for one in ids}
        for worker_id in ids:
            self._refresh(worker_id)
        self.pool = self._publish()

    def at(self, worker_id: str) -> int:
        """The worker's place in the pool's arrays; KeyError when there is no such worker."""
        return self._index[worker_id]

    # ---- what workers say --------------------------------------------------------------------------------------

    def set_usable(self, worker_id: str, usable: bool) -> None:
        """Whether it can be reached."""
        if worker_id in self._index:
            (self._alive.add if usable else self._alive.discard)(worker_id)
            if not usable:
                self._settle(worker_id, np.inf)
            self._refresh(worker_id)

    def set_draining(self, worker_id: str, draining: bool) -> None:
        """A draining worker finishes what it has and is given nothing new."""
        if worker_id in self._index:
            (self._draining.add if draining else self._draining.discard)(worker_id)
            self._refresh(worker_id)

    def _refresh(self, worker_id: str) -> None:
        usable = worker_id in self._alive and worker_id not in self._draining
        self._usable[self._index[worker_id]] = usable

    def report(self, worker_id: str, work: float) -> None:
        if worker_id in self._index:
            self._numbers[0, self._index[worker_id]] = work

    def tell(self, worker_id: str, numbers: Mapping[str, float]) -> None:
        """Enters what a worker said of itself, by the names of `Pool`."""
        if worker_id in self._index:
            rows = [_AT[name] for name in numbers]
            at = self._index[worker_id]
            self._numbers[rows, at] = [
                number if number > 0 or name not in _LIMITS else _UNKNOWN[name]
                for name, number in numbers.items()
            ]
            if self._numbers[_AT["capacity_tokens"], at] == UNLIMITED:
                self._numbers[_AT["available_tokens"], at] = UNLIMITED
            self._derive(at)

    def reported_at(self, worker_id: str, when: float) -> None:
        """A report came that knows of all that reached the worker before `when`."""
        if worker_id in self._index:
            self._settle(worker_id, when - SETTLE_S)

    # ---- what this router does ---------------------------------------------------------------------------------

    def place(self, worker_id: str, change: Literal[1, -1]) -> None:
        """Books a placement, or its end. A worker that is gone has no books."""
        if worker_id in self._index:
            at = self._index[worker_id]
            self._numbers[1, at] = max(0, self._numbers[1, at] + change)

    def expect(self, worker_id: str, now: float, tokens: float, attention: float, kv_tokens: float) -> None:
        """Work that was just sent to the worker: it counts here until a later report counts it."""
        if worker_id in self._index:
            self._unreported[worker_id].append((now, tokens, attention, kv_tokens))
            at = self._index[worker_id]
            self._numbers[_NEW, at] += (1, tokens, attention, kv_tokens)
            self._derive(at)

    def _settle(self, worker_id: str, before: float) -> None:
        entries = self._unreported[worker_id]
        if not entries or entries[0][0] > before:
            return
        while entries and entries[0][0] <= before:
            entries.popleft()
        sums = np.array([one[1:] for one in entries]).reshape(-1, 3).sum(axis=0)
        at = self._index[worker_id]
        self._numbers[_NEW, at] = (len(entries), *sums)
        self._derive(at)

    def _derive(self, at: int) -> None:
        """The columns that follow from others, for one worker."""
        one: Any = Pool((), *_NO_ARRAYS, *self._numbers[:, at].tolist())  # numbers in the place of arrays
        others = one.running + one.handoffs + one.new_requests
        sequences = others + one.waiting if self._decodes else 0.0
        queue = one.waiting_tokens + one.prompt_tokens + one.new_tokens
        kv_tokens = one.kv_tokens + queue + one.new_kv_tokens if self._decodes else 0.0
        step_s = float(decode_step_s(one, sequences + self._decodes, kv_tokens))
        room = max(1.0, one.step_tokens - sequences)
        under_way = min(room, one.prompt_tokens)
        busy = min(one.busy, MAX_PRICE / (1 + MAX_PRICE))
        self._numbers[_DERIVED, at] = (
            sequences,
            others,
            queue,
            one.token_s * queue + one.attention_s * (one.attention + one.new_attention),
            step_s,
            0.5 * (step_s * (self._decodes or under_way > 0) + one.token_s * under_way),
            room,
            max(0.0, sequences + 1 - one.max_running) / one.max_running,
            busy / (1 - busy),
            one.room > one.new_requests,
        )

    def count_target(self, worker_id: str, itl_s: float, change: Literal[1, -1]) -> None:
        """A request with this ITL target began to decode there, or has ended, or has missed it already."""
        if worker_id in self._index:
            self._below[self._index[worker_id], bisect_right(TARGET_BINS, itl_s) or 1 :] += change

    def _publish(self) -> Pool:
        usable, below, numbers = self._usable.view(), self._below.view(), self._numbers.view()
        for array in (usable, below, numbers):
            array.flags.writeable = False
        return pool_of(tuple(self._index), usable, below, numbers)


_DERIVED = slice(_AT["sequences"], len(COLUMNS))
_NO_ARRAYS: tuple[Any, ...] = (None, None, None)
_NEW = slice(_AT["new_requests"], _AT["new_kv_tokens"] + 1)


def pool_of(ids: tuple[str, ...], usable: Bools, below: Floats, numbers: Floats) -> Pool:
    """A pool over these arrays; `numbers` [columns, workers] in the order of `COLUMNS`."""
    return Pool(ids, usable, below, numbers, *numbers)


class ClusterView:
    """What one router knows of all workers."""

    def __init__(self) -> None:
        self.decode = PoolBook("decode")
        self.prefill = PoolBook("prefill")
        self.version = 0
        self.decided = 0
        self.last_remote = False
        self.local_spread: tuple[float, float, float] | None = (
            None  # learned; None: what workers say of steps
        )
        self.remote_spread: tuple[float, float, float] | None = None
        self._step_spread = self._prompt_spread = (1.0, 1.5, 2.5)
        self._seen_pairs: Floats = np.full((2, 0, 0), np.nan)
        self._pairs: Floats = self._seen_pairs  # with a guess in the place of NaN

    @property
    def view(self) -> View:
        """The view as of now; its arrays follow later changes."""
        return View(
            self.version,
            self.decode.pool,
            self.prefill.pool,
            self._pairs,
            self.local_spread or self._prompt_spread,
            self.remote_spread or self._prompt_spread,
            self._step_spread,
            self.decided,
            self.last_remote,
        )

    def set_workers(self, decode: list[str], prefill: list[str]) -> None:
        self.version += 1
        were = (self.decode.pool.ids, self.prefill.pool.ids)
        self.decode.set_workers(decode)
        self.prefill.set_workers(prefill)
        if were == (tuple(decode), tuple(prefill)):
            return
        pairs = np.full((2, len(decode), len(prefill)), np.nan)
        (old_at, new_at), (old_to, new_to) = _moved(were[0], decode), _moved(were[1], prefill)
        pairs[np.ix_(range(2), new_at, new_to)] = self._seen_pairs[np.ix_(range(2), old_at, old_to)]
        self._seen_pairs = pairs
        self._fill()

    def told_handoffs(self, decode_worker: str, costs: Iterable[HandoffCost]) -> None:
        """What hand-offs to this decode worker have cost."""
        try:
            at = self.decode.at(decode_worker)
        except KeyError:
            return
        for cost in costs:
            if cost.peer in self.prefill._index:
                self._seen_pairs[:, at, self.prefill.at(cost.peer)] = (cost.latency_s, cost.byte_s)
        self._fill()

    def _fill(self) -> None:
        unseen = np.isnan(self._seen_pairs)
        guess = np.array([HandoffCost("").latency_s, HandoffCost("").byte_s])
        if unseen.size and not unseen[0].all():
            guess = np.nanmean(self._seen_pairs, axis=(1, 2))
        self._pairs = np.where(unseen, guess[:, None, None], self._seen_pairs)
        self._pairs.flags.writeable = False

    def told_spreads(self) -> None:
        """Some worker's spreads have changed: the means over all."""
        pool = self.decode.pool
        if len(pool.ids):
            self._step_spread = _mean(pool.decode_p50, pool.decode_p90, pool.decode_p99)
            self._prompt_spread = _mean(pool.prefill_p50, pool.prefill_p90, pool.prefill_p99)


def _mean(*columns: Floats) -> tuple[float, float, float]:
    p50, p90, p99 = (float(column.mean()) for column in columns)
    return p50, p90, p99


def _moved(before: tuple[str, ...], now: list[str]) -> tuple[list[int], list[int]]:
    """Places before and now of those that stay."""
    places = {worker_id: at for at, worker_id in enumerate(before)}
    stay = [(places[worker_id], at) for at, worker_id in enumerate(now) if worker_id in places]
    return [old for old, _ in stay], [new for _, new in stay]
