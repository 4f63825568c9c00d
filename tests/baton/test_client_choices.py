"""Several choices, log-probabilities and the echoed prompt, as both clients hand them on."""

from __future__ import annotations

import pytest

from baton import BrokenAnswer, Delta, TokenLogprob
from baton.v1 import inference_pb2 as api
from tests.baton.scripted import Driver, Server, Step, refuse, tokens


@pytest.fixture(params=["sync", "async"])
def driver(request: pytest.FixtureRequest) -> Driver:
    return Driver(request.param)


def _of(choice: int, response: api.GenerateResponse, *logprobs: float) -> api.GenerateResponse:
    """With two alternatives at each token when there are log-probabilities."""
    response.tokens.choice = choice
    if logprobs:
        found = response.tokens.logprobs
        found.chosen.extend(logprobs)
        for token_id, logprob in zip(response.tokens.ids, logprobs, strict=True):
            found.top_ids.extend((token_id, 1))
            found.top.extend((logprob, -8.0))
    return response


def _ends(*counts: int, texts: tuple[str, ...] = ("", "")) -> api.GenerateResponse:
    choices = [
        api.Choice(index=index, reason="length", completion_tokens=count, text=text)
        for index, (count, text) in enumerate(zip(counts, texts, strict=False))
    ]
    finished = api.Finished(reason="length", text=texts[0], prompt_tokens=5, choices=choices)
    finished.completion_tokens = sum(counts)
    return api.GenerateResponse(finished=finished)


def _two() -> list[Step]:
    return [
        _of(0, tokens(0, 7)),
        _of(1, tokens(0, 17)),
        _of(1, tokens(1, 18, 19)),
        _of(0, tokens(1, 8)),
        _ends(2, 3, texts=("!", "?")),
    ]


def test_two_choices(driver: Driver) -> None:
    with Server(_two()) as server:
        deltas, answer = driver.stream(server.address, n=2)
    assert server.calls[0].request.sampling.n == 2
    assert [(delta.choice, delta.first_index, delta.token_ids, delta.text) for delta in deltas] == [
        (0, 0, [7], "7 "),
        (1, 0, [17], "17 "),
        (1, 1, [18, 19], "18 19 "),
        (0, 1, [8], "8 "),
        (0, 2, [], "!"),
        (1, 3, [], "?"),
    ]
    assert [choice.text for choice in answer.choices] == ["7 8 !", "17 18 19 ?"]
    assert [choice.token_ids for choice in answer.choices] == [[7, 8], [17, 18, 19]]
    assert answer.text == "7 8 !" and answer.usage.completion_tokens == 5
    assert answer.logprobs is None and answer.prompt is None


def test_choices_resume_each_for_itself(driver: Driver) -> None:
    """In the second call they come in another order and in other pieces."""
    broken: list[Step] = [*_two()[:3], refuse("UNAVAILABLE")]
    again: list[Step] = [
        _of(1, tokens(0, 17, 18)),
        _of(0, tokens(0, 7, 8)),
        _of(1, tokens(2, 19)),
        _ends(2, 3),
    ]
    with Server(broken, again) as server:
        deltas, answer = driver.stream(server.address, n=2)
    assert deltas[3:] == [Delta(1, [8], "8 ", choice=0)]
    assert [choice.token_ids for choice in answer.choices] == [[7, 8], [17, 18, 19]]


@pytest.mark.parametrize(
    "script",
    [
        [_of(2, tokens(0, 7)), _ends(1, 0)],
        [_of(0, tokens(0, 7)), _ends(1)],
        [_of(0, tokens(0, 7)), _of(1, tokens(0, 7)), _ends(1, 2)],
    ],
    ids=["unknown", "missing", "miscounted"],
)
def test_garbled_choices(driver: Driver, script: list[Step]) -> None:
    with Server(script) as server, pytest.raises(BrokenAnswer):
        driver.generate(server.address, n=2)


def test_logprobs(driver: Driver) -> None:
    with Server([_of(0, tokens(0, 7), -0.5), _of(0, tokens(1, 8, 9), -1.0, -2.0), _ends(3)]) as server:
        deltas, answer = driver.stream(server.address, logprobs=2)
    first = TokenLogprob(7, -0.5, [(7, -0.5), (1, -8.0)])
    assert deltas[0].logprobs == [first]
    assert answer.logprobs is not None
    assert answer.logprobs[0] == first
    assert [(one.token_id, one.logprob) for one in answer.logprobs] == [(7, -0.5), (8, -1.0), (9, -2.0)]
    assert answer.logprobs[2].top == [(9, -2.0), (1, -8.0)]


def test_a_resumed_delta_has_the_logprobs_of_its_new_tokens_only(driver: Driver) -> None:
    with Server(
        [_of(0, tokens(0, 7), -0.5), refuse("UNAVAILABLE")], [_of(0, tokens(0, 7, 8), -0.5, -1.0), _ends(2)]
    ) as server:
        deltas, _ = driver.stream(server.address, logprobs=0)
    assert deltas[1].logprobs is not None
    assert [one.token_id for one in deltas[1].logprobs] == [8]


def test_logprobs_that_do_not_fit_their_tokens(driver: Driver) -> None:
    response = _of(0, tokens(0, 7), -0.5)
    response.tokens.logprobs.chosen.append(-1.0)
    with Server([response, _ends(1)]) as server, pytest.raises(BrokenAnswer, match="of 2 tokens came with 1"):
        driver.generate(server.address, logprobs=2)


def test_the_prompt_comes_in_pieces(driver: Driver) -> None:
    def piece(first: int, ids: list[int], chosen: list[float], text: str = "") -> api.GenerateResponse:
        return api.GenerateResponse(
            prompt=api.Prompt(first_index=first, ids=ids, text=text, logprobs=api.Logprobs(chosen=chosen))
        )

    pieces: list[Step] = [piece(0, [1, 2], [-1.0], "one two three"), piece(2, [3], [-2.0])]
    with Server(
        [*pieces[:1], refuse("UNAVAILABLE")], [*pieces, tokens(0, 7), _ends(1)], [pieces[1], _ends(0)]
    ) as server:
        answer = driver.generate(server.address, echo=True, prompt_logprobs=0)
        assert answer.prompt is not None and answer.prompt.logprobs is not None
        assert (answer.prompt.token_ids, answer.prompt.text) == ([1, 2, 3], "one two three")
        assert [(one.token_id, one.logprob) for one in answer.prompt.logprobs] == [(2, -1.0), (3, -2.0)]
        with pytest.raises(BrokenAnswer, match="prompt token 0 was due, 2 came"):
            driver.generate(server.address, echo=True)


def test_the_fields_beside_the_sampling_parameters(driver: Driver) -> None:
    with Server([tokens(0, 7), _ends(1)]) as server:
        driver.generate(server.address, priority=-3, cache_salt="mine", logit_bias={5: -100.0}, min_p=0.5)
    request = server.calls[0].request
    assert (request.priority, request.cache_salt) == (-3, "mine")
    assert dict(request.sampling.logit_bias) == {5: -100.0} and request.sampling.min_p == 0.5
