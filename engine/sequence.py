"""One request as the scheduler sees it: its tokens, how many of them have KV, and the blocks that hold it.

There is no prefill or decode phase: a sequence catches `computed` up with its tokens, many at a time or one.
"""

from __future__ import annotations

from enum import IntEnum

from engine import prefix
from engine.api import EndReason, RequestKey, SamplingParams
from engine.ledger import BlockLedger
from engine.plan import BlockTable


class Phase(IntEnum):
    """WAITING -> RUNNING -> (preempted: WAITING again) -> FINISHED."""

    WAITING = 0
    RUNNING = 1
    FINISHED = 2


class Sequence:
    """Tokens and blocks of one request. `sampling` None: only compute KV (the prefill role)."""

    __slots__ = (
        "block_table", "computed", "hashes", "phase", "preemptions", "prompt_length", "published", "request", "salt",
        "sampling", "stop_ids", "tokens",
    )  # fmt: skip

    def __init__(
        self, request: RequestKey, prompt: list[int], sampling: SamplingParams | None, salt: str = ""
    ) -> None:
        if not prompt:
            raise ValueError("a sequence needs at least one token")
        self.request = request
        self.tokens = list(prompt)
        self.prompt_length = len(prompt)
        self.sampling = sampling
        self.stop_ids = frozenset(sampling.stop_token_ids) if sampling else frozenset()
        self.salt = salt
        self.phase = Phase.WAITING
        self.computed = 0
        self.block_table = BlockTable()
        self.hashes: list[bytes] = []  # of full blocks of `tokens`, as far as anyone asked
        self.published = 0  # leading blocks offered to the prefix cache
        self.preemptions = 0

    @property
    def remaining(self) -> int:
        """Tokens without KV yet."""
        return len(self.tokens) - self.computed

    @property
    def generated(self) -> int:
        return len(self.tokens) - self.prompt_length

    # ---- blocks ------------------------------------------------------------------------------------------------

    def match_prefix(self, ledger: BlockLedger, limit: int | None = None) -> int:
        """Tokens of this (blockless) sequence that the prefix cache has, at most `limit`, whole blocks."""
        prefix.extend(self.hashes, self.tokens, ledger.block_size, self.salt)
        end = len(self.tokens) if limit is None else limit
        return ledger.match(self.hashes[: end // ledger.block_size]) * ledger.block_size

    def take_prefix(self, ledger: BlockLedger, tokens: int) -> None:
        """Takes a hold on the first `tokens` cached tokens (a result of `match_prefix`, nothing taken since)."""
        assert not len(self.block_table) and tokens % ledger.block_size == 0
        count = tokens // ledger.block_size
        self.block_table.extend(ledger.share(self.hashes[:count]))
        self.computed = tokens
        self.published = count

    def advance(self, ledger: BlockLedger, tokens: int) -> None:
        """KV of `tokens` more tokens is in the blocks: publishes the blocks that became full."""
        self.computed += tokens
        full = self.computed // ledger.block_size
        if full > self.published:
            prefix.extend(self.hashes, self.tokens, ledger.block_size, self.salt, self.computed)
            for index in range(self.published, full):
                ledger.publish(int(self.block_table.ids[index]), self.hashes[index])
            self.published = full

    def drop_blocks(self, ledger: BlockLedger) -> None:
        """Lets go of all blocks; what was published may be found again."""
        ledger.release(self.block_table.clear())
        self.computed = 0
        self.published = 0

    # ---- tokens ------------------------------------------------------------------------------------------------

    def append(self, token: int) -> EndReason | None:
        """Adds a drawn token; the reason why the answer ends with it, or None."""
        assert self.sampling is not None
        self.tokens.append(token)
        if token in self.stop_ids:
            return "stop"
        return "length" if self.generated >= self.sampling.max_tokens else None
