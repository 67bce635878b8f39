"""Tokenizer and incremental detokenizer, on a byte-level and on a SentencePiece-like vocabulary."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers

from deepflow.models import vocabulary
from shared.errors import Unavailable
from shared.text.detokenizer import Detokenizer
from shared.text.tokenizer import Tokenizer, byte_alphabet

SPECIAL = ["<|start|>", "<|end|>"]


def byte_level_backend() -> tokenizers.Tokenizer:
    """Two special tokens, all 256 bytes, and some merges that cut UTF-8 characters in the middle."""
    alphabet = byte_alphabet()
    tokens = [*SPECIAL, *(alphabet[byte] for byte in range(256))]
    pairs = [("h", "e"), ("l", "l"), ("Ġ", "he")]
    pairs += [(alphabet[0xE2], alphabet[0x82]), (alphabet[0xAC], "Ġ")]  # the euro sign, cut
    tokens += [left + right for left, right in pairs]
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3] * 2 + [1] * (len(tokens) - 2),
        "tokenizer.ggml.merges": [" ".join(pair) for pair in pairs],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.add_bos_token": True,
    }
    return tokenizers.Tokenizer.from_str(json.dumps(vocabulary.tokenizer_json(metadata)))


def sentencepiece_backend() -> tokenizers.Tokenizer:
    """As Llama 2's: blanks for spaces, a token for each byte, a space added in front."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    kinds = [2, 3, 3] + [6] * 256
    pieces = ["\u2581h", "el", "lo", "ello", "\u2581hello", "\u2581", *"helo\u00e9"]
    tokens += pieces
    kinds += [1] * len(pieces)
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.scores": [0.0] * 259 + [-float(rank) for rank in range(len(pieces))],
        "tokenizer.ggml.bos_token_id": 1,
    }
    return tokenizers.Tokenizer.from_str(json.dumps(vocabulary.tokenizer_json(metadata)))


BYTE_LEVEL = byte_level_backend()
SENTENCEPIECE = sentencepiece_backend()
TOKENIZERS = [Tokenizer(BYTE_LEVEL, [1]), Tokenizer(SENTENCEPIECE, [2])]
each = pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=["byte_level", "sentencepiece"])
IDS = st.lists(st.integers(0, 290) | st.sampled_from([-1, 2**31, 2**32, 2**70]), max_size=30)


@each
@given(ids=IDS, skip_special=st.booleans())
def test_pieces_joined_are_the_whole_text(
    tokenizer: Tokenizer, ids: list[int], skip_special: bool
) -> None:
    """For any ids, invalid UTF-8 and unknown ids included, streaming gives what decoding all gives."""
    detokenizer = Detokenizer(tokenizer, skip_special)
    pieces = [detokenizer.push(id) for id in ids]
    joined = "".join(pieces) + detokenizer.finish()
    assert tokenizer.decode(ids, skip_special=skip_special) == joined


@given(ids=st.lists(st.integers(0, BYTE_LEVEL.get_vocab_size() + 5)), skip_special=st.booleans())
def test_byte_level_decoding_equals_the_library(ids: list[int], skip_special: bool) -> None:
    """Our decoding of any ids is the one of `tokenizers`."""
    expected = BYTE_LEVEL.decode(ids, skip_special_tokens=skip_special)
    assert expected == TOKENIZERS[0].decode(ids, skip_special=skip_special)


@given(st.text())
def test_sentencepiece_decoding_equals_the_library_on_text(text: str) -> None:
    """Where the bytes are UTF-8 our decoding is the one of `tokenizers` (for other bytes it drops whole runs)."""
    ids = SENTENCEPIECE.encode(text).ids
    assert SENTENCEPIECE.decode(ids) == TOKENIZERS[1].decode(ids)


@each
@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581")))
def test_text_survives_the_round_trip(tokenizer: Tokenizer, text: str) -> None:
    """Encoding and decoding gives the same text, whatever the characters but SentencePiece's blank itself."""
    assert text == tokenizer.decode(tokenizer.encode(text), skip_special=False)


@each
def test_half_a_character_waits(tokenizer: Tokenizer) -> None:
    """Nothing shows of a character until its last byte is there; a character cut off at the end shows as U+FFFD."""
    detokenizer = Detokenizer(tokenizer)
    ids = tokenizer.encode("\U0001f642")[-4:]  # SentencePiece puts a blank in front
    assert [detokenizer.push(id) for id in ids] == ["", "", "", "\U0001f642"]
    assert [detokenizer.push(id) for id in ids[:3]] == ["", "", ""]
    assert detokenizer.finish() == "\ufffd"


def test_a_continuation_keeps_its_first_space() -> None:
    """After a prompt the blank of the first token is the model's own, and is shown."""
    ids = TOKENIZERS[1].encode("hello hello")
    for continues, expected in ((False, "hello hello"), (True, " hello hello")):
        detokenizer = Detokenizer(TOKENIZERS[1], continues=continues)
        assert expected == "".join(detokenizer.push(id) for id in ids)


def test_special_tokens_in_text_and_around_it() -> None:
    """Special tokens written in a text are recognised; BOS comes only where `special` asks for it."""
    tokenizer = TOKENIZERS[0]
    ids = tokenizer.encode("<|start|>he<|end|>")
    assert [0, tokenizer.vocab_size - 5, 1] == ids
    assert [0, *ids] == tokenizer.encode("<|start|>he<|end|>", special=True)
    assert tokenizer.decode(ids) == "he"
    assert tokenizer.decode(ids, skip_special=False) == "<|start|>he<|end|>"


@each
def test_tokens_by_themselves(tokenizer: Tokenizer) -> None:
    """A token's bytes joined are the text's bytes; half a character reads as U+FFFD; unknown ids are empty."""
    text = " hello \u20ac\u00e9"
    ids = tokenizer.encode(text)
    assert text.encode() == b"".join(tokenizer.token_bytes(id) for id in ids).removeprefix(
        b" " if tokenizer.strips_blank else b""
    )
    euro = tokenizer.encode("\u20ac")
    assert "\ufffd" in tokenizer.id_to_text(euro[-1])
    for unknown in (-1, tokenizer.vocab_size, 2**40):
        assert tokenizer.token_bytes(unknown) == b""
    assert tokenizer.id_to_text(1) in ("<|end|>", "<s>")


@each
def test_lone_surrogates_become_the_replacement_character(tokenizer: Tokenizer) -> None:
    """What JSON may carry but UTF-8 may not is replaced, alone, and a pair of surrogates is its character."""
    ids = tokenizer.encode("a\ud800b\udc00 \ud83d\ude42")
    assert tokenizer.decode(ids) == "a\ufffdb\ufffd \U0001f642"


def test_truncation_and_padding_of_the_file_are_ignored(tmp_path: Path) -> None:
    """A tokenizer.json with leftovers of training neither cuts nor pads prompts."""
    backend = byte_level_backend()
    backend.enable_truncation(2)
    backend.enable_padding(length=5)
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 1}))
    tokenizer = Tokenizer.load(tmp_path)
    assert len(tokenizer.encode("xyz")) == 3
    assert len(tokenizer.encode("x")) == 1
    assert tokenizer.eos_ids == [1]


def test_refuses_what_it_cannot_decode(tmp_path: Path) -> None:
    """A broken file, and a decoder whose tokens have no bytes of their own, are errors that name the cause."""
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(Unavailable, match=r"tokenizer\.json"):
        Tokenizer.load(tmp_path)
    backend = tokenizers.Tokenizer(models.WordPiece({"a": 0}, unk_token="a"))
    backend.decoder = decoders.WordPiece()
    with pytest.raises(Unavailable, match="WordPiece"):
        Tokenizer(backend)
    backend.decoder = decoders.Fuse()
    with pytest.raises(Unavailable, match="neither"):
        Tokenizer(backend)


def test_metaspace_decoding_equals_the_library() -> None:
    """The Metaspace decoder (some Llama conversions) strips the first blank as SentencePiece's does."""
    backend = tokenizers.Tokenizer(
        models.BPE({"\u2581": 0, "a": 1, "\u2581a": 2}, [("\u2581", "a")])
    )
    backend.normalizer = normalizers.Replace(" ", "\u2581")
    backend.decoder = decoders.Metaspace(prepend_scheme="always")
    backend.add_special_tokens([AddedToken("<s>", normalized=False)])
    tokenizer = Tokenizer(backend)
    for text in ("a a", " a", "aa  a"):
        ids = backend.encode(text).ids
        assert backend.decode(ids) == tokenizer.decode(ids)


@pytest.mark.smollm2
def test_smollm2_splits_digits_and_round_trips(smollm2: Path) -> None:
    """The tokenizer made from the GGUF file keeps digits apart, knows ChatML, and loses no text."""
    tokenizer = Tokenizer.load(smollm2)
    assert [tokenizer.id_to_text(id) for id in tokenizer.encode("Hello world 1234")] == [
        "Hello",
        " world",
        " ",
        "1",
        "2",
        "3",
        "4",
    ]
    prompt = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM<|im_end|>\n"
    assert tokenizer.encode(prompt) == [
        *(1, 9690, 198, 2683, 359, 253, 5356, 5646, 11173, 3365, 3511, 308, 34519, 2, 198)
    ]
    assert tokenizer.eos_ids == [2]
    assert tokenizer.vocab_size == 49152
    text = "It's 3\u00bd \u20ac, na\u00efve; \u65e5\u672c\u8a9e \U0001f642\r\n\t\tdef f(x):\n        return x"
    assert text == tokenizer.decode(tokenizer.encode(text))
