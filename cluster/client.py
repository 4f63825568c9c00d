"""What the command line asks a running deployment, and how it words what comes of it. The client is `baton.client`."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from baton.client import Client
from baton.errors import BatonError, Unavailable
from baton.v1 import inference_pb2

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
    clock = _Clock()
    try:
        with (
            Client(address) as client,
            client.stream(
                ask.prompt,
                model=ask.model,
                timeout_s=ask.timeout_s,
                max_tokens=ask.max_tokens,
                temperature=ask.temperature,
                top_k=ask.top_k,
                top_p=ask.top_p,
                seed=ask.seed,
                stop=ask.stop,
                ignore_eos=ask.ignore_eos,
            ) as stream,
        ):
            for delta in stream:
                if delta.token_ids:
                    clock.tick()
                write(delta.text)
            answer = stream.completion
    except BatonError as error:
        raise ClientError(_refusal(error, address)) from None
    usage = answer.usage
    counts = f"{usage.prompt_tokens} + {usage.completion_tokens} tokens, ended by {answer.reason}"
    again = f", asked {answer.calls} times" if answer.calls > 1 else ""
    return f"[{_where(answer.trace)}; {counts}{again}; {clock.speed(usage.completion_tokens)}]"


def chat(address: str, ask: Ask, write: Write) -> str:
    """The same as a chat message over the OpenAI API."""
    import httpx

    body: dict[str, Any] = {
        "model": ask.model,
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
        body["model"] = ask.model or _only_model(address)
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
    try:
        with Client(address) as client:
            return client.status()
    except BatonError as error:
        raise ClientError(_refusal(error, address)) from None


def ledgers(address: str, oldest: int = 0) -> inference_pb2.LedgerResponse:
    """Who holds the blocks and slots of each worker; raises ClientError."""
    from baton.v1 import inference_pb2_grpc

    with _door(address) as channel:
        found: inference_pb2.LedgerResponse = inference_pb2_grpc.LedgersStub(channel).Read(
            inference_pb2.LedgerRequest(oldest=oldest), timeout=4 * _CONNECT_S
        )
    return found


def explain(address: str, request_id: str) -> inference_pb2.Explanation:
    """What the router remembers of a decision; raises ClientError."""
    from baton.v1 import inference_pb2_grpc

    with _door(address) as channel:
        found: inference_pb2.Explanation = inference_pb2_grpc.DecisionsStub(channel).Explain(
            inference_pb2.ExplainRequest(request_id=request_id), timeout=2 * _CONNECT_S
        )
    return found


@contextmanager
def _door(address: str) -> Iterator[Any]:
    """A channel for one call; what goes wrong with it is a ClientError."""
    import grpc

    with grpc.insecure_channel(address) as channel:
        try:
            yield channel
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.UNAVAILABLE:
                raise ClientError(
                    f"nothing listens on {address}; start `baton serve`, or give its address with --grpc HOST:PORT"
                ) from None
            raise ClientError(str(error.details())) from None


def _where(trace: inference_pb2.Trace) -> str:
    text = f"prefilled {trace.prefilled or 'unknown'} on {trace.prefill_worker or trace.decode_worker or '?'}"
    if trace.remote_tokens:
        text += f", {trace.remote_tokens} tokens handed to {trace.decode_worker} in {1e3 * trace.handoff_s:.0f} ms"
    if trace.cached_tokens:
        text += f", {trace.cached_tokens} cached"
    return text + (f", fell back: {trace.fallback}" if trace.fallback else "")


def _refusal(error: BatonError, address: str) -> str:
    if isinstance(error, Unavailable) and "connect" in str(error).lower():
        return f"nothing listens on {address}; start `baton serve`, or give its address with --grpc HOST:PORT"
    return f"{type(error).__name__}: {error}"


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
