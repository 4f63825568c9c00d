"""A decode role with a real model in this process: no shell, no ring, no transport."""

from __future__ import annotations

from pathlib import Path

from decode.role import DecodeRole
from engine.api import (
    Logprobs,
    PromptEntry,
    RequestEnd,
    RequestKey,
    SamplingParams,
    StepOutput,
    Submit,
    TokenEntry,
    Trace,
)
from engine.ledger import BlockLedger, SlotLedger
from engine.runner import Runner, load_runner
from engine.scheduler import Limits
from kvtransfer.messages import Hello, KvSpec


class LocalEngine:
    """Generates for many requests at once; every call ends with the ledger at rest and checked."""

    def __init__(
        self,
        folder: Path,
        *,
        blocks: int = 512,
        block_size: int = 16,
        budget: int = 512,
        max_running: int = 64,
        runner: Runner | None = None,
    ) -> None:
        """`runner`: one that has the folder's model and as many blocks already."""
        self.runner = runner or load_runner(folder, "float32", num_blocks=blocks, block_size=block_size)
        self.ledger = BlockLedger(blocks, block_size)
        kv = KvSpec(
            model="",
            layers=1,
            q_heads=1,
            kv_heads=1,
            head_dim=1,
            dtype="float32",
            block_size=block_size,
            chunk_tokens=64,
        )
        hello = Hello(worker_id="decode", incarnation="i", kv=kv, transport="", endpoints=[b""])
        self.role = DecodeRole(hello, self.ledger, SlotLedger(0), Limits(budget, max_running))
        self.copies = 0  # blocks copied for forks
        self._next = 1
        self._now = 0.0

    def generate(self, asked: list[tuple[list[int], SamplingParams]]) -> list[list[int]]:
        """All requests together, batched as the scheduler likes; their tokens, in the order asked."""
        return [outcome.choices[0] for outcome in self.answer([(*one, 1) for one in asked])]

    def answer(self, asked: list[tuple[list[int], SamplingParams, int]]) -> list[Outcome]:
        """As `generate`, with a number of choices for each request, and all that is known of it."""
        outcomes: dict[RequestKey, Outcome] = {}
        for prompt, sampling, n in asked:
            key = RequestKey(1, self._next)
            self._next += 1
            outcomes[key] = Outcome(n)
            self.role.handle(
                Submit(request=key, request_id=str(key.key), prompt=prompt, sampling=sampling, n=n), self._now
            )
        while not all(outcome.over for outcome in outcomes.values()):
            self._now += 1.0
            self.role.tick(self._now)
            plan = self.role.schedule(self._now)
            assert plan is not None, "requests are waiting and nothing can run"
            self.copies += len(plan.copies)
            self.role.commit(plan, self.runner.run(plan), self._now)
            for action in self.role.drain():
                assert isinstance(action, StepOutput), action
                for prompts in action.prompts:
                    outcomes[prompts.request].add_prompt(prompts)
                for entry in action.tokens:
                    outcomes[entry.request].add(entry)
                for end in action.ends:
                    outcomes[end.request].end(end)
        assert self.role.at_rest
        self.role.check()
        return list(outcomes.values())


class Outcome:
    """What came of one request, by choice."""

    def __init__(self, n: int) -> None:
        self.choices: list[list[int]] = [[] for _ in range(n)]
        self.logprobs = [Logprobs() for _ in range(n)]
        self.prompt = Logprobs()
        self.reasons: dict[int, str] = {}
        self.trace: Trace | None = None

    @property
    def over(self) -> bool:
        return self.trace is not None

    def add(self, entry: TokenEntry) -> None:
        assert entry.first_index == len(self.choices[entry.choice]) and entry.choice not in self.reasons
        self.choices[entry.choice] += entry.ids
        if entry.logprobs is not None:
            self.logprobs[entry.choice].extend(entry.logprobs)

    def add_prompt(self, entry: PromptEntry) -> None:
        assert entry.first_index == len(self.prompt.chosen) + 1
        self.prompt.extend(entry.logprobs)

    def end(self, end: RequestEnd) -> None:
        self.reasons[end.choice] = end.reason
        assert not self.over and end.more == len(self.choices) - len(self.reasons)
        assert (end.trace is None) == (end.more > 0)
        self.trace = end.trace
