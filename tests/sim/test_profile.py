"""Profiles: steps, runs of steps, files; and calibration from measured runs."""

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepflow.sim.calibration import Run, errors, fit, of_bench, open_profile
from deepflow.sim.profile import NPU_34B_TP4, PRESETS, SMOLLM2_CORE, SMOLLM2_CPU, Profile, pairs
from shared.errors import InvalidRequest

PROFILES = st.sampled_from(list(PRESETS.values()))


@settings(max_examples=50)
@given(PROFILES, st.integers(1, 64), st.integers(0, 50_000), st.integers(1, 200))
def test_a_run_of_decode_steps_takes_as_long_as_its_steps(
    profile: Profile, batch: int, context: int, num_steps: int
) -> None:
    """The closed form is the sum; the context grows by the batch with every step."""
    steps = [
        profile.step_s(num_decodes=batch, decode_context=context + batch * n)
        for n in range(num_steps)
    ]
    assert profile.decode_s(batch, context, num_steps) == pytest.approx(sum(steps))


@settings(max_examples=50)
@given(PROFILES, st.integers(1, 64), st.integers(0, 50_000), st.floats(0.0, 100.0))
def test_the_steps_that_fit_into_a_time_fit_and_one_more_does_not(
    profile: Profile, batch: int, context: int, seconds: float
) -> None:
    """The inverse of the closed form, exactly."""
    num_steps = profile.num_decode_steps(batch, context, seconds)
    assert profile.decode_s(batch, context, num_steps) <= seconds
    assert profile.decode_s(batch, context, num_steps + 1) > seconds


@settings(max_examples=50)
@given(PROFILES, st.integers(1, 4000), st.integers(0, 3999))
def test_a_prompt_takes_as_long_as_its_chunks(profile: Profile, length: int, cached: int) -> None:
    """Chunk after chunk, each looking back on all before it; what is cached is looked back on, not computed."""
    start = min(cached, length - 1)
    total = profile.token_s
    while start < length:
        rows = min(profile.max_batched_tokens, length - start)
        total += profile.step_s(num_prefill=rows, prefill_pairs=pairs(start, rows))
        start += rows
    assert profile.prefill_s(length, min(cached, length - 1)) == pytest.approx(total)


def test_an_empty_step_takes_no_time_and_rows_go_on_beyond_the_table() -> None:
    """Between two measured numbers of rows it is linear, after the last one as between the last two."""
    profile = SMOLLM2_CPU.with_(rows=((1, 1.0), (3, 2.0)))
    assert profile.step_s() == 0.0
    assert [profile.rows_s(rows) for rows in (1, 2, 3, 5)] == pytest.approx([1.0, 1.5, 2.0, 3.0])


@pytest.mark.parametrize("profile", PRESETS.values(), ids=lambda profile: profile.name)
def test_a_profile_survives_its_file(profile: Profile, tmp_path) -> None:
    """Written, read, equal; and found by name or by file."""
    path = tmp_path / "profile.json"
    path.write_bytes(profile.to_json())
    assert open_profile(str(path)) == profile == open_profile(profile.name)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("format", "x"),
        ("version", 0),
        ("rows", [[1, 2.0], [1, 3.0]]),
        ("rows", [[1, 2.0], [2, 1.0]]),
        ("rows", "many"),
        ("token_s", -1.0),
        ("kv_tokens", 0),
        ("max_num_seqs", 1 << 20),
    ],
)
def test_a_bad_profile_is_refused_and_the_field_named(field: str, value: object) -> None:
    """Whoever wrote the file learns where to look."""
    body = orjson.loads(NPU_34B_TP4.to_json())
    with pytest.raises(InvalidRequest) as caught:
        Profile.from_json(orjson.dumps(body | {field: value}))
    assert caught.value.param == field


def test_calibration_finds_the_profile_that_the_runs_came_from() -> None:
    """Runs of batches and prompts that a known engine would have made give that engine back."""
    true = SMOLLM2_CORE
    runs = [
        Run.of_decode(batch, context, true.decode_s(batch, batch * context, 1))
        for batch in (1, 2, 4, 8, 16, 32, 64)
        for context in (64, 1024)
    ]
    runs += [
        Run.of_prefill(length, 256, true.prefill_s(length))
        for length in (8, 16, 32, 64, 128, 256, 512, 2048)
    ]
    found = fit(runs, SMOLLM2_CPU, name="found")
    assert max(map(abs, errors(found, runs))) < 0.02
    assert found.token_s == pytest.approx(true.token_s, rel=0.1)
    assert found.decode_pair_s == pytest.approx(true.decode_pair_s, rel=0.1)


def test_a_report_of_the_engines_bench_is_a_profile_too() -> None:
    """Few points, so what they do not tell is as in the preset; what they tell is met."""
    metrics = {"decode_tps_1": 60.0, "decode_tps_8": 300.0, "prefill_tps_256": 1000.0}
    settings_ = {
        "model": "m",
        "max_batched_tokens": 256,
        "max_num_seqs": 64,
        "prompt_len": 256,
        "output_len": 64,
        "batches": [1, 8],
        "prefill_lengths": [256],
    }
    found = of_bench({"bench": "engine", "metrics": metrics, "settings": settings_})
    assert 8 / found.decode_s(8, 8 * 288, 1) == pytest.approx(300.0, rel=0.02)
    assert 256 / found.prefill_s(256) == pytest.approx(1000.0, rel=0.02)
    with pytest.raises(InvalidRequest):
        of_bench({"bench": "bus", "metrics": {}, "settings": {}})


def test_without_runs_there_is_no_profile() -> None:
    """Nothing measured is an error, not a guess."""
    with pytest.raises(InvalidRequest):
        fit([], SMOLLM2_CPU)
