"""The gRPC front door: `baton.v1.Inference`, the standard health service and reflection.

`add_public_services` puts them on the router's server. It translates and decides nothing: checks and texts of refusals
are in `router.generation`. A call that ends early for whatever reason (cancelled, deadline, connection lost) closes its
generator at once, which cancels the request everywhere.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import aclosing
from typing import Any, NoReturn

import grpc
import grpc.aio
from google.protobuf import any_pb2
from google.protobuf.message import Message
from google.rpc import code_pb2, error_details_pb2, status_pb2  # type: ignore[import-untyped]
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from grpc_status import rpc_status

from baton.v1 import inference_pb2, inference_pb2_grpc
from engine.api import Logprobs, Trace
from router.dispatch_api import RefusalKind, Refused
from router.generation import GenerateCall, Generation, TextDelta, TextEnd, TextPrompt

log = logging.getLogger(__name__)

INFERENCE_SERVICE = "baton.v1.Inference"
PROMPT_PIECE = 1024  # tokens of an echoed prompt in one message
_WATCH_INTERVAL_S = 0.2

# grpc-stubs lag behind grpc.aio, so contexts are not typed.
Context = Any


def add_public_services(
    server: grpc.aio.Server,
    generation: Generation,
    status: Callable[[], inference_pb2.StatusResponse],
    *,
    also_served: Sequence[str] = (),
) -> None:
    """Adds Inference, health and reflection to a server that has not been started.

    `also_served`: full names of other public services on this server, for health and reflection.
    """
    inference_pb2_grpc.add_InferenceServicer_to_server(InferenceDoor(generation, status), server)
    names = (INFERENCE_SERVICE, *also_served)
    health_pb2_grpc.add_HealthServicer_to_server(HealthDoor(lambda: generation.ready, ("", *names)), server)
    health_name = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
    reflection.enable_server_reflection((*names, health_name, reflection.SERVICE_NAME), server)


class InferenceDoor(inference_pb2_grpc.InferenceServicer):
    """See the comments of `service Inference` in inference.proto."""

    def __init__(self, generation: Generation, status: Callable[[], inference_pb2.StatusResponse]) -> None:
        self._generation = generation
        self._status = status

    # Written with `context.write` instead of `yield`: a cancelled call raises here, inside `aclosing`, while a
    # generator that is suspended in a `yield` would be closed only when it is collected.
    async def Generate(self, request: inference_pb2.GenerateRequest, context: Context) -> None:
        # One message for all tokens of the call: building a new one costs more than the rest of this loop.
        response = inference_pb2.GenerateResponse()
        tokens = response.tokens
        try:
            async with aclosing(self._generation.generate(_call(request))) as events:
                async for event in events:
                    if isinstance(event, TextDelta):
                        tokens.first_index = event.first_index
                        tokens.ids[:] = event.ids
                        tokens.text = event.text
                        tokens.choice = event.choice
                        if event.logprobs is not None:
                            tokens.logprobs.CopyFrom(_logprobs(event.logprobs))
                        await context.write(response)
                    elif isinstance(event, TextEnd):
                        await context.write(_finished(event))
                    elif isinstance(event, TextPrompt):
                        for piece in _prompt_pieces(event):
                            await context.write(piece)
        except Refused as refused:
            refusal = refused
        except Exception as error:
            if context.cancelled() or context.done():
                raise
            log.exception("request %s failed", request.request_id)
            refusal = Refused(RefusalKind.INTERNAL, f"internal error: {type(error).__name__}")
        else:
            return
        await _abort(context, refusal)

    async def Models(
        self, request: inference_pb2.ModelsRequest, context: Context
    ) -> inference_pb2.ModelsResponse:
        model = self._generation.model
        return inference_pb2.ModelsResponse(
            models=[
                inference_pb2.Model(
                    name=model.name, max_model_len=model.max_model_len, vocab_size=model.vocab_size
                )
            ]
        )

    async def Status(
        self, request: inference_pb2.StatusRequest, context: Context
    ) -> inference_pb2.StatusResponse:
        return self._status()


class HealthDoor(health_pb2_grpc.HealthServicer):  # type: ignore[misc]
    """grpc.health.v1 with one truth for all services: SERVING exactly while a request would be answered now."""

    def __init__(self, ready: Callable[[], bool], services: Sequence[str]) -> None:
        self._ready = ready
        self._services = frozenset(services)

    async def Check(
        self, request: health_pb2.HealthCheckRequest, context: Context
    ) -> health_pb2.HealthCheckResponse:
        if request.service not in self._services:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"unknown service {request.service!r}")
        return self._now(request.service)

    async def Watch(self, request: health_pb2.HealthCheckRequest, context: Context) -> None:
        last: health_pb2.HealthCheckResponse | None = None
        while True:
            current = self._now(request.service)
            if current != last:
                await context.write(current)
                last = current
            await asyncio.sleep(_WATCH_INTERVAL_S)

    def _now(self, service: str) -> health_pb2.HealthCheckResponse:
        statuses = health_pb2.HealthCheckResponse
        if service not in self._services:
            return health_pb2.HealthCheckResponse(status=statuses.SERVICE_UNKNOWN)
        return health_pb2.HealthCheckResponse(
            status=statuses.SERVING if self._ready() else statuses.NOT_SERVING
        )


def _call(request: inference_pb2.GenerateRequest) -> GenerateCall:
    sampling = request.sampling
    given = sampling.HasField
    prompt = request.WhichOneof("prompt")
    return GenerateCall(
        text=request.text if prompt == "text" else None,
        token_ids=list(request.token_ids.ids) if prompt == "token_ids" else None,
        model=request.model,
        request_id=request.request_id,
        temperature=sampling.temperature if given("temperature") else None,
        top_k=sampling.top_k if given("top_k") else None,
        top_p=sampling.top_p if given("top_p") else None,
        seed=sampling.seed if given("seed") else None,
        max_tokens=sampling.max_tokens if given("max_tokens") else None,
        stop=list(sampling.stop),
        stop_token_ids=list(sampling.stop_token_ids),
        ignore_eos=sampling.ignore_eos,
        min_p=sampling.min_p if given("min_p") else None,
        repetition_penalty=sampling.repetition_penalty if given("repetition_penalty") else None,
        presence_penalty=sampling.presence_penalty if given("presence_penalty") else None,
        frequency_penalty=sampling.frequency_penalty if given("frequency_penalty") else None,
        logit_bias=dict(sampling.logit_bias),
        min_tokens=sampling.min_tokens if given("min_tokens") else None,
        logprobs=sampling.logprobs if given("logprobs") else None,
        prompt_logprobs=sampling.prompt_logprobs if given("prompt_logprobs") else None,
        n=sampling.n if given("n") else None,
        echo=sampling.echo,
        priority=request.priority,
        salt=request.cache_salt,
        ttft_ms=request.ttft_ms or None,
        itl_ms=request.itl_ms or None,
        deadline_ms=request.deadline_ms or None,
        user=request.user,
    )


def _prompt_pieces(prompt: TextPrompt) -> Iterator[inference_pb2.GenerateResponse]:
    """The prompt in messages of a bounded size."""
    scores = prompt.logprobs
    for start in range(0, len(prompt.ids), PROMPT_PIECE):
        end = start + PROMPT_PIECE
        piece = inference_pb2.Prompt(first_index=start, ids=prompt.ids[start:end])
        if not start:
            piece.text = prompt.text
        if scores is not None:
            # They begin with the second token of the prompt.
            piece.logprobs.CopyFrom(_logprobs(scores.part(max(0, start - 1), end - 1)))
        yield inference_pb2.GenerateResponse(prompt=piece)


def _logprobs(found: Logprobs) -> inference_pb2.Logprobs:
    return inference_pb2.Logprobs(chosen=found.chosen, top_ids=found.top_ids, top=found.top)


def _finished(end: TextEnd) -> inference_pb2.GenerateResponse:
    choices = sorted(end.choices, key=lambda choice: choice.choice)
    return inference_pb2.GenerateResponse(
        finished=inference_pb2.Finished(
            reason=choices[0].reason,
            request_id=end.request_id,
            prompt_tokens=end.prompt_tokens,
            completion_tokens=end.completion_tokens,
            trace=None if end.trace is None else _trace(end.trace, end.decode_worker, end.decision),
            text=choices[0].text,
            choices=[
                inference_pb2.Choice(
                    index=choice.choice,
                    reason=choice.reason,
                    text=choice.text,
                    completion_tokens=choice.completion_tokens,
                )
                for choice in choices
            ],
        )
    )


def _trace(trace: Trace, decode_worker: str, decision: str) -> inference_pb2.Trace:
    return inference_pb2.Trace(
        prefilled=trace.prefilled,
        decode_worker=decode_worker,
        prefill_worker=trace.prefill_worker,
        cached_tokens=trace.cached_tokens,
        remote_tokens=trace.remote_tokens,
        handoff_bytes=trace.handoff_bytes,
        queue_s=trace.queue_s,
        handoff_s=trace.handoff_s,
        prefill_s=trace.prefill_s,
        ttft_s=trace.ttft_s,
        decode_s=trace.decode_s,
        decision=decision,
        fallback=trace.fallback,
    )


async def _abort(context: Context, refused: Refused) -> NoReturn:
    """Ends the call with the refusal's status; details as in google/rpc/error_details.proto."""
    details: list[Message] = []
    if refused.retry_after_s > 0 or refused.kind is RefusalKind.NO_ROOM:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromNanoseconds(int(refused.retry_after_s * 1e9))
        details.append(retry)
    if refused.kind is RefusalKind.TOO_LATE:
        details.append(error_details_pb2.ErrorInfo(reason="DEADLINE_UNREACHABLE", domain="baton"))
    if refused.param:
        violation = error_details_pb2.BadRequest.FieldViolation(
            field=refused.param, description=refused.message
        )
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    status = status_pb2.Status(
        code=code_pb2.Code.Value(refused.kind.grpc_code),
        message=refused.message,
        details=map(_packed, details),
    )
    await context.abort_with_status(rpc_status.to_status(status))
    raise AssertionError("abort_with_status raises")


def _packed(message: Message) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(message)
    return packed
