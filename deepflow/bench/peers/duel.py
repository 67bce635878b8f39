"""FlowServe and one peer, turn by turn: every round of every point, both loaded, one of them running.

A point's prompts are prefilled once; its rounds then continue the same sequences, so the KV grows to the point's length
in the last of them. It must not know what the engines are, or where results are kept.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence

from deepflow.bench.peers.contestant import Contestant
from deepflow.bench.peers.plan import (
    OURS,
    Plan,
    Point,
    Round,
    Side,
    prompts,
    turn_order,
    variants_left,
)

Keep = Callable[[str, Round], None]  # a point's name and one round of it
_PlayRound = Callable[[int, Sequence[Side]], Awaitable[Mapping[Side, float]]]  # number, turns


class Duel:
    """Of `ours` against `peer`; `vocab` and `seed` make the prompts."""

    def __init__(
        self, ours: Contestant, peer: Contestant, plan: Plan, *, vocab: int, seed: int
    ) -> None:
        self._sides = {OURS: ours, peer.name: peer}
        self._peer = peer.name
        self._plan = plan
        self._vocab = vocab
        self._seed = seed

    async def measure(
        self, point: Point, done: Sequence[Round], variants: Sequence[str], keep: Keep
    ) -> None:
        """The rounds of a point that are not `done` yet, each handed to `keep`. Raises Unavailable."""
        numbers = range(len(done), self._plan.num_rounds)
        if not numbers:
            return
        rounds = list(done)
        play = self._prefill if point.is_prefill else self._decode
        async with play(point, variants_left(rounds, variants)) as one_round:
            for number in numbers:
                order = turn_order(number, self._peer, variants_left(rounds, variants))
                rates = await one_round(number, order)
                theirs = {variant: rate for (name, variant), rate in rates.items() if name != OURS}
                rounds.append(Round(rates[OURS, ""], theirs))
                keep(point.name, rounds[-1])

    @contextlib.asynccontextmanager
    async def _prefill(self, point: Point, variants: Sequence[str]) -> AsyncIterator[_PlayRound]:
        """Each round a prompt of its own; one before them, not counted, for what a first time costs."""

        async def play(number: int, order: Sequence[Side]) -> Mapping[Side, float]:
            (prompt,) = self._prompts(point, number)
            return {side: await self._sides[side[0]].prefill(side[1], prompt) for side in order}

        await play(-1, turn_order(0, self._peer, variants))
        yield play

    @contextlib.asynccontextmanager
    async def _decode(self, point: Point, variants: Sequence[str]) -> AsyncIterator[_PlayRound]:
        """All rounds continue the same sequences."""
        given = self._prompts(point, 0)
        num_tokens = point.batch * self._plan.decode_len
        open_ = turn_order(0, self._peer, variants)
        for name, variant in open_:
            await self._sides[name].open(variant, given)

        async def play(number: int, order: Sequence[Side]) -> Mapping[Side, float]:
            return {
                side: await self._sides[side[0]].decode(side[1], num_tokens, self._plan.turn_s)
                for side in order
            }

        yield play
        for name, variant in open_:
            await self._sides[name].close(variant)

    def _prompts(self, point: Point, number: int) -> list[list[int]]:
        return prompts(point, self._plan, self._vocab, self._seed, self._peer, number)
