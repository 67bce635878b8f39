"""The other references against torch mathematics written apart from them, and what they refuse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn import functional

from tests.npu.operators.contract import ContractError, Undocumented, Unsupported, Violation

pytestmark = pytest.mark.usefixtures("npu_operators")

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
properties = settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def op(name: str) -> Callable[..., Any]:
    """The operator as the device code calls it."""
    operator: Callable[..., Any] = getattr(torch.ops.npu, name)
    return operator


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """Normal values, the same for the same seed and shape."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def random_int8(*shape: int, seed: int = 0) -> torch.Tensor:
    """All of int8's symmetric range."""
    return torch.randint(-127, 128, shape, generator=torch.Generator().manual_seed(seed)).to(
        torch.int8
    )


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    """Equal but for the rounding of `found`'s dtype."""
    tolerance = 4 * torch.finfo(found.dtype).eps
    torch.testing.assert_close(found.double(), wanted.double(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 64), (3, 4, 16)])
def test_rms_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Each row by its root mean square, times gamma; with the reciprocal in fp32."""
    x, gamma = random(*shape, dtype=dtype), random(shape[-1], dtype=dtype, seed=1)
    y, rstd = op("npu_rms_norm")(x, gamma, 1e-5)
    close(y, functional.rms_norm(x.double(), shape[-1:], gamma.double(), 1e-5))
    assert y.dtype == dtype
    assert rstd.dtype == torch.float32
    close(rstd, (x.double().pow(2).mean(-1, keepdim=True) + 1e-5) ** -0.5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_add_rms_norm(dtype: torch.dtype) -> None:
    """The norm of the rounded sum, then the reciprocal, then the sum."""
    x1, x2 = random(5, 64, dtype=dtype), random(5, 64, dtype=dtype, seed=1)
    gamma = random(64, dtype=dtype, seed=2)
    y, rstd, total = op("npu_add_rms_norm")(x1, x2, gamma, 1e-6)
    assert torch.equal(total, x1 + x2)
    close(y, functional.rms_norm((x1 + x2).double(), (64,), gamma.double(), 1e-6))
    assert rstd.shape == (5, 1)


def rotated(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Pairs (i, i + D/2) of x [T, N, D] turned by angles [T, D/2], as complex numbers."""
    half = x.shape[-1] // 2
    turned = torch.complex(x[..., :half].double(), x[..., half:].double())
    turned = turned * torch.polar(torch.ones_like(angles), angles)[:, None]
    return torch.cat((turned.real, turned.imag), -1)


def angles_of(tokens: int, size: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """(angles [T, D/2], their cosines [T, 1, D], their sines)."""
    angles = torch.arange(tokens)[:, None] * 0.01 ** (torch.arange(size // 2) / size).double()
    return angles, *(f(angles).repeat(1, 2)[:, None].to(dtype) for f in (torch.cos, torch.sin))


@pytest.mark.parametrize("size", [64, 128])
def test_apply_rotary_turns_pairs_in_place(size: int) -> None:
    """Queries and keys turn by their positions' angles, results and arguments alike."""
    query, key = random(6, 4, size), random(6, 2, size, seed=1)
    angles, cos, sin = angles_of(6, size, torch.float32)
    wanted = [rotated(query, angles), rotated(key, angles)]
    results = op("npu_apply_rotary_pos_emb")(query, key, cos, sin, "TND", "half")
    for result, argument, expected in zip(results, (query, key), wanted, strict=True):
        torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(result, argument)


@pytest.mark.parametrize("size", [16, 80])
def test_rotary_mul_turns_heads_of_any_even_size(size: int) -> None:
    """The same rotation out of place, for BSND."""
    x = random(6, 4, size)
    angles, cos, sin = angles_of(6, size, torch.float32)
    before = x.clone()
    result = op("npu_rotary_mul")(x[None], cos[None], sin[None], "half")
    torch.testing.assert_close(result[0].double(), rotated(x, angles), rtol=1e-5, atol=1e-5)
    assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_swiglu(dtype: torch.dtype) -> None:
    """silu of the first half times the second."""
    x = random(5, 64, dtype=dtype)
    close(op("npu_swiglu")(x), functional.silu(x[:, :32].double()) * x[:, 32:].double())


@pytest.mark.parametrize("left", [True, False])
def test_swiglu_with_quantisation(left: bool) -> None:
    """int8 rows that are the SwiGLU to half a step, with the activated half on either side."""
    x = random(5, 64, dtype=torch.bfloat16)
    gate, up = (x[:, :32], x[:, 32:]) if left else (x[:, 32:], x[:, :32])
    wanted = functional.silu(gate.double()) * up.double()
    y, scale = op("npu_dequant_swiglu_quant")(x, activate_left=left, quant_mode=1)
    assert y.dtype == torch.int8
    assert scale.shape == (5,)
    assert ((y.double() * scale[:, None].double() - wanted).abs() <= scale[:, None] * 0.501).all()


@properties
@given(rows=st.integers(1, 6), width=st.integers(1, 40), seed=st.integers(0, 9))
def test_dynamic_quant_is_exact_to_half_a_step(rows: int, width: int, seed: int) -> None:
    """The largest of each row becomes 127; nothing is off by more than half a step."""
    x = random(rows, width, dtype=torch.bfloat16, seed=seed) * 10.0 ** (seed - 5)
    y, scale = op("npu_dynamic_quant")(x)
    assert y.shape == x.shape
    assert scale.dtype == torch.float32
    assert (y.abs().amax(1) == 127).all()
    assert ((y.double() * scale[:, None] - x.double()).abs() <= scale[:, None] * 0.501).all()


def test_dynamic_quant_of_zeros_is_zeros() -> None:
    """A row of zeros, as padding may be, gives zeros and no NaN."""
    y, scale = op("npu_dynamic_quant")(torch.zeros(2, 8, dtype=torch.float16))
    assert not y.any()
    assert not scale.any()


def test_dynamic_quant_smooths_columns_by_group() -> None:
    """Each group's rows are multiplied by its own vector before they are quantised."""
    x = random(5, 8, dtype=torch.float16).T.contiguous().T  # strides are allowed
    smooth = random(2, 8, dtype=torch.float16, seed=1).abs() + 0.5
    y, scale = op("npu_dynamic_quant")(
        x, smooth_scales=smooth, group_index=torch.tensor([2, 5], dtype=torch.int32)
    )
    wanted = torch.cat((x[:2].double() * smooth[0], x[2:].double() * smooth[1]))
    assert ((y.double() * scale[:, None] - wanted).abs() <= scale[:, None] * 0.501).all()
    alone, _ = op("npu_dynamic_quant")(x, smooth_scales=smooth[0])
    assert torch.equal(alone[:2], y[:2])


@properties
@given(
    m=st.integers(1, 5), k=st.integers(1, 70), n=st.integers(1, 20), transposed=st.booleans(),
    output=st.sampled_from([torch.bfloat16, torch.float16]), one=st.booleans(),
)  # fmt: skip
def test_quant_matmul(
    m: int, k: int, n: int, transposed: bool, output: torch.dtype, one: bool
) -> None:
    """The exact int8 product times both scales, for a weight stored either way round."""
    x, weight = random_int8(m, k), random_int8(k, n, seed=1)
    scale, token = random(1 if one else n, seed=2) * 1e-3, random(m, seed=3).abs()
    right = weight.t().contiguous().t() if transposed else weight
    y = op("npu_quant_matmul")(x, right, scale, pertoken_scale=token, output_dtype=output)
    assert y.dtype == output
    close(y, (x.double() @ weight.double()) * scale.double() * token[:, None].double())


def test_quant_matmul_takes_scales_in_bf16_for_bf16() -> None:
    """Weight scales may be bf16 where the result is."""
    x, weight, token = random_int8(3, 8), random_int8(8, 4), torch.ones(3)
    scale = random(4, dtype=torch.bfloat16)
    y = op("npu_quant_matmul")(x, weight, scale, pertoken_scale=token, output_dtype=torch.bfloat16)
    close(y, (x.double() @ weight.double()) * scale.double())


@pytest.mark.parametrize("cast", [2, 29])
def test_format_cast_keeps_shape_and_values(cast: int) -> None:
    """A private layout shows in neither."""
    weight = random_int8(32, 16)
    assert torch.equal(op("npu_format_cast")(weight, cast), weight)


@properties
@given(st.data())
def test_scatter_writes_each_row_to_its_slot(data: st.DataObject) -> None:
    """Rows land at block * block_size + place; every other slot keeps what it had."""
    rows = data.draw(st.integers(1, 6))
    slots = data.draw(st.permutations(range(24)))[:rows]
    kind = data.draw(st.sampled_from([torch.int32, torch.int64]))
    key, value = random(rows, 2, 4), random(rows, 2, 4, seed=1)
    caches = [random(3, 8, 2, 4, seed=seed) for seed in (2, 3)]
    wanted = [cache.clone() for cache in caches]
    for row, slot in enumerate(slots):
        wanted[0][slot // 8, slot % 8] = key[row]
        wanted[1][slot // 8, slot % 8] = value[row]
    arguments = (key, value, *caches, torch.tensor(slots, dtype=kind))
    assert op("npu_scatter_pa_kv_cache")(*arguments, cache_mode="Norm") is None
    assert torch.equal(caches[0], wanted[0])
    assert torch.equal(caches[1], wanted[1])


@pytest.mark.parametrize("renorm", [0, 1])
def test_gating(renorm: int) -> None:
    """Softmax over all experts, or over the chosen ones; the largest first."""
    logits = random(7, 10)
    weights, experts, _ = op("npu_moe_gating_top_k_softmax_v2")(logits, k=3, renorm=renorm)
    wanted, order = logits.double().softmax(-1).topk(3)
    if renorm:
        wanted = wanted / wanted.sum(-1, keepdim=True)
    close(weights, wanted)
    assert experts.dtype == torch.int32
    assert torch.equal(experts.long(), order)


def routing(x: torch.Tensor, experts: torch.Tensor, num_experts: int, **changes: Any) -> Any:
    """The form in which a decoder routes."""
    return op("npu_moe_init_routing_v2")(
        x,
        experts,
        **{
            "active_num": experts.numel(),
            "expert_num": num_experts,
            "expert_tokens_num_type": 1,
            "expert_tokens_num_flag": True,
            "active_expert_range": [0, num_experts],
        }
        | changes,
    )


@properties
@given(
    tokens=st.integers(1, 8), k=st.integers(1, 3), num_experts=st.integers(3, 6),
    cumulative=st.booleans(), transposed=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_experts_end_to_end(
    tokens: int, k: int, num_experts: int, cumulative: bool, transposed: bool, seed: int
) -> None:
    """Routing, grouped product and combination give each token the weighted sum of its experts' products."""
    x, weight = random(tokens, 16, seed=seed), random(num_experts, 16, 8, seed=seed + 1)
    logits = random(tokens, num_experts, seed=seed + 2)
    probs, experts, _ = op("npu_moe_gating_top_k_softmax_v2")(logits, k=k, renorm=1)
    rows, places, counts, scales = routing(x, experts, num_experts)
    assert counts.tolist() == [int((experts == expert).sum()) for expert in range(num_experts)]
    assert scales.isnan().all()  # undefined without quantisation
    if transposed:
        weight = weight.transpose(1, 2).contiguous().transpose(1, 2)
    groups = counts.cumsum(0) if cumulative else counts
    kind = {"split_item": 2, "group_type": 0, "group_list_type": 0 if cumulative else 1}
    (product,) = op("npu_grouped_matmul")([rows], [weight], group_list=groups, **kind)
    found = op("npu_moe_token_unpermute")(product, places, probs=probs)
    wanted = torch.zeros(tokens, 8, dtype=torch.float64)
    for token in range(tokens):
        for expert, prob in zip(experts[token].tolist(), probs[token], strict=True):
            wanted[token] += prob.double() * (x[token].double() @ weight[expert].double())
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("output", "kind"), [(torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32)]
)
def test_experts_in_int8(output: torch.dtype, kind: torch.dtype) -> None:
    """Routing that quantises, then a list of int8 weights with a scale a column; one expert has no token."""
    x = random(5, 16, dtype=torch.bfloat16)
    experts = torch.tensor([[0, 2], [3, 0], [2, 3], [0, 3], [2, 0]], dtype=torch.int32)
    rows, places, counts, tokens = routing(x, experts, 4, quant_mode=1)
    assert rows.dtype == torch.int8
    weights = [random_int8(16, 8, seed=seed) for seed in range(4)]
    scales = [random(8, dtype=kind, seed=seed).abs() * 1e-2 for seed in range(4)]
    (found,) = op("npu_grouped_matmul")(
        [rows], weights, scale=scales, per_token_scale=[tokens], group_list=counts,
        split_item=2, group_type=0, group_list_type=1, output_dtype=output,
    )  # fmt: skip
    assert found.dtype == output
    for token in range(5):
        for choice, expert in enumerate(experts[token].tolist()):
            place = int(places[token * 2 + choice])
            exact = rows[place].double() * tokens[place].double()
            assert ((exact - x[token].double()).abs() <= tokens[place] * 0.501).all()
            wanted = exact @ weights[expert].double() * scales[expert].double()
            torch.testing.assert_close(found[place].double(), wanted, rtol=1e-2, atol=1e-2)


def test_unpermute_without_weights_puts_rows_back() -> None:
    """Without probabilities there is one row a token."""
    rows, places = random(6, 4), torch.tensor([3, 0, 5, 1, 4, 2], dtype=torch.int32)
    assert torch.equal(op("npu_moe_token_unpermute")(rows, places), rows[places.long()])


def wide(*shape: int) -> torch.Tensor:
    """Every second column of a tensor twice as wide: not contiguous."""
    return torch.zeros(*shape[:-1], 2 * shape[-1])[..., ::2]


I32, I64, I8 = torch.int32, torch.int64, torch.int8
X, G = torch.ones(4, 64), torch.ones(64)
TND = {"layout": "TND"}
NORM = {"cache_mode": "Norm"}
Q8, W8, S8, P8 = (
    torch.ones(4, 16, dtype=I8),
    torch.ones(16, 8, dtype=I8),
    torch.ones(8),
    torch.ones(4),
)
BF16 = {"pertoken_scale": P8, "output_dtype": torch.bfloat16}
PAGES, ROWS = torch.zeros(2, 8, 1, 64), torch.ones(4, 1, 64)
SLOTS = torch.arange(4)
CHOICES = torch.tensor([[0], [1], [0], [1]], dtype=I32)
ROUTE = {
    "expert_num": 2,
    "expert_tokens_num_type": 1,
    "expert_tokens_num_flag": True,
    "active_expert_range": [0, 2],
}
TWO = torch.tensor([1, 3])
GROUP = {"group_list": TWO, "split_item": 2, "group_type": 0, "group_list_type": 1}
EXPERTS = torch.ones(2, 64, 8)
INT8 = {
    "scale": [S8.bfloat16()] * 2,
    "per_token_scale": [P8],
    "output_dtype": torch.bfloat16,
    **GROUP,
}
PLACES = torch.arange(4, dtype=I32)
HALF = torch.ones(4, 64, dtype=torch.bfloat16)
REFUSED: list[tuple[str, str, type[ContractError], tuple[Any, ...], dict[str, Any]]] = [
    ("npu_rms_norm", "输入shape支持2-8维", Violation, (G, G), {}),
    ("npu_rms_norm", "支持float16、bfloat16、float32", Violation, (X.double(), G.double()), {}),
    ("npu_rms_norm", "数据类型需要和self保持一致", Violation, (X, G.half()), {}),
    ("npu_rms_norm", "通常为self的最后一维", Undocumented, (X, X), {}),
    ("npu_rms_norm", "is not contiguous", Undocumented, (wide(4, 64), G), {}),
    ("npu_rms_norm", "is empty", Undocumented, (X[:0], G), {}),
    ("npu_add_rms_norm", "入参x1保持一致", Violation, (X, X.half(), G), {}),
    ("npu_add_rms_norm", "入参x1保持一致", Violation, (X, X[:1], G), {}),
    ("npu_add_rms_norm", "入参x1保持一致", Violation, (X, X, G.half()), {}),
    ("npu_add_rms_norm", "gamma_shape", Violation, (X, X, G[:8]), {}),
    ("npu_add_rms_norm", "is not contiguous", Undocumented, (X, wide(4, 64), G), {}),
    ("npu_rotary_mul", "4维Tensor", Violation, (ROWS, ROWS, ROWS), {}),
    ("npu_rotary_mul", "为2的倍数", Violation, (torch.ones(1, 4, 1, 5),) * 3, {}),
    ("npu_rotary_mul", "1S1D、BS1D", Violation, (ROWS[None], ROWS[None, :2], ROWS[None]), {}),
    ("npu_rotary_mul", r"数据范围：\[-1, 1\]", Violation, (ROWS[None], ROWS[None] * 1.2, ROWS[None]), {}),
    ("npu_rotary_mul", "mixed dtypes", Undocumented, (ROWS[None], ROWS[None].half(), ROWS[None]), {}),
    ("npu_rotary_mul", "'interleave' not modelled", Unsupported, (ROWS[None],) * 3, {"rotary_mode": "interleave"}),
    ("npu_apply_rotary_pos_emb", "必须等于128或者64", Violation, (torch.ones(4, 1, 32),) * 4, TND),
    ("npu_apply_rotary_pos_emb", "必须等于128或者64", Violation, (ROWS[:0],) * 4, TND),
    ("npu_apply_rotary_pos_emb", "TND的3维Tensor", Violation, (ROWS,) * 4, {"layout": "BNSD"}),
    ("npu_apply_rotary_pos_emb", "not modelled", Unsupported, (ROWS[None],) * 4, {"layout": "BSND"}),
    ("npu_apply_rotary_pos_emb", "half", Violation, (ROWS,) * 4, {**TND, "rotary_mode": "quarter"}),
    ("npu_apply_rotary_pos_emb", "数据类型必须相同", Violation, (ROWS, ROWS, ROWS.half(), ROWS), TND),
    ("npu_apply_rotary_pos_emb", "q_t, 1, cos_d", Violation, (ROWS, ROWS, ROWS[:2], ROWS[:2]), TND),
    ("npu_apply_rotary_pos_emb", "is not contiguous", Undocumented, (wide(4, 1, 64), ROWS, ROWS, ROWS), TND),
    ("npu_swiglu", "沿dim维度切分", Violation, (X[:, :63],), {}),
    ("npu_swiglu", "FP32、FP16或BF16", Violation, (Q8,), {}),
    ("npu_swiglu", "is not contiguous", Undocumented, (wide(4, 64),), {}),
    ("npu_dequant_swiglu_quant", "int32和bfloat16", Violation, (X,), {"quant_mode": 1}),
    ("npu_dequant_swiglu_quant", "必须为 None", Violation, (HALF,), {"activation_scale": P8, "quant_mode": 1}),
    ("npu_dequant_swiglu_quant", "not modelled", Unsupported, (X.int(),), {"quant_mode": 1}),
    ("npu_dequant_swiglu_quant", "not modelled", Unsupported, (HALF,), {}),
    ("npu_dequant_swiglu_quant", "尾轴为偶数", Violation, (HALF[:, :63],), {"quant_mode": 1}),
    ("npu_dynamic_quant", "支持torch.float16、torch.bfloat16", Violation, (X,), {}),
    ("npu_dynamic_quant", "输入x的维度必须大于1", Violation, (HALF[0],), {}),
    ("npu_dynamic_quant", "only int8", Unsupported, (HALF,), {"dst_type": torch.quint4x2}),
    ("npu_dynamic_quant", "必须和x保持一致", Violation, (HALF,), {"smooth_scales": G}),
    ("npu_dynamic_quant", "必须是一维Tensor", Violation, (HALF,), {"smooth_scales": HALF}),
    ("npu_dynamic_quant", "数据类型支持int32", Violation, (HALF,), {"smooth_scales": HALF, "group_index": SLOTS}),
    ("npu_dynamic_quant", "单调递增", Violation, (HALF,), {"smooth_scales": HALF, "group_index": SLOTS.int()}),
    ("npu_quant_matmul", "支持int8和int32", Violation, (X, torch.ones(64, 8), S8), BF16),
    ("npu_quant_matmul", "不能超过65535", Violation, (Q8, torch.ones(16, 65536, dtype=I8), S8[:1]), BF16),
    ("npu_quant_matmul", "不能是空", Violation, (Q8[:0], W8, S8), {**BF16, "pertoken_scale": P8[:0]}),
    ("npu_quant_matmul", "no formula", Undocumented, (Q8, W8, S8), {**BF16, "bias": S8}),
    ("npu_quant_matmul", "is not contiguous", Undocumented, (Q8.T.contiguous().T, W8, S8), BF16),
    ("npu_quant_matmul", "x2 has strides", Undocumented, (Q8, torch.ones(16, 16, dtype=I8)[:, ::2], S8), BF16),
    ("npu_quant_matmul", "not modelled", Unsupported, (Q8, W8, S8), {"output_dtype": torch.bfloat16}),
    ("npu_quant_matmul", "shape需要是1维", Violation, (Q8, W8, S8), {**BF16, "pertoken_scale": P8[:2]}),
    ("npu_quant_matmul", "t=1或n", Violation, (Q8, W8, S8[:4]), BF16),
    ("npu_quant_matmul", "output_dtype:", Violation, (Q8, W8, S8), {"pertoken_scale": P8}),
    ("npu_quant_matmul", "scale:", Violation, (Q8, W8, S8.bfloat16()), {**BF16, "output_dtype": torch.half}),
    ("npu_format_cast", "continuous", Violation, (W8.t(), 29), {}),
    ("npu_format_cast", "not modelled", Unsupported, (W8, 3), {}),
    ("npu_scatter_pa_kv_cache", "which is the default", Unsupported, (ROWS, ROWS, PAGES, PAGES, SLOTS), {}),
    ("npu_scatter_pa_kv_cache", "不支持非连续", Violation, (wide(4, 1, 64), ROWS, PAGES, PAGES, SLOTS), NORM),
    ("npu_scatter_pa_kv_cache", "必须一致", Violation, (ROWS.half(), ROWS, PAGES, PAGES, SLOTS), NORM),
    ("npu_scatter_pa_kv_cache", "不重复", Violation, (ROWS, ROWS, PAGES, PAGES, SLOTS * 0), NORM),
    ("npu_scatter_pa_kv_cache", "outside", Violation, (ROWS, ROWS, PAGES, PAGES, SLOTS - 1), NORM),
    ("npu_scatter_pa_kv_cache", "outside", Violation, (ROWS, ROWS, PAGES, PAGES, SLOTS + 13), NORM),
    ("npu_scatter_pa_kv_cache", "支持int32和int64", Violation, (ROWS, ROWS, PAGES, PAGES, P8), NORM),
    ("npu_scatter_pa_kv_cache", "slotMapping", Violation, (ROWS, ROWS, PAGES, PAGES, SLOTS[:2]), NORM),
    ("npu_scatter_pa_kv_cache", "keyCache", Violation, (ROWS, ROWS, PAGES.flatten(2), PAGES, SLOTS), NORM),
    ("npu_moe_gating_top_k_softmax_v2", "0<k<=x", Violation, (X,), {"k": 65}),
    ("npu_moe_gating_top_k_softmax_v2", "renorm参数", Violation, (X,), {"renorm": 2}),
    ("npu_moe_gating_top_k_softmax_v2", "2D/3D", Violation, (G,), {}),
    ("npu_moe_init_routing_v2", "专家id不能超过专家数", Violation, (X, CHOICES + 2), ROUTE),
    ("npu_moe_init_routing_v2", "数据类型支持int32", Violation, (X, CHOICES.long()), ROUTE),
    ("npu_moe_init_routing_v2", "当前仅支持True", Violation, (X, CHOICES), {**ROUTE, "expert_tokens_num_flag": False}),
    ("npu_moe_init_routing_v2", "当前仅支持1和2", Violation, (X, CHOICES), {**ROUTE, "expert_tokens_num_type": 0}),
    ("npu_moe_init_routing_v2", "当前仅支持-1和1", Violation, (X, CHOICES), {**ROUTE, "quant_mode": 0}),
    ("npu_moe_init_routing_v2", "当前仅支持0", Violation, (X, CHOICES), {**ROUTE, "drop_pad_mode": 1}),
    ("npu_moe_init_routing_v2", "Active场景", Undocumented, (X, CHOICES), {**ROUTE, "active_num": 2}),
    ("npu_moe_init_routing_v2", "expert_end不大于", Violation, (X, CHOICES), {**ROUTE, "active_expert_range": [0, 3]}),
    ("npu_moe_init_routing_v2", "all experts", Unsupported, (X, CHOICES), {**ROUTE, "active_expert_range": [0, 1]}),
    ("npu_grouped_matmul", "数值的总和", Violation, ([X[:3]], [EXPERTS]), GROUP),
    ("npu_grouped_matmul", "支持torch.int64", Violation, ([X], [EXPERTS]), {**GROUP, "group_list": TWO.int()}),
    ("npu_grouped_matmul", "长度与weight", Violation, ([X], [EXPERTS]), {**GROUP, "group_list": SLOTS}),
    ("npu_grouped_matmul", "长度不能为1", Violation, ([X], [EXPERTS[:1]]), {**GROUP, "group_list": TWO[1:] + 1}),
    ("npu_grouped_matmul", "非递减", Violation, ([X], [EXPERTS]), {**GROUP, "group_list": -TWO, "group_list_type": 0}),
    ("npu_grouped_matmul", "split_item", Violation, ([X], [EXPERTS]), {**GROUP, "split_item": 0}),
    ("npu_grouped_matmul", "only one x", Unsupported, ([X], [EXPERTS]), {**GROUP, "group_type": -1}),
    ("npu_grouped_matmul", "not modelled", Unsupported, ([X], [EXPERTS]), {**GROUP, "act_type": 5}),
    ("npu_grouped_matmul", "torch.bfloat16", Violation, ([X], [EXPERTS.half()]), GROUP),
    ("npu_grouped_matmul", "x不支持转置", Violation, ([wide(4, 64)], [EXPERTS]), GROUP),
    ("npu_grouped_matmul", "长度最大为128", Violation, ([X], [EXPERTS[0]] * 129), GROUP),
    ("npu_grouped_matmul", "仅支持1维输入", Undocumented, ([Q8], [torch.stack([W8, W8])]), INT8),
    ("npu_grouped_matmul", "per-token量化", Violation, ([Q8], [W8, W8]), {**INT8, "scale": [S8, S8]}),
    ("npu_grouped_matmul", "仅支持1维输入", Violation, ([Q8], [W8, W8]), {**INT8, "scale": [S8.bfloat16()]}),
    ("npu_grouped_matmul", "per_token_scale", Violation, ([Q8], [W8, W8]), {**INT8, "per_token_scale": [P8[:2]]}),
    ("npu_grouped_matmul", "not modelled", Unsupported, ([Q8], [W8, W8]), GROUP),
    ("npu_moe_token_unpermute", "没有重复索引", Violation, (X, PLACES * 0), {}),
    ("npu_moe_token_unpermute", "数据类型支持int32", Violation, (X, PLACES.long()), {}),
    ("npu_moe_token_unpermute", "mixed dtypes", Undocumented, (X, PLACES, torch.ones(2, 2).half()), {}),
    ("npu_moe_token_unpermute", "tokens_num, topK_num", Violation, (X, PLACES, torch.ones(3, 2)), {}),
    ("npu_moe_token_unpermute", "当前仅支持False", Violation, (X, PLACES), {"padded_mode": True}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "reason", "error", "arguments", "named"), REFUSED)
def test_a_call_the_documentation_does_not_allow_is_refused(
    name: str,
    reason: str,
    error: type[ContractError],
    arguments: tuple[Any, ...],
    named: dict[str, Any],
) -> None:
    """Whatever is forbidden, left open or not modelled raises and says why."""
    with pytest.raises(error, match=reason):
        op(name)(*arguments, **named)
