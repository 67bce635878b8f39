"""What this machine can do at most: how fast it reads memory, and how fast it multiplies matrices.

The limits are taken in the same run as the figures they are compared with, in a process of their own, because torch is
needed for them and not for the engine. Never at the same time as anything else. This module must not know what is
compared with them.

Every limit is that of the best pass. Bandwidth is the read-only sum of a large buffer of 64-bit words. That memory
limits it and not the additions is shown by the same sum over a buffer that fits the caches of the cores, which has to
be a good deal faster.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from deepflow.bench.child import Child, conversation
from services.worker.settings import compute_env

if TYPE_CHECKING:
    import torch

MIN_BUFFER_BYTES: Final = 128 << 20  # larger than the last cache of any machine this runs on
_CACHED_BYTES: Final = 512 << 10  # per thread: fits a second-level cache
_WORD_BYTES: Final = 8
_MIN_PASSES: Final = 3
_MAX_PASSES: Final = 20
_BUDGET_S: Final = 0.6  # of one measurement
_SHAPES: Final = (
    (1024, 1024, 1024),
    (1024, 2048, 1024),
    (2048, 2048, 2048),
)  # rows, inner, columns
_MIN_S: Final = (
    0.02  # what is shorter is repeated, so that the clock and the start of threads do not count
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Bytes read and operations done per second, with so many threads; a multiplication and its addition are two.

    `gemm_bf16` is 0 where nobody asked for it.
    """

    threads: int
    buffer_bytes: int
    read_bytes_per_s: float
    read_cached_bytes_per_s: float
    gemm_int8: float
    gemm_fp32: float
    gemm_bf16: float

    def metrics(self) -> dict[str, float]:
        """As a report names them."""
        figures = {
            "read_bandwidth_gb_s": self.read_bytes_per_s / 1e9,
            "read_bandwidth_cached_gb_s": self.read_cached_bytes_per_s / 1e9,
            "read_cached_ratio": self.read_cached_bytes_per_s / self.read_bytes_per_s,
            "gemm_int8_tops": self.gemm_int8 / 1e12,
            "gemm_fp32_tflops": self.gemm_fp32 / 1e12,
        }
        if self.gemm_bf16:
            figures["gemm_bf16_tflops"] = self.gemm_bf16 / 1e12
        return figures

    def gemm(self, dtype: str) -> float:
        """The peak that a model of this type is held to. Raises KeyError for a type without one."""
        return {"w8a8": self.gemm_int8, "fp32": self.gemm_fp32, "bf16": self.gemm_bf16}[dtype]

    def best(self, other: Limits) -> Limits:
        """The higher of two measurements of each limit: a disturbance only ever makes it look lower."""
        mine, theirs = asdict(self), asdict(other)
        return Limits(**{name: max(mine[name], theirs[name]) for name in mine})


async def measure_limits(*, buffer_bytes: int, threads: int, with_bf16: bool = False) -> Limits:
    """The limits now, with a buffer of at least MIN_BUFFER_BYTES. Raises Unavailable if the child does not answer."""
    question = {
        "buffer_bytes": max(buffer_bytes, MIN_BUFFER_BYTES),
        "threads": threads,
        "with_bf16": with_bf16,
    }
    async with Child.start(
        __name__, "the process that measures limits", compute_env(threads)
    ) as child:
        return Limits(**await child.ask(question))


# ----------------------------------------------------------------------------------------------------- the child's end


def main() -> None:
    """Answer what is asked."""
    with conversation() as (questions, answer):
        for question in questions:
            answer(asdict(measure(**question)))


def measure(*, buffer_bytes: int, threads: int, with_bf16: bool) -> Limits:
    """All limits, one after the other, in this process."""
    import torch

    torch.set_num_threads(threads)
    return Limits(
        threads=threads,
        buffer_bytes=buffer_bytes,
        read_bytes_per_s=_read(buffer_bytes),
        read_cached_bytes_per_s=_read(_CACHED_BYTES * threads),
        gemm_int8=_gemm(torch.int8),
        gemm_fp32=_gemm(torch.float32),
        gemm_bf16=_gemm(torch.bfloat16) if with_bf16 else 0.0,
    )


def _read(num_bytes: int) -> float:
    """Bytes per second of summing a buffer."""
    import torch

    words = torch.ones(num_bytes // _WORD_BYTES, dtype=torch.int64)
    return words.numel() * _WORD_BYTES / _best_s(words.sum)


def _gemm(dtype: torch.dtype) -> float:
    """Operations per second of a matrix product, of the best shape."""
    import torch

    product: Callable[..., Any] = torch._int_mm if dtype == torch.int8 else torch.mm
    peak = 0.0
    for rows, inner, columns in _SHAPES:
        left, right = torch.ones(rows, inner, dtype=dtype), torch.ones(inner, columns, dtype=dtype)
        seconds = _best_s(partial(product, left, right))
        peak = max(peak, 2 * rows * inner * columns / seconds)
    return peak


def _best_s(work: Callable[[], Any]) -> float:
    """What one call takes, in the best of some passes; the first, which touches everything, is left out."""
    began = time.perf_counter()
    work()
    num_calls = max(1, round(_MIN_S / max(time.perf_counter() - began, 1e-7)))
    best, end = float("inf"), time.perf_counter() + _BUDGET_S
    for number in range(_MAX_PASSES):
        began = time.perf_counter()
        if number >= _MIN_PASSES and began > end:
            break
        for _ in range(num_calls):
            work()
        best = min(best, (time.perf_counter() - began) / num_calls)
    return best


if __name__ == "__main__":
    main()
