"""The rotary table: the angles of the formula, whatever the order in which positions are asked for."""

from __future__ import annotations

import numpy as np

from services.worker.flowserve.config import ModelConfig
from services.worker.flowserve.rope import RotaryTable

CONFIG = ModelConfig.from_dict(
    {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
        "max_position_embeddings": 10000,
        "vocab_size": 32,
    }
)


def test_the_table_grows_and_never_changes() -> None:
    """It reaches as far as asked, keeps the rows that it has, and equals one that was asked at once."""
    table = RotaryTable(CONFIG)
    short = [half.copy() for half in table.upto(0)]
    long = table.upto(9999)
    at_once = RotaryTable(CONFIG).upto(9999)
    for before, after, other in zip(short, long, at_once, strict=True):
        assert after.shape[0] > 9999
        assert after.shape[1] == CONFIG.head_dim // 2
        assert after.flags.c_contiguous
        assert np.array_equal(after[: len(before)], before)
        assert np.array_equal(after, other)


def test_angles_are_those_of_the_formula() -> None:
    """Dimension i of position p turns by p / theta^(2i / D)."""
    cos, sin = RotaryTable(CONFIG).upto(5000)
    angle = 4097 / 10000.0 ** (2 * np.arange(16) / 32)
    np.testing.assert_allclose(cos[4097], np.cos(angle), rtol=0, atol=5e-4)
    np.testing.assert_allclose(sin[4097], np.sin(angle), rtol=0, atol=5e-4)
