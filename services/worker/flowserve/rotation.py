"""Rotations that a decoder's weights take up, so that what is quantised between them has fewer outliers.

The idea is QuaRot's (arXiv 2404.00456). This module must not know how anything is quantised, or laid out.
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np

from services.worker.flowserve.checkpoint import Checkpoint
from services.worker.flowserve.config import ModelConfig, ModelError
from services.worker.flowserve.quantise import Floats
from services.worker.flowserve.rank import HIDDEN_UNIT
from services.worker.flowserve.tensorfile import Array

_EMBED: Final = "model.embed_tokens.weight"
_BEFORE_ATTENTION, _BEFORE_MLP, _LAST = "input_layernorm", "post_attention_layernorm", "model.norm"


class Rotation:
    """Turns rows [..., width] by an orthogonal matrix: Hadamard's, in blocks of up to `most`, a power of two.

    It spreads an outlier over its block, so that what is scaled together with it loses fewer digits to it.
    """

    def __init__(self, width: int, most: int = 64) -> None:
        size = math.gcd(width, most)
        matrix = np.ones((1, 1))
        while len(matrix) < size:
            matrix = np.block([[matrix, matrix], [matrix, -matrix]])
        self.matrix: Floats = (matrix / math.sqrt(size)).astype(np.float32)

    def __call__(self, rows: Floats) -> Floats:
        blocks = rows.reshape(*rows.shape[:-1], -1, len(self.matrix))
        turned: Floats = (blocks @ self.matrix).reshape(rows.shape)
        return turned


class RotatedCheckpoint:
    """A checkpoint of the same model whose residual stream and whose values are kept rotated.

    What reads the residual undoes it in its weights, what adds to it does it there, and a root mean square does not see
    it; only a norm's weights would, so they go into the products behind, and become ones. Values are rotated head by
    head as they are made, and attention's output, a sum of them, is turned back by the product behind it. What an MLP
    computes within is another matter: who uses these weights has to rotate it by `of_hidden`, except in the experts of
    a mixture. All this is exact but for rounding. Raises ModelError as a checkpoint does, and naming a tensor with a
    number that is not finite, which would spread.
    """

    def __init__(self, config: ModelConfig, checkpoint: Checkpoint) -> None:
        self._config = config
        self._checkpoint = checkpoint
        self._of_rows = Rotation(config.width)
        self._of_heads = Rotation(config.head_dim)

    def of_hidden(self, size: int) -> Rotation:
        """Of the `size` hidden values of an MLP: in blocks that no rank has only a part of."""
        return Rotation(size, HIDDEN_UNIT)

    def stored(
        self, name: str, shape: tuple[int, ...], *, rows: range | None = None
    ) -> tuple[Array, str]:
        """The embeddings, rotated, and their type."""
        assert name == _EMBED, name
        return self._of_rows(self._read(name, shape, rows=rows)), "F32"

    def floats(
        self,
        name: str,
        shape: tuple[int, ...],
        *,
        rows: range | None = None,
        columns: range | None = None,
    ) -> Floats:
        """As of a checkpoint. Embeddings are asked for like this only where they are the last product, too. Rows and
        columns of attention are those of whole heads."""
        values = self._read(name, shape, rows=rows, columns=columns)
        module, kind = name.rsplit(".", 2)[-2:]
        if module in (_BEFORE_ATTENTION, _BEFORE_MLP) or name == f"{_LAST}.weight":
            return np.ones_like(values)
        if module in ("q_norm", "k_norm"):
            return values
        if module in ("o_proj", "down_proj", "w2"):  # what adds to the residual
            if name.endswith("o_proj.weight"):
                values = self._by_head(values)
            elif name.endswith("down_proj.weight") and ".experts." not in name:
                values = self.of_hidden(shape[1])(values)
            return self._of_rows(values.T).T if kind == "weight" else self._of_rows(values)
        if kind == "weight":  # what reads the residual, through a norm
            values = self._of_rows(values * self._norm(name))
            return self._by_head(values.T).T if module == "v_proj" else values
        return self._by_head(values) if module == "v_proj" else values

    def _by_head(self, values: Floats) -> Floats:
        """[..., heads * D]."""
        heads = values.reshape(*values.shape[:-1], -1, self._config.head_dim)
        return self._of_heads(heads).reshape(values.shape)

    def _norm(self, name: str) -> Floats:
        """The weights of the norm before the product `name`."""
        parts = name.split(".")
        norm = _LAST
        if parts[:2] == ["model", "layers"]:
            last = _BEFORE_ATTENTION if parts[3] == "self_attn" else _BEFORE_MLP
            norm = ".".join((*parts[:3], last))
        return self._read(f"{norm}.weight", (self._config.width,))

    def _read(
        self,
        name: str,
        shape: tuple[int, ...],
        *,
        rows: range | None = None,
        columns: range | None = None,
    ) -> Floats:
        values = self._checkpoint.floats(name, shape, rows=rows, columns=columns)
        if not np.isfinite(values).all():
            raise ModelError(f"tensor {name!r} holds a number that is not finite")
        return values
