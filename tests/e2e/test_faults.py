"""Processes that are really killed: requests survive as the design says, and nothing stays behind."""

from __future__ import annotations

import asyncio
import os
import signal

import grpc
import pytest

from baton import rpc
from baton.v1 import worker_pb2 as pb
from baton.v1 import worker_pb2_grpc
from tests.conftest import Reference
from tests.support.workers import TOKEN, open_pair, start_worker

pytestmark = [pytest.mark.e2e, pytest.mark.nixl]

OPTIONS = {"chunk_tokens": 64}


@pytest.mark.parametrize("engine_only", [False, True], ids=["shell", "engine"])
async def test_prefill_worker_killed_under_load(reference: Reference, engine_only: bool) -> None:
    """kill -9 in the middle: every request ends with the right tokens, all comes back, a new one is used."""
    async with open_pair(
        reference.folder, prefill={**OPTIONS, "max_batch_tokens": 32}, decode=OPTIONS
    ) as pair:
        client = pair.client
        keys = [await client.submit(prompt, prefill="prefill-0") for prompt in reference.prompts]
        # Some hand-offs are complete, some under way, some not begun: tokens of a remote prompt have come.
        await client.tokens(keys[12], 1)
        pair.prefill.kill(engine_only=engine_only)
        answers = [await client.answer(key) for key in keys]
        assert [answer.ids for answer in answers] == reference.answers
        assert any(answer.trace.fallback for answer in answers)
        await client.at_rest()  # quarantined slots too: the dead process is probed until it is certainly gone
        await asyncio.wait_for(pair.prefill.process.wait(), 10)
        await pair.replace_prefill(await start_worker("prefill", reference.folder, **OPTIONS))
        again = await client.ask([5, *reference.prompts[18]], prefill="prefill-0")
        assert again.trace.prefilled == "remote"
        await client.at_rest()


async def test_prefill_engine_frozen(reference: Reference) -> None:
    """SIGSTOP in the middle: the hand-off's deadline ends the wait, the answer is right; after SIGCONT slots return."""
    async with open_pair(
        reference.folder,
        prefill={**OPTIONS, "max_batch_tokens": 16},
        decode={**OPTIONS, "handoff_timeout_s": 1.0},
    ) as pair:
        client = pair.client
        key = await client.submit(reference.prompts[19], prefill="prefill-0")
        await client.until(lambda status: status.ledger.slots_leased > 0)
        os.kill(pair.prefill.started.engine_pid, signal.SIGSTOP)
        try:
            answer = await client.answer(key)
            held = await client.ledger()
            assert {lease.state for lease in held.leases} == {"quarantined"}
            assert held.quarantined_bytes > 0 and held.checked and not held.broken
        finally:
            os.kill(pair.prefill.started.engine_pid, signal.SIGCONT)
        assert answer.ids == reference.answers[19]
        assert "not complete" in answer.trace.fallback
        await client.at_rest()
        assert not (await client.ledger()).leases
        after = await client.ask([9, *reference.prompts[17]], prefill="prefill-0")
        assert after.end is not None and after.end.reason == "length"


async def test_cancel_frees_everything_everywhere(reference: Reference) -> None:
    """Cancels at every stage: before, during and after the hand-off."""
    async with open_pair(
        reference.folder, prefill={**OPTIONS, "max_batch_tokens": 32}, decode=OPTIONS
    ) as pair:
        client = pair.client
        for prompt in reference.prompts[12:]:
            early = await client.submit(prompt, prefill="prefill-0")
            await client.cancel(early)
            late = await client.submit([4, *prompt], prefill="prefill-0", tokens=200)
            await client.tokens(late, 3)
            await client.cancel(late)
            for key in (early, late):
                end = (await client.answer(key)).end
                assert end is not None and end.reason == "cancelled"
        await client.at_rest()
        async with rpc.channel(pair.prefill.started.address) as channel:
            stub = worker_pb2_grpc.WorkerStub(channel)
            async with asyncio.timeout(10):
                while True:
                    status = await stub.Describe(pb.DescribeRequest(), metadata=rpc.credentials(TOKEN))
                    if not status.handoffs and not status.ledger.blocks_held:
                        break
                    await asyncio.sleep(0.02)


async def test_router_stream_lost_frees_everything(reference: Reference) -> None:
    async with open_pair(reference.folder, decode=OPTIONS, prefill=OPTIONS) as pair:
        from tests.support.workers import DecodeClient

        async with DecodeClient(pair.decode) as other:
            key = await other.submit(reference.prompts[19], prefill="prefill-0", tokens=400)
            await other.tokens(key, 2)
        await pair.client.at_rest()


async def test_decode_engine_killed_ends_the_worker(reference: Reference) -> None:
    """A worker is whole or gone: the shell ends with its engine, and its streams break at once."""
    decode = await start_worker("decode", reference.folder)
    async with rpc.channel(decode.started.address) as channel:
        call = worker_pb2_grpc.WorkerStub(channel).Session(metadata=rpc.credentials(TOKEN))
        await call.read()
        decode.kill(engine_only=True)
        with pytest.raises(grpc.aio.AioRpcError) as lost:
            async with asyncio.timeout(10):
                while await call.read() is not grpc.aio.EOF:
                    pass
                raise grpc.aio.AioRpcError(grpc.StatusCode.UNAVAILABLE, None, None)
        assert lost.value.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
    assert await asyncio.wait_for(decode.process.wait(), 10) == 1


async def test_shell_killed_takes_its_engine_along(reference: Reference) -> None:
    decode = await start_worker("decode", reference.folder)
    decode.kill()
    await decode.process.wait()
    async with asyncio.timeout(10):
        while _alive(decode.started.engine_pid):
            await asyncio.sleep(0.02)


async def test_internal_calls_need_the_token(reference: Reference) -> None:
    async with open_pair(reference.folder) as pair:
        for worker in (pair.prefill, pair.decode):
            async with rpc.channel(worker.started.address) as channel:
                stub = worker_pb2_grpc.WorkerStub(channel)
                for metadata in (None, rpc.credentials("wrong")):
                    with pytest.raises(grpc.aio.AioRpcError) as refused:
                        await stub.Describe(pb.DescribeRequest(), metadata=metadata)
                    assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
        async with rpc.channel(pair.prefill.started.address) as channel:
            call = worker_pb2_grpc.HandoffPeerStub(channel).Link(iter(()), metadata=rpc.credentials("wrong"))
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await call.read()
            assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED


async def test_models_that_differ_never_exchange_kv(
    reference: Reference, tmp_path_factory: pytest.TempPathFactory
) -> None:
    from tests.support import models

    other = models.make_llama(tmp_path_factory.mktemp("other"), seed=1)
    async with open_pair(reference.folder) as pair:
        stranger = await start_worker("prefill", other, worker_id="prefill-1")
        try:
            from tests.support.workers import set_members

            await set_members(pair.decode.started.address, 2, [pair.prefill, pair.decode, stranger])
            await pair.client.until(lambda status: status.counters["peers_refused"] == 1)
            status = await pair.client.describe()
            assert list(status.peers) == [pair.prefill.spec.incarnation]
        finally:
            await stranger.stop()


def _alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
