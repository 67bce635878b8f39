"""What `docker compose up` needs before the services: secrets in volumes, and the models. Run by the service `init`.

Each service reads its own secrets only: `<secrets>/<service>` is a volume of its own. Secrets that are there are
kept, so that a restart changes nothing. This module must not know how the services are started.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from deepflow.deploy.nats_config import PRODUCER, password_variable
from shared.config import ConfigError, Reader, Settings
from shared.errors import DeepFlowError
from shared.permissions import KINDS


@dataclass(frozen=True, slots=True, kw_only=True)
class InitSettings(Settings):
    """What to prepare, and for whom."""

    secrets_dir: Path
    models: tuple[str, ...]
    public_url: str  # of the gateway, as the host sees it
    owner: int  # user id of the services, -1: whoever runs this

    @classmethod
    def read(cls, reader: Reader) -> dict[str, Any]:
        """The fields' values. Raises ConfigError."""
        models = reader.text("DEEPFLOW_MODELS", "smollm2-135m").split(",")
        return Settings.read(reader) | {
            "secrets_dir": reader.path("DEEPFLOW_SECRETS", Path("/run/deepflow")),
            "models": tuple(model.strip() for model in models if model.strip()),
            "public_url": reader.text("DEEPFLOW_PUBLIC_URL", "http://127.0.0.1:8000"),
            "owner": reader.integer("DEEPFLOW_OWNER", -1, -1, 2**31),
        }

    @classmethod
    def load(cls, env: Mapping[str, str]) -> Self:
        """The settings in an environment. Raises ConfigError."""
        return cls(**cls.read(Reader(env)))


def prepare(settings: InitSettings) -> str:
    """Write what is missing; the key to the gateway."""
    passwords = {
        user: _kept(settings.secrets_dir / user / "nats-password") for user in (*KINDS, PRODUCER)
    }
    variables = (
        f"{password_variable(user)}: {json.dumps(value)}\n" for user, value in passwords.items()
    )
    _write(settings.secrets_dir / "nats" / "passwords.conf", "".join(variables))
    key = _kept(settings.secrets_dir / "operator" / "api-key", "sk-")
    # Whoever reads the volume of `init` runs the place, so the one key is the operator's.
    _write(settings.secrets_dir / "gateway" / "api-keys", f"operator:{key}\n")
    _hand_over(settings.secrets_dir, settings.owner)
    return key


def fetch(settings: InitSettings) -> None:
    """Pull the models that are not there yet. Raises DeepFlowError."""
    from deepflow.cli.home import Home
    from deepflow.cli.models import ensure

    home = Home(settings.home_dir, settings.cache_dir)
    for model in settings.models:
        ensure(home, model)
    _hand_over(settings.cache_dir, settings.owner)


def main() -> int:
    """Prepare, fetch, and say how to talk to the gateway. The exit code."""
    try:
        settings = InitSettings.load(os.environ)
        key = prepare(settings)
        fetch(settings)
    except (ConfigError, DeepFlowError, OSError) as error:
        sys.stderr.write(f"deepflow init: {error}\n")
        return 1
    body = {"model": settings.models[0], "messages": [{"role": "user", "content": "Hello!"}]}
    sys.stdout.write(
        f"The key to the gateway: {key}\n"
        f"curl {settings.public_url}/v1/chat/completions -H 'Authorization: Bearer {key}' "
        f"-H 'Content-Type: application/json' -d '{json.dumps(body)}'\n"
    )
    return 0


def _kept(path: Path, prefix: str = "") -> str:
    """The secret in a file, made if there is none."""
    try:
        if text := path.read_text().strip():
            return text
    except FileNotFoundError:
        pass
    text = prefix + secrets.token_hex(24)
    _write(path, text + "\n")
    return text


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.new")
    draft.touch(mode=0o600)
    draft.write_text(text)
    draft.replace(path)


def _hand_over(folder: Path, owner: int) -> None:
    """Make everything under `folder` the services' own."""
    if owner < 0:
        return
    for path in (folder, *folder.rglob("*")):
        with contextlib.suppress(FileNotFoundError):  # a running worker renames what it prepares
            os.chown(path, owner, owner, follow_symlinks=False)


if __name__ == "__main__":
    sys.exit(main())
