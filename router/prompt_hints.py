"""A prompt as the prefix index asks for it: hints of its blocks' names, for each block size, computed as far as anyone
looks. Pure; made by the dispatcher once for a request, kept while its placement is expected to show.
"""

from __future__ import annotations

from itertools import islice
from struct import Struct

from engine.prefix import names, salted

_STRIDE = 64  # blocks compared at once
_AHEAD = 32  # blocks hashed at once, at most

_hint = Struct("<Q").unpack_from  # of a name: its first HINT_BYTES


class HintChain:
    """The full blocks of one prompt, of one size."""

    __slots__ = ("_names", "block_size", "blocks", "known", "tokens")

    def __init__(self, tokens: list[int], salt: str, block_size: int) -> None:
        self.tokens = tokens
        self.block_size = block_size
        self.blocks = len(tokens) // block_size
        self.known: list[int] = []
        self._names = names(tokens, block_size, salt)

    def __getitem__(self, at: int) -> int:
        """The hint of block `at` < `blocks`."""
        known = self.known
        while at >= len(known):
            # Several at once are cheaper; at most a quarter more than was asked for.
            ahead = min(_AHEAD, 1 + len(known) // 4)
            known += [_hint(name)[0] for name in islice(self._names, ahead)]
        return known[at]

    def common_end(self, other: HintChain, start: int) -> int:
        """The first block from `start` on that differs from the other's, whose blocks are of the same size."""
        end = min(self.blocks, other.blocks)
        if self.tokens is other.tokens:
            return end
        size, at, step = self.block_size, start, _STRIDE
        while step:
            part = slice(at * size, (at + step) * size)
            if at + step <= end and self.tokens[part] == other.tokens[part]:
                at += step
            else:
                step //= 2
        return at


class PromptHints:
    """All chains of one prompt: for each block size, and for each way in which workers salt their names."""

    __slots__ = ("_chains", "_salt", "_tokens")

    def __init__(self, tokens: list[int], salt: str = "") -> None:
        self._tokens = tokens
        self._salt = salt
        self._chains: dict[tuple[int, str], HintChain] = {}

    def chain(self, block_size: int, wire_dtype: str = "") -> HintChain:
        chain = self._chains.get((block_size, wire_dtype))
        if chain is None:
            chain = HintChain(self._tokens, salted(self._salt, wire_dtype), block_size)
            self._chains[block_size, wire_dtype] = chain
        return chain
