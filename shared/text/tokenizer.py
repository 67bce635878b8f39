"""A model's tokenizer: text to token ids and back, over the `tokenizers` library.

Encoding is the library's. Decoding is ours, and goes through bytes: each token contributes fixed bytes, a text is
their concatenation read as UTF-8. That is what the two kinds of decoder in use amount to (GPT-2's byte alphabet, and
SentencePiece's blanks with bytes as fallback), and unlike the library's own it can be done token by token with the
same outcome. Thread-safe after loading. This module must not know about chats, streams or requests.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers

from shared import catalog
from shared.errors import Unavailable

_BLANK = "\u2581"  # how SentencePiece writes a space


class Tokenizer:
    """The tokenizer.json of one model folder.

    `vocab_size` counts the tokenizer's own ids (a model's logits may be padded beyond it); `strips_blank` says that the
    one space which a text begins with is the tokenizer's own addition.
    """

    def __init__(self, backend: tokenizers.Tokenizer, eos_ids: Sequence[int] = ()) -> None:
        """Raises Unavailable if the decoder is of a kind whose tokens have no bytes of their own."""
        # Settings left over from training would cut or pad prompts in silence.
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self.eos_ids = list(eos_ids)
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        added = backend.get_added_tokens_decoder()
        self._added_ids = frozenset(added)
        self.special_ids = frozenset(id for id, token in added.items() if token.special)
        self._byte_level, self.strips_blank = _decoder_kind(backend)
        self._bytes: dict[int, bytes] = {}  # filled as tokens are met, bounded by the vocabulary

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """The tokenizer of a model in Hugging Face form. Raises Unavailable naming the file if it cannot be read."""
        path = folder / "tokenizer.json"
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise Unavailable(f"cannot read the tokenizer {path}: {error}") from error
        return cls(backend, catalog.read_eos_ids(folder))

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Token ids of `text`; tokens such as `<|im_end|>` written in it are recognised.

        `special` adds what the model wants around a bare prompt (often a BOS); a rendered chat has its own. Lone
        surrogates, which no tokenizer knows, become U+FFFD.
        """
        if not text.isascii():
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return list(self._backend.encode(text, add_special_tokens=special).ids)

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Text of `ids`; bytes that are no UTF-8 become U+FFFD, ids outside the vocabulary become nothing."""
        data = b"".join(
            self.token_bytes(id) for id in ids if not (skip_special and id in self.special_ids)
        )
        if self.strips_blank:
            data = data.removeprefix(b" ")
        return data.decode("utf-8", "replace")

    def id_to_text(self, id: int) -> str:
        """One token by itself, for people (logprobs); incomplete UTF-8 shows as U+FFFD, special tokens by name."""
        return self.token_bytes(id).decode("utf-8", "replace")

    def token_bytes(self, id: int) -> bytes:
        """The bytes one token contributes to a text, none for an unknown id (OpenAI's `bytes` of a logprob)."""
        known = self._bytes.get(id)
        if known is not None:
            return known
        if not 0 <= id < 1 << 32:  # the library's ids are unsigned
            return b""
        token = self._backend.id_to_token(id)
        if token is None:
            return b""
        self._bytes[id] = data = self._spelled(id, token)
        return data

    def _spelled(self, id: int, token: str) -> bytes:
        if self._byte_level:
            if id in self._added_ids:
                return token.encode()
            raw = [_BYTE_OF.get(character, -1) for character in token]
            return token.encode() if -1 in raw else bytes(raw)
        if id in self.special_ids:
            return token.encode()
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return bytes.fromhex(token[3:5])
        return token.replace(_BLANK, " ").encode()


def byte_alphabet() -> dict[int, str]:
    """GPT-2's printable stand-in of every byte, as byte-level vocabularies spell them (Radford et al., 2019)."""
    kept = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = [byte for byte in range(256) if byte not in kept]
    return {byte: chr(byte) for byte in kept} | {
        byte: chr(256 + index) for index, byte in enumerate(moved)
    }


_BYTE_OF = {character: byte for byte, character in byte_alphabet().items()}


def _decoder_kind(backend: tokenizers.Tokenizer) -> tuple[bool, bool]:
    """Whether the vocabulary spells bytes in GPT-2's alphabet, and whether decoding strips a first space."""
    decoder: dict[str, Any] = json.loads(backend.to_str()).get("decoder") or {"type": "none"}
    steps = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    byte_level = blanks = strips = False
    for step in steps:
        match step:
            case {"type": "ByteLevel"}:
                byte_level = True
            case {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}:
                blanks = True
            case {"type": "Metaspace", "replacement": "\u2581"}:
                blanks = True
                strips = step.get("prepend_scheme", "always") != "never"
            case {"type": "Strip", "content": " ", "start": 1, "stop": 0}:
                strips = True
            case {"type": "ByteFallback" | "Fuse"}:
                continue
            case _:
                raise Unavailable(f"the tokenizer's decoder {step['type']!r} is not supported")
    if byte_level == blanks:
        raise Unavailable("the tokenizer's decoder is neither byte-level nor SentencePiece's")
    return byte_level, strips
