"""Which TE type suits a request: the heatmap of the paper's section 5.3, and the heatmaps of all models.

A cell says what a request of one shape gains by being prefilled on one TE and decoded on another, against being served
in one place by the same hardware: `JCT_colocated / JCT_disaggregated - 1`, measured at several request rates. The sum
over the rates decides: above 0, split. `deepflow heatmap` measures them; without a measurement the analytic one of
this module stands in. Pure, but for `Heatmaps.load`; this module must not know TEs or requests.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Self

import orjson

from shared.errors import InvalidRequest
from shared.subjects import encode

VERSION: Final = 1
_FORMAT: Final = "deepflow-heatmap"
_MAX_BYTES: Final = 4 * 1024 * 1024

# The shapes of the analytic heatmap; its rates as shares of what two colocated TEs can take of one shape, that of the
# trace which the paper speaks of; and the requests of a run, which ends even where more come than are served.
_PREFILL_LENS: Final = tuple(1 << power for power in range(7, 18))
_RATIOS: Final = tuple(2.0**power for power in range(-9, 4))
_LOADS: Final = (0.2, 0.4, 0.6)
_SHAPE: Final = (2048, 200)
_RUN: Final = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Heatmap:
    """H by request rate, prefill length and ratio of decode to prefill length; all three axes ascend."""

    prefill_lens: tuple[int, ...]  # tokens
    ratios: tuple[float, ...]  # decode tokens per prefill token
    rates: tuple[float, ...]  # requests per second, or another measure of load
    values: tuple[tuple[tuple[float, ...], ...], ...]  # [rate][prefill length][ratio]
    source: str  # engine | simulator | analytic
    _sums: tuple[tuple[float, ...], ...] = field(init=False, repr=False, compare=False)
    _log_lens: tuple[float, ...] = field(init=False, repr=False, compare=False)
    _log_ratios: tuple[float, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Raises InvalidRequest naming the field that is not as it must be."""
        for name in ("prefill_lens", "ratios", "rates"):
            _check_axis(name, getattr(self, name))
        shape = (len(self.rates), len(self.prefill_lens), len(self.ratios))
        if not _is_grid(self.values, shape):
            raise InvalidRequest(
                f"values: not {' x '.join(map(str, shape))} finite numbers above -1", param="values"
            )
        sums = tuple(
            tuple(map(sum, zip(*rows, strict=True))) for rows in zip(*self.values, strict=True)
        )
        object.__setattr__(self, "_sums", sums)
        object.__setattr__(self, "_log_lens", tuple(map(math.log2, self.prefill_lens)))
        object.__setattr__(self, "_log_ratios", tuple(map(math.log2, self.ratios)))

    def value(self, prefill_len: int, decode_len: int) -> float:
        """The sum over the rates for a request of this shape, in tokens; above 0: split.

        Bilinear between cells on logarithmic axes; beyond the edge, the edge.
        """
        prefill_len, decode_len = max(prefill_len, 1), max(decode_len, 1)
        row, down = _place(self._log_lens, math.log2(prefill_len))
        column, right = _place(self._log_ratios, math.log2(decode_len / prefill_len))
        upper = _between(self._sums[row], column, right)
        if down == 0.0:
            return upper
        return upper + down * (_between(self._sums[row + 1], column, right) - upper)

    @property
    def sums(self) -> tuple[tuple[float, ...], ...]:
        """The element-wise sum over the rates: [prefill length][ratio]."""
        return self._sums

    @property
    def stability(self) -> float:
        """The share of cells with one sign at every rate (the paper: more than 0.8)."""
        cells: list[tuple[float, ...]] = [
            cell for rows in zip(*self.values, strict=True) for cell in zip(*rows, strict=True)
        ]
        return sum(min(cell) > 0 or max(cell) <= 0 for cell in cells) / len(cells)

    # -------------------------------------------------------------------------------------------------- as a file

    def to_json(self, **more: Any) -> bytes:
        """The heatmap as its file holds it. `more` is told beside it and not read back."""
        body = {
            "format": _FORMAT,
            "version": VERSION,
            "source": self.source,
            "prefill_lens": self.prefill_lens,
            "ratios": self.ratios,
            "rates": self.rates,
            "values": self.values,
            **more,
        }
        return orjson.dumps(body, option=orjson.OPT_INDENT_2) + b"\n"

    @classmethod
    def from_json(cls, raw: bytes) -> Self:
        """What `to_json` wrote. Raises InvalidRequest naming the field at fault."""
        try:
            body = orjson.loads(raw)
        except orjson.JSONDecodeError as error:
            raise InvalidRequest(f"a heatmap is JSON: {error}") from error
        if not isinstance(body, dict) or body.get("format") != _FORMAT:
            raise InvalidRequest(f'format: a heatmap says "{_FORMAT}"', param="format")
        if body.get("version") != VERSION:
            raise InvalidRequest(
                f"version: {body.get('version')!r} is not {VERSION}, make it again by `deepflow heatmap`",
                param="version",
            )
        if not isinstance(body.get("source"), str):
            raise InvalidRequest("source: not a text", param="source")
        return cls(
            prefill_lens=_tuple(body, "prefill_lens"),
            ratios=_tuple(body, "ratios"),
            rates=_tuple(body, "rates"),
            values=_nested(body.get("values")),
            source=body["source"],
        )

    # --------------------------------------------------------------------------------------------------- analytic

    @classmethod
    def analytic(cls, *, step_tokens: float = 100.0, sequence_tokens: float = 0.5) -> Self:
        """The heatmap of an engine of which only this is known: a decode step takes as long as computing
        `step_tokens` tokens of a prompt, and `sequence_tokens` more per sequence in it."""
        engine = _Engine(step_tokens, sequence_tokens)
        rates = tuple(load * engine.rate(*_SHAPE) for load in _LOADS)
        values = tuple(
            tuple(
                tuple(engine.gain(length, ratio * length, rate) for ratio in _RATIOS)
                for length in _PREFILL_LENS
            )
            for rate in rates
        )
        return cls(
            prefill_lens=_PREFILL_LENS,
            ratios=_RATIOS,
            rates=rates,
            values=values,
            source="analytic",
        )


class Heatmaps:
    """The heatmap of each model: measured where its file is there, the default otherwise."""

    def __init__(self, default: Heatmap | None = None) -> None:
        self._default = default or Heatmap.analytic()
        self._measured: dict[str, Heatmap] = {}  # by encoded model
        self._seen: dict[Path, tuple[int, int]] = {}  # mtime and size of each file as last read

    def of(self, model: str) -> Heatmap:
        """The heatmap that decides for `model`."""
        return self._measured.get(encode(model), self._default)

    def put(self, model: str, heatmap: Heatmap) -> None:
        """`heatmap` decides for `model` from now on."""
        self._measured[encode(model)] = heatmap

    def load(self, folder: Path) -> list[InvalidRequest]:
        """Reads the files `<encoded model>.json` of `folder` that changed since the last call, forgets those that went.

        Returns what is wrong with those that cannot be read; for them the heatmap before stands.
        """
        wrong = []
        found = {}
        for path in sorted(folder.glob("*.json")):
            try:
                stat = path.stat()
                found[path] = (stat.st_mtime_ns, stat.st_size)
                if self._seen.get(path) == found[path]:
                    continue
                if stat.st_size > _MAX_BYTES:
                    raise InvalidRequest(f"larger than {_MAX_BYTES} bytes")
                self._measured[path.stem] = Heatmap.from_json(path.read_bytes())
            except OSError as error:
                wrong.append(InvalidRequest(f"{path}: {error.strerror}"))
            except InvalidRequest as error:
                wrong.append(InvalidRequest(f"{path}: {error.message}", param=error.param))
        for path in self._seen.keys() - found.keys():
            self._measured.pop(path.stem, None)
        self._seen = found
        return wrong


# ------------------------------------------------------------------------------------------------------ the arithmetic


@dataclass(frozen=True, slots=True)
class _Engine:
    """Two TEs as two queues, in the time that one token of a short prompt takes. Both set-ups are the same two TEs.

    Colocated, each takes every other request: prompts come in chunks between decode steps, so that a sequence's decode
    is stretched by the share of time its TE prefills, and a prompt by the steps between its chunks. Disaggregated, one
    TE has all prompts (twice the load) and the other all decodes, whose batch is twice as large.
    """

    step: float
    sequence: float
    chunk: float = 512.0  # tokens of a prompt in a step
    prompt_attention: float = 32_768.0  # tokens: a prompt so long costs half as much again
    decode_attention: float = 4_096.0  # tokens: a sequence so long costs a step twice as much
    transfer: float = 0.05  # of the KV of a token
    handover: float = 32.0  # of any hand-over

    def gain(self, prefill_len: float, decode_len: float, rate: float) -> float:
        """H of a run of requests of this shape at so many per unit of time, for the two TEs."""
        prompt, sequence = self._costs(prefill_len, decode_len)
        half = _RUN // 2
        colocated = self._decode(prompt, decode_len, sequence, rate / 2.0, half)
        decoding = min(half, rate / 2.0 * colocated)
        step = min(1.0, decoding) * self.step + decoding * sequence  # between two chunks
        colocated += _queue(prompt * (1.0 + step / self.chunk), rate / 2.0, half)
        colocated += _backlog(self._work(prompt, decode_len, sequence, half), rate / 2.0, half)

        split = self._decode(0.0, decode_len, sequence, rate, _RUN) + _queue(prompt, rate, _RUN)
        slower = max(prompt, self._work(0.0, decode_len, sequence, _RUN))
        split += _backlog(slower, rate, _RUN) + self.handover + prefill_len * self.transfer
        return colocated / split - 1.0

    def rate(self, prefill_len: float, decode_len: float) -> float:
        """Requests of this shape per unit of time that keep two colocated TEs busy."""
        prompt, sequence = self._costs(prefill_len, decode_len)
        return 2.0 / self._work(prompt, decode_len, sequence, _RUN // 2)

    def _costs(self, prefill_len: float, decode_len: float) -> tuple[float, float]:
        """Of the prompt, and of a sequence in a step."""
        prompt = prefill_len * (1.0 + prefill_len / self.prompt_attention / 2.0)
        context = prefill_len + decode_len / 2.0
        return prompt, self.sequence * (1.0 + context / self.decode_attention)

    def _work(self, prompt: float, decode_len: float, sequence: float, batch: int) -> float:
        """Of a request on a TE that always decodes `batch` of them at once."""
        return prompt + decode_len * (sequence + self.step / batch)

    def _decode(
        self, prompt: float, decode_len: float, sequence: float, rate: float, batch: int
    ) -> float:
        """From the first token to the last, on a TE that gets `rate` of them with a prompt of `prompt` each and decodes
        at most `batch` at once."""
        full = batch * self._work(prompt, decode_len, sequence, batch)
        left = 1.0 - rate * (prompt + decode_len * sequence)
        return min(decode_len * self.step / left, full) if left > 0.0 else full


def _queue(service: float, rate: float, run: int) -> float:
    """Mean time in an M/D/1 queue of a run: where it would be full for ever, `_backlog` says the rest."""
    use = min(rate * service, 1.0 - 1.0 / math.sqrt(run))
    return service * (1.0 + use / (2.0 * (1.0 - use)))


def _backlog(service: float, rate: float, run: int) -> float:
    """What a request of a run waits on average where they come faster than they are served."""
    return max(0.0, service - 1.0 / rate) * run / 2.0


def _place(axis: Sequence[float], at: float) -> tuple[int, float]:
    """The cell of `axis` at or before `at`, and how far on to the next one, in [0, 1)."""
    cell = bisect_right(axis, at) - 1
    if cell < 0:
        return 0, 0.0
    if cell >= len(axis) - 1:
        return len(axis) - 1, 0.0
    return cell, (at - axis[cell]) / (axis[cell + 1] - axis[cell])


def _between(row: Sequence[float], cell: int, on: float) -> float:
    return row[cell] if on == 0.0 else row[cell] + on * (row[cell + 1] - row[cell])


# ------------------------------------------------------------------------------------------------------------ checking


def _check_axis(name: str, axis: Sequence[Any]) -> None:
    numbers = bool(axis) and all(_is_number(value) and value > 0 for value in axis)
    if not numbers or any(a >= b for a, b in itertools.pairwise(axis)):
        raise InvalidRequest(f"{name}: not ascending numbers above 0", param=name)


def _is_grid(values: Any, shape: Sequence[int]) -> bool:
    if not shape:
        return _is_number(values) and values > -1.0
    return (
        isinstance(values, tuple)
        and len(values) == shape[0]
        and all(_is_grid(value, shape[1:]) for value in values)
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _tuple(body: dict[str, Any], name: str) -> tuple[Any, ...]:
    if not isinstance(body.get(name), list):
        raise InvalidRequest(f"{name}: not a list", param=name)
    return tuple(body[name])


def _nested(value: Any) -> Any:
    return tuple(map(_nested, value)) if isinstance(value, list) else value
