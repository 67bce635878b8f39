"""A model on its way into a TE: its profile, its canary, and what is said of the steps; real weights, no bus."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path

import pytest

from services.worker.flowserve.config import ModelError
from services.worker.flowserve.engine import Engine
from services.worker.flowserve.prepared import find_prepared
from services.worker.loading import Loading
from services.worker.profile import (
    VERSION,
    Canary,
    Profile,
    ProfileKey,
    read_profile,
    write_profile,
)
from services.worker.settings import TeSettings
from services.worker.tie import Loaded, Ready, StepTook, TeEvent, WeightsCame
from shared.catalog import open_model
from shared.scaling_messages import Step
from tests.worker.peers import MODEL, make_model

KEY = ProfileKey(recipe="r", device="d", room="2048 tokens")
PROFILE = Profile(
    recipe="r",
    device="d",
    num_blocks=128,
    canary=Canary(ids=[7], logprobs=[-1.0], gaps=[0.5]),
)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    make_model(tmp_path)
    return tmp_path


class Start:
    """One start of a TE in this process, and what it said."""

    def __init__(self, cache: Path, dtype: str = "w8a8", kernels: str = "auto") -> None:
        env = {
            "DEEPFLOW_CACHE": str(cache),
            "DEEPFLOW_HOME": str(cache),
            "DEEPFLOW_TE_MODEL": MODEL,
            "DEEPFLOW_TE_POD": "pod-1",
            "DEEPFLOW_DTYPE": dtype,
            "DEEPFLOW_KERNELS": kernels,
            "DEEPFLOW_KV_TOKENS": "2048",
            "DEEPFLOW_THREADS": "1",
        }
        self.said: list[TeEvent] = []
        settings = TeSettings.load(env)
        self.loading = Loading(open_model(cache, MODEL), settings, say=self.said.append)

    def load(self) -> Engine:
        engine = self.loading.load(lambda: None)
        self.loading.ready()
        return engine

    def run(self) -> None:
        """To its end: what was found out is kept."""
        self.load().close()
        asyncio.run(self.loading.keep())


def spoil(path: Path) -> None:
    """Have one tensor of a prepared file hold something else."""
    data = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    entries = json.loads(data[8:start])
    first, end = entries["layers.0.qkv.codes"]["data_offsets"]
    data[start + first : start + end] = bytes(reversed(data[start + first : start + end]))
    path.write_bytes(data)


def profile_of(cache: Path) -> Path:
    (path,) = (cache / "profiles").iterdir()
    return path


def test_a_start_says_its_steps_in_their_order(cache: Path) -> None:
    """Load, where the weights came from, progress, post-load, ready; and nothing of the dummy request stays behind."""
    start = Start(cache)
    engine = start.load()
    steps = [event.step for event in start.said if isinstance(event, StepTook)]
    assert steps == [Step.TE_LOAD, Step.TE_POST_LOAD]
    assert all(event.seconds >= 0 for event in start.said if isinstance(event, StepTook))
    percents = [event.percent for event in start.said if isinstance(event, Loaded)]
    assert percents == sorted(set(percents))
    assert start.said[-1] == Ready()
    assert start.loading.percent == 100
    assert engine.index_snapshot() == []
    assert engine.ledger()["live"] == 0
    engine.close()


def test_the_second_start_finds_weights_in_memory_and_a_profile(cache: Path) -> None:
    """What the first start found out is stored: blocks and canary; the next one uses it."""
    first = Start(cache)
    first.run()
    assert first.loading.profile is None
    second = Start(cache)
    engine = second.load()
    profile = second.loading.profile
    assert profile is not None
    assert engine.settings.num_blocks == profile.num_blocks == 128
    assert WeightsCame("dram") in second.said
    engine.close()


@pytest.mark.parametrize("dtype", ["w8a8", "fp32"])
def test_a_wrong_canary_refuses_to_be_ready(cache: Path, dtype: str) -> None:
    """Weights that are whole, but do not bring the profile's tokens, are read once more, and then name the model."""
    Start(cache, dtype).run()
    path = profile_of(cache)
    raw = json.loads(path.read_bytes())
    raw["canary"]["logprobs"] = [value - 5.0 for value in raw["canary"]["logprobs"]]
    path.write_text(json.dumps(raw))
    start = Start(cache, dtype)
    with pytest.raises(ModelError, match=MODEL):
        start.load()
    assert Ready() not in start.said


def test_spoiled_weights_are_noticed_and_prepared_anew(cache: Path) -> None:
    """The canary differs and the file is not what its digest says: it is made again, and the TE comes up."""
    Start(cache).run()
    path = next(cache.rglob("packed.safetensors"))
    whole = path.read_bytes()
    spoil(path)
    start = Start(cache)
    start.load().close()
    assert start.said[-1] == Ready()
    assert path.read_bytes() == whole


def test_spoiled_weights_make_no_profile(cache: Path) -> None:
    """Nothing is kept of a first start whose weights turn out not to be whole."""
    Start(cache).run()
    profile_of(cache).unlink()
    spoil(next(cache.rglob("packed.safetensors")))
    Start(cache).run()
    assert not list((cache / "profiles").iterdir())
    assert find_prepared(open_model(cache, MODEL).path, cache) is not None


@pytest.mark.parametrize(
    "fields",
    [
        {"version": VERSION + 1},
        {"recipe": "other"},
        {"room": "other"},
        {"num_blocks": 0},
        {"num_blocks": "128"},
        {"canary": {"ids": [], "logprobs": [], "gaps": []}},
        {"canary": {"ids": [7], "logprobs": [], "gaps": [0.5]}},
        {"canary": {"ids": ["7"], "logprobs": [-1.0], "gaps": [0.5]}},
        {"canary": None},
        {"more": 1},
    ],
    ids=str,
)
def test_a_profile_that_is_not_ours_is_ignored(tmp_path: Path, fields: dict[str, object]) -> None:
    """Another version, another subject, or nonsense: as if there were none."""
    write_profile(PROFILE, KEY, tmp_path)
    assert read_profile(KEY, tmp_path) == PROFILE
    path = KEY.path(tmp_path)
    path.write_text(json.dumps(json.loads(path.read_bytes()) | fields))
    assert read_profile(KEY, tmp_path) is None


def test_a_torn_profile_is_ignored(tmp_path: Path) -> None:
    """Half a file, an empty one, one that is no object."""
    write_profile(PROFILE, KEY, tmp_path)
    path = KEY.path(tmp_path)
    whole = path.read_bytes()
    for torn in (whole[: len(whole) // 2], b"", b"[]", b"7"):
        path.write_bytes(torn)
        assert read_profile(KEY, tmp_path) is None


def test_near_ties_may_fall_either_way_and_nothing_else() -> None:
    """Equal within the tolerance, a token that was as good as tied, and what is wrong."""
    canary = Canary(ids=[7, 8], logprobs=[-1.0, -2.0], gaps=[0.5, 0.05])
    assert canary.equals(replace(canary, logprobs=[-1.05, -2.0]), 0.1)
    assert not canary.equals(replace(canary, logprobs=[-1.3, -2.0]), 0.1)
    assert canary.equals(replace(canary, ids=[7, 9]), 0.1)
    assert not canary.equals(replace(canary, ids=[9, 8]), 0.1)
    assert not canary.equals(replace(canary, ids=[7]), 0.1)
