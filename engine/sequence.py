"""One request as the scheduler sees it: its tokens, how many of them have KV, and the blocks that hold it.

There is no prefill or decode phase: a sequence catches `computed` up with its tokens, many at a time or one.
"""

from __future__ import annotations

from enum import IntEnum

from engine import prefix
from engine.api import EndReason, RequestKey, SamplingParams
from engine.ledger import BlockLedger
from engine.lifecycle import Lifecycle
from engine.plan import BlockTable


class Phase(IntEnum):
    """Where the scheduler has it. RUNNING -> WAITING: preempted. FINISHED also when it was given up."""

    WAITING = 0
    RUNNING = 1
    FINISHED = 2


PHASES = Lifecycle(
    "sequence",
    {
        Phase.WAITING: {Phase.RUNNING, Phase.FINISHED},
        Phase.RUNNING: {Phase.WAITING, Phase.FINISHED},
        Phase.FINISHED: set(),
    },
)


class Sequence:
    """Tokens and blocks of one request, or of one choice of it.

    `sampling` None: only compute KV (the prefill role, and the trunk from which choices fork).
    """

    __slots__ = (
        "arrival", "block_table", "choice", "computed", "fork_block", "fork_tokens", "hashes", "phase",
        "preemptions", "priority", "prompt_length", "published", "request", "salt", "sampling", "scored", "stop_ids",
        "targets", "tokens", "top",
    )  # fmt: skip

    def __init__(
        self,
        request: RequestKey,
        prompt: list[int],
        sampling: SamplingParams | None,
        salt: str = "",
        priority: int = 0,
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
        self.choice = 0  # of the request
        self.priority = priority  # less is more urgent
        self.arrival = 0  # order among equals, given by the scheduler; kept through preemption
        self.fork_block: int | None = (
            None  # held beside the table: its first `fork_tokens` are this sequence's next
        )
        self.fork_tokens = 0
        self.targets: list[int] = []  # the tokens of the prompt, when their log-probabilities are wanted
        self.scored = 1  # leading tokens of `targets` that are done; the first has none
        self.top = 0
        if sampling is not None and sampling.prompt_logprobs is not None:
            self.score(list(prompt), sampling.prompt_logprobs)

    def score(self, targets: list[int], top: int) -> None:
        """The log-probabilities of `targets`, which begin as this sequence does, are wanted."""
        self.targets = targets
        self.top = top

    @property
    def remaining(self) -> int:
        """Tokens without KV yet."""
        return len(self.tokens) - self.computed

    @property
    def has_blocks(self) -> bool:
        return bool(len(self.block_table)) or self.fork_block is not None

    @property
    def held(self) -> list[int]:
        """Every block on which it has a hold."""
        blocks: list[int] = self.block_table.ids.tolist()
        return blocks if self.fork_block is None else [*blocks, self.fork_block]

    @property
    def wanted(self) -> int:
        """Leading tokens whose KV may come from elsewhere: not the one from whose logits a token is drawn."""
        return len(self.tokens) - (self.sampling is not None)

    @property
    def generated(self) -> int:
        return len(self.tokens) - self.prompt_length

    # ---- blocks ------------------------------------------------------------------------------------------------

    def match_prefix(self, ledger: BlockLedger, limit: int | None = None) -> int:
        """Tokens of this (blockless) sequence that the prefix cache has, at most `limit`, whole blocks."""
        prefix.extend(self.hashes, self.tokens, ledger.block_size, self.salt)
        if self.scored < len(self.targets):
            return 0  # logits are needed at every position, and the cache has none
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
            new = slice(self.published, full)
            for block, name in zip(self.block_table.ids[new].tolist(), self.hashes[new], strict=True):
                ledger.publish(block, name)
            self.published = full

    def drop_blocks(self, ledger: BlockLedger) -> None:
        """Lets go of all blocks; what was published may be found again."""
        ledger.release(self.block_table.clear())
        if self.fork_block is not None:
            ledger.release([self.leave_fork()])
        self.computed = 0
        self.published = 0

    # ---- choices -----------------------------------------------------------------------------------------------

    def fork(self, ledger: BlockLedger, tokens: list[int], sampling: SamplingParams, choice: int) -> Sequence:
        """A sequence of `tokens`, which begin with this computed one's, that shares all its blocks.

        The full ones are in its table. The partial last one it must copy before it writes: `fork_block`.
        """
        assert not self.remaining and len(tokens) > len(self.tokens)
        child = Sequence(self.request, tokens, sampling, self.salt)
        child.choice = choice
        child.scored = len(child.targets)  # this one has done that
        blocks: list[int] = self.block_table.ids.tolist()
        ledger.hold(blocks)
        full = self.computed // ledger.block_size
        child.block_table.extend(blocks[:full])
        child.computed = full * ledger.block_size
        child.published = full
        child.hashes = self.hashes[:full]
        if len(blocks) > full:
            child.fork_block = blocks[full]
            child.fork_tokens = self.computed - child.computed
        return child

    def leave_fork(self) -> int:
        """The block that was shared in part, which the caller releases."""
        block, self.fork_block, self.fork_tokens = self.fork_block, None, 0
        assert block is not None
        return block

    def targets_of(self, start: int, tokens: int) -> tuple[int, list[int]]:
        """What is scored by a row of these tokens: where in it that begins, and the targets."""
        first = max(start, self.scored - 1)
        return first - start, self.targets[first + 1 : start + tokens + 1]

    # ---- tokens ------------------------------------------------------------------------------------------------

    def append(self, token: int) -> EndReason | None:
        """Adds a drawn token; the reason why the answer ends with it, or None."""
        assert self.sampling is not None
        self.tokens.append(token)
        if token in self.stop_ids:
            return "stop"
        return "length" if self.generated >= self.sampling.max_tokens else None
