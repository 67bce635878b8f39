"""What a person types or imports: the command line, the benches, and `from deepflow import LLM`."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from services.worker.flowserve.llm import FlowServe as LLM

__all__ = ["LLM"]


def __getattr__(name: str) -> object:
    """`LLM` is FlowServe as a library, imported only when asked for: it brings torch."""
    if name != "LLM":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from services.worker.flowserve.llm import FlowServe

    return FlowServe
