"""The private layouts of tensors on the device. Must not know which operator profits from one."""

from __future__ import annotations

import torch

from tests.npu.operators.contract import Rule, Unsupported, modelled

ND = 2
FRACTAL_NZ = 29
CAST = Rule("npu_format_cast", "修改NPU张量的格式。")
CONTINUOUS = Rule(
    "npu_quant_matmul", "please ensure that the input is continuous with (batch,k,n) layout"
)


def npu_format_cast(
    self: torch.Tensor,
    acl_format: int,
    *,
    customize_dtype: int | None = None,
    input_dtype: int | None = None,
) -> torch.Tensor:
    """`self` in the layout `acl_format` of the device's memory, which shape and values do not "
    "show."""
    modelled("npu_format_cast", customize_dtype=customize_dtype, input_dtype=input_dtype)
    if acl_format not in (ND, FRACTAL_NZ):
        raise Unsupported(f"npu_format_cast: acl_format {acl_format} not modelled")
    CONTINUOUS.demand(self.is_contiguous(), f"a tensor of strides {self.stride()} is cast")
    CAST.undocumented(self.dim() >= 2, f"a tensor of shape {list(self.shape)} is cast")
    return self.clone()
