"""The only place where a subject is built or parsed.

Grammar: `<realm>.v1.<noun>[.<model>][.<instance>]`, general to specific. Variable tokens keep `[A-Za-z0-9_-]` and
write every other byte as `=XX` (upper-case hex): reversible, legal as NATS tokens and as KV keys. This module must not
know who may send what on a subject: that is `permissions`.
"""

from __future__ import annotations

import re
from typing import Final

VERSION: Final = "v1"
QUEUE_GATEWAY: Final = "gateway"
QUEUE_SCHEDULER: Final = "scheduler"
QUEUE_CACHE: Final = "cache"

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


def is_token(value: str) -> bool:
    """Whether `value` can be part of a subject, so that somebody of this name can be asked."""
    try:
        return bool(encode(value))
    except ValueError:
        return False


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
        """JE -> TE: `Task` -> `Accepted | Failure`; gateway -> TE: `Replay` -> `Replayed | Failure`;
        JE -> pod: `Training` -> `Accepted | Failure`."""
        return self._join("task", te)

    def tokens(self, client: str) -> str:
        """TE -> client: `Tokens`; JE -> client: `Progress`, and `Tokens` that fail a parked request."""
        return self._join("tokens", client)

    def events(self, je: str) -> str:
        """TE -> JE: `TaskEnded`, `Prefilled`; pod -> JE: `TrainingEnded`."""
        return self._join("events", je)

    def cancel(self, te: str) -> str:
        """Gateway, JE -> TE: `Cancel`. To a JE's own name: forget a parked request."""
        return self._join("cancel", te)

    def beat(self, kind: str, instance: str) -> str:
        """Everyone -> who cares, 5 Hz (2 Hz at rest): `Beat`, `TeBeat` or `PodBeat`."""
        return self._join("beat", kind, instance)

    def down(self, kind: str, instance: str) -> str:
        """Pod host -> all: `Down`."""
        return self._join("down", kind, instance)

    def blocks(self, model: str, te: str) -> str:
        """TE -> JEs and caches: `BlockEvents`."""
        return self._join("blocks", model, te)

    def arena(self, model: str, cache: str) -> str:
        """Cache -> JEs and caches: `BlockEvents` of its host's arena."""
        return self._join("arena", model, cache)

    def blocks_dump(self, te: str) -> str:
        """JE, cache -> TE, cache, request-reply: `BlocksQuery` -> `BlocksDump`."""
        return self._join("dump", te)

    def rtc(self, verb: str, host: str | None = None) -> str:
        """The cache services. Of any (queue group `cache`): `match`, for whoever looks in from outside. Of all,
        published: `free`. Of one host's: `copy`, `commit` (published), `populate`, `query`."""
        return self._join("rtc", verb) if host is None else self._join("rtc", verb, host)

    def link(self, instance: str) -> str:
        """TE, cache -> TE, cache, request-reply: `LinkRequest` -> `LinkOffer`, `LeaseRequest` -> `Leased`,
        `LeaseRelease` -> `LeaseReleased`; of a TE also `WeightsRequest` -> `WeightsOffer`."""
        return self._join("link", instance)

    def demand(self, model: str) -> str:
        """JE -> cluster manager: `Demand`."""
        return self._join("demand", model)

    def fleet(self, model: str) -> str:
        """Cluster manager -> JEs, command line: `Fleet`."""
        return self._join("fleet", model)

    def scale(self, pod: str) -> str:
        """Cluster manager -> pod host, request-reply: `ScaleOrder` -> `Scaled | Failure`."""
        return self._join("scale", pod)

    def scaling(self, model: str) -> str:
        """Gateway, command line -> JEs (queue group `scheduler`), request-reply: `SetScaling` -> `ScalingEntry |
        Failure`."""
        return self._join("scaling", model)

    def line(self, gateway: str) -> str:
        """JE -> gateway, request-reply: `Line` -> `LineDone | Failure`."""
        return self._join("line", gateway)

    def job(self, kind: str, id_: str) -> str:
        """Gateway, JE -> JEs, kept in the work queue until one of them is done with it: `JobCall`."""
        return self._join("job", kind, id_)

    def work_queue(self) -> str:
        """The name of the JetStream stream that holds the jobs (not a subject)."""
        return f"{encode(self.realm)}-work".replace("=", "_")

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
