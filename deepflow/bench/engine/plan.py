"""How much `bench engine` measures, and the bars it measures against. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from random import Random
from typing import Final

from deepflow.bench.report import Bar

PREFILL_LENGTHS: Final = (512, 2048)  # what the bars are about
START_PROMPT_LEN: Final = 32
DEFAULT_DRAFTS: Final = 4  # where speculation is compared with none and nobody says how much
_PHRASE_LEN: Final = 16

BARS: Final = {
    "w8a8": (
        Bar("decode_roofline_1", ">=", 0.6, "decode at batch 1 / (read bandwidth / model bytes)"),
        Bar("prefill_roofline", ">=", 0.5, "prefill / int8 matrix product peak"),
        Bar("start_s", "<=", 0.5, "engine start to first token, s"),
    )
}


class Dtype(StrEnum):
    """How weights are held and multiplied."""

    W8A8 = "w8a8"
    FP32 = "fp32"
    BF16 = "bf16"


class Kernels(StrEnum):
    """What computes: `DEEPFLOW_KERNELS`."""

    AUTO = "auto"
    NATIVE = "native"
    TORCH = "torch"


class Device(StrEnum):
    """Where it computes."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"
    NPU = "npu"


class Compare(StrEnum):
    """A switch of the engine, measured both ways in turns."""

    ASYNC = "async"
    SPECULATION = "speculation"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Sizes; lengths are tokens. Each round measures everything once."""

    batches: tuple[int, ...] = (1, 8, 32)
    prompt_len: int = 128
    output_len: int = 64
    num_rounds: int = 3
    num_starts: int = 3
    repetitive: bool = False
    compare: tuple[Compare, ...] = ()

    def prefill_lengths(self, context: int) -> tuple[int, ...]:
        """The prompts computed alone, of those that fit the context with a token to come; ascending."""
        lengths = {self.prompt_len, *PREFILL_LENGTHS}
        return tuple(sorted(length for length in lengths if length < context))


def prompts(rng: Random, vocab: int, length: int, *, repetitive: bool) -> Iterator[list[int]]:
    """Endless prompts of random tokens that share nothing, so that no prefix is ever found in the cache.

    A `repetitive` one says a phrase of its own over and over.
    """
    while True:
        phrase = rng.choices(range(vocab), k=_PHRASE_LEN if repetitive else length)
        yield (phrase * (length // len(phrase) + 1))[:length]
