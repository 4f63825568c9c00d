"""Norms, rotary embedding with the cache's write, and SiLU * mul against what engine.model computes."""

from __future__ import annotations

import pytest
import torch

from engine.kernels.activation import silu_mul, silu_mul_reference
from engine.kernels.norm import rms_norm, rms_norm_reference
from engine.kernels.rope import angle_table, rotate_and_write, rotate_and_write_reference
from engine.rope_config import RopeConfig
from engine.rotary import Rotary

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def noise(*shape: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def assert_rounds_alike(got: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal but for a last bit here and there, where sums were added in another order; in fp32 to a few last bits."""
    if got.dtype == torch.float32:
        torch.testing.assert_close(got, expected, atol=2e-6, rtol=2e-6)
        return
    torch.testing.assert_close(
        got, expected, atol=2 * torch.finfo(got.dtype).eps, rtol=torch.finfo(got.dtype).eps
    )
    assert (got != expected).float().mean() < 0.01


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hidden", [1, 96, 128, 1000, 4096])
@pytest.mark.parametrize("added", [False, True])
def test_norms(dtype: torch.dtype, hidden: int, added: bool, device: torch.device) -> None:
    x, residual = (
        noise(5, hidden + 24, dtype=dtype, device=device, seed=s)[:, 8 : hidden + 8] for s in (1, 2)
    )
    weight = noise(hidden, dtype=dtype, device=device, seed=3)
    ours, theirs = residual.clone(), residual.clone()
    got = rms_norm(x, weight, 1e-5, torch.empty_like(x), ours if added else None)
    expected = rms_norm_reference(x.clone(), weight, 1e-5, torch.empty_like(x), theirs if added else None)
    assert_rounds_alike(got, expected)
    assert torch.equal(ours, theirs)
    assert torch.equal(ours, residual) != added


def test_a_norm_may_overwrite_its_input(device: torch.device) -> None:
    x, weight = noise(3, 64, dtype=torch.bfloat16, device=device), torch.ones(64, dtype=torch.bfloat16)
    expected = rms_norm(x, weight.to(device), 1e-6, torch.empty_like(x))
    assert torch.equal(rms_norm(x, weight.to(device), 1e-6, x), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(
    ("q_heads", "kv_heads", "dim"), [(4, 2, 32), (9, 3, 64), (2, 1, 96), (1, 1, 2), (14, 2, 128)]
)
def test_rotation_and_write(
    dtype: torch.dtype, normed: bool, q_heads: int, kv_heads: int, dim: int, device: torch.device
) -> None:
    rotary = Rotary(RopeConfig(theta=10000.0), dim, device)
    angles = angle_table(rotary, 500, dtype, device)
    tokens = 6
    fused = noise(tokens, q_heads + 2 * kv_heads, dim, dtype=dtype, device=device)
    positions = torch.tensor([0, 1, 499, 17, 3, 0], dtype=torch.int32, device=device)
    slots = torch.tensor([31, 0, 8, -1, 17, -1], dtype=torch.int64, device=device)
    weights = [noise(dim, dtype=dtype, device=device, seed=s) for s in (1, 2)]
    norms = (weights[0], weights[1]) if normed else None
    results = []
    for apply in (rotate_and_write, rotate_and_write_reference):
        cache = torch.full((2, 4, 8, kv_heads, dim), torch.nan, dtype=dtype, device=device)
        mine = fused.clone()
        q = apply(mine, positions, slots, angles, cache, norms, 1e-6)
        assert q.data_ptr() == mine.data_ptr() and q.shape == (tokens, q_heads, dim)
        results.append((mine, cache))
    (got, cache), (expected, expected_cache) = results
    assert_rounds_alike(got, expected)
    assert torch.equal(got[:, q_heads + kv_heads :], fused[:, q_heads + kv_heads :])
    assert torch.equal(cache.isnan(), expected_cache.isnan())
    flat = cache.view(2, 32, kv_heads, dim)
    written = slots >= 0
    assert torch.equal(flat[0, slots[written]], got[written, q_heads : q_heads + kv_heads])
    assert torch.equal(flat[1, slots[written]], fused[written, q_heads + kv_heads :])
    assert int((~cache.isnan()).sum()) == 2 * 4 * kv_heads * dim


@pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")  # wanted: silu there is 0
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 300, 1024, 2500])
def test_silu_mul(dtype: torch.dtype, width: int, device: torch.device) -> None:
    fused = noise(3, 2 * width, dtype=dtype, device=device) * 20
    fused[0, 0] = -30000.0
    got = silu_mul(fused, torch.empty(3, width, dtype=dtype, device=device))
    assert_rounds_alike(got, silu_mul_reference(fused, torch.empty_like(got)))


def test_what_does_not_fit_is_refused(device: torch.device) -> None:
    x = noise(2, 8, dtype=torch.float32, device=device)
    with pytest.raises(ValueError, match=r"weight of shape \(9,\) for rows of 8"):
        rms_norm(x, torch.ones(9, device=device), 1e-6, torch.empty_like(x))
    with pytest.raises(ValueError, match="last dimension must be contiguous"):
        rms_norm(x.t(), torch.ones(2, device=device), 1e-6, torch.empty_like(x.t()))
    with pytest.raises(ValueError, match=r"\(2, 8\) into \(2, 3\)"):
        silu_mul(x, torch.empty(2, 3, device=device))
    cache = torch.zeros(2, 1, 4, 1, 8, device=device)
    with pytest.raises(ValueError, match="2 fused heads hold no queries"):
        rotate_and_write(x.view(1, 2, 8), x, x, torch.zeros(1, 8, device=device), cache)
