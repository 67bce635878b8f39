"""The nats-server configuration, for the embedded bus and for compose: one user per service with the least subjects.

All services share one account. Programs that publish prompts get an account each, which imports the prompt service
and nothing else; the account is the tenant, and the server itself names it in the `Nats-Request-Info` header of each
prompt. A password is a literal or a `$VARIABLE` that an included file defines. This module must not know who writes
passwords, or how the server is started.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from shared.permissions import KINDS, permissions
from shared.subjects import Subjects

MAX_PAYLOAD: Final = (
    "8MB"  # 128k token ids take 0.65 MB; the default of 1 MB would refuse a long prompt's hashes
)
ACCOUNT: Final = "DEEPFLOW"
PRODUCER: Final = "producer"  # the outside account of docker-compose.yml
# A gateway streams into a producer's reply subject for as long as a request may live.
_ANSWERS_EXPIRE: Final = "1h"


@dataclass(frozen=True, slots=True, kw_only=True)
class NatsConfig:
    """One server. `passwords` holds one per kind of service, `producers` one per outside account."""

    realm: str
    host: str
    port: int  # -1: any free one
    store_dir: str
    passwords: Mapping[str, str]
    producers: Mapping[str, str] = field(default_factory=dict)
    ports_dir: str = ""  # the server writes its addresses here
    monitor: str = ""  # host:port of the health page
    include: str = ""  # a file relative to this one, with the variables

    def render(self) -> str:
        """The text of the configuration file."""
        lines = [
            "# Made by `python -m deepflow.deploy.nats_config`; a test compares the two.",
            f"host: {_quoted(self.host)}",
            f"port: {self.port}",
            f"max_payload: {MAX_PAYLOAD}",
            # A slow reader is cut off and reconnects; it must not make the server grow.
            "max_pending: 64MB",
            "write_deadline: 10s",
            f"jetstream {{ store_dir: {_quoted(self.store_dir)} }}",
        ]
        if self.monitor:
            lines.append(f"http: {self.monitor}")
        if self.ports_dir:
            lines.append(f"ports_file_dir: {_quoted(self.ports_dir)}")
        if self.include:
            lines.append(f"include {_quoted(self.include)}")
        lines += ["accounts {", f"  {ACCOUNT} {{", "    jetstream: enabled", "    users: ["]
        for kind in KINDS:
            lines += self._user(kind)
        lines += ["    ]"]
        prompt = Subjects(self.realm).prompt("*")
        if self.producers:
            accounts = ", ".join(_quoted(account) for account in self.producers)
            lines.append(
                f"    exports: [{{ service: {_quoted(prompt)}, response_type: stream, accounts: [{accounts}] }}]"
            )
        lines.append("  }")
        for account, password in self.producers.items():
            lines += [
                f"  {_quoted(account)} {{",
                f"    users: [{{ user: {_quoted(account)}, password: {_secret(password)} }}]",
                f"    imports: [{{ service: {{ account: {ACCOUNT}, subject: {_quoted(prompt)} }} }}]",
                "  }",
            ]
        lines.append("}")
        return "\n".join(lines) + "\n"

    def _user(self, kind: str) -> list[str]:
        may = permissions(kind, self.realm)
        return [
            "      {",
            f"        user: {kind}, password: {_secret(self.passwords[kind])}",
            "        permissions: {",
            *_listed("publish", may.publish),
            *_listed("subscribe", may.subscribe),
            f'          allow_responses: {{ max: {may.answers}, expires: "{_ANSWERS_EXPIRE}" }}',
            "        }",
            "      }",
        ]


def password_variable(user: str) -> str:
    """The name under which an included file defines the password of `user`."""
    return f"{user.upper()}_PASSWORD"


def compose() -> NatsConfig:
    """The server of docker-compose.yml: `deepflow.deploy.init` writes the included file."""
    return NatsConfig(
        realm="deepflow",
        host="0.0.0.0",  # inside the compose network, which publishes nothing of it
        port=4222,
        store_dir="/var/lib/nats",
        monitor="127.0.0.1:8222",
        passwords={kind: f"${password_variable(kind)}" for kind in KINDS},
        producers={PRODUCER: f"${password_variable(PRODUCER)}"},
        include="secret/passwords.conf",
    )


def _listed(name: str, subjects: tuple[str, ...]) -> list[str]:
    return [
        f"          {name}: {{ allow: [",
        *(f"            {_quoted(subject)}" for subject in subjects),
        "          ] }",
    ]


def _secret(password: str) -> str:
    return password if password.startswith("$") else _quoted(password)


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


if __name__ == "__main__":
    import sys

    sys.stdout.write(compose().render())
