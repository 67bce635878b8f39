"""What each bus user may publish and hear: the least subjects with which a service does its work.

This module must not know how a bus server writes permissions down.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from shared.subjects import Subjects

KINDS: Final = ("gateway", "scheduler", "worker", "cache", "operator")
# One bus user serves a whole worker: the pod host and the TEs that it starts.
_WORKER_PARTS: Final = ("pod", "te")
_INBOXES: Final = {"worker": _WORKER_PARTS}

# How often one request may be answered. One on `scaling` comes to a scheduler twice (as a question to one of all, and
# as news), and the server takes the second time for an answer.
_ANSWERS: Final = {"gateway": -1, "scheduler": 2}

# kind -> (tables it writes, tables it only reads)
_TABLES: Final[dict[str, tuple[tuple[str, ...], tuple[str, ...]]]] = {
    "gateway": (("keys", "caches", "jobs", "files"), ("models",)),
    "scheduler": (
        ("jobs", "files", "predictors", "leases", "scaling"),
        ("models", "registrations"),
    ),
    "worker": (("models", "registrations"), ()),
    "cache": ((), ()),
    "operator": ((), ()),
}


@dataclass(frozen=True, slots=True)
class Permissions:
    """What one bus user may do. `answers` bounds the replies to one received request; -1 is a stream."""

    publish: tuple[str, ...]
    subscribe: tuple[str, ...]
    answers: int


def permissions(kind: str, realm: str) -> Permissions:
    """The least subjects with which a service of `kind` does its work; `operator` is the command line.

    A reply needs no line here: the server lets a user answer what it was asked (`answers`), and nothing else in
    another user's inbox. Raises KeyError for an unknown kind.
    """
    on = Subjects(realm)
    every = "*"
    pulse = (on.beat(every, every), on.down(every, every))
    asked = on.status(every, every)
    publish: dict[str, tuple[str, ...]] = {
        "gateway": (
            on.request(every),
            on.task(every),
            on.cancel(every),
            on.rtc("free"),
            on.scaling(every),
            on.job(every, every),
            *_queue(on.work_queue(), takes=False),
            on.beat("gateway", every),
            asked,
        ),
        "scheduler": (
            on.task(every),
            on.tokens(every),
            on.cancel(every),
            on.blocks_dump(every),
            on.line(every),
            on.demand(every),
            on.fleet(every),
            on.scale(every),
            on.job(every, every),
            *_queue(on.work_queue(), takes=True),
            on.beat("scheduler", every),
        ),
        "worker": (
            on.tokens(every),
            on.events(every),
            on.blocks(every, every),
            *(on.rtc(verb, every) for verb in ("copy", "commit", "populate", "query")),
            on.link(every),
            *(on.beat(part, every) for part in _WORKER_PARTS),
            *(on.down(part, every) for part in _WORKER_PARTS),
        ),
        "cache": (
            on.blocks_dump(every),
            on.arena(every, every),
            on.link(every),
            on.beat("cache", every),
        ),
        "operator": (asked, on.scaling(every)),
    }
    subscribe: dict[str, tuple[str, ...]] = {
        "gateway": (on.prompt(every), on.tokens(every), on.line(every), *pulse, asked),
        "scheduler": (
            on.request(every),
            on.events(every),
            on.cancel(every),
            on.blocks(every, every),
            on.arena(every, every),
            on.demand(every),
            on.fleet(every),
            on.scaling(every),
            *pulse,
            asked,
        ),
        "worker": (
            on.task(every),
            on.scale(every),
            on.cancel(every),
            on.blocks_dump(every),
            on.rtc("free"),
            on.link(every),
            *pulse,
            asked,
        ),
        "cache": (
            on.rtc(every),
            on.rtc(every, every),
            on.blocks(every, every),
            on.arena(every, every),
            on.blocks_dump(every),
            on.link(every),
            *pulse,
            asked,
        ),
        "operator": (on.fleet(every), *pulse),
    }
    writes, reads = _TABLES[kind]
    return Permissions(
        publish=(
            *publish[kind],
            *(subject for name in (*writes, *reads) for subject in _reading(on.table(name))),
            *(subject for name in writes for subject in _writing(on.table(name))),
        ),
        subscribe=(
            *subscribe[kind],
            *(f"_INBOX.{inbox}.>" for inbox in _INBOXES.get(kind, (kind,))),
        ),
        answers=_ANSWERS.get(kind, 1),
    )


def _queue(stream: str, *, takes: bool) -> tuple[str, ...]:
    """JetStream's own subjects for opening the work queue, and for taking and settling what is in it."""
    api = "$JS.API"
    opening = (f"{api}.STREAM.CREATE.{stream}", f"{api}.STREAM.INFO.{stream}")
    if not takes:
        return opening
    return (
        *opening,
        f"{api}.CONSUMER.CREATE.{stream}.>",
        f"{api}.CONSUMER.DURABLE.CREATE.{stream}.*",
        f"{api}.CONSUMER.INFO.{stream}.*",
        f"{api}.CONSUMER.MSG.NEXT.{stream}.*",
        f"$JS.ACK.{stream}.>",
    )


def _reading(bucket: str) -> tuple[str, ...]:
    """JetStream's own subjects for opening (created when missing), reading and watching one bucket."""
    stream = f"KV_{bucket}"
    api = "$JS.API"
    return (
        f"{api}.STREAM.CREATE.{stream}",
        f"{api}.STREAM.INFO.{stream}",
        f"{api}.STREAM.MSG.GET.{stream}",
        f"{api}.DIRECT.GET.{stream}",
        f"{api}.DIRECT.GET.{stream}.>",
        f"{api}.CONSUMER.CREATE.{stream}",
        f"{api}.CONSUMER.CREATE.{stream}.>",
        f"{api}.CONSUMER.INFO.{stream}.*",
        f"{api}.CONSUMER.DELETE.{stream}.*",
        f"$JS.FC.{stream}.>",
    )


def _writing(bucket: str) -> tuple[str, ...]:
    """The subjects for writing and removing entries of one bucket."""
    return f"$KV.{bucket}.>", f"$JS.API.STREAM.PURGE.KV_{bucket}"
