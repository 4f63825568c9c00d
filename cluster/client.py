"""A small client of a running deployment, for the command line: one answer, or its state."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import grpc

from baton.v1 import inference_pb2, inference_pb2_grpc

_STATUS_S = 5.0
_CONNECT_S = 5.0

Write = Callable[[str], None]


class ClientError(RuntimeError):
    """No answer; the message says why and what to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """One question; None and 0 leave the choice to the server."""

    prompt: str
    model: str = ""
    max_tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    timeout_s: float = 300.0


@dataclass(slots=True)
class _Clock:
    """When the parts of an answer arrived here."""

    sent: float = field(default_factory=time.perf_counter)
    first: float = 0.0
    last: float = 0.0

    def tick(self) -> None:
        self.last = time.perf_counter()
        self.first = self.first or self.last

    def speed(self, tokens: int) -> str:
        """`tokens` of the answer: first-token time, mean time between tokens, tokens per second."""
        if not self.first:
            return "no tokens"
        between_s = (self.last - self.first) / (tokens - 1) if tokens > 1 else 0.0
        rate = tokens / max(self.last - self.sent, 1e-9)
        return (
            f"TTFT {1e3 * (self.first - self.sent):.0f} ms, ITL {1e3 * between_s:.1f} ms, {rate:.1f} tokens/s"
        )


def generate(address: str, ask: Ask, write: Write) -> str:
    """Streams the answer into `write` and returns the line about it; raises ClientError."""
    request = inference_pb2.GenerateRequest(model=ask.model, text=ask.prompt, sampling=_sampling(ask))
    clock = _Clock()
    finished = None
    with grpc.insecure_channel(address) as channel:
        try:
            for response in inference_pb2_grpc.InferenceStub(channel).Generate(
                request, timeout=ask.timeout_s
            ):
                if response.WhichOneof("event") == "tokens":
                    clock.tick()
                    write(response.tokens.text)
                else:
                    finished = response.finished
                    write(finished.text)
        except grpc.RpcError as error:
            raise ClientError(_refusal(error, address)) from None
    if finished is None:
        raise ClientError(f"{address} ended the stream without saying that the answer is complete")
    return f"[{_where(finished.trace)}; {_counts(finished)}; {clock.speed(finished.completion_tokens)}]"


def chat(address: str, ask: Ask, write: Write) -> str:
    """The same as a chat message over the OpenAI API."""
    import httpx

    body: dict[str, Any] = {
        "model": ask.model or _only_model(address),
        "messages": [{"role": "user", "content": ask.prompt}],
        "stream": True,
        "stream_options": {"include_usage": True},
        "max_tokens": ask.max_tokens,
        "temperature": ask.temperature,
        "top_k": ask.top_k,
        "top_p": ask.top_p,
        "seed": ask.seed,
        "stop": list(ask.stop) or None,
        "ignore_eos": ask.ignore_eos or None,
    }
    body = {key: value for key, value in body.items() if value is not None}
    clock, tokens, reason = _Clock(), 0, ""
    try:
        timeout = httpx.Timeout(ask.timeout_s, connect=_CONNECT_S)
        with httpx.stream(
            "POST", f"http://{address}/v1/chat/completions", json=body, timeout=timeout
        ) as answer:
            if answer.status_code != 200:
                answer.read()
                raise ClientError(f"HTTP {answer.status_code}: {_http_error(answer.text)}")
            for event in _events(answer.iter_lines()):
                if "error" in event:
                    raise ClientError(_http_error(json.dumps(event)))
                if event.get("usage"):
                    tokens = event["usage"]["completion_tokens"]
                for choice in event.get("choices", ()):
                    reason = choice.get("finish_reason") or reason
                    if text := choice.get("delta", {}).get("content"):
                        clock.tick()
                        write(text)
    except httpx.HTTPError as error:
        raise ClientError(f"http://{address}: {error}; is `baton serve` running there?") from None
    return f"[{tokens} tokens, ended by {reason or 'nothing'}; {clock.speed(tokens)}]"


def status(address: str) -> inference_pb2.StatusResponse:
    """The router's state; raises ClientError."""
    with grpc.insecure_channel(address) as channel:
        try:
            answer: inference_pb2.StatusResponse = inference_pb2_grpc.InferenceStub(channel).Status(
                inference_pb2.StatusRequest(), timeout=_STATUS_S
            )
        except grpc.RpcError as error:
            raise ClientError(_refusal(error, address)) from None
    return answer


def _sampling(ask: Ask) -> inference_pb2.SamplingParams:
    return inference_pb2.SamplingParams(
        temperature=ask.temperature,
        top_k=ask.top_k,
        top_p=ask.top_p,
        seed=ask.seed,
        max_tokens=ask.max_tokens,
        stop=ask.stop,
        ignore_eos=ask.ignore_eos,
    )


def _where(trace: inference_pb2.Trace) -> str:
    text = f"prefilled {trace.prefilled or 'unknown'} on {trace.prefill_worker or trace.decode_worker or '?'}"
    if trace.remote_tokens:
        text += f", {trace.remote_tokens} tokens handed to {trace.decode_worker} in {1e3 * trace.handoff_s:.0f} ms"
    if trace.cached_tokens:
        text += f", {trace.cached_tokens} cached"
    return text + (f", fell back: {trace.fallback}" if trace.fallback else "")


def _counts(finished: inference_pb2.Finished) -> str:
    return f"{finished.prompt_tokens} + {finished.completion_tokens} tokens, ended by {finished.reason}"


def _refusal(error: Any, address: str) -> str:
    code, details = error.code(), error.details()
    if code is grpc.StatusCode.UNAVAILABLE and "connect" in str(details).lower():
        return f"nothing listens on {address}; start `baton serve`, or give its address with --grpc HOST:PORT"
    return f"{code.name}: {details}"


def _events(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    """The data of server-sent events, up to [DONE]."""
    for line in lines:
        if line.startswith("data:"):
            data = line[5:].strip()
            if data == "[DONE]":
                return
            yield json.loads(data)


def _only_model(address: str) -> str:
    import httpx

    answer = httpx.get(f"http://{address}/v1/models", timeout=_CONNECT_S)
    return str(answer.json()["data"][0]["id"]) if answer.status_code == 200 else ""


def _http_error(text: str) -> str:
    try:
        return str(json.loads(text)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return text[:500]
