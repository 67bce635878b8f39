"""Products with weights on the NPU: bfloat16, W8A8, and those of a mixture of experts in either.

W8A8 here has one scale for each output of the weights and one for each row of activations, found as it goes, which is
what the NPU multiplies: `npu_dynamic_quant`, then `npu_quant_matmul`. Weights are stored by input, [in, out]: "推荐x2不
转置" (the latter's documentation). This module must not know what the products are for.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final

import torch
import torch.nn.functional as functional

from services.worker.flowserve.config import ModelError
from services.worker.flowserve.decoder import Floats
from services.worker.flowserve.device.device import Experts, Linear, Rows

MAX_SIDE: Final = 65535  # of a matrix that is multiplied
_COLUMNS_AT_ONCE: Final = 65024  # of such a matrix: a multiple of 512 below MAX_SIDE
_ROWS_AT_ONCE: Final = 8192  # that are quantised at once, in fp32
_FRACTAL_NZ: Final = 29
_MAX_QUANTISED_EXPERTS: Final = 128  # "长度最大为128", npu_grouped_matmul


def make_linear(
    parts: Iterable[Rows], size: tuple[int, int], dtype: str, place: torch.device
) -> Linear:
    """The product of `Device.linear`, in bf16 or w8a8."""
    num_outputs, num_inputs = size
    quantised = dtype == "w8a8"
    if quantised and num_inputs > MAX_SIDE:
        raise ModelError(f"the NPU quantises rows of up to {MAX_SIDE} values, not {num_inputs}")
    shape = (num_inputs, num_outputs) if quantised else size
    weight = torch.empty(shape, dtype=torch.int8 if quantised else torch.bfloat16, device=place)
    scales = torch.ones(num_outputs, device=place)
    biases: torch.Tensor | None = None
    first = 0
    for rows, bias in parts:
        end = first + len(rows)
        if quantised:
            weight[:, first:end], scales[first:end] = _by_output(rows, place)
        else:
            weight[first:end] = torch.from_numpy(rows).to(place)
        if bias is not None:
            biases = torch.zeros(num_outputs, device=place) if biases is None else biases
            biases[first:end] = torch.from_numpy(bias).to(place)
        first = end
    biases = None if biases is None else biases.bfloat16()
    return Int8Linear(weight, scales, biases) if quantised else FloatLinear(weight, biases)


class FloatLinear:
    """bf16 rows times bf16 weights [out, in]."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self._weight = weight
        self._bias = bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, self._weight, self._bias)


class Int8Linear:
    """bf16 rows, quantised one by one, times int8 weights [in, out] with fp32 scales [out].

    No formula says whether the operator adds a bias before or after the scales, so it is added behind it.
    """

    def __init__(
        self, weight: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None
    ) -> None:
        self._blocks = [
            (torch.ops.npu.npu_format_cast(columns.contiguous(), _FRACTAL_NZ), block_scales)
            for columns, block_scales in zip(
                torch.split(weight, _COLUMNS_AT_ONCE, 1),
                torch.split(scales, _COLUMNS_AT_ONCE),
                strict=True,
            )
        ]
        self._bias = bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        codes, row_scales = torch.ops.npu.npu_dynamic_quant(x)
        products = [
            torch.ops.npu.npu_quant_matmul(
                codes, weight, scales, pertoken_scale=row_scales, output_dtype=torch.bfloat16
            )
            for weight, scales in self._blocks
        ]
        y = products[0] if len(products) == 1 else torch.cat(products, -1)
        return y if self._bias is None else y.add_(self._bias)


def make_experts(
    gate_up: Iterable[Floats],
    down: Iterable[Floats],
    size: tuple[int, int, int],
    dtype: str,
    place: torch.device,
) -> Experts:
    """The experts of `Device.experts`, in bf16 or w8a8. Raises ModelError for a size that grouped products do not
    take."""
    num_experts, width, hidden = size
    if num_experts < 2:
        raise ModelError("the NPU's grouped products are of two experts or more")
    if max(width, 2 * hidden) > MAX_SIDE:
        raise ModelError(
            f"the NPU's grouped products have sides of up to {MAX_SIDE}: {width}, {2 * hidden}"
        )
    if dtype == "w8a8":
        if num_experts > _MAX_QUANTISED_EXPERTS:
            raise ModelError(
                f"the NPU multiplies up to {_MAX_QUANTISED_EXPERTS} experts in w8a8, not"
                f" {num_experts}: choose bf16"
            )
        return Int8Experts(
            [_by_output(each, place) for each in gate_up],
            [_by_output(each, place) for each in down],
        )
    inner = torch.empty((num_experts, width, 2 * hidden), dtype=torch.bfloat16, device=place)
    outer = torch.empty((num_experts, hidden, width), dtype=torch.bfloat16, device=place)
    for all_weights, source in ((inner, gate_up), (outer, down)):
        for weight, rows in zip(all_weights, source, strict=True):
            weight.copy_(torch.from_numpy(rows).to(place).t())
    return FloatExperts(inner, outer)


class FloatExperts:
    """See `Experts`: bf16 weights [experts, width, 2 * hidden] and [experts, hidden, width]."""

    def __init__(self, gate_up: torch.Tensor, down: torch.Tensor) -> None:
        self._gate_up = gate_up
        self._down = down

    def __call__(
        self, x: torch.Tensor, weights: torch.Tensor, chosen: torch.Tensor
    ) -> torch.Tensor:
        rows, places, counts, _ = _sorted_by_expert(x, chosen, len(self._gate_up), quantise=False)
        h = torch.ops.npu.npu_swiglu(_grouped(rows, self._gate_up, counts), -1)
        y = _grouped(h, self._down, counts)
        return _summed(y, places, weights)


class Int8Experts:
    """See `Experts`: of each expert int8 weights [in, out] and scales [out]; rows are quantised as they are sorted, and
    again by SwiGLU."""

    def __init__(
        self,
        gate_up: list[tuple[torch.Tensor, torch.Tensor]],
        down: list[tuple[torch.Tensor, torch.Tensor]],
    ) -> None:
        self._gate_up, self._gate_up_scales = _unzipped(gate_up)
        self._down, self._down_scales = _unzipped(down)

    def __call__(
        self, x: torch.Tensor, weights: torch.Tensor, chosen: torch.Tensor
    ) -> torch.Tensor:
        rows, places, counts, row_scales = _sorted_by_expert(
            x, chosen, len(self._gate_up), quantise=True
        )
        y = _grouped_int8(rows, row_scales, self._gate_up, self._gate_up_scales, counts)
        h, h_scales = torch.ops.npu.npu_dequant_swiglu_quant(y, activate_left=True, quant_mode=1)
        y = _grouped_int8(h, h_scales, self._down, self._down_scales, counts)
        return _summed(y, places, weights)


def _sorted_by_expert(
    x: torch.Tensor, chosen: torch.Tensor, num_experts: int, *, quantise: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(copies of the rows of x [T, width] by expert [T * k, width], where each choice lies [T * k], rows of each expert
    [experts], the rows' scales [T * k] where they are quantised)."""
    rows, places, counts, scales = torch.ops.npu.npu_moe_init_routing_v2(
        x,
        chosen,
        active_num=chosen.numel(),
        expert_num=num_experts,
        drop_pad_mode=0,
        expert_tokens_num_type=1,
        expert_tokens_num_flag=True,
        active_expert_range=[0, num_experts],
        quant_mode=1 if quantise else -1,
        row_idx_type=0,
    )
    return rows, places, counts, scales


def _grouped(x: torch.Tensor, weights: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    products = torch.ops.npu.npu_grouped_matmul(
        [x], [weights], group_list=counts, split_item=2, group_type=0, group_list_type=1
    )
    product: torch.Tensor = products[0]
    return product


def _grouped_int8(
    codes: torch.Tensor,
    row_scales: torch.Tensor,
    weights: list[torch.Tensor],
    scales: list[torch.Tensor],
    counts: torch.Tensor,
) -> torch.Tensor:
    products = torch.ops.npu.npu_grouped_matmul(
        [codes],
        weights,
        scale=scales,
        per_token_scale=[row_scales],
        group_list=counts,
        split_item=2,
        group_type=0,
        group_list_type=1,
        output_dtype=torch.bfloat16,
    )
    product: torch.Tensor = products[0]
    return product


def _summed(y: torch.Tensor, places: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = torch.ops.npu.npu_moe_token_unpermute(
        y, places, probs=weights.to(y.dtype)
    )
    return result


def _unzipped(
    experts: list[tuple[torch.Tensor, torch.Tensor]],
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Codes, and scales in bf16: the type that grouped products with a bf16 result want."""
    return [codes for codes, _ in experts], [scales.bfloat16() for _, scales in experts]


def _by_output(weights: Floats, place: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows [out, in] on the host -> codes in -127..127 [in, out] and scales fp32 [out] on the device; a code times its
    scale is a weight to half a step."""
    codes = torch.empty(weights.shape[::-1], dtype=torch.int8, device=place)
    scales = torch.empty(len(weights), device=place)
    for rows in _slices(len(weights)):
        block = torch.from_numpy(weights[rows]).to(place)
        largest = block.abs().amax(-1)
        steps = torch.where(largest > 0, largest / 127, 1.0)
        codes[:, rows] = (block / steps.unsqueeze(1)).round_().clamp_(-127, 127).to(torch.int8).t()
        scales[rows] = steps
    return codes, scales


def _slices(count: int) -> Iterator[slice]:
    for first in range(0, count, _ROWS_AT_ONCE):
        yield slice(first, min(first + _ROWS_AT_ONCE, count))
