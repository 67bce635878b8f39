"""W8A8 products: exact integers, honest rounding, rows that do not see each other."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from services.worker.flowserve.linear import group_size, make_linear, quantise_rows


def _random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@settings(deadline=None)
@given(st.integers(0, 2**31), st.floats(1e-6, 1e6))
def test_codes_are_within_half_a_step(seed: int, scale: float) -> None:
    """Codes stay in -127..127, the largest entry of a row gets 127, and each entry is off by half a step at most."""
    x = _random(4, 50, seed=seed) * scale
    codes, scales = quantise_rows(x)
    assert codes.abs().amax(-1).eq(127).all()
    assert ((codes * scales - x).abs() <= scales * 0.5001).all()


def test_zero_rows_stay_zero() -> None:
    """A row of zeros has no scale to speak of and gives zeros, not NaN."""
    codes, scales = quantise_rows(torch.zeros(2, 8))
    assert not codes.any()
    assert scales.isfinite().all()


def test_the_product_is_the_exact_integer_one() -> None:
    """W8A8 equals int64 arithmetic on the same codes, group by group, with stacked weights and biases."""
    x, first, second = (_random(n, 320, seed=n) for n in (9, 24, 40))
    bias = _random(24, seed=5)
    linear = make_linear(
        [(first, bias), (second, None)], num_outputs=64, num_inputs=320, dtype="w8a8"
    )
    weight = torch.cat((first, second))
    expected = torch.zeros(9, 64)
    for group in (slice(0, 160), slice(160, 320)):
        codes, scales = quantise_rows(x[:, group])
        weight_codes, weight_scales = quantise_rows(weight[:, group])
        exact = (codes.long() @ weight_codes.long().t()).float()
        expected += exact * scales * weight_scales.squeeze(-1)
    expected[:, :24] += bias
    assert torch.equal(linear(x), expected)


def test_groups_divide_the_inputs() -> None:
    """A group is the largest divisor within the limit, or all inputs where nothing fits."""
    assert [group_size(n) for n in (576, 1536, 4096, 320, 64, 200)] == [192, 192, 128, 160, 64, 200]


def test_an_outlier_costs_only_its_own_group_its_digits() -> None:
    """One huge input leaves the products of the other groups as precise as they were."""
    x, weight = _random(3, 384, seed=1), _random(16, 384, seed=2)
    x[:, 0], weight[:, :192] = 1e4, 0.0  # the outlier's group adds nothing but its rounding
    linear = make_linear([(weight, None)], num_outputs=16, num_inputs=384, dtype="w8a8")
    torch.testing.assert_close(linear(x), x @ weight.t(), rtol=0, atol=0.5)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 70), st.integers(0, 69))
def test_a_row_does_not_see_the_others(count: int, row: int) -> None:
    """A row of a product has the same bits in a batch of any size."""
    x = _random(70, 96, seed=1)
    linear = make_linear(
        [(_random(48, 96, seed=2), None)], num_outputs=48, num_inputs=96, dtype="w8a8"
    )
    rows = torch.arange(row, row + count) % 70
    assert torch.equal(linear(x[rows])[0], linear(x)[row])


def test_float_products_keep_their_type() -> None:
    """fp32 is the plain product; bf16 rounds to about three digits; both return fp32."""
    x, weight, bias = _random(5, 64, seed=1), _random(32, 64, seed=2), _random(32, seed=3)
    expected = x @ weight.t() + bias
    for dtype, tolerance in (("fp32", 1e-5), ("bf16", 0.3)):
        linear = make_linear([(weight, bias)], num_outputs=32, num_inputs=64, dtype=dtype)
        torch.testing.assert_close(linear(x), expected, rtol=0, atol=tolerance)
