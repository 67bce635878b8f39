"""A mixture of experts: choosing experts, sorting tokens by expert, the experts' products, and adding their results.

Must not know what the experts compute between two products.
"""

from __future__ import annotations

import torch

from tests.npu.operators.contract import (
    Rule,
    Unsupported,
    contiguous,
    modelled,
    not_empty,
    same_dtype,
)
from tests.npu.operators.quantised import DTYPE_OF_NUMBER, quantise_rows, scaled_product

FLOATS = (torch.float16, torch.bfloat16, torch.float32)

GATING = "npu_moe_gating_top_k_softmax_v2"
GATING_X = Rule(
    GATING, "表示待计算的输入要求是一个2D/3D的Tensor, 数据类型支持float16、bfloat16、float32"
)
GATING_K = Rule(GATING, "大小为0<k<=x的-1轴大小, k<=1024.")
GATING_RENORM = Rule(
    GATING,
    "当renorm参数设置为0时，对输入x做softmax操作，再做topk操作；当renorm参数设置为1时，"
    "对x做topk操作，后做softmax操作。",
)

ROUTING = "npu_moe_init_routing_v2"
ROUTING_X = Rule(
    ROUTING,
    "要求为2D的Tensor，shape为(NUM_ROWS, H)，H代表每个Token的长度。数据类型支持float16、"
    "bfloat16、float32、int8",
)
ROUTING_EXPERTS = Rule(
    ROUTING, "要求是2D的Tensor，shape为(NUM_ROWS, K)，且专家id不能超过专家数。数据类型支持int32"
)
ROUTING_ACTIVE = Rule(ROUTING, "-1和0均表示按全部tokens处理，大于0时表示Active场景")
ROUTING_COUNT = Rule(
    ROUTING,
    "expert_num：int类型，可选参数，表示专家数，要求大于0。"
    "expert_tokens_num_type为key_value模式时，取值范围为(0, 5120]；其他模式取值范围为(0, "
    "10240]。",
)
ROUTING_PAD = Rule(
    ROUTING, "0表示dropless场景，该场景下不校验expert_capacity。1表示drop_pad场景。当前仅支持0。"
)
ROUTING_TYPE = Rule(ROUTING, "即输出的值为专家和对应专家处理token数量的键值对。当前仅支持1和2。")
ROUTING_FLAG = Rule(
    ROUTING, "表示是否输出expert_token_cumsum_or_count，默认False表示不输出。当前仅支持True。"
)
ROUTING_QUANT = Rule(ROUTING, "当前仅支持-1和1。x数据类型为int8时仅支持-1，不可再量化。")
ROUTING_RANGE = Rule(ROUTING, "要求数组内的值大于等于0，并且expert_end不大于expert_num。")

GROUPED = "npu_grouped_matmul"
GROUPED_FLOAT = Rule(
    GROUPED,
    "x: torch.float16, torch.bfloat16, torch.float32\nweight: torch.float16, torch.bfloat16, "
    "torch.float32",
)
GROUPED_ONE = Rule(
    GROUPED,
    "0: 仅支持split_item为2或3. weight中tensor需为3维, x、y中tensor需为2维. 必须传group_list, "
    "且当group_list_type为0时, 最后一个值与x中tensor的第一维相等, 当group_list_type为1时, "
    "数值的总和与x中tensor的第一维相等.",
)
GROUPED_MANY = Rule(
    GROUPED,
    "当group_list_type为1时, 数值的总和与x中tensor的第一维相等, 长度最大为128. x、weight、"
    "y中tensor需为2维. weight中每个tensor的N轴必须相等.",
)
GROUPED_TRANSPOSED = Rule(
    GROUPED, "支持weight转置, 但weight中每个tensor是否转置需保持统一. x不支持转置."
)
GROUPED_LIMIT = Rule(GROUPED, "group_list第1维最大支持1024, 即最多支持1024个group.")
GROUPED_INNER = Rule(GROUPED, "x和weight中每一组tensor的最后一维大小都应小于InnerLimit.")
GROUPED_LIST = Rule(
    GROUPED, "用于指定分组的索引, 表示x的第0维矩阵乘法的索引情况. 数据类型支持torch.int64."
)
GROUPED_LENGTH = Rule(GROUPED, "每个张量仅支持1维输入, 长度与weight列表长度相同.")
GROUPED_CUMSUM = Rule(GROUPED, "当group_list_type为0时, group_list必须为非负单调非递减数列.")
GROUPED_COUNTS = Rule(GROUPED, "当group_list_type为1时, group_list必须为非负数列, 且长度不能为1.")
GROUPED_SCALE = Rule(
    GROUPED,
    "列表长度与weight列表长度相同.\nAtlas A2 训练系列产品/Atlas 800I A2 "
    "推理产品每个张量仅支持1维输入.",
)
GROUPED_TOKEN = Rule(
    GROUPED,
    "per-token量化\nx: torch.int8, torch.int8\nweight: torch.int8, torch.int8\nbias: torch."
    "int32, torch.int32\nscale: torch.bfloat16, torch.float32",
)
GROUPED_OUTPUT = Rule(
    GROUPED,
    "per_token_scale: torch.float32, torch.float32\noutput_dtype: torch.bfloat16, torch.float16",
)

UNPERMUTE = "npu_moe_token_unpermute"
UNPERMUTE_TOKENS = Rule(
    UNPERMUTE,
    "permuted_tokens(torch.Tensor)：必选输入，2维Tensor，shape为(tokens_num * topK_num, "
    "hidden_size)",
)
UNPERMUTE_DTYPE = Rule(
    UNPERMUTE, "数据类型支持float16、bfloat16、float32，支持非连续Tensor，支持ND。"
)
UNPERMUTE_INDICES = Rule(
    UNPERMUTE,
    "数据类型支持int32，支持非连续Tensor，支持ND。取值范围是[0, tokens_num * topK_num - 1]，"
    "且没有重复索引。",
)
UNPERMUTE_PROBS = Rule(
    UNPERMUTE,
    "要求是一个2维Tensor，shape为(tokens_num, topK_num)，数据类型支持float16、bfloat16、float32",
)
UNPERMUTE_TOP = Rule(UNPERMUTE, "topK_num要求小于等于512。")
UNPERMUTE_PADDED = Rule(UNPERMUTE, "padded_mode当前仅支持False，restore_shape当前仅支持None。")


def npu_moe_gating_top_k_softmax_v2(
    x: torch.Tensor,
    *,
    k: int = 1,
    finished: torch.Tensor | None = None,
    renorm: int | None = 0,
    output_softmax: bool | None = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(weights [T, k] in the dtype of the logits `x` [T, E], experts [T, k] int32, nothing to rely on).

    Of the third result the documentation says row indices and the shape function softmax, so it is left empty.
    """
    found = f"x is {x.dtype} {list(x.shape)}"
    GATING_X.demand(x.dim() in (2, 3) and x.dtype in FLOATS, found)
    GATING_K.demand(0 < k <= min(x.shape[-1], 1024), f"k is {k}, {found}")
    GATING_RENORM.demand(renorm in (0, 1), f"renorm is {renorm}")
    modelled(GATING, finished=finished, output_softmax=output_softmax or None)
    contiguous(GATING, x=x)
    not_empty(GATING, x=x)
    scores = x.float() if renorm else x.float().softmax(-1)
    order = torch.sort(scores, dim=-1, descending=True, stable=True)
    weights = order.values[..., :k].softmax(-1) if renorm else order.values[..., :k]
    return weights.to(x.dtype), order.indices[..., :k].int(), x.new_empty(0, dtype=torch.float32)


def npu_moe_init_routing_v2(
    x: torch.Tensor,
    expert_idx: torch.Tensor,
    *,
    scale: torch.Tensor | None = None,
    offset: torch.Tensor | None = None,
    active_num: int = -1,
    expert_capacity: int = -1,
    expert_num: int = -1,
    drop_pad_mode: int = 0,
    expert_tokens_num_type: int = 0,
    expert_tokens_num_flag: bool = False,
    quant_mode: int = -1,
    active_expert_range: list[int] | tuple[int, ...] = (),
    row_idx_type: int = 0,
    x_dtype: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Copies of the rows of `x` [T, H], one for each of a token's experts `expert_idx` [T, K], sorted by expert.

    (rows [T * K, H], where the row of token t and choice j lies at t * K + j int32, tokens of each expert [E] int64,
    scales [T * K]). `quant_mode` 1 quantises the rows to int8; with -1 the scales mean nothing.
    """
    found = (
        f"x is {x.dtype} {list(x.shape)}, expert_idx {expert_idx.dtype} {list(expert_idx.shape)}"
    )
    ROUTING_X.demand(x.dim() == 2 and x.dtype in (*FLOATS, torch.int8), found)
    ROUTING_EXPERTS.demand(expert_idx.dim() == 2 and expert_idx.dtype == torch.int32, found)
    ROUTING_EXPERTS.demand(expert_idx.shape[0] == x.shape[0], found)
    ROUTING_COUNT.demand(0 < expert_num <= 10240, f"expert_num is {expert_num}")
    ROUTING_EXPERTS.demand(
        bool(((expert_idx >= 0) & (expert_idx < expert_num)).all()), "an expert does not exist"
    )
    ROUTING_PAD.demand(drop_pad_mode == 0, f"drop_pad_mode is {drop_pad_mode}")
    ROUTING_TYPE.demand(
        expert_tokens_num_type in (1, 2), f"expert_tokens_num_type is {expert_tokens_num_type}"
    )
    ROUTING_FLAG.demand(expert_tokens_num_flag, "expert_tokens_num_flag is False")
    ROUTING_QUANT.demand(quant_mode in (-1, 1), f"quant_mode is {quant_mode}")
    ROUTING_QUANT.demand(
        quant_mode == -1 or x.dtype != torch.int8, f"quant_mode is {quant_mode}, {found}"
    )
    modelled(ROUTING, scale=scale, offset=offset, x_dtype=x_dtype)
    rows = expert_idx.numel()
    ROUTING_ACTIVE.undocumented(
        active_num in (-1, 0, rows), f"active_num is {active_num} of {rows} rows"
    )
    bounds = list(active_expert_range)
    ROUTING_RANGE.demand(
        len(bounds) == 2 and 0 <= bounds[0] < bounds[1] <= expert_num, f"the range is {bounds}"
    )
    if bounds != [0, expert_num] or expert_tokens_num_type != 1 or row_idx_type != 0:
        raise Unsupported(f"{ROUTING}: only all experts, counts and gather indices are modelled")
    contiguous(ROUTING, x=x, expert_idx=expert_idx)
    not_empty(ROUTING, x=x, expert_idx=expert_idx)
    source = expert_idx.flatten().argsort(stable=True)
    place = torch.empty_like(source)
    place[source] = torch.arange(rows)
    counts = expert_idx.flatten().long().bincount(minlength=expert_num)
    expanded = x[source // expert_idx.shape[1]]
    if quant_mode == 1:
        quantised, scales = quantise_rows(expanded.float())
        return quantised, place.int(), counts, scales
    return expanded, place.int(), counts, torch.full((rows,), torch.nan)


def npu_grouped_matmul(
    x: list[torch.Tensor],
    weight: list[torch.Tensor],
    *,
    bias: list[torch.Tensor] | None = None,
    scale: list[torch.Tensor] | None = None,
    per_token_scale: list[torch.Tensor] | None = None,
    group_list: torch.Tensor | None = None,
    split_item: int | None = 0,
    group_type: int | None = None,
    group_list_type: int | None = 0,
    output_dtype: int | None = None,
    **others: object,
) -> list[torch.Tensor]:
    """[the rows of `x[0]` [T, k], each group of them times its own weight], groups one after the other.

    `weight` is one tensor [E, k, n], or E tensors [k, n]; int8 needs the latter, with `scale` E tensors [n] and
    `per_token_scale` [[T]]. `group_list` [E] int64 holds the groups' ends (`group_list_type` 0) or sizes (1).
    """
    modelled(GROUPED, bias=bias, **{name: value or None for name, value in others.items()})
    if len(x) != 1 or group_type != 0 or group_list is None:
        raise Unsupported(f"{GROUPED}: only one x, its rows grouped by a tensor, is modelled")
    rows = x[0]
    one = len(weight) == 1 and weight[0].dim() == 3
    experts = list(weight[0]) if one else list(weight)
    found = f"x is {rows.dtype} {list(rows.shape)}, weight {weight[0].dtype} {[list(w.shape) for w in weight]}"
    shape = GROUPED_ONE if one else GROUPED_MANY
    shape.demand(split_item in (2, 3), f"split_item is {split_item}")
    shape.demand(
        rows.dim() == 2 and all(w.dim() == 2 and w.shape[0] == rows.shape[1] for w in experts),
        found,
    )
    shape.demand(len({w.shape[1] for w in experts}) == 1, found)
    GROUPED_MANY.demand(one or len(experts) <= 128, found)
    GROUPED_LIMIT.demand(len(experts) <= 1024, found)
    GROUPED_INNER.demand(max(rows.shape[1], experts[0].shape[1]) < 65536, found)
    transposed = {w.is_contiguous() for w in experts}
    laid_out = all(w.is_contiguous() or w.t().is_contiguous() for w in experts)
    GROUPED_TRANSPOSED.demand(
        len(transposed) == 1 and laid_out and rows.is_contiguous(), f"strides; {found}"
    )
    not_empty(GROUPED, x=rows, weight=weight[0])
    sizes = _group_sizes(group_list, group_list_type, len(experts), rows.shape[0])
    pieces = rows.split_with_sizes(sizes)
    if rows.dtype != torch.int8:
        GROUPED_FLOAT.demand(
            all(w.dtype == rows.dtype for w in weight) and rows.dtype in FLOATS, found
        )
        modelled(GROUPED, scale=scale or None, per_token_scale=per_token_scale or None)
        output = rows.dtype if output_dtype is None else DTYPE_OF_NUMBER.get(output_dtype)
        GROUPED_FLOAT.demand(output == rows.dtype, f"output_dtype is {output}, {found}")
        products = [a.float() @ b.float() for a, b in zip(pieces, experts, strict=True)]
        return [torch.cat(products).to(rows.dtype)]
    GROUPED_TOKEN.demand(all(w.dtype == torch.int8 for w in weight), found)
    if not scale or not per_token_scale:
        raise Unsupported(f"{GROUPED}: int8 without both scales not modelled")
    GROUPED_SCALE.undocumented(
        not one, f"int8 weight of 3 dimensions, whose scales need 2; {found}"
    )
    GROUPED_SCALE.demand(
        len(scale) == len(weight), f"{len(scale)} scales for {len(weight)} weights"
    )
    GROUPED_SCALE.demand(
        all(s.shape == experts[0].shape[1:] for s in scale),
        f"scale {list(scale[0].shape)}, {found}",
    )
    tokens = per_token_scale[0]
    GROUPED_OUTPUT.demand(
        len(per_token_scale) == 1
        and tokens.dtype == torch.float32
        and tokens.shape == rows.shape[:1],
        f"per_token_scale {tokens.dtype} {list(tokens.shape)}, {found}",
    )
    result = DTYPE_OF_NUMBER[output_dtype or 1]
    wanted = {torch.bfloat16: torch.bfloat16, torch.float16: torch.float32}.get(result)
    GROUPED_TOKEN.demand(
        all(s.dtype == wanted for s in scale), f"scale {scale[0].dtype} for output {result}"
    )
    contiguous(GROUPED, scale=scale[0], per_token_scale=tokens)
    scaled = [
        scaled_product(a, b, s, t) if a.numel() else a.new_empty(0, b.shape[1], dtype=torch.float32)
        for a, b, s, t in zip(pieces, experts, scale, tokens.split_with_sizes(sizes), strict=True)
    ]
    return [torch.cat(scaled).to(result)]


def _group_sizes(
    group_list: torch.Tensor, kind: int | None, num_groups: int, num_rows: int
) -> list[int]:
    """Rows of each group."""
    found = f"group_list is {group_list.dtype} {group_list.tolist()} for {num_rows} rows and {num_groups} experts"
    GROUPED_LIST.demand(group_list.dtype == torch.int64, found)
    GROUPED_LENGTH.demand(group_list.shape == (num_groups,), found)
    contiguous(GROUPED, group_list=group_list)
    if kind not in (0, 1):
        raise Unsupported(f"{GROUPED}: group_list_type {kind} not modelled")
    sizes: list[int] = group_list.tolist()
    if kind == 0:
        sizes = [high - low for low, high in zip([0, *sizes], sizes, strict=False)]
        GROUPED_CUMSUM.demand(min(sizes) >= 0, found)
    else:
        GROUPED_COUNTS.demand(min(sizes) >= 0 and num_groups > 1, found)
    GROUPED_ONE.demand(sum(sizes) == num_rows, found)
    return sizes


def npu_moe_token_unpermute(
    permuted_tokens: torch.Tensor,
    sorted_indices: torch.Tensor,
    probs: torch.Tensor | None = None,
    padded_mode: bool = False,
    restore_shape: list[int] | None = None,
) -> torch.Tensor:
    """[T, H]: for each token the sum over its choices j of `probs[t, j]` times row "
    "`sorted_indices[t * K + j]`."""
    found = f"{permuted_tokens.dtype} {list(permuted_tokens.shape)}, indices {list(sorted_indices.shape)}"
    UNPERMUTE_PADDED.demand(
        not padded_mode and restore_shape is None, "padded_mode or restore_shape is given"
    )
    UNPERMUTE_TOKENS.demand(permuted_tokens.dim() == 2, found)
    UNPERMUTE_DTYPE.demand(permuted_tokens.dtype in FLOATS, found)
    not_empty(UNPERMUTE, permuted_tokens=permuted_tokens)
    rows = permuted_tokens.shape[0]
    UNPERMUTE_INDICES.demand(
        sorted_indices.dtype == torch.int32 and sorted_indices.shape == (rows,), found
    )
    everyone = bool((sorted_indices.long().sort().values == torch.arange(rows)).all())
    UNPERMUTE_INDICES.demand(everyone, "an index is out of range or repeated")
    wide = permuted_tokens.float()[sorted_indices.long()]
    if probs is None:
        return wide.to(permuted_tokens.dtype)
    fits = probs.dim() == 2 and probs.dtype in FLOATS and probs.numel() == rows
    UNPERMUTE_PROBS.demand(fits, f"probs {probs.dtype} {list(probs.shape)}, {found}")
    UNPERMUTE_TOP.demand(probs.shape[1] <= 512, f"probs {list(probs.shape)}")
    same_dtype(UNPERMUTE, permuted_tokens=permuted_tokens, probs=probs)
    weighted = wide.view(*probs.shape, -1) * probs.float().unsqueeze(-1)
    return weighted.sum(1).to(permuted_tokens.dtype)
