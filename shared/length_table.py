"""The decode-length predictor in the form that answers: a table of small integers (the paper, section 5.4).

A prompt is a set of features, each one of `NUM_FEATURES` numbers, an output length one of a few buckets of
`BUCKET_TOKENS` tokens. The table gives every feature one byte per bucket; the bucket whose bytes have the greatest sum
is the answer. It is a multinomial logistic regression whose weights were rounded to 8 bits, and it is all that a Job
Executor loads: no torch, no numpy, some ten thousand additions. This module must not know how prompts become features,
nor how the weights were learned.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Self

from shared.errors import InvalidRequest

BUCKET_TOKENS: Final = 128
MAX_BUCKETS: Final = 64  # what is longer than these hold belongs to the last
NUM_FEATURES: Final = 8192
BIAS: Final = 0  # the feature that every prompt has
ZERO: Final = 128  # the byte of a weight of nothing

_MAGIC: Final = b"DFLT1"


def bucket_of(num_tokens: int, num_buckets: int = MAX_BUCKETS) -> int:
    """The bucket of an output of `num_tokens`: 1 to 128 tokens are the first, 129 to 256 the next."""
    return min(max(num_tokens - 1, 0) // BUCKET_TOKENS, num_buckets - 1)


@dataclass(frozen=True, slots=True)
class LengthTable:
    """`weights` holds `NUM_FEATURES` rows of `num_buckets` bytes, each a weight plus `ZERO`."""

    num_buckets: int
    weights: bytes

    def __post_init__(self) -> None:
        if not 1 <= self.num_buckets <= MAX_BUCKETS:
            raise InvalidRequest(
                f"a length table has 1 to {MAX_BUCKETS} buckets", param="num_buckets"
            )
        if len(self.weights) != NUM_FEATURES * self.num_buckets:
            raise InvalidRequest(
                "a length table is cut off, or made for other features", param="weights"
            )

    def bucket(self, features: Sequence[int]) -> int:
        """The likeliest bucket, the shortest of equals. `features`: each within `NUM_FEATURES`, none twice."""
        width, weights = self.num_buckets, self.weights
        rows = [weights[number * width : (number + 1) * width] for number in features]
        # `ZERO` is in every row of every bucket alike and makes no difference.
        scores = [sum(column) for column in zip(*rows, strict=True)]
        return scores.index(max(scores)) if scores else 0

    def to_bytes(self) -> bytes:
        """What `from_bytes` reads."""
        return _MAGIC + bytes([self.num_buckets]) + self.weights

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """The table in `data`. Raises InvalidRequest naming what is wrong with it."""
        start = len(_MAGIC)
        if data[:start] != _MAGIC or len(data) <= start:
            raise InvalidRequest("not a length table of this version", param="table")
        return cls(data[start], data[start + 1 :])
