"""Asks a router for many greedy answers at once and prints them as JSON. A program, to be run inside another host.

python -m tests.support.ask HOST:PORT status
python -m tests.support.ask HOST:PORT generate TOKENS < prompts.json
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

import grpc.aio
from google.protobuf.json_format import MessageToDict

from baton.v1 import inference_pb2 as api
from baton.v1 import inference_pb2_grpc

LIMIT_S = 60.0


async def generate(stub: Any, prompt: list[int], tokens: int) -> dict[str, Any]:
    request = api.GenerateRequest(
        sampling=api.SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
    )
    request.token_ids.ids.extend(prompt)
    ids: list[int] = []
    async for event in stub.Generate(request, timeout=LIMIT_S):
        if event.HasField("finished"):
            trace = event.finished.trace
            return {
                "tokens": ids,
                "prefilled": trace.prefilled,
                "prefill_worker": trace.prefill_worker,
                "decode_worker": trace.decode_worker,
                "handoff_bytes": trace.handoff_bytes,
                "handoff_s": trace.handoff_s,
                "fallback": trace.fallback,
            }
        ids += event.tokens.ids
    raise AssertionError("the stream ended without a terminal event")


async def main(address: str, what: str, *rest: str) -> None:
    async with grpc.aio.insecure_channel(address) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        answer: Any
        if what == "status":
            status = await stub.Status(api.StatusRequest(), timeout=LIMIT_S)
            answer = MessageToDict(status, preserving_proto_field_name=True)
        else:
            prompts = json.load(sys.stdin)
            answer = await asyncio.gather(*(generate(stub, prompt, int(rest[0])) for prompt in prompts))
    print(json.dumps(answer))


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
