"""FlowServe, driven as its peers are: token ids in, engine steps timed. Its only environment is ours."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any, Final

from services.worker.flowserve.engine import Engine
from services.worker.flowserve.life import local_request
from shared.messages import Cancel, Sampling

_ENDLESS: Final = 1 << 20  # tokens: a session ends by cancellation


class Driver:
    """One engine, and at most one session of decoding sequences."""

    def __init__(
        self,
        model: str,
        weights: Mapping[str, str],
        scratch: str,
        variants: Sequence[str],
        threads: int,
        num_tokens: int,
        max_num_seqs: int,
    ) -> None:
        self._engine = Engine.from_folder(
            Path(model),
            device="cpu",
            threads=threads,
            kv_tokens=num_tokens,
            max_num_seqs=max_num_seqs,
        )
        self._names = map(str, count())
        self._open: list[str] = []
        self._settings = {"dtype": "w8a8", "threads": threads, "kv_tokens": num_tokens}

    def describe(self) -> dict[str, Any]:
        """Versions (none: they are the caller's own) and settings."""
        return {"versions": {}, "settings": self._settings}

    def prefill(self, variant: str, prompt: list[int]) -> dict[str, float]:
        """Seconds to the first token of one prompt."""
        started = time.perf_counter()
        self._run_to_end(prompt)
        return {"seconds": time.perf_counter() - started}

    def open(self, variant: str, prompts: Sequence[list[int]]) -> None:
        """Fill the cache prompt by prompt, then start all of them together, so that all decode in step."""
        for prompt in prompts:
            self._run_to_end(prompt)
        self._open = [self._submit(prompt, _ENDLESS) for prompt in prompts]
        begun: set[str] = set()
        while len(begun) < len(prompts):
            begun.update(delta.request for _, delta in self._step() if delta.ids)

    def decode(self, variant: str, num_tokens: int, limit_s: float) -> dict[str, float]:
        """Seconds for steps of all sequences until `num_tokens` tokens are out or `limit_s` is over."""
        done = 0
        started = time.perf_counter()
        while done < num_tokens and time.perf_counter() < started + limit_s:
            done += sum(len(delta.ids) for _, delta in self._step())
        return {"seconds": time.perf_counter() - started, "num_tokens": done}

    def close(self, variant: str) -> None:
        """Give up the session."""
        for name in self._open:
            self._engine.cancel(Cancel(request=name, attempt=0))
        self._open = []
        while self._engine.has_work():
            self._engine.step()

    def _run_to_end(self, prompt: list[int]) -> None:
        name = self._submit(prompt, 1)
        while not any(delta.request == name and delta.finish for _, delta in self._step()):
            pass

    def _step(self) -> list[Any]:
        output = self._engine.step()
        if output.error is not None:
            raise output.error
        for _, delta in output.deltas:
            if delta.failure is not None:
                raise RuntimeError(delta.failure.message)
        return output.deltas

    def _submit(self, prompt: list[int], max_tokens: int) -> str:
        name = next(self._names)
        room = self._engine.context - len(prompt)
        sampling = Sampling(
            max_tokens=min(max_tokens, room), seed=0, temperature=0.0, ignore_eos=True
        )
        self._engine.submit(local_request(name, prompt, sampling))
        return name
