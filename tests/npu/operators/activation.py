"""SwiGLU, plain and with the quantisation of its result. Must not know the layers around it."""

from __future__ import annotations

import torch

from tests.npu.operators.contract import Rule, Unsupported, contiguous, modelled, not_empty
from tests.npu.operators.quantised import quantise_rows

SWIGLU_DTYPE = Rule(
    "npu_swiglu", "“x”：Tensor类型，shape支持1-8维，dtype支持FP32、FP16或BF16类型。"
)
SWIGLU_HALVES = Rule("npu_swiglu", "“A”和“B”是x沿dim维度切分的Tensor。")
FUSED_X = Rule(
    "npu_dequant_swiglu_quant", "要求是2D的Tensor，shape为\\[TokensNum, 2H\\]，尾轴为偶数。"
)
FUSED_DTYPE = Rule("npu_dequant_swiglu_quant", "数据类型支持int32和bfloat16，数据格式为ND。")
FUSED_FLOAT = Rule(
    "npu_dequant_swiglu_quant",
    "当 x 为 float16 或 bfloat16 时，weight_scale、activation_scale、bias 必须为 None。",
)
FUSED_MODE = Rule(
    "npu_dequant_swiglu_quant",
    "quant_mode（int）：可选参数，量化模式，0 表示静态量化，1 表示动态量化。",
)


def npu_swiglu(self: torch.Tensor, dim: int = -1) -> torch.Tensor:
    """silu of the first half times the second half, halves along `dim`."""
    floats = (torch.float32, torch.float16, torch.bfloat16)
    found = f"x is {self.dtype} {list(self.shape)}"
    SWIGLU_DTYPE.demand(self.dtype in floats and 1 <= self.dim() <= 8, found)
    SWIGLU_HALVES.demand(self.shape[dim] % 2 == 0, found)
    contiguous("npu_swiglu", self=self)
    not_empty("npu_swiglu", self=self)
    gate, up = self.float().chunk(2, dim)
    return (gate * gate.sigmoid() * up).to(self.dtype)


def npu_dequant_swiglu_quant(
    x: torch.Tensor,
    *,
    weight_scale: torch.Tensor | None = None,
    activation_scale: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    quant_scale: torch.Tensor | None = None,
    quant_offset: torch.Tensor | None = None,
    group_index: torch.Tensor | None = None,
    activate_left: bool = False,
    quant_mode: int = 0,
    dst_type: int | None = None,
    round_mode: int | None = None,
    activate_dim: int | None = None,
    swiglu_mode: int = 0,
    **variant: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(int8 rows [T, H], their fp32 scales [T]) of the SwiGLU of bf16 `x` [T, 2H].

    `activate_left` gives silu to the first half; the default gives it to the second.
    """
    function = "npu_dequant_swiglu_quant"
    found = f"x is {x.dtype} {list(x.shape)}"
    FUSED_X.demand(x.dim() == 2 and x.shape[-1] % 2 == 0, found)
    FUSED_DTYPE.demand(x.dtype in (torch.int32, torch.bfloat16), found)
    if x.dtype == torch.int32:
        raise Unsupported(f"{function}: the product of int8 matrices as input is not modelled")
    given = [tensor is not None for tensor in (weight_scale, activation_scale, bias)]
    FUSED_FLOAT.demand(not any(given), "a scale or bias is given")
    FUSED_MODE.demand(quant_mode in (0, 1), f"quant_mode is {quant_mode}")
    modelled(function, quant_scale=quant_scale, quant_offset=quant_offset, group_index=group_index)
    modelled(function, dst_type=dst_type, round_mode=round_mode, activate_dim=activate_dim)
    modelled(function, **variant)
    if quant_mode != 1 or swiglu_mode:
        raise Unsupported(
            f"{function}: quant_mode {quant_mode}, swiglu_mode {swiglu_mode} not modelled"
        )
    contiguous(function, x=x)
    not_empty(function, x=x)
    left, right = x.float().chunk(2, -1)
    gate, up = (left, right) if activate_left else (right, left)
    return quantise_rows(gate * gate.sigmoid() * up)
