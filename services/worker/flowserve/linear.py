"""Matrix products with weights on the CPU, in torch: plain float, and W8A8 with exact integer accumulation.

Both take fp32 rows and give fp32 rows. This module must not know what the products are for.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as functional

from services.worker.flowserve.device.device import Rows
from services.worker.flowserve.quantise import GROUP, Bits, Bytes, Floats, unpack


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


def quantise_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """fp32 [..., n] -> int8 codes in -127..127 [..., n], fp32 scales [..., 1]; codes * scales is x to half a step."""
    scales = x.abs().amax(dim=-1, keepdim=True).clamp_min_(1e-20).div_(127.0)
    return x.mul(scales.reciprocal()).round_().clamp_(-127, 127).to(torch.int8), scales
