"""Which accelerators each TE is shown."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.worker.flowserve.config import ModelError
from services.worker.visible import num_places, present, visible


def shown(
    device: str, env: dict[str, str], num_present: int, num_ranks: int, num: int
) -> list[str]:
    """What the first `num` TEs see."""
    views = [
        visible(device, env, num_present=num_present, place=place, num_ranks=num_ranks)
        for place in range(num)
    ]
    assert all(len(view) == 1 for view in views)
    return [next(iter(view.values())) for view in views]


def test_each_te_sees_its_own_devices() -> None:
    """One after the other, as many as the model has ranks."""
    assert shown("cuda", {}, 8, 2, 4) == ["0,1", "2,3", "4,5", "6,7"]
    assert visible("npu", {}, num_present=8, place=0, num_ranks=4) == {
        "ASCEND_RT_VISIBLE_DEVICES": "0,1,2,3"
    }


def test_what_the_pod_host_was_shown_is_shared_out_in_ascending_order() -> None:
    """Only those that the variable names, sorted by number; names of cards stay in their order."""
    assert shown("npu", {"ASCEND_RT_VISIBLE_DEVICES": "10,2, 9,3"}, 16, 2, 2) == ["2,3", "9,10"]
    assert shown("cuda", {"CUDA_VISIBLE_DEVICES": "GPU-b,GPU-a"}, 8, 1, 2) == ["GPU-b", "GPU-a"]


def test_tes_share_where_there_are_too_few() -> None:
    """More TEs than devices for them begin again at the first."""
    assert shown("cuda", {}, 1, 1, 3) == ["0"] * 3
    assert shown("cuda", {}, 5, 2, 3) == ["0,1", "2,3", "0,1"]


def test_one_te_cannot_share_with_itself() -> None:
    """The message says how many are needed, and who says there are fewer."""
    with pytest.raises(ModelError, match=r"over 4 executors .* CUDA_VISIBLE_DEVICES=0,1"):
        visible("cuda", {"CUDA_VISIBLE_DEVICES": "0,1"}, num_present=8, place=0, num_ranks=4)
    with pytest.raises(ModelError, match="there are 1"):
        visible("npu", {}, num_present=1, place=0, num_ranks=2)


def test_the_cpu_and_unknown_devices_are_left_alone() -> None:
    """There is nothing to share out."""
    assert visible("cpu", {}, num_present=0, place=3, num_ranks=4) == {}
    assert visible("cuda", {}, num_present=0, place=0, num_ranks=1) == {}
    hidden = {"CUDA_VISIBLE_DEVICES": ""}
    assert visible("cuda", hidden, num_present=8, place=0, num_ranks=1) == {}


def test_devices_are_counted_by_their_nodes(tmp_path: Path) -> None:
    """Control nodes are no devices."""
    for name in ("davinci0", "davinci7", "davinci_manager", "nvidia0", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    assert [present(device, tmp_path) for device in ("npu", "cuda", "cpu")] == [2, 1, 0]


def test_as_many_tes_as_devices_allow_have_their_own() -> None:
    """What the environment hides is not counted; on the CPU, and where there are no nodes, there is no such number."""
    assert num_places("cuda", {}, num_present=8, num_ranks=2) == 4
    assert num_places("cuda", {"CUDA_VISIBLE_DEVICES": "3, 1,5"}, num_present=8, num_ranks=2) == 1
    assert num_places("npu", {"CUDA_VISIBLE_DEVICES": ""}, num_present=2, num_ranks=1) == 2
    assert num_places("cuda", {}, num_present=0, num_ranks=1) is None
    assert num_places("cpu", {}, num_present=0, num_ranks=1) is None
