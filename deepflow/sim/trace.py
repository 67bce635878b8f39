"""Traces: what was asked of a service and when, read from files or generated.

Formats:
- Mooncake (JSON lines): `timestamp` (ms), `input_length` and `output_length` (tokens), `hash_ids`, one per 512 tokens
  of the prompt, the same for the same prefix; optionally `tenant` and `band`;
- Azure (CSV): `TIMESTAMP`, `ContextTokens`, `GeneratedTokens`: no prompts, so nothing is shared.

This module must not know what becomes of the requests.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from random import Random
from typing import Any, Final

import orjson

from shared.errors import InvalidRequest
from shared.messages import Band

BLOCK: Final = 512  # tokens
_AZURE: Final = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")


@dataclass(frozen=True, slots=True)
class Call:
    """One request of a trace. `hash_ids` name its prompt's blocks, the last of which may not be full."""

    timestamp_ms: float
    input_length: int
    output_length: int
    hash_ids: tuple[int, ...]
    tenant: str = "default"
    band: Band = Band.DEFAULT


# -------------------------------------------------------------------------------------------------------------- reading


def read(path: Path) -> list[Call]:
    """A trace of either format, in the order of its times. Raises InvalidRequest for a file that is none, naming the
    line."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise InvalidRequest(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"{path}: not text") from error
    is_azure = bool(lines) and lines[0].split(",")[: len(_AZURE)] == list(_AZURE)
    calls = _azure(path, lines) if is_azure else _mooncake(path, lines)
    if not calls:
        raise InvalidRequest(f"{path}: no requests in it")
    return sorted(calls, key=lambda call: call.timestamp_ms)


def _mooncake(path: Path, lines: Sequence[str]) -> list[Call]:
    calls = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            raw: dict[str, Any] = orjson.loads(line)
            calls.append(
                Call(
                    float(raw["timestamp"]),
                    *_lengths(raw["input_length"], raw["output_length"]),
                    tuple(map(int, raw["hash_ids"])),
                    str(raw.get("tenant", "default")),
                    Band(raw.get("band", Band.DEFAULT)),
                )
            )
        except (KeyError, TypeError, ValueError) as error:
            raise InvalidRequest(f"{path}, line {number}: no request of a trace") from error
    return calls


def _azure(path: Path, lines: Sequence[str]) -> list[Call]:
    calls: list[Call] = []
    first: datetime | None = None
    next_id = 0
    for number, row in enumerate(csv.DictReader(lines), 2):
        try:
            when = datetime.fromisoformat(row["TIMESTAMP"])
            first = first or when
            timestamp_ms = (when - first).total_seconds() * 1000
            num_prompt, num_output = _lengths(row["ContextTokens"], row["GeneratedTokens"])
        except (KeyError, TypeError, ValueError) as error:
            raise InvalidRequest(f"{path}, line {number}: no request of a trace") from error
        ids = tuple(range(next_id, next_id + -(-num_prompt // BLOCK)))
        next_id += len(ids)
        calls.append(Call(timestamp_ms, num_prompt, num_output, ids))
    return calls


def _lengths(num_prompt: str | int, num_output: str | int) -> tuple[int, int]:
    """Of a prompt, which has a token at least, and its answer, of which there is one at least. Raises ValueError."""
    if int(num_prompt) < 1 or int(num_output) < 0:
        raise ValueError("no request has such a length")
    return int(num_prompt), max(int(num_output), 1)


# ----------------------------------------------------------------------------------------------------------- generating


def generate(num: int, seed: int, *, num_prompts: int = 20, num_turns: int = 6) -> Iterator[str]:
    """A trace of conversations in Mooncake's format, line by line: each begins with one of a few system prompts (the
    first ones by far the most used) and grows by some blocks with every turn."""
    random = Random(seed)
    next_id = num_prompts * 4
    open_: list[list[int]] = []
    now_ms = 0
    for _ in range(num):
        now_ms += int(random.expovariate(1 / 300))
        if len(open_) < 40 or random.random() < 1 / num_turns:
            prompt = min(int(random.paretovariate(1.0)) - 1, num_prompts - 1)
            chain = [prompt * 4 + n for n in range(1 + prompt % 4)]
            open_.append(chain)
            if len(open_) > 60:
                open_.pop(random.randrange(len(open_)))
        else:
            chain = random.choice(open_)
        num_new = random.randint(1, 6)
        chain += range(next_id, next_id + num_new)
        next_id += num_new
        tail = random.randrange(BLOCK)
        yield orjson.dumps(
            {
                "timestamp": now_ms,
                "input_length": (len(chain) - 1) * BLOCK + tail + 1,
                "output_length": random.randint(1, 500),
                "hash_ids": chain,
            }
        ).decode()


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What a generated trace is like. Lengths are in tokens, of log-normal distributions with these medians.

    A conversation begins with one of `num_roots` shared prompts (the n-th is used 1/(n+1)^`root_skew` as often as the
    first) and has `num_turns` turns on average, `think_s` apart. `burstiness` is the coefficient of variation of the
    times between conversations; 1 is Poisson.
    """

    rate: float = 3.4  # requests per second
    num_roots: int = 1
    root_skew: float = 1.0
    root_blocks: int = 1
    first: int = 5_000
    turn: int = 1_500
    spread: float = 1.1  # sigma of the lengths of prompts
    num_turns: float = 1.7
    think_s: float = 60.0
    output: int = 300
    output_spread: float = 0.6
    max_prompt: int = 120_000
    burstiness: float = 1.0
    num_tenants: int = 1


# Like the two halves of the public traces: people who talk, and agents who call tools again and again.
CONVERSATION: Final = Shape()
TOOLAGENT: Final = Shape(
    rate=6.6, num_roots=30, root_blocks=8, first=2_000, turn=700, num_turns=6.0, think_s=8.0, output=150
)  # fmt: skip


def conversations(num: int, seed: int, shape: Shape = CONVERSATION) -> list[Call]:
    """`num` requests of a shape, in the order of their times. The same seed gives the same trace."""
    random = Random(seed)
    weights = [1 / (n + 1) ** shape.root_skew for n in range(shape.num_roots)]
    roots = [
        [n * shape.root_blocks + block for block in range(shape.root_blocks)]
        for n in range(shape.num_roots)
    ]
    next_id = shape.num_roots * shape.root_blocks
    gap_s = shape.num_turns / shape.rate
    varies = shape.burstiness**2
    calls: list[Call] = []
    begun_s = 0.0
    for _ in range(num):  # conversations, which are enough: each has a request
        begun_s += random.gammavariate(1 / varies, gap_s * varies) if varies else gap_s
        chain = list(random.choices(roots, weights)[0])
        tenant = f"tenant-{random.randrange(shape.num_tenants)}"
        now_s, length, median = begun_s, len(chain) * BLOCK, shape.first
        while True:
            more = max(1, int(median * random.lognormvariate(0.0, shape.spread)))
            length = min(length + more, shape.max_prompt)
            num_new = -(-length // BLOCK) - len(chain)
            chain += range(next_id, next_id + num_new)
            next_id += num_new
            output = max(1, int(shape.output * random.lognormvariate(0.0, shape.output_spread)))
            calls.append(Call(now_s * 1000, length, output, tuple(chain), tenant))
            if length == shape.max_prompt or random.random() < 1 / shape.num_turns:
                break
            del chain[length // BLOCK :]  # what was not full goes on with other content
            length += output
            median = shape.turn
            now_s += random.expovariate(1 / shape.think_s)
    return sorted(calls, key=lambda call: call.timestamp_ms)[:num]


# ------------------------------------------------------------------------------------------------------------- changing


def faster(calls: Iterable[Call], factor: float) -> list[Call]:
    """The same requests at `factor` times the rate."""
    return [replace(call, timestamp_ms=call.timestamp_ms / factor) for call in calls]


def lines(calls: Iterable[Call]) -> Iterator[str]:
    """The calls in Mooncake's format."""
    for call in calls:
        yield orjson.dumps(
            {
                "timestamp": call.timestamp_ms,
                "input_length": call.input_length,
                "output_length": call.output_length,
                "hash_ids": call.hash_ids,
                "tenant": call.tenant,
                "band": int(call.band),
            }
        ).decode()
