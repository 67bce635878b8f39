"""The engine: the life of a request, and its end."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from services.worker.flowserve.config import ModelConfig
from services.worker.flowserve.decoder import Floats, StepInput
from services.worker.flowserve.engine import Engine
from services.worker.flowserve.life import MAX_CHOICES
from shared import blockhash, errors
from shared.messages import Cancel, Delta, Failure, Replay
from tests.worker.arithmetic import ArithmeticDecoder
from tests.worker.bench import GREEDY, PAGE, PROMPT, ROOT, SEEDED, Bench, request
from tests.worker.tiny import make_tiny

pytestmark = pytest.mark.usefixtures("mode")


# --------------------------------------------------------------------------------------------------- ends of a choice


def test_a_choice_ends_at_its_stop_token(decoder: ArithmeticDecoder) -> None:
    """The stop token is the last of the ids and is named; before min_tokens it is not drawn."""
    bench = Bench(decoder)
    bench.submit(request("free", **GREEDY))
    bench.run()
    stop = bench.tokens("free")[4]
    first = bench.tokens("free").index(stop)
    bench.submit(request("stopped", stop_token_ids=[stop], **GREEDY))
    bench.submit(request("later", stop_token_ids=[stop], min_tokens=8, **GREEDY))
    bench.run()
    assert bench.tokens("stopped") == bench.tokens("free")[: first + 1]
    end = bench.ends["stopped", 0]
    assert (end.finish, end.stop_id) == ("stop", stop)
    assert stop not in bench.tokens("later")[:8]


def test_end_of_sequence_counts_unless_ignored(decoder: ArithmeticDecoder) -> None:
    """The model's own end ids stop a choice, or not, as asked."""
    bench = Bench(decoder)
    forced = {"logit_bias": {2: 100.0}, "max_tokens": 3, **GREEDY}
    bench.submit(request("a", ignore_eos=False, **forced), request("b", **forced))
    bench.run()
    assert bench.tokens("a") == [2]
    assert bench.ends["a", 0].stop_id == 2
    assert bench.tokens("b") == [2, 2, 2]
    assert (bench.ends["b", 0].finish, bench.ends["b", 0].stop_id) == ("length", None)


def test_an_end_token_in_the_prompt_ends_nothing(decoder: ArithmeticDecoder) -> None:
    """A conversation's prompt may end with the very token that ends answers."""
    bench = Bench(decoder)
    bench.submit(request(prompt=[*PROMPT, 2], ignore_eos=False, logit_bias={2: -100.0}))
    bench.run()
    assert len(bench.tokens()) == 24


def test_a_full_context_ends_a_choice(decoder: ArithmeticDecoder) -> None:
    """Prompt and output together stay within the context, here the pool of 6 blocks."""
    bench = Bench(decoder, num_blocks=6)
    assert bench.engine.context == 96
    bench.submit(request(max_tokens=500))
    bench.run()
    assert len(bench.tokens()) == 96 - 70
    assert bench.finishes["r"] == "length"


def test_every_token_has_its_logprobs(decoder: ArithmeticDecoder) -> None:
    """Each delta brings as many as ids, best first, and a greedy token is the best."""
    bench = Bench(decoder)
    bench.submit(request(logprobs=2, **GREEDY))
    while bench.engine.has_work():
        for _, delta in bench.step().deltas:
            assert delta.logprobs is not None
            for token, logprobs in zip(delta.ids, delta.logprobs, strict=True):
                assert logprobs.top_ids[0] == token
                assert logprobs.top_logprobs[0] == logprobs.logprob < 0
                assert len(logprobs.top_ids) == 2


# ------------------------------------------------------------------------------------------------------- cancellation


@pytest.mark.parametrize("num_steps", [0, 1, 3, 8])
def test_cancelling_frees_blocks_at_once(decoder: ArithmeticDecoder, num_steps: int) -> None:
    """Waiting, in prefill or decoding: the cancel returns the terminal deltas and leaves no live block."""
    bench = Bench(decoder, max_batched_tokens=32, max_num_seqs=2)
    bench.submit(request(n=3))
    for _ in range(num_steps):
        bench.step()
    deltas = bench.engine.cancel(Cancel(request="r", attempt=0))
    assert bench.engine.ledger()["live"] == 0
    for _, delta in deltas:
        bench.take(delta)
    assert {key: end.finish for key, end in bench.ends.items()} == {
        ("r", choice): "cancelled" for choice in range(3)
    }
    assert bench.engine.cancel(Cancel(request="r", attempt=0)) == []
    bench.run()
    assert bench.finishes == {"r": "cancelled"}


def test_one_choice_can_be_cancelled(decoder: ArithmeticDecoder) -> None:
    """The others go on to their own ends."""
    bench = Bench(decoder)
    bench.submit(request(n=2, **SEEDED))
    bench.step()
    bench.step()
    for _, delta in bench.engine.cancel(Cancel(request="r", attempt=0, choice=0, keep=1)):
        bench.take(delta)
    bench.run()
    assert bench.ends["r", 0].finish == "cancelled"
    assert bench.ends["r", 1].finish == "length"


def test_output_past_a_stop_string_is_not_indexed(decoder: ArithmeticDecoder) -> None:
    """Cancelled with keep, before or after its own end, a choice leaves only whole kept pages in the index."""
    for num_steps in (22, 50):
        bench = Bench(decoder)
        bench.submit(request(**GREEDY))
        for _ in range(num_steps):
            bench.step()
        bench.engine.cancel(Cancel(request="r", attempt=0, choice=0, keep=11))
        kept = PROMPT + bench.tokens()[:11]
        assert bench.engine.index_snapshot() == blockhash.chain(ROOT, kept, PAGE)


def test_a_cancel_may_overtake_its_request(decoder: ArithmeticDecoder) -> None:
    """What was cancelled before it came is refused; the next attempt is not."""
    bench = Bench(decoder)
    bench.engine.cancel(Cancel(request="r", attempt=1))
    with pytest.raises(errors.InvalidRequest, match="cancelled"):
        bench.engine.submit(request(attempt=1))
    bench.submit(request(attempt=2))
    assert bench.engine.cancel(Cancel(request="r", attempt=1)) == []
    bench.run()
    assert bench.finishes == {"r": "length"}


def test_an_old_cancel_does_not_undo_a_newer_one(decoder: ArithmeticDecoder) -> None:
    """Cancels may change places on their way: the highest attempt counts."""
    bench = Bench(decoder)
    for attempt in (1, 0):
        bench.engine.cancel(Cancel(request="r", attempt=attempt))
    with pytest.raises(errors.InvalidRequest, match="cancelled"):
        bench.engine.submit(request(attempt=1))


def test_a_refused_request_ends_too(decoder: ArithmeticDecoder) -> None:
    """One terminal delta for each choice that was to be generated, and the end of the request."""
    bench = Bench(decoder)
    refused = request(n=3, output=[[4], [5, 6]], ended=[0])
    bench.ids["r", 1] = [5, 6]
    for _, delta in bench.engine.refuse(refused, Failure(code="overloaded", message="full")):
        bench.take(delta)
    bench.run()
    assert {key: end.finish for key, end in bench.ends.items()} == {
        ("r", 1): "failed",
        ("r", 2): "failed",
    }
    assert bench.finishes == {"r": "failed"}


def test_a_silent_client_loses_all_its_requests(decoder: ArithmeticDecoder) -> None:
    """Its requests end without a word, those of others go on."""
    bench = Bench(decoder)
    bench.submit(request("a", client="gone"), request("b"), request("c", client="gone"))
    for _ in range(2):
        bench.engine.step()
    bench.engine.cancel_client("gone")
    bench.ids["b", 0] = [0, 0]
    bench.index = set(bench.engine.index_snapshot())
    assert list(bench.engine.ledger()["owners"]) == ["b#0/0"]  # type: ignore[arg-type]
    bench.run()
    assert bench.finishes == {"a": "cancelled", "b": "length", "c": "cancelled"}


# ------------------------------------------------------------------------------------- attempts, replays, deadlines


def test_a_repeated_submission_changes_nothing(
    decoder: ArithmeticDecoder, alone: list[int]
) -> None:
    """The same attempt again, early, late or after the end, is the same request."""
    bench = Bench(decoder)
    one = request(max_tokens=2)
    bench.submit(one, one)
    bench.step()
    bench.engine.submit(one)
    bench.run()
    bench.engine.submit(one)
    assert not bench.engine.has_work()
    assert len(bench.tokens()) == 2


def test_a_newer_attempt_replaces_an_older_one(
    decoder: ArithmeticDecoder, kind: dict[str, Any], alone: list[int]
) -> None:
    """The old attempt ends as cancelled, the new one goes on from the tokens given; the old cannot come back."""
    bench = Bench(decoder)
    bench.submit(request(**kind))
    for _ in range(6):
        bench.step()
    old = request(**kind)
    bench.engine.submit(request(attempt=1, output=[alone[:4]], **kind))
    tokens, ends = alone[:4], []
    while bench.engine.has_work():
        for _, delta in bench.engine.step().deltas:
            if delta.attempt == 1:
                tokens += delta.ids
            if delta.finish is not None:
                ends.append((delta.attempt, delta.finish))
    assert tokens == alone
    assert ends == [(0, "cancelled"), (1, "length")]
    with pytest.raises(errors.InvalidRequest, match="later attempt"):
        bench.engine.submit(old)


def test_what_is_already_complete_ends_at_once(decoder: ArithmeticDecoder) -> None:
    """A resubmission with nothing left to generate gets its end; ended choices are not touched."""
    bench = Bench(decoder)
    given = [[5] * 4, [5, 2], [5]]
    bench.submit(
        request(attempt=1, n=3, output=given, ended=[0], max_tokens=4, ignore_eos=False, **GREEDY)
    )
    bench.run()
    assert bench.tokens("r", 0) == [5] * 4
    assert bench.tokens("r", 1) == [5, 2]
    assert bench.ends["r", 1].stop_id == 2
    assert ("r", 0) not in bench.ends
    assert ("r", 2) in bench.ends


@pytest.mark.parametrize("num_steps", [1, 5, 60])
def test_a_replay_returns_what_was_sent(decoder: ArithmeticDecoder, num_steps: int) -> None:
    """From any position, while it runs and after the end: the same ids, logprobs and end."""
    bench = Bench(decoder)
    bench.submit(request(n=2, logprobs=1, **SEEDED))
    sent: dict[int, list[Delta]] = defaultdict(list)
    for _ in range(num_steps):
        for _, delta in bench.step().deltas:
            sent[delta.choice].append(delta)
    for have in (0, 1, 3):
        replayed = bench.engine.replay(Replay(request="r", attempt=0, have=[have, have]))
        for delta in replayed:
            original = [d for d in sent[delta.choice] if d.index >= have]
            assert delta.index == have
            assert delta.ids == [token for d in original for token in d.ids]
            assert delta.logprobs == [entry for d in original for entry in d.logprobs or ()]
            assert delta.finish == sent[delta.choice][-1].finish
        with_more = {choice for choice, deltas in sent.items() if deltas[-1].index >= have}
        assert {delta.choice for delta in replayed} == with_more


def test_a_replay_starts_where_this_engine_started(decoder: ArithmeticDecoder) -> None:
    """Tokens that came with a resubmission are the client's own and are not sent again."""
    bench = Bench(decoder)
    bench.submit(request(attempt=1, output=[[5, 6, 7]], max_tokens=5, logprobs=0))
    bench.run()
    (delta,) = bench.engine.replay(Replay(request="r", attempt=1, have=[1]))
    assert (delta.index, delta.ids) == (3, bench.tokens()[3:])
    assert delta.logprobs is not None
    assert len(delta.logprobs) == 2


def test_only_what_is_known_is_replayed(decoder: ArithmeticDecoder) -> None:
    """Another attempt, an unknown request, and one that ended too long ago are not found."""
    bench = Bench(decoder)
    bench.submit(request(max_tokens=1))
    bench.run()
    assert bench.engine.replay(Replay(request="r", attempt=0, have=[0]))[0].finish == "length"
    for name, attempt in (("r", 1), ("x", 0)):
        with pytest.raises(errors.NotFound):
            bench.engine.replay(Replay(request=name, attempt=attempt, have=[0]))
    bench.now = 11
    bench.step()
    with pytest.raises(errors.NotFound):
        bench.engine.replay(Replay(request="r", attempt=0, have=[0]))


def test_a_deadline_ends_a_request(decoder: ArithmeticDecoder) -> None:
    """Past it every live choice fails, running or waiting; the rest of the batch goes on."""
    bench = Bench(decoder, max_num_seqs=2)
    bench.submit(request("late", n=3, deadline_ms=500), request("fine"))
    bench.step()
    bench.now = 0.4
    bench.step()
    assert not bench.ends
    bench.now = 0.6
    bench.step()
    for choice in range(3):
        end = bench.ends["late", choice]
        assert end.finish == "failed"
        assert end.failure is not None
        assert end.failure.code == "deadline_exceeded"
    bench.run()
    assert bench.finishes == {"late": "failed", "fine": "length"}


# --------------------------------------------------------------------------------------------------- refusal, faults


BAD: list[tuple[dict[str, Any], str]] = [
    ({"prompt": []}, "prompt"),
    ({"prompt": [3] * 2048}, "prompt"),
    ({"prompt": [3, 512]}, "prompt"),
    ({"prompt": [-1]}, "prompt"),
    ({"output": [[512]]}, "prompt"),
    ({"n": 0}, "n"),
    ({"output": [[1], [1]]}, "n"),
    ({"n": MAX_CHOICES + 1}, "n"),
    ({"n": 1 << 40}, "n"),
    ({"n": 2, "ended": [0, 1]}, "ended"),
    ({"n": 2, "ended": [2]}, "ended"),
    ({"n": 3, "ended": [0, 0]}, "ended"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"logit_bias": {512: 1.0}}, "logit_bias"),
    ({"logit_bias": {5: float("nan")}}, "logit_bias"),
    ({"seed": -1}, "seed"),
    ({"seed": 1 << 64}, "seed"),
    ({"temperature": float("inf")}, "temperature"),
    ({"top_p": float("nan")}, "top_p"),
    ({"min_p": 1.1}, "min_p"),
    ({"repetition_penalty": 0.0}, "repetition_penalty"),
    ({"repetition_penalty": 1e-300}, "repetition_penalty"),
    ({"logprobs": -1}, "logprobs"),
    ({"presence_penalty": 1e30}, "presence_penalty"),
]


@pytest.mark.parametrize(("fields", "param"), BAD)
def test_what_can_never_run_is_refused(
    decoder: ArithmeticDecoder, fields: dict[str, Any], param: str
) -> None:
    """The refusal names the field, and the engine is as before."""
    bench = Bench(decoder, num_blocks=256)
    with pytest.raises(errors.InvalidRequest) as refusal:
        bench.engine.submit(request(**fields))
    assert refusal.value.param == param
    assert not bench.engine.has_work()


def test_hashes_of_another_page_size_are_refused(decoder: ArithmeticDecoder) -> None:
    """More hashes than full pages cannot be of this engine's pages."""
    bench = Bench(decoder)
    one = replace(request(), hashes=blockhash.chain(ROOT, PROMPT, 8))
    with pytest.raises(errors.InvalidRequest) as refusal:
        bench.engine.submit(one)
    assert refusal.value.param == "hashes"


def test_a_step_that_fails_ends_its_sequences_only(tiny_config: ModelConfig) -> None:
    """The fault is reported, the step's choices fail, what waited is served, the ledger balances."""
    bench = Bench(ArithmeticDecoder(tiny_config, faults=(3,)), max_num_seqs=1)
    bench.submit(request("hit"), request("waits", max_tokens=3))
    outputs = []
    while bench.engine.has_work():
        outputs.append(bench.step())
    faults = [output.error for output in outputs if output.error]
    assert [type(fault) for fault in faults] == [FloatingPointError]
    end = bench.ends["hit", 0]
    assert end.finish == "failed"
    assert end.failure is not None
    assert end.failure.code == "internal"
    assert bench.finishes == {"hit": "failed", "waits": "length"}
    assert bench.engine.ledger()["live"] == 0


class Interrupted(ArithmeticDecoder):
    """Ctrl-C in the middle of the third step, and in the sampling of the fifth."""

    def forward(self, step: StepInput) -> Floats:
        logits = super().forward(step)
        if self.num_steps == 3:
            raise KeyboardInterrupt
        return logits.view(_Impatient) if self.num_steps == 5 else logits


class _Impatient(np.ndarray[Any, Any]):
    """Logits whose second row cannot be read."""

    def __getitem__(self, index: Any) -> Any:
        if index == 1:
            raise KeyboardInterrupt
        return np.asarray(self)[index]


def test_an_interrupted_step_is_taken_again(tiny_config: ModelConfig) -> None:
    """Who interrupts the library and goes on gets the tokens as if nothing had been."""
    benches = []
    for decoder in (ArithmeticDecoder(tiny_config), Interrupted(tiny_config)):
        bench = Bench(decoder, asynchronous=False)
        bench.submit(request(**SEEDED), request("other", [7] * 20, **SEEDED))
        num_interrupts = 0
        while bench.engine.has_work():
            try:
                bench.step()
            except KeyboardInterrupt:
                num_interrupts += 1
        benches.append(bench)
    assert num_interrupts == 2
    assert benches[0].ids == benches[1].ids


# ------------------------------------------------------------------------------------------------------ introspection


def test_the_pool_is_sized_by_tokens_or_bytes(tmp_path: Path) -> None:
    """Tokens are rounded up to blocks, bytes down; too few bytes are refused."""
    folder = make_tiny(tmp_path / "tiny")
    assert Engine.from_folder(folder, kv_tokens=100).load().blocks_total == 7
    by_bytes = Engine.from_folder(folder, kv_bytes=1 << 20).load().blocks_total
    assert Engine.from_folder(folder, kv_bytes=2 << 20).load().blocks_total == 2 * by_bytes
    with pytest.raises(errors.InvalidRequest, match="not one block"):
        Engine.from_folder(folder, kv_bytes=100)


# --------------------------------------------------------------------------------------------------------- full pools


def test_pages_computed_twice_stop_nobody(decoder: ArithmeticDecoder) -> None:
    """Who computed pages beside another, and holds the other's as well as its own, still gets all of a small pool."""
    shared, own = PROMPT[: 2 * PAGE], PROMPT[:20]
    alone = Bench(decoder, num_blocks=8)
    alone.submit(request("long", [*shared, *own], max_tokens=500))
    alone.run()
    bench = Bench(decoder, num_blocks=8)
    bench.submit(request("first", [*shared, 7], max_tokens=4))
    bench.submit(request("long", [*shared, *own], max_tokens=500))
    bench.run()
    assert bench.engine.counters["preemptions"] == 1
    assert bench.tokens("long") == alone.tokens("long")
    assert len(bench.tokens("long")) == bench.engine.context - 52
