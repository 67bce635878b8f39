"""What `bench peers` measures, in which order, and the bars it measures against. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Final

from deepflow.bench.report import Bar

OURS: Final = "flowserve"
PEERS: Final = ("openvino", "llamacpp", "vllm", "transformers")
GROUPS: Final = ("prefill", "decode_1", "decode_8", "decode_32")
BARS: Final = tuple(
    Bar(f"vs_{peer}_{group}", ">=", 1.0, f"FlowServe / {peer}, {group}, worst")
    for peer in PEERS
    for group in GROUPS
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One thing to measure. `batch` 0: prefill of one prompt; else decoding of so many sequences.

    `num_tokens` is the prompt of a prefill; of decoding the most a sequence's KV holds at the end.
    """

    name: str
    group: str  # of the ratio it counts for
    batch: int
    num_tokens: int

    @property
    def is_prefill(self) -> bool:
        """Whether it is the time to a first token rather than a rate of decoding."""
        return self.batch == 0


def _prefill(num_tokens: int) -> Point:
    return Point(name=f"prefill_{num_tokens}", group="prefill", batch=0, num_tokens=num_tokens)


def _decode(batch: int, num_tokens: int, kv: str) -> Point:
    return Point(
        name=f"decode_{batch}_kv{kv}", group=f"decode_{batch}", batch=batch, num_tokens=num_tokens
    )


POINTS: Final = (
    _prefill(512),
    _prefill(2048),
    _decode(1, 512, "512"),
    _decode(8, 512, "512"),
    _decode(32, 512, "512"),
    _decode(1, 4096, "4k"),
    _decode(8, 4096, "4k"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How much. A round decodes `decode_len` tokens of each sequence; all rounds of a point share one prefill.

    Results of plans with different names are kept apart.
    """

    name: str = "full"
    points: tuple[Point, ...] = POINTS
    num_rounds: int = 3
    decode_len: int = 64
    turn_s: float = 25.0  # in which an engine decodes at most; it bounds what a very slow one costs
    # Steps between a prompt's first token and the first that is timed, and what engines differ by in them.
    slack: int = 8

    def prompt_len(self, point: Point) -> int:
        """Tokens of one prompt of a point."""
        if point.is_prefill:
            return point.num_tokens
        return point.num_tokens - self.num_rounds * self.decode_len - self.slack

    @property
    def num_tokens(self) -> int:
        """Tokens an engine's KV cache has room for: the largest point, and a quarter more."""
        return max(max(point.batch, 1) * point.num_tokens for point in self.points) * 5 // 4

    @property
    def max_num_seqs(self) -> int:
        """Sequences that are decoded at once."""
        return max(1, *(point.batch for point in self.points))


QUICK: Final = Plan(
    name="quick",
    points=(_prefill(512), _decode(1, 512, "512"), _decode(8, 512, "512")),
    num_rounds=1,
    decode_len=16,
)


def prompts(point: Point, plan: Plan, vocab: int, *key: object) -> list[list[int]]:
    """Random token ids, the same for everybody and for the same `key`, no two prompts alike.

    Every engine takes token ids, so lengths match by themselves. The first tenth of a vocabulary is left out: special
    tokens are in there.
    """
    rng = Random(repr((point.name, *key)))
    length = plan.prompt_len(point)
    first = vocab // 10
    return [
        [rng.randrange(first, vocab) for _ in range(length)] for _ in range(max(1, point.batch))
    ]


Side = tuple[str, str]  # engine, variant


@dataclass(frozen=True, slots=True)
class Round:
    """Tokens/s of both sides next to each other: ours, and the peer's by variant."""

    ours: float
    theirs: Mapping[str, float]

    @property
    def best(self) -> float:
        """The peer's in its best variant."""
        return max(self.theirs.values())

    @property
    def ratio(self) -> float:
        """Ours over the peer's; above 1 we are ahead."""
        return self.ours / self.best


def turn_order(number: int, peer: str, variants: Sequence[str]) -> list[Side]:
    """Who runs when in round `number`: ours goes first in every other round, variants change places too."""
    theirs = [(peer, variant) for variant in variants]
    return [(OURS, ""), *theirs] if number % 2 == 0 else [*reversed(theirs), (OURS, "")]


def variants_left(rounds: Sequence[Round], variants: Sequence[str]) -> tuple[str, ...]:
    """All variants in the first round, then the one that was fastest in it."""
    if not rounds:
        return tuple(variants)
    first = rounds[0].theirs
    return (max(first, key=lambda variant: first[variant]),)
