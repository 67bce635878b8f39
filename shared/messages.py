"""Every message that crosses the bus, grouped by conversation. Data only: no methods, no logic, no encoding.

A subject carries one type or a union of two to four (`subjects.py` names them). Times are remaining or elapsed
milliseconds, never a clock reading. New fields need defaults; a breaking change is a new subject version.
Instance names (`te`, `client`, `je`, ...) contain the boot id of the process, so a restarted one is another instance.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum, StrEnum

# --------------------------------------------------------------------------------------------- answers to a request


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """The typed "no" of every conversation; `code` is one of `errors.py`."""

    code: str
    message: str
    param: str | None = None
    retry_after_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Accepted:
    """`request.<model>` and `task.<te>`: somebody now owes (request, attempt) exactly one end per choice.

    `te` is None while the request is parked at the JE because no TE of the model is up.
    """

    request: str
    attempt: int
    by: str
    te: str | None = None


# ------------------------------------------------------------------------------------------------ request and task


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How tokens are chosen and when a choice ends. Stop strings are the gateway's business and not in here."""

    max_tokens: int
    seed: int  # unsigned 64 bit; noise is a function of (seed, choice, position) alone
    n: int = 1
    min_tokens: int = 0
    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0
    top_k: int = 0  # 0 is off
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    stop_token_ids: list[int] = field(default_factory=list)
    ignore_eos: bool = False
    logprobs: int | None = None  # alternatives wanted beside each token; None: no logprobs at all


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprobs:
    """Log-probability (natural log) of one sampled token and of the likeliest alternatives, best first."""

    logprob: float
    top_ids: list[int] = field(default_factory=list)
    top_logprobs: list[float] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class Keep:
    """Explicit context caching: the pages of this request's prompt are kept under a name, and not evicted before."""

    id: str
    ttl_ms: int


class Band(IntEnum):
    """Priority bands, most urgent first. A band is served before the next one; inside it tenants share fairly."""

    PRIORITY = 0
    DEFAULT = 1
    FLEX = 2  # somebody waits, but not impatiently
    BATCH = 3  # nobody waits: fills idle capacity, and yields within one step


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One prompt to be continued. Sent by a gateway; sent again with the next `attempt` after a loss.

    `root` is the hash every page chain of this tenant and model starts from, `hashes` the chained hashes of the
    prompt's full pages (blockhash.py). `output` holds, per choice, the tokens the client already has; `ended` the
    choices that are over: their tokens are not generated again. `hashes` may begin with pages of a prefix that the
    operator shares with all tenants: what comes after them is chained with the tenant's own secret.
    """

    request: str
    attempt: int
    client: str
    model: str
    tenant: str
    prompt: list[int]
    root: bytes
    hashes: list[bytes]
    sampling: Sampling
    deadline_ms: int
    park_ms: int
    kind: str = "chat"  # chat | completion | cache: selects the job kind
    output: list[list[int]] = field(default_factory=list)
    ended: list[int] = field(default_factory=list)
    avoid: list[str] = field(default_factory=list)
    keep: Keep | None = None
    # Position-independent caching: ranges [start, stop) of prompt tokens that may be taken from elsewhere (EPIC).
    chunks: list[list[int]] = field(default_factory=list)
    band: Band = Band.DEFAULT


class TaskKind(StrEnum):
    """What a task asks of a TE. A serving TE refuses a kind it does not run."""

    GENERATE = "generate"  # prefill and decode in one place
    PREFILL = (
        "prefill"  # up to the first token; what was computed is then held for the TE that decodes
    )
    DECODE = "decode"  # from the first token on, with what a prefill computed
    TRAIN = "train"


@dataclass(frozen=True, slots=True, kw_only=True)
class Handover:
    """What a decode task is told of the prefill before it: who holds the pages, and the token that came of it.

    `ids` and `logprobs` are the tokens that the client got from the prefill (once more among `Request.output`), so
    that they can be replayed. `lease` is "" once the pages are not held any more: what is left of them is found like
    anything cached.
    """

    te: str
    lease: str
    num_pages: int
    ids: list[int]
    logprobs: list[TokenLogprobs] | None = None
    cached: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """JE -> TE: run this. Idempotent by (request, attempt); the TE's answer is the admission."""

    task: str
    job: str
    je: str
    kind: TaskKind
    request: Request
    handover: Handover | None = None  # of a decode task
    expected_output: int = 0  # tokens a choice is predicted to bring yet; 0: not known


@dataclass(frozen=True, slots=True, kw_only=True)
class Prefilled:
    """`events.<je>`: a prefill task is done and its choice goes on; the JE gives it to a TE that decodes."""

    task: str
    request: str
    attempt: int
    handover: Handover


@dataclass(frozen=True, slots=True, kw_only=True)
class Cancel:
    """Gateway or JE -> TE: drop (request, attempts up to `attempt`). Idempotent; unknown requests are ignored.

    `choice` None means all choices. `keep` is how many generated tokens count: what is past it (after a stop string)
    is not indexed.
    """

    request: str
    attempt: int
    choice: int | None = None
    keep: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskEnded:
    """`events.<je>`: a TE is done with a task."""

    task: str
    request: str
    attempt: int
    te: str
    finish: str
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    first_token_ms: int = -1  # from the TE's answer to the first token; -1: there was none
    total_ms: int = 0  # from the TE's answer to the end


# ---------------------------------------------------------------------------------------------------------- tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """The next tokens of one choice; `index` is the position of the first of `ids` in the choice's output.

    `finish` set makes it the one terminal delta of the choice: stop | length | cancelled | failed. A token that
    ended the choice (end of sequence, stop id) is the last of `ids` and `stop_id` repeats it. `logprobs`, where
    wanted, is as long as `ids`. `cached` (first delta only) is the number of prompt tokens found in the cache.
    """

    request: str
    attempt: int
    choice: int
    index: int
    ids: list[int]
    logprobs: list[TokenLogprobs] | None = None
    cached: int | None = None
    finish: str | None = None
    stop_id: int | None = None
    failure: Failure | None = None
    moves: bool = False  # the last one from here: another TE, which the JE names, goes on


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """`tokens.<client>`: all that one engine step produced for one client. `seq` counts frames source -> client."""

    source: str
    seq: int
    deltas: list[Delta]


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """`tokens.<client>`: a JE tells what is happening to a request that no TE decodes yet."""

    source: str
    request: str
    attempt: int
    state: str  # parked | dispatched | moved (to `te`, which decodes what another TE prefilled)
    te: str | None = None
    waited_ms: int = 0
    stage: str = "queued"  # while parked: queued | loading (`percent` done) | warm (a TE is up, others go first)
    percent: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """`task.<te>`: the client saw a gap or a silence; send again from `have[choice]` on."""

    request: str
    attempt: int
    have: list[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Replayed:
    """All deltas from the asked positions, terminal ones included."""

    deltas: list[Delta]


# ------------------------------------------------------------------------------------------------- life and load


@dataclass(frozen=True, slots=True, kw_only=True)
class Beat:
    """`beat.<kind>.<id>`, 5 Hz (2 Hz at rest): gateways, JEs, caches and pods live. `draining`: no new work, please."""

    kind: str
    id: str
    draining: bool = False
    in_flight: int = 0
    host: str = ""  # of a cache service: the host whose arena it owns; "" without one
    models: list[str] = field(default_factory=list)  # of a cache service: those it has pages of


@dataclass(frozen=True, slots=True, kw_only=True)
class TeBeat:
    """`beat.te.<id>`, 5 Hz (2 Hz at rest): a TE's load and pulse.

    `progress_ms` is the age of the last finished step while there is work, 0 when idle; `step_ms` the predicted
    duration of the present step: a TE whose progress is older than 1.5 s beyond it counts as dead.
    `outstanding` is predicted work in seconds (waiting prefill plus remaining decode). `counters` are monotonic.
    """

    id: str
    model: str
    pod: str
    state: str  # loading | ready | draining
    loading: int = 0  # percent done, while loading
    step: int = 0
    progress_ms: int = 0
    step_ms: int = 0
    running: int = 0
    waiting: int = 0
    free_slots: int = 0
    outstanding_s: float = 0.0
    outstanding_batch_s: float = 0.0  # the part of it that yields to everybody else (band BATCH)
    waiting_tokens: int = 0  # known to its sequences and not computed yet, band BATCH apart
    prefill_us: float = 0.0  # measured, per token; 0: not yet
    decode_us: float = (
        0.0  # measured, per token of a sequence in a batch like the present one; 0: not yet
    )
    decode_row_us: float = (
        0.0  # by which one more sequence lengthens a decode step; 0: not yet measured
    )
    blocks_total: int = 0
    blocks_used: int = 0
    blocks_cached: int = 0
    blocks_leased: int = 0
    blocks_reserved: int = 0  # that what it has taken on will need beyond those it has
    role: str = "colocated"  # or prefill, decode: a TE group is one role of one model
    host: str = ""  # of its arena; "" without one
    counters: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Down:
    """`down.<kind>.<id>`: its pod host (or the cluster manager) knows that this instance is dead."""

    kind: str
    id: str
    reason: str


# --------------------------------------------------------------------------------------------------- introspection


@dataclass(frozen=True, slots=True, kw_only=True)
class StatusQuery:
    """`status.<kind>.<id>`, `status.<kind>.all` or `status.all.all`: verb `status`, `ledger`, or `log_level` (with
    `argument`); of JEs also `placement` (of the request that `argument` names)."""

    verb: str = "status"
    argument: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class StatusReply:
    """One service's answer; `body` is JSON for people and for `deepflow status`."""

    kind: str
    id: str
    pid: int
    body: str


# -------------------------------------------------------------- tables (KV buckets; stored as JSON, read by people)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelEntry:
    """Bucket `models`, key = encoded name: the catalogue. Survives all replicas of the model.

    `folder` is relative to the models folder of `DEEPFLOW_CACHE`. The digests let a gateway refuse to serve a model
    whose tokenizer or template it would read differently.
    """

    name: str
    folder: str
    context: int  # tokens, prompt and output together
    vocab: int
    page: int  # tokens per KV page; also the hash granularity
    eos_ids: list[int]
    tokenizer_digest: str
    template_digest: str
    recipe_digest: str  # weights + arithmetic + KV dtype and layout: part of every hash root
    created: int = 0  # seconds since the epoch, for /v1/models


@dataclass(frozen=True, slots=True, kw_only=True)
class Registration:
    """Bucket `registrations`, key = encoded instance: who is here; re-put on reconnect, removed at a clean end."""

    kind: str
    id: str
    host: str
    pid: int
    address: str = ""
    model: str = ""
    pod: str = ""
    role: str = ""  # of a TE: colocated | prefill | decode
    page: int = 0
    recipe_digest: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantSecret:
    """Bucket `keys`, key = encoded tenant: what keys the tenant's hash roots. Made once, by `create`."""

    tenant: str
    secret: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class ContextCache:
    """Bucket `caches`, key = id: an explicit context cache of a tenant, which requests continue from.

    The entry itself lacks what may be long; the part `contents` of the bucket holds it whole, and never changes.
    Exactly one of `messages` (JSON) and `text` is set there. `public`: the operator shares its pages with all tenants.
    Times are seconds since the epoch: the entry outlives every process.
    """

    id: str
    tenant: str
    model: str
    name: str
    num_tokens: int
    created: int
    expires: int
    messages: str = ""
    text: str = ""
    public: bool = False
    prefix: list[int] = field(default_factory=list)  # token ids, of a public one
    options: str = ""  # JSON: what the chat template was given
    requests: int = 0  # that named it, and how many of its tokens they found cached
    cached_tokens: int = 0
