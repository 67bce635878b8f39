"""The only place where a subject is built or parsed, and where a service's bus permissions are derived.

Grammar: `<realm>.v1.<noun>[.<model>][.<instance>]`, general to specific. Variable tokens keep `[A-Za-z0-9_-]` and
write every other byte as `=XX` (upper-case hex): reversible, legal as NATS tokens and as KV keys. This module must not
know who sends what on a subject, beyond `permissions`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

VERSION: Final = "v1"
QUEUE_GATEWAY: Final = "gateway"
QUEUE_SCHEDULER: Final = "scheduler"
QUEUE_CACHE: Final = "cache"
TABLES: Final = ("models", "registrations", "leases", "keys", "jobs")

_PLAIN: Final = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_-")
_ENCODED: Final = re.compile(r"(?:[A-Za-z0-9_-]|=[0-9A-F]{2})+")


def encode(value: str) -> str:
    """`value` as one subject token. Raises ValueError for an empty or overlong one (more than 256 bytes)."""
    raw = value.encode()
    if not raw or len(raw) > 256:
        raise ValueError(f"a subject token holds 1 to 256 bytes, got {len(raw)}")
    return "".join(chr(byte) if byte in _PLAIN else f"={byte:02X}" for byte in raw)


def decode(token: str) -> str:
    """The value that `encode` turned into `token`. Raises ValueError if it cannot have been."""
    if not _ENCODED.fullmatch(token):
        raise ValueError("not an encoded subject token")
    return re.sub(
        rb"=([0-9A-F]{2})", lambda match: bytes([int(match[1], 16)]), token.encode()
    ).decode()


class Subjects:
    """All subjects of one realm. A method per noun; `"*"` as an argument gives the wildcard."""

    def __init__(self, realm: str) -> None:
        self.realm = realm
        self._base = f"{encode(realm)}.{VERSION}"

    def _join(self, noun: str, *tokens: str) -> str:
        return ".".join((self._base, noun, *(t if t == "*" else encode(t) for t in tokens)))

    def prompt(self, model: str) -> str:
        """NATS producers -> gateway (queue group `gateway`): text or messages, JSON or msgpack; streamed reply."""
        return self._join("prompt", model)

    def request(self, model: str) -> str:
        """Gateway -> JE (queue group `scheduler`), request-reply: `Request` -> `Accepted | Failure`."""
        return self._join("request", model)

    def task(self, te: str) -> str:
        """JE -> TE: `Task` -> `Accepted | Failure`; gateway -> TE: `Replay` -> `Replayed | Failure`."""
        return self._join("task", te)

    def tokens(self, client: str) -> str:
        """TE -> client: `Tokens`; JE -> client: `Progress`, and `Tokens` that fail a parked request."""
        return self._join("tokens", client)

    def events(self, je: str) -> str:
        """TE -> JE: `TaskEnded`."""
        return self._join("events", je)

    def cancel(self, te: str) -> str:
        """Gateway, JE -> TE: `Cancel`. To a JE's own name: forget a parked request."""
        return self._join("cancel", te)

    def beat(self, kind: str, instance: str) -> str:
        """Everyone -> who cares, 5 Hz: `Beat` or `TeBeat`."""
        return self._join("beat", kind, instance)

    def down(self, kind: str, instance: str) -> str:
        """Pod host -> all: `Down`."""
        return self._join("down", kind, instance)

    def blocks(self, model: str, te: str) -> str:
        """TE -> JEs and caches: `BlockEvents`."""
        return self._join("blocks", model, te)

    def blocks_dump(self, te: str) -> str:
        """JE, cache -> TE, request-reply: `BlocksQuery` -> `BlocksDump`."""
        return self._join("dump", te)

    def rtc(self, verb: str) -> str:
        """TE, JE, gateway -> cache (queue group `cache`), request-reply: `Match` -> `Matched`."""
        return self._join("rtc", verb)

    def status(self, kind: str, instance: str) -> str:
        """Anyone -> one instance (or `all`, `all`), request-reply: `StatusQuery` -> `StatusReply`."""
        return self._join("status", kind, instance)

    def table(self, name: str) -> str:
        """The name of a KV bucket (not a subject)."""
        return f"{encode(self.realm)}-{name}".replace("=", "_")

    def parse(self, subject: str) -> tuple[str, ...]:
        """The noun and the decoded variable tokens of a subject of this realm. Raises ValueError otherwise."""
        prefix = self._base + "."
        if not subject.startswith(prefix):
            raise ValueError(f"not a subject of realm {self.realm!r}")
        noun, *tokens = subject[len(prefix) :].split(".")
        return (noun, *(decode(token) for token in tokens))


# ----------------------------------------------------------------------------------------------------- permissions

KINDS: Final = ("gateway", "scheduler", "worker", "cache", "operator")


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
            on.beat("gateway", every),
            asked,
        ),
        "scheduler": (
            on.task(every),
            on.tokens(every),
            on.cancel(every),
            on.beat("scheduler", every),
        ),
        "worker": (
            on.tokens(every),
            on.events(every),
            on.blocks(every, every),
            *(on.beat(part, every) for part in _WORKER_PARTS),
            *(on.down(part, every) for part in _WORKER_PARTS),
        ),
        "cache": (on.blocks_dump(every), on.beat("cache", every)),
        "operator": (asked,),
    }
    subscribe: dict[str, tuple[str, ...]] = {
        "gateway": (on.prompt(every), on.tokens(every), *pulse, asked),
        "scheduler": (
            on.request(every),
            on.events(every),
            on.cancel(every),
            *pulse,
            asked,
        ),
        "worker": (on.task(every), on.cancel(every), on.blocks_dump(every), *pulse, asked),
        "cache": (on.rtc(every), on.blocks(every, every), *pulse, asked),
        "operator": pulse,
    }
    writes, reads = _TABLES[kind]
    return Permissions(
        publish=(
            *publish[kind],
            "$JS.API.INFO",
            *(subject for name in (*writes, *reads) for subject in _reading(on.table(name))),
            *(f"$KV.{on.table(name)}.>" for name in writes),
        ),
        subscribe=(
            *subscribe[kind],
            *(f"_INBOX.{inbox}.>" for inbox in _INBOXES.get(kind, (kind,))),
        ),
        answers=-1 if kind == "gateway" else 1,
    )


# One bus user serves a whole worker: the pod host and the TEs that it starts.
_WORKER_PARTS: Final = ("pod", "te")
_INBOXES: Final = {"worker": _WORKER_PARTS}

# kind -> (tables it writes, tables it only reads)
_TABLES: Final[dict[str, tuple[tuple[str, ...], tuple[str, ...]]]] = {
    "gateway": (("registrations", "keys"), ("models",)),
    "scheduler": (("registrations",), ("models",)),
    "worker": (("models", "registrations"), ()),
    "cache": (("registrations",), ("models",)),
    "operator": ((), ("models", "registrations")),
}


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
