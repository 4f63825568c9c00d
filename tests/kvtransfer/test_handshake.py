"""What two workers compare before KV moves, and that a hello says the same on both ends of the wire."""

from __future__ import annotations

import tracemalloc
from typing import Any

import msgspec
import pytest

from baton.v1 import worker_pb2 as pb
from kvtransfer import wire
from kvtransfer.handshake import CAPABILITIES, Mismatch, Side, agree
from kvtransfer.messages import Hello, KvGroup, KvSpec
from kvtransfer.plan import PlanError, slot_bytes

MIXED = (KvGroup("full", (0, 1, 2, 5)), KvGroup("window", (3, 4), 64))


def kv(**changes: Any) -> KvSpec:
    spec = KvSpec(
        model="a model",
        layers=6,
        q_heads=8,
        kv_heads=4,
        head_dim=16,
        dtype="float32",
        block_size=4,
        chunk_tokens=32,
    )
    return msgspec.structs.replace(spec, **changes)


def hello(spec: KvSpec, worker_id: str = "decode-0", **changes: Any) -> Hello:
    ranks = spec.tensor_parallel
    try:
        slots = [slot_bytes(spec, rank) for rank in range(ranks)]
    except PlanError:  # what cannot be has no size either
        slots = [0] * ranks
    said = Hello(
        worker_id=worker_id,
        incarnation="i",
        kv=spec,
        transport="nixl",
        endpoints=[b"e"] * ranks,
        release="1.0",
        capabilities=list(CAPABILITIES),
        slot_count=2,
        slot_bytes=slots,
    )
    return msgspec.structs.replace(said, **changes)


def refusal(mine: Hello, theirs: Hello, side: Side = "prefill") -> str:
    with pytest.raises(Mismatch) as error:
        agree(mine, theirs, side)
    return str(error.value)


MINE = hello(kv(), "prefill-0", slot_count=0)


@pytest.mark.parametrize(
    "said",
    [
        hello(kv(groups=MIXED)),
        hello(kv(tensor_parallel=3, wire_dtype="int8", dtype="bfloat16"), slot_bytes=[1, 2, 3]),
    ],
)
def test_a_hello_crosses_the_wire_whole(said: Hello) -> None:
    data = wire.to_proto(said).SerializeToString()
    assert wire.from_proto(pb.Control.FromString(data)) == said


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model", "other"),
        ("layers", 4),
        ("q_heads", 16),
        ("kv_heads", 2),
        ("head_dim", 32),
        ("wire_dtype", "int8"),
    ],
)
@pytest.mark.parametrize("side", ["prefill", "decode"])
def test_names_the_field_and_both_values(field: str, value: str | int, side: Side) -> None:
    theirs = hello(kv(**{field: value}))
    assert f"kv.{field} is {getattr(kv(), field)!r} here and {value!r} at decode-0" in refusal(
        MINE, theirs, side
    )


def test_every_difference_is_named() -> None:
    said = refusal(MINE, hello(kv(model="other"), transport="shm", protocol=7))
    for words in (
        "protocol is 1 here and 7",
        "transport is 'nixl' here and 'shm'",
        "kv.model is 'a model' here",
    ):
        assert words in said


@pytest.mark.parametrize(
    "changes",
    [
        {"block_size": 16},
        {"chunk_tokens": 64},
        {"tensor_parallel": 4},
        {"tensor_parallel": 8},
        {"block_size": 8, "chunk_tokens": 24, "tensor_parallel": 3},
    ],
)
def test_block_sizes_chunks_and_ranks_may_differ(changes: dict[str, int]) -> None:
    there = hello(kv(**changes))
    plan = agree(MINE, there, "prefill")
    assert (plan.prefill, plan.decode) == (MINE.kv, there.kv)
    assert plan.chunk_tokens % there.kv.block_size == 0
    assert agree(there, MINE, "decode") is plan


def test_dtypes_may_differ() -> None:
    there = hello(kv(dtype="bfloat16"), slot_bytes=[6 * 2 * 4 * 16 * 2 * 32])
    assert agree(MINE, there, "prefill").decode.dtype == "bfloat16"


def test_another_release_with_what_is_needed_is_served() -> None:
    newer = hello(kv(), release="9.9", capabilities=[*CAPABILITIES, "wire:int3", "digest:crc"])
    assert agree(MINE, newer, "prefill").chunk_tokens == 32
    older = hello(kv(), release="0.1", capabilities=["digest:xxh3-128", "layout:head-major", "wire:stored"])
    assert agree(MINE, older, "prefill").chunk_tokens == 32


@pytest.mark.parametrize(
    ("wire_dtype", "lacking"),
    [("", "digest:xxh3-128"), ("", "layout:head-major"), ("", "wire:stored"), ("int8", "wire:int8")],
)
def test_what_a_release_lacks_is_named_with_what_it_has(wire_dtype: str, lacking: str) -> None:
    can = [name for name in CAPABILITIES if name != lacking]
    mine = hello(kv(wire_dtype=wire_dtype), "prefill-0")
    said = refusal(mine, hello(kv(wire_dtype=wire_dtype), release="0.1", capabilities=can))
    assert f"decode-0 (release 0.1) lacks {lacking}: it can {', '.join(sorted(can))}" in said
    assert f"prefill-0 can {', '.join(sorted(CAPABILITIES))}" in said
    assert "lacks" not in said.partition(lacking)[2].partition(";")[2]


def test_a_form_of_the_wire_that_nobody_knows() -> None:
    spec = kv(wire_dtype="int3")
    assert "lacks wire:int3" in refusal(hello(spec), hello(spec))


def test_no_common_chunk_length_names_both() -> None:
    said = refusal(hello(kv(chunk_tokens=12), "prefill-0"), hello(kv(block_size=16)))
    assert "12" in said and "16" in said and "decode-0" in said


@pytest.mark.parametrize(
    ("theirs", "words"),
    [
        (hello(kv(tensor_parallel=9)), "decode-0 has 9 ranks for 8 query heads"),
        (hello(kv(tensor_parallel=2), endpoints=[b"e"]), "decode-0 has 1 endpoints for 2 ranks"),
        (hello(kv(tensor_parallel=2), slot_bytes=[1 << 20]), "decode-0 has slots of 1 ranks for 2 ranks"),
        (hello(kv(), slot_count=0), "decode-0 has no landing slots"),
        (
            hello(kv(), slot_bytes=[1000]),
            "rank 0 of decode-0 has slots of 1000 bytes, a chunk of 32 tokens needs 98304",
        ),
        (
            hello(kv(dtype="float8")),
            "kv.dtype is 'float8' at decode-0, and one of float32, bfloat16, float16 here",
        ),
        (hello(kv(block_size=0)), "blocks of 0 tokens"),
        (hello(kv(chunk_tokens=0)), "chunks of 0"),
        (hello(kv(tensor_parallel=0)), "0 ranks"),
    ],
)
def test_a_hello_that_cannot_be(theirs: Hello, words: str) -> None:
    assert words in refusal(MINE, theirs, "prefill")


def test_a_prefill_worker_needs_no_slots() -> None:
    assert (
        agree(hello(kv()), hello(kv(), "prefill-0", slot_count=0, slot_bytes=[]), "decode").chunk_tokens == 32
    )


def test_groups_must_agree_in_whatever_order_they_come() -> None:
    mine = hello(kv(groups=MIXED), "prefill-0")
    assert agree(mine, hello(kv(groups=MIXED[::-1])), "prefill").chunk_tokens == 32
    for other in (
        (KvGroup("full", (0, 1, 2, 5)), KvGroup("window", (3, 4), 128)),
        (KvGroup("full", (0, 1, 2)), KvGroup("window", (3, 4, 5), 64)),
        (KvGroup("full", (0, 1, 2, 5)), KvGroup("latent", (3, 4), 64)),
        (),
    ):
        said = refusal(mine, hello(kv(groups=other)))
        assert "kv.groups is ['full: layers 0-2,5', 'window 64: layers 3-4'] here and" in said


def test_a_release_that_names_no_groups_means_full_layers() -> None:
    grouped = hello(kv(groups=(KvGroup("full", (0, 1, 2, 3, 4, 5)),)))
    assert agree(grouped, hello(kv()), "prefill").chunk_tokens == 32


def test_huge_numbers_in_a_hello_cost_nothing() -> None:
    tracemalloc.start()
    try:
        said = refusal(MINE, hello(kv(layers=1 << 21), slot_bytes=[1]))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert "kv.layers is 6 here and 2097152 at decode-0" in said and "full: layers 0-2097151" in said
    assert peak < 1 << 20
