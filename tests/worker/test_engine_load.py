"""What an engine says of its load, and what it does about work that comes too late."""

from __future__ import annotations

import pytest

from services.worker.shell import _retry_after_s
from shared import errors
from shared.messages import Band
from tests.worker.arithmetic import ArithmeticDecoder
from tests.worker.bench import PROMPT, Bench, request

pytestmark = pytest.mark.usefixtures("mode")


def test_load_tells_what_is_left_to_do(decoder: ArithmeticDecoder) -> None:
    """Slots, blocks and predicted work, growing with what is submitted and gone when it is done."""
    bench = Bench(decoder, max_num_seqs=2)
    idle = bench.engine.load()
    assert (idle.running, idle.waiting, idle.free_slots) == (0, 0, 2)
    assert idle.outstanding_s == idle.blocks_used == idle.step_ms == 0
    outstanding = 0.0
    for name in "abc":
        bench.submit(request(name))
        assert bench.engine.load().outstanding_s > outstanding
        outstanding = bench.engine.load().outstanding_s
    bench.step()
    busy = bench.engine.load()
    assert (busy.running, busy.waiting, busy.free_slots) == (2, 1, 0)
    assert busy.blocks_used == 10
    bench.run()
    done = bench.engine.load()
    assert (done.running, done.waiting, done.outstanding_s) == (0, 0, 0)
    assert done.blocks_cached > 0
    assert bench.engine.counters["requests_length"] == 3
    assert bench.engine.counters["generation_tokens"] == 3 * 24


def test_load_tells_band_batch_apart_and_counts_on_what_is_predicted(
    decoder: ArithmeticDecoder,
) -> None:
    """What yields is a part of the predicted work, and not of the tokens that wait; a predicted length goes before the
    average; speeds are told once they are measured."""
    bench = Bench(decoder, max_num_seqs=2)
    assert (bench.engine.load().prefill_us, bench.engine.load().decode_us) == (0, 0)
    bench.submit(request("b", band=Band.BATCH))
    only = bench.engine.load()
    assert only.outstanding_batch_s == only.outstanding_s > 0
    assert only.waiting_tokens == 0
    bench.submit(request("d"))
    both = bench.engine.load()
    assert 0 < both.outstanding_batch_s < both.outstanding_s
    assert both.waiting_tokens == len(PROMPT)
    bench.engine.submit(request("e"), expected_output=1)
    short = bench.engine.load().outstanding_s - both.outstanding_s
    assert short < both.outstanding_s - both.outstanding_batch_s
    bench.run()
    idle = bench.engine.load()
    assert min(idle.prefill_us, idle.decode_us) > 0
    assert (idle.outstanding_batch_s, idle.waiting_tokens) == (0, 0)


def test_what_would_give_way_is_not_waited_for(decoder: ArithmeticDecoder) -> None:
    """Whoever finds the TE full is told when there may be room: work in band BATCH is in nobody else's way."""
    bench = Bench(decoder)
    for number in range(40):
        bench.submit(request(str(number), band=Band.BATCH))
    assert _retry_after_s(bench.engine, Band.DEFAULT) == 1.0
    assert _retry_after_s(bench.engine, Band.BATCH) > 5.0


def test_what_cannot_be_answered_in_time_is_not_computed(
    decoder: ArithmeticDecoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prompt that would take longer than its deadline allows for certain is ended before anything is computed for it;
    one that has more time is not, nor one that is cached."""
    bench = Bench(decoder)
    bench.submit(request("first"))
    bench.run()
    monkeypatch.setattr(bench.engine._pace, "least_prefill_s", float)
    num_prompt, steps = len(PROMPT), bench.engine.counters["steps"]
    new = [token + 1 for token in PROMPT]
    bench.submit(request("late", new, deadline_ms=1000 * num_prompt - 500))
    bench.step()
    assert bench.engine.counters["steps"] == steps
    assert (bench.finishes["late"], bench.tokens("late")) == ("failed", [])
    failure = bench.ends["late", 0].failure
    assert failure is not None
    assert failure.code == errors.DeadlineExceeded.code
    bench.submit(request("in time", new, deadline_ms=1000 * num_prompt + 500))
    bench.submit(request("cached", PROMPT, deadline_ms=1000 * num_prompt - 500))
    bench.run()
    assert bench.finishes["in time"] == bench.finishes["cached"] == "length"


def test_who_may_find_its_pages_in_time_is_not_late(
    decoder: ArithmeticDecoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that waits for a slot while another computes what both begin with finds it then, and needs next to nothing;
    what differs from the first page on is late."""
    bench = Bench(decoder, max_num_seqs=1, max_batched_tokens=20)
    monkeypatch.setattr(bench.engine._pace, "least_prefill_s", float)
    bench.submit(request("first", deadline_ms=1_000_000, max_tokens=1))
    bench.step()
    bench.submit(request("same", deadline_ms=30_000))
    bench.submit(request("other", PROMPT[1:], deadline_ms=30_000))
    bench.run()
    assert (bench.finishes["same"], bench.finishes["other"]) == ("length", "failed")


def test_what_is_on_its_way_is_not_late(
    decoder: ArithmeticDecoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step that was launched may be done at any moment: its answer is waited for until the deadline itself."""
    bench = Bench(decoder)
    bench.submit(request("first", PROMPT[:8], max_tokens=40))
    bench.step()
    bench.submit(request("last", max_tokens=1, deadline_ms=20_000))
    bench.step()
    monkeypatch.setattr(bench.engine._pace, "least_prefill_s", float)
    bench.run()
    assert bench.finishes["last"] == "length"


def test_what_is_late_is_ended_while_it_is_computed(
    decoder: ArithmeticDecoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When other work has used up its time, the rest of a prompt is not computed; an answer that has begun goes on to
    its deadline."""
    bench = Bench(decoder, max_batched_tokens=24, max_num_seqs=4)
    monkeypatch.setattr(bench.engine._pace, "least_prefill_s", float)
    bench.submit(request("begun", PROMPT[:8], deadline_ms=80_000, max_tokens=400))
    bench.submit(request("slow", deadline_ms=80_000))
    bench.step()
    bench.now = 60.0
    bench.step()
    bench.step()
    assert "begun" not in bench.finishes
    assert bench.finishes.get("slow") == "failed"
    bench.now = 80.0
    bench.run()
    assert bench.finishes["begun"] == "failed"
    assert bench.tokens("begun")
