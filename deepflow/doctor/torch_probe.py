"""What is installed, and what torch sees of a device, asked in a process of its own.

A driver that hangs or crashes takes that process with it and nothing else. This module must not know cards or drivers.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Final

from deepflow.doctor.host import Host

_PROBE_S: Final = 90.0  # the first operation on a device may compile
_ANSWER: Final = "deepflow-probe "  # begins the line that is ours among what libraries print


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What torch saw: a name for each device that computed a sum rightly, or the reason why there is none."""

    names: tuple[str, ...] = ()
    error: str = ""


def installed(package: str) -> str | None:
    """The version of a distribution; None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def probe(host: Host, device: str) -> Seen:
    """What torch sees of `device`, cuda or npu."""
    # torch loads torch_npu as it is loaded itself, unless it is told not to.
    autoload = {"TORCH_DEVICE_BACKEND_AUTOLOAD": "1" if device == "npu" else "0"}
    ran = host.run(
        sys.executable, "-m", "deepflow.doctor.probe", device, env=autoload, timeout_s=_PROBE_S
    )
    if ran is None:
        return Seen(error=f"{sys.executable} is gone")
    if ran.code is None:
        return Seen(error=f"torch did not answer within {_PROBE_S:.0f} s")
    for line in ran.text.splitlines():
        if line.startswith(_ANSWER):
            answer = json.loads(line.removeprefix(_ANSWER))
            return Seen(names=tuple(answer["names"]), error=answer["error"])
    last = (ran.text.strip().splitlines() or [""])[-1]
    if ran.code < 0:
        return Seen(error=f"the process that loaded torch died of signal {-ran.code} ({last})")
    return Seen(error=last or f"the process that loaded torch ended with code {ran.code}")


def answer(names: list[str], error: str) -> str:
    """The line by which `probe` is told; the other end of it."""
    return _ANSWER + json.dumps({"names": names, "error": error})
