"""Records of decisions: repeated they are the same, joined with outcomes, bounded, written and read back."""

from __future__ import annotations

import tempfile
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.api import HandoffCost, Trace
from router import decision_file
from router.account import Account
from router.decision_file import DecisionFile, DecisionFileError, FrameEncoder, read
from router.decisions import DecisionLog, Record
from router.explain import candidates, explanation, predicted_ttft_s, replay, same
from router.policies import POLICIES
from router.policy import Ask, choose
from router.view import ClusterView


def random_cluster(rng: np.random.Generator) -> ClusterView:
    cluster = ClusterView()
    decode = [f"d{at}" for at in range(rng.integers(1, 5))]
    prefill = [f"p{at}" for at in range(rng.integers(0, 5))]
    cluster.set_workers(decode, prefill)
    for book, ids in ((cluster.decode, decode), (cluster.prefill, prefill)):
        for worker_id in ids:
            book.set_usable(worker_id, bool(worker_id == "d0" or rng.random() < 0.8))
            book.report(worker_id, float(rng.integers(0, 9)))
            numbers = {name: float(rng.integers(0, 4000)) for name in ("waiting_tokens", "kv_tokens")}
            book.tell(worker_id, numbers | {"running": float(rng.integers(0, 60)), "busy": rng.random()})
            for _ in range(rng.integers(0, 9)):
                book.count_target(worker_id, float(rng.random()), 1)
    for worker_id in decode:
        cluster.told_handoffs(worker_id, [HandoffCost(peer, rng.random() / 50, 1e-9) for peer in prefill])
    cluster.local_spread = (1.0, 1.0 + float(rng.random()), 3.0)
    cluster.last_remote = bool(rng.random() < 0.5)
    cluster.decided = int(rng.integers(0, 100))
    return cluster


def random_ask(rng: np.random.Generator, cluster: ClusterView, request_id: str) -> Ask:
    prompt = int(rng.integers(1, 4000))
    cached = [rng.integers(0, prompt, len(pool.ids)) for pool in (cluster.view.decode, cluster.view.prefill)]
    if rng.random() < 0.3:
        cached = [np.zeros(0, dtype=np.int64)] * 2
    return Ask(
        prompt,
        prompt - 1,
        256,
        4,
        bool(rng.random() < 0.05),
        decode_cached=cached[0],
        prefill_cached=cached[1],
        request_id=request_id,
        ttft_s=float(rng.random() + 0.01),
        itl_s=float(rng.random() / 5 + 0.001),
    )


def decide(log: DecisionLog, policy: str, seed: int, number: int) -> tuple[ClusterView, Record]:
    rng = np.random.default_rng((seed, number))
    cluster = random_cluster(rng)
    ask = random_ask(rng, cluster, f"r{number}")
    decision = choose(POLICIES[policy], ask, cluster.view, 1.5 * number)
    log.decided(ask, cluster.view, 1.5 * number, 1e9 + number, policy, decision)
    record = log.find(f"r{number}")
    assert record is not None
    # What the policy saw goes on changing.
    for worker_id in cluster.view.decode.ids:
        cluster.decode.expect(worker_id, 9.0, 5000, 1e6, 5000)
        cluster.decode.count_target(worker_id, 0.001, 1)
    return cluster, record


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(sorted(POLICIES)))
def test_recorded_views_replayed_give_equal_decisions(seed: int, policy: str) -> None:
    log = DecisionLog(1 << 30)
    records = [decide(log, policy, seed, number)[1] for number in range(5)]
    for record, again in replay(records, POLICIES[policy]):
        assert again == record.decision


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6))
def test_records_in_a_file_are_the_same_when_read_back(seed: int) -> None:
    log, encoder = DecisionLog(1 << 30), FrameEncoder()
    policies = sorted(POLICIES)
    written = [decide(log, policies[number % len(policies)], seed, number)[1] for number in range(8)]
    with tempfile.TemporaryDirectory() as folder:  # a fixture would be one for all examples
        path = Path(folder) / "decisions.log"
        path.write_bytes(b"".join(encoder.frames(record) for record in written))
        found = list(read(path))
    assert [one.view_digest for one in found] == [one.view_digest for one in written]
    for one, other in zip(found, written, strict=True):
        assert (one.decision, one.ask, one.at, one.policy) == (
            other.decision,
            other.ask,
            other.at,
            other.policy,
        )
        ((_, again),) = replay([one], POLICIES[one.policy])
        assert again == other.decision


def _account(record: Record, **changes: object) -> Account:
    account = Account(record.request_id, decision=record.decision, arrived=10.0)
    account.ended, account.outcome, account.first_token = 12.0, "stop", 10.5
    account.trace = Trace(prefilled="remote", cached_tokens=16, remote_tokens=32, handoff_s=0.25)
    return account


def test_the_outcome_joins_its_decision() -> None:
    log = DecisionLog(1 << 30)
    _, record = decide(log, "cost", 1, 1)
    log.ended(Account("another"))
    assert not explanation(record).HasField("outcome")
    log.ended(_account(record))
    told = explanation(record)
    assert (told.outcome.outcome, told.outcome.ttft_s, told.outcome.e2e_s) == ("stop", 0.5, 2.0)
    assert (told.outcome.prefilled, told.outcome.remote_tokens) == ("remote", 32)


def test_an_end_of_an_earlier_request_of_the_same_id_is_not_joined() -> None:
    log = DecisionLog(1 << 30)
    _, first = decide(log, "cost", 1, 1)
    _, second = decide(log, "always-local", 2, 1)
    log.ended(_account(first))
    assert second.outcome is None and len(log) == 1


def test_the_ring_is_bounded_by_bytes_and_forgets_the_oldest() -> None:
    _, record = decide(DecisionLog(1 << 30), "cost", 0, 0)
    written: list[Record] = []
    log = DecisionLog(10 * record.size_bytes, written.append)
    for number in range(100):
        decide(log, "cost", number, number)
        assert sum(one.size_bytes for one in log._records.values()) == log._bytes <= log.max_bytes
    assert log.find("r99") is not None and log.find("r0") is None
    assert [one.request_id for one in written] == [f"r{number}" for number in range(100 - len(log))]
    log.close()
    assert len(written) == 100 and not len(log)


def test_without_memory_nothing_is_kept() -> None:
    log = DecisionLog(0)
    cluster = random_cluster(np.random.default_rng(0))
    ask = random_ask(np.random.default_rng(1), cluster, "r")
    decision = choose(POLICIES["cost"], ask, cluster.view, 0.0)
    log.decided(ask, cluster.view, 0.0, 0.0, "cost", decision)
    assert log.find("r") is None


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6))
def test_candidates_have_the_chosen_one_once_and_the_best_first(seed: int) -> None:
    _, record = decide(DecisionLog(1 << 30), "cost", seed, 0)
    found = candidates(record)
    (chosen,) = [one for one in found if one.chosen]
    decision = record.decision
    assert (chosen.decode_worker, chosen.prefill_worker) == (
        decision.decode_worker,
        decision.prefill_worker or "",
    )
    assert [one.score for one in found] == sorted(one.score for one in found)
    assert len({(one.decode_worker, one.prefill_worker) for one in found}) == len(found)
    if not record.ask.prompt_logprobs:
        assert chosen.ttft_s == pytest.approx(decision.ttft_s)
        assert predicted_ttft_s(record, decision) == pytest.approx(decision.ttft_s)
    for one in found:
        assert one.ttft_s >= one.wait_s + one.compute_s + one.handoff_s + one.tail_s - 1e-9


def test_another_policy_may_decide_otherwise() -> None:
    log = DecisionLog(1 << 30)
    records = [decide(log, "always-remote", 3, number)[1] for number in range(20)]
    remote = [one for one in records if one.decision.prefill_worker is not None]
    pairs = list(replay(remote, POLICIES["always-local"]))
    assert pairs and not any(same(record.decision, other) for record, other in pairs)


# ---- files -------------------------------------------------------------------------------------------------------


def test_a_file_is_written_by_its_thread_and_rotates(tmp_path: Path) -> None:
    path = tmp_path / "new" / "decisions.log"
    file = DecisionFile(path, 20_000)
    log = DecisionLog(1 << 30, file.write)
    for number in range(30):
        _, record = decide(log, "cost", number, number)
        log.ended(_account(record))
    log.close()
    file.close()
    assert not file.dropped
    newer, older = list(read(path)), list(read(path.with_name("decisions.log.1")))
    assert older and [one.request_id for one in older + newer] == [
        f"r{number}" for number in range(30 - len(older) - len(newer), 30)
    ]
    assert all(one.outcome is not None for one in older)
    assert path.stat().st_size < 40_000


def test_a_new_life_keeps_the_file_of_the_last(tmp_path: Path) -> None:
    path = tmp_path / "decisions.log"
    for life in range(2):
        file = DecisionFile(path, 1 << 20)
        file.write(decide(DecisionLog(1 << 30), "cost", life, life)[1])
        file.close()
    assert [one.request_id for one in read(path)] == ["r1"]
    assert [one.request_id for one in read(path.with_name("decisions.log.1"))] == ["r0"]


def test_what_the_thread_cannot_keep_up_with_is_dropped_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decision_file, "WAITING", 2)
    held = threading.Event()
    frames = FrameEncoder.frames

    def slow(self: FrameEncoder, record: Record) -> bytes:
        held.wait(10)
        return frames(self, record)

    monkeypatch.setattr(FrameEncoder, "frames", slow)
    file = DecisionFile(tmp_path / "d.log", 1 << 20)
    record = decide(DecisionLog(1 << 30), "cost", 0, 0)[1]
    for _ in range(6):
        file.write(record)
    held.set()
    file.close()
    assert 3 <= file.dropped <= 4
    assert len(list(read(tmp_path / "d.log"))) == 6 - file.dropped


def test_an_unfinished_last_frame_is_the_end(tmp_path: Path) -> None:
    log, encoder = DecisionLog(1 << 30), FrameEncoder()
    whole = b"".join(encoder.frames(decide(log, "cost", 5, number)[1]) for number in range(3))
    (tmp_path / "d.log").write_bytes(whole[:-7])
    assert [one.request_id for one in read(tmp_path / "d.log")] == ["r0", "r1"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"this is some text, and no decision log at all", "no decision log, or damaged"),
        (b"\x03\x00\x00\x00abc", "no decision log, or damaged"),
    ],
)
def test_a_file_that_is_none_is_named(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "d.log"
    path.write_bytes(content)
    with pytest.raises(DecisionFileError, match=words) as error:
        list(read(path))
    assert str(path) in str(error.value)


def test_a_file_of_other_columns_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "d.log").write_bytes(FrameEncoder().frames(decide(DecisionLog(1 << 30), "cost", 5, 0)[1]))
    monkeypatch.setattr(decision_file, "VERSION", 2)
    with pytest.raises(DecisionFileError, match="another release"):
        list(read(tmp_path / "d.log"))
