"""Where files are kept: `DEEPFLOW_FILES` and `DEEPFLOW_FILES_S3_*`. Gateways and JEs must be told the same."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from shared.config import ConfigError, Reader
from shared.store.base import Store
from shared.store.local import LocalStore


@dataclass(frozen=True, slots=True, kw_only=True)
class S3Settings:
    """A bucket; the secret never shows in a repr. An empty endpoint is Amazon's own of the region."""

    bucket: str
    prefix: str
    endpoint: str
    region: str
    access_key_id: str
    secret_access_key: str

    def __repr__(self) -> str:
        return f"S3Settings(bucket={self.bucket!r}, prefix={self.prefix!r}, endpoint={self.endpoint!r})"


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreSettings:
    """A bucket, or a folder where none is named."""

    folder: Path
    s3: S3Settings | None = None

    @classmethod
    def read(cls, reader: Reader, home_dir: Path) -> StoreSettings:
        """Raises ConfigError naming the variable."""
        folder = reader.path("DEEPFLOW_FILES", home_dir / "files")
        bucket = reader.text("DEEPFLOW_FILES_S3_BUCKET", "")
        if not bucket:
            return cls(folder=folder)
        secret = reader.secret("DEEPFLOW_FILES_S3_SECRET_ACCESS_KEY")
        key_id = reader.text("DEEPFLOW_FILES_S3_ACCESS_KEY_ID", "")
        if not key_id or not secret:
            raise ConfigError(
                "DEEPFLOW_FILES_S3_BUCKET needs DEEPFLOW_FILES_S3_ACCESS_KEY_ID and"
                " DEEPFLOW_FILES_S3_SECRET_ACCESS_KEY (or ..._FILE)"
            )
        endpoint = reader.text("DEEPFLOW_FILES_S3_ENDPOINT", "")
        if endpoint and not endpoint.startswith(("http://", "https://")):
            raise ConfigError(f"DEEPFLOW_FILES_S3_ENDPOINT={endpoint!r} is not a http(s) URL")
        return cls(
            folder=folder,
            s3=S3Settings(
                bucket=bucket,
                prefix=reader.text("DEEPFLOW_FILES_S3_PREFIX", ""),
                endpoint=endpoint,
                region=reader.text("DEEPFLOW_FILES_S3_REGION", "us-east-1"),
                access_key_id=key_id,
                secret_access_key=secret,
            ),
        )

    def open(self) -> Store:
        """The store. Raises ConfigError where the library for buckets is not installed."""
        if self.s3 is None:
            return LocalStore(self.folder)
        try:
            from shared.store.s3 import S3Store  # an extra that most installations do without
        except ImportError as error:
            raise ConfigError(
                "DEEPFLOW_FILES_S3_BUCKET needs the extra s3: pip install 'deepflow[s3]'"
            ) from error
        return S3Store(self.s3)
