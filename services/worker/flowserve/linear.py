"""Matrix products with weights: plain float, and W8A8 with exact integer accumulation.

A `Linear` takes fp32 rows and gives fp32 rows; how the weights are kept is its own business. This module must not know
what the products are for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol

import torch
import torch.nn.functional as functional

DTYPES = ("w8a8", "fp32", "bf16")
GROUP = 192  # inputs that share a scale in W8A8, at most

Rows = tuple[torch.Tensor, torch.Tensor | None]  # weight [n, in] and bias [n], as stored


class Linear(Protocol):
    """x fp32 [T, in] -> fp32 [T, out]."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor: ...


class FloatLinear:
    """Weights and products in one float type (float32 or bfloat16). BLAS decides the order of the sums."""

    def __init__(self, parts: Iterable[Rows], size: tuple[int, int], dtype: torch.dtype) -> None:
        self._weight = torch.empty(size, dtype=dtype)
        self._bias = _fill(parts, size[0], lambda rows, part: self._weight[rows].copy_(part))

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        # [T, in] @ [in, out] -> [T, out]
        y = functional.linear(x.to(self._weight.dtype), self._weight).float()
        return y if self._bias is None else y.add_(self._bias)


class Int8Linear:
    """W8A8: symmetric int8 along the inputs, in groups of at most `GROUP`: in each, one scale per output channel and
    one per row of activations, found anew for each row.

    y[t, n] = b[n] + sum over groups g of (sum over k in g of q(x)[t, k] * q(W)[n, k]) * scale_x[t, g] * scale_W[n, g].
    The inner sum is exact in int32 and all else is element-wise or in the order of the groups, so a row's result does
    not depend on other rows. One group for all inputs would be faster by a fifth, but a single outlier then costs every
    other input its digits: on 1,500 tokens of prose SmolLM2's perplexity was 5.3 % above fp32's, in groups 0.2 %.
    """

    def __init__(self, parts: Iterable[Rows], size: tuple[int, int]) -> None:
        num_outputs, num_inputs = size
        self._group = group_size(num_inputs)
        num_groups = num_inputs // self._group
        self._weight = torch.empty(num_groups, num_outputs, self._group, dtype=torch.int8)
        self._scales = torch.empty(num_groups, num_outputs)
        self._bias = _fill(parts, num_outputs, self._quantise)

    def _quantise(self, rows: slice, part: torch.Tensor) -> None:
        codes, scales = quantise_rows(
            part.float().view(len(part), -1, self._group)
        )  # [n, G, group]
        self._weight[:, rows] = codes.transpose(0, 1)
        self._scales[:, rows] = scales.squeeze(-1).t()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        codes, scales = quantise_rows(
            x.reshape(len(x), -1, self._group)
        )  # [T, G, group], [T, G, 1]
        total: torch.Tensor | None = None
        for group, (weight, weight_scales) in enumerate(
            zip(self._weight, self._scales, strict=True)
        ):
            y = torch._int_mm(codes[:, group].contiguous(), weight.t()).float()  # [T, out]
            y.mul_(scales[:, group]).mul_(weight_scales)
            total = y if total is None else total.add_(y)
        assert total is not None
        return total if self._bias is None else total.add_(self._bias)


def group_size(num_inputs: int) -> int:
    """The largest divisor of `num_inputs` that is at most `GROUP`, in steps of 32; all inputs if there is none."""
    return next((size for size in range(GROUP, 31, -32) if num_inputs % size == 0), num_inputs)


def quantise_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """fp32 [..., n] -> int8 codes in -127..127 [..., n], fp32 scales [..., 1]; codes * scales is x to half a step."""
    scales = x.abs().amax(dim=-1, keepdim=True).clamp_min_(1e-20).div_(127.0)
    return x.div(scales).round_().to(torch.int8), scales


def make_linear(parts: Iterable[Rows], *, num_outputs: int, num_inputs: int, dtype: str) -> Linear:
    """One product out of several weights stacked along the outputs (q, k, v; gate, up).

    `parts` is consumed one by one, so that a lazy iterable keeps only one stored tensor alive at a time.
    """
    size = (num_outputs, num_inputs)
    if dtype == "w8a8":
        return Int8Linear(parts, size)
    return FloatLinear(parts, size, torch.bfloat16 if dtype == "bf16" else torch.float32)


def _fill(
    parts: Iterable[Rows], num_outputs: int, put: Callable[[slice, torch.Tensor], object]
) -> torch.Tensor | None:
    """Hands each weight to `put` with the rows it occupies; returns the stacked bias, fp32 [out], None without any."""
    bias: torch.Tensor | None = None
    start = 0
    for weight, part_bias in parts:
        rows = slice(start, start + weight.shape[0])
        put(rows, weight)
        if part_bias is not None:
            if bias is None:
                bias = torch.zeros(num_outputs)
            bias[rows] = part_bias.float()
        start = rows.stop
    return bias
