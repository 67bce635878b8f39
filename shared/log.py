"""Logs: structlog to one JSON line each on standard error.

Events are past-tense snake_case constants plus fields (`task_dispatched`, te=, blocks=). Prompts and token ids are
never logged. This module must not know any event.
"""

from __future__ import annotations

import logging
import sys
from typing import cast

import orjson
import structlog

Logger = structlog.typing.FilteringBoundLogger


def configure(level: str = "info") -> None:
    """Set up logging for this process; calling it again changes the level of every logger."""
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(serializer=orjson.dumps),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(
            logging.getLevelNamesMapping()[level.upper()]
        ),
        logger_factory=structlog.BytesLoggerFactory(sys.stderr.buffer),
        cache_logger_on_first_use=False,  # else a later level would not reach the loggers in use
    )
    # Libraries log through the standard library; their warnings belong in the same stream.
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(name)s: %(message)s")


def get(**context: object) -> Logger:
    """A logger with `context` bound to each of its lines."""
    return cast("Logger", structlog.get_logger(**context))


def note(event: str, **fields: object) -> None:
    """One line at level info from code that also runs as a library: dropped where nobody has set up logging, for
    structlog would then print it on standard output."""
    if structlog.is_configured():
        get().info(event, **fields)
