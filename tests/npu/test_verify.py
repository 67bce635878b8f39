"""The checks of `deepflow verify --device npu` on the NPU's own code, over torch-npu's operators on the CPU.

On a host with NPUs the same checks run on the real ones; here they show that the code passes them, and that they can
fail.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from deepflow.verify import models
from deepflow.verify.checks import against, blocks_on, graphs_on, reference
from services.worker.flowserve.device.npu import NpuDevice
from services.worker.flowserve.torch_decoder import TorchDecoder
from tests.npu.host import HostRuntime

pytestmark = pytest.mark.usefixtures("npu_operators")


def write(folder: Path, family: str) -> Path:
    """The family's small model."""
    return models.write(folder / family, models.describe(family))


@pytest.mark.parametrize("dtype", ["bf16", "w8a8"])
@pytest.mark.parametrize("family", models.FAMILIES)
def test_every_family_computes_what_the_cpu_computes(
    tmp_path: Path, family: str, dtype: str
) -> None:
    """Within the tolerance that the same command will hold the hardware to."""
    folder, device = write(tmp_path, family), NpuDevice(HostRuntime())
    traces = reference(folder, str(tmp_path), device.page)
    decoder = TorchDecoder.load(
        folder, dtype=dtype, cache_dir=tmp_path, device=device, graphs=False
    )
    answer = against(traces, decoder, device.page, dtype)
    assert answer["num_wrong"] == 0


@pytest.mark.parametrize("family", ["llama", "qwen2_moe"])
def test_captured_steps_compute_what_eager_steps_compute(tmp_path: Path, family: str) -> None:
    """Graphs are recorded, and their replays give the same tokens."""
    folder, device = write(tmp_path, family), NpuDevice(HostRuntime())
    answer = graphs_on(device, folder, "bf16", tmp_path)
    assert answer["num_graphs"] > 0
    assert answer["num_wrong"] == 0


def test_blocks_go_to_the_host_and_back(tmp_path: Path) -> None:
    """To other places, with the same bits."""
    folder, device = write(tmp_path, "mistral"), NpuDevice(HostRuntime())
    answer = blocks_on(device, folder, "bf16", tmp_path)
    assert answer["num_blocks"] > 1
