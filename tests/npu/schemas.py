"""The namespace `torch.ops.npu`, as torch-npu defines it, filled with reference implementations on CPU tensors.

torch-npu's Python functions are these very operators (`torch_npu.npu_rms_norm is torch.ops.npu.npu_rms_norm`, see
`torch_npu/utils/custom_ops.py` in the wheel), so code that calls through `torch.ops.npu` alone has the names, arguments
and types of every call checked by torch's dispatcher, here as on hardware. An operator that is not listed does not
exist here. This module must not know what any operator computes.
"""

from __future__ import annotations

import torch

from tests.npu.operators import activation, attention, cache, layout, moe, norm, quantised, rotary
from tests.npu.operators.contract import Kernel
from tests.npu.wheel import Wheel, WheelError

NAMESPACE = "npu"
KERNELS: dict[str, Kernel] = {
    kernel.__name__: kernel
    for kernel in (
        attention.npu_fused_infer_attention_score_v2,
        cache.npu_scatter_pa_kv_cache,
        norm.npu_rms_norm,
        norm.npu_add_rms_norm,
        rotary.npu_rotary_mul,
        rotary.npu_apply_rotary_pos_emb,
        activation.npu_swiglu,
        activation.npu_dequant_swiglu_quant,
        quantised.npu_dynamic_quant,
        quantised.npu_quant_matmul,
        moe.npu_moe_gating_top_k_softmax_v2,
        moe.npu_moe_init_routing_v2,
        moe.npu_grouped_matmul,
        moe.npu_moe_token_unpermute,
        layout.npu_format_cast,
    )
}


def define(wheel: Wheel) -> torch.library.Library:
    """Define the listed operators with the wheel's own signatures. They exist until the returned library is destroyed.

    Raises WheelError if the wheel does not have one of them.
    """
    library = torch.library.Library(NAMESPACE, "FRAGMENT")  # type: ignore[no-untyped-call]
    for name, kernel in KERNELS.items():
        if name not in wheel.schemas:
            raise WheelError(f"torch-npu has no operator {name}")
        library.define(wheel.schemas[name])  # type: ignore[no-untyped-call]
        library.impl(name, kernel, "CPU")  # type: ignore[no-untyped-call]
    return library
