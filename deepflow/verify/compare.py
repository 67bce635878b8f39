"""When two computations of the same tokens count as the same. Pure.

Differences are told in units of the logits' own spread, so that they mean the same for every model. A choice may differ
where the two best logits of the reference lie closer than rounding reaches, and nowhere else. In a mixture of experts
rounding may also decide between two experts that a router finds equally good, which changes the token's logits as a
whole: there a few tokens may differ, and nine tokens of ten count.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from deepflow.verify.replay import Trace
from services.worker.flowserve.decoder import Floats

_ROUTED_APART: Final = 0.05  # of the tokens of a mixture of experts may differ


@dataclass(frozen=True, slots=True)
class Tolerance:
    """Of an arithmetic, against fp32: `error` of a token's logits is root mean square, `tie` a gap between two logits.

    bf16 finds out a rotary base that is a fifth off or a bias that was lost; w8a8, which is several times as coarse,
    only what is grossly wrong: what the two have in common is shown by bf16.
    """

    error: float
    tie: float


TOLERANCES: Final = {
    "fp32": Tolerance(1e-4, 1e-3),
    "bf16": Tolerance(0.05, 0.2),
    "w8a8": Tolerance(0.12, 0.5),
}


@dataclass(frozen=True, slots=True)
class Difference:
    """`faults` are what must not be, in words; `numbers` go into the report."""

    faults: tuple[str, ...]
    numbers: dict[str, float | int]


def compare(
    traces: Sequence[Trace], logits: Sequence[Floats], dtype: str, *, routed: bool
) -> Difference:
    """`logits` of a device that ran the tokens of `traces` in `dtype`, against the traces' own; `routed` in a mixture
    of experts."""
    tolerance = TOLERANCES[dtype]
    reference = np.concatenate([trace.logits for trace in traces])  # [T, vocab]
    found = np.concatenate(logits)
    if not np.isfinite(found).all():
        return Difference(("logits that are no numbers",), {})
    spread = reference.std(axis=-1, keepdims=True)
    errors = np.sqrt(np.square((found - reference) / spread).mean(axis=-1))  # [T]
    error = float(np.quantile(errors, 0.9))
    faults = []
    if error > tolerance.error:
        faults.append(
            f"the logits of a token in ten are off by {error:.3g} of their spread, allowed is {tolerance.error:g}"
        )
    chosen = reference.argmax(axis=-1)
    differs = found.argmax(axis=-1) != chosen
    two_best = np.partition(reference, -2, axis=-1)[:, -2:]
    gaps = (two_best[:, 1] - two_best[:, 0]) / spread[:, 0]
    num_wrong = int((differs & (gaps > tolerance.tie)).sum())
    if num_wrong > (_ROUTED_APART * len(chosen) if routed else 0):
        faults.append(f"{num_wrong} of {len(chosen)} greedy tokens differ where there is no tie")
    numbers = {
        "num_tokens": len(chosen),
        "num_ties": int(differs.sum()) - num_wrong,
        "num_wrong": num_wrong,
        "error": round(error, 6),
        "largest_error": round(float(errors.max()), 6),
    }
    return Difference(tuple(faults), numbers)
