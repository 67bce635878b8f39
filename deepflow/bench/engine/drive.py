"""Driving an engine by hand, and the clock on what it does: a batch that decodes, a prompt that is computed.

It must not know processes, limits or reports.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from deepflow.bench.engine.profile import Clocks, Split
from services.worker.flowserve.engine import Engine
from services.worker.flowserve.life import local_request
from services.worker.flowserve.outcome import StepOutput
from shared.errors import Internal
from shared.messages import Cancel, Sampling

_SPARE_STEPS: Final = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeRun:
    """Steps in which every sequence of a batch decoded, and nothing else was computed.

    `tokens[i]` came out of step i, which took `steps_s[i]`: one per sequence, more where guesses were right.
    `num_guessed` tokens were guessed, `num_right` of them rightly.
    """

    seconds: float
    num_tokens: int
    steps_s: list[float]
    tokens: list[int]
    num_guessed: int
    num_right: int
    split: Split


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillRun:
    """A prompt, from its submission to its first token."""

    seconds: float
    num_tokens: int
    split: Split


def budget(num_sequences: int, prompt_len: int, output_len: int, rows: int, drafts: int) -> int:
    """Tokens that a sequence of such a batch may have to generate: what is counted, and while others are prefilled.

    `rows` are those of a step, `drafts` how many tokens it may add to the one that is certain.
    """
    prefill_rows = max(1, rows - num_sequences * (1 + drafts))
    prefill_steps = -(-num_sequences * prompt_len // prefill_rows)
    return (prefill_steps + _SPARE_STEPS) * (1 + drafts) + 2 * output_len


class Driver:
    """One engine under the hand of a bench. All requests are greedy and never end by themselves."""

    def __init__(self, engine: Engine, clocks: Clocks) -> None:
        self._engine = engine
        self._clocks = clocks
        self._names = (f"bench-{number}" for number in itertools.count())

    def prefill(self, prompt: Sequence[int]) -> PrefillRun:
        """Compute a prompt alone, up to its first token."""
        self._submit(prompt, 1)
        before = self._clocks.read()
        began = time.perf_counter()
        while not any(delta.ids for _, delta in self._step().deltas):
            pass
        seconds = time.perf_counter() - began
        split = self._clocks.split(before, seconds)
        self._drain()
        return PrefillRun(seconds=seconds, num_tokens=len(prompt), split=split)

    def decode(
        self, prompts: Sequence[Sequence[int]], output_len: int, max_tokens: int
    ) -> DecodeRun:
        """Decode `output_len` tokens for each prompt, counted from the step after all have their first.

        Counting ends earlier if a sequence reaches `max_tokens` first, because then the batch is no longer whole.
        """
        names = [self._submit(prompt, max_tokens) for prompt in prompts]
        waiting = set(names)
        while waiting:
            waiting -= {delta.request for _, delta in self._step().deltas if delta.ids}
        steps_s: list[float] = []
        tokens: list[int] = []
        wanted, whole = output_len * len(names), True
        guesses = self._guesses()
        before = self._clocks.read()
        began = last = time.perf_counter()
        while whole and sum(tokens) < wanted:
            deltas = self._step().deltas
            now = time.perf_counter()
            steps_s.append(now - last)
            last = now
            tokens.append(sum(len(delta.ids) for _, delta in deltas))
            whole = not any(delta.finish for _, delta in deltas)
        split = self._clocks.split(before, last - began)
        num_guessed, num_right = (
            after - earlier for after, earlier in zip(self._guesses(), guesses, strict=True)
        )
        for name in names:
            self._engine.cancel(Cancel(request=name, attempt=0))
        self._drain()
        return DecodeRun(
            seconds=last - began,
            num_tokens=sum(tokens),
            steps_s=steps_s,
            tokens=tokens,
            num_guessed=num_guessed,
            num_right=num_right,
            split=split,
        )

    def _guesses(self) -> tuple[int, int]:
        """Made and right, so far."""
        counters = self._engine.counters
        return counters["spec_proposed"], counters["spec_accepted"]

    def _submit(self, prompt: Sequence[int], max_tokens: int) -> str:
        name = next(self._names)
        sampling = Sampling(max_tokens=max_tokens, seed=0, temperature=0.0, ignore_eos=True)
        self._engine.submit(local_request(name, list(prompt), sampling))
        return name

    def _step(self) -> StepOutput:
        """One step. Raises Internal if it failed, or if there is nothing left to wait for."""
        if not self._engine.has_work():
            raise Internal("the engine has nothing to do, but owes tokens")
        output = self._engine.step()
        if output.error is not None:
            raise Internal("the engine failed in a step") from output.error
        return output

    def _drain(self) -> None:
        while self._engine.has_work():
            self._step()
