"""Prompts and arrival times of a synthetic load. Pure: randomness is passed in. It must not know how it is sent.

Prompts are common English words, each of which is one token in the byte-pair vocabularies of today, so a prompt of
`length` words has about `length` tokens without knowing the tokenizer; the answer's usage tells the truth.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import StrEnum
from random import Random
from typing import Final

_TEXT: Final = (
    "time year people way day man thing woman life child world school state family student group country "
    "problem hand part place case week company system program question work government number night point "
    "home water room mother area money story fact month lot right study book eye job word business issue "
    "side kind head house service friend father power hour game line end member law car city community name "
    "president team minute idea body information back parent face others level office door health person "
    "art war history party result change morning reason research girl guy moment air teacher force education "
    "good new first last long great little own other old big high different small large next early young "
    "important few public bad same able make know take see come think look want give use find tell ask seem "
    "feel try leave call keep let begin help show hear play run move live believe bring happen write provide "
    "sit stand lose pay meet include continue set learn lead understand watch follow stop create speak read"
)
WORDS: Final = tuple(_TEXT.split())


class Dataset(StrEnum):
    """Which prompts; the names of `vllm bench serve`."""

    RANDOM = "random"
    PREFIX_REPETITION = "prefix_repetition"


def words(rng: Random, length: int) -> str:
    """A text of so many words."""
    return " ".join(rng.choices(WORDS, k=length))


def random_prompts(rng: Random, length: int) -> Iterator[str]:
    """Endless prompts that share nothing."""
    while True:
        yield words(rng, length)


def prefix_repetition(
    rng: Random, *, prefix_len: int, suffix_len: int, num_prefixes: int
) -> Iterator[str]:
    """Endless prompts that begin with one of a few prefixes, drawn evenly, and end in a way of their own."""
    prefixes = [words(rng, prefix_len) for _ in range(num_prefixes)]
    while True:
        yield f"{rng.choice(prefixes)} {words(rng, suffix_len)}"


def arrivals(rng: Random, num: int, rate: float, burstiness: float = 1.0) -> list[float]:
    """Start times in seconds of `num` requests at `rate` per second, the first at 0; all at 0 for an infinite rate.

    Gaps follow a Gamma distribution of shape `burstiness`: 1 is a Poisson process, below it arrivals bunch, above it
    they even out. Scaled so that the last comes when the rate says (as `vllm bench serve` does).
    """
    if rate == float("inf") or num < 2:
        return [0.0] * num
    times = [0.0]
    for _ in range(num - 1):
        times.append(times[-1] + rng.gammavariate(burstiness, 1 / (rate * burstiness)))
    scale = (num - 1) / rate / times[-1] if times[-1] > 0 else 0.0
    return [time_s * scale for time_s in times]
