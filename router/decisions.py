"""What was decided and what came of it: a record of each decision that can be repeated, in a ring of bounded size.

`router.dispatch` enters decisions, `router.server` how their requests ended; `router.explain` reads. A record holds
what the policy saw, copied: a copy of two arrays, a few microseconds. With a file, records are also given to
`router.decision_file`, which writes them from a thread of its own.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from hashlib import blake2b

import msgspec

from router.account import Account
from router.policy import Ask, Decision
from router.view import Pool, View, pool_of

RECORD_BYTES = 1024  # of a record beside its arrays, about


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """How the request went. `ttft_s` is seen by the router, from arrival; the rest by the decode worker."""

    outcome: str
    ttft_s: float = 0.0  # 0: there was no token
    e2e_s: float = 0.0
    generated_tokens: int = 0
    prefilled: str = ""  # empty: the worker did not tell
    cached_tokens: int = 0
    remote_tokens: int = 0
    queue_s: float = 0.0
    handoff_s: float = 0.0
    prefill_s: float = 0.0
    fallback: str = ""


@dataclass(slots=True)
class Record:
    """One decision. `now` is of the router's monotonic clock, `at` is Unix time."""

    ask: Ask
    view: View
    now: float
    at: float
    policy: str
    decision: Decision
    outcome: Outcome | None = None

    @property
    def request_id(self) -> str:
        return self.ask.request_id

    @property
    def size_bytes(self) -> int:
        """About; what several records share is not counted."""
        pools = (self.view.decode, self.view.prefill)
        arrays = sum(pool.numbers.nbytes + pool.below.nbytes for pool in pools)
        return RECORD_BYTES + arrays + self.ask.decode_cached.nbytes + self.ask.prefill_cached.nbytes

    @property
    def view_digest(self) -> str:
        """Names what the policy saw: 16 hex digits."""
        digest = blake2b(digest_size=8)
        for pool in (self.view.decode, self.view.prefill):
            digest.update("\0".join(pool.ids).encode())
            for array in (pool.usable, pool.below, pool.numbers):
                digest.update(array.tobytes())
        digest.update(self.view.pairs.tobytes())
        return digest.hexdigest()


def snapshot(view: View) -> View:
    """The view as it is now; what never changes in place is shared."""
    return replace(view, decode=_copied(view.decode), prefill=_copied(view.prefill))


def _copied(pool: Pool) -> Pool:
    return pool_of(pool.ids, pool.usable.copy(), pool.below.copy(), pool.numbers.copy())


@dataclass(slots=True)
class DecisionLog:
    """The latest decisions by request id, at most `max_bytes` of them. `write` is given each record when its request
    is over, or when it leaves the ring before that."""

    max_bytes: int
    write: Callable[[Record], None] | None = None
    _records: OrderedDict[str, Record] = field(default_factory=OrderedDict)
    _bytes: int = 0

    def __len__(self) -> int:
        return len(self._records)

    def decided(self, ask: Ask, view: View, now: float, at: float, policy: str, decision: Decision) -> None:
        """A decision was made on `view`, which must not have changed since."""
        if not self.max_bytes:
            return
        record = Record(ask, snapshot(view), now, at, policy, decision)
        self._forget(record.request_id)  # asked again under the same id
        self._records[record.request_id] = record
        self._bytes += record.size_bytes
        while self._bytes > self.max_bytes and len(self._records) > 1:
            self._forget(next(iter(self._records)))

    def _forget(self, request_id: str) -> None:
        record = self._records.pop(request_id, None)
        if record is not None:
            self._bytes -= record.size_bytes
            if record.outcome is None and self.write is not None:
                self.write(record)

    def ended(self, account: Account) -> None:
        """A request is over, whether it was decided on or refused before."""
        record = self._records.get(account.request_id)
        if record is None or record.decision is not account.decision:
            return
        record.outcome = outcome_of(account)
        if self.write is not None:
            self.write(record)

    def close(self) -> None:
        """Requests that are under way are written without an outcome."""
        while self._records:
            self._forget(next(iter(self._records)))

    def find(self, request_id: str) -> Record | None:
        return self._records.get(request_id)


def outcome_of(account: Account) -> Outcome:
    seen = account.first_token
    found = Outcome(
        outcome=account.outcome,
        ttft_s=0.0 if seen is None else seen - account.arrived,
        e2e_s=account.ended - account.arrived,
        generated_tokens=account.generated_tokens,
    )
    trace = account.trace
    if trace is None:
        return found
    return msgspec.structs.replace(
        found,
        prefilled=trace.prefilled,
        cached_tokens=trace.cached_tokens,
        remote_tokens=trace.remote_tokens,
        queue_s=trace.queue_s,
        handoff_s=trace.handoff_s,
        prefill_s=trace.prefill_s,
        fallback=trace.fallback,
    )
