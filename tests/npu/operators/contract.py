"""What the documentation demands of a call, as values: a rule is a sentence of it, and breaking one names the sentence.

A test looks every sentence up in the wheel, so none is made up. This module must not know any operator.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch

Kernel = Callable[..., Any]
RULES: Final[list[Rule]] = []


class ContractError(ValueError):
    """A call that must not be made: on hardware it would fail, or its result could not be "
    "relied on."""


class Violation(ContractError):
    """The documentation forbids the call."""


class Undocumented(ContractError):
    """The documentation does not say what the call does, or contradicts itself about it."""


class Unsupported(ContractError):
    """Documented, but nothing a decoder needs; the reference does not model it."""


@dataclass(frozen=True)
class Rule:
    """A sentence of the documentation of `function`, word for word."""

    function: str
    sentence: str

    def __post_init__(self) -> None:
        RULES.append(self)

    def demand(self, holds: bool, found: str) -> None:
        """Raises Violation, with what was found and the sentence, unless it holds."""
        if not holds:
            raise Violation(f"{self._about(found)}")

    def undocumented(self, holds: bool, found: str) -> None:
        """Raises Undocumented, with what was found and the sentence that leaves it open, unless it holds."""
        if not holds:
            raise Undocumented(f"{self._about(found)}")

    def _about(self, found: str) -> str:
        return f"{found}; the documentation of {self.function}: “{self.sentence}”"


def modelled(function: str, **arguments: Any) -> None:
    """Raises Unsupported if any of these arguments, which the reference does not know, is given."""
    given = sorted(name for name, value in arguments.items() if value is not None)
    if given:
        raise Unsupported(
            f"{function}: {', '.join(given)} not modelled: no decoder of ours needs it"
        )


def contiguous(function: str, **tensors: torch.Tensor | None) -> None:
    """Raises Undocumented for a strided tensor: where the documentation does not allow one, "
    "it must be contiguous."""
    for name, tensor in tensors.items():
        if tensor is not None and not tensor.is_contiguous():
            raise Undocumented(
                f"{function}: {name} of strides {tensor.stride()} is not contiguous; "
                f"the documentation of {function} does not say that it may be so"
            )


def not_empty(function: str, **tensors: torch.Tensor) -> None:
    """Raises Undocumented for a tensor without elements."""
    for name, tensor in tensors.items():
        if not tensor.numel():
            raise Undocumented(f"{function}: {name} of shape {tuple(tensor.shape)} is empty")


def same_dtype(function: str, **tensors: torch.Tensor | None) -> None:
    """Raises Undocumented unless the tensors have one dtype, where mixing them is not "
    "documented."""
    dtypes = {name: tensor.dtype for name, tensor in tensors.items() if tensor is not None}
    if len(set(dtypes.values())) > 1:
        raise Undocumented(f"{function}: mixed dtypes {dtypes}")
