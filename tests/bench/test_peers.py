"""`bench peers`: what is measured in which order, what is kept, the ratios, and FlowServe as a contestant.

No peer is installed here. Where two engines are compared, both are FlowServe on a tiny model.
"""

from __future__ import annotations

import asyncio
import os
import sys
import zipfile
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from gguf.quants import dequantize, quantize
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from deepflow.bench.peers import environment, figures, picture, weights
from deepflow.bench.peers.contestant import Contestant
from deepflow.bench.peers.duel import Duel
from deepflow.bench.peers.figures import PeersReport
from deepflow.bench.peers.plan import (
    BARS,
    OURS,
    POINTS,
    Plan,
    Point,
    Round,
    prompts,
    turn_order,
    variants_left,
)
from deepflow.bench.peers.results import Results
from deepflow.bench.peers.roster import ROSTER, Peer, variants
from shared.errors import InvalidRequest, Unavailable
from tests.worker.tiny import make_tiny

rates = st.floats(0.1, 1e4)
rounds = st.lists(
    st.builds(Round, rates, st.dictionaries(st.sampled_from("ab"), rates, min_size=1)),
    min_size=1,
    max_size=4,
)


# ---------------------------------------------------------------------------------------------------------------- plan


@pytest.mark.parametrize("point", POINTS, ids=lambda point: point.name)
def test_a_sequence_never_outgrows_its_point(point: Point) -> None:
    """A prompt and all that is decoded after it stay within the KV length that the point is named for."""
    plan = Plan()
    decoded = 0 if point.is_prefill else plan.num_rounds * plan.decode_len
    assert 0 < plan.prompt_len(point) <= point.num_tokens - decoded
    assert plan.num_tokens >= max(1, point.batch) * point.num_tokens
    assert plan.max_num_seqs >= point.batch


def test_prompts_are_as_many_and_as_long_as_the_point_says_and_no_two_alike() -> None:
    """Everybody gets the same ids for the same key; other rounds and other prompts of a batch begin differently."""
    plan, point = Plan(), POINTS[3]
    given_ = prompts(point, plan, 1000, 0, "vllm", 0)
    assert given_ == prompts(point, plan, 1000, 0, "vllm", 0)
    other = prompts(point, plan, 1000, 0, "vllm", 1)
    assert [len(prompt) for prompt in given_] == [plan.prompt_len(point)] * point.batch
    assert all(100 <= token < 1000 for prompt in given_ for token in prompt)
    beginnings = {tuple(prompt[:16]) for prompt in given_ + other}
    assert len(beginnings) == 2 * point.batch


@given(st.integers(0, 9), st.lists(st.sampled_from("abc"), min_size=1, max_size=3, unique=True))
def test_every_side_has_one_turn_and_ours_leads_every_other_round(
    number: int, names: list[str]
) -> None:
    """A round holds each side once; who goes first changes from round to round."""
    order = turn_order(number, "peer", names)
    assert sorted(order) == sorted([(OURS, ""), *(("peer", name) for name in names)])
    assert (order[0] == (OURS, "")) == (number % 2 == 0)
    assert turn_order(number + 1, "peer", names) == order[::-1]


@given(rounds)
def test_only_the_fastest_variant_of_the_first_round_goes_on(done: list[Round]) -> None:
    """All variants begin; from the second round on the one that was fastest stays."""
    assert variants_left([], ["a", "b"]) == ("a", "b")
    (left,) = variants_left(done, ["a", "b"])
    assert done[0].theirs[left] == done[0].best


@pytest.mark.parametrize("peer", ROSTER)
@pytest.mark.parametrize("flags", [[], ["avx512_bf16"]])
def test_every_peer_has_a_variant_for_every_point(peer: str, flags: list[str]) -> None:
    """Whatever the processor, there is something to measure, and vLLM needs one variant for all points."""
    chosen = [variants(peer, point, flags) for point in POINTS]
    assert all(chosen)
    if peer == "vllm":
        assert len(set(chosen)) == len(chosen[0]) == 1


# ------------------------------------------------------------------------------------------------------------- figures


@given(st.dictionaries(st.sampled_from([point.name for point in POINTS]), rounds, min_size=1))
def test_the_ratio_of_a_group_is_the_worst_over_its_lengths_and_rounds(
    by_point: dict[str, list[Round]],
) -> None:
    """`vs_peer_group` is the least of ours / theirs, theirs being the faster variant; never above a point's median."""
    found = figures.metrics(POINTS, {"vllm": by_point})
    for point in POINTS:
        if point.name not in by_point:
            assert f"vs_vllm_{point.name}_worst" not in found
            continue
        done = by_point[point.name]
        worst = min(one.ours / max(one.theirs.values()) for one in done)
        assert found[f"vs_vllm_{point.name}_worst"] == worst
        assert found[f"vs_vllm_{point.group}"] <= worst <= found[f"vs_vllm_{point.name}_median"]
    groups = {point.group for point in POINTS if point.name in by_point}
    assert {f"vs_vllm_{group}" for group in groups} == {
        name for name in found if name in {bar.metric for bar in BARS}
    }


def _report() -> PeersReport:
    measured = {
        "vllm": {"prefill_512": [Round(100.0, {"bf16": 50.0}), Round(90.0, {"bf16": 60.0})]},
        "openvino": {"prefill_512": [Round(98.0, {"int8": 196.0, "q4_1": 20.0})]},
    }
    return PeersReport(
        bench="peers",
        metrics=figures.metrics(POINTS, measured),
        machine={"cores": 2},
        settings={"model": "tiny"},
        bars=BARS,
        points=("prefill_512", "prefill_2048"),
        engines=(OURS, "vllm", "openvino"),
    )


def test_the_table_has_a_column_per_engine_and_the_worst_ratio_beside_each_peer() -> None:
    """Medians side by side, the worst ratio in brackets, a dash where nothing was measured, a line for a missed bar."""
    text = StringIO()
    _report().show(Console(file=text, width=120))
    lines = [line.split() for line in text.getvalue().splitlines()]
    assert ["prefill_512", "98", "55", "(1.50)", "196", "(0.50)"] in lines
    assert ["prefill_2048", "-", "-", "-"] in lines
    missed = [line for line in text.getvalue().splitlines() if "MISSED" in line]
    assert len(missed) == 1
    assert "openvino" in missed[0]


def test_the_picture_is_a_picture(tmp_path: Path) -> None:
    """A PNG with all points is written, those that were not measured too."""
    target = tmp_path / "peers.png"
    picture.draw(_report(), target)
    assert target.read_bytes().startswith(b"\x89PNG")


# ------------------------------------------------------------------------------------------------------------- results


def test_an_interrupted_run_finds_its_rounds_again(tmp_path: Path) -> None:
    """Rounds are back under the same key; under another, when fresh, and from a damaged file there are none."""
    path, key = tmp_path / "results" / "vllm.json", {"threads": 2, "plan": (1, 2)}
    one, two = Round(3.0, {"bf16": 1.5}), Round(4.0, {"bf16": 2.5})
    first = Results.open(path, key, fresh=False)
    first.add("decode_1_kv512", one)
    first.add("decode_1_kv512", two)
    again = Results.open(path, key, fresh=False)
    assert again.rounds == {"decode_1_kv512": [one, two]}
    assert not Results.open(path, key | {"threads": 3}, fresh=False).rounds
    assert not Results.open(path, key, fresh=True).rounds
    path.write_bytes(path.read_bytes()[:-9])
    assert not Results.open(path, key, fresh=False).rounds


# ------------------------------------------------------------------------------------------------------------- weights


def test_the_other_forms_of_the_weights_hold_the_same_values(tmp_path: Path) -> None:
    """Matrices are stored anew from the dequantised values, vectors and metadata stay; what is no GGUF is refused."""
    rng = np.random.default_rng(0)
    matrix = quantize(rng.standard_normal((4, 64)).astype(np.float32), GGMLQuantizationType.Q4_1)
    vector = rng.standard_normal(64).astype(np.float32)
    source = tmp_path / "a.gguf"
    writer = GGUFWriter(source, "llama")
    writer.add_context_length(77)
    writer.add_token_list(["a", "b"])
    writer.add_tensor("m.weight", matrix, raw_dtype=GGMLQuantizationType.Q4_1)
    writer.add_tensor("v.weight", vector)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    expected = dequantize(matrix, GGMLQuantizationType.Q4_1)
    for kind, tolerance in (("q8_0", 0.02), ("f16", 0.002)):
        weights.convert(source, tmp_path / kind, kind)
        reader = GGUFReader(tmp_path / kind)
        stored = {tensor.name: tensor for tensor in reader.tensors}
        assert stored["m.weight"].tensor_type.name.lower() == kind
        found = dequantize(stored["m.weight"].data, stored["m.weight"].tensor_type)
        np.testing.assert_allclose(found, expected, atol=tolerance)
        np.testing.assert_array_equal(stored["v.weight"].data, vector)
        assert reader.fields["llama.context_length"].contents() == 77
        assert reader.fields["tokenizer.ggml.tokens"].contents() == ["a", "b"]


# --------------------------------------------------------------------------------------------------------- environment


def _make_wheel(folder: Path, name: str, *requires: str) -> None:
    """A wheel that holds nothing but its name and what it requires."""
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n"
    metadata += "".join(f"Requires-Dist: {requirement}\n" for requirement in requires)
    members = {
        "METADATA": metadata,
        "WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "RECORD": "",
    }
    with zipfile.ZipFile(folder / f"{name}-1-py3-none-any.whl", "w") as archive:
        for member, text in members.items():
            archive.writestr(f"{name}-1.dist-info/{member}", text)


async def test_an_environment_is_made_once(tmp_path: Path) -> None:
    """It holds what is wanted without what is left out, and is kept until the recipe is another one (here: in vain)."""
    log = tmp_path / "setup.log"
    _make_wheel(tmp_path, "bystander")
    _make_wheel(tmp_path, "loner", "bystander>=1", "absent>=1", 'more; extra == "all"')
    offline = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path)}
    peer = Peer(
        name="nobody",
        packages=("bystander",),
        bare=("loner==1",),
        leave_out=("absent",),
        build_env=offline,
    )
    folder = await environment.ensure(peer, tmp_path, log)
    installed = {path.name for path in folder.rglob("*.dist-info")}
    assert installed == {"bystander-1.dist-info", "loner-1.dist-info"}
    made = environment.python_of(folder).lstat().st_mtime_ns
    assert await environment.ensure(peer, tmp_path, log) == folder
    assert environment.python_of(folder).lstat().st_mtime_ns == made
    with pytest.raises(Unavailable, match="absent"):
        await environment.ensure(replace(peer, packages=("absent",)), tmp_path, log)


# ---------------------------------------------------------------------------------------------------------- contestant


def _flowserve(tmp_path: Path, **options: Any) -> Any:
    folder = tmp_path / "tiny"
    if not folder.exists():
        make_tiny(folder, vocab=300)
    env = environment.clean_env() | {
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "DEEPFLOW_CACHE": str(tmp_path / "cache"),
    }
    given_ = {
        "model": str(folder),
        "weights": {},
        "scratch": str(tmp_path),
        "variants": ["w8a8"],
        "threads": 1,
        "num_tokens": 1024,
        "max_num_seqs": 4,
    }
    log = tmp_path / "flowserve.log"
    return Contestant.start(OURS, Path(sys.executable), env, given_ | options, log)


async def _stopped(process: psutil.Process) -> None:
    """Returns once the kernel has delivered the signal to all threads."""
    async with asyncio.timeout(10):
        while process.status() != psutil.STATUS_STOPPED:
            await asyncio.sleep(0.01)


async def test_flowserve_takes_its_turns_and_stands_still_between_them(tmp_path: Path) -> None:
    """Prefill and three legs of decoding give rates; between turns the process is stopped; afterwards it is gone."""
    async with _flowserve(tmp_path) as contestant:
        process = next(
            child
            for child in psutil.Process(os.getpid()).children()
            if "runner.py" in " ".join(child.cmdline())
        )
        assert contestant.described["settings"]["threads"] == 1
        await _stopped(process)
        assert await contestant.prefill("", list(range(10, 90))) > 0
        await contestant.open("", [list(range(start, start + 40)) for start in (20, 60, 100)])
        for _ in range(3):
            assert await contestant.decode("", 3 * 8, 60.0) > 0
            await _stopped(process)
        await contestant.close("")
        assert await contestant.prefill("", list(range(30, 70))) > 0
    assert not process.is_running()


async def test_a_driver_that_fails_says_why(tmp_path: Path) -> None:
    """An exception in a driver is Unavailable with its text, not a hang."""
    with pytest.raises(Unavailable, match=r"flowserve: .*nowhere"):
        async with _flowserve(tmp_path, model=str(tmp_path / "nowhere")):
            pass


async def test_a_duel_goes_on_where_it_was(tmp_path: Path) -> None:
    """Rounds that are done are not repeated, both variants begin, one goes on, and every round is handed over."""
    plan = Plan(
        points=(
            Point(name="prefill_64", group="prefill", batch=0, num_tokens=64),
            Point(name="decode_2_kv64", group="decode_1", batch=2, num_tokens=64),
        ),
        num_rounds=3,
        decode_len=4,
    )
    async with _flowserve(tmp_path) as ours, _flowserve(tmp_path) as rival:
        rival.name = "rival"
        duel = Duel(ours, rival, plan, vocab=300, seed=0)
        kept: list[tuple[str, Round]] = []
        prefill, decode = plan.points
        await duel.measure(prefill, (), ("a", "b"), lambda *one: kept.append(one))
        assert [set(one.theirs) for _, one in kept] == [{"a", "b"}, *[{_winner(kept[0][1])}] * 2]
        assert all(one.ours > 0 and one.best > 0 for _, one in kept)
        kept.clear()
        await duel.measure(decode, (Round(1.0, {"a": 1.0}),), ("a",), lambda *one: kept.append(one))
        assert [name for name, _ in kept] == [decode.name] * 2
        await duel.measure(
            prefill, [Round(1.0, {"a": 1.0})] * 3, ("a",), lambda *one: kept.append(one)
        )
        assert len(kept) == 2


def _winner(one: Round) -> str:
    return max(one.theirs, key=lambda variant: one.theirs[variant])


def test_a_model_that_peers_cannot_read_is_refused(tmp_path: Path) -> None:
    """Only a model published as GGUF can be compared; the message names those there are."""

    class Nobody:
        def step(self, name: str, total_bytes: int) -> None:
            raise AssertionError(name)

        def advance(self, num_bytes: int) -> None:
            raise AssertionError

    with pytest.raises(InvalidRequest, match="smollm2-135m"):
        weights.prepare("something-else", tmp_path, Nobody())
