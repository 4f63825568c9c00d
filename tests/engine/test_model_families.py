"""Every family and rotary embedding against transformers: the same greedy tokens however the engine goes about it.

Prompts reach far beyond the window (64) and beyond the original length of the stretched embeddings (256, 512).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from engine.api import SamplingParams
from engine.model_config import ModelConfig
from engine.rope_config import read_rope
from engine.rotary import Rotary, inverse_frequencies
from tests.conftest import Reference
from tests.support import families
from tests.support.local_engine import LocalEngine
from tests.support.models import REFERENCE_TOKENS, transformers_greedy

GREEDY = SamplingParams(temperature=0.0, max_tokens=REFERENCE_TOKENS)
LENGTHS = [1, 20, 63, 65, 200, 700]


@pytest.fixture(scope="module", params=families.FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reference]:
    folder = families.make_model(tmp_path_factory.mktemp("family"), request.param)
    prompts = families.prompts(LENGTHS)
    answers = transformers_greedy(folder, prompts)
    assert all(len(set(answer)) > 10 for answer in answers), "a model that repeats itself shows no faults"
    yield Reference(folder, prompts, answers)


@pytest.mark.parametrize("budget", [16, 128, 2048])
def test_together_and_chunked(family: Reference, budget: int) -> None:
    engine = LocalEngine(family.folder, budget=budget)
    assert engine.generate([(prompt, GREEDY) for prompt in family.prompts]) == family.answers


def test_alone_then_cached(family: Reference) -> None:
    engine = LocalEngine(family.folder)
    for prompt, answer in zip(family.prompts, family.answers, strict=True):
        assert engine.generate([(prompt, GREEDY)]) == [answer]
        before = engine.role.counters["cached_tokens"]
        assert engine.generate([(prompt, GREEDY)]) == [answer]
        assert engine.role.counters["cached_tokens"] - before == (len(prompt) - 1) // 16 * 16


def test_preempted(family: Reference) -> None:
    engine = LocalEngine(family.folder, blocks=66, budget=256)
    longest_first = [(prompt, GREEDY) for prompt in reversed(family.prompts)]
    assert engine.generate(longest_first) == family.answers[::-1]
    assert engine.role.scheduler.preemptions > 0


@pytest.mark.parametrize(
    "numbers",
    [
        {},
        {"factor": 1.0},
        {"truncate": False},
        {"truncate": False, "beta_fast": 4.0, "beta_slow": 4.0},  # the ramp has no width
        {"rope_theta": 1e6, "beta_slow": 64.0, "beta_fast": 128.0},
        {"mscale": 1.0},  # alone it counts for nothing
        {"mscale": 0.707, "mscale_all_dim": 1.0},
        {"attention_factor": 1.5, "mscale": 0.7, "mscale_all_dim": 1.0},
        {"original_max_position_embeddings": 8},
    ],
)
@pytest.mark.parametrize("head_dim", [16, 128])
def test_yarn_with_odd_numbers(numbers: dict[str, Any], head_dim: int) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
    rope |= numbers
    theirs = LlamaConfig(head_dim=head_dim, max_position_embeddings=256, rope_parameters=dict(rope))
    frequencies, attention_factor = ROPE_INIT_FUNCTIONS["yarn"](theirs)
    ours, _ = read_rope({"rope_parameters": rope}, 256)
    assert torch.equal(inverse_frequencies(ours, head_dim), frequencies)
    assert ours.attention_factor == attention_factor


def test_frequencies_are_those_of_transformers(family: Reference) -> None:
    """To the last bit, and the scale on cos and sin with them: greedy tokens would forgive a small difference."""
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(family.folder).model.rotary_emb
    config = ModelConfig.from_folder(family.folder)
    assert torch.equal(inverse_frequencies(config.rope, config.head_dim), theirs.inv_freq)
    positions = torch.arange(config.max_positions)
    cos, sin = theirs(torch.empty(0), positions.unsqueeze(0))
    ours = Rotary(config.rope, config.head_dim, torch.device("cpu"))(positions, torch.float32)
    half = config.head_dim // 2
    assert torch.equal(ours[0][:, 0], cos[0])
    assert torch.equal(ours[1][:, 0, half:], sin[0, :, half:])
    assert torch.equal(-ours[1][:, 0, :half], sin[0, :, :half])
