"""The native kernels: the reference's bits in the products, the same bits whatever the instruction set, the number of
threads and the splitting of long sequences, and nothing read that nobody wrote."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.worker.flowserve import native_decoder
from services.worker.flowserve.decoder import Floats, Span, StepInput
from services.worker.flowserve.native import build
from services.worker.flowserve.native_decoder import ISAS, NativeDecoder, multiply, quantise
from services.worker.flowserve.prepared import open_prepared
from services.worker.flowserve.quantise import GROUP, from_bfloat16, pack, quantise_weights
from tests.worker.drive import random_ids
from tests.worker.tiny import make_tiny

WHY_NOT = native_decoder.available()
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=WHY_NOT or "")

PAGE = 16
SHAPES = {"num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64}


@cache
def _usable() -> tuple[str, ...]:
    """The instruction sets of this processor: the best one, and those it includes."""
    best = native_decoder._library().fs_best_isa()
    return ISAS[: best + 1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("native")
    return make_tiny(root / "model", "llama", max_position_embeddings=4096, **SHAPES)


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> str:
    """Each instruction set that this processor has."""
    wanted: str = request.param
    if wanted not in _usable():
        pytest.skip(f"no {wanted} here")
    return wanted


def _decoder(folder: Path, *, threads: int = 1, isa: str | None = None) -> NativeDecoder:
    decoder = NativeDecoder(open_prepared(folder, folder.parent), threads=threads, isa=isa)
    decoder.allocate(256, PAGE)
    return decoder


def _run(decoder: NativeDecoder, ids: list[int], chunks: list[int], first: int = 0) -> Floats:
    """Logits of all rows of one sequence, computed chunk by chunk in blocks from `first` on."""
    table = list(range(first, first + len(ids) // PAGE + 1))
    logits = []
    start = 0
    for length in chunks:
        span = Span(start, length, table)
        step = StepInput(ids[start : start + length], [span], list(range(length)))
        logits.append(decoder.forward(step).copy())
        start += length
    return np.concatenate(logits)


def test_the_library_is_built_from_these_sources() -> None:
    """A change of the kernels without a build is found here rather than puzzled over."""
    assert native_decoder.sources() == build.sources_digest()


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=20, deadline=None)
@given(
    num_rows=st.integers(1, 14),
    num_outputs=st.integers(1, 3),
    num_groups=st.integers(1, 5),
    bias=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_products_equal_the_reference_bit_for_bit(
    isa: str, num_rows: int, num_outputs: int, num_groups: int, bias: bool, seed: int
) -> None:
    """Codes, scales and sums are those of plain numpy: exact integers, then float operations in the stated order."""
    if isa not in _usable():
        pytest.skip(f"no {isa} here")
    random = np.random.default_rng(seed)
    x = random.standard_normal((num_rows, num_groups * GROUP)).astype(np.float32)
    x *= np.float32(10.0) ** random.integers(-6, 6, (num_rows, 1)).astype(np.float32)
    weights = random.standard_normal((num_outputs * 32, num_groups * GROUP)).astype(np.float32)
    codes, scales = quantise_weights(weights)
    packed_codes, packed_scales = pack(codes, scales)
    arrays = {"w.codes": packed_codes, "w.scales": packed_scales}
    y = np.zeros((num_rows, num_outputs * 32), np.float32)
    if bias:
        arrays["w.bias"] = random.standard_normal(num_outputs * 32).astype(np.float32)
        y += arrays["w.bias"]

    grouped = x.reshape(num_rows, num_groups, GROUP)
    top = np.maximum(np.abs(grouped).max(axis=2), np.float32(1e-20)) / np.float32(127)
    rounded = np.rint(grouped * (np.float32(1) / top)[..., None]).astype(np.int32)
    for group in range(num_groups):
        of = slice(group * GROUP, (group + 1) * GROUP)
        sums = rounded[:, group] @ codes[:, of].T.astype(np.int32)
        y += sums.astype(np.float32) * scales[:, group] * top[:, group, None]

    found_codes, found_scales = quantise(x, isa)
    assert np.array_equal(found_codes, rounded.reshape(found_codes.shape))
    assert np.array_equal(found_scales, top)
    assert np.array_equal(from_bfloat16(packed_scales).size, scales.size)
    assert np.array_equal(multiply(x, arrays, "w", isa), y)


def test_threads_and_chunks_change_no_bit(folder: Path, isa: str) -> None:
    """Two partitions and a bit, in chunks of many shapes: one bit pattern on one thread and four."""
    ids = random_ids(1100)
    chunks = [500, 13, 1, 6, 250, 7, 300, 1, 1, 21]
    expected = _run(_decoder(folder, isa=isa), ids, [len(ids)])
    assert np.isfinite(expected).all()
    for threads in (1, 4):
        found = _run(_decoder(folder, threads=threads, isa=isa), ids, chunks)
        assert np.array_equal(found, expected)


@pytest.mark.parametrize(
    ("head_dim", "heads", "kv_heads", "window"),
    [
        (18, 4, 2, None),
        (40, 6, 2, 7),
        (64, 9, 3, None),
        (80, 5, 1, 65),
        (112, 14, 2, None),
        (128, 4, 4, 100),
        (130, 7, 1, 1),
        (16, 50, 1, 3),
        (512, 2, 1, 50),
    ],
)
def test_instruction_sets_and_chunks_change_no_bit_of_any_shape(
    tmp_path: Path, head_dim: int, heads: int, kv_heads: int, window: int | None
) -> None:
    """Heads of odd sizes, many heads to one, windows: AVX2, AVX-512 and pairs of bfloat16 give the same bits, whole or
    in chunks, over blocks full of what is no number."""
    sizes = {"head_dim": head_dim, "num_attention_heads": heads, "num_key_value_heads": kv_heads}
    folder = make_tiny(
        tmp_path / "model", "mistral", max_position_embeddings=4096, sliding_window=window, **sizes
    )
    ids = random_ids(170)
    chunks = [*[1] * 20, 7, 13, 2, 30, 8, 9, 81]
    expected = _run(_decoder(folder, isa="avx2"), ids, [len(ids)])
    assert np.isfinite(expected).all()
    for isa in _usable():
        decoder = _decoder(folder, isa=isa, threads=2)
        decoder._blocks[:] = 0x7FC0
        assert np.array_equal(_run(decoder, ids, chunks), expected)


def test_many_sequences_on_many_threads_equal_each_alone(folder: Path, isa: str) -> None:
    """A mixed step of long and short, chunks and single rows, on more threads than cores, equals each one alone."""
    lengths = [1, 17, 600, 64, 1030, 5]
    alone = _decoder(folder, isa=isa)
    together = _decoder(folder, threads=3, isa=isa)
    expected, tokens, spans, samples = [], [], [], []
    first = 0
    for seed, length in enumerate(lengths):
        ids = random_ids(length, seed=seed)
        expected.append(_run(alone, ids, [length])[-1])
        num_last = [1, 3, 1, 30, 5, 5][seed]
        if length > num_last:
            _run(together, ids[:-num_last], [length - num_last], first)
        table = list(range(first, first + length // PAGE + 1))
        spans.append(Span(length - num_last, num_last, table))
        tokens += ids[-num_last:]
        samples.append(len(tokens) - 1)
        first += len(table)
    for _ in range(3):
        found = together.forward(StepInput(tokens, spans, samples))
        assert np.array_equal(found, np.stack(expected))


@pytest.mark.parametrize("length", [1, 15, 16, 17, 64, 65])
def test_what_a_block_held_before_stays_unseen(folder: Path, length: int, isa: str) -> None:
    """Not even a number that is none leaks out of positions that a sequence has not written."""
    ids = random_ids(length)
    clean, stained = (_decoder(folder, isa=isa) for _ in range(2))
    stained._blocks[:] = 0x7FC0  # not a number, everywhere
    chunks = [1] * length
    assert np.array_equal(_run(clean, ids, chunks), _run(stained, ids, chunks))


def test_timings_tell_the_parts(folder: Path) -> None:
    """Seconds only grow, and each part of the step has some."""
    decoder = _decoder(folder)
    _run(decoder, random_ids(40), [40])
    assert set(decoder.timings) == {"embed", "norms", "linears", "attention", "head"}
    assert all(seconds > 0 for seconds in decoder.timings.values())
