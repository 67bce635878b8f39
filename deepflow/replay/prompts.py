"""Real prompts for the lines of a trace that says only how long they were and what they had in common. Pure.

A block of the trace (512 tokens under one id) becomes `Prompts.block` tokens drawn from that id, so that prompts repeat
each other's beginnings exactly where the trace says so; lengths shrink by the same factor, which brings a trace of a
large model down to what a small one has room for. It must not know where prompts are sent.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Final

from deepflow.sim.trace import BLOCK, Call
from shared.blockhash import chain

_FIRST_ID: Final = 256  # what comes before are bytes and marks in most vocabularies


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompts:
    """How prompts are made. Lengths are tokens."""

    block: int = (
        64  # of one block of the trace; whole pages of KV, or else less is found than there is
    )
    context: int = 8192  # the model's; longer prompts lose their end
    max_output: int = 256
    vocabulary: int = 32_000  # ids below it are used
    seed: int = 0

    def output_len(self, call: Call) -> int:
        """What is asked for, at least one token."""
        return min(max(round(call.output_length * self.block / BLOCK), 1), self.max_output)

    def prompt_len(self, call: Call) -> int:
        """At least one token, and with the output no more than the context."""
        room = self.context - self.output_len(call)
        return min(max(round(call.input_length * self.block / BLOCK), 1), room)

    def is_cut(self, call: Call) -> bool:
        """Whether the context is too small for its prompt."""
        return round(call.input_length * self.block / BLOCK) > self.prompt_len(call)

    def prompt(self, call: Call) -> list[int]:
        """Token ids."""
        ids: list[int] = []
        num = self.prompt_len(call)
        for one in call.hash_ids:
            ids += self._block(one)
            if len(ids) >= num:
                break
        if len(ids) < num:  # rounding, or a trace that names no blocks
            ids += self._tail(call, num - len(ids))
        return ids[:num]

    def _block(self, one: int) -> Sequence[int]:
        return self._draw(f"{self.seed}:{one}", self.block)

    def _tail(self, call: Call, num: int) -> Sequence[int]:
        return self._draw(f"{self.seed}:{call.timestamp_ms}:{call.hash_ids}", num)

    def _draw(self, name: str, num: int) -> Sequence[int]:
        return Random(name).choices(range(_FIRST_ID, self.vocabulary), k=num)


def num_reusable(prompts: Iterable[Sequence[int]], page: int) -> int:
    """Tokens of prompts whose KV an earlier prompt left, in full pages: what a cache without bounds finds.

    The last token of a prompt is always computed.
    """
    seen: set[bytes] = set()
    found = 0
    for prompt in prompts:
        hashes = chain(b"", prompt, page)
        asked = hashes[: (len(prompt) - 1) // page]
        found += page * next((n for n, one in enumerate(asked) if one not in seen), len(asked))
        seen.update(hashes)
    return found
