"""The packed linear layer: right for every number of rows, and few shapes reach oneDNN, which keeps code for each."""

from __future__ import annotations

import pytest
import torch

from engine import linear


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_number_of_rows(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight, bias = torch.randn(48, 32).to(dtype), torch.randn(48).to(dtype)
    layer = linear.Linear(weight.clone(), bias)
    layer.pack()
    for rows in (*range(1, 70), 129, 255, 512):
        x = torch.randn(rows, 32).to(dtype)
        y = layer(x)
        assert y.shape == (rows, 48)
        torch.testing.assert_close(y, torch.nn.functional.linear(x, weight, bias), atol=2e-2, rtol=2e-2)


def test_few_shapes_and_little_waste() -> None:
    shapes = [linear.padded_rows(rows) for rows in range(1, 2049)]
    assert all(padded >= rows for rows, padded in enumerate(shapes, 1))
    assert shapes[:16] == list(range(1, 17))
    assert max(padded / rows for rows, padded in enumerate(shapes, 1)) <= 1.125
    assert len(set(shapes)) < 80
