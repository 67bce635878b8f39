"""Keys, the loopback guard, and the settings that refuse to run open to the world."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from services.gateway.auth import (
    Keys,
    TenantSecrets,
    guard_loopback,
    is_loopback,
    require_json,
)
from services.gateway.settings import GatewaySettings
from shared.bus import Bus
from shared.config import ConfigError
from shared.errors import Forbidden, InvalidRequest, Unauthorized, Unavailable
from shared.messages import TenantSecret
from tests.nats_server import NatsServer


def test_keys_name_tenants() -> None:
    """A bearer key gives its tenant, a tenant may have several keys, and no key shows in a repr."""
    keys = Keys.parse("acme:k1, acme:k2\n# a comment, with: colons\noperator:k:3\n")
    assert [keys.tenant(f"Bearer {key}") for key in ("k1", "k2", "k:3")] == [
        "acme",
        "acme",
        "operator",
    ]
    assert "k1" not in repr(keys)
    for header in (None, "", "Bearer", "Bearer ", "Bearer k4", "Basic k1", "Bearer \udcff"):
        with pytest.raises(Unauthorized):
            keys.tenant(header)


@pytest.mark.parametrize("text", ["acme", "acme:", ":k1", "acme:k1,other:k1"])
def test_bad_keys_stop_the_start(text: str) -> None:
    """A malformed pair, or one key for two tenants, is an error that does not show the key."""
    with pytest.raises(ConfigError) as caught:
        GatewaySettings.load({"DEEPFLOW_API_KEYS": text})
    assert "DEEPFLOW_API_KEYS" in str(caught.value)
    assert "k1" not in str(caught.value)


def test_keys_may_come_from_a_file(tmp_path: Path) -> None:
    """DEEPFLOW_API_KEYS_FILE holds pairs, one a line; a missing or empty file stops the start."""
    file = tmp_path / "keys"
    file.write_text("acme:k1\nother:k2\n")
    settings = GatewaySettings.load({"DEEPFLOW_API_KEYS_FILE": str(file)})
    assert settings.keys.tenant("Bearer k2") == "other"
    file.write_text("\n")
    for path in (file, tmp_path / "absent"):
        with pytest.raises(ConfigError, match="DEEPFLOW_API_KEYS_FILE"):
            GatewaySettings.load({"DEEPFLOW_API_KEYS_FILE": str(path)})


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org"])
def test_no_keys_no_open_port(host: str) -> None:
    """An address others can reach needs keys."""
    with pytest.raises(ConfigError, match="DEEPFLOW_API_KEYS"):
        GatewaySettings.load({"DEEPFLOW_HOST": host})
    assert GatewaySettings.load({"DEEPFLOW_HOST": host, "DEEPFLOW_API_KEYS": "a:b"}).host == host


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("127.0.0.1", True),
        ("127.8.0.1", True),
        ("::1", True),
        ("[::1]", True),
        ("localhost", True),
        ("LOCALHOST", True),
        ("a.localhost", True),
        ("127.0.0.1.nip.io", False),
        ("0.0.0.0", False),
        ("10.0.0.1", False),
        ("", False),
    ],
)
def test_what_is_loopback(host: str, loopback: bool) -> None:
    """Only what cannot leave this machine."""
    assert is_loopback(host) is loopback


@pytest.mark.parametrize(
    ("host", "origin", "fine"),
    [
        ("127.0.0.1:8000", None, True),
        ("localhost", "http://localhost:3000", True),
        ("[::1]:8000", None, True),
        (None, None, False),
        ("evil.example", None, False),
        ("localhost@evil.example", None, False),
        ("127.0.0.1:8000", "https://evil.example", False),
        ("127.0.0.1:8000", "null", False),
        ("[", None, False),
    ],
)
def test_the_loopback_guard(host: str | None, origin: str | None, fine: bool) -> None:
    """Host and Origin must name this machine."""
    if fine:
        guard_loopback(host, origin)
    else:
        with pytest.raises(Forbidden):
            guard_loopback(host, origin)


def test_bodies_must_be_json() -> None:
    """What a cross-site form can send is refused."""
    require_json("application/json; charset=utf-8")
    for kind in ("", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
        with pytest.raises(InvalidRequest):
            require_json(kind)


async def test_a_tenants_secret_is_one_for_all_gateways(bus: Bus) -> None:
    """Gateways that ask at once get the same secret; tenants differ."""
    gateways = [TenantSecrets(bus) for _ in range(4)]
    secrets = await asyncio.gather(*(one.get("acme") for one in gateways))
    assert len(set(secrets)) == 1
    assert len(secrets[0]) == 32
    assert await gateways[0].get("other") != secrets[0]


async def test_a_secret_is_waited_for_while_the_bus_is_away(bus: Bus, nats: NatsServer) -> None:
    """A first request that comes while nats-server is started again is not lost; patience ends."""
    nats.kill()
    waiting = asyncio.create_task(TenantSecrets(bus, patience_s=30.0).get("acme"))
    with pytest.raises(Unavailable):
        await TenantSecrets(bus, patience_s=0.3).get("acme")
    assert not waiting.done()
    nats.start()
    assert len(await waiting) == 32


async def test_no_tenant_has_the_public_secret(bus: Bus) -> None:
    """What the operator shares has a secret of its own, under a name that no key and no account can take."""
    tenants = TenantSecrets(bus)
    public = await tenants.public()
    assert public == await TenantSecrets(bus).public()
    [reserved] = list(await (await bus.table("keys")).all(TenantSecret))
    with pytest.raises(Forbidden):
        await tenants.get(reserved)
    with pytest.raises(ValueError, match="tenant:key"):
        Keys.parse(f"{reserved}:k1")
    assert await tenants.get(reserved.strip(":")) != public
