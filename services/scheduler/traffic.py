"""What became of the requests: lengths of answers for the predictor and, where the operator asks for it, on disk.

`Traffic` joins each request with its end. `Records` keeps one line per answer (`LengthRecord`: lengths, and hashes of
tokens; no text, no token ids, no tenant) in files under `<home>/traffic/<model>/`, the newest that fit in a budget.
Hashes of 13 bits hide little from somebody who guesses, so the files are their owner's alone. It is off unless
`DEEPFLOW_RECORD=lengths`. This module must not know how lengths are learned.
"""

from __future__ import annotations

import contextlib
import os
import zlib
from collections import Counter, OrderedDict, deque
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

from services.scheduler.lengths import Features, Lengths
from shared import wire
from shared.job_messages import LengthRecord
from shared.length_table import bucket_of
from shared.messages import Request, TaskEnded
from shared.subjects import encode

_MAX_OPEN: Final = 16_384  # requests whose end may still come; the oldest are given up
_MAX_BUFFERED: Final = 8192  # lines between two writes; the oldest are given up
_FILE_BYTES: Final = 4 << 20
_SUFFIX: Final = ".jsonl"
_ENDS: Final = ("stop", "length")  # an answer that came to its own end


class Records:
    """The files of one JE, which other JEs may have beside it in the same folder. All methods block."""

    def __init__(self, folder: Path, je: str, *, max_bytes: int) -> None:
        self._folder = folder
        self._je = je
        self._max_bytes = max_bytes
        self._number = 0
        self._files: dict[str, Path] = {}  # that this JE writes to, by model

    def write(self, lines: list[tuple[str, bytes]]) -> None:
        """Append (model, line) pairs, then remove the oldest files of all models past the budget. Raises OSError."""
        by_model: dict[str, list[bytes]] = {}
        for model, line in lines:
            by_model.setdefault(model, []).append(line + b"\n")
        for model, texts in by_model.items():
            path = self._file(model)
            # Others on this machine have no business with it.
            number = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            with os.fdopen(number, "ab") as file:
                file.writelines(texts)
        self._prune()

    def _file(self, model: str) -> Path:
        path = self._files.get(model)
        if path is None or not path.exists() or path.stat().st_size >= _FILE_BYTES:
            folder = self._folder / encode(model)
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            folder.mkdir(mode=0o700, exist_ok=True)
            self._number += 1
            path = self._files[model] = folder / f"{self._je}-{self._number}{_SUFFIX}"
        return path

    def _prune(self) -> None:
        left = self._max_bytes
        for path, num_bytes in _newest_first(self._folder.glob(f"*/*{_SUFFIX}")):
            left -= num_bytes
            if left < 0:
                path.unlink(missing_ok=True)

    def latest(self, model: str, max_bytes: int) -> bytes:
        """The newest lines about `model`, of all JEs, oldest first, deflated to at most `max_bytes`. Raises OSError."""
        parts: list[bytes] = []
        room = max_bytes * 8  # more than hashes can be deflated
        for path, _ in _newest_first((self._folder / encode(model)).glob(f"*{_SUFFIX}")):
            with contextlib.suppress(FileNotFoundError):  # another JE has pruned it
                text = path.read_bytes()
                parts.append(text[: text.rfind(b"\n") + 1])  # a line may be half written
                room -= len(text)
            if room <= 0:
                break
        lines = b"".join(reversed(parts)).splitlines(keepends=True)
        while len(data := zlib.compress(b"".join(lines), 6)) > max_bytes:
            lines = lines[len(lines) // 4 + 1 :]
        return data


def _newest_first(paths: Iterator[Path]) -> list[tuple[Path, int]]:
    found = []
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            stat = path.stat()
            found.append((stat.st_mtime_ns, path, stat.st_size))
    return [(path, num_bytes) for _, path, num_bytes in sorted(found, reverse=True)]


class _Open(NamedTuple):
    """A request whose end is awaited, in its newest attempt; `expected` tokens of one choice in all."""

    attempt: int
    features: Features
    num_choices: int
    expected: int


class Traffic:
    """The answers that one JE waits for. `records` false: they serve the running quartiles alone."""

    def __init__(self, lengths: Lengths, *, records: bool) -> None:
        self._lengths = lengths
        self._records = records
        self._open: OrderedDict[str, _Open] = OrderedDict()
        self._lines: deque[tuple[str, bytes]] = deque(maxlen=_MAX_BUFFERED)
        self.num_recorded: Counter[str] = Counter()  # by model, since this JE started

    def __len__(self) -> int:
        return len(self._open)

    def asked(self, request: Request) -> None:
        """A request, or another attempt of it, was given to a TE."""
        if request.kind == "cache":
            return
        delivered = max((len(ids) for ids in request.output), default=0)
        self._open[request.request] = _Open(
            request.attempt,
            Features.of(request, numbered=self._records),
            request.sampling.n,
            delivered + self._lengths.predict(request).mid,
        )
        self._open.move_to_end(request.request)
        if len(self._open) > _MAX_OPEN:
            self._open.popitem(last=False)

    def ended(self, ended: TaskEnded) -> int | None:
        """A TE is done with a task: by how many buckets the prediction was off. None if that says nothing: somebody
        cut the answer off, or it goes on elsewhere."""
        known = self._open.get(ended.request)
        if known is None or known.attempt != ended.attempt or ended.finish == "handed":
            return None
        del self._open[ended.request]
        if ended.finish not in _ENDS:
            return None
        features = known.features
        output_tokens = round(ended.output_tokens / known.num_choices)
        self._lengths.observe(features, output_tokens)
        if self._records:
            record = LengthRecord(
                kind=features.kind,
                prompt_tokens=features.num_prompt,
                max_tokens=features.max_tokens,
                output_tokens=output_tokens,
                features=features.numbers.tolist(),
            )
            self._lines.append((features.model, wire.to_json(record)))
            self.num_recorded[features.model] += 1
        return abs(bucket_of(output_tokens) - bucket_of(known.expected))

    def take_lines(self) -> list[tuple[str, bytes]]:
        """The lines to be written, oldest first: (model, line)."""
        lines = list(self._lines)
        self._lines.clear()
        return lines
