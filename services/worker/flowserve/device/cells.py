"""Keys and values moved from some positions to others, in a cache of torch's: layers [blocks, 2 * kv heads, page, D],
the key heads first. This module must not know whose blocks they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeAlias

import numpy as np
import torch

from services.worker.flowserve.decoder import Splice
from services.worker.flowserve.pic import Angles

Cells: TypeAlias = tuple[torch.Tensor, torch.Tensor]  # blocks, and positions within them


def move(
    layers: Iterable[torch.Tensor], page: int, splice: Splice, angles: Angles, place: torch.device
) -> None:
    """Do a splice in all layers, which are at `place`. Keys turn by `angles`, [D / 2, positions] each."""
    cos, sin = (torch.from_numpy(x.T.copy()).to(place)[:, None] for x in angles)
    (old_blocks, old), (new_blocks, new) = (
        _cells(table, start, splice.length, page, place)
        for table, start in ((splice.source, splice.source_start), (splice.table, splice.start))
    )
    for layer in layers:
        rows = layer[old_blocks, :, old]  # [positions, 2 * kv heads, D]
        if splice.source_start != splice.start:
            keys = rows[:, : rows.shape[1] // 2]
            a, b = keys.float().chunk(2, dim=2)
            keys.copy_(torch.cat((a * cos - b * sin, b * cos + a * sin), dim=2))
        layer[new_blocks, :, new] = rows


def _cells(table: Sequence[int], start: int, length: int, page: int, place: torch.device) -> Cells:
    positions = np.arange(start, start + length)
    blocks = np.asarray(table, np.int64)[positions // page]
    return torch.from_numpy(blocks).to(place), torch.from_numpy(positions % page).to(place)
