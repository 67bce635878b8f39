"""FlowServe as a library over a real tiny model: text in, text out, no bus."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from deepflow import LLM
from services.worker.flowserve.llm import FlowServe, Output
from shared import errors
from shared.messages import Sampling
from tests.worker.tiny import make_tiny

GREEDY: dict[str, Any] = {"temperature": 0, "ignore_eos": True, "max_tokens": 40}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module", params=[False, True], ids=["sync", "async"])
def llm(folder: Path, request: pytest.FixtureRequest) -> FlowServe:
    cache_dir = folder.parent / "cache"
    return FlowServe(
        folder, kv_tokens=4096, threads=1, cache_dir=cache_dir, asynchronous=request.param
    )


def bare(outputs: list[Output]) -> list[list[int]]:
    return [output.ids for output in outputs]


def test_the_short_name_is_flowserve(llm: FlowServe) -> None:
    """`from deepflow import LLM` is this class."""
    assert LLM is FlowServe


def test_prompts_are_answered_in_order(llm: FlowServe) -> None:
    """Text, ids and lists of either; batched as one by one; the text is that of the ids."""
    prompts = ["Once upon a time", "the rain in", [5, 6, 7]]
    together = llm.generate(prompts, **GREEDY)
    assert bare(together) == [llm.generate(prompt, **GREEDY)[0].ids for prompt in prompts]
    for output in together:
        assert output.text == llm.tokenizer.decode(output.ids)
        assert output.finish == "length"
        assert len(output.ids) == 40
    assert together[2].num_prompt == 3


def test_a_seed_repeats_and_its_absence_does_not(llm: FlowServe) -> None:
    """Sampled output is a function of the seed; without one every call draws its own."""
    fields = {"temperature": 1.5, "max_tokens": 20, "ignore_eos": True}
    assert bare(llm.generate("a", seed=3, **fields)) == bare(llm.generate("a", seed=3, **fields))
    assert bare(llm.generate("a", **fields)) != bare(llm.generate("a", **fields))


def test_fields_beside_a_sampling_are_refused(llm: FlowServe) -> None:
    """Settings given twice are an error, not ignored."""
    with pytest.raises(TypeError, match="max_tokens"):
        llm.generate("a", llm.sampling(max_tokens=2), max_tokens=3)


def test_choices_come_next_to_each_other(llm: FlowServe) -> None:
    """Two prompts with n = 2 give four outputs, prompt by prompt."""
    sampling = Sampling(max_tokens=8, seed=1, n=2, ignore_eos=True)
    outputs = llm.generate(["abc", "xyz"], sampling)
    assert [output.choice for output in outputs] == [0, 1, 0, 1]
    assert bare(outputs[2:]) == bare(llm.generate("xyz", sampling))


def test_a_stream_is_the_output_in_pieces(llm: FlowServe) -> None:
    """Joined, the pieces are what `generate` returns, and only the last one is an end."""
    whole = llm.generate("tell me", logprobs=1, **GREEDY)[0]
    pieces = list(llm.stream("tell me", logprobs=1, **GREEDY))
    assert "".join(piece.text for piece in pieces) == whole.text
    assert [token for piece in pieces for token in piece.ids] == whole.ids
    assert [entry for piece in pieces for entry in piece.logprobs or ()] == whole.logprobs
    assert [piece.finish for piece in pieces] == [None] * 39 + ["length"]


def test_a_stop_string_cuts_the_text(llm: FlowServe) -> None:
    """The text ends before the stop string, and the stop string is named."""
    whole = llm.generate("hello", **GREEDY)[0].text
    stop = whole[12:15]
    output = llm.generate("hello", stop=[stop, "never"], **GREEDY)[0]
    assert output.text == whole[: whole.index(stop)]
    assert (output.finish, output.stop) == ("stop", stop)
    assert llm.engine.ledger()["live"] == 0


def test_streams_share_the_engine(llm: FlowServe) -> None:
    """Two streams read alternately, and a call in between, bring what each brings alone."""
    alone = [llm.generate(prompt, **GREEDY)[0].ids for prompt in ("first", "second", "third")]
    one, two = llm.stream("first", **GREEDY), llm.stream("second", **GREEDY)
    first, second = next(one).ids, next(two).ids
    third = llm.generate("third", **GREEDY)[0].ids
    for left, right in zip(one, two, strict=True):
        first, second = first + left.ids, second + right.ids
    assert [first, second, third] == alone


def test_leaving_a_stream_early_frees_its_blocks(llm: FlowServe) -> None:
    """A closed stream is cancelled."""
    stream = llm.stream("hello", **GREEDY)
    next(stream)
    assert llm.engine.ledger()["live"] != 0
    stream.close()
    assert llm.engine.ledger()["live"] == 0


def test_a_conversation_goes_through_the_template(llm: FlowServe) -> None:
    """`chat` continues the rendered messages; a second turn finds the first one's pages."""
    messages = [{"role": "user", "content": "What is the capital of France, please?"}]
    answer = llm.chat(messages, **GREEDY)[0]
    prompt = llm.tokenizer.encode(llm.template.render(messages))
    assert answer.ids == llm.generate([prompt], **GREEDY)[0].ids
    again = llm.chat(messages, **GREEDY)[0]
    assert again.num_cached == (len(prompt) - 1) // 16 * 16 > 0


def test_what_is_too_long_is_refused_and_nothing_is_left_behind(llm: FlowServe) -> None:
    """The error names both numbers, and the prompts beside it do not stay in the engine."""
    with pytest.raises(errors.InvalidRequest, match=r"3000 tokens.* 2048"):
        llm.generate([[5, 6], [7] * 3000], **GREEDY)
    llm.generate("next", **GREEDY)
    assert llm.engine.ledger()["live"] == 0
    assert llm.engine.load().waiting == 0


def test_a_name_goes_through_the_catalogue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An unknown name is an error that tells how to get the model."""
    monkeypatch.setenv("DEEPFLOW_CACHE", str(tmp_path))
    with pytest.raises(errors.ModelNotFound, match="deepflow pull nobody/here"):
        FlowServe("nobody/here")


def test_a_stop_token_is_counted_but_not_shown(llm: FlowServe) -> None:
    """The token that ends a choice is the last of its ids and no part of its text, as over HTTP."""
    (free,) = llm.generate("Once upon", **GREEDY)
    stop = free.ids[6]
    first = free.ids.index(stop)
    (stopped,) = llm.generate("Once upon", **GREEDY, stop_token_ids=[stop])
    (shorter,) = llm.generate("Once upon", **(GREEDY | {"max_tokens": first}))
    assert stopped.ids == free.ids[: first + 1]
    assert (stopped.finish, stopped.stop) == ("stop", stop)
    assert llm.tokenizer.decode([stop])
    assert stopped.text == shorter.text


def test_guesses_change_neither_text_nor_count(folder: Path) -> None:
    """Where a step brings several tokens, a stop string still cuts at the token that completes it."""
    plain, guessing = (
        FlowServe(folder, kv_tokens=4096, threads=1, cache_dir=folder.parent / "cache", **mode)
        for mode in ({}, {"asynchronous": True, "speculation": 6})
    )
    # Of a handful of letters, so that the text repeats itself.
    letters = dict.fromkeys(plain.tokenizer.encode("abc"), 30.0)
    fields = GREEDY | {"logit_bias": letters, "max_tokens": 120, "logprobs": 0}
    (whole,) = plain.generate("once", **fields)
    assert guessing.generate("once", **fields) == [whole]
    assert guessing.engine.counters["spec_accepted"] > 0
    for start in range(60, 110, 7):
        stop = whole.text[start : start + 20]
        (cut,) = plain.generate("once", stop=[stop], **fields)
        (same,) = guessing.generate("once", stop=[stop], **fields)
        assert (same.text, same.ids, same.finish, same.stop, same.logprobs) == (
            cut.text,
            cut.ids,
            cut.finish,
            cut.stop,
            cut.logprobs,
        )
