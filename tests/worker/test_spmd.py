"""One model over several processes: the tokens are those of one, and a rank that is lost is noticed and named."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from safetensors.numpy import load_file, save_file

from services.worker.flowserve.backend import Backend
from services.worker.flowserve.config import ModelConfig, ModelError
from services.worker.flowserve.decoder import Decoder, Floats, Span, StepInput
from services.worker.flowserve.spmd.crew import Loss
from services.worker.flowserve.spmd.decoder import SpmdDecoder
from shared.errors import Internal
from tests.worker.bench import GREEDY, PROMPT, Bench, request
from tests.worker.tiny import make_tiny

pytestmark = pytest.mark.timeout(120)

# Two KV heads: with four ranks each is on two of them.
FAMILIES = ("llama", "qwen3", "mixtral", "qwen2_moe", "qwen3_moe")
SHAPES = [
    ("llama", "fp32", 1, 2),
    ("qwen3", "fp32", 2, 2),
    ("mixtral", "fp32", 4, 1),
    ("qwen2_moe", "w8a8", 2, 1),
]
if os.environ.get("DEEPFLOW_SOAK"):
    SHAPES += [
        ("llama", "fp32", 2, 1),
        ("llama", "fp32", 4, 1),
        ("qwen3", "w8a8", 2, 1),
        ("qwen3_moe", "fp32", 2, 2),
    ]


STEP = StepInput([5], [Span(0, 1, [0])], [0])


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {family: make_tiny(folder / family, family, layers=3) for family in FAMILIES}


class Spread:
    """Loads models over several processes, and hears of the ranks that are lost."""

    def __init__(self) -> None:
        self.losses: list[Loss] = []
        self._decoders: list[SpmdDecoder] = []

    def load(self, folder: Path, dtype: str = "fp32", *, tp: int = 1, pp: int = 1) -> SpmdDecoder:
        decoder = load(folder, dtype, tp=tp, pp=pp, on_loss=self.losses.append)
        assert isinstance(decoder, SpmdDecoder)
        self._decoders.append(decoder)
        return decoder

    def close(self) -> None:
        for decoder in self._decoders:
            decoder.close()


@pytest.fixture
def spread() -> Iterator[Spread]:
    spread = Spread()
    yield spread
    spread.close()
    assert not children()


def load(
    folder: Path,
    dtype: str = "fp32",
    *,
    tp: int = 1,
    pp: int = 1,
    on_loss: Callable[[Loss], None] | None = None,
) -> Decoder:
    backend = Backend.of(folder, device="cpu", dtype=dtype, kernels="torch", tp=tp, pp=pp)
    return backend.load(folder, threads=1, cache_dir=folder.parent / "cache", on_loss=on_loss)


def children(pid: int | None = None) -> list[psutil.Process]:
    """The executors of a process (this one) that are still there, by rank."""
    found = [
        child
        for child in psutil.Process(pid).children()
        if "services.worker.flowserve.spmd.executor" in child.cmdline()
    ]
    return sorted(found, key=lambda child: child.create_time())


def serve(decoder: Any) -> Bench:
    """Prompts of several chunks, a shared prefix, late arrivals, blocks for about two thirds of it."""
    bench = Bench(decoder, num_blocks=16, max_num_seqs=8, max_batched_tokens=24)
    for number in range(4):
        bench.submit(request(f"early{number}", PROMPT[number : 10 + 18 * number], **GREEDY))
    for _ in range(3):
        bench.step()
    bench.submit(request("long", PROMPT, **GREEDY), request("again", PROMPT[:40], **GREEDY))
    bench.run()
    return bench


@pytest.mark.parametrize(("model", "dtype", "tp", "pp"), SHAPES)
def test_the_tokens_are_those_of_one_process(
    folders: dict[str, Path], spread: Spread, model: str, dtype: str, tp: int, pp: int
) -> None:
    """Chunks, prefix hits, preemptions and a changing batch give the same greedy tokens over tp * pp ranks."""
    expected = serve(load(folders[model], dtype))
    decoder = spread.load(folders[model], dtype, tp=tp, pp=pp)
    config = ModelConfig.from_folder(folders[model])
    backend = Backend.pick(config, device="cpu", dtype=dtype, kernels="torch", tp=tp, pp=pp)
    assert decoder.bytes_per_block(16) == backend.bytes_per_block
    bench = serve(decoder)
    assert bench.ids == expected.ids
    assert bench.engine.counters["preemptions"] > 0
    assert bench.engine.counters["prefix_hits"] > 0
    assert len(children()) == tp * pp - 1
    assert not spread.losses


def compute_on(decoder: SpmdDecoder) -> None:
    """Step after step, until one raises."""
    while True:
        decoder.forward(STEP)


BLOWS = {signal.SIGKILL: "was killed by SIGKILL", signal.SIGSTOP: "gave no sign of life"}


@pytest.mark.parametrize(
    ("blow", "tp", "pp"), [(signal.SIGKILL, 1, 2), (signal.SIGKILL, 4, 1), (signal.SIGSTOP, 2, 1)]
)
def test_a_rank_that_is_lost_is_noticed_and_named(
    folders: dict[str, Path], spread: Spread, blow: signal.Signals, tp: int, pp: int
) -> None:
    """Killed or stopped in the middle of work: told once within seconds, the call raises, nobody is left over."""
    decoder = spread.load(folders["llama"], tp=tp, pp=pp)
    decoder.allocate(4, 16)
    assert decoder.forward(STEP).shape == (1, 512)
    child = children()[-1]
    os.kill(child.pid, blow)
    started = time.monotonic()
    with pytest.raises(Internal, match=rf"\(process {child.pid}\) {BLOWS[blow]}"):
        compute_on(decoder)
    assert time.monotonic() - started < 10
    assert [(loss.rank, loss.pid) for loss in spread.losses] == [(tp * pp - 1, child.pid)]
    assert not children()
    with pytest.raises(Internal, match=f"rank {tp * pp - 1}"):
        decoder.forward(STEP)


def test_ctrl_c_waits_for_the_end_of_a_step(
    folders: dict[str, Path], spread: Spread, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An interrupt in the middle of a step is raised once no rank is left in it; all go on together afterwards."""
    decoder = spread.load(folders["llama"], pp=2)
    decoder.allocate(4, 16)
    expected = decoder.forward(STEP).copy()
    compute = decoder._own.forward

    def interrupted(step: StepInput) -> Floats:
        signal.raise_signal(signal.SIGINT)
        return compute(step)

    monkeypatch.setattr(decoder._own, "forward", interrupted)
    decoder.begin(STEP)
    with pytest.raises(KeyboardInterrupt):
        decoder.finish()
    assert np.array_equal(decoder.finish(), expected)
    monkeypatch.undo()
    assert np.array_equal(decoder.forward(STEP), expected)
    assert not spread.losses


def test_a_rank_that_cannot_load_says_why(
    folders: dict[str, Path], spread: Spread, tmp_path: Path
) -> None:
    """What only another rank can find wrong with the model is raised here, in its words, and nobody is left over."""
    folder = tmp_path / "broken"
    shutil.copytree(folders["llama"], folder)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.2.mlp.down_proj.weight"]  # of the second stage
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"layers\.2\.mlp\.down_proj"):
        spread.load(folder, pp=2)
    assert not children()


def test_a_rank_that_dies_as_it_starts_is_named(
    folders: dict[str, Path], spread: Spread, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that ends before it has said anything is no reason to wait for ever."""
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    with pytest.raises(Internal, match=r"rank 1 \(process \d+\) exited with 1"):
        spread.load(folders["llama"], tp=2)


def test_a_step_that_fails_in_rank_0_is_told_as_its_loss(
    folders: dict[str, Path], spread: Spread
) -> None:
    """The others wait in a step that rank 0 has left: they are ended, and the fault is named."""
    decoder = spread.load(folders["llama"], pp=2)
    decoder.allocate(4, 16)
    with pytest.raises(Internal, match=r"rank 0 .* failed in a step: IndexError"):
        decoder.forward(StepInput([1 << 20], [Span(0, 1, [0])], [0]))
    assert [loss.rank for loss in spread.losses] == [0]
    assert not children()


def test_a_model_that_cannot_be_cut_starts_nothing(
    folders: dict[str, Path], spread: Spread
) -> None:
    """The message says what cannot be shared among how many."""
    with pytest.raises(ModelError, match="3 ranks cannot share 4 attention heads"):
        spread.load(folders["llama"], tp=3)
    assert not children()


ALONE = """
import os, sys, time
from pathlib import Path
from services.worker.flowserve.backend import Backend
folder = Path(sys.argv[1])
backend = Backend.of(folder, device="cpu", dtype="fp32", tp=2)
decoder = backend.load(folder, threads=1, cache_dir=folder.parent / "cache")
decoder.allocate(4, 16)
print("ready", flush=True)
time.sleep(60)
"""


def test_ranks_die_with_a_parent_that_is_killed(folders: dict[str, Path]) -> None:
    """kill -9 of the process of rank 0 ends the others, a stopped one too."""
    parent = subprocess.Popen(
        [sys.executable, "-c", ALONE, str(folders["llama"])], stdout=subprocess.PIPE
    )
    assert parent.stdout is not None
    assert parent.stdout.readline() == b"ready\n"
    (child,) = children(parent.pid)
    child.suspend()
    parent.kill()
    parent.communicate()
    _, alive = psutil.wait_procs([child], timeout=5)
    assert not alive
