"""A store in an S3-compatible bucket. This module must not know what is in the files."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterator
from datetime import timedelta
from typing import Final

import obstore
from obstore.exceptions import BaseError, NotFoundError
from obstore.store import S3Store as Bucket

from shared.errors import DeepFlowError, NotFound, Unavailable
from shared.store.base import Stored, check_key, is_key
from shared.store.settings import S3Settings

_PART_BYTES: Final = 8 * 1024 * 1024
_RANGE_BYTES: Final = 4 * 1024 * 1024
_TIMEOUT_S: Final = 30  # of one request with all it brings
_RETRIES: Final = 4
_RETRY_S: Final = 15
_CONCURRENCY: Final = 2  # parts in hand of one upload


class S3Store:
    """See `base.Store`. An upload that fails leaves nothing visible; parts of one that was killed are the bucket's
    lifecycle rules to remove."""

    def __init__(self, settings: S3Settings) -> None:
        self._bucket = Bucket(
            settings.bucket,
            prefix=settings.prefix or None,
            endpoint=settings.endpoint or None,
            region=settings.region,
            access_key_id=settings.access_key_id,
            secret_access_key=settings.secret_access_key,
            virtual_hosted_style_request=False,
            client_options={
                "allow_http": settings.endpoint.startswith("http://"),
                "timeout": timedelta(seconds=_TIMEOUT_S),
            },
            retry_config={"max_retries": _RETRIES, "retry_timeout": timedelta(seconds=_RETRY_S)},
        )

    async def put(self, key: str, chunks: AsyncIterator[bytes]) -> int:
        """See Store."""
        counted = _Counted(chunks)
        try:
            with _unavailable():
                await obstore.put_async(
                    self._bucket,
                    check_key(key),
                    counted,
                    chunk_size=_PART_BYTES,
                    max_concurrency=_CONCURRENCY,
                )
        except Exception as error:
            if counted.error is not None:  # it came out of the library as something else
                raise counted.error from None
            if isinstance(error, NotFound):
                raise Unavailable("the store's bucket does not exist") from error
            raise
        return counted.num_bytes

    async def get(self, key: str) -> AsyncIterator[bytes]:
        """See Store. Asks for one range after the other: who reads slowly holds no request open, which would end."""
        with _unavailable():
            size = (await obstore.head_async(self._bucket, check_key(key)))["size"]
        for start in range(0, size, _RANGE_BYTES):
            with _unavailable():
                chunk = await obstore.get_range_async(
                    self._bucket, key, start=start, end=min(size, start + _RANGE_BYTES)
                )
            yield bytes(chunk)

    async def delete(self, key: str) -> None:
        """See Store."""
        with _unavailable(), contextlib.suppress(FileNotFoundError, NotFoundError):
            await obstore.delete_async(self._bucket, check_key(key))

    async def listing(self, prefix: str) -> list[Stored]:
        """See Store."""
        found = []
        with _unavailable():
            async for page in obstore.list(self._bucket, check_key(prefix)):
                found += [
                    Stored(one["path"], one["size"], one["last_modified"].timestamp())
                    for one in page
                    if is_key(one["path"])
                ]
        return sorted(found, key=lambda one: one.key)


class _Counted:
    """What goes up, counted, with the error that ended it."""

    def __init__(self, chunks: AsyncIterator[bytes]) -> None:
        self._chunks = chunks
        self.num_bytes = 0
        self.error: Exception | None = None

    def __aiter__(self) -> _Counted:
        return self

    async def __anext__(self) -> bytes:
        try:
            chunk = await anext(self._chunks)
        except StopAsyncIteration:
            raise
        except Exception as error:
            self.error = error
            raise
        self.num_bytes += len(chunk)
        return chunk


@contextlib.contextmanager
def _unavailable() -> Iterator[None]:
    try:
        yield
    except (FileNotFoundError, NotFoundError) as error:
        raise NotFound("there is no such file in the store") from error
    except DeepFlowError:
        raise
    except (BaseError, OSError) as error:
        raise Unavailable(f"the store cannot be reached: {type(error).__name__}") from error
