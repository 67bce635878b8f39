"""What several kinds of tenants ask of a chat model: seeded conversations of which answers of many lengths come.

Pure: randomness is passed in. This module must not know who answers.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import Final

from deepflow.bench.workload import WORDS

MAX_TOKENS: Final = (256, 512, 768)  # as clients set it
_TERSE: Final = "You are a terse assistant. Answer with one short sentence."
_HELPFUL: Final = "You are a helpful assistant. Explain your answers step by step, in detail."
# Per kind of tenant: its system prompts, and what it asks. Passages and topics differ every time.
_TENANTS: Final[dict[str, tuple[tuple[str, ...], tuple[str, ...]]]] = {
    "chat": (
        ("", _TERSE, _HELPFUL),
        (
            "What is {a}?",
            "Tell me something about {a} and {b}.",
            "Why does {a} matter for {b}? Explain in detail.",
            "Is {a} more important than {b}? Answer yes or no.",
            "Give me one word that means the same as {a}.",
            "Write a long story about a {a} and a {b}.",
            "Write a poem about {a}.",
            "What should I do when my {a} has a problem with my {b}?",
        ),
    ),
    "desk": (
        (_TERSE, ""),
        (
            "Which of these words comes first in the alphabet: {a}, {b}, {c}? One word only.",
            "Classify the sentiment of this text as positive, negative or neutral: {passage}",
            "Give this text a title: {passage}",
            "Summarise in one sentence: {passage}",
            "Does this text mention {a}? Answer yes or no. {passage}",
            "List three keywords of this text: {passage}",
        ),
    ),
    "writer": (
        (_HELPFUL,),
        (
            "Write an essay about {a}, {b} and {c}.",
            "List {number} ideas for a {a} about {b}.",
            "Rewrite this text in your own words: {passage}",
            "Summarise this text: {passage}",
            "Write a letter to a {a} about {b}.",
            "Write a Python function that sorts a list of {a} by {b}.",
        ),
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Instruction:
    """One conversation, as OpenAI's messages, and who asks."""

    tenant: str
    messages: list[dict[str, str]]
    max_tokens: int


def instruction(random: Random, passages: list[str]) -> Instruction:
    """The next one."""
    tenant = random.choice(list(_TENANTS))
    systems, orders = _TENANTS[tenant]
    a, b, c = random.sample(WORDS, 3)
    text = random.choice(orders).format(
        a=a, b=b, c=c, number=random.choice((5, 10, 20)), passage=random.choice(passages)
    )
    system = random.choice(systems)
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": text})
    return Instruction(tenant=tenant, messages=messages, max_tokens=random.choice(MAX_TOKENS))


def passages_of(text: str, least: int = 200, most: int = 1200) -> list[str]:
    """The paragraphs of a text, those of so many characters."""
    paragraphs = (" ".join(part.split()) for part in text.split("\n\n"))
    return [part for part in paragraphs if least <= len(part) <= most]
