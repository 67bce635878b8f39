"""What a TE's shell does with wants, stored pages and leases, in small: a store of pages beside an engine."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Any

from services.worker.flowserve.decoder import Decoder, View
from services.worker.flowserve.engine import Engine, EngineSettings
from services.worker.flowserve.outcome import Handed, StepOutput, Want
from shared.messages import Delta, Handover, Request
from tests.worker.arithmetic import ArithmeticDecoder
from tests.worker.bench import PAGE, Bench

WAIT_S = 10.0


class StagedDecoder(ArithmeticDecoder):
    """One whose blocks the host cannot address."""

    @property
    def memory(self) -> View | None:
        return None

    def block_view(self, block: int) -> View | None:
        return None


class CountedLoad:
    """Fills pages from a store, as far as they are there; waits for `gate` first. How often it was called, and for how
    many pages."""

    def __init__(self, store: dict[bytes, bytes], hashes: list[bytes]) -> None:
        self.calls: list[int] = []
        self.gate = threading.Event()
        self.gate.set()
        self.begun = threading.Event()
        self._store = store
        self._hashes = hashes

    def __call__(self, views: list[View]) -> int:
        self.begun.set()
        assert self.gate.wait(WAIT_S)
        self.calls.append(len(views))
        for number, (page_hash, view) in enumerate(zip(self._hashes, views, strict=False)):
            page = self._store.get(page_hash)
            if page is None:
                return number
            view[:] = memoryview(page)
        return min(len(self._hashes), len(views))


class Courier(Bench):
    """A bench whose engine fetches; `store` holds pages by hash, as an arena would."""

    def __init__(
        self,
        decoder: Decoder,
        store: dict[bytes, bytes] | None = None,
        *,
        num_blocks: int = 128,
        **limits: Any,
    ) -> None:
        super().__init__(decoder, num_blocks=num_blocks)
        self.woken = threading.Semaphore(0)
        settings = EngineSettings(
            num_blocks=num_blocks, page=PAGE, fetch=True, **(self.mode | limits)
        )
        self.engine = Engine(
            decoder,
            settings,
            eos_ids=[0, 2],
            clock=lambda: self.now,
            wake=self.woken.release,
        )
        self.store = {} if store is None else store
        self.wants: list[Want] = []
        self.handed: list[Handed] = []
        self.errors: list[Exception] = []
        self.superseded: list[Delta] = []
        self._attempts: dict[str, int] = {}

    def submit(self, *requests: Request) -> None:
        super().submit(*requests)
        self._attempts |= {one.request: one.attempt for one in requests}

    def take(self, delta: Delta) -> None:
        if delta.attempt < self._attempts.get(delta.request, 0):
            self.superseded.append(delta)
        else:
            super().take(delta)

    def step(self) -> StepOutput:
        output = super().step()
        self.wants += output.wants
        self.handed += output.prefilled
        if output.error is not None:
            self.errors.append(output.error)
        ledger = self.engine.ledger()
        parts = ("live", "cached", "leased", "moving", "free")
        assert ledger["total"] == sum(ledger[part] for part in parts)  # type: ignore[misc]
        return output

    def want(self) -> Want:
        """The next one."""
        while not self.wants:
            assert self.engine.has_work()
            self.step()
        return self.wants.pop(0)

    def load_of(self, want: Want, start: int = 0) -> CountedLoad:
        return CountedLoad(self.store, want.hashes[start:])

    def populate(self, want: Want, load: CountedLoad, num_pages: int | None = None) -> None:
        count = len(want.hashes) if num_pages is None else num_pages
        self.engine.populate(want.request, want.attempt, count, load)

    def ready(self, want: Want) -> None:
        self.engine.ready(want.request, want.attempt)

    def save_all(self) -> None:
        """Copy all indexed pages to the store."""
        saved = threading.Event()

        def save(pages: list[tuple[bytes, View]]) -> list[bytes]:
            for page_hash, view in pages:
                self.store[page_hash] = bytes(view)
            saved.set()
            return [page_hash for page_hash, _ in pages]

        self.engine.copy_out(self.engine.index_snapshot(), save)
        self.settle(saved)

    def settle(self, event: threading.Event) -> None:
        """Step until something has happened in the RTC thread, and was applied."""
        while self.engine.ledger()["moving"] or not event.is_set():
            self.step_or_wait()

    def step_or_wait(self) -> None:
        if not self.engine.has_work():
            assert self.woken.acquire(timeout=WAIT_S), "nothing happens any more"
        self.step()

    def finish(self, *names: str) -> None:
        """Until these have ended."""
        while not all((name, 0) in self.ends for name in names):
            self.step_or_wait()

    def close(self) -> None:
        """Everything is over: nothing is held by anybody."""
        self.engine.close()
        self.engine.check()


def handover_of(handed: Handed) -> Handover:
    return Handover(
        te="te",
        lease=handed.lease,
        num_pages=handed.num_pages,
        ids=handed.ids,
        logprobs=handed.logprobs,
        cached=handed.cached,
    )


def held(engine: Engine, kinds: Iterable[str] = ("live", "moving", "leased")) -> int:
    ledger = engine.ledger()
    counts = [ledger[kind] for kind in kinds]
    return sum(count for count in counts if isinstance(count, int))
