"""Rotary position embedding of queries and keys, in the half-rotation form. Must not know how angles are made."""

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

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
MUL_INPUT = Rule("npu_rotary_mul", "input：必选输入，4维Tensor，数据类型float16, bfloat16, float32")
MUL_SIZES = Rule("npu_rotary_mul", "D < 896，且为2的倍数; B, N < 1000;")
MUL_RANGE = Rule("npu_rotary_mul", "r1: 数据范围：[-1, 1]; 对应input layout的支持情况：")
MUL_BSND = Rule("npu_rotary_mul", "input为BSND: 1S1D、BS1D、BSND;")
APPLY_DTYPE = Rule(
    "npu_apply_rotary_pos_emb",
    "query (Tensor): 必选参数，待执行旋转位置编码的第一个张量。数据类型支持bfloat16、float16、"
    "float32，数据格式支持ND。"
    "layout为TND时，shape为3维，其他layout场景下shape为4维。",
)
APPLY_HEAD = Rule(
    "npu_apply_rotary_pos_emb", "不支持空Tensor，shape最后一维（D）必须等于128或者64。"
)
APPLY_LAYOUT = Rule("npu_apply_rotary_pos_emb", "支持BSND的4维Tensor、TND的3维Tensor。")
APPLY_MODE = Rule("npu_apply_rotary_pos_emb", '支持"half"模式。')
APPLY_SAME = Rule("npu_apply_rotary_pos_emb", "输入张量query、key、cos、sin的数据类型必须相同。")
APPLY_SHAPES = Rule(
    "npu_apply_rotary_pos_emb",
    'layout为"TND"时，输入query的shape用（q_t, q_n, q_d）表示，key的shape用（q_t, k_n, q_d）表示，'
    "cos和sin的shape用（q_t, 1, cos_d）表示。",
)
APPLY_IN_PLACE = Rule("npu_apply_rotary_pos_emb", "query_out (Tensor): 原地更新后的query张量。")


def npu_rotary_mul(
    self: torch.Tensor,
    r1: torch.Tensor,
    r2: torch.Tensor,
    rotary_mode: str = "half",
    rotate: torch.Tensor | None = None,
) -> torch.Tensor:
    """`self` [B, S, N, D] rotated by the cosines `r1` and sines `r2` [1 or B, S, 1, D], with "
    "jit_compile off."""
    if rotary_mode != "half":
        raise Unsupported(f"npu_rotary_mul: rotary_mode {rotary_mode!r} not modelled")
    modelled("npu_rotary_mul", rotate=rotate)
    MUL_INPUT.demand(
        self.dim() == 4 and self.dtype in FLOATS, f"input is {self.dtype} {list(self.shape)}"
    )
    batch, length, heads, size = self.shape
    MUL_SIZES.demand(
        size < 896 and size % 2 == 0 and batch < 1000 and heads < 1000, f"{list(self.shape)}"
    )
    for name, angles in (("r1", r1), ("r2", r2)):
        fits = angles.shape in ((1, length, 1, size), (batch, length, 1, size))
        MUL_BSND.demand(fits, f"{name} is {list(angles.shape)} for an input of {list(self.shape)}")
        MUL_RANGE.demand(
            bool((angles.abs() <= 1).all()), f"{name} has values up to {angles.abs().max()}"
        )
    same_dtype("npu_rotary_mul", self=self, r1=r1, r2=r2)
    contiguous("npu_rotary_mul", self=self, r1=r1, r2=r2)
    not_empty("npu_rotary_mul", self=self)
    return _rotated(self, r1, r2)


def npu_apply_rotary_pos_emb(
    query: torch.Tensor,
    key: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    layout: str = "BSND",
    rotary_mode: str = "half",
) -> tuple[torch.Tensor, torch.Tensor]:
    """`query` [T, N, D] and `key` [T, KV_N, D] rotated by `cos` and `sin` [T, 1, D]; both are "
    "updated in place too."""
    APPLY_LAYOUT.demand(layout in ("BSND", "TND"), f"layout is {layout!r}")
    APPLY_MODE.demand(rotary_mode == "half", f"rotary_mode is {rotary_mode!r}")
    if layout != "TND":
        raise Unsupported(f"npu_apply_rotary_pos_emb: layout {layout!r} not modelled")
    tensors = {"query": query, "key": key, "cos": cos, "sin": sin}
    for name, tensor in tensors.items():
        found = f"{name} is {tensor.dtype} {list(tensor.shape)}"
        APPLY_DTYPE.demand(tensor.dtype in FLOATS and tensor.dim() == 3, found)
        APPLY_HEAD.demand(tensor.shape[-1] in (64, 128) and tensor.numel() > 0, found)
        APPLY_SAME.demand(tensor.dtype == query.dtype, f"{found}, query {query.dtype}")
    tokens, _, size = query.shape
    shapes = f"query {list(query.shape)}, key {list(key.shape)}, cos {list(cos.shape)}, sin {list(sin.shape)}"
    APPLY_SHAPES.demand(key.shape[0] == tokens and key.shape[2] == size, shapes)
    APPLY_SHAPES.demand(cos.shape == sin.shape == (tokens, 1, size), shapes)
    contiguous("npu_apply_rotary_pos_emb", **tensors)
    query.copy_(_rotated(query, cos, sin))
    key.copy_(_rotated(key, cos, sin))
    return query.clone(), key.clone()  # an operator's result must not be its argument


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.float().chunk(2, -1)
    return (x.float() * cos.float() + torch.cat((-second, first), -1) * sin.float()).to(x.dtype)
