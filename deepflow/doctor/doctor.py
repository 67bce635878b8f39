"""The examination from start to end: cheap looks first, and torch only where a device may really be there.

`require` is the same for a command that was told a device: it refuses at once, and says what is missing.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from deepflow.doctor import ascend, nvidia, software
from deepflow.doctor.finding import Examination, Finding
from deepflow.doctor.host import Host
from deepflow.doctor.torch_probe import Seen, installed, probe
from services.worker.flowserve.device.torch_build import TorchBuild
from shared.errors import Unavailable


def here() -> Host:
    """This machine, with this process's environment."""
    return Host(Path("/"), os.environ)


def examine(host: Host, cache_dir: Path, device: str) -> Examination:
    """Look at everything for `device`: auto, cpu, cuda or npu."""
    build = TorchBuild.installed()
    findings = [
        *software.examine(host, cache_dir),
        *_with_probe(host, "cuda", nvidia.examine(host, build), nvidia.judge),
        *_with_probe(
            host, "npu", ascend.examine(host, build, installed("torch-npu")), ascend.judge
        ),
    ]
    return Examination.of(device, findings)


def require(host: Host, device: str) -> None:
    """Raises Unavailable naming all that `device` (cuda or npu) misses here; auto and cpu need no more than a worker
    that is installed. Whether torch can use the device shows when it is opened, seconds later."""
    findings: list[Finding] = []
    if device == "cuda":
        findings = nvidia.examine(host, TorchBuild.installed())
    elif device == "npu":
        findings = ascend.examine(host, TorchBuild.installed(), installed("torch-npu"))
    missing = Examination.of(device, findings).missing
    if missing:
        lines = [
            f"  {finding.subject}: {finding.text}{f' -> {finding.remedy}' if finding.remedy else ''}"
            for finding in missing
        ]
        raise Unavailable(f"--device {device} cannot be used here:\n" + "\n".join(lines))


def _with_probe(
    host: Host, device: str, findings: list[Finding], judge: Callable[[Seen], Finding]
) -> list[Finding]:
    """torch takes seconds to load, and with a broken driver forever: only where nothing else is missing."""
    if any(finding.blocks(device) for finding in findings):
        return findings
    return [*findings, judge(probe(host, device))]
