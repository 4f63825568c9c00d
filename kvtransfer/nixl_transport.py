"""Transport over NIXL with its UCX backend: RDMA, CUDA IPC, shared memory (CMA) or TCP, whatever UCX finds.

The mover's thread owns it. What shapes this file, all of it observed: the progress thread spins a core, so progress is
made in `poll`; NIXL has no time-outs; releasing a handle or removing a peer stops no bytes, so handles are polled until
they end and peers are removed only when nothing is in flight; deregistering revokes nothing and freed memory may crash
its owner, so regions live as long as the process.
"""

from __future__ import annotations

import importlib
import logging
import os
import time
import uuid
from collections import Counter
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np

from kvtransfer import devices, processes
from kvtransfer.processes import ProcessIdentity
from kvtransfer.rows import checked, operations
from kvtransfer.transport import Region, Rows, Settled, TransportError

log = logging.getLogger(__name__)

_MODULES = ("nixl_cu13._api", "nixl_cu12._api", "nixl._api")
_ENVIRONMENT = {
    "UCX_TCP_TX_SEG_SIZE": "64k",  # twice the throughput over TCP
    "NIXL_LOG_LEVEL": "WARN",
}
_DRAIN_POLLS = 64
# After another host's endpoint refused us, what it had sent before on other connections gets this long to arrive.
_REMOTE_DRAIN_S = 5.0
_ucx_log = devices.UcxLog()
_keep: list[object] = []  # agents that were closed with bytes in flight: destroying them is not safe


class _Description(msgspec.Struct, frozen=True, tag="nixl", kw_only=True):
    agent: str
    metadata: bytes
    landing_base: int
    landing_bytes: int
    process: ProcessIdentity
    rdma: tuple[str, ...] = ()


@dataclass(slots=True)
class _Peer:
    about: _Description
    refused_since_s: float | None = None


@dataclass(slots=True)
class _Write:
    """One ticket: the operations which have not ended, the first error of those that have."""

    ticket: int
    agent: str
    handles: list[Any]
    error: str = ""


def load() -> Any:
    """The NIXL Python API. Raises TransportError which says what to install."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)  # read by the libraries when they are loaded
    failures = []
    for name in _MODULES:
        try:
            return importlib.import_module(name)
        except (ImportError, OSError) as error:
            failures.append(f"{name}: {error}")
    raise TransportError(
        "the nixl transport needs the package nixl-cu13 or nixl-cu12: " + "; ".join(failures)
    )


class NixlTransport:
    """See `kvtransfer.transport.Transport`. `staging` and `landing` may be empty; they must never be freed."""

    name = "nixl/UCX"

    def __init__(self, incarnation: str, staging: Region, landing: Region) -> None:
        """Raises TransportError when NIXL or its UCX backend cannot be used here."""
        api = load()
        self.staging = staging
        self.landing = landing
        # Unique even when an incarnation opens two endpoints: NIXL takes equal names for the same agent.
        self._name = f"{incarnation}/{uuid.uuid4().hex[:12]}"
        try:
            config = api.nixl_agent_config(backends=[], enable_prog_thread=False)
            self._agent: Any = api.nixl_agent(self._name, config)
            _ucx_log.start()
            try:
                self._agent.create_backend("UCX", {})
            finally:
                _ucx_log.started()
            self._registered = [
                self._agent.register_memory(_descriptors(region), mem_type="DRAM")
                for region in (staging, landing)
                if region.nbytes
            ]
            metadata = self._agent.get_agent_metadata()
        except Exception as error:
            raise TransportError(f"NIXL with UCX cannot be used here: {_text(error)}") from error
        self._about = _Description(
            agent=self._name,
            metadata=metadata,
            landing_base=landing.ctypes.data if landing.nbytes else 0,
            landing_bytes=landing.nbytes,
            process=processes.this_process(),
            rdma=devices.rdma_devices(),
        )
        self.devices = ""
        self.warning = ""
        self._lanes: dict[str, None] = {}
        self._peers: dict[str, _Peer] = {}
        self._agents: set[str] = (
            set()
        )  # loaded into NIXL; more than `_peers` while writes of forgotten peers settle
        self._writes: dict[int, _Write] = {}
        self._in_flight: Counter[str] = Counter()
        self._settled: list[Settled] = []
        self._next_ticket = 1

    def describe(self) -> bytes:
        return msgspec.msgpack.encode(self._about)

    def connect(self, peer: str, description: bytes) -> None:
        try:
            about = msgspec.msgpack.decode(description, type=_Description)
        except msgspec.DecodeError as error:
            raise TransportError(f"{peer}: no description of a nixl endpoint: {error}") from error
        if about.agent == self._name:
            raise TransportError(f"{peer}: that is this endpoint itself")
        # A fresh connection where that is safe: the old one may have failed, and NIXL would keep it.
        if about.agent in self._agents and not self._in_flight[about.agent]:
            self._forget(about.agent)
        try:
            loaded = self._agent.add_remote_agent(about.metadata)
        except Exception as error:
            raise TransportError(f"{peer} cannot be reached: {_text(error)}") from error
        if loaded.decode() != about.agent:
            self._forget(loaded.decode())
            raise TransportError(f"{peer}: its metadata are those of another agent")
        self._agents.add(about.agent)
        self._peers[peer] = _Peer(about)
        self._forget_idle()
        self._read_log(peer, about)

    def disconnect(self, peer: str) -> None:
        self._peers.pop(peer, None)
        self._forget_idle()

    def write(self, peer: str, rows: Rows) -> int:
        known = self._peers.get(peer)
        if known is None:
            raise TransportError(f"{peer} is not connected")
        about = known.about
        handles = self._prepare(peer, about, checked(rows, self.staging.nbytes, about.landing_bytes))
        ticket = self._next_ticket
        self._next_ticket += 1
        write = _Write(ticket, about.agent, [])
        self._writes[ticket] = write
        self._in_flight[about.agent] += 1
        for handle in handles:
            if write.error:
                _release(self._agent, handle)  # never posted
                continue
            # Once it is posted, bytes may have moved, even if posting raises: from here errors belong to the ticket.
            write.handles.append(handle)
            self._advance(write, handle, self._agent.transfer)
        self._settle(write)
        return ticket

    def poll(self) -> list[Settled]:
        self._progress()
        for write in list(self._writes.values()):
            for handle in list(write.handles):
                self._advance(write, handle, self._agent.check_xfer_state)
            self._settle(write)
        settled, self._settled = self._settled, []
        return settled

    def gone(self, peer: str) -> bool:
        """Also False for a peer that is not connected: nothing is certain about it.

        On this host: its process has ended and UCX refuses to send to it. On another: UCX refuses, twice and seconds
        apart; a network that is cut may look like this too, so there the caller must know besides, from whoever
        supervises that process, that it has ended.
        """
        known = self._peers.get(peer)
        if known is None:
            return False
        ended = processes.dead(known.about.process)
        if ended is False:
            return False
        self._drain()
        if not self._refuses(known.about.agent):
            known.refused_since_s = None
            return False
        if ended is None:
            now = time.monotonic()
            if known.refused_since_s is None:
                known.refused_since_s = now
            if now - known.refused_since_s < _REMOTE_DRAIN_S:
                return False
        self._drain()
        return True

    def close(self) -> None:
        """Ends the endpoint. With bytes in flight the agent is kept: they would land all the same, or worse."""
        agent, self._agent = self._agent, None
        if agent is None:
            return
        self._peers.clear()
        if self._writes:
            log.warning("nixl endpoint closed with %d writes in flight; it is kept", len(self._writes))
            _keep.append((agent, self._writes))
            return
        for name in self._agents:
            _quietly(agent.remove_remote_agent, name)
        for registered in self._registered:
            _quietly(agent.deregister_memory, registered)

    def _prepare(self, peer: str, about: _Description, rows: Rows) -> list[Any]:
        """One handle for each operation; all or nothing."""
        handles: list[Any] = []
        base = np.array([self.staging.ctypes.data, about.landing_base], dtype=np.uint64)
        try:
            for part in operations(rows):
                mine = np.zeros_like(part)
                theirs = np.zeros_like(part)
                mine[:, 0], theirs[:, 0] = part[:, 0] + base[0], part[:, 1] + base[1]
                mine[:, 1] = theirs[:, 1] = part[:, 2]
                local = self._agent.get_xfer_descs(mine, mem_type="DRAM")
                remote = self._agent.get_xfer_descs(theirs, mem_type="DRAM")
                handles.append(self._agent.initialize_xfer("WRITE", local, remote, about.agent, b""))
        except Exception as error:
            for handle in handles:
                _release(self._agent, handle)
            raise TransportError(f"cannot write to {peer}: {_text(error)}") from error
        return handles

    def _advance(self, write: _Write, handle: Any, call: Any) -> None:
        """Posts or checks one operation; one that has ended is released."""
        try:
            state = call(handle)
        except Exception as error:
            state, write.error = "ERR", write.error or _text(error)
            self._read_log()
        if state == "PROC":
            return
        if state != "DONE":
            write.error = write.error or "the transfer failed"
        write.handles.remove(handle)
        _release(self._agent, handle)

    def _settle(self, write: _Write) -> None:
        if write.handles:
            return
        del self._writes[write.ticket]
        self._in_flight[write.agent] -= 1
        self._settled.append(Settled(write.ticket, write.error))
        self._forget_idle()

    def _progress(self) -> None:
        self._agent.get_new_notifs()  # the only call that makes progress; what it returns is not authenticated

    def _drain(self) -> None:
        for _ in range(_DRAIN_POLLS):
            self._progress()

    def _refuses(self, agent: str) -> bool:
        try:
            self._agent.send_notif(agent, b"")
        except Exception:
            return True
        return False

    def _read_log(self, peer: str = "", about: _Description | None = None) -> None:
        """Passes on what UCX complains about, and learns which devices it uses; complains if there are better ones."""
        used: tuple[str, ...] = ()
        for line in _ucx_log.new_lines():
            if " WARN " in line or " ERROR " in line:
                log.warning("UCX: %s", line.partition(" UCX ")[2].strip() or line)
            used = devices.lanes(line) or used
        self._lanes.update(dict.fromkeys(used))
        self.devices = ", ".join(self._lanes)
        if about is not None:
            slow = devices.slow_way(
                # A connection like an earlier one has no line of its own.
                used or tuple(self._lanes),
                same_host=processes.same_host(about.process, self._about.process),
                reads_memory=devices.reads_memory_of(about.process, about.landing_base or 1),
                ours=self._about.rdma,
                theirs=about.rdma,
            )
            if slow:
                self.warning = slow
                log.warning("SLOW TRANSPORT to %s: %s", peer, slow)

    def _forget_idle(self) -> None:
        used = {peer.about.agent for peer in self._peers.values()}
        for agent in self._agents - used:
            if not self._in_flight[agent]:
                self._forget(agent)
                del self._in_flight[agent]

    def _forget(self, agent: str) -> None:
        self._agents.discard(agent)
        _quietly(self._agent.remove_remote_agent, agent)


def _descriptors(region: Region) -> Rows:
    return np.array([[region.ctypes.data, region.nbytes, 0]], dtype=np.uint64)


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _release(agent: Any, handle: Any) -> None:
    _quietly(agent.release_xfer_handle, handle)


def _quietly(call: Any, argument: Any) -> None:
    """For tidying up, where NIXL refuses what a lost peer has already taken away."""
    try:
        call(argument)
    except Exception as error:
        log.debug("%s: %s", getattr(call, "__name__", call), _text(error))
