"""How long an engine's steps take: what the simulator knows of a TE's hardware and model.

A step computes rows: one for each sequence that decodes, one for each token of a prompt's chunk. Its time is that of
the layers, which depends on the number of rows alone, that of the tokens it samples, and that of attention,
proportional to the positions its rows look back on. `calibration` takes them from measurements. Pure; it must not know
clocks or engines.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from itertools import pairwise
from typing import Any, Final, Self

import orjson

from shared.errors import InvalidRequest

_FORMAT: Final = "deepflow-profile"
VERSION: Final = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """One TE. All times are seconds, all lengths tokens.

    `rows` is the time of the layers by the number of rows, without attention, ascending in both; between two of them
    it is linear, beyond the last it goes on as between the last two.
    """

    name: str
    rows: tuple[tuple[int, float], ...]
    token_s: (
        float  # of a token that is sampled: of each row that decodes, of the last one of a prompt
    )
    prefill_pair_s: float  # attention of a row of a prompt, per position it looks back on
    decode_pair_s: float  # of a row that decodes
    max_batched_tokens: int  # rows of a step at most
    max_num_seqs: int  # sequences that run at a time
    kv_tokens: int  # positions that fit
    page: int = 16
    answer_s: float = 0.001  # from a request at the gateway to the engine that takes it, idle
    transfer_s: float = 0.0  # of a hand-over, per position
    handover_s: float = 0.003  # of any hand-over: messages, and the choice of a TE

    def __post_init__(self) -> None:
        """Raises InvalidRequest naming the field that is not as it must be."""
        self._check("rows", len(self.rows) > 0 and all(len(row) == 2 for row in self.rows))
        self._check("rows", self.rows[0][0] > 0 and all(_is_time(row[1]) for row in self.rows))
        self._check("rows", all(a[0] < b[0] and a[1] <= b[1] for a, b in pairwise(self.rows)))
        for name in (
            "token_s",
            "prefill_pair_s",
            "decode_pair_s",
            "answer_s",
            "transfer_s",
            "handover_s",
        ):
            self._check(name, _is_time(getattr(self, name)))
        for name in ("max_batched_tokens", "max_num_seqs", "kv_tokens", "page"):
            self._check(name, isinstance(getattr(self, name), int) and getattr(self, name) > 0)
        self._check("max_num_seqs", self.max_num_seqs <= self.max_batched_tokens)

    # ------------------------------------------------------------------------------------------------------- a step

    def step_s(
        self,
        *,
        num_decodes: int = 0,
        decode_context: int = 0,
        num_prefill: int = 0,
        prefill_pairs: float = 0.0,
        num_first: int = 0,
    ) -> float:
        """A step of `num_decodes` sequences of `decode_context` positions in all, and `num_prefill` tokens of prompts
        that look back on `prefill_pairs` positions in all (`pairs`), `num_first` of which are complete with it; 0 for
        an empty one."""
        num_rows = num_decodes + num_prefill
        if not num_rows:
            return 0.0
        attention = self.decode_pair_s * decode_context + self.prefill_pair_s * prefill_pairs
        return self.rows_s(num_rows) + self.token_s * (num_decodes + num_first) + attention

    def rows_s(self, num_rows: int) -> float:
        """Of the layers in a step, without attention."""
        at = bisect_left(self.rows, (num_rows, 0.0))
        if at < len(self.rows) and self.rows[at][0] == num_rows:
            return self.rows[at][1]
        if at == 0 or len(self.rows) == 1:
            return self.rows[0][1] if at == 0 else self.rows[0][1] * num_rows / self.rows[0][0]
        (low, low_s), (high, high_s) = self.rows[min(at, len(self.rows) - 1) - 1 :][:2]
        return low_s + (high_s - low_s) * (num_rows - low) / (high - low)

    # ------------------------------------------------------------------------------------------------- many steps

    def decode_s(self, num_decodes: int, context: int, num_steps: int) -> float:
        """`num_steps` steps in which nothing but `num_decodes` sequences decodes, `context` positions in all before
        the first of them."""
        if not num_decodes or not num_steps:
            return 0.0
        grown = num_decodes * num_steps * (num_steps - 1) / 2
        step = self.rows_s(num_decodes) + self.token_s * num_decodes
        return num_steps * step + self.decode_pair_s * (context * num_steps + grown)

    def num_decode_steps(self, num_decodes: int, context: int, seconds: float) -> int:
        """The whole steps of such a run that end within `seconds`: the inverse of `decode_s`."""
        first = self.decode_s(num_decodes, context, 1)
        if seconds < first or first <= 0.0:
            return 0
        grows = self.decode_pair_s * num_decodes / 2
        flat = first - grows
        num_steps = int(2 * seconds / (flat + math.sqrt(flat * flat + 4 * grows * seconds)))
        # The root is exact but for rounding.
        while self.decode_s(num_decodes, context, num_steps + 1) <= seconds:
            num_steps += 1
        while self.decode_s(num_decodes, context, num_steps) > seconds:
            num_steps -= 1
        return num_steps

    def prefill_s(self, num_tokens: int, cached: int = 0) -> float:
        """A prompt of `num_tokens` alone, of which `cached` are there already, up to its first token."""
        left = max(num_tokens - cached, 1)
        num_whole, rest = divmod(left, self.max_batched_tokens)
        seconds = num_whole * self.rows_s(self.max_batched_tokens)
        if rest:
            seconds += self.rows_s(rest)
        return seconds + self.token_s + self.prefill_pair_s * pairs(num_tokens - left, left)

    def handover_time_s(self, num_tokens: int) -> float:
        """From the first token at the TE that prefilled until the other one has the KV of `num_tokens`."""
        return self.handover_s + self.transfer_s * num_tokens

    @property
    def prefill_tps(self) -> float:
        """Tokens of short prompts that are computed per second where nothing decodes."""
        return self.max_batched_tokens / self.rows_s(self.max_batched_tokens)

    # ---------------------------------------------------------------------------------------------------- as a file

    def to_json(self) -> bytes:
        """The profile as its file holds it."""
        body = {"format": _FORMAT, "version": VERSION, **asdict(self)}
        return orjson.dumps(body, option=orjson.OPT_INDENT_2) + b"\n"

    @classmethod
    def from_json(cls, raw: bytes) -> Self:
        """What `to_json` wrote. Raises InvalidRequest naming the field at fault."""
        try:
            body = orjson.loads(raw)
        except orjson.JSONDecodeError as error:
            raise InvalidRequest(f"a profile is JSON: {error}") from error
        if not isinstance(body, dict) or body.get("format") != _FORMAT:
            raise InvalidRequest(f'format: a profile says "{_FORMAT}"', param="format")
        if body.get("version") != VERSION:
            raise InvalidRequest(
                f"version: {body.get('version')!r} is not {VERSION}", param="version"
            )
        return cls(**_known(cls, body))

    def with_(self, **changes: Any) -> Self:
        """The same TE but for these fields."""
        return replace(self, **changes)

    def _check(self, name: str, holds: bool) -> None:
        if not holds:
            raise InvalidRequest(f"{name}: {getattr(self, name)!r} cannot be", param=name)


def pairs(start: int, length: int) -> float:
    """Positions that `length` rows from position `start` on look back on, each on itself and all before it."""
    return length * start + length * (length + 1) / 2


def _is_time(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value) and value >= 0.0


def _known(cls: type[Profile], body: Mapping[str, Any]) -> dict[str, Any]:
    """The fields among `body`'s; what is unknown is ignored, what lacks a default must be there."""
    names = {field.name for field in fields(cls)}
    found = {name: value for name, value in body.items() if name in names}
    try:
        found["rows"] = tuple((int(rows), float(seconds)) for rows, seconds in body["rows"])
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidRequest("rows: not pairs of rows and seconds", param="rows") from error
    required = (
        "name",
        "token_s",
        "prefill_pair_s",
        "decode_pair_s",
        "max_batched_tokens",
        "max_num_seqs",
        "kv_tokens",
    )
    for name in required:
        if name not in found:
            raise InvalidRequest(f"{name}: missing", param=name)
    return found


# ------------------------------------------------------------------------------------------------------------- presets

# SmolLM2-135M in W8A8 by the native kernels, AVX-512 VNNI, by `calibration.measure`: on two cores, and on one.
SMOLLM2_CPU: Final = Profile(
    name="smollm2-cpu",
    rows=(
        (1, 0.0047),
        (2, 0.0054),
        (4, 0.0060),
        (8, 0.0072),
        (16, 0.0112),
        (32, 0.0168),
        (64, 0.0278),
        (128, 0.0538),
        (256, 0.1048),
    ),
    token_s=2.25e-4,
    prefill_pair_s=2.54e-7,
    decode_pair_s=1.35e-6,
    max_batched_tokens=256,
    max_num_seqs=64,
    kv_tokens=46_592,
    transfer_s=4.0e-6,
)
SMOLLM2_CORE: Final = Profile(
    name="smollm2-core",
    rows=(
        (1, 0.0063),
        (2, 0.0069),
        (4, 0.0092),
        (8, 0.0110),
        (16, 0.0164),
        (32, 0.0274),
        (64, 0.0499),
        (128, 0.0955),
        (256, 0.1743),
    ),
    token_s=2.63e-4,
    prefill_pair_s=5.37e-7,
    decode_pair_s=2.46e-6,
    max_batched_tokens=256,
    max_num_seqs=64,
    kv_tokens=46_592,
    transfer_s=4.0e-6,
)

# A dense 34B model over four NPUs of 64 GB (TP 4), the paper's size. Nobody published such a profile: it follows from
# 17 GB of weights per NPU read at 1.1 TB/s, 60 layers' all-reduces, half of 4 x 320 TFLOPS in prefill, KV of 245 kB a
# token (60 layers, 8 KV heads of 128, 16 bits) read at 4 x 1.1 TB/s and sent at 4 x 12 GB/s.
NPU_34B_TP4: Final = Profile(
    name="34b-tp4-npu",
    rows=((1, 0.021), (32, 0.023), (128, 0.029), (256, 0.038), (512, 0.064), (2048, 0.235)),
    token_s=1.0e-5,
    prefill_pair_s=2.7e-9,
    decode_pair_s=5.6e-8,
    max_batched_tokens=512,
    max_num_seqs=256,
    kv_tokens=640_000,
    page=128,
    transfer_s=5.1e-6,
)

PRESETS: Final = {profile.name: profile for profile in (SMOLLM2_CPU, SMOLLM2_CORE, NPU_34B_TP4)}
