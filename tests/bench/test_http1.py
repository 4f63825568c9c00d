"""Answers and events are the same however their bytes are cut."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.http1 import MAX_HEAD_BYTES, AnswerReader, BadAnswer, EventReader

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def pieces(data: bytes, cuts: list[int]) -> list[bytes]:
    at = sorted({cut % (len(data) + 1) for cut in cuts} | {0, len(data)})
    return [data[start:end] for start, end in pairwise(at)]


def read(data: bytes, cuts: list[int]) -> tuple[AnswerReader, bytes]:
    reader = AnswerReader()
    return reader, b"".join(reader.feed(piece) for piece in pieces(data, cuts))


cuts = st.lists(st.integers(0, 10_000), max_size=40)


@given(st.lists(st.binary(min_size=1, max_size=60), max_size=8), cuts, st.booleans())
def test_chunks(parts: list[bytes], at: list[int], trailer: bool) -> None:
    end = b"0;last=1\r\n" + b"Trailer: x\r\n" * trailer + b"\r\n"
    reader, body = read(CHUNKED + b"".join(map(chunk, parts)) + end, at)
    assert body == b"".join(parts)
    assert (reader.status, reader.complete, reader.keep_alive) == (200, True, True)
    assert reader.headers["content-type"] == "text/event-stream"


@given(st.binary(max_size=200), cuts)
def test_a_length(content: bytes, at: list[int]) -> None:
    reader, body = read(HEAD + b"content-length: %d\r\n\r\n" % len(content) + content, at)
    assert body == content and reader.complete


@given(st.binary(max_size=200), cuts)
def test_up_to_the_end_of_the_connection(content: bytes, at: list[int]) -> None:
    reader, body = read(HEAD + b"\r\n" + content, at)
    assert body == content and not reader.complete and not reader.keep_alive
    assert reader.end_of_connection()


def test_half_an_answer() -> None:
    for data in (
        b"",
        b"HTTP/1.1 200",
        CHUNKED,
        CHUNKED + b"5\r\nab",
        CHUNKED + chunk(b"abc"),
        CHUNKED + b"0\r\n",
    ):
        reader = AnswerReader()
        reader.feed(data)
        assert not reader.end_of_connection()


def test_interim_answers_are_passed_over_and_some_have_no_body() -> None:
    reader = AnswerReader()
    assert (
        reader.feed(
            b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\nHTTP/1.1 204 No\r\nContent-Length: 5\r\n\r\n"
        )
        == b""
    )
    assert reader.status == 204 and reader.complete


@pytest.mark.parametrize(
    ("head", "kept"),
    [
        (b"HTTP/1.1 200 OK\r\nConnection: close\r\n", False),
        (b"HTTP/1.0 200 OK\r\n", False),
        (b"HTTP/1.0 200 OK\r\nConnection: Keep-Alive\r\n", True),
        (b"HTTP/1.1 200 OK\r\n", True),
    ],
)
def test_whether_the_connection_is_kept(head: bytes, kept: bool) -> None:
    reader = AnswerReader()
    reader.feed(head + b"Content-Length: 0\r\n\r\n")
    assert reader.complete and reader.keep_alive == kept


@pytest.mark.parametrize(
    "data",
    [
        b"SSH-2.0-OpenSSH\r\n\r\n",
        b"HTTP/2 200\r\n\r\n",
        b"HTTP/1.1 2xx OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nno colon\r\n\r\n",
        HEAD + b"Transfer-Encoding: gzip\r\n\r\n",
        HEAD + b"Content-Length: -1\r\n\r\n",
        CHUNKED + b"zz\r\n",
        CHUNKED + b"-1\r\n",
        CHUNKED + b"\r\n",
        CHUNKED + b"1\r\nab\r\n",
        CHUNKED + b"0\r\n\r\nHTTP/1.1 200 OK\r\n",
        b"x" * (MAX_HEAD_BYTES + 1),
    ],
)
def test_what_is_no_answer(data: bytes) -> None:
    with pytest.raises(BadAnswer):
        AnswerReader().feed(data)


events = st.lists(
    st.lists(
        st.text(st.characters(codec="utf-8", exclude_characters="\r\n"), max_size=9), min_size=1, max_size=3
    ),
    max_size=6,
)


@given(events, st.sampled_from(["\n", "\r\n", "\r"]), cuts)
def test_events(wanted: list[list[str]], newline: str, at: list[int]) -> None:
    text = "".join(
        f": a comment{newline}id: 3{newline}" + "".join(f"data: {line}{newline}" for line in lines) + newline
        for lines in wanted
    )
    reader = EventReader()
    found = [event for piece in pieces(text.encode(), at) for event in reader.feed(piece)]
    if newline == "\r":  # the last one may be half of a \r\n
        found += reader.feed(b"\n")
    assert found == ["\n".join(lines).encode() for lines in wanted]
    assert not reader.mid_event


def test_a_space_after_the_colon_is_not_needed_and_an_open_event_is_seen() -> None:
    reader = EventReader()
    assert reader.feed(b"data:{}\n\ndata: half") == [b"{}"]
    assert reader.mid_event
    assert reader.feed(b"\n") == [] and reader.mid_event
    assert reader.feed(b"\n") == [b"half"]
