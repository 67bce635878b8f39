"""What the doctor found: one line each, with the remedy, and which devices cannot do without it. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any, Final

DEVICES: Final = ("npu", "cuda", "cpu")  # what `auto` prefers, in this order


class State(StrEnum):
    """How it stands with a thing."""

    OK = "ok"
    NOTE = "note"  # works, but a person should know
    UNKNOWN = "unknown"  # nobody can say from here
    MISSING = "missing"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing looked at. `needed_by` are the devices that do not work while it is missing."""

    subject: str
    state: State
    text: str
    remedy: str = ""
    needed_by: tuple[str, ...] = ()

    def blocks(self, device: str) -> bool:
        """Whether `device` cannot be used because of it."""
        return self.state is State.MISSING and device in self.needed_by


@dataclass(frozen=True, slots=True, kw_only=True)
class Examination:
    """All that was found. `wished` is what was asked for (auto, cpu, cuda, npu), `device` what that comes to here."""

    wished: str
    device: str
    why: str
    findings: tuple[Finding, ...]

    @classmethod
    def of(cls, wished: str, findings: Sequence[Finding]) -> Examination:
        """Judge the findings. `auto` takes the first of DEVICES that nothing is missing for, else the CPU."""
        device, why = wished, "it was asked for"
        if wished == "auto":
            usable = [name for name in DEVICES if not _missing(findings, name)]
            device = usable[0] if usable else "cpu"
            others = DEVICES[: DEVICES.index(device)]
            why = "; ".join(f"no {name}: {_missing(findings, name)[0].text}" for name in others)
        return cls(wished=wished, device=device, why=why, findings=tuple(findings))

    @property
    def missing(self) -> tuple[Finding, ...]:
        """What the device needs and does not have."""
        return _missing(self.findings, self.device)

    def json(self) -> dict[str, Any]:
        """All of it, for programs."""
        return {
            "wished": self.wished,
            "device": self.device,
            "why": self.why,
            "usable": {name: not _missing(self.findings, name) for name in DEVICES},
            "findings": [asdict(finding) for finding in self.findings],
        }


def _missing(findings: Sequence[Finding], device: str) -> tuple[Finding, ...]:
    return tuple(finding for finding in findings if finding.blocks(device))
