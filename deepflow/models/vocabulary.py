"""tokenizer.json from the vocabulary inside a GGUF file.

Covered are byte-level BPE (`tokenizer.ggml.model` "gpt2") with the pre-tokenizers listed below, and SentencePiece BPE
("llama"), whose merges are recovered from the scores. Anything else is an error that names it: a vocabulary split the
wrong way still yields text, only worse answers. This module must not know about tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from shared.errors import InvalidRequest

_BLANK = "\u2581"  # how SentencePiece writes a space
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LLAMA3 = (
    _CONTRACTIONS
    + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class Kind(IntEnum):
    """`tokenizer.ggml.token_type`."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class _Splitting:
    """How text is cut before byte-level merges apply: by a pattern, or by GPT-2's own (None), digits apart or not."""

    pattern: str | None = None
    digits_apart: bool = False
    nfc: bool = False
    ignore_merges: bool = False  # a piece that is a token as it stands is not built from merges
    bos: bool = False  # where the file does not say


# The names are llama.cpp's (`tokenizer.ggml.pre`), the patterns those of the models' own tokenizer.json.
_GPT2 = _Splitting()
_LLAMA3_SPLITTING = _Splitting(pattern=_LLAMA3, ignore_merges=True, bos=True)
_QWEN2_SPLITTING = _Splitting(pattern=_QWEN2, nfc=True)
_SPLITTINGS = {
    "default": _GPT2,
    "gpt-2": _GPT2,
    "smollm": _Splitting(digits_apart=True),
    "llama3": _LLAMA3_SPLITTING,
    "llama-v3": _LLAMA3_SPLITTING,
    "llama-bpe": _LLAMA3_SPLITTING,
    "qwen2": _QWEN2_SPLITTING,
    "deepseek-r1-qwen": _QWEN2_SPLITTING,
    "tekken": _Splitting(pattern=_TEKKEN, ignore_merges=True, bos=True),
}


def tokenizer_json(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The content of tokenizer.json. Raises InvalidRequest naming what is missing or not known."""
    model = metadata.get("tokenizer.ggml.model")
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list):
        raise InvalidRequest("the GGUF file has no vocabulary (tokenizer.ggml.tokens)")
    kinds = metadata.get("tokenizer.ggml.token_type") or [Kind.NORMAL] * len(tokens)
    if model == "gpt2":
        parts, bos = _byte_level(metadata, tokens)
    elif model == "llama":
        parts, bos = _sentencepiece(metadata, tokens, kinds)
    else:
        raise InvalidRequest(
            f"the GGUF file's tokenizer {model!r} is not supported; 'gpt2' and 'llama' are"
        )
    added = [
        {
            "id": id,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": kind != Kind.USER_DEFINED,
        }
        for id, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
        if kind in (Kind.CONTROL, Kind.USER_DEFINED) or (kind == Kind.UNKNOWN and model == "llama")
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        **parts,
        "post_processor": _post_processor(metadata, tokens, bos),
    }


def special_tokens(metadata: Mapping[str, Any]) -> dict[str, str]:
    """The named special tokens as text, by tokenizer_config.json's keys."""
    tokens = metadata["tokenizer.ggml.tokens"]
    names = {
        "bos_token": "bos_token_id",
        "eos_token": "eos_token_id",
        "unk_token": "unknown_token_id",
        "pad_token": "padding_token_id",
    }
    ids = {name: metadata.get(f"tokenizer.ggml.{key}") for name, key in names.items()}
    return {
        name: tokens[id] for name, id in ids.items() if id is not None and 0 <= id < len(tokens)
    }


def eos_ids(metadata: Mapping[str, Any]) -> list[int]:
    """The ids that end an answer: end of sequence, of turn, of message, and what closes a turn in the template."""
    ids = [metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot", "eom")]
    template = metadata.get("tokenizer.chat_template", "")
    tokens = metadata["tokenizer.ggml.tokens"]
    ids += [
        tokens.index(closing)
        for closing in ("<|im_end|>", "<|eot_id|>", "<|end|>")
        if closing in template and closing in tokens
    ]
    return list(dict.fromkeys(id for id in ids if id is not None))


def _byte_level(metadata: Mapping[str, Any], tokens: Sequence[str]) -> tuple[dict[str, Any], bool]:
    pre = metadata.get("tokenizer.ggml.pre", "default")
    splitting = _SPLITTINGS.get(pre)
    if splitting is None:
        known = ", ".join(sorted(_SPLITTINGS))
        raise InvalidRequest(
            f"the GGUF file's pre-tokenizer {pre!r} (tokenizer.ggml.pre) is not supported; known: {known}"
        )
    merges = metadata.get("tokenizer.ggml.merges")
    if not isinstance(merges, list):
        raise InvalidRequest("the GGUF file has no merges (tokenizer.ggml.merges)")
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    steps: list[dict[str, Any]] = []
    if splitting.digits_apart:
        steps.append({"type": "Digits", "individual_digits": True})
    if splitting.pattern is not None:
        steps.append(
            {
                "type": "Split",
                "pattern": {"Regex": splitting.pattern},
                "behavior": "Isolated",
                "invert": False,
            }
        )
    steps.append(byte_level | {"use_regex": splitting.pattern is None})
    parts = {
        "normalizer": {"type": "NFC"} if splitting.nfc else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "decoder": byte_level | {"use_regex": True},
        "model": _bpe(
            tokens,
            [merge.split(" ", 1) for merge in merges],
            ignore_merges=splitting.ignore_merges,
        ),
    }
    return parts, splitting.bos


def _sentencepiece(
    metadata: Mapping[str, Any], tokens: Sequence[str], kinds: Sequence[int]
) -> tuple[dict[str, Any], bool]:
    """As the published tokenizer.json of Llama 2 and its relatives have it: no pre-tokenizer, bytes as fallback."""
    scores = metadata.get("tokenizer.ggml.scores")
    if not isinstance(scores, list) or len(scores) != len(tokens):
        raise InvalidRequest("the GGUF file's vocabulary has no scores (tokenizer.ggml.scores)")
    prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    unknown = [token for token, kind in zip(tokens, kinds, strict=True) if kind == Kind.UNKNOWN]
    normalizers: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": " "}, "content": _BLANK}
    ]
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": _BLANK}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if prefix:
        normalizers.insert(0, {"type": "Prepend", "prepend": _BLANK})
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    parts = {
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": _bpe(
            tokens,
            merges_from_scores(tokens, scores, kinds),
            unk_token=unknown[0] if unknown else None,
            fuse_unk=True,
            byte_fallback=True,
        ),
    }
    return parts, True


def merges_from_scores(
    tokens: Sequence[str], scores: Sequence[float], kinds: Sequence[int]
) -> list[list[str]]:
    """The merges a SentencePiece BPE vocabulary implies, best first.

    SentencePiece joins the neighbours whose union is the token of the highest score, so every way to cut a token into
    two tokens is a merge with that token's score. Of equal scores the earlier cut goes first.
    """
    mergeable = {
        token
        for token, kind in zip(tokens, kinds, strict=True)
        if kind in (Kind.NORMAL, Kind.UNUSED)
    }
    ranked = [
        (-score, id, cut)
        for id, (token, score) in enumerate(zip(tokens, scores, strict=True))
        if token in mergeable
        for cut in range(1, len(token))
        if token[:cut] in mergeable and token[cut:] in mergeable
    ]
    return [[tokens[id][:cut], tokens[id][cut:]] for _, id, cut in sorted(ranked)]


def _bpe(
    tokens: Sequence[str],
    merges: list[list[str]],
    *,
    unk_token: str | None = None,
    fuse_unk: bool = False,
    byte_fallback: bool = False,
    ignore_merges: bool = False,
) -> dict[str, Any]:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": unk_token,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": fuse_unk,
        "byte_fallback": byte_fallback,
        "ignore_merges": ignore_merges,
        "vocab": {token: id for id, token in enumerate(tokens)},
        "merges": merges,
    }


def _post_processor(
    metadata: Mapping[str, Any], tokens: Sequence[str], bos: bool
) -> dict[str, Any] | None:
    """Writes BOS before, EOS after a bare prompt, where the model wants them."""
    before: list[int] = []
    after: list[int] = []
    if metadata.get("tokenizer.ggml.add_bos_token", bos):
        before = [id for id in [metadata.get("tokenizer.ggml.bos_token_id")] if id is not None]
    if metadata.get("tokenizer.ggml.add_eos_token", False):
        after = [id for id in [metadata.get("tokenizer.ggml.eos_token_id")] if id is not None]
    if not before and not after:
        return None

    def template(*sequences: str) -> list[dict[str, Any]]:
        pieces: list[dict[str, Any]] = []
        for type_id, sequence in enumerate(sequences):
            pieces += [{"SpecialToken": {"id": tokens[id], "type_id": type_id}} for id in before]
            pieces.append({"Sequence": {"id": sequence, "type_id": type_id}})
            pieces += [{"SpecialToken": {"id": tokens[id], "type_id": type_id}} for id in after]
        return pieces

    return {
        "type": "TemplateProcessing",
        "single": template("A"),
        "pair": template("A", "B"),
        "special_tokens": {
            tokens[id]: {"id": tokens[id], "ids": [id], "tokens": [tokens[id]]}
            for id in [*before, *after]
        },
    }
