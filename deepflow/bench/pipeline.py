"""`bench pipeline`: what it brings to spread the chunks of a prompt over the micro-batches of a pipeline.

The engine is the real one, with its scheduler, its blocks and its sampler; only the stages are not there: a pipeline
that computes nothing and moves a clock by what a step would take at each of its stages. So the figures are those of any
machine, and the same in every run. Compared are chunks of a prompt in consecutive micro-batches, and chunks that all
stay in one, where the next waits until the one before it has left the last stage. What the engine's own Python takes,
a few tenths of a millisecond per step, is left out of both.
"""

from __future__ import annotations

from collections import deque
from dataclasses import asdict, dataclass, field
from random import Random
from typing import Any, Final

import numpy as np

from deepflow.bench import machine
from deepflow.bench.distribution import summary
from deepflow.bench.report import Bar, Report
from services.worker.flowserve.config import ModelConfig
from services.worker.flowserve.decoder import Floats, StepInput
from services.worker.flowserve.engine import Engine, EngineSettings
from services.worker.flowserve.life import local_request
from shared.messages import Sampling

STAGES: Final = (2, 4)
PAGE: Final = 128
BARS: Final = tuple(
    Bar(
        f"pp{n}_long_ttft_ratio", "<=", 0.8, f"{n} stages: mean TTFT of long prompts, spread / kept"
    )
    for n in STAGES
)
# Llama 3 8B, but for its vocabulary: nothing is computed from the logits.
_MODEL: Final[dict[str, Any]] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 1 << 17,
    "vocab_size": 256,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class StageTimes:
    """Seconds of a step in the whole model, which the stages share alike, and of handing it from stage to stage.

    The defaults are rounded from 8 billion bfloat16 weights on accelerators of 1.6 TB/s that reach 200 TFLOP/s in
    products and 100 in attention: 16 GB read per step, 16 GFLOP per row, and 0.5 MFLOP (4 x 4,096 wide x 32 layers) per
    row and position that it attends to.
    """

    step_s: float = 10e-3
    row_s: float = 80e-6
    pair_s: float = 5e-9  # of a row and a position
    hop_s: float = 0.3e-3  # per stage

    def stage_s(self, step: StepInput, num_stages: int) -> float:
        """What one of the stages takes."""
        pairs = sum(s.length * (s.start + (s.length + 1) / 2) for s in step.spans)
        whole = self.step_s + self.row_s * len(step.tokens) + self.pair_s * pairs
        return self.hop_s + whole / num_stages


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """Poisson arrivals of chats, one long prompt in `long_every` among them; lengths in tokens, `rate` per second."""

    num: int = 400
    rate: float = 8.0
    long_every: int = 10
    long_len: int = 8192
    chat_len: int = 256
    output_len: int = 128
    max_batched_tokens: int = 512
    max_num_seqs: int = 64


@dataclass(slots=True)
class Clock:
    """Virtual seconds."""

    now: float = 0.0


class SimulatedPipeline:
    """A `decoder.Pipeline` that takes its time and computes nothing: all logits are 0."""

    description = "simulated"

    def __init__(self, num_stages: int, times: StageTimes, clock: Clock) -> None:
        self.config = ModelConfig.from_dict(_MODEL)
        self.num_stages = num_stages
        self.busy_s = 0.0  # of each stage
        self._times = times
        self._clock = clock
        self._free_at = [0.0] * num_stages  # when each stage is done with what it has been given
        self._inside: deque[tuple[float, int]] = deque()  # when it comes out, and its samples

    @property
    def timings(self) -> dict[str, float]:
        """Nobody measures here."""
        return {}

    def bytes_per_block(self, page: int) -> int:
        """There are none."""
        return 0

    def allocate(self, num_blocks: int, page: int) -> None:
        """Nothing is kept."""

    def forward(self, step: StepInput) -> Floats:
        """A step by itself."""
        self.begin(step)
        return self.finish()

    def begin(self, step: StepInput) -> None:
        """Each stage takes the step up when it has it from the stage before and is done with the step before."""
        stage_s = self._times.stage_s(step, self.num_stages)
        at = self._clock.now
        for stage, free_at in enumerate(self._free_at):
            at = self._free_at[stage] = max(at, free_at) + stage_s
        self.busy_s += stage_s
        self._inside.append((at, len(step.sample_rows)))

    def finish(self) -> Floats:
        """The clock goes on to when the oldest step comes out."""
        at, num_samples = self._inside.popleft()
        self._clock.now = max(self._clock.now, at)
        return np.zeros((num_samples, self.config.vocab), np.float32)


@dataclass(slots=True)
class Lifetime:
    """When a request came, and when each of its tokens."""

    came_at: float
    is_long: bool
    tokens_at: list[float] = field(default_factory=list)

    @property
    def ttft_ms(self) -> float:
        """Until the first token."""
        return (self.tokens_at[0] - self.came_at) * 1000

    @property
    def tpot_ms(self) -> float:
        """Per further token."""
        return (self.tokens_at[-1] - self.tokens_at[0]) * 1000 / (len(self.tokens_at) - 1)


def simulate(
    load: Load, *, num_stages: int, spread_chunks: bool, times: StageTimes, seed: int
) -> dict[str, float]:
    """Serve the load in virtual time: its TTFT and TPOT in ms, and how long a stage was busy."""
    clock = Clock()
    pipeline = SimulatedPipeline(num_stages, times, clock)
    longest = max(load.long_len, load.chat_len)
    settings = EngineSettings(
        num_blocks=load.max_num_seqs * -(-(longest + load.output_len) // PAGE),  # enough for all
        page=PAGE,
        max_num_seqs=load.max_num_seqs,
        max_batched_tokens=load.max_batched_tokens,
        spread_chunks=spread_chunks,
    )
    engine = Engine(pipeline, settings, eos_ids=(), clock=lambda: clock.now)
    random = Random(seed)
    long = set(random.sample(range(load.num), load.num // load.long_every))
    lives: dict[str, Lifetime] = {}
    coming_at = random.expovariate(load.rate)
    while len(lives) < load.num or engine.has_work():
        if len(lives) < load.num and not engine.has_work():
            clock.now = max(clock.now, coming_at)
        while len(lives) < load.num and coming_at <= clock.now:
            name = str(len(lives))
            lives[name] = life = Lifetime(coming_at, len(lives) in long)
            length = load.long_len if life.is_long else load.chat_len
            prompt = random.choices(range(pipeline.config.vocab), k=length)
            sampling = Sampling(max_tokens=load.output_len, seed=0, temperature=0, ignore_eos=True)
            engine.submit(local_request(name, prompt, sampling))
            coming_at += random.expovariate(load.rate)
        for _, delta in engine.step().deltas:
            lives[delta.request].tokens_at += [clock.now] * len(delta.ids)
    return {
        **summary("long_ttft", "ms", [life.ttft_ms for life in lives.values() if life.is_long]),
        **summary("chat_ttft", "ms", [life.ttft_ms for life in lives.values() if not life.is_long]),
        **summary("tpot", "ms", [life.tpot_ms for life in lives.values()]),
        "stage_busy_share": pipeline.busy_s / clock.now,
    }


def bench_pipeline(load: Load, seed: int, times: StageTimes | None = None) -> Report:
    """Serve the same load with chunks spread and kept, by pipelines of 2 and of 4 stages.

    Raises ValueError if the load has no long prompt.
    """
    if load.num < load.long_every:
        raise ValueError(f"{load.num} requests, one in {load.long_every} long: none of them is")
    times = times or StageTimes()
    metrics: dict[str, float] = {}
    for n in STAGES:
        both = {
            name: simulate(load, num_stages=n, spread_chunks=spread, times=times, seed=seed)
            for name, spread in (("spread", True), ("kept", False))
        }
        for name in ("long_ttft", "chat_ttft", "tpot"):
            mean = f"{name}_mean_ms"
            if mean not in both["kept"]:
                continue  # nothing but long prompts
            metrics[f"pp{n}_{name}_ratio"] = both["spread"][mean] / both["kept"][mean]
        for how, figures in both.items():
            metrics |= {f"pp{n}_{how}_{name}": value for name, value in figures.items()}
    return Report(
        bench="pipeline",
        metrics=metrics,
        machine=machine.describe(),
        settings={"seed": seed, **asdict(load), **asdict(times)},
        bars=BARS,
        notes=[
            "Simulated stages under the real engine: times are virtual, and alike on any machine.",
            "Where many long prompts wait at once they fill all micro-batches either way, and the ratio goes to 1.",
            "Spread, a prompt goes strictly before those that came after it: a chat behind it waits for its chunks.",
        ],
    )
