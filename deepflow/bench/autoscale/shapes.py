"""Loads of many shapes, seeded: bursts and silences, waves, zeros, steps, lone requests, a trickle.

Pure; this module must not know who serves them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from random import Random
from typing import TypeAlias

from deepflow.sim.trace import BLOCK, Call

# Requests per second at a time, by the seconds since the start.
Curve: TypeAlias = Callable[[float], float]


def calls_of(
    curve: Curve,
    span_s: float,
    seed: int,
    *,
    prompt: int = 1500,
    spread: float = 1.0,
    output: int = 13,
    output_spread: float = 1.2,
) -> list[Call]:
    """Independent requests at a curve's rate (Poisson), of log-normal lengths with these medians."""
    random = Random(f"lengths {seed}")
    calls: list[Call] = []
    next_id, now_s = 0, 0.0
    step_s = 0.05
    while now_s < span_s:
        rate = curve(now_s)
        at = random.expovariate(rate) if rate > 0 else math.inf
        while at < step_s:
            num_prompt = min(8000, max(8, int(prompt * random.lognormvariate(0.0, spread))))
            num_output = min(2000, max(1, int(output * random.lognormvariate(0.0, output_spread))))
            num = -(-num_prompt // BLOCK)
            calls.append(
                Call(
                    (now_s + at) * 1000,
                    num_prompt,
                    num_output,
                    tuple(range(next_id, next_id + num)),
                )
            )
            next_id += num
            at += random.expovariate(rate)
        now_s += step_s
    return calls


def bursts(
    seed: int, span_s: float, *, on_s: float = 25.0, off_s: float = 45.0, rate: float = 7.0
) -> Curve:
    """Silence and bursts of any length and height, each second of which is on a height of its own."""
    random = Random(f"bursts {seed}")
    heights: list[float] = []
    while len(heights) < span_s:
        heights += [0.0] * max(1, int(random.lognormvariate(math.log(off_s) - 0.5, 1.0)))
        length = max(2, int(random.lognormvariate(math.log(on_s) - 0.5, 1.0)))
        height = rate * random.lognormvariate(-0.125, 0.5)
        for _ in range(length):
            heights.append(
                0.0 if random.random() < 0.25 else height * random.lognormvariate(-0.2, 0.7)
            )
    return lambda at: heights[min(int(at), len(heights) - 1)]


def waves(period_s: float, low: float, high: float) -> Curve:
    """Up and down between two rates."""
    return lambda at: low + (high - low) * (0.5 - 0.5 * math.cos(2 * math.pi * at / period_s))


def zeros(on_s: float, off_s: float, rate: float) -> Curve:
    """At a rate, then silent, again and again."""
    return lambda at: rate if at % (on_s + off_s) < on_s else 0.0


def steps(length_s: float, rates: tuple[float, ...]) -> Curve:
    """One rate after another."""
    return lambda at: rates[int(at // length_s) % len(rates)]


def constant(rate: float) -> Curve:
    """One rate."""
    return lambda at: rate


def made(name: str, span_s: float, seed: int) -> list[Call]:
    """The trace of this name; nothing if there is none."""
    curves: dict[str, Curve] = {
        "bursts": bursts(seed, span_s),  # like the public trace of code completion
        "waves": waves(300.0, 0.2, 12.0),
        "zeros": zeros(30.0, 90.0, 8.0),
        "steps": steps(150.0, (1.0, 10.0, 3.0, 20.0, 0.5, 6.0)),
        "spikes": zeros(3.0, 57.0, 15.0),
        "lone": constant(1 / 40),
    }
    return calls_of(curves[name], span_s, seed) if name in curves else []
