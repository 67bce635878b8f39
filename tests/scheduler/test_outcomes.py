"""A batch's input and its outcomes: split, checked, written down and read back, whoever owned it in between."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from random import Random

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.scheduler import batch_input, outcomes
from services.scheduler.batch_input import LineFault, check, parse, split
from services.scheduler.outcomes import Outcomes, forget, unfinished
from shared.store.local import LocalStore
from tests.scheduler.batching import ENDPOINT, jsonl, request


async def chunked(data: bytes, cuts: list[int]) -> AsyncIterator[bytes]:
    """`data` in pieces."""
    start = 0
    for cut in sorted({cut % (len(data) + 1) for cut in cuts}):
        yield data[start:cut]
        start = cut
    yield data[start:]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.binary(max_size=12)), st.lists(st.integers(0, 400), max_size=8))
def test_lines_do_not_depend_on_the_pieces_they_come_in(
    lines: list[bytes], cuts: list[int]
) -> None:
    """However the input is cut, its lines and their numbers are those of the whole; blank ones are left out."""
    data = b"\n".join(lines).removeprefix(b"\xef\xbb\xbf")

    async def read() -> list[tuple[int, bytes]]:
        return [one async for one in split(chunked(data, cuts))]

    wanted = [
        (number, line.strip()) for number, line in enumerate(data.split(b"\n"), 1) if line.strip()
    ]
    assert asyncio.run(read()) == wanted


@settings(max_examples=60, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(-5, 5) | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["custom_id", "method", "url", "body", "model", "x"]),
                inner,
                max_size=5,
            )
        ),
        max_leaves=8,
    )
)
def test_a_line_of_any_json_is_a_request_or_a_fault(value: object) -> None:
    """No line breaks the check: it is taken, with what it needs, or refused."""
    with contextlib.suppress(LineFault):
        line = parse(orjson.dumps(value), ENDPOINT)
        assert line.custom_id
        assert line.model


async def checked(data: bytes) -> batch_input.Checked:
    """What a look at an input gives."""
    return await check(split(chunked(data, [])), ENDPOINT)


async def test_what_is_wrong_with_an_input_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each fault has a code, and its line; an input that is too long, or empty, is itself at fault."""
    wrong = {
        "invalid_json_line": b"[]",
        "missing_required_parameter": orjson.dumps(request("")),
        "invalid_custom_id": orjson.dumps(request("x" * 513)),
        "invalid_method": orjson.dumps(request("a", method="GET")),
        "mismatched_url": orjson.dumps(request("a", url="/v1/completions")),
        "invalid_request": orjson.dumps(request("a", body={"model": "m", "stream": True})),
    }
    deep = b'{"a":' * 500 + b"1" + b"}" * 500
    body = b'{"custom_id":"a","method":"POST","url":"%s","body":{"model":"m","x":%s}}'
    for line in (b"\xff\xfe", b'"\\ud800"', b"[]", body % (ENDPOINT.encode(), deep)):
        assert [e.code for e in (await checked(line)).errors] == ["invalid_json_line"]
    seen = await checked(b"\n\n".join(wrong.values()))
    assert [(error.code, error.line) for error in seen.errors] == [
        (code, 2 * number + 1) for number, code in enumerate(wrong)
    ]
    assert [error.code for error in (await checked(b"\n \n")).errors] == ["empty_file"]
    monkeypatch.setattr(batch_input, "MAX_LINES", 3)
    many = await checked(jsonl([request(str(number)) for number in range(5)]))
    assert [(error.code, error.line) for error in many.errors] == [("too_many_tasks", None)]
    monkeypatch.setattr(batch_input, "_MAX_WITH_BLANK", 9)
    assert [e.code for e in (await checked(b"\n" * 20)).errors] == ["too_many_tasks"]
    monkeypatch.setattr(batch_input, "MAX_LINE_BYTES", 100)
    assert [e.code for e in (await checked(b"x" * 300)).errors] == ["line_too_long"]


async def test_a_good_input_tells_its_size_and_its_model() -> None:
    """Lines are counted; the model is told if it is one."""
    one = await checked(jsonl([request("a"), request("b")]))
    two = await checked(jsonl([request("a"), request("b", model="other")]))
    windows = jsonl([request("a"), request("b")]).replace(b"\n", b"\r\n")
    assert await checked(b"\xef\xbb\xbf" + windows) == one
    assert await checked(b"\xef\xbb\xbf" + jsonl([request("a"), request("b")]).strip()) == one
    assert (one.num_lines, one.model, one.errors) == (2, "tiny", [])
    assert (two.num_lines, two.model, two.errors) == (2, "", [])


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 60), st.integers(20, 400))
def test_outcomes_survive_every_owner(seed: int, num_lines: int, segment_bytes: int) -> None:
    """Owners that come and go, some of them without flushing, some that still write when they are no longer owner:
    what was flushed is known to the next one, each line has one outcome, and they are read in order."""
    random = Random(seed)

    def text(line: int) -> bytes:
        return orjson.dumps({"line": line, "said": "x" * (line * 7 % 50)})

    async def suffer(folder: Path) -> None:
        store = LocalStore(folder)
        known: dict[int, bool] = {}
        stale: Outcomes | None = None
        for attempt in range(1, 6):
            owner = Outcomes(store, "batch_1", attempt)
            await owner.load()
            assert {line for line in range(num_lines) if line in owner} == set(known)
            for _ in range(random.randrange(4)):
                added = {}
                for line in random.sample(range(num_lines), random.randrange(num_lines + 1)):
                    ok = line % 3 > 0
                    if line not in owner:
                        added[line] = ok
                    owner.add(line, ok, (3, 2, 1), text(line))
                if random.randrange(4):
                    await owner.flush()
                    known |= added
                    assert owner.num_pending_bytes == 0
                else:
                    break  # it died with what it had
            if stale is not None and random.randrange(2):  # it was slow to notice
                for line in range(num_lines):
                    stale.add(line, line % 3 > 0, (3, 2, 1), text(line))
                await stale.flush()
                known |= {line: line % 3 > 0 for line in range(num_lines)}
            stale = owner
        last = Outcomes(store, "batch_1", 9)
        await last.load()
        assert (last.num_done, last.num_failed) == (
            sum(known.values()),
            len(known) - sum(known.values()),
        )
        assert last.tokens == [3 * len(known), 2 * len(known), len(known)]
        for ok in (True, False):
            read = [piece async for piece in last.all(ok=ok)]
            assert read == [text(line) + b"\n" for line in sorted(known) if known[line] is ok]
        assert await unfinished(store) == ({"batch_1"} if known else set())
        await forget(store, "batch_1")
        assert await unfinished(store) == set()

    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.setattr(outcomes, "SEGMENT_BYTES", segment_bytes)
        patch.setattr(outcomes, "_CACHED", 2)
        asyncio.run(suffer(Path(folder)))
