"""What a gateway can be told by its environment."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from services.gateway.auth import LOCAL, OPERATOR, Keys, is_loopback
from shared.config import ConfigError, Reader, Settings
from shared.store.settings import StoreSettings

MIB: Final = 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewaySettings(Settings):
    """Address, keys, and the bounds of one gateway; replicas may differ."""

    host: str = "127.0.0.1"
    port: int = 8000  # 0: any free port
    keys: Keys
    max_body_bytes: int = 8 * MIB
    body_budget_bytes: int = 256 * MIB  # of all requests in flight; past it they are answered 429
    max_in_flight: int = 1024  # API calls at once; one more is answered 429
    deadline_s: float = 600.0  # of one request, end to end
    park_s: float = 60.0  # of it, without any TE of the model
    keep_alive_s: float = 10.0  # a silent stream gets a comment so often
    read_timeout_s: float = 30.0  # for a request's body to arrive
    num_tokenizers: int = 2
    tokenize_timeout_s: float = 30.0
    num_contexts: int = 64  # explicit context caches of one tenant at once
    context_tokens: int = 131_072  # in all of them together: their pages are not evicted
    priority_tenants: frozenset[str]  # may ask for the service tier `priority`
    store: StoreSettings
    max_file_bytes: int = 200 * MIB
    max_uploads: int = 16  # at once, of all tenants
    tenant_files: int = 1000
    tenant_file_bytes: int = 10 * 1024 * MIB
    tenant_batches: int = 64  # not yet over
    max_lines: int = 256  # of batches at once

    @classmethod
    def read(cls, reader: Reader) -> dict[str, Any]:
        """Raises ConfigError naming the variable; a reachable address without keys is one."""
        host = reader.text("DEEPFLOW_HOST", "127.0.0.1")
        keys = _keys(reader)
        priority = reader.text("DEEPFLOW_PRIORITY_TENANTS", f"{LOCAL},{OPERATOR}")
        if not keys and not is_loopback(host):
            raise ConfigError(
                f"DEEPFLOW_HOST={host} can be reached from other machines: set DEEPFLOW_API_KEYS"
                " (tenant:key,...) or DEEPFLOW_API_KEYS_FILE"
            )
        settings = Settings.read(reader)
        return {
            **settings,
            "host": host,
            "port": reader.integer("DEEPFLOW_PORT", 8000, 0, 65535),
            "keys": keys,
            "max_body_bytes": reader.integer("DEEPFLOW_MAX_BODY_BYTES", 8 * MIB, 1024, 1024 * MIB),
            "body_budget_bytes": reader.integer(
                "DEEPFLOW_BODY_BUDGET_BYTES", 256 * MIB, 1024, 1024 * 1024 * MIB
            ),
            "max_in_flight": reader.integer("DEEPFLOW_MAX_IN_FLIGHT", 1024, 1, 1_000_000),
            "deadline_s": reader.number("DEEPFLOW_DEADLINE_S", 600.0, 0.1, 86_400.0),
            "park_s": reader.number("DEEPFLOW_PARK_S", 60.0, 0.0, 86_400.0),
            "keep_alive_s": reader.number("DEEPFLOW_KEEP_ALIVE_S", 10.0, 0.05, 3600.0),
            "read_timeout_s": reader.number("DEEPFLOW_READ_TIMEOUT_S", 30.0, 0.1, 3600.0),
            "num_tokenizers": reader.integer(
                "DEEPFLOW_TOKENIZERS", min(4, max(2, (os.cpu_count() or 2) // 4)), 1, 64
            ),
            "tokenize_timeout_s": reader.number("DEEPFLOW_TOKENIZE_TIMEOUT_S", 30.0, 0.1, 3600.0),
            "num_contexts": reader.integer("DEEPFLOW_CONTEXTS", 64, 0, 4096),
            "priority_tenants": frozenset(map(str.strip, priority.split(","))),
            "store": StoreSettings.read(reader, settings["home_dir"]),
            "max_file_bytes": reader.integer("DEEPFLOW_FILE_BYTES", 200 * MIB, 1, 2**40),
            "max_uploads": reader.integer("DEEPFLOW_UPLOADS", 16, 1, 4096),
            "tenant_files": reader.integer("DEEPFLOW_TENANT_FILES", 1000, 0, 10_000),
            "tenant_file_bytes": reader.integer(
                "DEEPFLOW_TENANT_FILE_BYTES", 10 * 1024 * MIB, 0, 2**50
            ),
            "tenant_batches": reader.integer("DEEPFLOW_TENANT_BATCHES", 64, 0, 10_000),
            "max_lines": reader.integer("DEEPFLOW_BATCH_LINES", 256, 1, 65_536),
            "context_tokens": reader.integer("DEEPFLOW_CONTEXT_TOKENS", 131_072, 0, 2**31),
        }


def _keys(reader: Reader) -> Keys:
    inline = reader.text("DEEPFLOW_API_KEYS", "")
    file = reader.text("DEEPFLOW_API_KEYS_FILE", "")
    if inline and file:
        raise ConfigError("set DEEPFLOW_API_KEYS or DEEPFLOW_API_KEYS_FILE, not both")
    name = "DEEPFLOW_API_KEYS"
    if file:
        name = "DEEPFLOW_API_KEYS_FILE"
        try:
            inline = Path(file).read_text()
        except OSError as error:
            raise ConfigError(f"{name}: {error}") from error
        if not inline.strip():
            raise ConfigError(f"{name}: {file} holds no key")
    try:
        return Keys.parse(inline)
    except ValueError as error:
        raise ConfigError(f"{name}: {error}") from error
