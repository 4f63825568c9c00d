"""Names of prefixes for the requests of a trace, without making and hashing prompts of a hundred thousand tokens.

Ledger, scheduler and prefix index know a prefix only by the names of its blocks, and equal names mean equal tokens from
the beginning. A trace says which tokens are equal (`bench.prompts` makes them so), so names can be given by it: a node
for each path of the trace's blocks, and the block's place. Two requests have a name in common exactly when
`engine.prefix` would give the prompts made from them one (tests compare both).
"""

from __future__ import annotations

from bench.traces import Trace, TraceRequest
from engine.prefix import HASH_BYTES
from router.prompt_hints import HintChain, PromptHints

_PLACE_BITS = 24  # blocks of one prompt; the other 40 bits of a hint are the node
_TAIL = bytes(HASH_BYTES - 8)


class TraceNames:
    """The names for one trace and one block size."""

    def __init__(self, trace: Trace, block_size: int) -> None:
        self.block_size = block_size
        self._trace = trace
        self._nodes: dict[tuple[int, int], int] = {}
        self._known: dict[tuple[int, int], list[int]] = {}  # node, first place -> hints of its blocks

    def hints(self, request: TraceRequest) -> list[int]:
        """Of all full blocks of its prompt: 64 bits each."""
        size, full = self.block_size, request.input_tokens // self.block_size
        found: list[int] = []
        node = 0
        for block, edge in zip(request.blocks, self._trace.edges(request), strict=False):
            node = self._nodes.setdefault((node, block), len(self._nodes) + 1)
            self._extend(found, node, min(full, edge // size))
        if len(found) < full:  # from here on the request's alone
            node = self._nodes.setdefault((node, ~request.number), len(self._nodes) + 1)
            self._extend(found, node, full)
        return found

    def _extend(self, found: list[int], node: int, end: int) -> None:
        first = len(found)
        if end <= first:
            return
        known = self._known.setdefault((node, first), [])
        if len(known) < end - first:
            base = node << _PLACE_BITS
            known.extend(range(base + first + len(known), base + end))
        found += known[: end - first]


def names_of(hints: list[int]) -> list[bytes]:
    """The whole names, of which the hints are the first 8 bytes."""
    return [hint.to_bytes(8, "little") + _TAIL for hint in hints]


class NamedChain(HintChain):
    """A chain whose hints are known from the beginning."""

    __slots__ = ()

    def __init__(self, hints: list[int], block_size: int) -> None:
        super().__init__([], "", block_size)
        self.known = hints
        self.blocks = len(hints)

    def common_end(self, other: HintChain, start: int) -> int:
        """By hints: there are no tokens."""
        ours, theirs = self.known, other.known
        end = min(len(ours), len(theirs))
        if ours[start:end] == theirs[start:end]:
            return end
        return next(at for at in range(start, end) if ours[at] != theirs[at])


class NamedHints(PromptHints):
    """The chains of one prompt of a trace; `by_size` has the names for each block size that workers have."""

    __slots__ = ("_by_size", "_request")

    def __init__(self, by_size: dict[int, TraceNames], request: TraceRequest) -> None:
        super().__init__([])
        self._by_size = by_size
        self._request = request

    def chain(self, block_size: int, wire_dtype: str = "") -> HintChain:
        chain = self._chains.get((block_size, ""))
        if chain is None:
            hints = self._by_size[block_size].hints(self._request)
            chain = self._chains[block_size, ""] = NamedChain(hints, block_size)
        return chain
