"""Matrix products with weights on the CPU, in torch: plain float, W8A8 with exact integer accumulation, a few outputs
in fp32, and many products of which each row needs few.

All take fp32 rows and give fp32 rows. This module must not know what the products are for.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as functional

from services.worker.flowserve.device.device import Linear, Rows
from services.worker.flowserve.quantise import GROUP, Bits, Bytes, Floats, unpack

_PRODUCTS_AT_ONCE = 1 << 20  # elements: their temporaries stay in cache


class FloatLinear:
    """Weights and products in one float type (float32 or bfloat16). BLAS decides the order of the sums.

    `parts` are stacked along the outputs (q, k, v; gate, up), and consumed one by one, so that a lazy iterable keeps
    only one stored tensor alive at a time.
    """

    def __init__(self, parts: Iterable[Rows], size: tuple[int, int], dtype: torch.dtype) -> None:
        self._weight = torch.empty(size, dtype=dtype)
        self._bias: torch.Tensor | None = None
        start = 0
        for weight, bias in parts:
            rows = slice(start, start + len(weight))
            self._weight[rows] = torch.from_numpy(weight)
            if bias is not None:
                if self._bias is None:
                    self._bias = torch.zeros(size[0])
                self._bias[rows] = torch.from_numpy(bias)
            start = rows.stop

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        # [T, in] @ [in, out] -> [T, out]
        y = functional.linear(x.to(self._weight.dtype), self._weight).float()
        return y if self._bias is None else y.add_(self._bias)


class Int8Linear:
    """W8A8 from packed weights (`quantise.py`), of which the outputs `rows` are wanted, in that order, and the groups
    `groups` of inputs.

    y = bias, then for each group of inputs, in order, y = y + float(sum) * weight scale * row scale, each operation
    rounded by itself. The sum is exact in int32 and all else is element-wise, so a row's result does not depend on
    other rows, and equals the native kernels' bit for bit. Inputs come in pieces of `piece` values (a head, or all),
    which are padded with zeros to whole groups as the weights are.
    """

    def __init__(
        self,
        codes: Bytes,
        scales: Bits,
        bias: Floats | None,
        *,
        rows: npt.NDArray[np.intp],
        piece: int,
        groups: slice = slice(None),
    ) -> None:
        plain, plain_scales = unpack(codes, scales)
        grouped = plain[rows].reshape(len(rows), -1, GROUP)[:, groups].transpose(1, 0, 2)
        self._weight = torch.from_numpy(np.ascontiguousarray(grouped))  # [G, out, 32]
        self._scales = torch.from_numpy(
            np.ascontiguousarray(plain_scales[rows].T[groups])
        )  # [G, out]
        self._bias = torch.zeros(len(rows)) if bias is None else torch.from_numpy(bias[rows])
        self._piece = piece

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        pieces = x.reshape(len(x), -1, self._piece)
        whole = functional.pad(pieces, (0, -self._piece % GROUP))
        codes, scales = quantise_rows(whole.view(len(x), -1, GROUP))  # [T, G, 32], [T, G, 1]
        y = self._bias.expand(len(x), -1).clone()
        for group, (weight, weight_scales) in enumerate(
            zip(self._weight, self._scales, strict=True)
        ):
            sums = torch._int_mm(codes[:, group].contiguous(), weight.t())  # int32 [T, out]
            y.add_(sums.float().mul_(weight_scales).mul_(scales[:, group]))
        return y


class RowLinear:
    """A few outputs in fp32, whose sums are taken row by row: a row's result depends on no other row, bit for bit,
    which no BLAS promises. Slow, so for routers of experts only."""

    def __init__(self, weight: Floats) -> None:
        self._weight = torch.tensor(weight)  # [out, in]
        self._rows_at_once = max(1, _PRODUCTS_AT_ONCE // weight.size)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        parts = torch.split(x.unsqueeze(1), self._rows_at_once)
        return torch.cat([(part * self._weight).sum(dim=-1) for part in parts])


class SparseLinears:
    """Several functions of rows, of which each row goes through a few: `device.Experts` on the CPU.

    Rows that chose the same expert go through it together. A row's results are added up in the order of its choices,
    so if the experts do not let a row see the others, nor does this.
    """

    def __init__(self, experts: Sequence[Linear]) -> None:
        self._experts = experts

    def __call__(
        self, x: torch.Tensor, weights: torch.Tensor, chosen: torch.Tensor
    ) -> torch.Tensor:
        num_rows, num_chosen = chosen.shape
        order = chosen.flatten().argsort(stable=True)  # places (row, choice), expert by expert
        counts = chosen.flatten().bincount(minlength=len(self._experts)).tolist()
        y = x.new_empty(num_rows * num_chosen, x.shape[1])
        for expert, places in zip(self._experts, torch.split(order, counts), strict=True):
            if len(places):
                y[places] = expert(x[places // num_chosen])
        y = y.view(num_rows, num_chosen, -1).mul_(weights.unsqueeze(2))
        total = y[:, 0].clone()
        for choice in range(1, num_chosen):
            total.add_(y[:, choice])
        return total


def quantise_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """fp32 [..., n] -> int8 codes in -127..127 [..., n], fp32 scales [..., 1]; codes * scales is x to half a step."""
    scales = x.abs().amax(dim=-1, keepdim=True).clamp_min_(1e-20).div_(127.0)
    return x.mul(scales.reciprocal()).round_().clamp_(-127, 127).to(torch.int8), scales
