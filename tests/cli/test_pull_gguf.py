"""GGUF to a model folder: exact values, rows in order, config, tokenizer; and what is refused by name."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from gguf import GGML_QUANT_SIZES, ReaderTensor
from gguf import GGMLQuantizationType as Type
from gguf.quants import dequantize, quantize
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from deepflow.models import vocabulary
from deepflow.models.gguf import Planned
from deepflow.models.pull import pull
from shared.errors import InvalidRequest
from shared.text.template import ChatTemplate
from shared.text.tokenizer import Tokenizer
from tests.cli.gguf_file import write_gguf
from tests.worker.tiny import DENSE_FAMILIES, make_tiny


def converted(path: Path, tmp_path: Path) -> Path:
    """The folder that pulling the GGUF file gives."""
    return pull(str(path), tmp_path / "cache").path


@pytest.mark.parametrize("family", DENSE_FAMILIES)
def test_gives_back_the_model_it_was_made_from(tmp_path: Path, family: str) -> None:
    """Every tensor, the configuration, the tokenizer and the template survive the way through GGUF, exactly."""
    source = make_tiny(tmp_path / "hf", family)
    folder = converted(write_gguf(source, tmp_path / f"{family}.gguf"), tmp_path)
    expected, actual = (load_file(path / "model.safetensors") for path in (source, folder))
    assert expected.keys() == actual.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(values, actual[name], err_msg=name)
    before, after = (json.loads((path / "config.json").read_text()) for path in (source, folder))
    if family == "mistral":  # in GGUF a Mistral is a Llama, and computes the same
        before |= {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
        del before["sliding_window"]
    assert before.items() <= after.items()
    text = "The theory, in 1234 words: \u20ac \U0001f642<|im_end|>\n"
    ours, theirs = Tokenizer.load(folder), Tokenizer.load(source)
    assert theirs.encode(text) == ours.encode(text)
    assert theirs.special_ids == ours.special_ids
    assert ours.eos_ids == [2]
    messages = [{"role": "user", "content": "hi"}]
    assert ChatTemplate.load(source).render(messages) == ChatTemplate.load(folder).render(messages)


@pytest.mark.parametrize(
    "kind", [Type.F16, Type.BF16, Type.Q8_0, Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1]
)
def test_quantised_values_are_dequantised_exactly(tmp_path: Path, kind: Type) -> None:
    """Each value is the one the quantised block stands for; 16-bit floats are kept as they are."""
    source = make_tiny(tmp_path / "hf", "qwen3")
    folder = converted(write_gguf(source, tmp_path / "m.gguf", matrices=kind), tmp_path)
    name = "model.layers.1.self_attn.q_proj.weight"
    expected = dequantize(quantize(load_file(source / "model.safetensors")[name], kind), kind)
    header, data = safetensors(folder / "model.safetensors")
    entry = header[name]
    start, stop = entry["data_offsets"]
    assert entry["dtype"] == {Type.F16: "F16", Type.BF16: "BF16"}.get(kind, "F32")
    raw = np.frombuffer(
        data[start:stop],
        dtype="u2"
        if kind == Type.BF16
        else entry["dtype"].lower().replace("f", "f4" if False else "f")[:1]
        + str((stop - start) // expected.size),
    )
    values = (raw.astype("u4") << 16).view("f4") if kind == Type.BF16 else raw.astype("f4")
    np.testing.assert_array_equal(expected.ravel(), values)
    dtype = {Type.F16: "float16", Type.BF16: "bfloat16"}.get(kind, "float32")
    assert json.loads((folder / "config.json").read_text())["dtype"] == dtype


def safetensors(path: Path) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file, read by hand since numpy has no bfloat16."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


@pytest.mark.parametrize("kind", [Type.Q4_K, Type.Q6_K, Type.Q5_K, Type.Q2_K, Type.Q3_K])
def test_k_quants_are_dequantised(tmp_path: Path, kind: Type) -> None:
    """Blocks of 256 are read as the `gguf` library reads them (it cannot write them: the bytes are random)."""
    block, size = GGML_QUANT_SIZES[kind]
    raw = np.random.default_rng(0).integers(0, 60, (2, size), dtype=np.uint8)

    source = ReaderTensor("x", kind, np.array([block, 2]), 2 * block, raw.size, 0, raw, None)
    planned = Planned(name="x", dtype="F32", shape=(2, block), source=source, heads=None)
    np.testing.assert_array_equal(dequantize(raw, kind), planned.values())


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        ({}, None),
        (
            {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0},
            {"rope_type": "linear", "factor": 4.0},
        ),
        ({"llama.rope.scale_linear": 2.0}, {"rope_type": "linear", "factor": 2.0}),
        (
            {
                "llama.rope.scaling.type": "yarn",
                "llama.rope.scaling.factor": 8.0,
                "llama.rope.scaling.original_context_length": 512,
            },
            {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 512},
        ),
    ],
)
def test_rope_scaling_is_translated(
    tmp_path: Path, extra: dict[str, Any], expected: dict[str, Any] | None
) -> None:
    """None, linear under both its names, and yarn become config.json's rope_scaling."""
    source = make_tiny(tmp_path / "hf")
    folder = converted(write_gguf(source, tmp_path / "m.gguf", extra=extra), tmp_path)
    assert expected == json.loads((folder / "config.json").read_text()).get("rope_scaling")


def llama3_factors(factor: float, theta: float, size: int) -> np.ndarray:
    """The divisors of Llama 3.1's frequencies, as llama.cpp's converter computes them."""
    factors = []
    for frequency in 1.0 / (theta ** (np.arange(0, size, 2, dtype=np.float32) / size)):
        wavelength = 2 * np.pi / frequency
        if wavelength < 8192 / 4.0:
            factors.append(1.0)
        elif wavelength > 8192 / 1.0:
            factors.append(factor)
        else:
            smooth = (8192 / wavelength - 1.0) / (4.0 - 1.0)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, dtype=np.float32)


def test_llama3_rope_factors_are_recognised(tmp_path: Path) -> None:
    """GGUF keeps only the divisors of Llama 3's scaling: its parameters are found again, or it is refused."""
    source = make_tiny(tmp_path / "hf", head_dim=64, rope_theta=500000.0)
    factors = llama3_factors(32.0, 500000.0, 64)
    path = write_gguf(source, tmp_path / "m.gguf", tensors={"rope_freqs.weight": factors})
    config = json.loads((converted(path, tmp_path) / "config.json").read_text())
    assert config["rope_scaling"] == {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    other = write_gguf(source, tmp_path / "n.gguf", tensors={"rope_freqs.weight": factors**2})
    with pytest.raises(InvalidRequest, match="rope_freqs"):
        converted(other, tmp_path)


@pytest.mark.parametrize(
    ("extra", "tensors", "named"),
    [
        ({"general.architecture": "mamba"}, {}, "'mamba'"),
        ({"tokenizer.ggml.pre": "qwen35"}, {}, "'qwen35'"),
        ({"tokenizer.ggml.model": "t5"}, {}, "'t5'"),
        ({"tokenizer.ggml.tokens": None}, {}, "vocabulary"),
        ({"tokenizer.ggml.merges": None}, {}, "merges"),
        ({"llama.block_count": None}, {}, r"llama\.block_count"),
        ({"llama.rope.dimension_count": 8}, {}, "dimension_count 8"),
        ({"llama.expert_count": 8}, {}, r"expert_count.*safetensors"),
        ({"llama.rope.scaling.type": "longrope"}, {}, "'longrope'"),
        ({"llama.block_count": 3}, {}, r"layers\.2\."),
        ({}, {"blk.0.ffn_gate_exps.weight": np.zeros((2, 32), np.float32)}, "ffn_gate_exps"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(
    tmp_path: Path, extra: dict[str, Any], tensors: dict[str, np.ndarray], named: str
) -> None:
    """Unknown architecture, tokenizer, tensor or scaling: an error naming it, and nothing published."""
    source = make_tiny(tmp_path / "hf")
    path = write_gguf(source, tmp_path / "m.gguf", extra=extra, tensors=tensors)
    with pytest.raises(InvalidRequest, match=named):
        converted(path, tmp_path)
    assert [entry.name for entry in (tmp_path / "cache" / "models").iterdir()] == [".lock-m"]


@pytest.mark.parametrize("keep", [0, 3, 100, 5000, -1000])
def test_a_file_cut_short_is_refused(tmp_path: Path, keep: int) -> None:
    """Wherever a download ended early, the file is no model."""
    whole = write_gguf(make_tiny(tmp_path / "hf"), tmp_path / "whole.gguf").read_bytes()
    path = tmp_path / "m.gguf"
    path.write_bytes(whole[:keep])
    with pytest.raises(InvalidRequest, match="GGUF"):
        converted(path, tmp_path)


def test_ends_of_turn_are_ends_of_sequence() -> None:
    """Besides EOS: what the file names as end of turn, and the token that closes turns in the template."""
    metadata = {
        "tokenizer.ggml.tokens": ["<|endoftext|>", "<|im_end|>", "<|eot_id|>", "a"],
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.ggml.eot_token_id": 0,
        "tokenizer.chat_template": "{{ x }}<|im_end|>",
    }
    assert vocabulary.eos_ids(metadata) == [0, 1]


def greedy_sentencepiece(text: str, scores: dict[str, float]) -> list[str]:
    """SentencePiece's BPE: again and again, join the leftmost pair whose union has the best score."""
    pieces = list(text)
    while True:
        joined = [
            (-scores[a + b], i) for i, (a, b) in enumerate(pairwise(pieces)) if a + b in scores
        ]
        if not joined:
            return pieces
        _, index = min(joined)
        pieces[index : index + 2] = [pieces[index] + pieces[index + 1]]


@given(st.text("abc ", max_size=30))
def test_merges_from_scores_equal_sentencepiece(text: str) -> None:
    """The recovered merges cut text as SentencePiece's own algorithm does."""
    pieces = ["ab", "\u2581a", "abc", "bc", "\u2581abc", "ca", "aa", "\u2581\u2581", *"\u2581abc"]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": ["<unk>", *pieces],
        "tokenizer.ggml.token_type": [2] + [1] * len(pieces),
        "tokenizer.ggml.scores": [0.0, *(-float(rank) for rank in range(len(pieces)))],
        "tokenizer.ggml.add_bos_token": False,
    }
    backend = tokenizers.Tokenizer.from_str(json.dumps(vocabulary.tokenizer_json(metadata)))
    scores = {piece: -float(rank) for rank, piece in enumerate(pieces)}
    expected = greedy_sentencepiece("\u2581" + text.replace(" ", "\u2581"), scores) if text else []
    assert expected == backend.encode(text).tokens


@pytest.mark.parametrize(
    ("pre", "text", "pieces"),
    [
        ("gpt-2", "it's 12345 ok", ["it", "'s", "\u012012345", "\u0120ok"]),
        ("smollm", "a1234 56", ["a", "1", "2", "3", "4", "\u0120", "5", "6"]),
        (
            "llama-bpe",
            "a1234 IT'S\n\n x",
            ["a", "123", "4", "\u0120IT", "'S", "\u010a\u010a", "\u0120x"],
        ),
        ("qwen2", "a12 it'll", ["a", "1", "2", "\u0120it", "'ll"]),
        ("tekken", "aB12", ["a", "B", "1", "2"]),
    ],
)
def test_pre_tokenizers_cut_as_published(pre: str, text: str, pieces: list[str]) -> None:
    """How each family cuts digits, contractions and white space before merging."""
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": ["a", "<b>"],
        "tokenizer.ggml.token_type": [1, 3],
        "tokenizer.ggml.merges": [],
        "tokenizer.ggml.bos_token_id": 1,
    }
    content = vocabulary.tokenizer_json(metadata)
    backend = tokenizers.Tokenizer.from_str(json.dumps(content))
    assert pieces == [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str(text)] or pieces[
        -2:
    ] == ["x"]
    adds_bos = pre in ("llama-bpe", "tekken")
    assert adds_bos == (backend.encode("a").ids == [1, 0])
