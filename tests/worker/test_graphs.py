"""Recorded decode steps: the same logits as without, whatever came and went between two replays."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from services.worker.flowserve.decoder import Floats, Span, StepInput
from services.worker.flowserve.device.device import MAX_GRAPH_ROWS, Device
from services.worker.flowserve.graphs import bucket_of, is_decode
from services.worker.flowserve.rank import Rank
from services.worker.flowserve.spmd.collective import Alone, Distributed
from services.worker.flowserve.torch_decoder import TorchDecoder
from tests.worker.drive import Driver, Sequence, random_ids
from tests.worker.recording import Recording, RecordingDevice
from tests.worker.tiny import FAMILIES, make_tiny


def _load(folder: Path, *, dtype: str = "fp32", graphs: bool = True) -> TorchDecoder:
    device: Device = RecordingDevice()
    return TorchDecoder.load(
        folder, dtype=dtype, cache_dir=folder.parent, device=device, graphs=graphs
    )


def _serve(decoder: TorchDecoder, *, seed: int) -> list[Floats]:
    """All logits of sequences that join, pause, go on, prefill beside others' decode, and end."""
    choose = random.Random(seed)
    driver = Driver(decoder)
    waiting = [Sequence(random_ids(choose.randint(2, 70), seed=n)) for n in range(14)]
    running: list[Sequence] = []
    done: list[Sequence] = []
    while waiting or running:
        if waiting and choose.random() < 0.4:
            running.append(waiting.pop())
        awake = choose.sample(running, choose.randint(0, len(running)))
        is_mixed = choose.random() < 0.3
        parts = [
            (one, min(len(one.ids) - one.computed, choose.randint(1, 30) if is_mixed else 1))
            for one in awake
        ]
        if parts:
            driver.step(parts)
        done += [one for one in running if one.computed == len(one.ids)]
        running = [one for one in running if one.computed < len(one.ids)]
    done.sort(key=lambda one: one.ids)
    return [one.logits for one in done]


@pytest.mark.parametrize("family", FAMILIES)
def test_replays_equal_eager_steps(tmp_path: Path, family: str) -> None:
    """Over batches that grow, shrink and mix decode with prompts, every logit is the one computed without graphs."""
    folder = make_tiny(tmp_path / "tiny", family, with_tokenizer=False)
    eager, recorded = _load(folder, graphs=False), _load(folder)
    for expected, actual in zip(_serve(eager, seed=1), _serve(recorded, seed=1), strict=True):
        np.testing.assert_allclose(actual, expected, atol=1e-4)
    assert eager.num_graphs == 0
    assert recorded.num_graphs >= 3


@pytest.mark.parametrize("dtype", ["bf16", "w8a8"])
def test_replays_equal_eager_steps_in_other_types(tmp_path: Path, dtype: str) -> None:
    """So it is in bf16 and W8A8, but for the roundings that a batch of another size has, and with a window."""
    folder = make_tiny(tmp_path / "tiny", "mistral", with_tokenizer=False, sliding_window=24)
    eager, recorded = _load(folder, dtype=dtype, graphs=False), _load(folder, dtype=dtype)
    expected, actual = (np.concatenate(_serve(one, seed=2)) for one in (eager, recorded))
    assert recorded.num_graphs >= 3
    difference = np.abs(actual - expected)
    assert difference.mean() < 0.02 * expected.std()
    assert difference.max() < 0.5 * expected.std()


def test_a_context_outgrows_its_graph(tmp_path: Path) -> None:
    """A sequence that passes the pages of its graph gets another one, and the same logits."""
    folder = make_tiny(tmp_path / "tiny", with_tokenizer=False)
    eager, recorded = _load(folder, graphs=False), _load(folder)
    ids = random_ids(1030)
    results = []
    for decoder in (eager, recorded):
        driver, sequence = Driver(decoder), Sequence(ids)
        driver.step([(sequence, 1020)])
        results.append(driver.run(sequence, 1).logits[1020:])
    np.testing.assert_allclose(results[1], results[0], atol=1e-4)
    assert recorded.num_graphs == 2


def test_rows_that_fill_up_leave_the_cache_alone(tmp_path: Path) -> None:
    """Five rows are computed as eight; the other three write no cell of any block."""
    folder = make_tiny(tmp_path / "tiny", with_tokenizer=False)
    decoder = _load(folder)
    decoder.allocate(8, 16)
    full = StepInput([5] * 8, [Span(3, 1, [n]) for n in range(8)], list(range(8)))
    decoder.forward(full)
    before = decoder.kv.read_blocks(range(5, 8)).copy()
    decoder.forward(StepInput([9] * 5, [Span(3, 1, [n]) for n in range(5)], list(range(5))))
    assert decoder.num_graphs == 1
    assert np.array_equal(decoder.kv.read_blocks(range(5, 8)), before)
    assert before.any()


def test_a_new_cache_gets_new_graphs(tmp_path: Path) -> None:
    """After `allocate` nothing is replayed that writes to the former cache."""
    decoder = _load(make_tiny(tmp_path / "tiny", with_tokenizer=False))
    step = StepInput([5], [Span(0, 1, [0])], [0])
    decoder.allocate(8, 16)
    first = decoder.forward(step).copy()
    former = decoder.kv
    decoder.allocate(8, 16)
    assert decoder.num_graphs == 0
    assert np.array_equal(decoder.forward(step), first)
    assert np.array_equal(decoder.kv.read_blocks([0]), former.read_blocks([0]))


def test_who_records_none(tmp_path: Path) -> None:
    """No graphs where the collective runs on the host, nor in pipelines; the description says so."""
    folder = make_tiny(tmp_path / "tiny", with_tokenizer=False)

    class OnHost(Alone):
        in_graphs = False

    decoder = TorchDecoder.load(
        folder, dtype="fp32", cache_dir=tmp_path, device=RecordingDevice(), collective=OnHost()
    )
    Driver(decoder).greedy([5, 6, 7], 3)
    assert decoder.num_graphs == 0
    assert "graphs" not in decoder.description
    assert "graphs" in _load(folder).description
    stage = TorchDecoder.load(
        folder, dtype="fp32", cache_dir=tmp_path, device=RecordingDevice(), rank=Rank(pp_size=2)
    )
    assert "graphs" not in stage.description


@pytest.mark.parametrize(
    ("backend", "tp_size", "expected"),
    [("gloo", 2, False), ("gloo", 1, True), ("nccl", 2, True), ("hccl", 2, False)],
)
def test_collectives_that_a_graph_may_hold(backend: str, tp_size: int, expected: bool) -> None:
    """Those that are known to run on the device when replayed, and those that do nothing."""
    collective = Distributed(
        Rank(tp_size=tp_size), backend=backend, place=torch.device("cpu"), store=-1
    )
    assert collective.in_graphs is expected


def test_buckets() -> None:
    """A bucket holds its rows, fills up less than half, and there are not many; beyond the largest there is none."""
    buckets = [bucket_of(n) for n in range(1, MAX_GRAPH_ROWS + 1)]
    for num_rows, bucket in enumerate(buckets, 1):
        assert bucket is not None
        assert num_rows <= bucket < 2 * num_rows
        assert bucket_of(bucket) == bucket
    assert sorted(set(map(int, filter(None, buckets)))) == [
        *(1, 2, 4, 8, 16, 24, 32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256)
    ]
    assert bucket_of(MAX_GRAPH_ROWS + 1) is None


def test_what_counts_as_decode() -> None:
    """Single rows that are all sampled; neither prompts, nor rows without logits, nor drafts of speculation."""
    step = StepInput([5, 6], [Span(3, 1, [0]), Span(4, 1, [1])], [0, 1])
    assert is_decode(step)
    assert not is_decode(replace(step, sample_rows=[1]))
    assert not is_decode(replace(step, spans=[Span(3, 2, [0])]))
    assert not is_decode(StepInput([], [], []))


def test_the_stand_in_is_as_strict_as_a_graph() -> None:
    """A value read back while recording is refused, and one worked out on the host stays what it was."""
    x, factor = torch.ones(2), [1.0]
    with pytest.raises(AssertionError, match="in a graph"):
        Recording(lambda: x * x.sum().item())
    recording = Recording(lambda: x * factor[0])
    x.fill_(3.0)
    factor[0] = 5.0
    assert recording.replay().tolist() == [3.0, 3.0]
