"""KV that crosses in 8 bits still answers: the demo model recalls from it, where a wrong scale would show."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.kv_dtypes import Crossing, measure
from benchmarks.recall import accuracy, make_questions
from kvtransfer import transcode

FOLDER = Path(__file__).resolve().parents[2] / "models" / "baton-demo"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (FOLDER / "model.safetensors").exists(), reason="the demo model is not here"),
]


@pytest.fixture(scope="module")
def crossing() -> Crossing:
    torch.set_num_threads(1)
    return Crossing(FOLDER, most_tokens=320)


def test_recall_survives_8_bits_and_stored_bits_change_nothing(crossing: Crossing) -> None:
    questions = make_questions(7, (256,), 8, crossing.tokenizer)
    stored, narrower, int8, fp8 = measure(crossing, questions)
    assert stored.relative_error == 0 and stored.worst_logit == 0 and stored.same_replies == 8
    assert accuracy(stored.questions) == 1.0
    assert 0 < narrower.relative_error < 0.003
    assert 0.001 < int8.relative_error < 0.02 and 0.01 < fp8.relative_error < 0.04
    assert int8.worst_error < 1 / 250 and fp8.worst_error < 1 / 27
    for tally in (narrower, int8, fp8):
        assert tally.same_replies >= 7 and accuracy(tally.questions) >= 7 / 8, tally


def test_a_wrong_scale_is_a_wrong_answer(crossing: Crossing, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each group is given its neighbour's scale: what the test above looks at would notice."""
    decode = transcode.decode

    def shifted(codes: torch.Tensor, scales: torch.Tensor, wire_dtype: str) -> torch.Tensor:
        return decode(codes, scales.roll(1, dims=0) * 4, wire_dtype)

    monkeypatch.setattr(transcode, "decode", shifted)
    questions = make_questions(7, (256,), 4, crossing.tokenizer)
    _, broken = measure(crossing, questions, ["int8"])
    assert broken.relative_error > 1 and accuracy(broken.questions) < 0.5
