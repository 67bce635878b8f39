"""Rotary position embedding (RoFormer, arXiv 2104.09864) and the ways its frequencies are stretched for long contexts.

Angles are computed once, into a table; a step only gathers rows of it, so a row's rotation depends on its position and
on nothing else. This module must not know layers or the cache.
"""

from __future__ import annotations

import math

import torch

from services.worker.flowserve.config import ModelConfig, RopeConfig


class RotaryTable:
    """cos and sin of every position of the context, fp32 [context, head_dim] each, scaled as the model wants.

    The two halves of a row repeat each other, except that sin's first half is negated: rotation is then
    `x * cos + swapped(x) * sin`, three element-wise operations that round alike on every row.
    """

    def __init__(self, config: ModelConfig) -> None:
        frequencies, scale = inverse_frequencies(config.rope, config.head_dim, config.context)
        angles = torch.outer(torch.arange(config.context, dtype=torch.float32), frequencies)
        cos, sin = angles.cos() * scale, angles.sin() * scale
        self._cos = torch.cat((cos, cos), dim=-1)
        self._sin = torch.cat((-sin, sin), dim=-1)

    def rows(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """positions int64 [T] -> (cos, sin), each [T, 1, head_dim], to be broadcast over heads."""
        return self._cos[positions].unsqueeze(1), self._sin[positions].unsqueeze(1)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x [T, heads, head_dim], cos and sin [T, 1, head_dim] -> x rotated, in the pairs (i, i + head_dim / 2).

    Products and sum are separate calls: a fused multiply-add rounds differently in a vector's tail than in its body,
    which would let a row's bits depend on its place in the batch.
    """
    swapped = x.roll(x.shape[-1] // 2, dims=-1)
    return (x * cos).add_(swapped.mul_(sin))


def inverse_frequencies(
    rope: RopeConfig, head_dim: int, context: int
) -> tuple[torch.Tensor, float]:
    """Frequencies fp32 [head_dim / 2], and the factor on cos and sin.

    `dynamic` (NTK) stretches only beyond the trained context, which is also the longest that is served: within it, it
    equals `default`. llama3 is Meta's smoothed interpolation; yarn is arXiv 2309.00071.
    """
    frequencies = 1.0 / _powers(rope.theta, head_dim)
    if rope.kind == "linear":
        return frequencies / rope.scaling["factor"], 1.0
    if rope.kind == "llama3":
        return _llama3(rope, frequencies), 1.0
    if rope.kind == "yarn":
        return _yarn(rope, head_dim, context)
    return frequencies, 1.0


def _powers(theta: float, head_dim: int) -> torch.Tensor:
    """theta^(2i / head_dim), fp32 [head_dim / 2]."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    return torch.pow(theta, exponents)


def _llama3(rope: RopeConfig, frequencies: torch.Tensor) -> torch.Tensor:
    """Long waves are interpolated by `factor`, short ones left alone, those between are blended."""
    scaling = rope.scaling
    factor, low, high = scaling["factor"], scaling["low_freq_factor"], scaling["high_freq_factor"]
    original = scaling["original_max_position_embeddings"]
    waves = 2 * math.pi / frequencies
    smooth = (original / waves - low) / (high - low)
    blended = (1 - smooth) * frequencies / factor + smooth * frequencies
    stretched = torch.where(waves > original / low, frequencies / factor, blended)
    return torch.where(waves < original / high, frequencies, stretched)


def _yarn(rope: RopeConfig, head_dim: int, context: int) -> tuple[torch.Tensor, float]:
    """Interpolates the dimensions that turn fewer than `beta_slow` times in the trained context, keeps those that turn
    more than `beta_fast` times, ramps between, and sharpens attention by the returned factor."""
    scaling = rope.scaling
    original = scaling["original_max_position_embeddings"]
    factor = scaling.get("factor") or context / original

    def dimension(turns: float) -> float:
        """The dimension that turns so often within the trained context."""
        return head_dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low = dimension(scaling.get("beta_fast") or 32)
    high = dimension(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001  # the ramp must not divide by zero
    ramp = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    powers = _powers(rope.theta, head_dim)
    frequencies = (1.0 / (factor * powers)) * ramp + (1.0 / powers) * (1 - ramp)
    return frequencies, _yarn_scale(rope, factor)


def _yarn_scale(rope: RopeConfig, factor: float) -> float:
    scaling = rope.scaling
    if scaling.get("attention_factor") is not None:
        return float(scaling["attention_factor"])

    def magnitude(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        return magnitude(scaling["mscale"]) / magnitude(scaling["mscale_all_dim"])
    return magnitude(1.0)
