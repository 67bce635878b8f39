"""W8A8 products of the NPU's own code against float products of the quantised factors."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from services.worker.flowserve.device.npu_linear import make_experts, make_linear

pytestmark = pytest.mark.usefixtures("npu_operators")

CPU = torch.device("cpu")


def quantised(rows: torch.Tensor) -> torch.Tensor:
    """Each row in steps of the 127th part of its largest magnitude."""
    scales = rows.abs().amax(-1, keepdim=True) / 127
    return (rows / scales).round() * scales


def swiglu(x: torch.Tensor) -> torch.Tensor:
    gate, up = x.chunk(2, -1)
    return torch.nn.functional.silu(gate) * up


def draw(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_w8a8_products() -> None:
    """Parts lie one below the other; one without a bias has zeros."""
    weight, bias, x = draw(40, 32, seed=0), draw(40, seed=1).bfloat16().float(), draw(9, 32, seed=2)
    bias[15:] = 0
    parts = [(weight[:15].numpy(), bias[:15].numpy()), (weight[15:].numpy(), None)]
    actual = make_linear(parts, (40, 32), "w8a8", CPU)(x.bfloat16())
    expected = quantised(x.bfloat16().float()) @ quantised(weight).T + bias
    torch.testing.assert_close(actual.float(), expected, atol=1e-2, rtol=2**-6)


def test_w8a8_experts() -> None:
    """So are those of a mixture, each row by its own experts."""
    gate_up, down, x = draw(3, 96, 32, seed=0), draw(3, 32, 48, seed=1), draw(4, 32, seed=2)
    chosen = torch.tensor([[0, 2], [2, 0], [0, 1], [1, 0]], dtype=torch.int32)
    weights = torch.tensor([[0.75, 0.25]] * 4)
    experts = make_experts(gate_up.numpy(), down.numpy(), (3, 32, 48), "w8a8", CPU)
    actual = experts(x.bfloat16(), weights, chosen).float()
    for row, found in enumerate(actual):
        rows = quantised(x[row].bfloat16().float())
        expected = torch.zeros(32)
        for weight, expert in zip(weights[row], chosen[row], strict=True):
            h = quantised(swiglu(quantised(gate_up[expert]) @ rows))
            expected += weight * (quantised(down[expert]) @ h)
        torch.testing.assert_close(found, expected, atol=0.05 * float(expected.abs().max()), rtol=0)


def test_weights_of_zero_are_zero() -> None:
    """An output without weights has no NaN."""
    product = make_linear([(np.zeros((16, 32), np.float32), None)], (16, 32), "w8a8", CPU)
    assert not product(draw(2, 32, seed=0).bfloat16()).any()
