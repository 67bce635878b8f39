"""What a gateway's tests play themselves: the model in the cache, and a JE and a TE that speak real messages."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from shared import catalog, subjects
from shared.bus import Bus
from shared.errors import NotFound
from shared.messages import (
    Accepted,
    Cancel,
    Delta,
    ModelEntry,
    Replay,
    Replayed,
    Request,
    TeBeat,
    TokenLogprobs,
    Tokens,
)
from shared.rtc_messages import Free
from shared.text.tokenizer import Tokenizer
from tests.worker.tiny import IM_END, make_tiny

MODEL = "tiny/llama-3.1"
CONTEXT = 512


def publish_model(cache: Path, name: str = MODEL) -> ModelEntry:
    """A tiny model in the cache, as `deepflow pull` leaves it, and its entry for the catalogue."""
    folder = make_tiny(catalog.models_dir(cache) / subjects.encode(name), context=CONTEXT)
    (folder / catalog.MANIFEST).write_text(
        json.dumps({"name": name, "weights_digest": "w" * 64, "created": 1700000000})
    )
    model = catalog.open_model(cache, name)
    return ModelEntry(
        name=name,
        folder=folder.name,
        context=model.context,
        vocab=model.vocab,
        page=16,
        eos_ids=model.eos_ids,
        tokenizer_digest=model.tokenizer_digest,
        template_digest=model.template_digest,
        recipe_digest="r" * 32,
        created=model.created,
    )


class Peers:
    """A JE and a TE on a real bus. `text` is what every choice says; it ends with the end of sequence."""

    def __init__(self, bus: Bus, tokenizer: Tokenizer, model: str = MODEL) -> None:
        self.bus = bus
        self.tokenizer = tokenizer
        self.model = model
        self.te = "te-1"
        self.je = "scheduler-1"
        self.text = "Hello there, world."
        self.step_s = 0.0
        self.requests: list[Request] = []
        self.cancels: list[Cancel] = []
        self.replays: list[Replay] = []
        self.freed: list[str] = []  # ids of context caches that have ended
        self.cancelled: dict[str, int] = {}  # request -> up to this attempt
        self.made: dict[tuple[str, int], int] = {}  # (request, attempt) -> steps done
        self.sequence = 0
        self.cached = 3
        self.lose: Callable[[int, Delta], bool] = lambda step, delta: False
        self.on_request: Callable[[Request], Awaitable[Accepted]] = self.accept
        self._tasks: set[asyncio.Task[None]] = set()
        self._beating = True
        self._stopped = asyncio.Event()

    async def start(self) -> None:
        """Serve requests, tasks and cancels; beat."""
        names = self.bus.subjects
        await self.bus.serve(names.request(self.model), (Request,), self._request)
        await self.bus.serve(names.task(self.te), (Replay,), self._replay)
        for name in (self.te, self.je):
            await self.bus.listen(names.cancel(name), (Cancel,), self._cancel)
        await self.bus.listen(names.rtc("free"), (Free,), self._free)
        self.spawn(self._beat())
        await self.bus.flush()

    async def stop(self) -> None:
        """End every task."""
        self._stopped.set()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def silence(self) -> None:
        """Beat no more."""
        self._beating = False

    def spawn(self, coroutine: Awaitable[None]) -> None:
        """Run something until `stop`."""
        task = asyncio.ensure_future(coroutine)
        self._tasks.add(task)

    def ids(self, choice: int = 0) -> list[int]:
        """What a choice says, with the token that ends it."""
        return [*self.tokenizer.encode(self.text), IM_END]

    async def accept(self, request: Request) -> Accepted:
        """The default: take it and generate."""
        self.spawn(self.generate(request))
        return self.accepted(request)

    def accepted(self, request: Request, te: str | None = "") -> Accepted:
        """The answer that says our TE has it, or another, or none."""
        return Accepted(
            request=request.request,
            attempt=request.attempt,
            by=self.je,
            te=self.te if te == "" else te,
        )

    def deltas(self, request: Request) -> list[list[Delta]]:
        """All deltas of a request, by step: one token per live choice."""
        sampling = request.sampling
        have = [len(ids) for ids in request.output] or [0] * sampling.n
        steps: list[list[Delta]] = []
        for choice in range(sampling.n):
            if choice in request.ended:
                continue
            ids = self.ids(choice)
            length = min(len(ids), sampling.max_tokens)
            for step, index in enumerate(range(have[choice], length)):
                last = index == length - 1
                ended = ids[index] == IM_END
                logprobs = TokenLogprobs(
                    logprob=-0.5,
                    top_ids=[ids[index], 40][: sampling.logprobs or 0],
                    top_logprobs=[-0.5, -1.5][: sampling.logprobs or 0],
                )
                while len(steps) <= step:
                    steps.append([])
                steps[step].append(
                    Delta(
                        request=request.request,
                        attempt=request.attempt,
                        choice=choice,
                        index=index,
                        ids=[ids[index]],
                        logprobs=None if sampling.logprobs is None else [logprobs],
                        cached=self.cached if step == 0 else None,
                        finish=("stop" if ended else "length") if last else None,
                        stop_id=IM_END if last and ended else None,
                    )
                )
        return steps

    async def generate(self, request: Request, start: int = 0, end: int | None = None) -> None:
        """Send a request's deltas, a frame per step, without those that `lose` picks."""
        for number, deltas in list(enumerate(self.deltas(request)))[start:end]:
            if self.cancelled.get(request.request, 0) >= request.attempt:
                return
            self.made[request.request, request.attempt] = number + 1
            kept = [delta for delta in deltas if not self.lose(number, delta)]
            if kept:
                await self.send(request, kept)
            await asyncio.sleep(self.step_s)

    async def send(self, request: Request, deltas: list[Delta], source: str = "") -> None:
        """One frame."""
        self.sequence += 1
        frame = Tokens(source=source or self.te, seq=self.sequence, deltas=deltas)
        await self.bus.publish(self.bus.subjects.tokens(request.client), frame)

    async def until(self, condition: Callable[[], bool], limit_s: float = 10.0) -> None:
        """Wait until something has happened."""
        end = time.monotonic() + limit_s
        while not condition():
            assert time.monotonic() < end, "it did not happen"
            await asyncio.sleep(0.01)

    async def _request(self, request: Request) -> Accepted:
        self.requests.append(request)
        return await self.on_request(request)

    async def _replay(self, replay: Replay) -> Replayed:
        self.replays.append(replay)
        known = [
            r for r in self.requests if (r.request, r.attempt) == (replay.request, replay.attempt)
        ]
        if not known:
            raise NotFound("never heard of it")
        if not self._beating:
            await self._stopped.wait()  # a hung process answers nobody
        made = self.made.get((replay.request, replay.attempt), 0)
        deltas = [delta for step in self.deltas(known[0])[:made] for delta in step]
        return Replayed(deltas=[d for d in deltas if d.index >= replay.have[d.choice]])

    def _cancel(self, cancel: Cancel) -> None:
        self.cancels.append(cancel)
        self.cancelled[cancel.request] = cancel.attempt

    def _free(self, free: Free) -> None:
        self.freed.append(free.keep)

    async def _beat(self) -> None:
        while True:
            if self._beating:
                beat = TeBeat(id=self.te, model=self.model, pod="pod", state="ready")
                await self.bus.publish(self.bus.subjects.beat("te", self.te), beat)
            await asyncio.sleep(0.2)
