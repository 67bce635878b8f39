"""What is simulated: the TEs, the JEs, the policy, how long messages take, what goes wrong. Data only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Self, TypeAlias

from deepflow.sim.faults import Fault
from deepflow.sim.profile import NPU_34B_TP4, Profile
from deepflow.sim.scaling import Autoscaling, Scaling
from deepflow.sim.trace import BLOCK, Call
from services.scheduler.heatmap import Heatmap
from services.scheduler.policy.base import COLOCATED, DECODE, PREFILL
from services.scheduler.policy.roster import DEFAULT
from services.scheduler.work import Length
from shared.length_table import BUCKET_TOKENS

# The output length that the JEs predict for a request.
Predict: TypeAlias = Callable[[Call, Random], Length]


@dataclass(frozen=True, slots=True, kw_only=True)
class TeSpec:
    """A TE: its role, what it is made of, and how many pages it has room for (None: what the profile says)."""

    role: str = COLOCATED
    profile: Profile = NPU_34B_TP4
    num_blocks: int | None = None
    max_waiting: int = 256


def bucket_of(num_tokens: int) -> Length:
    """The bucket that a length falls into."""
    low = num_tokens // BUCKET_TOKENS * BUCKET_TOKENS
    return Length(low=max(low, 1), mid=low + BUCKET_TOKENS // 2)


def oracle(call: Call, random: Random) -> Length:
    """A predictor that is always right, as far as a bucket goes."""
    return bucket_of(call.output_length)


def constant(num_tokens: int) -> Predict:
    """A predictor that says the same of every request."""
    return lambda call, random: bucket_of(num_tokens)


def noisy(accuracy: float, spread: int = 3) -> Predict:
    """A predictor that names the right bucket with this probability, else one up to `spread` buckets away, above it
    where there is none below."""

    def predict(call: Call, random: Random) -> Length:
        if random.random() < accuracy:
            return bucket_of(call.output_length)
        off = random.randint(1, spread) * random.choice((-1, 1)) * BUCKET_TOKENS
        return bucket_of(call.output_length + (off if call.output_length + off >= 0 else -off))

    return predict


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """One deployment of one model. Times are seconds.

    `page` is the trace's block in tokens. A message takes `hop_s` between any two; what a TE announces about its pages
    and its load as well. A client that is told the service is full leaves, unless it `insists`: then it comes back when
    it was told to, until its deadline.
    """

    tes: tuple[TeSpec, ...]
    policy: str = DEFAULT
    num_jes: int = 1
    seed: int = 0
    page: int = BLOCK
    hop_s: float = 0.0005
    beat_s: float = 0.2
    rest_s: float = 0.5  # between the beats of an idle TE
    task_timeout_s: float = 0.3
    load_s: float = 2.0  # from the start of a TE until it is ready, for those that start later
    deadline_s: float = 600.0
    park_s: float = 60.0
    insists: bool = False
    predict: Predict = oracle
    heatmap: Heatmap | None = None  # None: the analytic one
    min_split_tokens: int | None = None  # None: as the placer has it
    faults: tuple[Fault, ...] = field(default=())
    scaling: tuple[Scaling, ...] = field(default=())
    autoscaling: Autoscaling | None = None
    like: TeSpec = field(default_factory=TeSpec)  # a TE that comes where there was none

    @classmethod
    def of(
        cls,
        num_tes: int,
        profile: Profile = NPU_34B_TP4,
        *,
        num_pairs: int = 0,
        num_blocks: int | None = None,
        policy: str = DEFAULT,
        seed: int = 0,
    ) -> Self:
        """`num_tes` colocated TEs of one kind, and `num_pairs` pairs of TEs for prefill and decode."""
        roles = [COLOCATED] * num_tes + [PREFILL, DECODE] * num_pairs
        tes = tuple(TeSpec(role=role, profile=profile, num_blocks=num_blocks) for role in roles)
        return cls(tes=tes, policy=policy, seed=seed, hop_s=profile.answer_s / 2)
