"""Position-independent caching below the engine: which positions are taken over, how keys turn, and what the native
kernels then compute."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.worker.flowserve import native_decoder, pic
from services.worker.flowserve.config import ModelConfig
from services.worker.flowserve.decoder import Floats, Span, Splice, StepInput, can_splice
from services.worker.flowserve.native_decoder import NativeDecoder
from services.worker.flowserve.prepared import open_prepared
from services.worker.flowserve.quantise import from_bfloat16
from services.worker.flowserve.rope import RotaryTable
from shared.errors import InvalidRequest
from tests.worker.drive import load, random_ids
from tests.worker.tiny import make_tiny

WHY_NOT = native_decoder.available()
native = pytest.mark.skipif(WHY_NOT is not None, reason=WHY_NOT or "")

PAGE = 16
LENGTH = 80  # of the chunk in most tests
ROPES: dict[str, dict[str, Any]] = {
    "default": {},
    "llama3": {
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 256,
        }
    },
    "yarn": {
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 512,
        }
    },
}


# ------------------------------------------------------------------------------------------------ which positions


@st.composite
def layouts(draw: st.DrawFn) -> tuple[list[list[int]], int]:
    """Chunks of a prompt, and its length."""
    num_prompt = draw(st.integers(1, 400))
    ends = draw(st.lists(st.integers(0, num_prompt), unique=True, max_size=12).map(sorted))
    return [list(pair) for pair in zip(ends[::2], ends[1::2], strict=False)], num_prompt


@given(layouts(), st.sampled_from([1, 16]), st.integers(0, 40), st.data())
def test_pieces_cover_the_prompt_exactly_once(
    layout: tuple[list[list[int]], int], page: int, recomputed: int, data: st.DataObject
) -> None:
    """Whatever the chunks, and whichever of them are cached: each position is computed or taken over, once."""
    chunks, num_prompt = layout
    pic.validate(chunks, num_prompt)
    taken = [
        pic.taken_over(chunk, num_prompt, page, recomputed) if data.draw(st.booleans()) else None
        for chunk in chunks
    ]
    found = list(pic.pieces(taken, num_prompt))
    assert [position for piece in found for position in range(piece.start, piece.stop)] == list(
        range(num_prompt)
    )
    assert found[-1].chunk is None  # the last token is computed
    for piece in found:
        assert piece.start < piece.stop
        if piece.chunk is not None:
            start, stop = chunks[piece.chunk]
            assert start + recomputed <= piece.start
            assert piece.stop - start <= (stop - start) // page * page  # a full page holds it


def test_a_chunk_that_opens_the_prompt_or_is_short_is_computed() -> None:
    """A prefix is found as a prefix; of a chunk no longer than what is recomputed nothing is left to take over."""
    assert not pic.taken_over([0, 128], 200, PAGE)
    assert not pic.taken_over([50, 50 + pic.RECOMPUTED], 200, PAGE)
    assert pic.taken_over([50, 50 + 3 * PAGE + 5], 200, PAGE, 8) == range(58, 98)
    assert pic.taken_over([50, 130], 130, PAGE, 8) == range(58, 129)


@pytest.mark.parametrize(
    "chunks",
    [
        [[0, 5], [4, 9]],
        [[5, 5]],
        [[7, 6]],
        [[-1, 4]],
        [[0, 11]],
        [[6, 9], [0, 3]],
        [[1]],
        [[1, 2, 3]],
    ],
)
def test_chunks_that_are_no_ranges_in_order_are_refused(chunks: list[list[int]]) -> None:
    """Overlapping, empty, outside the prompt, out of order, or no pairs."""
    with pytest.raises(InvalidRequest) as caught:
        pic.validate(chunks, 10)
    assert caught.value.param == "chunks"


# -------------------------------------------------------------------------------------------------------------- turning


@pytest.fixture(scope="module", params=ROPES)
def config(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> ModelConfig:
    folder = tmp_path_factory.mktemp(request.param) / "model"
    return ModelConfig.from_folder(make_tiny(folder, "qwen3", context=4096, **ROPES[request.param]))


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 3000), st.integers(0, 3000), st.integers(1, 40), st.integers(0, 2**31))
def test_turned_keys_are_those_of_the_new_position(
    config: ModelConfig, source: int, target: int, length: int, seed: int
) -> None:
    """Against double precision: a key rotated at its old position and turned equals one rotated at the new position."""
    cos, sin = RotaryTable(config).upto(4000)
    raw = np.random.default_rng(seed).standard_normal((config.head_dim, length))
    old = _rotated(raw, cos, sin, source).astype(np.float32)
    found = pic.turned(old, pic.turn_between(cos, sin, source, target, length))
    assert found == pytest.approx(_rotated(raw, cos, sin, target), abs=2e-6)


def _rotated(raw: np.ndarray, cos: Floats, sin: Floats, position: int) -> np.ndarray:
    """[D, n] in float64, at positions `position` on, by the angles that the table has."""
    half, length = raw.shape[0] // 2, raw.shape[1]
    c = cos[position : position + length].T.astype(np.float64)
    s = sin[position : position + length].T.astype(np.float64)
    a, b = raw[:half], raw[half:]
    return np.concatenate((a * c - b * s, b * c + a * s))


# --------------------------------------------------------------------------------------------------- the native kernels


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Heads that are no multiple of 16, so that the cache pads them."""
    root = tmp_path_factory.mktemp("pic")
    return make_tiny(root / "model", "qwen3", head_dim=40, layers=3)


@pytest.fixture(params=[16, 32])
def decoder(folder: Path, request: pytest.FixtureRequest) -> NativeDecoder:
    if WHY_NOT is not None:
        pytest.skip(WHY_NOT)
    decoder = NativeDecoder(open_prepared(folder, folder.parent), threads=2)
    decoder.allocate(64, request.param)
    assert can_splice(decoder)
    return decoder


def _compute(
    decoder: NativeDecoder,
    ids: list[int],
    table: range,
    computed: list[tuple[int, int]],
    splices: list[Splice] | None = None,
) -> Floats:
    """All the ranges `computed` in one step; the logits of the last row."""
    tokens = [token for start, stop in computed for token in ids[start:stop]]
    spans = [Span(start, stop - start, table) for start, stop in computed]
    return decoder.forward(StepInput(tokens, spans, [len(tokens) - 1], splices or [])).copy()


def _bits(decoder: NativeDecoder, table: range) -> np.ndarray:
    blocks = decoder._blocks.reshape(64, -1)
    return blocks[table.start : table.stop].copy()


def _dense(decoder: NativeDecoder, table: range, start: int, length: int) -> tuple[Floats, Floats]:
    """Keys [layers, kv heads, dims, length] and values [layers, kv heads, length, dims] by the documented layout, cell
    by cell."""
    assert decoder._cache is not None
    config, page = decoder.config, decoder._cache.page
    dims = -(-config.head_dim // 16) * 16
    shape = (64, config.num_layers, 2, config.num_kv_heads, page // 16)
    keys = decoder._blocks.reshape(*shape, dims // 2, 16, 2)
    values = decoder._blocks.reshape(*shape, 8, dims, 2)
    found_keys, found_values = [], []
    for position in range(start, start + length):
        block, group, lane = table[position // page], position % page // 16, position % 16
        found_keys.append(keys[block, :, 0, :, group, :, lane].reshape(*shape[1:4:2], dims))
        found_values.append(values[block, :, 1, :, group, lane // 2, :, lane % 2])
    return from_bfloat16(np.stack(found_keys, -1)), from_bfloat16(np.stack(found_values, -2))


@native
def test_a_splice_where_it_came_from_changes_no_bit(decoder: NativeDecoder) -> None:
    """The same context before it: cells and logits are those of the full computation."""
    ids = random_ids(LENGTH + 30)
    one, two = range(10), range(20, 30)
    whole = _compute(decoder, ids, one, [(0, len(ids))])
    splice = Splice(one, 21, two, 21, LENGTH - 21)
    part = _compute(decoder, ids, two, [(0, 21), (LENGTH, len(ids))], [splice])
    assert np.array_equal(_bits(decoder, one), _bits(decoder, two))
    assert np.array_equal(whole, part)


@native
def test_with_all_of_the_chunk_recomputed_the_result_is_the_full_one(
    decoder: NativeDecoder,
) -> None:
    """Splices that rows of the same step overwrite leave nothing behind: k >= chunk length is full prefill."""
    ids = random_ids(40 + LENGTH + 30)
    chunk, one, two = range(50, 60), range(10), range(20, 30)
    _compute(decoder, ids[40 : 40 + LENGTH], chunk, [(0, LENGTH)])
    whole = _compute(decoder, ids, one, [(0, len(ids))])
    splice = Splice(chunk, 0, two, 40, LENGTH)
    again = _compute(decoder, ids, two, [(0, len(ids))], [splice])
    assert np.array_equal(whole, again)
    assert np.array_equal(_bits(decoder, one), _bits(decoder, two))
    assert not pic.taken_over([40, 40 + LENGTH], len(ids), PAGE, LENGTH)


@native
@pytest.mark.parametrize("start", [33, 48, 55])
@pytest.mark.parametrize("skipped", [0, 5, 16])
def test_a_splice_moves_values_and_turns_keys(
    decoder: NativeDecoder, start: int, skipped: int
) -> None:
    """Cell by cell, at any offset: values bit for bit, keys within a rounding of bfloat16, no other cell touched."""
    ids = random_ids(LENGTH)
    chunk, table = range(50, 60), range(20, 32)
    _compute(decoder, ids, chunk, [(0, LENGTH)])
    length = LENGTH - skipped - 3
    _compute(decoder, random_ids(192, seed=1), table, [(0, 192)])
    before = _dense(decoder, table, 0, 192)
    old_keys, old_values = _dense(decoder, chunk, skipped, length)
    target = start + skipped
    cos, sin = decoder._rotary.upto(200)
    decoder._move(Splice(chunk, skipped, table, target, length))
    keys, values = _dense(decoder, table, 0, 192)
    inside = slice(target, target + length)
    assert np.array_equal(values[:, :, inside], old_values)
    dim = decoder.config.head_dim
    half = dim // 2
    angles = [
        np.arctan2(sin[at : at + length].T.astype(np.float64), cos[at : at + length].T)
        for at in (target, skipped)
    ]
    angle = angles[0] - angles[1]
    a, b = (old_keys[:, :, i : i + half].astype(np.float64) for i in (0, half))
    expected = np.concatenate(
        (a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)), 2
    )
    assert keys[:, :, :dim, inside] == pytest.approx(expected, rel=2**-8, abs=1e-6)
    assert not keys[:, :, dim:, inside].any()
    outside = np.r_[0:target, target + length : 192]
    assert np.array_equal(keys[..., outside], before[0][..., outside])
    assert np.array_equal(values[:, :, outside], before[1][:, :, outside])


@native
def test_steps_and_spans_change_no_bit_of_a_spliced_prompt(decoder: NativeDecoder) -> None:
    """Several spans of one sequence in a step, or one piece per step: the same logits."""
    ids = random_ids(30 + 2 * LENGTH + 20)
    starts = (30, 30 + LENGTH)
    chunks = (range(40, 46), range(50, 56))
    for start, chunk in zip(starts, chunks, strict=True):
        _compute(decoder, ids[start : start + LENGTH], chunk, [(0, LENGTH)])
    tables = (range(14), range(20, 34))
    parts = [(0, 38), (30 + LENGTH, 38 + LENGTH), (30 + 2 * LENGTH, len(ids))]

    def splices(table: range) -> list[Splice]:
        pairs = zip(chunks, starts, strict=True)
        return [Splice(chunk, 8, table, start + 8, LENGTH - 8) for chunk, start in pairs]

    at_once = _compute(decoder, ids, tables[0], parts, splices(tables[0]))
    _compute(decoder, ids, tables[1], parts[:1])
    for part, splice in zip(parts[1:], splices(tables[1]), strict=True):
        last = _compute(decoder, ids, tables[1], [part], [splice])
    assert np.array_equal(at_once, last)
    assert np.array_equal(_bits(decoder, tables[0]), _bits(decoder, tables[1]))


# ------------------------------------------------------------------------------------------------------------- in torch


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "w8a8"])
def test_in_torch_the_first_layer_is_that_of_the_full_prompt(folder: Path, dtype: str) -> None:
    """Keys and values of the first layer depend on token and position alone: taken over they equal those computed in
    place, but for one rounding. The cells around them are untouched."""
    torch = pytest.importorskip("torch")
    from services.worker.flowserve.torch_decoder import TorchDecoder

    decoder = load(folder, dtype, kernels="torch")
    decoder.allocate(64, PAGE)
    assert isinstance(decoder, TorchDecoder)
    assert can_splice(decoder)
    start, ids = 37, random_ids(37 + LENGTH + 20)
    chunk, whole, part = range(40, 46), range(10), range(20, 30)

    def compute(table: range, first: int, stop: int, at: int, *splices: Splice) -> Floats:
        tokens = ids[first:stop]
        span = Span(at, len(tokens), table)
        return decoder.forward(StepInput(tokens, [span], [len(tokens) - 1], splices)).copy()

    compute(chunk, start, start + LENGTH, 0)
    expected = compute(whole, 0, len(ids), 0)
    compute(part, 0, start + 5, 0)
    splice = Splice(chunk, 5, part, start + 5, LENGTH - 5)
    found = compute(part, start + LENGTH, len(ids), start + LENGTH, splice)
    layer = decoder.kv.layers[0]
    cells = [layer[list(t)].transpose(1, 2).flatten(0, 1)[: len(ids)] for t in (whole, part)]
    moved = slice(start + 5, start + LENGTH)
    rounding = 1e-5 if layer.dtype == torch.float32 else 2**-7
    assert torch.allclose(cells[1].float(), cells[0].float(), rtol=rounding, atol=rounding)
    values = slice(decoder.config.num_kv_heads, None)
    assert torch.equal(cells[1][moved, values], cells[0][moved, values])
    assert not np.array_equal(found, expected)  # the chunk has not seen what stands before it

    compute(part, 0, start + 5, 0)
    again = Splice(whole, start + 5, part, start + 5, LENGTH - 5)
    found = compute(part, start + LENGTH, len(ids), start + LENGTH, again)
    assert found == pytest.approx(expected, abs={"fp32": 1e-4, "bf16": 0.3, "w8a8": 0}[dtype])
