"""A decode role with a real model in this process: no shell, no ring, no transport."""

from __future__ import annotations

from pathlib import Path

from decode.role import DecodeRole
from engine.api import RequestEnd, RequestKey, SamplingParams, StepOutput, Submit
from engine.ledger import BlockLedger, SlotLedger
from engine.runner import load_runner
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
    ) -> None:
        self.runner = load_runner(folder, "float32", num_blocks=blocks, block_size=block_size)
        self.ledger = BlockLedger(blocks, block_size)
        kv = KvSpec(
            model="",
            layers=1,
            kv_heads=1,
            head_dim=1,
            dtype="float32",
            block_size=block_size,
            chunk_tokens=64,
        )
        hello = Hello(worker_id="decode", incarnation="i", kv=kv, transport="", endpoint=b"")
        self.role = DecodeRole(hello, self.ledger, SlotLedger(0), Limits(budget, max_running))
        self._next = 1
        self._now = 0.0

    def generate(self, asked: list[tuple[list[int], SamplingParams]]) -> list[list[int]]:
        """All requests together, batched as the scheduler likes; their tokens, in the order asked."""
        keys = []
        for prompt, sampling in asked:
            key = RequestKey(1, self._next)
            self._next += 1
            keys.append(key)
            self.role.handle(
                Submit(request=key, request_id=str(key.key), prompt=prompt, sampling=sampling), self._now
            )
        answers: dict[RequestKey, list[int]] = {key: [] for key in keys}
        ended: set[RequestKey] = set()
        while len(ended) < len(keys):
            self._now += 1.0
            self.role.tick(self._now)
            plan = self.role.schedule(self._now)
            assert plan is not None, "requests are waiting and nothing can run"
            self.role.commit(plan, self.runner.run(plan), self._now)
            for action in self.role.drain():
                if isinstance(action, StepOutput):
                    for entry in action.tokens:
                        assert entry.first_index == len(answers[entry.request])
                        answers[entry.request] += entry.ids
                    ended |= {end.request for end in action.ends}
                else:
                    assert not isinstance(action, RequestEnd), action
        assert self.role.at_rest
        self.role.check()
        return [answers[key] for key in keys]
