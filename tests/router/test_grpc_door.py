"""The gRPC door over real sockets."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from google.rpc import error_details_pb2  # type: ignore[import-untyped]
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status

import baton.rpc
from baton.v1 import inference_pb2, inference_pb2_grpc
from router.dispatch_api import RefusalKind, Refused
from router.grpc_door import InferenceDoor, add_public_services
from router.text import TextCodec
from tests.router.echo import MAX_MODEL_LEN, MODEL, VOCAB_SIZE, EchoDispatcher, make_generation, until

Request = inference_pb2.GenerateRequest


class Served:
    """A server on a free port and a client of it."""

    def __init__(self, dispatcher: EchoDispatcher, codec: TextCodec, channel: Any) -> None:
        self.dispatcher = dispatcher
        self.codec = codec
        self.channel = channel
        self.stub = inference_pb2_grpc.InferenceStub(channel)
        self.health = health_pb2_grpc.HealthStub(channel)

    async def answer(self, request: Request) -> list[inference_pb2.GenerateResponse]:
        return [response async for response in self.stub.Generate(request, timeout=10)]


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    dispatcher = EchoDispatcher()
    generation, codec = make_generation(tmp_path, dispatcher)
    server = baton.rpc.server("secret")
    status = inference_pb2.StatusResponse(router="router-7", ready=True)
    add_public_services(server, generation, lambda: status, also_served=["inference.Other"])
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield Served(dispatcher, codec, channel)
    await server.stop(None)


async def test_generate(served: Served) -> None:
    text = "the quick brown 🙂 fox"
    *tokens, last = await served.answer(Request(request_id="r1", model=MODEL, text=text))
    assert "".join(response.tokens.text for response in tokens) + last.finished.text == text
    ids = [token_id for response in tokens for token_id in response.tokens.ids]
    assert ids == served.codec.encode(text)
    assert [response.tokens.first_index for response in tokens] == list(range(len(ids)))
    finished = last.finished
    assert (finished.reason, finished.request_id) == ("stop", "r1")
    assert (finished.prompt_tokens, finished.completion_tokens) == (len(ids), len(ids))
    trace = finished.trace
    assert (trace.prefilled, trace.decode_worker, trace.prefill_worker) == ("remote", "decode-0", "prefill-0")
    assert (trace.cached_tokens, trace.handoff_bytes) == (3, 4096)
    assert trace.decision == "remote: 9 uncached >= 4"


async def test_token_ids_and_sampling(served: Served) -> None:
    sampling = inference_pb2.SamplingParams(
        temperature=0.5,
        top_k=3,
        top_p=0.5,
        seed=2**64 - 1,
        max_tokens=2,
        stop_token_ids=[40],
        stop=["zzz"],
        ignore_eos=True,
    )
    ids = inference_pb2.TokenIds(ids=[50, 51, 52])
    *tokens, last = await served.answer(Request(token_ids=ids, sampling=sampling))
    assert [list(response.tokens.ids) for response in tokens] == [[50], [51]]
    assert last.finished.reason == "length"
    assert last.finished.request_id
    got = served.dispatcher.prompts[0].sampling
    assert (got.temperature, got.top_k, got.top_p, got.seed) == (0.5, 3, 0.5, 2**64 - 1)
    assert (got.max_tokens, got.stop_token_ids) == (2, (40,))


async def test_absent_and_zero_are_different(served: Served) -> None:
    await served.answer(Request(text="fox", sampling=inference_pb2.SamplingParams(temperature=0)))
    await served.answer(Request(text="fox"))
    greedy, plain = (prompt.sampling for prompt in served.dispatcher.prompts)
    assert (greedy.temperature, plain.temperature) == (0.0, 1.0)
    assert plain.max_tokens > 16
    with pytest.raises(grpc.aio.AioRpcError, match="at least 1"):
        await served.answer(Request(text="fox", sampling=inference_pb2.SamplingParams(max_tokens=0)))


async def test_stop_string(served: Served) -> None:
    sampling = inference_pb2.SamplingParams(stop=["brown"])
    *tokens, last = await served.answer(
        Request(request_id="r", text="the quick brown fox", sampling=sampling)
    )
    assert "".join(response.tokens.text for response in tokens) + last.finished.text == "the quick "
    assert last.finished.reason == "stop"
    assert last.finished.trace.prefilled == "remote"
    await until(lambda: served.dispatcher.cancelled == ["r"])


# ---- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_", "code", "message", "field"),
    [
        (Request(), grpc.StatusCode.INVALID_ARGUMENT, "exactly one prompt", "prompt"),
        (Request(text="x" * 100_000), grpc.StatusCode.INVALID_ARGUMENT, str(MAX_MODEL_LEN), "prompt"),
        (Request(text="x", model="other"), grpc.StatusCode.NOT_FOUND, "does not exist", "model"),
        (
            Request(text="x", sampling=inference_pb2.SamplingParams(temperature=9)),
            grpc.StatusCode.INVALID_ARGUMENT,
            "between 0 and 2",
            "temperature",
        ),
        (
            Request(token_ids=inference_pb2.TokenIds(ids=[VOCAB_SIZE])),
            grpc.StatusCode.INVALID_ARGUMENT,
            "vocabulary",
            "prompt",
        ),
    ],
)
async def test_invalid_requests(
    served: Served, request_: Request, code: grpc.StatusCode, message: str, field: str
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await served.answer(request_)
    assert caught.value.code() == code
    assert message in (caught.value.details() or "")
    bad_request = detail(caught.value, error_details_pb2.BadRequest())
    assert [violation.field for violation in bad_request.field_violations] == [field]


@pytest.mark.parametrize("refuse_at", [None, 2])
@pytest.mark.parametrize("kind", RefusalKind)
async def test_refusals_have_their_status(served: Served, kind: RefusalKind, refuse_at: int | None) -> None:
    served.dispatcher.refusal = Refused(kind, "because é")
    served.dispatcher.refuse_at = refuse_at
    received = 0
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in served.stub.Generate(Request(text="the fox"), timeout=10):
            received += 1
    assert caught.value.code().name == kind.grpc_code
    assert caught.value.details() == "because é"
    assert received == (refuse_at or 0)


async def test_no_room_tells_when_to_retry(served: Served) -> None:
    served.dispatcher.refusal = Refused(RefusalKind.NO_ROOM, "full", retry_after_s=1.5)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await served.answer(Request(text="x"))
    assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert detail(caught.value, error_details_pb2.RetryInfo()).retry_delay.ToMilliseconds() == 1500


async def test_unexpected_errors_do_not_leak(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    served.dispatcher.refusal = ZeroDivisionError("secret detail")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await served.answer(Request(request_id="r9", text="x"))
    assert caught.value.code() == grpc.StatusCode.INTERNAL
    assert caught.value.details() == "internal error: ZeroDivisionError"
    assert "request r9 failed" in caplog.text
    assert "secret detail" in caplog.text


def detail(error: grpc.aio.AioRpcError, kind: Any) -> Any:
    status = rpc_status.from_call(_AsCall(error))
    assert status is not None
    for packed in status.details:
        if packed.Unpack(kind):
            return kind
    raise AssertionError(f"no {type(kind).__name__} in {status}")


class _AsCall:
    """`rpc_status` asks a call, which an error of grpc.aio is nearly."""

    def __init__(self, error: grpc.aio.AioRpcError) -> None:
        self.code = error.code
        self.details = error.details
        self.trailing_metadata = error.trailing_metadata


# ---- the client goes away ------------------------------------------------------------------------------------------


async def test_cancel_while_waiting(served: Served) -> None:
    served.dispatcher.hold_at = 0
    call = served.stub.Generate(Request(request_id="gone", text="the fox"))
    reading = asyncio.ensure_future(call.read())
    await served.dispatcher.holding.wait()
    call.cancel()
    await asyncio.gather(reading, return_exceptions=True)
    await until(lambda: served.dispatcher.cancelled == ["gone"])


async def test_cancel_in_the_middle(served: Served) -> None:
    served.dispatcher.script = lambda _prompt: [50] * 100
    served.dispatcher.delay_s = 0.01
    call = served.stub.Generate(Request(request_id="gone", text="the fox"))
    await call.read()
    call.cancel()
    await until(lambda: served.dispatcher.cancelled == ["gone"])
    assert served.dispatcher.active == 0


async def test_a_call_that_ends_inside_write_is_closed_at_once(tmp_path: Path) -> None:
    """Where a slow client's call is cancelled: not inside the generator, which nobody else would close in time."""

    class Context:
        async def write(self, _message: object) -> None:
            raise asyncio.CancelledError

    dispatcher = EchoDispatcher()
    door = InferenceDoor(make_generation(tmp_path, dispatcher)[0], inference_pb2.StatusResponse)
    with pytest.raises(asyncio.CancelledError):
        await door.Generate(Request(request_id="gone", text="the fox"), Context())
    assert dispatcher.cancelled == ["gone"]


async def test_deadline(served: Served) -> None:
    served.dispatcher.hold_at = 1
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in served.stub.Generate(Request(request_id="late", text="the fox"), timeout=0.3):
            pass
    assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    await until(lambda: served.dispatcher.cancelled == ["late"])


async def test_connection_lost(served: Served) -> None:
    served.dispatcher.hold_at = 1
    call = served.stub.Generate(Request(request_id="gone", text="the fox"))
    await call.read()
    await served.channel.close()
    await until(lambda: served.dispatcher.cancelled == ["gone"])


# ---- the other services --------------------------------------------------------------------------------------------


async def test_models_and_status(served: Served) -> None:
    (model,) = (await served.stub.Models(inference_pb2.ModelsRequest(), timeout=5)).models
    assert (model.name, model.max_model_len, model.vocab_size) == (MODEL, MAX_MODEL_LEN, VOCAB_SIZE)
    assert (await served.stub.Status(inference_pb2.StatusRequest(), timeout=5)).router == "router-7"


@pytest.mark.parametrize("service", ["", "baton.v1.Inference", "inference.Other"])
async def test_health_follows_the_dispatcher(served: Served, service: str) -> None:
    request = health_pb2.HealthCheckRequest(service=service)
    statuses = health_pb2.HealthCheckResponse
    assert (await served.health.Check(request, timeout=5)).status == statuses.SERVING
    watch = served.health.Watch(request, timeout=10)
    assert (await watch.read()).status == statuses.SERVING
    served.dispatcher.ready = False
    assert (await watch.read()).status == statuses.NOT_SERVING
    assert (await served.health.Check(request, timeout=5)).status == statuses.NOT_SERVING
    served.dispatcher.ready = True
    assert (await watch.read()).status == statuses.SERVING
    watch.cancel()


async def test_health_of_an_unknown_service(served: Served) -> None:
    request = health_pb2.HealthCheckRequest(service="no.Such")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await served.health.Check(request, timeout=5)
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND
    watch = served.health.Watch(request, timeout=5)
    assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
    watch.cancel()


async def test_reflection(served: Served) -> None:
    stub = reflection_pb2_grpc.ServerReflectionStub(served.channel)
    call = stub.ServerReflectionInfo(timeout=5)
    await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
    await call.write(reflection_pb2.ServerReflectionRequest(file_containing_symbol="baton.v1.Inference"))
    await call.done_writing()
    listed, described = [response async for response in call]
    names = {service.name for service in listed.list_services_response.service}
    assert {"baton.v1.Inference", "grpc.health.v1.Health", "inference.Other"} <= names
    assert any(
        b"GenerateRequest" in file for file in described.file_descriptor_response.file_descriptor_proto
    )
