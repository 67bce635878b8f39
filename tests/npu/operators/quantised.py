"""W8A8: quantising activations row by row, and the product of int8 matrices. Must not know whose weights they are."""

from __future__ import annotations

from itertools import pairwise

import torch

from tests.npu.operators.contract import Rule, Unsupported, contiguous, modelled, not_empty

# The numbers by which torch names its dtypes to an `int` argument, as far as results have them.
DTYPE_OF_NUMBER = {1: torch.int8, 3: torch.int32, 5: torch.float16, 15: torch.bfloat16}
INT8_MAX = 127

QUANT_X = Rule(
    "npu_dynamic_quant",
    "数据类型支持torch.float16、torch.bfloat16, 数据格式支持ND, 支持非连续的Tensor. "
    "输入x的维度必须大于1.",
)
QUANT_FORMULA = Rule("npu_dynamic_quant", "scale=rowMax(abs(x))/DTYPE_MAX")
QUANT_SMOOTH = Rule(
    "npu_dynamic_quant",
    "若不使用group_index, smooth_scales必须是一维Tensor, 元素数量与x的最后一维大小一致.",
)
QUANT_SMOOTH_DTYPE = Rule("npu_dynamic_quant", "单算子模式: smooth_scales的dtype必须和x保持一致.")
QUANT_GROUPS = Rule(
    "npu_dynamic_quant",
    "若使用group_index, smooth_scales必须是二维Tensor, 第二维元素数量与x的最后一维大小一致, "
    "group_index必须是一维数组, 元素数量与smooth_scales第一维一致.",
)
QUANT_GROUP_DTYPE = Rule(
    "npu_dynamic_quant",
    "对smooth_scales进行分组的下标, 可选输入, 仅在MoE场景下生效. 数据类型支持int32",
)
QUANT_GROUP_ENDS = Rule(
    "npu_dynamic_quant",
    "group_index中的元素必须是单调递增的, 其最后一个元素的值, "
    "应等于x的元素数量除以x的最后一个维度.",
)

MATMUL = "npu_quant_matmul"
MATMUL_X1 = Rule(MATMUL, "x1: Tensor类型, 数据格式支持ND, shape需要在2-6维范围.")
MATMUL_X2 = Rule(MATMUL, "x2: Tensor类型(weight), 数据格式支持ND, shape需要在2-6维范围.")
MATMUL_INT8 = Rule(MATMUL, "Atlas A2 训练系列产品/Atlas 800I A2 推理产品: 数据类型支持int8和int32.")
MATMUL_TRANSPOSED = Rule(MATMUL, "torch_npu.npu_quant_matmul(x1, x2.t(), scale,")
MATMUL_SCALE = Rule(
    MATMUL, "数据类型支持float32、int64、bfloat16. shape需要是1维(t, ), t=1或n, 其中n与x2的n一致."
)
MATMUL_TOKEN = Rule(MATMUL, "数据类型支持float32. shape需要是1维(m,), 其中m与x1的m一致.")
MATMUL_COMBINATIONS = Rule(
    MATMUL,
    "scale:int64/float32, int64/float32, float32/bfloat16, float32, int64/float32, "
    "float32/bfloat16",
)
MATMUL_OUTPUTS = Rule(MATMUL, "output_dtype:float16, int8, bfloat16, float16, float16, int32")
MATMUL_BIAS = Rule(
    MATMUL, "功能描述:\n完成量化的矩阵乘计算, 最小支持输入维度为2维, 最大支持输入维度为6维."
)
MATMUL_WIDTH = Rule(MATMUL, "x1与x2最后一维的shape大小不能超过65535.")
MATMUL_EMPTY = Rule(MATMUL, "传入的x1、x2、scale不能是空.")


def npu_dynamic_quant(
    input: torch.Tensor,
    *,
    smooth_scales: torch.Tensor | None = None,
    group_index: torch.Tensor | None = None,
    dst_type: int | None = None,
    quant_mode: str = "pertoken",
    dst_type_max: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(int8 of the shape of `input`, fp32 scales of that shape without its last dimension), symmetric per row.

    `smooth_scales` multiplies the columns first: [D], or [groups, D] with `group_index` naming where each group ends.
    """
    found = f"x is {input.dtype} {list(input.shape)}"
    QUANT_X.demand(input.dtype in (torch.float16, torch.bfloat16) and input.dim() > 1, found)
    if dst_type not in (None, 1) or quant_mode != "pertoken" or dst_type_max:
        raise Unsupported("npu_dynamic_quant: only int8 per token is modelled")
    not_empty("npu_dynamic_quant", x=input)
    wide, width = input.float(), input.shape[-1]
    if smooth_scales is None:
        modelled("npu_dynamic_quant", group_index=group_index)
        return quantise_rows(wide)
    smooth = f"smooth_scales are {smooth_scales.dtype} {list(smooth_scales.shape)}, {found}"
    QUANT_SMOOTH_DTYPE.demand(smooth_scales.dtype == input.dtype, smooth)
    if group_index is None:
        QUANT_SMOOTH.demand(smooth_scales.shape == (width,), smooth)
        return quantise_rows(wide * smooth_scales.float())
    QUANT_GROUP_DTYPE.demand(
        group_index.dtype == torch.int32, f"group_index is {group_index.dtype}"
    )
    QUANT_GROUPS.demand(
        smooth_scales.shape == (group_index.numel(), width) and group_index.dim() == 1, smooth
    )
    ends = group_index.tolist()
    rising = all(low < high for low, high in pairwise(ends))
    QUANT_GROUP_ENDS.demand(rising and ends[-1] == input.numel() // width, f"group_index is {ends}")
    sizes = torch.tensor([high - low for low, high in zip([0, *ends], ends, strict=False)])
    rows = smooth_scales.float().repeat_interleave(sizes, 0)
    return quantise_rows(wide * rows.view(wide.shape))


def npu_quant_matmul(
    x1: torch.Tensor,
    x2: torch.Tensor,
    scale: torch.Tensor,
    *,
    offset: torch.Tensor | None = None,
    pertoken_scale: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    output_dtype: int | None = None,
    **others: object,
) -> torch.Tensor:
    """int8 `x1` [m, k] times int8 `x2` [k, n], times `scale` [n] and `pertoken_scale` [m], in bf16 or fp16.

    `x2` is contiguous or the transpose of what is. No formula says whether a bias counts before or after the scales,
    so none is taken.
    """
    modelled(MATMUL, offset=offset, **others)
    found = f"x1 is {x1.dtype} {list(x1.shape)}, x2 {x2.dtype} {list(x2.shape)}"
    MATMUL_X1.demand(2 <= x1.dim() <= 6, found)
    MATMUL_X2.demand(2 <= x2.dim() <= 6 and x2.shape[-2] == x1.shape[-1], found)
    MATMUL_INT8.demand(x1.dtype == x2.dtype == torch.int8, found)
    MATMUL_EMPTY.demand(bool(x1.numel() and x2.numel() and scale.numel()), found)
    MATMUL_WIDTH.demand(x1.shape[-1] <= 65535 and x2.shape[-1] <= 65535, found)
    MATMUL_BIAS.undocumented(bias is None, "a bias is given, and no formula says where it is added")
    if x1.dim() > 2 or x2.dim() > 2:
        raise Unsupported(f"{MATMUL}: batches not modelled; {found}")
    contiguous(MATMUL, x1=x1, scale=scale, pertoken_scale=pertoken_scale)
    either = x2.is_contiguous() or x2.t().is_contiguous()
    MATMUL_TRANSPOSED.undocumented(either, f"x2 has strides {x2.stride()}")
    if pertoken_scale is None:
        raise Unsupported(f"{MATMUL}: without pertoken_scale not modelled")
    token = f"pertoken_scale is {pertoken_scale.dtype} {list(pertoken_scale.shape)}, {found}"
    MATMUL_TOKEN.demand(
        pertoken_scale.dtype == torch.float32 and pertoken_scale.shape == x1.shape[:1], token
    )
    channel = f"scale is {scale.dtype} {list(scale.shape)}, {found}"
    MATMUL_SCALE.demand(scale.shape in ((1,), (x2.shape[1],)), channel)
    output = DTYPE_OF_NUMBER.get(output_dtype or 1)
    MATMUL_OUTPUTS.demand(
        output in (torch.bfloat16, torch.float16), f"output_dtype {output} with pertoken_scale"
    )
    allowed = (torch.float32, torch.bfloat16) if output == torch.bfloat16 else (torch.float32,)
    MATMUL_COMBINATIONS.demand(scale.dtype in allowed, f"{channel}, output {output}")
    return scaled_product(x1, x2, scale, pertoken_scale).to(output)


def quantise_rows(wide: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(int8, fp32 scales) of fp32 rows; a row of zeros has scale 0."""
    scales = wide.abs().amax(-1) / INT8_MAX
    divisor = torch.where(scales > 0, scales, torch.ones_like(scales)).unsqueeze(-1)
    return (wide / divisor).round().clamp(-INT8_MAX, INT8_MAX).to(torch.int8), scales


def scaled_product(
    x1: torch.Tensor, x2: torch.Tensor, scale: torch.Tensor, pertoken_scale: torch.Tensor
) -> torch.Tensor:
    """`x1` [m, k] times `x2` [k, n], exact in int32, then both scales in fp32."""
    return torch._int_mm(x1, x2).float() * scale.float() * pertoken_scale[:, None]
