"""Token ids to text while they arrive: what can be shown is shown at once, half a character waits for its rest.

This module must not know about stop strings or streams.
"""

from __future__ import annotations

import codecs

from shared.text.tokenizer import Tokenizer


class Detokenizer:
    """The text of one choice. Whatever the ids, the pieces of `push` and `finish` joined are `Tokenizer.decode` of
    them all; a push costs the token's own bytes, however long the text is.

    `continues` says that the ids go on after a prompt: then a space they begin with is the model's, where a text of its
    own would have one added by SentencePiece.
    """

    def __init__(
        self, tokenizer: Tokenizer, skip_special: bool = True, *, continues: bool = False
    ) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special else frozenset[int]()
        self._strip = tokenizer.strips_blank and not continues
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, id: int) -> str:
        """The text that `id` completes, "" while a character is incomplete."""
        if id in self._skipped:
            return ""
        data = self._tokenizer.token_bytes(id)
        if self._strip and data:
            data = data.removeprefix(b" ")
            self._strip = False
        return self._utf8.decode(data)

    def finish(self) -> str:
        """What is left at the end: U+FFFD for a character that was never completed."""
        return self._utf8.decode(b"", final=True)
