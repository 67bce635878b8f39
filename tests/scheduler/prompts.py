"""Requests whose answers have a length that can be learned from the prompt, for tests of the predictor."""

from __future__ import annotations

from random import Random
from typing import Any

from services.scheduler.lengths import Features
from shared.job_messages import LengthRecord
from shared.messages import Request, Sampling, TaskEnded

ORDERS = {
    (11, 12, 13): 30,
    (21, 22, 23): 300,
    (31, 32, 33): 700,
}  # what is asked, and how long it takes


def request(name: str = "r", prompt: list[int] | None = None, **fields: Any) -> Request:
    """A request; `fields` are its own or those of its sampling."""
    sampling = {"max_tokens": 1024, "seed": 1}
    own = {"model": "m", "tenant": "t", "attempt": 1, "client": "gateway-1"}
    for key, value in fields.items():
        (own if key in Request.__dataclass_fields__ else sampling)[key] = value
    return Request(
        request=name,
        prompt=[1, 2, 3] if prompt is None else prompt,
        root=b"r" * 16,
        hashes=[],
        sampling=Sampling(**sampling),
        deadline_ms=60_000,
        park_ms=0,
        **own,  # type: ignore[arg-type]
    )


def ended(name: str, output_tokens: int, finish: str = "stop") -> TaskEnded:
    """The end of its first attempt."""
    return TaskEnded(
        task=f"{name}.1.0",
        request=name,
        attempt=1,
        te="te-1",
        finish=finish,
        prompt_tokens=3,
        cached_tokens=0,
        output_tokens=output_tokens,
    )


def orders(random: Random, num: int, **fields: Any) -> list[tuple[Request, int]]:
    """Requests, each a text of its own that ends in one of `ORDERS`, and the lengths of their answers."""
    found = []
    for number in range(num):
        order = random.choice(list(ORDERS))
        text = [random.randrange(1000, 50_000) for _ in range(random.randrange(10, 300))]
        length = round(ORDERS[order] * random.uniform(0.9, 1.1))
        found.append((request(f"r{number}", [*text, *order, 7], **fields), length))
    return found


def records(random: Random, num: int) -> list[LengthRecord]:
    """What would be recorded of them."""
    return [record_of(one, length) for one, length in orders(random, num)]


def record_of(one: Request, output_tokens: int) -> LengthRecord:
    """The line of one answer."""
    return LengthRecord(
        kind=one.kind,
        prompt_tokens=len(one.prompt),
        max_tokens=one.sampling.max_tokens,
        output_tokens=output_tokens,
        features=Features.of(one).numbers.tolist(),
    )
