"""RMS normalisation, alone and with the residual sum before it. Must not know where a decoder uses them."""

from __future__ import annotations

import torch

from tests.npu.operators.contract import Rule, contiguous, not_empty, same_dtype

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
RMS_X = Rule(
    "npu_rms_norm", "self：Tensor类型，支持float16、bfloat16、float32，输入shape支持2-8维。"
)
RMS_GAMMA = Rule("npu_rms_norm", "gamma：Tensor类型，数据类型需要和self保持一致")
RMS_LAST = Rule("npu_rms_norm", "通常为self的最后一维。")
# npu_add_rms_norm has no text of its own: that of the operator which also casts stands for it, and the wheel's shape
# function (`npu_add_rms_norm_meta`) for its three results.
ADD_X = Rule(
    "npu_add_rms_norm_cast", "x1：Device侧的Tensor类型，需要归一化的原始数据输入。shape支持1-8维。"
)
ADD_SAME = Rule("npu_add_rms_norm_cast", "shape、数据格式、数据类型均需要与入参x1保持一致。")
ADD_GAMMA = Rule(
    "npu_add_rms_norm_cast", "shape需要满足gamma_shape = x_shape\\[n:\\], n < x_shape.dims()。"
)
ADD_SUM = Rule("npu_add_rms_norm_cast", "x：Device侧的Tensor类型，归一化的数据和。")


def npu_rms_norm(
    self: torch.Tensor, gamma: torch.Tensor, epsilon: float = 1e-06
) -> tuple[torch.Tensor, torch.Tensor]:
    """(`self` normalised over its last dimension and scaled by `gamma` [D], the reciprocal "
    "root mean squares in fp32)."""
    RMS_X.demand(self.dtype in FLOATS and 2 <= self.dim() <= 8, f"self is {_what(self)}")
    RMS_GAMMA.demand(gamma.dtype == self.dtype, f"gamma is {_what(gamma)}, self {_what(self)}")
    RMS_LAST.undocumented(
        gamma.shape == self.shape[-1:], f"gamma is {_what(gamma)}, self {_what(self)}"
    )
    contiguous("npu_rms_norm", self=self, gamma=gamma)
    not_empty("npu_rms_norm", self=self)
    return _normalised(self, gamma, epsilon)


def npu_add_rms_norm(
    x1: torch.Tensor, x2: torch.Tensor, gamma: torch.Tensor, epsilon: float = 1e-06
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(the normalised sum, the reciprocal root mean squares, the sum). The sum is rounded "
    "before it is normalised."""
    ADD_X.demand(x1.dtype in FLOATS and 1 <= x1.dim() <= 8, f"x1 is {_what(x1)}")
    ADD_SAME.demand(
        x2.dtype == x1.dtype and x2.shape == x1.shape, f"x1 is {_what(x1)}, x2 {_what(x2)}"
    )
    ADD_SAME.demand(gamma.dtype == x1.dtype, f"x1 is {_what(x1)}, gamma {_what(gamma)}")
    ADD_GAMMA.demand(gamma.shape == x1.shape[-1:], f"x1 is {_what(x1)}, gamma {_what(gamma)}")
    same_dtype("npu_add_rms_norm", x1=x1, x2=x2, gamma=gamma)
    contiguous("npu_add_rms_norm", x1=x1, x2=x2, gamma=gamma)
    not_empty("npu_add_rms_norm", x1=x1)
    total = (x1.float() + x2.float()).to(x1.dtype)
    return *_normalised(total, gamma, epsilon), total


def _normalised(
    x: torch.Tensor, gamma: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor]:
    wide = x.float()
    rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
    return (wide * rstd * gamma.float()).to(x.dtype), rstd


def _what(x: torch.Tensor) -> str:
    return f"{x.dtype} {list(x.shape)}"
