"""Who sends which KV heads and tokens to whom: the transfer plan of one pair of workers. Pure, numpy only.

`plan(prefill, decode)` is computed once for a pair; `Plan.pieces(chunk, tokens)` gives the pieces of one chunk, the
same list on both sides, so that it never crosses the wire. A piece is a rectangle of heads x tokens (of all layers)
that one prefill rank writes to one decode rank, contiguous in the slot, in the canonical layout
[kv_head, layer, k/v, token, head_dim]; before it, when it is quantised, its scales [kv_head, layer, k/v, group].

Heads that the same prefill ranks store and the same decode ranks need are dealt alike: with S sources and T targets,
each source serves T // S targets alone; the rest is cut into runs of blocks, even to within one block over a hand-off.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import lru_cache
from itertools import pairwise
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from engine.shards import Shard
from kvtransfer.messages import DTYPE_BYTES, KvSpec
from kvtransfer.rows import merged
from kvtransfer.transport import Rows

Ints = npt.NDArray[np.int64]

# Bytes of a value as it crosses, by name; those in SCALED carry one fp32 scale for each head and SCALE_TOKENS tokens,
# keys and values apart, each layer for itself.
WIRE_BYTES = {**DTYPE_BYTES, "int8": 1, "fp8_e4m3": 1}
SCALED = ("int8", "fp8_e4m3")
SCALE_TOKENS = 16
SCALE_BYTES = 4

_REMEMBERED = 512  # chunk shapes of a pair: all whole chunks are a few, last ones come in many lengths


class PlanError(ValueError):
    """These two workers cannot hand KV to each other; names both values."""


@dataclass(frozen=True, slots=True)
class Pieces:
    """The pieces of one chunk as columns, int64 [pieces], in the order of their digests: by target, then offset."""

    source: Ints  # prefill rank
    target: Ints  # decode rank
    head: Ints  # first kv head, of the model's
    heads: Ints
    first: Ints  # first token, within the chunk
    tokens: Ints
    offset: Ints  # bytes, within the target's slot
    size_bytes: Ints

    def __len__(self) -> int:
        return len(self.source)


@dataclass(frozen=True, slots=True)
class Piece:
    """One piece as one rank sees it. `head` counts from the rank's own first head; `model_heads` are the model's."""

    index: int  # in the plan's order
    head: int
    heads: int
    first: int
    tokens: int
    offset: int  # bytes: within its slot for who receives it, within the staging buffer for who sends it
    size_bytes: int
    model_heads: range

    @property
    def local_heads(self) -> range:
        return range(self.head, self.head + self.heads)


@dataclass(frozen=True, slots=True)
class Write:
    """What one prefill rank writes to one decode rank: `parts[i]` becomes the plan's piece `pieces[i]` there."""

    target: int
    pieces: tuple[int, ...]
    parts: tuple[int, ...]
    offsets: tuple[int, ...]  # bytes, of each piece within the slot
    rows: Rows  # from the staging buffer's start to the slot's start, neighbours merged
    end: int  # bytes of the slot that are used


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A prefill rank's share of one chunk. `parts` are distinct: what goes to several targets is gathered once."""

    parts: tuple[Piece, ...]
    writes: tuple[Write, ...]
    staging_bytes: int
    size_bytes: int  # of all pieces


K = TypeVar("K")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Deal:
    """Neighbouring heads with the same sources and the same targets."""

    heads: range
    sources: tuple[int, ...]
    targets: tuple[int, ...]

    @property
    def alone(self) -> int:
        """Targets that each source serves alone."""
        return len(self.targets) // len(self.sources)

    @property
    def shared(self) -> tuple[int, ...]:
        """Targets that the sources serve together."""
        return self.targets[self.alone * len(self.sources) :]


class Plan:
    """See the module's text. Immutable but for its caches; may be used from any thread."""

    def __init__(self, prefill: KvSpec, decode: KvSpec) -> None:
        _check(prefill, decode)
        self.prefill = prefill
        self.decode = decode
        self.chunk_tokens = _chunk_tokens(prefill, decode)
        self.wire_dtype = prefill.wire_dtype or _narrower(prefill.dtype, decode.dtype)
        self._deals = _deals(prefill, decode)
        blocks = self.chunk_tokens // decode.block_size
        self._period = math.lcm(
            *(
                len(deal.sources) // math.gcd(blocks * len(deal.shared), len(deal.sources))
                for deal in self._deals
            )
        )
        self._pieces: dict[tuple[int, int], Pieces] = {}
        self._outgoing: dict[tuple[int, int, int], Outgoing] = {}
        self._incoming: dict[tuple[int, int, int], tuple[Piece, ...]] = {}

    # ---- of the pair ---------------------------------------------------------------------------------------------

    def targets(self, prefill_rank: int) -> tuple[int, ...]:
        """Decode ranks that this prefill rank may ever write to."""
        return self._partners(lambda source, target: target if source == prefill_rank else None)

    def sources(self, decode_rank: int) -> tuple[int, ...]:
        """Prefill ranks that may ever write to this decode rank."""
        return self._partners(lambda source, target: source if target == decode_rank else None)

    def _partners(self, choose: Callable[[int, int], int | None]) -> tuple[int, ...]:
        found = set()
        for deal in self._deals:
            pairs = {(source, target) for target in deal.shared for source in deal.sources}
            pairs |= {(deal.sources[at // deal.alone], target) for at, target in _served_alone(deal)}
            found |= {choose(source, target) for source, target in pairs}
        return tuple(sorted(rank for rank in found if rank is not None))

    def piece_bytes(self, heads: int, tokens: int) -> int:
        """Bytes of a piece as it crosses, scales included."""
        return wire_bytes(self.wire_dtype, self.decode.layers, self.decode.head_dim, heads, tokens)

    # ---- of a chunk ----------------------------------------------------------------------------------------------

    def pieces(self, chunk: int, tokens: int) -> Pieces:
        """The pieces of the chunk with this index (replicas take turns by it) and so many tokens.

        Raises ValueError when no chunk of this pair is like that.
        """
        if chunk < 0 or not 0 < tokens <= self.chunk_tokens:
            raise ValueError(f"no chunk {chunk} of {tokens} tokens: they have 1 to {self.chunk_tokens}")
        phase = chunk % self._period
        return _remembered(self._pieces, (phase, tokens), lambda: self._cut(phase, tokens))

    def outgoing(self, rank: int, chunk: int, tokens: int) -> Outgoing:
        """What this prefill rank sends of the chunk; same arguments and errors as `pieces`."""
        pieces = self.pieces(chunk, tokens)
        key = (rank, chunk % self._period, tokens)
        return _remembered(self._outgoing, key, lambda: self._sent_by(rank, pieces))

    def incoming(self, rank: int, chunk: int, tokens: int) -> tuple[Piece, ...]:
        """What this decode rank receives of the chunk; same arguments and errors as `pieces`."""
        pieces = self.pieces(chunk, tokens)
        key = (rank, chunk % self._period, tokens)
        return _remembered(self._incoming, key, lambda: self._received_by(rank, pieces))

    def _cut(self, chunk: int, tokens: int) -> Pieces:
        block_size = self.decode.block_size
        found: list[tuple[int, int, int, int, int, int]] = []
        for deal in self._deals:
            for source, target, start, stop in self._runs(deal, chunk, -(-tokens // block_size)):
                first, end = start * block_size, min(stop * block_size, tokens)
                found.append((target, deal.heads.start, first, source, len(deal.heads), end - first))
        found.sort()
        target, head, first, source, heads, count = np.array(found, dtype=np.int64).T
        sizes = _wire_bytes(self.wire_dtype, self.decode.layers, self.decode.head_dim, heads, count)
        ends = np.cumsum(sizes)
        # Offsets begin anew with each target.
        begins = np.searchsorted(target, target)
        offset = ends - sizes - (ends - sizes)[begins]
        return Pieces(source, target, head, heads, first, count, offset, sizes)

    def _runs(self, deal: _Deal, chunk: int, blocks: int) -> list[tuple[int, int, int, int]]:
        """(source, target, first block, past the last) of one deal of a chunk of so many blocks.

        Targets served together are one line of blocks, target after target, which is cut into a run for each source.
        Who gets the odd blocks goes on from chunk to chunk. A source's runs of that line never overlap within the
        chunk (each is at most a chunk long); those of the targets that it serves alone are cut where these are, so
        that what it must gather is the chunk, once.
        """
        sources, count = deal.sources, len(deal.sources)
        units = blocks * len(deal.shared)
        begin = chunk * (self.chunk_tokens // self.decode.block_size) * len(deal.shared) % count
        share, odd = divmod(units, count)
        runs: list[tuple[int, int, int, int]] = []
        cuts: dict[int, set[int]] = {source: {0, blocks} for source in sources}
        at = 0
        for turn in range(count):
            source = sources[(begin + turn) % count]
            end = at + share + (turn < odd)
            while at < end:
                index, start = divmod(at, blocks)
                stop = min(blocks, start + end - at)
                runs.append((source, deal.shared[index], start, stop))
                cuts[source] |= {start, stop}
                at += stop - start
        for index, target in _served_alone(deal):
            source = sources[index // deal.alone]
            edges = sorted(cuts[source])
            runs += [(source, target, start, stop) for start, stop in pairwise(edges)]
        return runs

    def _sent_by(self, rank: int, pieces: Pieces) -> Outgoing:
        begin = _kv_heads(self.prefill, rank).start
        mine = np.flatnonzero(pieces.source == rank)
        wanted = _columns(pieces, mine)
        rectangles = sorted(
            {(piece["head"], piece["first"], piece["heads"], piece["tokens"]) for piece in wanted}
        )
        parts: list[Piece] = []
        index_of: dict[tuple[int, int], int] = {}
        at = 0
        for head, first, heads, tokens in rectangles:
            index_of[head, first] = len(parts)
            size = self.piece_bytes(heads, tokens)
            parts.append(
                Piece(len(parts), head - begin, heads, first, tokens, at, size, range(head, head + heads))
            )
            at += size
        writes = []
        for target in sorted({piece["target"] for piece in wanted}):
            chosen = [piece for piece in wanted if piece["target"] == target]
            of = tuple(index_of[piece["head"], piece["first"]] for piece in chosen)
            rows = [
                (parts[part].offset, piece["offset"], piece["size_bytes"])
                for part, piece in zip(of, chosen, strict=True)
            ]
            writes.append(
                Write(
                    target=target,
                    pieces=tuple(piece["index"] for piece in chosen),
                    parts=of,
                    offsets=tuple(piece["offset"] for piece in chosen),
                    rows=merged(np.array(rows, dtype=np.uint64)),
                    end=max(piece["offset"] + piece["size_bytes"] for piece in chosen),
                )
            )
        return Outgoing(tuple(parts), tuple(writes), at, sum(piece["size_bytes"] for piece in wanted))

    def _received_by(self, rank: int, pieces: Pieces) -> tuple[Piece, ...]:
        begin = _kv_heads(self.decode, rank).start
        mine = np.flatnonzero(pieces.target == rank)
        return tuple(
            Piece(
                index=piece["index"],
                head=piece["head"] - begin,
                heads=piece["heads"],
                first=piece["first"],
                tokens=piece["tokens"],
                offset=piece["offset"],
                size_bytes=piece["size_bytes"],
                model_heads=range(piece["head"], piece["head"] + piece["heads"]),
            )
            for piece in _columns(pieces, mine)
        )


@lru_cache(maxsize=256)
def plan(prefill: KvSpec, decode: KvSpec) -> Plan:
    """The plan of a pair; cached. Raises PlanError."""
    return Plan(prefill, decode)


def kv_heads(kv: KvSpec, rank: int) -> range:
    """The kv heads, of the model's, that this rank of the worker stores. Raises PlanError for a rank or spec that
    cannot be."""
    _check_ranks("this worker", kv)
    if not 0 <= rank < kv.tensor_parallel:
        raise PlanError(f"rank {rank} is not one of {kv.tensor_parallel}")
    return _kv_heads(kv, rank)


def slot_bytes(kv: KvSpec, rank: int) -> int:
    """Bytes of a landing slot, or of a staging buffer, of this rank: its heads of `kv.chunk_tokens` tokens as they
    cross, to or from whichever peer. Raises PlanError."""
    heads = len(kv_heads(kv, rank))
    wire = kv.wire_dtype or kv.dtype
    size = 2 * kv.layers * heads * kv.chunk_tokens * kv.head_dim * WIRE_BYTES[wire]
    if wire in SCALED:
        # Groups begin anew with each piece. What is received is cut at own blocks; what is sent, at most twice.
        received = -(-kv.chunk_tokens // kv.block_size) * -(-kv.block_size // SCALE_TOKENS)
        sent = -(-kv.chunk_tokens // SCALE_TOKENS) + 2
        size += 2 * kv.layers * heads * SCALE_BYTES * max(received, sent)
    return size


def wire_bytes(wire_dtype: str, layers: int, head_dim: int, heads: int, tokens: int) -> int:
    """Bytes of a piece of heads x tokens, all layers, that crosses as `wire_dtype`; its scales included."""
    return int(_wire_bytes(wire_dtype, layers, head_dim, np.int64(heads), np.int64(tokens)))


def _wire_bytes(
    wire_dtype: str, layers: int, head_dim: int, heads: Ints | np.int64, tokens: Ints | np.int64
) -> Ints:
    each = tokens * head_dim * WIRE_BYTES[wire_dtype]
    if wire_dtype in SCALED:
        each = each + SCALE_BYTES * -(-tokens // SCALE_TOKENS)
    return np.asarray(2 * layers * heads * each, dtype=np.int64)


def _served_alone(deal: _Deal) -> list[tuple[int, int]]:
    return list(enumerate(deal.targets[: deal.alone * len(deal.sources)]))


def _kv_heads(kv: KvSpec, rank: int) -> range:
    return Shard(rank, kv.tensor_parallel).kv_heads(kv.q_heads, kv.kv_heads)


def _deals(prefill: KvSpec, decode: KvSpec) -> tuple[_Deal, ...]:
    storing = []
    for kv in (prefill, decode):
        ranges = [_kv_heads(kv, rank) for rank in range(kv.tensor_parallel)]
        storing.append(
            [tuple(r for r, heads in enumerate(ranges) if head in heads) for head in range(kv.kv_heads)]
        )
    deals: list[_Deal] = []
    for head, (sources, targets) in enumerate(zip(*storing, strict=True)):
        last = deals[-1] if deals else None
        if last is not None and (last.sources, last.targets) == (sources, targets):
            deals[-1] = _Deal(range(last.heads.start, head + 1), sources, targets)
        else:
            deals.append(_Deal(range(head, head + 1), sources, targets))
    return tuple(deals)


def _check(prefill: KvSpec, decode: KvSpec) -> None:
    for name in ("layers", "q_heads", "kv_heads", "head_dim", "wire_dtype"):
        mine, theirs = getattr(prefill, name), getattr(decode, name)
        if mine != theirs:
            raise PlanError(f"{name} is {mine!r} at the prefill worker and {theirs!r} at the decode worker")
    _check_ranks("the prefill worker", prefill)
    _check_ranks("the decode worker", decode)


def _check_ranks(where: str, kv: KvSpec) -> None:
    if min(kv.layers, kv.kv_heads, kv.head_dim, kv.block_size, kv.chunk_tokens, kv.tensor_parallel) < 1:
        raise PlanError(f"{where} says {kv}: layers, heads, sizes and ranks must be positive")
    if kv.q_heads < kv.kv_heads or kv.q_heads % kv.kv_heads:
        raise PlanError(f"{where} has {kv.q_heads} query heads, no multiple of its {kv.kv_heads} kv heads")
    if kv.tensor_parallel > kv.q_heads:
        raise PlanError(f"{where} has {kv.tensor_parallel} ranks, more than its {kv.q_heads} query heads")
    if kv.dtype not in DTYPE_BYTES:
        raise PlanError(f"{where} stores KV as {kv.dtype!r}, not as one of {', '.join(DTYPE_BYTES)}")
    if kv.wire_dtype and kv.wire_dtype not in SCALED:
        raise PlanError(f"{where} wants wire_dtype {kv.wire_dtype!r}, not '' or one of {', '.join(SCALED)}")


def _chunk_tokens(prefill: KvSpec, decode: KvSpec) -> int:
    """At most what either side holds; whole blocks of both where one such fits, else of the decode side, whose blocks
    are taken chunk by chunk."""
    most = min(prefill.chunk_tokens, decode.chunk_tokens)
    for unit in (math.lcm(prefill.block_size, decode.block_size), decode.block_size):
        if unit <= most:
            return most - most % unit
    raise PlanError(
        f"chunks of {prefill.chunk_tokens} tokens (prefill) and {decode.chunk_tokens} tokens (decode) at most, but a "
        f"block of the decode worker has {decode.block_size}: raise chunk_tokens or lower its block_size"
    )


def _narrower(prefill: str, decode: str) -> str:
    """Crosses as stored by the sender, unless the receiver stores fewer bytes."""
    return decode if DTYPE_BYTES[decode] < DTYPE_BYTES[prefill] else prefill


def _columns(pieces: Pieces, chosen: Ints) -> list[dict[str, int]]:
    columns = {field.name: getattr(pieces, field.name)[chosen].tolist() for field in fields(pieces)}
    columns["index"] = chosen.tolist()
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _remembered(cache: dict[K, T], key: K, make: Callable[[], T]) -> T:
    found = cache.get(key)
    if found is None:
        found = make()
        if len(cache) >= _REMEMBERED:
            cache.pop(next(iter(cache)), None)
        cache[key] = found
    return found
