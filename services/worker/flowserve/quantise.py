"""W8A8's numbers: weights as int8 codes in groups of 32 along the inputs, and the layout in which kernels read them.

y[t, n] = sum over groups g of (sum over k in g of x_code[t, k] * w_code[n, k]) * w_scale[n, g] * x_scale[t, g].
The inner sum is exact. Groups of 32 for both sides, as in llama.cpp's Q8_0, keep SmolLM2's perplexity within 0.3 % of
fp32's; coarser ones let a single outlier cost its neighbours their digits. This module must not know models or files.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Floats: TypeAlias = npt.NDArray[np.float32]
Bits: TypeAlias = npt.NDArray[np.uint16]  # of bfloat16 values
Codes: TypeAlias = npt.NDArray[np.int8]
Bytes: TypeAlias = npt.NDArray[np.uint8]

GROUP = 32  # inputs that share a scale
PANEL = 32  # outputs that lie together when packed
_INPUTS_TOGETHER = 4  # inputs of one output that lie together: what one VNNI lane multiplies
_ZERO_POINT = 128  # packed codes are unsigned
_ROWS_AT_ONCE = 1 << 18  # elements quantised at once: their temporaries stay in cache


def quantise_weights(weights: Floats) -> tuple[Codes, Floats]:
    """Weights [N, K], K a multiple of 32 -> codes in -127..127 [N, K], scales [N, K / 32] that bfloat16 holds exactly.

    A scale is the group's largest magnitude / 127, rounded up, so that no code needs clipping. A group that is zero (or
    too small for a normal scale) has scale 1 and codes 0. Raises ValueError where a weight is not finite.
    """
    num_outputs, num_inputs = weights.shape
    num_groups = num_inputs // GROUP
    codes = np.empty((num_outputs, num_inputs), np.int8)
    scales = np.empty((num_outputs, num_groups), np.float32)
    step = max(1, _ROWS_AT_ONCE // num_inputs)
    for first in range(0, num_outputs, step):
        rows = slice(first, first + step)
        block = np.array(weights[rows], np.float32).reshape(-1, num_groups, GROUP)
        largest = np.maximum(block.max(-1), -block.min(-1)) / np.float32(127)
        if not np.isfinite(largest).all():
            raise ValueError("a weight is not a finite number")
        scale = from_bfloat16(_round_up(largest))
        scale[largest < np.finfo(np.float32).tiny] = 1.0
        np.divide(block, scale[:, :, None], out=block)
        np.rint(block, out=block)
        codes[rows] = block.reshape(-1, num_inputs)
        scales[rows] = scale
    return codes, scales


def pack(codes: Codes, scales: Floats) -> tuple[Bytes, Bits]:
    """Codes [N, K] and scales [N, K / 32], both N and K multiples of 32 -> codes + 128 as [N / 32, K / 4, 32, 4] and
    bfloat16 scales [N / 32, K / 32, 32].

    A panel of 32 outputs is read from front to back while its inputs go by, 4 inputs of an output side by side.
    """
    num_outputs, num_inputs = codes.shape
    panels = num_outputs // PANEL
    # Four codes travel as one word; flipping the top bit adds 128.
    words = (codes.view(np.uint8) ^ np.uint8(_ZERO_POINT)).view(np.uint32)
    turned = np.ascontiguousarray(words.reshape(panels, PANEL, -1).transpose(0, 2, 1))
    shape = (panels, num_inputs // _INPUTS_TOGETHER, PANEL, _INPUTS_TOGETHER)
    packed_codes = turned.view(np.uint8).reshape(shape)
    packed_scales = to_bfloat16(scales).reshape(panels, PANEL, -1).transpose(0, 2, 1)
    return packed_codes, np.ascontiguousarray(packed_scales)


def unpack(codes: Bytes, scales: Bits) -> tuple[Codes, Floats]:
    """The inverse of `pack`."""
    num_outputs = codes.shape[0] * PANEL
    words = np.ascontiguousarray(codes).view(np.uint32)[..., 0]  # [N / 32, K / 4, 32]
    plain = np.ascontiguousarray(words.transpose(0, 2, 1)).view(np.uint8)
    plain = plain.reshape(num_outputs, -1) ^ np.uint8(_ZERO_POINT)
    plain_scales = np.ascontiguousarray(scales.transpose(0, 2, 1)).reshape(num_outputs, -1)
    return plain.view(np.int8), from_bfloat16(plain_scales)


def to_bfloat16(values: Floats) -> Bits:
    """The nearest bfloat16 values, ties to even. Not for NaN."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    half = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return ((bits + half) >> np.uint32(16)).astype(np.uint16)


def from_bfloat16(bits: Bits) -> Floats:
    """bfloat16 as the float32 values that they are."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _round_up(values: Floats) -> Bits:
    """The smallest bfloat16 values that are not below `values`, which are not negative."""
    return ((values.view(np.uint32) + np.uint32(0xFFFF)) >> np.uint32(16)).astype(np.uint16)
