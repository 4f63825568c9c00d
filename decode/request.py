"""One request in a decode worker: its prompt, its choices, and what is known for its trace.

With n > 1 the prompt but its last token is a sequence of its own that draws nothing, the trunk: handed off, found in
the cache or computed once. Then every choice forks from it: they share its full blocks, copy the partial last one
before they write, and run the last prompt token themselves, each drawing with its own noise.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec

from decode.states import State
from engine.api import SamplingParams, Submit, Trace
from engine.ledger import BlockLedger
from engine.prefix import salted
from engine.sequence import PHASES, Phase, Sequence


@dataclass(slots=True)
class Request:
    """`sequence` is the only choice, or the trunk; `choices` are those that have not ended (before the fork: none)."""

    submit: Submit
    sequence: Sequence
    choices: list[Sequence]
    submitted: float
    state: State = State.ARRIVED
    trace: Trace = field(default_factory=Trace)
    begun: float | None = None  # first scheduled, or hand-off begun
    queued: float = 0.0  # given to the scheduler
    first_token: float | None = None
    awaited: bytes | None = None  # the block hash that later requests wait for

    @property
    def live(self) -> list[Sequence]:
        """All that may hold blocks."""
        return self.choices or [self.sequence]

    @property
    def ready_to_fork(self) -> bool:
        return not self.choices and not self.sequence.remaining

    def fork(self, ledger: BlockLedger) -> list[Sequence]:
        """The choices, in the trunk's place."""
        trunk, submit = self.sequence, self.submit
        self.choices = [
            trunk.fork(ledger, submit.prompt, choice_sampling(submit, choice), choice)
            for choice in range(submit.n)
        ]
        if trunk.phase is not Phase.FINISHED:  # it came ready; what was computed here has been detached
            trunk.phase = PHASES.move(trunk.phase, Phase.FINISHED)
        trunk.drop_blocks(ledger)
        return self.choices


def open_request(submit: Submit, now: float, wire_dtype: str = "") -> Request:
    """A request that has just arrived at a worker with this `KvSpec.wire_dtype`."""
    prompt, sampling = submit.prompt, submit.sampling
    salt = salted(submit.salt, wire_dtype)
    if submit.n == 1 or len(prompt) == 1:
        choices = []
        for choice in range(submit.n):
            drawn = choice_sampling(submit, choice)
            sequence = Sequence(submit.request, prompt, drawn, salt, submit.priority)
            sequence.choice = choice
            choices.append(sequence)
        return Request(submit, choices[0], choices, now)
    trunk = Sequence(submit.request, prompt[:-1], None, salt, submit.priority)
    if sampling.prompt_logprobs is not None:
        trunk.score(prompt, sampling.prompt_logprobs)
    return Request(submit, trunk, [], now)


def choice_sampling(submit: Submit, choice: int) -> SamplingParams:
    """What a single request with that choice would be asked with."""
    if not choice:
        return submit.sampling
    return msgspec.structs.replace(submit.sampling, choice=submit.sampling.choice + choice)
