"""Rotary position embedding (RoFormer, arXiv 2104.09864) and the ways its frequencies are stretched for long contexts.

Angles are computed once, into a table that grows with the longest sequence; a step only gathers rows of it, so a row's
rotation depends on its position and on nothing else. This module must not know layers or the cache.
"""

from __future__ import annotations

import math

import numpy as np

from services.worker.flowserve.config import ModelConfig, RopeConfig
from services.worker.flowserve.quantise import Floats

_FIRST = 256  # positions of the first table; then it doubles, so that a short-lived engine computes no long one


class RotaryTable:
    """cos and sin of every position so far asked for, scaled as the model wants.

    Both are kept for one half of a head: x[i] and x[i + head_dim / 2] turn together, by the same angle. `scale` is the
    factor that is in them.
    """

    def __init__(self, config: ModelConfig) -> None:
        self._frequencies, self.scale = inverse_frequencies(
            config.rope, config.head_dim, config.context
        )
        self._cos = np.empty((0, config.head_dim // 2), np.float32)
        self._sin = self._cos

    def upto(self, position: int) -> tuple[Floats, Floats]:
        """(cos, sin), fp32 [at least position + 1, head_dim / 2] each, contiguous. Rows once given never change; the
        arrays may be others after a later call."""
        while len(self._cos) <= position:
            stop = max(2 * len(self._cos), _FIRST)
            positions = np.arange(len(self._cos), stop, dtype=np.float32)
            # Angles are rounded as everyone rounds them. Their cosines are taken in double precision, which leaves
            # next to nothing to this machine's own approximation.
            angles = np.outer(positions, self._frequencies).astype(np.float64)
            cos, sin = (np.cos(angles) * self.scale), (np.sin(angles) * self.scale)
            self._cos = np.concatenate((self._cos, cos.astype(np.float32)))
            self._sin = np.concatenate((self._sin, sin.astype(np.float32)))
        return self._cos, self._sin


def inverse_frequencies(rope: RopeConfig, head_dim: int, context: int) -> tuple[Floats, float]:
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


def _powers(theta: float, head_dim: int) -> Floats:
    """theta^(2i / head_dim), fp32 [head_dim / 2]."""
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    return np.power(theta, exponents.astype(np.float64)).astype(np.float32)


def _llama3(rope: RopeConfig, frequencies: Floats) -> Floats:
    """Long waves are interpolated by `factor`, short ones left alone, those between are blended."""
    scaling = rope.scaling
    factor, low, high = scaling["factor"], scaling["low_freq_factor"], scaling["high_freq_factor"]
    original = scaling["original_max_position_embeddings"]
    waves = 2 * math.pi / frequencies
    smooth = (original / waves - low) / (high - low)
    blended = (1 - smooth) * frequencies / factor + smooth * frequencies
    stretched = np.where(waves > original / low, frequencies / factor, blended)
    return np.where(waves < original / high, frequencies, stretched)


def _yarn(rope: RopeConfig, head_dim: int, context: int) -> tuple[Floats, float]:
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
    ramp = np.clip((np.arange(head_dim // 2, dtype=np.float32) - low) / (high - low), 0, 1)
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
