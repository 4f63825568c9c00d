"""A tiny router: random prompts with shared prefixes and twins, local or remote, cancelled now and then; every answer
is checked token for token."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

from decode.request import choice_sampling
from engine.api import Cancel, RequestEnd, RequestKey, SamplingParams, StepOutput, Submit, TokenEntry
from simulation.deployment import Deployment
from simulation.model import VOCABULARY, right_answer
from simulation.node import Node
from simulation.settings import Settings
from simulation.world import World
from worker.messages import SessionLost

DELAY_S = (0.0002, 0.005)


@dataclass(slots=True)
class Answer:
    """What has come back for one request so far."""

    submit: Submit
    node: Node
    cancelled: bool = False
    tokens: list[list[int]] = field(default_factory=list)  # by choice
    reasons: dict[int, str] = field(default_factory=dict)  # by choice: why it ended
    end: RequestEnd | None = None
    lost: bool = False

    @property
    def over(self) -> bool:
        return self.end is not None or self.lost


class Client:
    """Submits `settings.requests` requests over `settings.load_s` and checks what comes back."""

    def __init__(self, world: World, deployment: Deployment, settings: Settings) -> None:
        self.world = world
        self.deployment = deployment
        self.settings = settings
        self.unsent = settings.requests
        self.answers: dict[tuple[str, RequestKey], Answer] = {}
        self._awaited: list[Answer] = []  # some of these may be over
        self._prompts: list[list[int]] = [[]]
        self._session_of: dict[int, int] = {}  # slot -> current session number
        self._next_session = 1
        for number in range(settings.requests):
            world.after(settings.begin_s + world.between(0, settings.load_s), partial(self._submit, number))

    @property
    def done(self) -> bool:
        while self._awaited and self._awaited[-1].over:
            self._awaited.pop()
        return not self.unsent and not self._awaited

    def open_requests(self) -> list[str]:
        return [answer.submit.request_id for answer in self.answers.values() if not answer.over]

    # ---- asking --------------------------------------------------------------------------------------------------

    def _submit(self, number: int) -> None:
        world, random = self.world, self.world.random
        nodes = self.deployment.alive(decode=True)
        if not nodes:
            world.after(0.05, lambda: self._submit(number))
            return
        self.unsent -= 1
        node = random.choice(nodes)
        prefills = [spec.worker_id for spec in self.settings.nodes if not spec.decode]
        submit = Submit(
            request=RequestKey(self._session(random.randrange(self.settings.sessions)), number),
            request_id=f"r{number}",
            prompt=self._prompt(),
            sampling=SamplingParams(
                temperature=random.choice((0.0, 1.0)),
                seed=random.randrange(1 << 30),
                max_tokens=random.randint(1, self.settings.answer_tokens),
                stop_token_ids=tuple(random.sample(range(VOCABULARY), random.choice((0, 1, 3)))),
            ),
            prefill_worker=random.choice(prefills) if world.chance(self.settings.remote) else "",
            local_below_tokens=random.choice((0, 0, 12)),
            salt=random.choice(("", "tenant")[: self.settings.salts]),
            n=random.choice((2, 3, 5)) if world.chance(self.settings.forks) else 1,
        )
        answer = self.answers[node.incarnation, submit.request] = Answer(submit, node)
        answer.tokens = [[] for _ in range(submit.n)]
        self._awaited.append(answer)
        world.facts["requests"] += 1
        world.facts["forked"] += submit.n > 1
        world.after(world.between(*DELAY_S), lambda: node.receive(submit), node)
        if world.chance(self.settings.cancels):
            world.after(world.between(0.0, random.choice((0.01, 0.2, 1.0))), lambda: self._cancel(answer))

    def _prompt(self) -> list[int]:
        """A twin of an earlier prompt, or a new one that may share a prefix with one."""
        random = self.world.random
        model = random.choice(self._prompts)
        if model and self.world.chance(self.settings.twins):
            return model
        length = random.randint(1, self.settings.prompt_tokens)
        shared = model[: random.randint(0, len(model))][:length]
        prompt = shared + [random.randrange(VOCABULARY) for _ in range(length - len(shared))]
        self._prompts.append(prompt)
        return prompt

    def _cancel(self, answer: Answer) -> None:
        if not answer.over:
            answer.cancelled = True
            self.world.after(
                self.world.between(*DELAY_S),
                lambda: answer.node.receive(Cancel(answer.submit.request)),
                answer.node,
            )

    def _session(self, slot: int) -> int:
        if slot not in self._session_of:
            self._session_of[slot] = self._next_session
            self._next_session += 1
        return self._session_of[slot]

    def lose_session(self) -> None:
        """A router's stream breaks: its workers are told, its requests are nobody's any more."""
        if not self._session_of:
            return
        slot = self.world.random.choice(sorted(self._session_of))
        session = self._session_of.pop(slot)
        for answer in self.answers.values():
            if answer.submit.request.session == session:
                answer.cancelled = True
        for node in self.deployment.alive(decode=True):
            # Later than any submit of this session can be under way.
            self.world.after(DELAY_S[1], partial(node.receive, SessionLost(session)), node)

    # ---- listening -----------------------------------------------------------------------------------------------

    def died(self, node: Node) -> None:
        for answer in self.answers.values():
            if answer.node is node and not answer.over:
                answer.lost = True
                self.world.facts["lost"] += 1

    def output(self, node: Node, output: StepOutput | RequestEnd) -> None:
        if isinstance(output, RequestEnd):
            self._end(node, output)
            return
        for entry in output.tokens:
            self._tokens(node, entry)
        for end in output.ends:
            self._end(node, end)

    def _tokens(self, node: Node, entry: TokenEntry) -> None:
        found = self.answers[node.incarnation, entry.request]
        name = f"{found.submit.request_id}, choice {entry.choice}"
        tokens = found.tokens[entry.choice]
        if found.over or entry.choice in found.reasons:
            self.world.violate(f"{name}: tokens after its end")
        elif entry.first_index != len(tokens):
            self.world.violate(f"{name}: token {entry.first_index} came after {len(tokens)} tokens")
        tokens += entry.ids

    def _end(self, node: Node, end: RequestEnd) -> None:
        found = self.answers[node.incarnation, end.request]
        submit = found.submit
        name = submit.request_id
        of_choice = end.reason in ("stop", "length")  # anything else ends all choices at once
        if found.over or (of_choice and end.choice in found.reasons):
            self.world.violate(f"{name}: a second end of choice {end.choice}, {end.reason}")
            return
        if of_choice:
            self._choice_end(found, end)
            if end.more:
                return
        found.end = end
        self.world.facts[f"end_{end.reason}"] += 1
        given = sum(map(len, found.tokens))
        if of_choice:
            trace = end.trace
            self.world.facts[f"prefilled_{trace.prefilled}"] += trace is not None  # type: ignore[union-attr]
        elif end.reason == "cancelled":
            if not found.cancelled or not all(self._right_so_far(found, c) for c in range(submit.n)):
                self.world.violate(f"{name}: cancelled by itself, or wrong until then")
        elif end.reason == "invalid":
            room = node.spec.blocks * node.spec.block_size
            if given or len(submit.prompt) + submit.sampling.max_tokens <= room:
                self.world.violate(f"{name}: refused for no reason: {end.detail}")
        elif end.reason == "no_room":
            work = sum(other.submit.n for other in self.answers.values() if not other.over)
            if given or work < node.spec.max_waiting:
                self.world.violate(f"{name}: refused for no reason: {end.detail}")
        else:
            self.world.violate(f"{name}: ended with {end.reason} {end.detail}")

    def _choice_end(self, found: Answer, end: RequestEnd) -> None:
        """Each choice answers what a single request with that choice would."""
        submit, tokens = found.submit, found.tokens[end.choice]
        found.reasons[end.choice] = end.reason
        expected, reason = right_answer(submit.prompt, choice_sampling(submit, end.choice), submit.salt)
        name = f"{submit.request_id}, choice {end.choice}"
        if tokens != expected or end.reason != reason:
            self.world.violate(f"{name}: answered {tokens} {end.reason}, not {expected} {reason}")
        if end.more != submit.n - len(found.reasons):
            self.world.violate(f"{name}: {end.more} more choices after {len(found.reasons)} of {submit.n}")

    def _right_so_far(self, found: Answer, choice: int) -> bool:
        submit, tokens = found.submit, found.tokens[choice]
        expected, _ = right_answer(submit.prompt, choice_sampling(submit, choice), submit.salt)
        return tokens == expected[: len(tokens)]
