"""What two workers compare before KV moves, and that a hello says the same on both ends of the wire."""

from __future__ import annotations

import msgspec
import pytest

from baton.v1 import worker_pb2 as pb
from kvtransfer import wire
from kvtransfer.handshake import mismatch
from kvtransfer.messages import Hello, KvGroup, KvSpec
from tests.kvtransfer.pools import kv_spec

MIXED = (KvGroup("full", (0, 1, 2, 5)), KvGroup("window", (3, 4), 64))


def hello(kv: KvSpec) -> Hello:
    return Hello(worker_id="prefill-0", incarnation="i", kv=kv, transport="nixl", endpoint=b"e", slot_count=2)


def grouped(*groups: KvGroup) -> Hello:
    return hello(msgspec.structs.replace(kv_spec(layers=6), groups=groups))


def test_a_hello_crosses_the_wire_whole() -> None:
    for message in (grouped(*MIXED), hello(kv_spec())):
        data = wire.to_proto(message).SerializeToString()
        assert wire.from_proto(pb.Control.FromString(data)) == message


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model", "other"),
        ("layers", 4),
        ("kv_heads", 3),
        ("head_dim", 32),
        ("dtype", "bfloat16"),
        ("chunk_tokens", 64),
    ],
)
def test_names_the_field_and_both_values(field: str, value: str | int) -> None:
    mine = kv_spec()
    theirs = msgspec.structs.replace(mine, **{field: value})
    said = mismatch(hello(mine), hello(theirs))
    assert f"kv.{field} is {getattr(mine, field)!r} here and {value!r} at prefill-0" in said


def test_block_sizes_may_differ() -> None:
    assert mismatch(hello(kv_spec(block_size=4)), hello(kv_spec(block_size=16))) == ""


def test_groups_must_agree_in_whatever_order_they_come() -> None:
    assert mismatch(grouped(*MIXED), grouped(*MIXED[::-1])) == ""
    for other in (
        (KvGroup("full", (0, 1, 2, 5)), KvGroup("window", (3, 4), 128)),
        (KvGroup("full", (0, 1, 2)), KvGroup("window", (3, 4, 5), 64)),
        (KvGroup("full", (0, 1, 2, 5)), KvGroup("latent", (3, 4), 64)),
        (),
    ):
        said = mismatch(grouped(*MIXED), grouped(*other))
        assert "kv.groups is ['full: layers 0-2,5', 'window 64: layers 3-4'] here and" in said


def test_a_release_that_names_no_groups_means_full_layers() -> None:
    assert mismatch(grouped(KvGroup("full", (0, 1, 2, 3, 4, 5))), grouped()) == ""
