"""Baton's gRPC door as the load sees it, through the project's own client without its retries."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from baton.client import AsyncClient
from baton.conversation import Retry
from baton.errors import BatonError, BrokenAnswer, DeadlineExceeded, InvalidRequest, NoRoom, Unavailable
from bench.door import Asking, DoorError, Facts
from bench.prompts import TokenPrompts, WordPrompts
from bench.record import Record
from bench.traces import TraceRequest

_KINDS: tuple[tuple[type[BatonError], str], ...] = (
    (NoRoom, "no_room"),
    (Unavailable, "unavailable"),
    (InvalidRequest, "invalid"),
    (DeadlineExceeded, "timeout"),
    (BrokenAnswer, "bad_answer"),
)


class GrpcDoor:
    """One router. `address`: HOST:PORT."""

    def __init__(self, address: str, asking: Asking, *, clock: Callable[[], float]) -> None:
        if asking.prompts == "text":
            raise DoorError("over gRPC prompts are token ids, which are exact; --prompts text is for HTTP")
        if asking.extra:
            raise DoorError("--body has no effect over gRPC")
        self._client = AsyncClient(address, retry=Retry(calls=1), timeout_s=asking.timeout_s)
        self._asking = asking
        self._clock = clock

    async def open(self) -> Facts:
        address, wanted = self._client.address, self._asking.model
        try:
            models = await self._client.models()
        except BatonError as error:
            raise DoorError(f"{address}: {type(error).__name__}: {error}") from None
        found = [model for model in models if not wanted or model.name == wanted]
        if not found:
            names = ", ".join(model.name for model in models)
            raise DoorError(f"{address} has no model {wanted!r}; it has {names or 'none'}")
        if found[0].vocab_size < self._asking.end_id:
            raise DoorError(
                f"--end-id {self._asking.end_id} is beyond the vocabulary of {found[0].vocab_size} tokens"
            )
        return Facts(
            f"grpc://{address}", "baton.v1", found[0].name, found[0].max_model_len, self._asking.end_id
        )

    def target(self, prompts: TokenPrompts | WordPrompts, tag: str) -> GrpcTarget:
        return GrpcTarget(self._client, self._asking, prompts, tag, self._clock)

    async def close(self) -> None:
        await self._client.close()


class GrpcTarget:
    """What `bench.load` asks."""

    def __init__(
        self,
        client: AsyncClient,
        asking: Asking,
        prompts: TokenPrompts | WordPrompts,
        tag: str,
        clock: Callable[[], float],
    ) -> None:
        self._client = client
        self._asking = asking
        self._prompts = prompts
        self._tag = tag
        self._clock = clock

    def prepare(self, request: TraceRequest) -> tuple[str, list[int] | str]:
        return f"{self._tag}-{request.number}", self._prompts.build(request)

    async def ask(self, prepared: tuple[str, Any], record: Record) -> None:
        record.request_id, prompt = prepared
        clock = self._clock
        try:
            async with self._client.stream(
                prompt,
                request_id=record.request_id,
                model=self._asking.model,
                max_tokens=record.output_tokens,
                temperature=self._asking.temperature,
                ignore_eos=self._asking.ignore_eos,
            ) as stream:
                async for delta in stream:
                    if delta.token_ids:
                        record.piece(clock(), len(delta.token_ids))
                completion = stream.completion
        except BatonError as error:
            kind = next((kind for cls, kind in _KINDS if isinstance(error, cls)), "server_error")
            record.fail(kind, str(error))
            return
        record.prompt_tokens = completion.usage.prompt_tokens
        record.completion_tokens = completion.usage.completion_tokens
        record.cached_tokens = completion.usage.cached_tokens
        record.finish_reason = completion.reason
        record.prefilled = completion.trace.prefilled
