"""Messages of work that nobody waits on: rows of jobs, the lines of a batch, and training in a worker.

A job is a row in the table `jobs`, which says everything about it, and an entry in the JetStream work queue
`job.<kind>`, which says only that somebody should see to it. Whoever takes the entry owns the row (`owner`, `attempt`)
and changes it by compare and set, so that one who was replaced notices and stops. Data only, as in `messages`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from shared.messages import Failure


class JobStatus(StrEnum):
    """Where a job is; the last four are final. The names are those of OpenAI's batches."""

    VALIDATING = "validating"
    IN_PROGRESS = "in_progress"
    FINALIZING = "finalizing"
    CANCELLING = "cancelling"
    COMPLETED = "completed"
    FAILED = "failed"
    EXPIRED = "expired"
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True, kw_only=True)
class JobCall:
    """`job.<kind>`, in the work queue: there is something to do for this job."""

    id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class JobRow:
    """Bucket `jobs`, key = id. Times are seconds since the epoch: the row outlives every process.

    `arguments` and `result` are JSON whose form is the kind's. `stamps` says when each status was reached. `attempt`
    counts owners: what an older one still writes is refused; `num_lost` counts those that never gave the job back.
    Progress is `num_done` and `num_failed` of `num_total`.
    """

    id: str
    kind: str  # batch | predictor
    tenant: str
    status: JobStatus
    created: int
    expires: int
    arguments: str
    attempt: int = 0
    owner: str = ""
    num_lost: int = 0
    num_total: int = 0
    num_done: int = 0
    num_failed: int = 0
    result: str = ""
    failures: list[Failure] = field(default_factory=list)
    stamps: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class FileRow:
    """Bucket `files`, key = id: a file in the store, once it is there whole."""

    id: str
    tenant: str
    name: str
    purpose: str
    num_bytes: int
    created: int
    expires: int = 0  # 0: never


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchArguments:
    """`JobRow.arguments` of a batch. `output_ttl_s` is how long its files are kept; 0: until they are deleted."""

    input_file: str
    endpoint: str
    window: str
    metadata: dict[str, str] = field(default_factory=dict)
    output_ttl_s: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class LineError:
    """What is wrong with a line of a batch's input, counted from 1; with the file itself if there is no line."""

    code: str
    message: str
    param: str | None = None
    line: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchResult:
    """`JobRow.result` of a batch: its files once they are there, or why its input was refused."""

    output_file: str = ""
    error_file: str = ""
    model: str = ""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    errors: list[LineError] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """`line.<gateway>`, JE -> gateway: one line of a batch, as if its tenant had posted `body` (JSON) to `endpoint`.

    Answered with `LineDone` whatever the outcome, in the HTTP shape; a `Failure` says that nobody tried, or, with
    deadline_exceeded, that it is not done yet: ask again. `key` makes it idempotent: a gateway that has the line in
    hand, or just had, does not run it again; one that nobody asks for any more is dropped.
    """

    key: str
    tenant: str
    endpoint: str
    body: str
    deadline_ms: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LineDone:
    """The HTTP answer to a line: status and body (JSON), and the tokens it cost."""

    request_id: str
    status: int
    body: str
    prompt_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """`task.<pod>`, JE -> pod host: train this in a child process, on the CPU. Idempotent by (task)."""

    task: str
    job: str
    je: str
    kind: str  # predictor
    model: str
    data: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingEnded:
    """`events.<je>`: the child is done, or `failure` says why not. `result` is what was trained."""

    task: str
    job: str
    result: bytes = b""
    report: str = ""  # JSON: what was measured on the part held back
    failure: Failure | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PredictorEntry:
    """Bucket `predictors`, key = encoded model: the decode-length predictor that the JEs use."""

    model: str
    created: int
    table: bytes
    report: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class LengthRecord:
    """One line of recorded traffic, and of what `Training` of kind `predictor` is given: how long an answer was.

    `features` are hashes, as a length table numbers them; `output_tokens` those of one choice.
    """

    kind: str
    prompt_tokens: int
    max_tokens: int
    output_tokens: int
    features: list[int]
