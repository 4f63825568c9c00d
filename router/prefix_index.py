"""Which worker has how much of a prompt cached: one index over the prefix caches of all workers. Pure.

`router.dispatch` feeds it KV events and snapshots and asks it for every request. What it says is a guess: events are a
few milliseconds old, hints may collide, the oldest entries are dropped beyond `limit`. A decode worker looks at its own
cache before it acts, so a wrong guess costs time and never a token. All of it can be rebuilt from snapshots.

    entries:  hint of a block -> bit mask of the workers that have it
    expected: hint -> prompts on their way to a worker, whose blocks from there on it will have soon
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence

import numpy as np

from router.prompt_hints import HintChain, PromptHints
from router.view import Ints

# From the first token of a request until the events that name its blocks must have come.
SETTLE_S = 0.5
# What was placed and never ended is forgotten after so long.
FORGET_S = 60.0


class Expected:
    """A prompt that was placed on a worker, whose blocks from `start` on that worker does not have yet."""

    __slots__ = ("chain", "expires", "hint", "worker")

    def __init__(self, worker: _Worker, chain: HintChain, hint: int, expires: float) -> None:
        self.worker = worker
        self.chain: HintChain | None = chain  # None: it is over
        self.hint = hint
        self.expires = expires


class _Worker:
    """One incarnation. `bit` is its place in the masks, 0 when it is gone."""

    __slots__ = (
        "bit",
        "block_size",
        "hints",
        "incarnation",
        "piece",
        "seq",
        "slot",
        "snapshot_seq",
        "synced",
        "wire_dtype",
    )

    def __init__(self, incarnation: str, slot: int) -> None:
        self.incarnation = incarnation
        self.slot = slot
        self.bit = 1 << slot
        self.block_size = 0  # not known yet
        self.wire_dtype = ""  # with which its names are salted
        self.hints: set[int] = set()
        self.synced = False
        self.seq = 0  # when synced: of the last batch that its hints reflect
        self.snapshot_seq = 0  # of the snapshot that is being read
        self.piece = 0  # of it that comes next; 0: none is being read


class PrefixIndex:
    """The index of one router. `limit`: entries (a block at a worker) that it keeps at most."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.entries = 0
        self.gaps = 0  # batches or pieces of snapshots that were missed
        self.resyncs = 0  # snapshots that were read to their end
        self.dropped = 0  # entries given up for `limit`
        self.lookups = 0
        self.hits = 0  # lookups that found a block at any worker
        self.touched_above = limit // 2  # below, the order of use does not matter yet and is not kept
        self._masks: OrderedDict[int, int] = OrderedDict()  # least recently used first
        self._workers: dict[str, _Worker] = {}
        self._slots: list[_Worker | None] = []
        self._place: Ints = np.zeros(0, dtype=np.int64)  # by slot: position among all workers, decode first
        self._decode_count = 0
        # Block size and wire dtype, which name the blocks -> mask of the workers that have these.
        self._by_naming: dict[tuple[int, str], int] = {}
        self._expected: dict[int, list[Expected]] = {}
        self._placed: deque[tuple[float, Expected]] = deque()  # by the time when each is forgotten
        self._settling: deque[tuple[float, Expected]] = deque()

    # ---- who is there ------------------------------------------------------------------------------------------

    def set_workers(self, decode: Iterable[tuple[str, str]], prefill: Iterable[tuple[str, str]]) -> None:
        """The workers that exist now, (id, incarnation), in the order of the pools. A new incarnation has nothing."""
        decode, everyone = list(decode), [*decode, *prefill]
        wanted = dict(everyone)
        for worker_id, worker in list(self._workers.items()):
            if wanted.get(worker_id) != worker.incarnation:
                self._remove(worker_id)
        for worker_id, incarnation in everyone:
            if worker_id not in self._workers:
                self._add(worker_id, incarnation)
        self._decode_count = len(decode)
        self._place = np.full(len(self._slots), -1, dtype=np.int64)
        for position, (worker_id, _) in enumerate(everyone):
            self._place[self._workers[worker_id].slot] = position

    def _add(self, worker_id: str, incarnation: str) -> None:
        slot = next((at for at, taken in enumerate(self._slots) if taken is None), len(self._slots))
        worker = self._workers[worker_id] = _Worker(incarnation, slot)
        self._slots[slot : slot + 1] = [worker]

    def _remove(self, worker_id: str) -> None:
        worker = self._workers.pop(worker_id)
        self._empty(worker)
        self._set_naming(worker, 0, "")
        self._slots[worker.slot] = None
        worker.bit = 0

    def _set_naming(self, worker: _Worker, block_size: int, wire_dtype: str) -> None:
        before, after = (worker.block_size, worker.wire_dtype), (block_size, wire_dtype)
        if before != after:
            self._by_naming[before] = self._by_naming.get(before, 0) & ~worker.bit
            self._by_naming[after] = self._by_naming.get(after, 0) | worker.bit
            self._by_naming = {naming: mask for naming, mask in self._by_naming.items() if naming[0] and mask}
            worker.block_size, worker.wire_dtype = after

    # ---- what workers say --------------------------------------------------------------------------------------

    def snapshot(
        self,
        worker_id: str,
        incarnation: str,
        seq: int,
        block_size: int,
        piece: int,
        pieces: int,
        hints: Sequence[int],
        wire_dtype: str = "",
    ) -> None:
        """One piece of all that a worker had after batch `seq`; `wire_dtype` salts its names."""
        worker = self._workers.get(worker_id)
        if worker is None or worker.incarnation != incarnation:
            return
        if worker.synced and seq <= worker.seq:
            return  # late, or again
        if piece == 0:
            self._empty(worker)
            self._set_naming(worker, block_size, wire_dtype)
            worker.synced, worker.snapshot_seq, worker.piece = False, seq, 0
        elif worker.piece and seq == worker.snapshot_seq and piece < worker.piece:
            return  # again
        elif not worker.piece or seq != worker.snapshot_seq or piece != worker.piece:
            worker.piece = 0  # one was missed; the rest is of no use
            self.gaps += 1
            return
        self._gain(worker, hints)
        worker.piece += 1
        if worker.piece == pieces:
            worker.piece, worker.seq, worker.synced = 0, seq, True
            self.resyncs += 1

    def events(
        self,
        worker_id: str,
        incarnation: str,
        seq: int,
        added: Sequence[int],
        evicted: Sequence[int],
        cleared: bool,
    ) -> None:
        """One batch of what a worker's cache gained and lost."""
        worker = self._workers.get(worker_id)
        if worker is None or worker.incarnation != incarnation or not worker.synced:
            return  # of another life, or the snapshot that was asked for will have it
        if seq <= worker.seq:
            return  # again
        if seq > worker.seq + 1:
            worker.synced = False  # what it had is still the best guess until a snapshot comes
            self.gaps += 1
            return
        worker.seq = seq
        if cleared:
            self._empty(worker)
        self._lose(worker, evicted)
        self._gain(worker, added)

    def synced(self, worker_id: str) -> bool:
        """The worker's snapshot has come, and no batch since then was missed. Else it is to be asked for one."""
        worker = self._workers.get(worker_id)
        return worker is not None and worker.synced

    def _gain(self, worker: _Worker, hints: Sequence[int]) -> None:
        masks, own, bit = self._masks, worker.hints, worker.bit
        # The head of a prefix last: it is to be dropped after what is built on it.
        for hint in reversed(hints):
            if hint not in own:
                own.add(hint)
                mask = masks.get(hint)
                masks[hint] = bit if mask is None else mask | bit
                self.entries += 1
                if self.entries > self.limit:
                    self._drop_oldest()

    def _lose(self, worker: _Worker, hints: Iterable[int]) -> None:
        masks, own, bit = self._masks, worker.hints, worker.bit
        for hint in hints:
            if hint in own:
                own.remove(hint)
                mask = masks[hint] ^ bit
                if mask:
                    masks[hint] = mask
                else:
                    del masks[hint]
                self.entries -= 1

    def _empty(self, worker: _Worker) -> None:
        self._lose(worker, list(worker.hints))

    def _drop_oldest(self) -> None:
        hint, mask = self._masks.popitem(last=False)
        for slot in _bits(mask):
            worker = self._slots[slot]
            assert worker is not None
            worker.hints.remove(hint)
        self.entries -= mask.bit_count()
        self.dropped += mask.bit_count()

    # ---- what is on its way ------------------------------------------------------------------------------------

    def expect(self, prompt: PromptHints, worker_id: str, cached_tokens: int, now: float) -> Expected | None:
        """The prompt was placed on a worker which has `cached_tokens` of it, as `match` said: it will have the rest.

        None when there is nothing more to expect. To be ended by `settle` or `forget`.
        """
        self._sweep(now)
        worker = self._workers.get(worker_id)
        if worker is None or not worker.block_size:
            return None
        chain = prompt.chain(worker.block_size, worker.wire_dtype)
        start = cached_tokens // worker.block_size
        if start >= chain.blocks:
            return None
        expected = Expected(worker, chain, chain[start], now + FORGET_S)
        self._expected.setdefault(expected.hint, []).append(expected)
        self._placed.append((expected.expires, expected))
        return expected

    def settle(self, expected: Expected, now: float) -> None:
        """The request has its first token: the worker has said what it has, or will in a moment."""
        expected.expires = now + SETTLE_S
        self._settling.append((expected.expires, expected))

    def forget(self, expected: Expected) -> None:
        """The request came to nothing."""
        if expected.chain is None:
            return
        expected.chain = None
        waiting = self._expected[expected.hint]
        waiting.remove(expected)
        if not waiting:
            del self._expected[expected.hint]

    def _sweep(self, now: float) -> None:
        for queue in (self._placed, self._settling):
            while queue and queue[0][0] <= now:
                self.forget(queue.popleft()[1])

    # ---- the question ------------------------------------------------------------------------------------------

    def match(self, prompt: PromptHints, now: float) -> tuple[Ints, Ints]:
        """Leading tokens of the prompt that each worker has or will have soon, whole blocks: int64 arrays
        [decode workers] and [prefill workers] in the pools' order. Costs what matches, not what exists.
        """
        self.lookups += 1
        found = np.zeros(len(self._workers), dtype=np.int64)
        for naming, members in self._by_naming.items():
            self._walk(prompt.chain(*naming), members, now, found)
        self.hits += bool(found.any())
        return found[: self._decode_count], found[self._decode_count :]

    def _walk(self, chain: HintChain, members: int, now: float, found: Ints) -> None:
        masks, expected, known = self._masks, self._expected, chain.known
        alive, soon, soon_until, at = members, 0, 0, 0
        ends: dict[int, int] = {}  # bit of a worker -> first block that it cannot be expected to have
        for at in range(chain.blocks):
            hint = known[at] if at < len(known) else chain[at]
            if at == soon_until and ends:
                ends = {bit: end for bit, end in ends.items() if end > at}
                soon = sum(ends)
                soon_until = min(ends.values(), default=0)
            if expected and hint in expected:
                for one in expected[hint]:
                    if one.chain is not None and one.expires > now and alive & one.worker.bit:
                        end = chain.common_end(one.chain, at)
                        ends[one.worker.bit] = max(end, at + 1, ends.get(one.worker.bit, 0))
                soon = sum(ends)
                soon_until = min(ends.values(), default=0)
            left = alive & (masks.get(hint, 0) | soon)
            if left != alive:
                if at:
                    self._write(found, alive ^ left, at * chain.block_size)
                alive = left
                if not alive:
                    break
        else:
            at = chain.blocks
            self._write(found, alive, at * chain.block_size)
        if self.entries > self.touched_above:
            for hint in reversed(known[:at]):
                if hint in masks:
                    masks.move_to_end(hint)

    def _write(self, found: Ints, mask: int, tokens: int) -> None:
        if mask.bit_count() <= 8:
            for slot in _bits(mask):
                found[self._place[slot]] = tokens
        else:
            packed = np.frombuffer(mask.to_bytes(-(-len(self._slots) // 8), "little"), dtype=np.uint8)
            slots = np.flatnonzero(np.unpackbits(packed, bitorder="little"))
            found[self._place[slots]] = tokens


def _bits(mask: int) -> Iterable[int]:
    while mask:
        low = mask & -mask
        yield low.bit_length() - 1
        mask ^= low
