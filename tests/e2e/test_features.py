"""Everything that a request may ask for, through a whole deployment, with the clients that users have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import openai
import pytest
import torch

from baton.v1 import inference_pb2 as api
from tests.support.deployment import TINY, Deployment, deployed

pytestmark = [pytest.mark.e2e, pytest.mark.nixl, pytest.mark.timeout(240)]

PROMPT = "The baton is handed from one runner to the next, and the race goes on. " * 3
TOP = 4


async def _grpc(
    deployment: Deployment, **sampling: Any
) -> tuple[list[api.Prompt], list[api.Tokens], api.Finished]:
    prompts: list[api.Prompt] = []
    tokens: list[api.Tokens] = []
    request = api.GenerateRequest(text=PROMPT, sampling=api.SamplingParams(**sampling))
    async for response in deployment.stub.Generate(request, timeout=60):
        if response.HasField("finished"):
            return prompts, tokens, response.finished
        if response.HasField("prompt"):
            prompts.append(response.prompt)
        else:
            tokens.append(response.tokens)
    raise AssertionError("no terminal event")


def _ids(tokens: list[api.Tokens], choice: int = 0) -> list[int]:
    return [token for piece in tokens if piece.choice == choice for token in piece.ids]


def _reference(ids: list[int]) -> torch.Tensor:
    """Log-probabilities [tokens, vocab] after each token, by transformers."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()
    with torch.no_grad():
        return torch.log_softmax(model(torch.tensor([ids])).logits[0].float(), -1)


async def test_features(tmp_path: Path) -> None:
    settings = {"router__policy": "always-remote", "cluster__launcher": "plain", "model__dtype": "float32"}
    async with (
        deployed(tmp_path, **settings) as deployment,
        openai.AsyncOpenAI(base_url=f"http://{deployment.http}/v1", api_key="none", max_retries=0) as client,
    ):
        await _log_probabilities(deployment, client)
        await _choices(deployment, client)
        await _penalties(deployment, client)
        await deployment.at_rest()


async def _log_probabilities(deployment: Deployment, client: openai.AsyncOpenAI) -> None:
    """Of prompt and answer, over both doors: what transformers computes."""
    (prompt,), tokens, finished = await _grpc(
        deployment, temperature=0, max_tokens=8, ignore_eos=True, logprobs=TOP, prompt_logprobs=TOP, echo=True
    )
    assert prompt.text == PROMPT and finished.trace.prefilled == "local"
    assert "log-probabilities" in finished.trace.decision
    every = [*prompt.ids, *_ids(tokens)]
    expected = _reference(every)
    own = expected[:-1].gather(1, torch.tensor(every[1:]).unsqueeze(1))[:, 0]
    found = [*prompt.logprobs.chosen, *(each for piece in tokens for each in piece.logprobs.chosen)]
    assert torch.allclose(torch.tensor(found), own, atol=1e-3)
    top = [*prompt.logprobs.top, *(each for piece in tokens for each in piece.logprobs.top)]
    best = expected[:-1].topk(TOP, -1).values
    assert torch.allclose(torch.tensor(top).view(-1, TOP), best, atol=1e-3)
    answer = await client.completions.create(
        model="baton-tiny", prompt=PROMPT, max_tokens=8, temperature=0, logprobs=TOP, echo=True,
        extra_body={"ignore_eos": True},
    )  # fmt: skip
    (choice,) = answer.choices
    assert choice.text.startswith(PROMPT) and choice.logprobs is not None
    assert choice.logprobs.token_logprobs is not None and choice.logprobs.token_logprobs[0] is None
    assert choice.logprobs.token_logprobs[1:] == pytest.approx(found, abs=1e-5)
    chat = await client.chat.completions.create(
        model="baton-tiny", messages=[{"role": "user", "content": "Hello"}], max_tokens=4, temperature=0,
        logprobs=True, top_logprobs=2,
    )  # fmt: skip
    assert chat.choices[0].logprobs is not None and chat.choices[0].logprobs.content is not None
    for entry in chat.choices[0].logprobs.content:
        assert len(entry.top_logprobs) == 2 and entry.logprob == entry.top_logprobs[0].logprob


async def _choices(deployment: Deployment, client: openai.AsyncOpenAI) -> None:
    """Remote, n = 3: the same over gRPC, HTTP and HTTP streaming; the first is what n = 1 says."""
    how: dict[str, Any] = {"temperature": 0.9, "seed": 4, "max_tokens": 12}
    _, tokens, finished = await _grpc(deployment, **how, n=3, ignore_eos=True)
    over_grpc = [_ids(tokens, choice) for choice in range(3)]
    assert len({tuple(ids) for ids in over_grpc}) == 3
    assert finished.completion_tokens == 36 and len(finished.choices) == 3
    _, tokens, finished = await _grpc(deployment, **how, ignore_eos=True)
    assert _ids(tokens) == over_grpc[0]
    assert finished.trace.cached_tokens > 0
    extra = {"ignore_eos": True, "return_token_ids": True}
    whole = await client.completions.create(model="baton-tiny", prompt=PROMPT, n=3, **how, extra_body=extra)
    assert [choice.token_ids for choice in whole.choices] == over_grpc
    assert whole.usage is not None and whole.usage.completion_tokens == 36
    details = whole.usage.prompt_tokens_details
    assert details is not None and details.cached_tokens and details.cached_tokens > 0
    streamed: list[list[int]] = [[], [], []]
    async for chunk in await client.completions.create(
        model="baton-tiny", prompt=PROMPT, n=3, stream=True, **how, extra_body=extra
    ):
        for choice in chunk.choices:
            streamed[choice.index] += choice.token_ids
    assert streamed == over_grpc


async def _penalties(deployment: Deployment, client: openai.AsyncOpenAI) -> None:
    """They take effect, alike over both doors; a bias forces a token; min_tokens keeps an answer going."""
    plain = _ids((await _grpc(deployment, temperature=0, max_tokens=16, ignore_eos=True))[1])
    how = {"repetition_penalty": 1.8, "min_p": 0.1}
    openais = {"presence_penalty": 1.5, "frequency_penalty": 1.0, "temperature": 0.0, "max_tokens": 16}
    over_grpc = _ids((await _grpc(deployment, **how, **openais, ignore_eos=True))[1])
    assert over_grpc != plain
    answer = await client.completions.create(
        model="baton-tiny", prompt=PROMPT, **openais,
        extra_body={**how, "ignore_eos": True, "return_token_ids": True},
    )  # fmt: skip
    assert answer.choices[0].token_ids == over_grpc
    forced = await client.completions.create(
        model="baton-tiny", prompt=PROMPT, max_tokens=5, logit_bias={"65": 100},
        extra_body={"return_token_ids": True},
    )  # fmt: skip
    assert forced.choices[0].token_ids == [65] * 5
    stops = {"stop_token_ids": plain[:3], "temperature": 0, "max_tokens": 16, "ignore_eos": True}
    assert len(_ids((await _grpc(deployment, **stops))[1])) == 1
    held = _ids((await _grpc(deployment, **stops, min_tokens=6))[1])
    assert len(held) > 6 and not set(held[:6]) & set(plain[:3])
    with pytest.raises(openai.BadRequestError, match="between 1 and 16"):
        await client.completions.create(model="baton-tiny", prompt="x", n=17)
