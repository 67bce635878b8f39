"""Traces as real prompts, and the command that sends them."""

from __future__ import annotations

from pathlib import Path

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.progress import Progress
from typer.testing import CliRunner

from deepflow.replay.cli import app
from deepflow.replay.live import Shot, Target, hit_share_ideal, replay_live, times_s
from deepflow.replay.prompts import Prompts
from deepflow.sim.trace import BLOCK, Call, conversations, lines
from tests.bench.test_client import OK, answering

QUIET = Progress(disable=True)


def call(*ids: int, tail: int = BLOCK, output: int = 100, at_ms: float = 0.0) -> Call:
    """A prompt of these blocks, the last one with `tail` tokens."""
    return Call(at_ms, (len(ids) - 1) * BLOCK + tail, output, ids)


def test_prompts_repeat_where_the_trace_says_so() -> None:
    """Two prompts agree on exactly as many tokens as they have leading blocks in common, and lengths are scaled."""
    prompts = Prompts(block=32)
    one, two = prompts.prompt(call(1, 2, 3)), prompts.prompt(call(1, 2, 4, tail=256))
    assert (len(one), len(two)) == (96, 80)
    assert one[:64] == two[:64]
    assert one[64:80] != two[64:]
    assert prompts.output_len(call(1)) == round(100 * 32 / BLOCK)


def test_a_seed_makes_one_replay() -> None:
    """The same seed gives the same prompts, another seed others."""
    first, again, other = (Prompts(seed=seed).prompt(call(1, 2)) for seed in (1, 1, 2))
    assert first == again != other


@settings(max_examples=30, deadline=None)
@given(
    block=st.sampled_from([1, 16, 64, 512]),
    context=st.integers(2, 600),
    num=st.integers(0, 12),
    tail=st.integers(1, BLOCK),
    output=st.integers(1, 100_000),
)
def test_every_prompt_fits(block: int, context: int, num: int, tail: int, output: int) -> None:
    """Prompt and output are at least a token each, and together never more than the context."""
    prompts = Prompts(block=block, context=context, max_output=context - 1)
    one = Call(0.0, max(num - 1, 0) * BLOCK + tail, output, tuple(range(num)))
    ids = prompts.prompt(one)
    assert len(ids) == prompts.prompt_len(one) >= 1
    assert prompts.output_len(one) >= 1
    assert len(ids) + prompts.output_len(one) <= context
    assert all(256 <= each < prompts.vocabulary for each in ids)


def test_the_ideal_counts_full_pages_that_came_before() -> None:
    """What a prompt shares with those before it counts, but for its last token."""
    prompts = Prompts(block=32)
    shots = [Shot(prompts.prompt(one), 1) for one in (call(1, 2), call(1, 2), call(1, 3))]
    assert hit_share_ideal(shots) == pytest.approx((0 + 48 + 32) / 192)


def test_a_trace_keeps_its_times() -> None:
    """The first request goes at once, the others as far after it as in the trace, or `speed` times sooner."""
    calls = [call(1, at_ms=500.0), call(1, at_ms=1500.0)]
    assert times_s(calls, 1.0) == [0.0, 1.0]
    assert times_s(calls, 4.0) == [0.0, 0.25]


USAGE = b'{"prompt_tokens":128,"completion_tokens":1,"prompt_tokens_details":{"cached_tokens":64}}'
ANSWER = (
    OK,
    b'data: {"choices":[{"text":"a","finish_reason":"length"}]}\n\n',
    b'data: {"choices":[],"usage":' + USAGE + b"}\n\ndata: [DONE]\n\n",
)


async def test_a_replay_sends_token_ids_and_tells_the_hits() -> None:
    """Every line of the trace is one request of the right length; hits are reported beside the ideal."""
    calls = [call(1, 2, output=8), call(1, 2, output=8, at_ms=50.0)]
    async with answering(*ANSWER) as (url, seen):
        target = Target(url=url, model="m")
        report = await replay_live(calls, "small", target, Prompts(block=64), QUIET)
    bodies = [orjson.loads(body) for body in seen[1::2]]
    assert [len(body["prompt"]) for body in bodies] == [128, 128]
    assert bodies[0]["prompt"] == bodies[1]["prompt"]
    assert {body["max_tokens"] for body in bodies} == {1}
    assert report.metrics["num_completed"] == 2
    assert report.metrics["hit_share"] == pytest.approx(0.5)
    assert report.metrics["hit_share_ideal"] == pytest.approx(112 / 256)
    assert report.settings["trace"] == "small"


def test_a_simulated_replay_is_repeatable(tmp_path: Path) -> None:
    """The same arguments give the same figures, another policy others; limits become a goodput."""
    trace = tmp_path / "trace.jsonl"
    trace.write_text("\n".join(lines(conversations(60, 0))))
    found = []
    for policy in ("deepflow", "deepflow", "round-robin"):
        target = tmp_path / "report.json"
        arguments = [
            str(trace),
            "--simulate",
            "--tes",
            "2",
            "--policy",
            policy,
            "--json",
            str(target),
        ]
        done = CliRunner().invoke(app, [*arguments, "--goodput", "ttft:60000"])
        assert done.exit_code == 0, done.output
        found.append(orjson.loads(target.read_bytes())["metrics"])
    assert found[0] == found[1] != found[2]
    assert found[0]["num_done"] == 60
    assert 0 < found[0]["hit_vs_ideal"] <= 1
    assert found[0]["goodput"] > 0


def test_the_command_tells_what_is_wrong(tmp_path: Path) -> None:
    """A trace that is none, neither or both ways of replaying, and a server that does not answer, with the reason."""
    trace = tmp_path / "trace.jsonl"
    trace.write_text("\n".join(lines(conversations(3, 0))))
    run = CliRunner().invoke
    assert "No such file" in run(app, [str(tmp_path / "none.jsonl"), "--url", "x"]).output
    neither = run(app, [str(trace)])
    assert neither.exit_code == 2
    assert "--url" in neither.output
    both = run(app, [str(trace), "--url", "x", "--simulate"])
    assert both.exit_code == 2
    unknown = run(app, [str(trace), "--simulate", "--policy", "chance"])
    assert unknown.exit_code == 2
    assert "chance" in unknown.output
    nobody = run(app, [str(trace), "--url", "http://127.0.0.1:9", "--num", "2", "--speed", "1000"])
    assert nobody.exit_code == 1
    assert "no request was answered" in nobody.output
