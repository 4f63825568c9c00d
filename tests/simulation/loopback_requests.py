"""What `test_roles_over_loopback` asks for, and what it must be answered: a pure function of the prompt."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import strategies as st

from decode.request import choice_sampling
from engine.api import RequestEnd, RequestKey, SamplingParams, Submit, TokenEntry
from simulation.model import VOCABULARY, right_answer
from tests.simulation.loopback_workers import Size, Worker

# Whom an event befalls: an index, taken modulo how many there are.
who = st.integers(0, 11)


def prompts() -> st.SearchStrategy[list[int]]:
    """Of two families; those of one have a prefix in common, which ends around a border of a block or a chunk."""
    lengths = st.sampled_from((1, 2, 4, 5, 7, 8, 9, 12, 13, 16, 17, 18, 24, 25, 33))
    return st.builds(
        lambda family, length, shared, branch: [
            (at * 7 + family + (branch if at >= shared else 0)) % VOCABULARY for at in range(length)
        ],
        st.integers(0, 1),
        lengths,
        lengths,
        st.integers(0, 2),
    )


@dataclass(frozen=True, slots=True)
class Wish:
    """What a request asks for; `at` and `of` are the decode and the prefill worker."""

    prompt: list[int]
    answer: int
    at: int
    of: int | None
    below: int
    salt: str
    choices: int
    stops: tuple[int, ...]
    seed: int

    def submit(self, key: RequestKey, size: Size) -> Submit:
        return Submit(
            request=key,
            request_id=f"r{key.key}",
            prompt=self.prompt,
            sampling=SamplingParams(
                temperature=float(self.seed > 0),
                seed=self.seed,
                max_tokens=self.answer,
                stop_token_ids=self.stops,
            ),
            prefill_worker="" if self.of is None else f"prefill-{self.of % size.prefills}",
            local_below_tokens=self.below,
            salt=self.salt,
            n=self.choices,
        )


def wishes() -> st.SearchStrategy[Wish]:
    return st.builds(
        Wish,
        prompt=prompts(),
        answer=st.sampled_from((3, 1, 9, 20)),
        at=who,
        of=st.sampled_from((0, 0, 1, 1, None)),
        below=st.sampled_from((0, 0, 6)),
        salt=st.sampled_from(("", "", "tenant")),
        choices=st.sampled_from((1, 1, 1, 3)),
        stops=st.sampled_from(((), (3, 5, 7, 11))),
        seed=st.integers(0, 3),
    )


@dataclass(slots=True)
class Answer:
    """What a request was told so far."""

    submit: Submit
    worker: Worker
    cancelled: bool = False
    tokens: list[list[int]] = field(default_factory=list)  # by choice
    ended: set[int] = field(default_factory=set)  # choices
    end: RequestEnd | None = None

    def right(self, choice: int) -> list[int]:
        submit = self.submit
        return right_answer(submit.prompt, choice_sampling(submit, choice), submit.salt)[0]

    def add(self, entry: TokenEntry) -> None:
        tokens = self.tokens[entry.choice]
        assert self.end is None and entry.choice not in self.ended, f"{entry}: after its end"
        assert entry.first_index == len(tokens), f"{entry}: after {len(tokens)} tokens"
        tokens += entry.ids
        assert tokens == self.right(entry.choice)[: len(tokens)], f"{entry}: a wrong token"

    def close(self, end: RequestEnd, size: Size) -> None:
        """One end of each choice, the last of which is the request's; or one of all choices together."""
        assert self.end is None, f"a second end: {end}"
        submit = self.submit
        if end.reason in ("stop", "length"):
            assert end.choice not in self.ended, f"a second end: {end}"
            expected = right_answer(submit.prompt, choice_sampling(submit, end.choice), submit.salt)
            assert (self.tokens[end.choice], end.reason) == expected
            self.ended.add(end.choice)
            assert end.more == submit.n - len(self.ended)
            if end.more:
                return
        elif end.reason == "invalid":
            assert len(submit.prompt) + submit.sampling.max_tokens > size.decode_tokens
        elif end.reason == "no_room":
            assert size.max_waiting < 100 and not any(self.tokens)
        else:
            assert end.reason == "cancelled" and self.cancelled, f"ended by itself: {end}"
        self.end = end
