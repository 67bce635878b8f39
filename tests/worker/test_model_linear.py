"""W8A8 products: exact integers, honest rounding, rows that do not see each other, a layout that loses nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from services.worker.flowserve.device.cpu_linear import FloatLinear, Int8Linear, quantise_rows
from services.worker.flowserve.quantise import (
    Floats,
    from_bfloat16,
    pack,
    quantise_weights,
    to_bfloat16,
    unpack,
)

SEEDS = st.integers(0, 2**31)


def _random(*shape: int, seed: int) -> Floats:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def _linear(weight: Floats, bias: Floats | None = None, *, piece: int) -> Int8Linear:
    packed = pack(*quantise_weights(weight))
    return Int8Linear(*packed, bias, rows=np.arange(len(weight)), piece=piece)


@settings(max_examples=50, deadline=None)
@given(SEEDS, st.floats(1e-6, 1e6))
def test_codes_are_within_half_a_step(seed: int, size: float) -> None:
    """Codes of activations stay in -127..127, the largest of a group gets 127, each is off by half a step at most."""
    x = torch.from_numpy(_random(4, 3, 32, seed=seed)) * size
    codes, scales = quantise_rows(x)
    assert codes.abs().amax(-1).eq(127).all()
    assert ((codes * scales - x).abs() <= scales * 0.5001).all()


def test_zero_rows_stay_zero() -> None:
    """A row of zeros has no scale to speak of and gives zeros, not NaN."""
    codes, scales = quantise_rows(torch.zeros(2, 32))
    assert not codes.any()
    assert scales.isfinite().all()


@settings(max_examples=50, deadline=None)
@given(SEEDS, st.floats(-35, 35))
def test_weights_are_within_half_a_step(seed: int, exponent: float) -> None:
    """Codes of weights need no clipping, their scales are bfloat16, and each weight is off by half a step at most."""
    weights = _random(5, 96, seed=seed) * np.float32(10.0**exponent)
    codes, scales = quantise_weights(weights)
    assert -127 <= codes.min() <= codes.max() <= 127
    assert np.array_equal(from_bfloat16(to_bfloat16(scales)), scales)
    step = np.repeat(scales.astype(np.float64), 32, axis=1)
    assert (np.abs(codes * step - weights) <= step * 0.5001).all()


def test_weights_without_a_size() -> None:
    """Groups of zeros, or of numbers too small for a normal scale, become zeros; what is not finite is refused."""
    codes, scales = quantise_weights(np.array([[0.0] * 32 + [1e-44] * 32], np.float32))
    assert not codes.any()
    assert scales.tolist() == [[1.0, 1.0]]
    for bad in (np.nan, np.inf, -np.inf):
        with pytest.raises(ValueError, match="finite"):
            quantise_weights(np.array([[bad, *[1.0] * 31]], np.float32))


@settings(max_examples=30, deadline=None)
@given(SEEDS, st.integers(1, 4), st.integers(1, 5))
def test_packing_is_reversible(seed: int, panels: int, groups: int) -> None:
    """What was packed comes back as it was, and lies where the layout says."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(-127, 128, (panels * 32, groups * 32)).astype(np.int8)
    scales = from_bfloat16(rng.integers(0, 0x7F80, (panels * 32, groups)).astype(np.uint16))
    packed_codes, packed_scales = pack(codes, scales)
    back, back_scales = unpack(packed_codes, packed_scales)
    assert np.array_equal(back, codes)
    assert np.array_equal(back_scales, scales)
    n, k = rng.integers(panels * 32), rng.integers(groups * 32)
    assert packed_codes[n // 32, k // 4, n % 32, k % 4] == int(codes[n, k]) + 128
    assert from_bfloat16(packed_scales[n // 32, k // 32, n % 32]) == scales[n, k // 32]


@settings(max_examples=200, deadline=None)
@given(
    st.floats(
        width=32, allow_nan=False, allow_infinity=False, max_value=2.0**127, min_value=-(2.0**127)
    )
)
def test_bfloat16_rounds_as_torch_does(value: float) -> None:
    """To the nearest, ties to even."""
    ours = from_bfloat16(to_bfloat16(np.array([value], np.float32)))
    assert ours[0] == torch.tensor([value]).bfloat16().float().item()


@pytest.mark.parametrize("bias", [False, True])
def test_the_product_is_the_exact_integer_one(bias: bool) -> None:
    """W8A8 equals int64 arithmetic on the same codes, from the bias on, group by group, operation by operation."""
    x, weight, added = _random(9, 320, seed=1), _random(64, 320, seed=2), _random(64, seed=3)
    expected = np.tile(added, (9, 1)) if bias else np.zeros((9, 64), np.float32)
    weight_codes, weight_scales = quantise_weights(weight)
    for group in range(10):
        inputs = slice(group * 32, group * 32 + 32)
        codes, scales = (t.numpy() for t in quantise_rows(torch.from_numpy(x[:, inputs])))
        exact = codes.astype(np.int64) @ weight_codes[:, inputs].astype(np.int64).T
        expected += exact.astype(np.float32) * weight_scales[:, group] * scales
    linear = _linear(weight, added if bias else None, piece=320)
    assert np.array_equal(linear(torch.from_numpy(x)).numpy(), expected)


def test_pieces_are_padded_to_groups() -> None:
    """Heads of 40 inputs take two groups each, and the outputs wanted come in the order wanted."""
    x, weight = _random(3, 80, seed=1), _random(32, 80, seed=2)
    padded = np.zeros((32, 2, 64), np.float32)
    padded[:, :, :40] = weight.reshape(32, 2, 40)
    rows = np.array([7, 0, 31])
    packed = pack(*quantise_weights(padded.reshape(32, 128)))
    y = Int8Linear(*packed, None, rows=rows, piece=40)(torch.from_numpy(x))
    np.testing.assert_allclose(y.numpy(), x @ weight[rows].T, rtol=0, atol=0.5)


def test_an_outlier_costs_only_its_own_group_its_digits() -> None:
    """One huge input leaves the products of the other groups as precise as they were."""
    x, weight = _random(3, 384, seed=1), _random(32, 384, seed=2)
    x[:, 0], weight[:, :32] = 1e4, 0.0  # the outlier's group adds nothing
    y = _linear(weight, piece=384)(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(y, x @ weight.T, rtol=0, atol=0.6)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 70), st.integers(0, 69))
def test_a_row_does_not_see_the_others(count: int, row: int) -> None:
    """A row of a product has the same bits in a batch of any size."""
    x = torch.from_numpy(_random(70, 96, seed=1))
    linear = _linear(_random(64, 96, seed=2), piece=96)
    rows = torch.arange(row, row + count) % 70
    assert torch.equal(linear(x[rows])[0], linear(x)[row])


def test_float_products_keep_their_type() -> None:
    """fp32 is the plain product of the stacked parts; bf16 rounds to about three digits; both return fp32."""
    x, first, second = (_random(n, 64, seed=n) for n in (5, 24, 8))
    bias = _random(24, seed=3)
    expected = x @ np.concatenate((first, second)).T
    expected[:, :24] += bias
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.3)):
        linear = FloatLinear([(first, bias), (second, None)], (32, 64), dtype)
        y = linear(torch.from_numpy(x))
        np.testing.assert_allclose(y.numpy(), expected, rtol=0, atol=tolerance)
