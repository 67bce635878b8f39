"""Tensors as DistFlow's memory, on the device every machine has."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from services.worker.distflow_device import TensorMemory
from shared.distflow.flow import DistFlow
from shared.distflow.memory import Memory
from shared.distflow.region import Piece


@pytest.mark.parametrize("host", ["h", ""])
@pytest.mark.parametrize("source", ["tensor", "shared"])
def test_a_tensor_is_read_into_a_tensor(tmp_path: Path, host: str, source: str) -> None:
    """Its bytes arrive exactly where they were asked to go, from a tensor and from shared memory, on either way."""
    wanted = torch.randn(700, 1000).bfloat16()
    place = torch.zeros(800, 1000, dtype=torch.bfloat16)
    with (
        DistFlow(name="a", directory=tmp_path, host=host) as a,
        DistFlow(name="b", directory=tmp_path, host=host) as b,
    ):
        memory = TensorMemory(wanted)
        assert isinstance(memory, Memory)
        if source == "tensor":
            region = a.register(memory)
        else:
            buffer = a.allocate(memory.num_bytes)
            memory.load(0, buffer.view)
            region = a.register(buffer)
        link = b.link(a.offer("b"), timeout_s=5)
        into = TensorMemory(place[50:750])
        piece = Piece(region.id, region.generation, 0, region.num_bytes, into)
        b.transfer(link, [piece], timeout_s=10).wait()
    assert torch.equal(place[50:750], wanted)
    assert not place[:50].any()
    assert not place[750:].any()


def test_a_tensor_with_holes_is_refused() -> None:
    """What is not one run of bytes cannot be registered."""
    with pytest.raises(ValueError, match="contiguous"):
        TensorMemory(torch.zeros(4, 4)[:, :2])
