"""Products with weights on a CUDA device: cuBLAS in float, int8 with scales by output and by row, mixtures of experts.

All take and give rows in the device's activations, read nothing back from the device, and so may be part of a graph.
This module must not know what the products are for.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import torch
import torch.nn.functional as functional

from services.worker.flowserve.decoder import Floats
from services.worker.flowserve.device.cpu_linear import quantise_rows
from services.worker.flowserve.device.device import Rows

_ROWS_AT_ONCE: Final = 4096  # of weights on their way to int8
_MIN_INT8_ROWS: Final = 32  # `torch._int_mm` on CUDA wants more than 16 rows,
_INT8_UNIT: Final = 8  # and inputs and outputs in eights
_GROUPED_UNIT: Final = 8  # inputs and outputs of a grouped product: 16 bytes
_GROUPED_CAPABILITIES: Final = (9, 10)


class CudaLinear:
    """Weights, rows and products in one float type."""

    def __init__(
        self, parts: Iterable[Rows], size: tuple[int, int], dtype: torch.dtype, place: torch.device
    ) -> None:
        self._weight = torch.empty(size, dtype=dtype, device=place)
        self._bias: torch.Tensor | None = None
        start = 0
        for weight, bias in parts:
            rows = slice(start, start + len(weight))
            self._weight[rows] = torch.from_numpy(weight).to(dtype)
            if bias is not None:
                if self._bias is None:
                    self._bias = torch.zeros(size[0], dtype=dtype, device=place)
                self._bias[rows] = torch.from_numpy(bias).to(dtype)
            start = rows.stop

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, self._weight, self._bias)


class CudaInt8Linear:
    """W8A8: weights quantised by output, rows as they come in, both symmetric and to the largest magnitude.

    y = float(sum) * row scale * weight scale + bias, in fp32, then rounded to the rows' type. The sum is exact in
    int32, so a row's result does not depend on the others. Rows, inputs and outputs are padded with zeros to what
    cuBLAS takes.
    """

    def __init__(self, parts: Iterable[Rows], size: tuple[int, int], place: torch.device) -> None:
        self._num_outputs, num_inputs = size
        self._pad = -num_inputs % _INT8_UNIT
        padded = (self._num_outputs + -self._num_outputs % _INT8_UNIT, num_inputs + self._pad)
        self._weight = torch.zeros(padded, dtype=torch.int8, device=place)
        self._scales = torch.zeros(self._num_outputs, device=place)
        self._bias: torch.Tensor | None = None
        start = 0
        for weight, bias in parts:
            rows = slice(start, start + len(weight))
            for some in torch.split(torch.from_numpy(weight), _ROWS_AT_ONCE):
                codes, scales = quantise_rows(some.to(place))
                self._weight[start : start + len(some), :num_inputs] = codes
                self._scales[start : start + len(some)] = scales.squeeze(1)
                start += len(some)
            if bias is not None:
                if self._bias is None:
                    self._bias = torch.zeros(self._num_outputs, device=place)
                self._bias[rows] = torch.from_numpy(bias).to(place)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        codes, scales = quantise_rows(x.float())
        codes = functional.pad(codes, (0, self._pad, 0, max(0, _MIN_INT8_ROWS - len(x))))
        sums = torch._int_mm(codes, self._weight.t())[: len(x), : self._num_outputs]
        y = sums.float().mul_(scales).mul_(self._scales)
        return (y if self._bias is None else y.add_(self._bias)).to(x.dtype)


class CudaExperts:
    """`device.Experts`: rows sorted by expert, and one grouped product for all.

    torch has that in bf16, and on compute capabilities 9 and 10 only; elsewhere its own fallback reads the counts back,
    which no graph can (pytorch#169970). So what is recorded there, and fp32, which is for comparing numbers, has every
    expert compute every row.

    `gate_up` is [experts, 2 * hidden, width], `down` [experts, width, hidden].
    """

    def __init__(
        self,
        gate_up: Iterable[Floats],
        down: Iterable[Floats],
        size: tuple[int, int, int],
        dtype: torch.dtype,
        place: torch.device,
    ) -> None:
        num_experts, width, hidden = size
        self._gate_up = torch.empty((num_experts, 2 * hidden, width), dtype=dtype, device=place)
        self._down = torch.empty((num_experts, width, hidden), dtype=dtype, device=place)
        for weights, parts in ((self._gate_up, gate_up), (self._down, down)):
            for weight, part in zip(weights, parts, strict=True):
                weight.copy_(torch.from_numpy(part).to(dtype))
        self._is_grouped = dtype == torch.bfloat16 and not (width | hidden) % _GROUPED_UNIT
        self._is_native = place.type != "cuda" or (
            torch.cuda.get_device_capability(place)[0] in _GROUPED_CAPABILITIES
        )

    def __call__(
        self, x: torch.Tensor, weights: torch.Tensor, chosen: torch.Tensor
    ) -> torch.Tensor:
        is_recorded = not self._is_native and torch.cuda.is_current_stream_capturing()
        if not self._is_grouped or is_recorded:
            return self._every(x, weights, chosen)
        num_chosen = chosen.shape[1]
        order = chosen.flatten().argsort(stable=True)  # places (row, choice), expert by expert
        experts = torch.arange(len(self._down), device=x.device)
        counts = (chosen.flatten() == experts.unsqueeze(1)).sum(dim=1)
        ends = counts.cumsum(0).to(torch.int32)
        rows = x[order // num_chosen]
        hidden = swiglu(functional.grouped_mm(rows, self._gate_up.mT, offs=ends))
        y = functional.grouped_mm(hidden, self._down.mT, offs=ends)
        placed = torch.empty_like(y).index_copy_(0, order, y).view(*chosen.shape, -1)
        return (placed.float() * weights.float().unsqueeze(2)).sum(dim=1).to(x.dtype)

    def _every(self, x: torch.Tensor, weights: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        total = torch.zeros(x.shape, device=x.device)
        for expert, (gate_up, down) in enumerate(zip(self._gate_up, self._down, strict=True)):
            share = (weights * (chosen == expert)).sum(dim=1, keepdim=True)
            total += share * functional.linear(swiglu(functional.linear(x, gate_up)), down)
        return total.to(x.dtype)


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """[T, 2 * hidden], the gate's half first -> silu(gate) * up, [T, hidden]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return functional.silu(gate) * up
