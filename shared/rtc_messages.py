"""The messages about pages of KV: who holds what, where it can be read, and who may. Data only, as `messages`.

A page is named by its chained hash (`blockhash`). A holder is a TE (tier device) or a cache service (tiers host and
ssd, its host's arena).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from shared.messages import Keep

# Who holds what.


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockEvents:
    """`blocks.<model>.<te>`, `arena.<model>.<cache>`: what changed in an index; apply `removed` before `stored`.

    `seq` grows by one per message of this holder and model from 1; a jump means a lost message: ask for a dump.
    """

    te: str  # the holder
    model: str
    seq: int
    stored: list[bytes] = field(default_factory=list)
    removed: list[bytes] = field(default_factory=list)
    tier: str = "device"


@dataclass(frozen=True, slots=True, kw_only=True)
class BlocksQuery:
    """`dump.<holder>`: send the whole index of a model (a TE has but one)."""

    by: str
    model: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class BlocksDump:
    """The whole index as of event `seq`: the next event to apply is `seq + 1`. `ssd`: what is in that tier, too."""

    te: str
    model: str
    seq: int
    hashes: list[bytes]
    tier: str = "device"
    ssd: list[bytes] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class Match:
    """`rtc.match`: who holds the longest prefix of these chained page hashes?"""

    model: str
    hashes: list[bytes]


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """A TE or cache service that holds the first `num_pages` pages, all of them in `tier` or faster."""

    te: str  # the holder
    num_pages: int
    tier: str
    host: str = ""  # of a cache service: its arena's


@dataclass(frozen=True, slots=True, kw_only=True)
class Matched:
    """Holders, longest match first; empty when nobody holds the first page."""

    holders: list[Holder]


# The host's arena (`shared/arena`): TE <-> the cache service of its host.


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """One slot of the arena as of a generation: once it is given to another page, the generation is another."""

    segment: str
    index: int
    generation: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Copy:
    """`rtc.copy.<host>`: a TE has these pages on its device, wants to write them to the arena, and asks for slots.

    `recipe` is the model's recipe digest, `slot_bytes` the size of a page over all layers. `held`: segments that it
    writes to. `keep`: the pages belong to an explicit context cache and are not evicted before it ends.
    """

    te: str
    model: str
    recipe: str
    slot_bytes: int
    hashes: list[bytes]
    held: list[str] = field(default_factory=list)
    keep: Keep | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Copied:
    """A slot for each page, in order: None where the arena has the page already, or has no room (`num_refused`).

    `granted` are names of segments that are now the TE's to write to: it locks them before it writes. `wanted` are
    segments of its own that it should give back.
    """

    slots: list[Slot | None]
    granted: list[str] = field(default_factory=list)
    wanted: list[str] = field(default_factory=list)
    num_refused: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Commit:
    """`rtc.commit.<host>`, published: these slots are written (the slots' own headers say so, and with what), these
    reserved ones will not be, and these segments are given back."""

    te: str
    written: list[Slot] = field(default_factory=list)
    dropped: list[Slot] = field(default_factory=list)
    returned: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class Populate:
    """`rtc.populate.<host>`: a TE lacks these consecutive pages of a chain. Where can it read them?

    `page_us` is what computing one of them takes there, as measured; `load_us` what bringing one from the arena to
    its device takes. What would take longer than computing is not fetched. `wait_ms`: how long to wait for the answer
    to be complete before it gets a ticket.
    """

    te: str
    model: str
    recipe: str
    slot_bytes: int
    hashes: list[bytes]
    page_us: int
    load_us: int
    wait_ms: int = 0
    avoid: list[str] = field(default_factory=list)  # TEs that did not give what they have


@dataclass(frozen=True, slots=True, kw_only=True)
class QueryPopulate:
    """`rtc.query.<host>`: how is this ticket getting on? Answered once it is done, after `wait_ms` at the latest."""

    ticket: str
    wait_ms: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Populated:
    """The answer to `Populate` and `QueryPopulate`: the first pages are in these slots of the arena.

    `ticket`: more are on their way; "" if not. `peer`: a TE that has them on its device, up to `peer_pages` of them,
    which are best had from there directly. `why`: the decision, for whoever asks later.
    """

    slots: list[Slot] = field(default_factory=list)
    ticket: str = ""
    peer: str = ""
    peer_pages: int = 0
    why: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Free:
    """`rtc.free`, published to every cache service and TE: an explicit context cache has ended."""

    keep: str


# Between hosts: DistFlow (`shared/distflow`).


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkRequest:
    """`link.<instance>`: somebody of the same realm wants to read what this instance registers."""

    by: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkOffer:
    """Where to connect, and with which token: it opens one link, soon."""

    to: str
    token: bytes
    addresses: list[str]  # backend:address, the fastest first
    ttl_ms: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseRequest:
    """`link.<holder>`: hold the longest prefix of these pages that you have until I have read it.

    `lease` names one that exists already (a hand-over's); then `hashes` may be empty. `slot_bytes`: of a page over all
    layers, for a holder with pages of many models.
    """

    by: str
    model: str
    recipe: str
    hashes: list[bytes] = field(default_factory=list)
    lease: str = ""
    slot_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Leased:
    """Page i is at `offsets[i]` of the region, `page_bytes` long. Valid for `ttl_ms`, and provably so: `LeaseRelease`
    tells whether it was until then. `seeds` and `checksums`: xxh3-64 of each page as it was written, seeded; empty
    where nobody has taken it (of a device's blocks)."""

    lease: str
    region: int
    generation: int
    page_bytes: int
    offsets: list[int]
    ttl_ms: int
    seeds: list[int] = field(default_factory=list)
    checksums: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseRelease:
    """`link.<holder>`: what was leased has been read, or is not wanted any more."""

    lease: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseReleased:
    """`valid`: the pages were held until now, so what was read of them is what was leased."""

    valid: bool


# Weights (NPU-fork).


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightsRequest:
    """`link.<te>`: which files make up your weights, and where are they to be read? `recipe` says what they are for."""

    by: str
    model: str
    recipe: str


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightsFile:
    """One file of the weights, as a region; it may still be filling. `digest` is over all of its bytes."""

    name: str
    num_bytes: int
    region: int
    generation: int
    digest: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightsOffer:
    """They may be read for `ttl_ms`, or until this TE ends. `chain` names those that this one itself reads from, so
    that nobody reads from one that reads from it."""

    files: list[WeightsFile]
    ttl_ms: int
    chain: list[str] = field(default_factory=list)
