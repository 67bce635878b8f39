"""The messages about which Task Executors are to be up: demand, orders, fleets, starts. Data only, as `messages`.

JEs tell the cluster manager what is asked for, pod hosts what they have; it tells pod hosts what to have, and everybody
what is to be expected. Orders are absolute and repeated, so that a lost or doubled one changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum


class Step(StrEnum):
    """The five steps of a TE's start (the paper, table 2), in their order."""

    SCALER_PRE = "scaler_pre"  # from the order until there is a process for it
    TE_PRE_LOAD = "te_pre_load"  # interpreter, imports, device, bus: what no model is needed for
    TE_LOAD = "te_load"  # weights
    TE_POST_LOAD = "te_post_load"  # KV cache, canary, registration
    SCALER_POST = "scaler_post"  # until what it says of itself has come to whoever sends it work


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """How a TE came up, once it is ready. `steps` holds seconds by `Step`; a step that was done ahead took 0."""

    te: str
    model: str
    role: str
    process: str  # exec | fork (of the zygote) | warm (a pre-warmed TE)
    weights: str  # disk | dram (page cache) | fork (of a running TE)
    steps: dict[str, float]
    total_s: float


# ----------------------------------------------------------------------------------------------- what there is


@dataclass(frozen=True, slots=True, kw_only=True)
class PodTe:
    """One TE of a pod host. `state`: starting | loading | ready | draining | waiting (to be started again)."""

    te: str  # "" until it told its name
    model: str
    role: str
    state: str
    progress: int = 0  # percent, while it starts
    since_ms: int = 0  # in this state


@dataclass(frozen=True, slots=True, kw_only=True)
class PodModel:
    """A model that a pod host can run. `min_tes` and `max_tes` are what its settings say of colocated TEs; how far that
    counts is the cluster manager's business. The bytes are estimates until the first TE has run."""

    name: str
    min_tes: int
    max_tes: int
    te_bytes: int  # of one more TE: KV cache and what it does not share
    weights_bytes: int  # of all TEs together
    resident_bytes: int = 0  # of the weights, in the page cache
    num_slots: int = 0  # choices that one TE runs at once


@dataclass(frozen=True, slots=True, kw_only=True)
class PodBeat:
    """`beat.pod.<id>`, 5 Hz (2 Hz at rest): what a pod host has and may have. `starts` of the last few seconds."""

    kind: str
    id: str
    host: str
    draining: bool = False
    in_flight: int = 0  # TEs that are on their way up or down
    term: int = 0  # the latest one that it had orders of
    models: list[PodModel] = field(default_factory=list)
    tes: list[PodTe] = field(default_factory=list)
    num_warm: int = 0  # pre-warmed TEs
    max_tes: int = 0
    num_bytes: int = 0  # the budget, of all TEs and weights
    cores: int = 0
    starts: list[Start] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """`demand.<model>`: what a JE was asked for, at once when a request is parked, else twice a second while there is
    something to tell. All but the first two numbers only grow, from the JE's start on."""

    je: str
    model: str
    parked: int = 0
    waited_ms: int = 0  # the longest of those that are parked
    arrivals: int = 0
    work_ms: int = 0  # predicted, of all arrivals: seconds of one TE
    answered: int = 0  # arrivals whose first token came
    late: int = 0  # of these, later than the objective


# ------------------------------------------------------------------------------------------- what there is to be


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """How many TEs of one model in one role a pod host is to have."""

    model: str
    role: str
    num: int
    # Running TEs to take the weights from, best first: each target of a broadcast has the one before it in front.
    sources: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaleOrder:
    """`scale.<pod>`: what this pod host is to have, altogether; a group that is not named is to have no TE.

    `term` fences: a pod host refuses (Forbidden) a lower one than it has seen. `preload`: the models whose weights are
    to be in memory, most wanted first, as far as its budget goes.
    """

    by: str
    term: int
    targets: list[Target]
    preload: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scaled:
    """The pod host is about it."""

    pod: str
    term: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Fleet:
    """`fleet.<model>`, on every change and once a second: what the cluster manager is about.

    `eta_ms` is when the next TE is expected to be ready, -1 without a guess. `reason`: why the target is what it is,
    for people. `short`: more would be wanted than there is room for. `max_tes`: -1 while there is no pod host that
    could run it, and nothing was set.
    """

    model: str
    term: int
    target: int
    ready: int
    starting: int
    progress: int = 0  # percent, of the one that is furthest on its way
    eta_ms: int = -1
    reason: str = ""
    short: bool = False
    min_tes: int = 0
    max_tes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class SetScaling:
    """`scaling.<model>`: from now on between `min_tes` and `max_tes` TEs, at their idlest up for `keep_alive_s`
    seconds; None leaves a bound as it is, and a negative number takes back what was set."""

    model: str
    by: str
    min_tes: int | None = None
    max_tes: int | None = None
    keep_alive_s: float | None = None


# -------------------------------------------------------------------------------------------------------- tables


@dataclass(frozen=True, slots=True, kw_only=True)
class ScalingEntry:
    """Bucket `scaling`, key = model: what an operator set. None: what the pod hosts' settings say; for `keep_alive_s`,
    what was learned."""

    model: str
    min_tes: int | None = None
    max_tes: int | None = None
    keep_alive_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseEntry:
    """Bucket `leases`, key = what is leased: who holds it. `term` grows with every new holder, `beat` with every
    renewal; who wants it watches whether they change for `ttl_ms`."""

    holder: str
    term: int
    beat: int
    ttl_ms: int
