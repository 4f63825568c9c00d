"""Both clients against a scripted server on a real socket: streaming, asking again, resuming, refusals, garbage."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from baton import (
    AsyncClient,
    BatonError,
    BrokenAnswer,
    Client,
    DeadlineExceeded,
    Delta,
    InvalidRequest,
    NoRoom,
    Retry,
    Unavailable,
)
from tests.baton.scripted import QUICK, Driver, Server, Step, finished, hang, refuse, tokens

WHOLE = [tokens(0, 7), tokens(1, 8, 9), finished(3)]


@pytest.fixture(params=["sync", "async"])
def driver(request: pytest.FixtureRequest) -> Driver:
    return Driver(request.param)


# ---- answers -----------------------------------------------------------------------------------------------------


def test_generate(driver: Driver) -> None:
    with Server([tokens(0, 7), tokens(1, 8, text=""), finished(2, "length", text="8!")]) as server:
        answer = driver.generate(server.address, "hello", temperature=0.0, max_tokens=2, request_id="r1")
    assert (answer.text, answer.token_ids, answer.reason) == ("7 8!", [7, 8], "length")
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.cached_tokens) == (
        5,
        2,
        2,
    )
    assert answer.usage.total_tokens == 7
    assert answer.trace.decode_worker == "decode-0"
    assert (answer.request_id, answer.seed, answer.calls) == ("r1", None, 1)
    (call,) = server.calls
    assert call.request.text == "hello" and call.request.request_id == "r1"
    assert not call.request.sampling.HasField("seed")


def test_stream(driver: Driver) -> None:
    with Server(WHOLE) as server:
        deltas, answer = driver.stream(server.address, [1, 2, 3])
    assert deltas == [Delta(0, [7], "7 "), Delta(1, [8, 9], "8 9 ")]
    assert (answer.text, answer.token_ids) == ("7 8 9 ", [7, 8, 9])
    assert list(server.calls[0].request.token_ids.ids) == [1, 2, 3]


def test_deltas_come_as_they_are_sent(driver: Driver) -> None:
    arrived = threading.Event()
    script: list[Step] = [tokens(0, 7), lambda call: _wait(arrived), tokens(1, 8), finished(2)]
    with Server(script) as server:
        deltas, _ = driver.stream(server.address, seen=lambda delta: arrived.set())
    assert len(deltas) == 2


def test_every_sampling_field_arrives(driver: Driver) -> None:
    with Server(WHOLE) as server:
        driver.generate(
            server.address,
            temperature=0.5,
            top_k=3,
            top_p=0.25,
            seed=2**64 - 1,
            max_tokens=4,
            stop="end",
            stop_token_ids=[5, 6],
            ignore_eos=True,
            model="m",
        )
    request = server.calls[0].request
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p) == (0.5, 3, 0.25)
    assert (sampling.seed, sampling.max_tokens, list(sampling.stop)) == (2**64 - 1, 4, ["end"])
    assert (list(sampling.stop_token_ids), sampling.ignore_eos, request.model) == ([5, 6], True, "m")


def test_the_client_draws_seeds(driver: Driver) -> None:
    with Server(WHOLE) as server:
        one, other = (driver.generate(server.address, temperature=1.0) for _ in range(2))
    assert one.seed != other.seed
    assert [call.request.sampling.seed for call in server.calls] == [one.seed, other.seed]
    assert server.calls[0].request.request_id != server.calls[1].request.request_id


def test_models_status_health(driver: Driver) -> None:
    with Server(WHOLE) as server:
        assert driver.look(server.address) == (["m"], "r", True)
        server.serving = False
        assert driver.look(server.address) == (["m"], "r", False)


def test_nobody_is_not_healthy() -> None:
    with Server() as server:
        pass
    with Client(server.address) as client:
        assert not client.health()
        with pytest.raises(Unavailable):
            client.status()

    async def healthy() -> bool:
        async with AsyncClient(server.address) as client:
            return await client.health()

    assert not asyncio.run(healthy())


def test_threads_share_a_client() -> None:
    with Server(WHOLE) as server, Client(server.address) as client, ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda n: client.generate(f"prompt {n}"), range(64)))
    assert all(answer.token_ids == [7, 8, 9] for answer in answers)
    assert {call.request.text for call in server.calls} == {f"prompt {n}" for n in range(64)}


async def test_many_at_once() -> None:
    with Server(WHOLE) as server:
        async with AsyncClient(server.address) as client:
            answers = await asyncio.gather(*(client.generate([n]) for n in range(64)))
    assert all(answer.token_ids == [7, 8, 9] for answer in answers)


# ---- asking again ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", ["UNAVAILABLE", "RESOURCE_EXHAUSTED"])
def test_asks_again_for_the_same(driver: Driver, code: str) -> None:
    with Server([refuse(code)], [refuse(code)], WHOLE) as server:
        answer = driver.generate(server.address, "p", top_k=4)
    assert (answer.token_ids, answer.calls) == ([7, 8, 9], 3)
    first, *others = (call.request for call in server.calls)
    assert first.sampling.HasField("seed")
    assert others == [first, first]


@pytest.mark.parametrize(
    ("code", "kind"),
    [("UNAVAILABLE", Unavailable), ("RESOURCE_EXHAUSTED", NoRoom), ("CANCELLED", Unavailable)],
)
def test_calls_are_bounded(driver: Driver, code: str, kind: type[BatonError]) -> None:
    with Server([refuse(code, "full")]) as server:
        with pytest.raises(kind, match="full") as raised:
            driver.generate(server.address, request_id="r9")
        assert len(server.calls) == QUICK.calls
    assert raised.value.request_id == "r9"


def test_waits_as_long_as_it_is_told(driver: Driver) -> None:
    with Server([refuse("RESOURCE_EXHAUSTED", retry_s=0.3)], WHOLE) as server:
        began = time.monotonic()
        driver.generate(server.address)
        assert time.monotonic() - began >= 0.3


def test_does_not_wait_past_its_deadline(driver: Driver) -> None:
    with Server([refuse("RESOURCE_EXHAUSTED", retry_s=60.0)], WHOLE) as server:
        began = time.monotonic()
        with pytest.raises(NoRoom) as raised:
            driver.generate(server.address, timeout_s=20.0)
        assert time.monotonic() - began < 10
    assert raised.value.retry_after_s == 60.0


def test_invalid_requests_are_not_repeated(driver: Driver) -> None:
    with Server([refuse("INVALID_ARGUMENT", "top_p must be ...", param="top_p")]) as server:
        with pytest.raises(InvalidRequest, match="top_p must be") as raised:
            driver.generate(server.address)
        assert raised.value.param == "top_p"
        assert len(server.calls) == 1


def test_other_errors_are_not_repeated(driver: Driver) -> None:
    with Server([refuse("INTERNAL", "oops")]) as server:
        with pytest.raises(BatonError, match="INTERNAL: oops"):
            driver.generate(server.address)
        assert len(server.calls) == 1


def test_nothing_listens(driver: Driver) -> None:
    with Server() as server:
        pass
    with pytest.raises(Unavailable):
        driver.generate(server.address)


def test_pauses_double_and_jitter() -> None:
    retry = Retry(first_s=0.1, longest_s=0.5)
    assert [retry.pause_s(made, 0.0, 1.0) for made in (1, 2, 3, 4)] == [0.1, 0.2, 0.4, 0.5]
    assert retry.pause_s(1, 0.0, 0.0) == 0.05
    assert 2.0 <= retry.pause_s(1, 2.0, 0.0) < retry.pause_s(1, 2.0, 0.9)


# ---- resuming ----------------------------------------------------------------------------------------------------


def test_resumes_after_a_break(driver: Driver) -> None:
    again = [tokens(0, 7, 8), tokens(2, 9, 10), finished(4)]
    with Server([tokens(0, 7), tokens(1, 8, 9), refuse("UNAVAILABLE")], again) as server:
        deltas, answer = driver.stream(server.address)
    assert deltas == [Delta(0, [7], "7 "), Delta(1, [8, 9], "8 9 "), Delta(3, [10], "10 ")]
    assert (answer.text, answer.token_ids, answer.calls) == ("7 8 9 10 ", [7, 8, 9, 10], 2)


def test_resumes_twice_and_from_behind(driver: Driver) -> None:
    """The second call breaks before it has caught up with the first."""
    breaks = refuse("UNAVAILABLE")
    scripts: list[list[Step]] = [
        [tokens(0, 7), tokens(1, 8, 9), breaks],
        [tokens(0, 7), breaks],
        [tokens(0, 7), tokens(1, 8), tokens(2, 9), tokens(3, 10), finished(4)],
    ]
    with Server(*scripts) as server:
        deltas, answer = driver.stream(server.address)
    assert [token_id for delta in deltas for token_id in delta.token_ids] == [7, 8, 9, 10]
    assert "".join(delta.text for delta in deltas) == answer.text == "7 8 9 10 "


def test_resumes_on_a_new_server(driver: Driver) -> None:
    """The connection breaks, and the port is answered again by somebody else."""
    first = Server([tokens(0, 7), hang])
    second: list[Server] = []

    def replace(delta: Delta) -> None:
        if not second:
            first.stop()
            second.append(Server(WHOLE, port=first.port))

    try:
        deltas, answer = driver.stream(first.address, seen=replace)
    finally:
        for server in second:
            server.stop()
    assert [delta.token_ids for delta in deltas] == [[7], [8, 9]]
    assert answer.calls > 1
    assert second[0].calls[0].request == first.calls[0].request


@pytest.mark.parametrize(
    "again",
    [
        [tokens(0, 7), tokens(1, 99, text="8 "), tokens(2, 9), finished(3)],
        [tokens(0, 7, text="other "), tokens(1, 8, 9), finished(3)],
        [tokens(0, 7, text="7 8 9 "), finished(1)],
        [tokens(0, 7), tokens(1, 8, 9, text=""), finished(3)],
    ],
    ids=["other token", "other text", "shorter", "less text"],
)
def test_an_answer_that_changed_is_an_error(driver: Driver, again: list[Step]) -> None:
    with Server([tokens(0, 7), tokens(1, 8, 9), refuse("UNAVAILABLE")], again) as server:
        with pytest.raises(BrokenAnswer):
            driver.stream(server.address)
        assert len(server.calls) == 2


# ---- ends --------------------------------------------------------------------------------------------------------


def test_deadline(driver: Driver) -> None:
    with Server([tokens(0, 7), hang]) as server:
        with pytest.raises(DeadlineExceeded):
            driver.generate(server.address, timeout_s=0.3)
        assert server.calls[0].ended.wait(10)
        assert len(server.calls) == 1


def test_leaving_early_cancels(driver: Driver) -> None:
    with Server([tokens(0, 7), hang]) as server:
        assert driver.leave_after_one(server.address).token_ids == [7]
        assert server.calls[0].ended.wait(10)


def test_leaving_cancels_while_the_client_stays_open() -> None:
    with Server([tokens(0, 7), hang]) as server, Client(server.address) as client:
        with client.stream("p") as stream:
            next(stream)
            with pytest.raises(RuntimeError, match="not complete"):
                _ = stream.completion
        assert server.calls[0].ended.wait(10)
        assert list(stream) == []


def test_another_thread_closes_a_stream() -> None:
    with Server([tokens(0, 7), hang]) as server, Client(server.address) as client:
        stream = client.stream("p")
        threading.Timer(0.2, stream.close).start()
        assert [delta.token_ids for delta in stream] == [[7]]
        assert server.calls[0].ended.wait(10)


def test_closing_ends_a_pause() -> None:
    with Server([refuse("RESOURCE_EXHAUSTED", retry_s=15.0)]) as server, Client(server.address) as client:
        stream = client.stream("p")
        threading.Timer(0.3, stream.close).start()
        began = time.monotonic()
        assert list(stream) == []
        assert time.monotonic() - began < 10
        assert len(server.calls) == 1


async def test_a_cancelled_task_cancels_the_request() -> None:
    with Server([tokens(0, 7), hang]) as server:
        async with AsyncClient(server.address) as client:
            task = asyncio.create_task(client.generate("p"))
            while not server.calls:
                await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert await asyncio.to_thread(server.calls[0].ended.wait, 10)


# ---- garbage -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "script",
    [
        [b"\xff\xff\xff\xff"],
        [b""],
        [tokens(1, 7), finished(1)],
        [tokens(0, 7), tokens(0, 7), finished(2)],
        [tokens(0, 7)],
        [],
        [tokens(0, 7), finished(5)],
        [tokens(0, 7), finished(1), tokens(1, 8)],
    ],
    ids=["no message", "empty", "gap", "twice", "no end", "nothing", "miscounted", "after the end"],
)
def test_garbage(driver: Driver, script: list[Step]) -> None:
    with Server(script) as server:
        with pytest.raises(BatonError) as raised:
            driver.generate(server.address, request_id="r1")
        assert len(server.calls) == 1
    assert not isinstance(raised.value, Unavailable | NoRoom)
    assert raised.value.request_id == "r1"


async def test_garbage_cancels_what_follows() -> None:
    """Also where nobody used `with`."""
    with Server([tokens(1, 7), hang]) as server:
        with Client(server.address) as client:
            stream = client.stream("p")
            with pytest.raises(BrokenAnswer):
                await asyncio.to_thread(next, stream)
            assert await asyncio.to_thread(server.calls[0].ended.wait, 10)
        async with AsyncClient(server.address) as other:
            answer = other.stream("p")
            with pytest.raises(BrokenAnswer):
                await anext(answer)
            assert await asyncio.to_thread(server.calls[1].ended.wait, 10)


def test_an_error_after_the_end_changes_nothing(driver: Driver) -> None:
    with Server([*WHOLE, refuse("UNAVAILABLE")]) as server:
        assert driver.generate(server.address).calls == 1


def test_what_no_message_can_hold(driver: Driver) -> None:
    with Server(WHOLE) as server:
        with pytest.raises(TypeError, match="top_q"):
            driver.generate(server.address, top_q=1)
        for asked in ({"prompt": [-1]}, {"prompt": "\ud800"}, {"top_k": -1}, {"seed": 2**64}):
            with pytest.raises(InvalidRequest):
                driver.generate(server.address, **asked)
        assert not server.calls


def test_importing_baton_is_light() -> None:
    check = (
        "import sys, baton\n"
        "assert 'grpc' not in sys.modules, 'importing baton loads gRPC'\n"
        "from baton import Client, AsyncClient\n"
        "assert not {'torch', 'numpy', 'ray'} & set(sys.modules)\n"
        "assert all(hasattr(baton, name) for name in baton.__all__)\n"
    )
    subprocess.run([sys.executable, "-c", check], check=True, timeout=60)


def _wait(event: threading.Event) -> None:
    assert event.wait(10)
