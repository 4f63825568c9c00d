"""HTTP/1.1 answers and server-sent events from bytes, in whatever pieces they come. Pure: no sockets, no clock.

Called by `bench.http_client`. Small on purpose: what the generator spends on a streamed token is taken from the server
that it shares a machine with, and general HTTP libraries cost several times more. It reads what servers of
completions send: a status line, headers, and a body by length, in chunks, or up to the end of the connection.
Nothing is guessed: what is no HTTP/1.1 raises BadAnswer.
"""

from __future__ import annotations

from enum import Enum, auto

MAX_HEAD_BYTES = 64 << 10
MAX_LINE_BYTES = 16 << 20  # of one event: an answer that does not stream may be large, this is larger
_NO_BODY = (204, 304)


class BadAnswer(Exception):
    """What came is not HTTP/1.1, or no event stream."""


class _At(Enum):
    HEAD = auto()
    LENGTH = auto()
    CHUNK_SIZE = auto()
    CHUNK = auto()
    CHUNK_END = auto()
    TRAILER = auto()
    END_OF_CONNECTION = auto()
    DONE = auto()


class AnswerReader:
    """One answer. `status` is 0 until its head is here; `keep_alive`: whether the connection may be used again."""

    def __init__(self) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}  # names in lower case; of several equal ones the last
        self.keep_alive = False
        self._at = _At.HEAD
        self._left = 0
        self._rest = b""

    @property
    def complete(self) -> bool:
        return self._at is _At.DONE

    def feed(self, data: bytes) -> bytes:
        """The bytes of the body that are new with `data`. Raises BadAnswer."""
        if self._rest:
            data = self._rest + data
            self._rest = b""
        parts: list[bytes] = []
        at = 0
        while at < len(data):
            match self._at:
                case _At.CHUNK | _At.LENGTH:
                    part = data[at : at + self._left]
                    parts.append(part)
                    at += len(part)
                    self._left -= len(part)
                    if not self._left:
                        self._at = _At.CHUNK_END if self._at is _At.CHUNK else _At.DONE
                case _At.END_OF_CONNECTION:
                    parts.append(data[at:])
                    at = len(data)
                case _At.HEAD:
                    end = data.find(b"\r\n\r\n", at)
                    if end < 0:
                        break
                    self._head(data[at:end])
                    at = end + 4
                case _At.DONE:
                    raise BadAnswer(f"{len(data) - at} bytes after the end of the answer")
                case _:
                    end = data.find(b"\r\n", at)
                    if end < 0:
                        break
                    self._line(data[at:end])
                    at = end + 2
        if at < len(data):
            self._rest = data[at:]
            if len(self._rest) > MAX_HEAD_BYTES:
                raise BadAnswer(f"more than {MAX_HEAD_BYTES} bytes without the end of a line or head")
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def end_of_connection(self) -> bool:
        """The connection is closed; whether the answer is whole."""
        if self._at is _At.END_OF_CONNECTION:
            self._at = _At.DONE
        return self.complete

    def _line(self, line: bytes) -> None:
        """A line between chunks, or after the last one."""
        if self._at is _At.CHUNK_SIZE:
            size = line.partition(b";")[0].strip()  # what follows are extensions, which nobody uses
            if not size or len(size) > 15 or not all(char in b"0123456789abcdefABCDEF" for char in size):
                raise BadAnswer(f"{line[:60]!r} is no size of a chunk")
            self._left = int(size, 16)
            self._at = _At.CHUNK if self._left else _At.TRAILER
        elif self._at is _At.CHUNK_END:
            if line:
                raise BadAnswer(f"{line[:60]!r} where a chunk should end")
            self._at = _At.CHUNK_SIZE
        elif not line:
            self._at = _At.DONE

    def _head(self, head: bytes) -> None:
        first, *lines = head.decode("latin-1").split("\r\n")
        version, _, rest = first.partition(" ")
        code = rest[:3]
        if version not in ("HTTP/1.1", "HTTP/1.0") or not (
            len(code) == 3 and code.isascii() and code.isdigit()
        ):
            raise BadAnswer(f"{first[:60]!r} is no status line of HTTP/1.1")
        if 100 <= int(code) < 200:
            return  # an interim answer, the real one follows
        self.status = int(code)
        for line in lines:
            name, colon, value = line.partition(":")
            if not colon:
                raise BadAnswer(f"{line[:60]!r} is no header")
            self.headers[name.strip().lower()] = value.strip()
        said = self.headers.get("connection", "").lower()
        self.keep_alive = "close" not in said and (version == "HTTP/1.1" or "keep-alive" in said)
        self._body(self.headers.get("transfer-encoding", "").lower(), self.headers.get("content-length"))

    def _body(self, coding: str, length: str | None) -> None:
        """How long the body is, RFC 9112 section 6.3."""
        if self.status in _NO_BODY:
            self._at = _At.DONE
        elif coding:
            if coding != "chunked":
                raise BadAnswer(f"the transfer coding {coding!r} was not asked for")
            self._at = _At.CHUNK_SIZE
        elif length is not None:
            if not (length.isascii() and length.isdigit()):
                raise BadAnswer(f"{length!r} is no length")
            self._left = int(length)
            self._at = _At.LENGTH if self._left else _At.DONE
        else:
            self._at = _At.END_OF_CONNECTION
            self.keep_alive = False


class EventReader:
    """The data of server-sent events, as in the HTML standard; names, ids and comments are dropped."""

    def __init__(self) -> None:
        self._rest = b""
        self._lines: list[bytes] = []  # of the event that is not complete

    @property
    def mid_event(self) -> bool:
        return bool(self._rest or self._lines)

    def feed(self, data: bytes) -> list[bytes]:
        """The data of each event that is complete with `data`. Raises BadAnswer when one is endless."""
        if self._rest:
            data = self._rest + data
        if b"\r" in data:
            held = data.endswith(b"\r")  # half of a line's end, perhaps
            data = data[:-1] if held else data
            data = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
            tail = b"\r" if held else b""
        else:
            tail = b""
        *lines, rest = data.split(b"\n")
        self._rest = rest + tail
        if len(self._rest) > MAX_LINE_BYTES:
            raise BadAnswer(f"an event of more than {MAX_LINE_BYTES} bytes")
        events: list[bytes] = []
        for line in lines:
            if line.startswith(b"data:"):
                self._lines.append(line[6:] if line.startswith(b"data: ") else line[5:])
            elif not line and self._lines:
                events.append(self._lines[0] if len(self._lines) == 1 else b"\n".join(self._lines))
                self._lines = []
        return events
