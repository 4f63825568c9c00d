"""A decode worker uses no KV that it cannot verify: whatever a prefill worker does wrong, the tokens are right."""

from __future__ import annotations

import os

import numpy as np
import pytest

from engine.model_config import fingerprint
from kvtransfer.digest import digest
from kvtransfer.messages import Begin, Done, KvSpec, Lease, Quiet
from tests.conftest import Reference
from tests.support.rogue import Misbehave, Rogue, rogue_for
from tests.support.workers import Answer, DecodeClient, start_worker

pytestmark = [pytest.mark.e2e, pytest.mark.nixl]

CHUNK = 64
PROMPT = 16  # of the reference: 513 tokens, nine chunks


async def answer_with(
    reference: Reference, act: Misbehave, *, quiet: bool = True
) -> tuple[Answer, Rogue, dict[str, int]]:
    """One request against a rogue: the tokens must be right and, once it says quiet, nothing stays behind."""
    kv = KvSpec(
        model=fingerprint(reference.folder),
        layers=3,
        q_heads=6,
        kv_heads=2,
        head_dim=24,
        dtype="float32",
        block_size=16,
        chunk_tokens=CHUNK,
    )
    decode = await start_worker("decode", reference.folder, chunk_tokens=CHUNK, handoff_timeout_s=1.0)
    try:
        async with (
            DecodeClient(decode) as client,
            rogue_for(decode, client, kv, act) as rogue,
        ):
            answer = await client.ask(reference.prompts[PROMPT], prefill="prefill-0")
            assert answer.ids == reference.answers[PROMPT]
            if quiet:
                await client.until(lambda status: bool(rogue.aborts))
                assert rogue.peer is not None
                rogue.say(Quiet(rogue.aborts[0].handoff_id, rogue.peer.epoch))
                status = await client.at_rest()
            else:
                status = await client.describe()
            return answer, rogue, dict(status.counters)
    finally:
        await decode.stop()


async def test_flipped_byte(reference: Reference) -> None:
    """What was digested is not what landed."""

    def act(rogue: Rogue, begin: Begin, lease: Lease) -> None:
        data = bytearray(os.urandom(rogue.chunk_bytes(begin, lease)))
        checksum = digest(np.frombuffer(bytes(data), dtype=np.uint8), 0)
        data[len(data) // 2] ^= 1
        rogue.write(lease, bytes(data))
        rogue.done(begin, lease, len(data), checksum)

    answer, _, counters = await answer_with(reference, act)
    assert answer.trace.prefilled == "local"
    assert "digest" in answer.trace.fallback
    assert counters["digest_refused"] >= 1


async def test_right_bytes_of_another_prompt(reference: Reference) -> None:
    """Undamaged bytes whose digest is not seeded with this prompt's prefix."""

    def act(rogue: Rogue, begin: Begin, lease: Lease) -> None:
        data = os.urandom(rogue.chunk_bytes(begin, lease))
        rogue.write(lease, data)
        rogue.done(begin, lease, len(data), digest(np.frombuffer(data, dtype=np.uint8), 12345))

    answer, _, counters = await answer_with(reference, act)
    assert answer.trace.remote_tokens == 0
    assert counters["digest_refused"] >= 1


async def test_stale_epoch_is_dropped_and_times_out(reference: Reference) -> None:
    def act(rogue: Rogue, begin: Begin, lease: Lease) -> None:
        data = os.urandom(rogue.chunk_bytes(begin, lease))
        rogue.write(lease, data)
        rogue.done(
            begin, lease, len(data), digest(np.frombuffer(data, dtype=np.uint8), 0), epoch=lease.epoch - 1
        )

    answer, _, counters = await answer_with(reference, act)
    assert "not complete after 1 s" in answer.trace.fallback
    assert counters["late_messages"] >= 1
    assert counters["handoffs_expired"] == 1


async def test_lost_chunk_done_times_out(reference: Reference) -> None:
    def act(rogue: Rogue, begin: Begin, lease: Lease) -> None:
        rogue.write(lease, os.urandom(rogue.chunk_bytes(begin, lease)))

    answer, rogue, counters = await answer_with(reference, act)
    assert "not complete after 1 s" in answer.trace.fallback
    assert counters["handoffs_expired"] == 1
    assert rogue.aborts


async def test_lost_chunk_done_is_noticed_at_done(reference: Reference) -> None:
    """The stream is ordered: what was not announced before `Done` never will be, so nothing waits for the deadline."""

    def act(rogue: Rogue, begin: Begin, lease: Lease) -> None:
        if lease.chunk == 0:
            rogue.say(Done(begin.handoff_id, 0, 0.0, 0.0))

    answer, _, counters = await answer_with(reference, act)
    assert "never announced" in answer.trace.fallback
    assert counters.get("handoffs_expired", 0) == 0


async def test_silence_quarantines_the_slots(reference: Reference) -> None:
    """A live peer that never says `Quiet`: its slots must not be leased again, and requests go on without them."""

    def act(rogue: Rogue, begin: Begin, lease: Lease) -> None:
        pass

    kv_leases: list[int] = []
    answer, rogue, _ = await answer_with(reference, act, quiet=False)
    kv_leases = [lease.slot for lease in rogue.leases]
    assert answer.trace.prefilled == "local"
    assert len(set(kv_leases)) == len(kv_leases)
