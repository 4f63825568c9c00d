"""Control messages as protobuf and back. Used by the shells; the rank processes see structs only.

`from_proto` trusts nothing: what does not parse into a known message raises WireError, and the stream is closed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from baton.v1 import worker_pb2 as pb
from kvtransfer.messages import (
    Abort,
    Begin,
    ChunkDone,
    ControlMessage,
    Credit,
    Done,
    Failed,
    Hello,
    KvGroup,
    KvSpec,
    Lease,
    Linked,
    Quiet,
)


class WireError(ValueError):
    """A peer sent something that this release does not understand."""


def to_proto(message: ControlMessage) -> pb.Control:
    """The control message as it goes over the wire."""
    if isinstance(message, ChunkDone):
        return pb.Control(
            chunk_done=pb.ChunkDone(
                handoff_id=message.handoff_id,
                lease_id=message.lease_id,
                epoch=message.epoch,
                chunk=message.chunk,
                size_bytes=message.size_bytes,
                digests=message.digests,
            )
        )
    if isinstance(message, Credit):
        leases = [_lease_to_proto(lease) for lease in message.leases]
        return pb.Control(credit=pb.Credit(handoff_id=message.handoff_id, leases=leases))
    if isinstance(message, Begin):
        return pb.Control(
            begin=pb.Begin(
                handoff_id=message.handoff_id,
                request_id=message.request_id,
                tokens=message.tokens,
                start=message.start,
                deadline_s=message.deadline_s,
                salt=message.salt,
                priority=message.priority,
            )
        )
    if isinstance(message, Abort):
        return pb.Control(abort=pb.Abort(handoff_id=message.handoff_id, reason=message.reason))
    if isinstance(message, Done):
        return pb.Control(
            done=pb.Done(
                handoff_id=message.handoff_id,
                cached_tokens=message.cached_tokens,
                queue_s=message.queue_s,
                compute_s=message.compute_s,
            )
        )
    if isinstance(message, Failed):
        return pb.Control(failed=pb.Failed(handoff_id=message.handoff_id, reason=message.reason))
    if isinstance(message, Linked):
        return pb.Control(linked=pb.Linked())
    if isinstance(message, Quiet):
        return pb.Control(quiet=pb.Quiet(handoff_id=message.handoff_id, epoch=message.epoch))
    return pb.Control(hello=_hello_to_proto(message))


def from_proto(control: pb.Control) -> ControlMessage:
    """The message in `control`. Raises WireError."""
    kind = control.WhichOneof("message")
    read = _READERS.get(kind or "")
    if read is None:
        raise WireError(f"a control message of unknown kind {kind!r}: is the peer of a newer release?")
    message: ControlMessage = read(getattr(control, kind))
    return message


def _lease_to_proto(lease: Lease) -> pb.Lease:
    return pb.Lease(
        lease_id=lease.lease_id,
        epoch=lease.epoch,
        chunk=lease.chunk,
        slot=lease.slot,
        deadline_s=lease.deadline_s,
    )


def _hello_to_proto(hello: Hello) -> pb.Hello:
    kv = hello.kv
    return pb.Hello(
        protocol=hello.protocol,
        release=hello.release,
        worker_id=hello.worker_id,
        incarnation=hello.incarnation,
        epoch=hello.epoch,
        kv=pb.KvSpec(
            model=kv.model,
            layers=kv.layers,
            q_heads=kv.q_heads,
            kv_heads=kv.kv_heads,
            head_dim=kv.head_dim,
            dtype=kv.dtype,
            block_size=kv.block_size,
            chunk_tokens=kv.chunk_tokens,
            tensor_parallel=kv.tensor_parallel,
            wire_dtype=kv.wire_dtype,
            groups=[
                pb.KvGroup(kind=group.kind, layers=group.layers, window=group.window) for group in kv.groups
            ],
        ),
        transport=hello.transport,
        endpoints=hello.endpoints,
        capabilities=hello.capabilities,
        slot_count=hello.slot_count,
        slot_bytes=hello.slot_bytes,
    )


def _read_hello(hello: pb.Hello) -> Hello:
    kv = hello.kv
    return Hello(
        protocol=hello.protocol,
        release=hello.release,
        worker_id=hello.worker_id,
        incarnation=hello.incarnation,
        epoch=hello.epoch,
        kv=KvSpec(
            model=kv.model,
            layers=kv.layers,
            q_heads=kv.q_heads,
            kv_heads=kv.kv_heads,
            head_dim=kv.head_dim,
            dtype=kv.dtype,
            block_size=kv.block_size,
            chunk_tokens=kv.chunk_tokens,
            tensor_parallel=kv.tensor_parallel or 1,
            wire_dtype=kv.wire_dtype,
            groups=tuple(KvGroup(group.kind, tuple(group.layers), group.window) for group in kv.groups),
        ),
        transport=hello.transport,
        endpoints=list(hello.endpoints),
        capabilities=list(hello.capabilities),
        slot_count=hello.slot_count,
        slot_bytes=list(hello.slot_bytes),
    )


def _read_begin(begin: pb.Begin) -> Begin:
    return Begin(
        handoff_id=begin.handoff_id,
        request_id=begin.request_id,
        tokens=list(begin.tokens),
        start=begin.start,
        deadline_s=begin.deadline_s,
        salt=begin.salt,
        priority=begin.priority,
    )


def _read_credit(credit: pb.Credit) -> Credit:
    leases = [Lease(x.lease_id, x.epoch, x.chunk, x.slot, x.deadline_s) for x in credit.leases]
    return Credit(credit.handoff_id, leases)


_READERS: dict[str, Callable[[Any], ControlMessage]] = {
    "hello": _read_hello,
    "linked": lambda x: Linked(),
    "begin": _read_begin,
    "credit": _read_credit,
    "abort": lambda x: Abort(x.handoff_id, x.reason),
    "chunk_done": lambda x: ChunkDone(
        x.handoff_id, x.lease_id, x.epoch, x.chunk, x.size_bytes, list(x.digests)
    ),
    "done": lambda x: Done(x.handoff_id, x.cached_tokens, x.queue_s, x.compute_s),
    "failed": lambda x: Failed(x.handoff_id, x.reason),
    "quiet": lambda x: Quiet(x.handoff_id, x.epoch),
}
