"""An engine, its clock turned by hand, and a client that checks what it hears: what the engine's tests are built on."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any, ClassVar

from services.worker.flowserve.decoder import Decoder
from services.worker.flowserve.engine import Engine, EngineSettings
from services.worker.flowserve.outcome import StepOutput
from shared import blockhash
from shared.messages import Band, Delta, Request, Sampling, TokenLogprobs

PAGE = 16
ROOT = blockhash.root(b"secret", "tiny")
PROMPT = [(7 * i * i + 3 * i) % 500 + 3 for i in range(70)]

GREEDY = {"temperature": 0}
SEEDED = {"temperature": 0.9, "top_p": 0.95, "frequency_penalty": 0.4, "repetition_penalty": 1.1}


def request(
    name: str = "r",
    prompt: list[int] | None = None,
    *,
    attempt: int = 0,
    client: str = "c",
    output: list[list[int]] | None = None,
    ended: Iterable[int] = (),
    deadline_ms: int = 60_000,
    page: int = PAGE,
    band: Band = Band.DEFAULT,
    tenant: str = "t",
    **fields: Any,
) -> Request:
    prompt = PROMPT if prompt is None else prompt
    return Request(
        request=name,
        attempt=attempt,
        client=client,
        model="tiny",
        tenant=tenant,
        prompt=prompt,
        root=ROOT,
        hashes=blockhash.chain(ROOT, [abs(token) for token in prompt], page),
        sampling=Sampling(**{"max_tokens": 24, "seed": 5, "ignore_eos": True} | fields),
        deadline_ms=deadline_ms,
        park_ms=0,
        output=output or [],
        ended=list(ended),
        band=band,
    )


class Bench:
    """An engine, a clock turned by hand, and what a client saw: output by (request, choice), and its ends."""

    mode: ClassVar[dict[str, Any]] = {}  # how steps are executed; set by the fixture of that name

    def __init__(
        self, decoder: Decoder, *, num_blocks: int = 128, page: int = PAGE, **limits: Any
    ) -> None:
        self.now = 0.0
        settings = EngineSettings(num_blocks=num_blocks, page=page, **(self.mode | limits))
        self.engine = Engine(decoder, settings, eos_ids=[0, 2], clock=lambda: self.now)
        self.ids: dict[tuple[str, int], list[int]] = defaultdict(list)
        self.logprobs: dict[tuple[str, int], list[TokenLogprobs]] = defaultdict(list)
        self.ends: dict[tuple[str, int], Delta] = {}
        self.cached: dict[str, int | None] = {}
        self.finishes: dict[str, str] = {}
        self.index: set[bytes] = set()

    def submit(self, *requests: Request) -> None:
        for one in requests:
            for choice, given in enumerate(one.output):
                self.ids[one.request, choice] = given.copy()
            self.engine.submit(one)

    def step(self) -> StepOutput:
        output = self.engine.step()
        for client, delta in output.deltas:
            assert client == "c"
            self.take(delta)
        for ended in output.ended:
            self.finishes[ended.request] = ended.finish
            self.cached[ended.request] = ended.cached_tokens
        self.index = (self.index - set(output.removed)) | set(output.stored)
        assert self.index == set(self.engine.index_snapshot())
        self.engine.check()
        return output

    def take(self, delta: Delta) -> None:
        key = delta.request, delta.choice
        assert key not in self.ends, "a delta after the end"
        assert delta.index == len(self.ids[key])
        assert delta.logprobs is None or len(delta.logprobs) == len(delta.ids)
        self.ids[key] += delta.ids
        self.logprobs[key] += delta.logprobs or []
        if delta.finish is not None:
            self.ends[key] = delta

    def run(self) -> None:
        while self.engine.has_work():
            self.step()
        ledger = self.engine.ledger()
        assert ledger["live"] == 0
        assert ledger["owners"] == {}

    def tokens(self, name: str = "r", choice: int = 0) -> list[int]:
        return self.ids[name, choice]
