"""Transport over torch.distributed (gloo): one-sided writes made of sends and receives, between any two hosts.

    writer's thread                       receiver's thread, one for each connection
      header: ticket, rows   -- line -->    are they within my landing memory?
      bytes                  -- gloo -->    straight into it
      settled                <-- line --    received it

The mover's thread owns an endpoint and never waits for a peer, except in `connect` and there not long. Each peer that
is written to has a connection and a thread of its own here, each that writes one too, so a peer that hangs or dies
holds nobody else up. A receipt comes for each operation, when all its bytes have landed; with the last the write has
settled. Closing a connection is a fence: nothing lands through it afterwards. NCCL is not used: it moves device memory
only, and both regions of an endpoint are host memory.
"""

from __future__ import annotations

import contextlib
import errno
import hmac
import logging
import os
import queue
import secrets
import select
import socket
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import msgspec
import numpy as np
import torch.distributed as dist

from kvtransfer import processes
from kvtransfer.gloo_pair import HANDSHAKE_BYTES, Line, Pair, Posted
from kvtransfer.processes import ProcessIdentity
from kvtransfer.rows import checked, operations
from kvtransfer.transport import Region, Rows, Settled, TransportError

log = logging.getLogger(__name__)

_CONNECT_S = 2.0  # the longest that `connect` holds its caller up
_HANDSHAKE_S = 10.0  # from a call to a connection that carries bytes
_STRANGERS = 64  # callers at once that have not shown yet that they know the secret
# After another host has refused us, a second refusal this much later counts as its endpoint's end.
_DOUBT_S = 5.0


class _Description(msgspec.Struct, frozen=True, tag="distributed", kw_only=True):
    endpoint: str
    secret: bytes
    host: str
    port: int
    landing_bytes: int
    process: ProcessIdentity


class _Hello(msgspec.Struct, frozen=True, array_like=True):
    """The first message of who calls. `writes`: what follows is a connection; else it only asks who is there."""

    endpoint: str
    target: str
    secret: bytes
    writes: bool


class _Welcome(msgspec.Struct, frozen=True, array_like=True):
    endpoint: str
    refusal: str = ""


class _Header(msgspec.Struct, frozen=True, array_like=True):
    ticket: int
    rows: bytes


class _Receipt(msgspec.Struct, frozen=True, array_like=True):
    ticket: int
    error: str = ""


@dataclass(slots=True)
class _Doubt:
    """About a peer whose process cannot be seen from here."""

    question: Future[bool | None]
    refused_since_s: float | None = None


class DistributedTransport:
    """See `kvtransfer.transport.Transport`. `staging` and `landing` may be empty."""

    name = "distributed/gloo"
    warning = ""

    def __init__(self, incarnation: str, staging: Region, landing: Region, host: str = "127.0.0.1") -> None:
        """`host`: the address or name by which peers reach this host. Raises TransportError."""
        if not dist.is_available() or not dist.is_gloo_available():
            raise TransportError("this build of PyTorch has no torch.distributed with gloo; install another")
        self.staging = staging
        self.landing = landing
        self.devices = f"tcp/{host}"
        self._listener = _listen(host)
        self._about = _Description(
            endpoint=f"{incarnation}/{uuid.uuid4().hex[:12]}",
            secret=secrets.token_bytes(16),
            host=host,
            port=self._listener.getsockname()[1],
            landing_bytes=landing.nbytes,
            process=processes.this_process(),
        )
        self._peers: dict[str, tuple[_Description, _Outgoing | None]] = {}
        self._doubts: dict[str, _Doubt] = {}
        self._asking = ThreadPoolExecutor(1, "kv-ask")
        self._settled: queue.SimpleQueue[Settled] = queue.SimpleQueue()
        self._next_ticket = 1
        self._watch = _Watch()
        # What the threads below share with the owner's.
        self._lock = threading.Lock()
        self._closed = False
        self._strangers = 0
        self._writers: dict[Line, str] = {}  # endpoints that have, or are about to have, a connection to us
        self._pairs: dict[Line, Pair] = {}
        self._buried: set[str] = set()
        self._outgoing: set[_Outgoing] = set()
        threading.Thread(target=self._accept, name="kv-accept", daemon=True).start()

    def describe(self) -> bytes:
        return msgspec.msgpack.encode(self._about)

    def connect(self, peer: str, description: bytes) -> None:
        try:
            about = msgspec.msgpack.decode(description, type=_Description)
        except msgspec.DecodeError as error:
            raise TransportError(f"{peer}: no description of a distributed endpoint: {error}") from error
        if about.endpoint == self._about.endpoint:
            raise TransportError(f"{peer}: that is this endpoint itself")
        writes = bool(self.staging.nbytes and about.landing_bytes)
        try:
            line = call(about, self._about.endpoint, writes, _CONNECT_S)
        except TransportError as error:
            raise TransportError(f"{peer} cannot be reached: {error}") from error
        outgoing = None
        if writes:
            outgoing = _Outgoing(self._about.endpoint, about, self.staging, self._settled, self._watch, line)
            with self._lock:
                self._outgoing = {other for other in self._outgoing if other.is_alive()} | {outgoing}
            outgoing.start()
        else:
            line.close()
        with self._lock:
            self._buried.discard(about.endpoint)
        self.disconnect(peer)
        self._peers[peer] = (about, outgoing)

    def disconnect(self, peer: str) -> None:
        known = self._peers.pop(peer, None)
        if known is None:
            return
        if known[1] is not None:
            known[1].finish()
        self._doubts.pop(known[0].endpoint, None)

    def write(self, peer: str, rows: Rows) -> int:
        known = self._peers.get(peer)
        if known is None:
            raise TransportError(f"{peer} is not connected")
        about, outgoing = known
        checked(rows, self.staging.nbytes, about.landing_bytes)
        assert outgoing is not None  # rows that pass need both regions
        ticket = self._next_ticket
        self._next_ticket += 1
        outgoing.post(ticket, rows.copy())
        return ticket

    def poll(self) -> list[Settled]:
        return [self._settled.get_nowait() for _ in range(self._settled.qsize())]

    def gone(self, peer: str) -> bool:
        """On this host: its process has ended. On another: twice, seconds apart, nothing listens at its port any more,
        or somebody else does; a host that does not answer is not gone. In both cases its connections are closed here
        first, and it may open no other (until it is connected again)."""
        known = self._peers.get(peer)
        if known is None:
            return False
        about = known[0]
        ended = processes.dead(about.process)
        if ended is None:
            ended = self._ended_elsewhere(about)
        if not ended:
            return False
        with self._lock:
            self._buried.add(about.endpoint)
            lines = [line for line, writer in self._writers.items() if writer == about.endpoint]
        for line in lines:
            self._dismiss(line)
        return True

    def close(self) -> None:
        """Ends the endpoint and its connections. Writes in flight settle with an error."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            lines, outgoing = list(self._writers), self._outgoing
        self._peers.clear()
        for line in lines:
            self._dismiss(line)
        for ends in outgoing:
            ends.close()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._asking.shutdown(wait=False, cancel_futures=True)
        self._watch.close()

    # ---- who calls us ----------------------------------------------------------------------------------------------

    def _accept(self) -> None:
        while not self._closed:
            try:
                sock, _ = self._listener.accept()
            except OSError as error:
                if not self._closed:
                    log.warning("a caller was lost: %s", error)
                    time.sleep(0.05)  # out of file numbers, perhaps: not in a tight loop
                continue
            with self._lock:
                room = self._strangers < _STRANGERS and not self._closed
                self._strangers += room
            if room:
                self._hear(sock)
            else:
                sock.close()

    def _hear(self, sock: socket.socket) -> None:
        try:
            line = Line(sock, time.monotonic() + _HANDSHAKE_S)
            threading.Thread(target=self._serve, args=(line,), name="kv-receive", daemon=True).start()
        except (OSError, RuntimeError) as error:  # it has hung up, or there can be no more threads
            log.warning("a caller was lost: %s", error)
            sock.close()
            with self._lock:
                self._strangers -= 1

    def _serve(self, line: Line) -> None:
        """One caller, from its hello until either side hangs up."""
        try:
            try:
                writes = self._greet(line)
            finally:
                with self._lock:
                    self._strangers -= 1
            if writes:
                pair = Pair(line, rank=1)
                with self._lock:
                    dismissed = line not in self._writers
                    self._pairs[line] = pair
                self._watch.add(line, self._dismiss)
                if not dismissed:
                    self._receive(line, pair)
        except TransportError as error:
            log.debug("a connection to %s ends: %s", self._about.endpoint, error)
        except Exception:
            log.exception("a connection to %s ends", self._about.endpoint)
        finally:
            self._watch.remove(line)
            self._dismiss(line)
            line.close()

    def _dismiss(self, line: Line) -> None:
        """Nothing lands through it any more, though its thread may not know for some minutes yet."""
        line.hang_up()
        with self._lock:
            self._writers.pop(line, None)
            pair = self._pairs.pop(line, None)
        if pair is not None:
            pair.close()

    def _greet(self, line: Line) -> bool:
        """Whether a connection follows. Who has got a welcome is entered before it can send anything else."""
        hello = line.receive(_Hello, HANDSHAKE_BYTES)
        refusal = ""
        known = hmac.compare_digest(hello.secret, self._about.secret)
        if hello.target != self._about.endpoint or not known:
            refusal = "another endpoint is here"
        with self._lock:
            if not refusal and hello.writes:
                if hello.endpoint in self._buried or self._closed:
                    refusal = "it takes this endpoint for gone, or is closing"
                else:
                    self._writers[line] = hello.endpoint
        line.send(_Welcome(self._about.endpoint if not refusal else "", refusal))
        return hello.writes and not refusal

    def _receive(self, line: Line, pair: Pair) -> None:
        while True:
            header = line.receive(_Header)
            try:
                rows = np.frombuffer(header.rows, dtype=np.uint64).reshape(-1, 3)
                # Offsets in its staging are its own business, but must not trip what checks both.
                checked(
                    np.column_stack([np.zeros(len(rows), np.uint64), rows[:, 1:]]),
                    1 << 62,
                    self.landing.nbytes,
                )
            except (ValueError, TransportError) as error:
                line.send(_Receipt(header.ticket, f"refused: {error}"))
                raise TransportError(f"rows outside of the landing memory: {error}") from error
            posted: deque[Posted] = deque()
            for operation in operations(rows):
                posted.append(pair.receive(operation, self.landing))
                if len(posted) == 2:
                    posted.popleft().wait()
                    line.send(_Receipt(header.ticket))
            while posted:
                posted.popleft().wait()
                line.send(_Receipt(header.ticket))

    # ---- who is gone -----------------------------------------------------------------------------------------------

    def _ended_elsewhere(self, about: _Description) -> bool:
        """Asks in another thread, and gives what is known so far."""
        doubt = self._doubts.get(about.endpoint)
        if doubt is not None and not doubt.question.done():
            return False
        since = doubt.refused_since_s if doubt is not None else None
        answer = doubt.question.result() if doubt is not None else None
        if answer is False:
            since = since if since is not None else time.monotonic()
            if time.monotonic() - since >= _DOUBT_S:
                return True
        else:
            since = None
        question = self._asking.submit(listens, about, self._about.endpoint)
        self._doubts[about.endpoint] = _Doubt(question, since)
        return False


class _Outgoing(threading.Thread):
    """The thread and the connection which write to one peer, in the order of `post`."""

    def __init__(
        self,
        endpoint: str,
        about: _Description,
        staging: Region,
        settled: queue.SimpleQueue[Settled],
        watch: _Watch,
        line: Line,
    ) -> None:
        super().__init__(name="kv-send", daemon=True)
        self._endpoint = endpoint
        self._about = about
        self._staging = staging
        self._settled = settled
        self._watch = watch
        self._line: Line | None = line
        self._pair: Pair | None = None
        self._closed = False
        self._posted: queue.SimpleQueue[tuple[int, Rows] | None] = queue.SimpleQueue()

    def post(self, ticket: int, rows: Rows) -> None:
        self._posted.put((ticket, rows))

    def finish(self) -> None:
        """Lets what was posted settle, then ends."""
        self._posted.put(None)

    def close(self) -> None:
        """Ends at once: what was posted settles with an error."""
        self._closed = True
        pair, line = self._pair, self._line
        if line is not None:
            line.hang_up()
        if pair is not None:
            pair.close()
        self.finish()

    def run(self) -> None:
        try:
            self._open()  # before the first write needs it
        except TransportError as error:
            log.warning("to %s: %s", self._about.endpoint, error)
            self._hang_up()
        while (posted := self._posted.get()) is not None:
            ticket, rows = posted
            settled = Settled(ticket)
            try:
                self._send(ticket, rows)
            except Exception as broken:
                settled = Settled(ticket, f"{self._about.endpoint}: {broken}")
                self._hang_up()  # nothing reads these bytes any more; the next write calls again
            self._settled.put(settled)
        self._hang_up()

    def _send(self, ticket: int, rows: Rows) -> None:
        line, pair = self._open()
        line.send(_Header(ticket, rows.tobytes()))
        posted: deque[Posted] = deque()
        for operation in operations(rows):
            posted.append(pair.send(operation, self._staging))
            if len(posted) == 2:
                self._received(line, ticket, posted.popleft())
        while posted:
            self._received(line, ticket, posted.popleft())

    def _received(self, line: Line, ticket: int, posted: Posted) -> None:
        receipt = line.receive(_Receipt, HANDSHAKE_BYTES)
        if receipt.error or receipt.ticket != ticket:
            raise TransportError(receipt.error or f"a receipt for {receipt.ticket}, not {ticket}")
        posted.wait()  # at an end by now: the other side has it all

    def _open(self) -> tuple[Line, Pair]:
        if self._closed:
            raise TransportError("the endpoint was closed")
        if self._line is None:
            self._line = call(self._about, self._endpoint, True, _HANDSHAKE_S)
        if self._pair is None:
            self._pair = Pair(self._line, rank=0)
            pair = self._pair
            self._watch.add(self._line, lambda _: pair.close())
        if self._closed:  # in the meantime, when it could not close what was not there yet
            raise TransportError("the endpoint was closed")
        return self._line, self._pair

    def _hang_up(self) -> None:
        line, pair = self._line, self._pair
        self._line = self._pair = None
        if line is not None:
            self._watch.remove(line)
        if pair is not None:
            pair.close()
        if line is not None:
            line.close()


class _Watch:
    """Says when a line has broken, also while its own thread waits for something else."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._watched: dict[int, tuple[Line, Callable[[Line], None]]] = {}
        self._epoll = select.epoll()
        self._end = os.eventfd(0, os.EFD_CLOEXEC)
        self._epoll.register(self._end, select.EPOLLIN)
        threading.Thread(target=self._run, name="kv-watch", daemon=True).start()

    def add(self, line: Line, broken: Callable[[Line], None]) -> None:
        with self._lock:
            self._watched[line.fileno()] = (line, broken)
            with contextlib.suppress(OSError, ValueError):  # closed: nobody will ask any more
                self._epoll.register(line.fileno(), select.EPOLLRDHUP | select.EPOLLONESHOT)

    def remove(self, line: Line) -> None:
        """Before it is closed: its number may soon be another line's."""
        with self._lock:
            if self._watched.pop(line.fileno(), None) is not None:
                with contextlib.suppress(OSError, ValueError):
                    self._epoll.unregister(line.fileno())

    def close(self) -> None:
        os.eventfd_write(self._end, 1)

    def _run(self) -> None:
        while True:
            for number, _ in self._epoll.poll():
                if number == self._end:
                    with self._lock:
                        self._epoll.close()
                    os.close(self._end)
                    return
                with self._lock:
                    line, broken = self._watched.get(number, (None, None))
                    if line is None or broken is None or not line.hung_up():
                        continue  # it was another line's number when this was told
                broken(line)


def call(about: _Description, endpoint: str, writes: bool, limit_s: float) -> Line:
    """A line to the endpoint that `about` describes, which has made us welcome. Raises TransportError."""
    deadline = time.monotonic() + limit_s
    try:
        sock = socket.create_connection((about.host, about.port), timeout=limit_s)
    except OSError as error:
        here = processes.same_host(about.process, processes.this_process())
        hint = (
            ""
            if here or not _loopback(about.host)
            else "; that is each host itself: advertise another address"
        )
        raise TransportError(f"{about.host}:{about.port}: {error}{hint}") from error
    line = Line(sock, deadline)
    try:
        line.send(_Hello(endpoint, about.endpoint, about.secret, writes))
        welcome = line.receive(_Welcome, HANDSHAKE_BYTES)
        if welcome.refusal or welcome.endpoint != about.endpoint:
            raise _Refused(f"{about.host}:{about.port}: {welcome.refusal or 'another endpoint is here'}")
    except BaseException:
        line.close()
        raise
    return line


def listens(about: _Description, endpoint: str) -> bool | None:
    """Whether the endpoint that `about` describes still listens there; None: there is no saying."""
    try:
        call(about, endpoint, False, _CONNECT_S).close()
    except TransportError as error:
        refused = isinstance(error.__cause__, ConnectionRefusedError)
        return False if refused or isinstance(error, _Refused) else None
    return True


class _Refused(TransportError):
    """Who is there is not, or no longer, who was called."""


def _listen(host: str) -> socket.socket:
    try:
        family, _, _, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
        try:
            return socket.create_server(address[:2], family=family, backlog=128)
        except OSError as error:
            if error.errno != errno.EADDRNOTAVAIL:
                raise
            # Peers reach this host by an address that is not its own, as behind a translated one.
            return socket.create_server(("", 0), family=family, backlog=128)
    except OSError as error:
        raise TransportError(f"the transport cannot listen at {host!r}: {error}") from error


def _loopback(host: str) -> bool:
    return host == "localhost" or host == "::1" or host.startswith("127.")
