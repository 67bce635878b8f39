"""How long an answer will be (the paper, section 5.4): a range for placement, from what is known before it starts.

In this order: what the request itself settles (`ignore_eos`); the model's trained table, which sees the prompt;
quartiles of the latest answers to the same tenant on the same endpoint; those of the model as a whole; a prior. The
range's low end is what admission counts on, its midpoint what the heatmap is asked with. Pure; this module must not
know who trains tables or where they are kept.
"""

from __future__ import annotations

from array import array
from bisect import insort
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final
from zlib import crc32

from services.scheduler.work import Length
from shared.job_messages import PredictorEntry
from shared.length_table import BIAS, BUCKET_TOKENS, NUM_FEATURES, LengthTable
from shared.messages import Request

PRIOR: Final = Length(low=BUCKET_TOKENS, mid=2 * BUCKET_TOKENS)
# The parts of a prompt that a table looks at: how a conversation begins, and what was asked last.
_HEAD: Final = 32
_TAIL: Final = 128
_PAIRS: Final = 64
_WINDOW: Final = 64  # latest answers that quartiles are taken of
_MIN_SEEN: Final = 8  # so few say nothing about a tenant
_MAX_KNOWN: Final = 4096  # latest requests whose bucket is kept: each is asked for several times
_MAX_KEYS: Final = 4096  # pairs of tenant and endpoint that are remembered, the latest
_EVERYBODY: Final = "\n"  # no tenant has this name
_SHIFT: Final = 32 - (NUM_FEATURES.bit_length() - 1)
_MASK: Final = 0xFFFFFFFF
_FIRST: Final = 0x9E3779B1  # odd, and far from any pattern in token ids
_SECOND: Final = 0x85EBCA6B


@dataclass(frozen=True, slots=True)
class Features:
    """What a request says about the length of its answers, without its text.

    `numbers` are the table's: a set of hashes of single tokens and of pairs, of tenant and endpoint, and of the orders
    of magnitude of the prompt's length and of `max_tokens`.
    """

    model: str
    tenant: str
    kind: str
    num_prompt: int
    max_tokens: int
    numbers: array[int]

    @classmethod
    def of(cls, request: Request, *, numbered: bool = True) -> Features:
        """Takes 0.05 ms whatever the prompt's length, and next to nothing without the `numbers`."""
        return cls(
            request.model,
            request.tenant,
            request.kind,
            len(request.prompt),
            request.sampling.max_tokens,
            array("H", _numbers(request) if numbered else ()),
        )


def _numbers(request: Request) -> list[int]:
    prompt, kind = request.prompt, request.kind
    head = prompt[:_HEAD]
    tail = prompt[max(len(prompt) - _TAIL, len(head)) :]
    last = prompt[-_PAIRS:]
    numbers = {((token * _FIRST) & _MASK) >> _SHIFT for token in set(head).union(tail)}
    numbers.update(
        ((one * _FIRST ^ other * _SECOND) & _MASK) >> _SHIFT for one, other in pairwise(last)
    )
    words = (
        f"tenant {request.tenant} {kind}",
        f"prompt {_magnitude(len(prompt))} {kind}",
        f"max {_magnitude(request.sampling.max_tokens)} {kind}",
    )
    numbers.update(crc32(word.encode()) >> _SHIFT for word in words)
    numbers.add(BIAS)
    return sorted(numbers)


def _magnitude(number: int) -> int:
    """Twice the binary logarithm, rounded down."""
    bits = number.bit_length()
    return 2 * bits + (number >> max(bits - 2, 0) & 1)


class Quartiles:
    """The first quartile and the median of the latest lengths."""

    def __init__(self) -> None:
        self._latest: deque[int] = deque()
        self._sorted: list[int] = []

    def __len__(self) -> int:
        return len(self._latest)

    def add(self, num_tokens: int) -> None:
        """One more length; past the window the oldest is forgotten."""
        self._latest.append(num_tokens)
        insort(self._sorted, num_tokens)
        if len(self._latest) > _WINDOW:
            self._sorted.remove(self._latest.popleft())

    def length(self) -> Length:
        """Of at least one length."""
        num = len(self._sorted)
        return Length(low=self._sorted[num // 4], mid=self._sorted[num // 2])


class Lengths:
    """The predictions of one JE, for all models."""

    def __init__(self) -> None:
        self._tables: dict[str, tuple[int, LengthTable]] = {}
        self._buckets: dict[str, int] = {}  # by request, oldest first
        self._seen: OrderedDict[tuple[str, str, str], Quartiles] = OrderedDict()

    def predict(self, request: Request) -> Length:
        """What one choice of `request` will still bring, at least one token, `low` no more than `mid`.

        Answers within a millisecond, whatever the prompt's length.
        """
        delivered = max((len(ids) for ids in request.output), default=0)
        sampling = request.sampling
        left = max(sampling.max_tokens - delivered, 1)
        if sampling.ignore_eos and not sampling.stop_token_ids:
            return Length(low=left, mid=left)
        whole = self._whole(request)
        low, mid = (max(n, sampling.min_tokens) for n in (whole.low, whole.mid))
        rest = Length(low=low, mid=mid).after(delivered)
        return Length(low=min(rest.low, left), mid=min(rest.mid, left))

    def _whole(self, request: Request) -> Length:
        known = self._tables.get(request.model)
        if known is not None:
            low = self._bucket(request, known[1]) * BUCKET_TOKENS
            return Length(low=low + 1, mid=low + BUCKET_TOKENS // 2)
        for tenant in (request.tenant, _EVERYBODY):
            seen = self._seen.get((request.model, tenant, request.kind))
            if seen is not None and len(seen) >= _MIN_SEEN:
                return seen.length()
        return PRIOR

    def _bucket(self, request: Request, table: LengthTable) -> int:
        bucket = self._buckets.get(request.request)
        if bucket is None:
            bucket = self._buckets[request.request] = table.bucket(_numbers(request))
            if len(self._buckets) > _MAX_KNOWN:
                del self._buckets[next(iter(self._buckets))]
        return bucket

    def observe(self, features: Features, output_tokens: int) -> None:
        """An answer (one choice) has come to its own end after `output_tokens`, those of older attempts included."""
        for tenant in (features.tenant, _EVERYBODY):
            key = (features.model, tenant, features.kind)
            self._seen.setdefault(key, Quartiles()).add(output_tokens)
            self._seen.move_to_end(key)
        while len(self._seen) > _MAX_KEYS:
            self._seen.popitem(last=False)

    def load(self, entry: PredictorEntry) -> bool:
        """Predict with this table from now on; False if it is the one in use. Raises InvalidRequest if it is none."""
        known = self._tables.get(entry.model)
        if known is not None and known[0] == entry.created:
            return False
        self._tables[entry.model] = (entry.created, LengthTable.from_bytes(entry.table))
        self._buckets.clear()
        return True

    def keep_only(self, models: Sequence[str]) -> None:
        """Forget the tables of all other models: they were removed."""
        for model in self._tables.keys() - set(models):
            del self._tables[model]

    def created(self, model: str) -> int | None:
        """When the table in use for `model` was made, seconds since the epoch."""
        known = self._tables.get(model)
        return None if known is None else known[0]
