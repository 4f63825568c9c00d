"""What the ranks of a tensor-parallel replica compute together: sums of partial results, and logits for rank 0.

Called by the decoder in every layer, by the same thread and in the same order on all ranks. `SharedMemory` serves the
CPU ranks of one host; for GPUs and for ranks of several hosts there is `engine.distributed`. Every wait has a bound: a
rank that is dead, stopped or stuck becomes `RankStuck` on the others. After any error the group is of no more use: its
worker is started again as a whole.

    memfd    | sizes | stage, aborted of rank 0 | .. of rank 1 | .. | why aborted | slots of parity 0 | of parity 1 |
    slots    | rank 0's | rank 1's | ..

Operation k uses the slots of parity k % 2: a rank writes its own, says so by its stage, waits for the others' and
reads theirs. Whoever has begun operation k - 1 has read all of k - 2, so a slot is free again without one more wait.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import platform
import time
from typing import Protocol

import torch

from engine.shards import Shard, shards

PIECE_BYTES = 1 << 20  # a larger tensor goes through in several operations

_MAGIC = 0x4241544F4E5450
_LINE = 16  # int64s that each rank has for itself: two cache lines, since CPUs fetch them in pairs
_WORDS_AT = _LINE * 8
_TEXT_BYTES = 256
_YIELD_S = 0.005  # so long the core is offered to others between looks, then they are this far apart
_NAP_S = 0.001
_SPLIT_BYTES = 32 << 10  # from here on more than two ranks sum a part each, instead of everything each
_LAYOUTS = 64  # cached views; the sizes of decode batches and chunks


class CollectiveError(RuntimeError):
    """The ranks cannot go on together; this worker must be started again."""


class RankStuck(CollectiveError):
    """Other ranks did not arrive in time; `ranks` are those, () where the transport cannot tell."""

    def __init__(self, text: str, ranks: tuple[int, ...]) -> None:
        super().__init__(text)
        self.ranks = ranks


class GroupAborted(CollectiveError):
    """A rank, or another thread of this one, has ended the group: the text says who and why."""


class Collective(Protocol):
    """One rank's end of the group. All ranks make the same calls in the same order with equal shapes and dtypes."""

    rank: int
    size: int

    def all_reduce(self, partial: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks, equal to the last bit on all of them. May be written into `partial`."""
        ...

    def gather_columns(self, local: torch.Tensor, columns: int) -> torch.Tensor | None:
        """local [rows, Shard(rank, size).part(columns)] of all ranks -> [rows, columns] on rank 0, None elsewhere."""
        ...

    def abort(self, reason: str) -> None:
        """From any thread: whoever waits here, or calls later, gets GroupAborted."""
        ...

    def close(self) -> None:
        """Gives back what the group holds; waits for nobody."""
        ...


class SharedMemory:
    """A group of processes on one host over a memfd, which `create` makes and each rank inherits.

    Sums are made in rank order, in fp32 when the type is smaller and there are more than two. Relies on stores becoming
    visible in order, which x86 guarantees and others do not: `usable()`.
    """

    def __init__(self, descriptor: int, rank: int, size: int, timeout_s: float) -> None:
        if not usable():
            raise CollectiveError(
                f"shared memory between ranks needs an x86-64 CPU, this is {platform.machine()}: use gloo"
            )
        self.rank, self.size = Shard(rank, size).rank, size
        self.timeout_s = timeout_s
        self._map = mmap.mmap(descriptor, 0)
        self._words = memoryview(self._map).cast("q")
        magic, made_for, self._piece_bytes = self._words[:3]
        if magic != _MAGIC or made_for != size:
            self.close()
            raise CollectiveError(
                f"descriptor {descriptor} is no group of {size} ranks (made for {made_for})"
            )
        self._others = [each for each in range(size) if each != rank]
        self._own_word, self._other_words = self._word(rank), [self._word(each) for each in self._others]
        self._stage = self._begun = self._operation = 0
        self._layouts: dict[tuple[torch.dtype, int], tuple[list[torch.Tensor], list[torch.Tensor]]] = {}
        self._aborted = ""

    @staticmethod
    def create(size: int, piece_bytes: int = PIECE_BYTES) -> int:
        """The descriptor of a new group of `size` ranks; the caller closes it when all ranks have it."""
        if piece_bytes < 64 or piece_bytes % 64:
            raise ValueError(f"piece_bytes={piece_bytes}: expected a multiple of 64")
        descriptor = os.memfd_create("baton-ranks", os.MFD_CLOEXEC)
        os.ftruncate(descriptor, _data_at(size) + 2 * size * piece_bytes)
        with mmap.mmap(descriptor, 0) as memory, memoryview(memory) as raw, raw.cast("q") as words:
            words[1], words[2] = size, piece_bytes
            words[0] = _MAGIC
        return descriptor

    def all_reduce(self, partial: torch.Tensor) -> torch.Tensor:
        if self.size == 1:
            return partial
        total = partial.contiguous()
        flat, count = total.view(-1), self._piece_bytes // total.element_size()
        for first in range(0, len(flat), count):
            self._sum(flat[first : first + count] if len(flat) > count else flat)
        return total

    def gather_columns(self, local: torch.Tensor, columns: int) -> torch.Tensor | None:
        parts = [shard.part(columns) for shard in shards(self.size)]
        rows, widest = len(local), max(map(len, parts))
        if local.shape[1] != len(parts[self.rank]):
            raise ValueError(
                f"rank {self.rank} has {local.shape[1]} of {columns} columns, not {parts[self.rank]}"
            )
        if self.size == 1:
            return local
        out = local.new_empty(rows, columns) if self.rank == 0 else None
        if out is not None:
            out[:, : len(parts[0])] = local
        width = min(widest, self._piece_bytes // local.element_size())
        height = self._piece_bytes // local.element_size() // width
        for top in range(0, rows, height):
            for left in range(0, widest, width):
                cut = slice(top, top + height), slice(left, left + width)
                slots = self._begin(local.dtype, width * height)
                if out is None:
                    _like(slots[self.rank], local[cut]).copy_(local[cut])
                    self._arrive()
                    continue
                self._arrive()
                self._wait(self._stage)
                for each in self._others:
                    target = out[:, parts[each].start : parts[each].stop][cut]
                    target.copy_(_like(slots[each], target))
        return out

    def abort(self, reason: str) -> None:
        self._aborted = self._aborted or reason
        with contextlib.suppress(ValueError):  # closed
            text = reason.encode()[: _TEXT_BYTES - 1]
            at = _texts_at(self.size) + self.rank * _TEXT_BYTES
            self._map[at : at + len(text)] = text
            self._words[self._own_word + 1] = 1

    def close(self) -> None:
        self._aborted = getattr(self, "_aborted", "") or "closed"
        self._layouts = {}
        self._words.release()
        with contextlib.suppress(BufferError):  # somebody still looks at it; it goes with the last of them
            self._map.close()

    # --- operations ---------------------------------------------------------------------------------------------

    def _sum(self, flat: torch.Tensor) -> None:
        """Replaces flat [elements], at most a piece, by its sum over the ranks."""
        slots = self._begin(flat.dtype, len(flat))
        slots[self.rank].copy_(flat)
        self._arrive()
        self._wait(self._stage)
        if self.size == 2 or flat.nbytes < _SPLIT_BYTES:
            _add(slots, flat)
            return
        # Each sums a part, over what only it still reads, and takes the other parts from the others.
        parts = [
            slice(part.start, part.stop) for part in (each.part(len(flat)) for each in shards(self.size))
        ]
        own = parts[self.rank]
        _add([slot[own] for slot in slots], flat[own])
        slots[self.rank][own] = flat[own]
        self._arrive()
        self._wait(self._stage)
        for each in self._others:
            flat[parts[each]] = slots[each][parts[each]]

    def _begin(self, dtype: torch.dtype, count: int) -> list[torch.Tensor]:
        """The first `count` elements of all ranks' slots of the next operation, its own free to be written."""
        if self._aborted:
            raise GroupAborted(f"rank {self.rank}: {self._aborted}")
        self._wait(self._begun)
        self._operation += 1
        self._begun = self._stage + 1
        return self._slots(dtype, count)

    def _arrive(self) -> None:
        self._stage += 1
        self._words[self._own_word] = self._stage

    def _wait(self, stage: int) -> None:
        """Until all others have arrived at `stage`."""
        if all(self._words[word] >= stage for word in self._other_words):
            return
        patience = Patience(self.timeout_s)
        while late := [rank for rank in self._others if self._words[self._word(rank)] < stage]:
            self._look_for_aborts()
            if not patience.pause():
                names = ", ".join(map(str, late))
                text = f"rank {self.rank} of {self.size} waited {self.timeout_s:g} s for rank {names}"
                self.abort(text)
                raise RankStuck(text, tuple(late))

    def _look_for_aborts(self) -> None:
        if self._aborted:
            raise GroupAborted(f"rank {self.rank}: {self._aborted}")
        for rank in self._others:
            if self._words[self._word(rank) + 1]:
                at = _texts_at(self.size) + rank * _TEXT_BYTES
                why = self._map[at : at + _TEXT_BYTES].rstrip(b"\0").decode(errors="replace")
                self._aborted = f"rank {rank}: {why}"
                raise GroupAborted(self._aborted)

    def _slots(self, dtype: torch.dtype, count: int) -> list[torch.Tensor]:
        """Of each rank, in this operation's parity. Kept, since making views takes microseconds."""
        key = (dtype, count)
        layouts = self._layouts.get(key)
        if layouts is None:
            if len(self._layouts) >= _LAYOUTS:
                self._layouts.clear()
            with torch.inference_mode(False):  # or they could not be written outside of it
                first, second = (
                    [
                        torch.frombuffer(
                            self._map, dtype=dtype, count=count, offset=self._slot_at(parity, rank)
                        )
                        for rank in range(self.size)
                    ]
                    for parity in (0, 1)
                )
            layouts = self._layouts[key] = (first, second)
        return layouts[self._operation & 1]

    def _slot_at(self, parity: int, rank: int) -> int:
        return _data_at(self.size) + (parity * self.size + rank) * self._piece_bytes

    @staticmethod
    def _word(rank: int) -> int:
        return (rank + 1) * _LINE


def usable() -> bool:
    """Whether `SharedMemory` works on this machine."""
    return platform.machine() in ("x86_64", "AMD64")


class Patience:
    """How one wait goes on: first it offers the core to others between looks, then it sleeps, at last it gives up.

    It does not spin first: where the core is free `sched_yield` takes less than a microsecond, and where it is not,
    twenty looks before it cost a fifth more time and a hundred twice as much, measured with two and four ranks.
    """

    __slots__ = ("_began", "_timeout_s")

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._began = time.monotonic()

    def pause(self) -> bool:
        """Lets others run; False once the time is over."""
        waited = time.monotonic() - self._began
        if waited >= self._timeout_s:
            return False
        if waited < _YIELD_S:
            os.sched_yield()  # releases the interpreter lock, too
        else:
            time.sleep(_NAP_S)
        return True


def _add(slots: list[torch.Tensor], out: torch.Tensor) -> None:
    """The sum of `slots` in their order, into `out`."""
    if len(slots) == 2:
        torch.add(slots[0], slots[1], out=out)
        return
    total = out if out.element_size() >= 4 else torch.empty_like(out, dtype=torch.float32)
    torch.add(slots[0], slots[1].to(total.dtype), out=total)
    for slot in slots[2:]:
        total.add_(slot)
    if total is not out:
        out.copy_(total)


def _like(slot: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    return slot[: part.numel()].view(part.shape)


def _texts_at(size: int) -> int:
    return _WORDS_AT + size * _LINE * 8


def _data_at(size: int) -> int:
    return -(-(_texts_at(size) + size * _TEXT_BYTES) // mmap.PAGESIZE) * mmap.PAGESIZE
