"""Ascend NPUs: on the bus, in /dev, their driver, CANN, and whether torch-npu and torch are a pair.

What CANN goes with torch-npu 2.13.0 its wheel does not say: that stays unknown here, too.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from deepflow.doctor.finding import Finding, State
from deepflow.doctor.host import Host
from deepflow.doctor.torch_probe import Seen
from services.worker.flowserve.device.torch_build import TorchBuild

_VENDOR: Final = "0x19e5"
_CLASSES: Final = ("0x1200",)  # processing accelerators
_MANAGERS: Final = ("/dev/davinci_manager", "/dev/devmm_svm", "/dev/hisi_hdc")
_HOME: Final = "/usr/local/Ascend"
_CANN_HOMES: Final = ("ascend-toolkit/latest", "cann", "latest")  # below the Ascend folder
_NEEDS: Final = ("npu",)
_EXTRA: Final = "pip install 'deepflow[npu]'"


def examine(host: Host, build: TorchBuild | None, torch_npu: str | None) -> list[Finding]:
    """Cards, driver, CANN, and the versions of torch-npu and torch; `torch_npu` None: not installed."""
    card = _card(host)
    findings = [card]
    if card.state is State.OK:
        findings += [_managers(host), _driver(host), _npu_smi(host)]
    cann = _cann(host)
    findings += [cann, _pair(build, torch_npu)]
    if torch_npu is not None and cann.state is State.OK:
        findings.append(_pairing(torch_npu))
    return findings


def judge(seen: Seen) -> Finding:
    """What torch itself saw."""
    if seen.error or not seen.names:
        return Finding(
            subject="torch.npu",
            state=State.MISSING,
            text=seen.error or "torch sees no npu device",
            remedy="mend what is said above; ASCEND_RT_VISIBLE_DEVICES must name a device",
            needed_by=_NEEDS,
        )
    return Finding(subject="torch.npu", state=State.OK, text=", ".join(seen.names))


def _card(host: Host) -> Finding:
    nodes = host.nodes("davinci")
    if nodes:
        visible = host.env.get("ASCEND_RT_VISIBLE_DEVICES")
        text = ", ".join(nodes)
        if visible is None:
            return Finding(subject="Ascend NPU", state=State.OK, text=text)
        if not visible[:1].isdigit():
            return Finding(
                subject="Ascend NPU",
                state=State.MISSING,
                text=f"{text}, but ASCEND_RT_VISIBLE_DEVICES={visible!r} hides all",
                remedy="unset it, or set it to numbers with commas between: 0,1",
                needed_by=_NEEDS,
            )
        return Finding(subject="Ascend NPU", state=State.OK, text=f"{text}, visible: {visible}")
    on_bus = host.num_pci(_VENDOR, _CLASSES)
    if on_bus:
        return Finding(
            subject="Ascend NPU",
            state=State.MISSING,
            text=f"{on_bus} on the bus, none in /dev",
            remedy="install the NPU driver; in a container, hand /dev/davinciN in",
            needed_by=_NEEDS,
        )
    return Finding(
        subject="Ascend NPU", state=State.MISSING, text="no Ascend NPU here", needed_by=_NEEDS
    )


def _managers(host: Host) -> Finding:
    subject = "NPU device nodes"
    absent = [node for node in _MANAGERS if not host.path(node).exists()]
    if absent:
        return Finding(
            subject=subject,
            state=State.MISSING,
            text=f"{', '.join(absent)} not there",
            remedy="hand them into the container beside /dev/davinciN",
            needed_by=_NEEDS,
        )
    nodes = (*host.nodes("davinci"), *_MANAGERS)
    closed = [node for node in nodes if not host.may_open(node)]
    if closed:
        return Finding(
            subject=subject,
            state=State.MISSING,
            text=f"this user may not open {', '.join(closed)}",
            remedy="join the group that owns them (HwHiAiUser); in a container, `group_add`",
            needed_by=_NEEDS,
        )
    return Finding(subject=subject, state=State.OK, text=", ".join(_MANAGERS))


def _driver(host: Host) -> Finding:
    installed = host.text("/etc/ascend_install.info") or ""
    where = re.search(r"^Driver_Install_Path_Param=(\S+)", installed, re.MULTILINE)
    path = f"{where[1] if where else _HOME}/driver/version.info"
    version = re.search(r"^[Vv]ersion=\[?([^\s\]]+)", host.text(path) or "", re.MULTILINE)
    if version is None:
        return Finding(
            subject="NPU driver",
            state=State.MISSING,
            text=f"{path} is not there, or says no version",
            remedy=f"install the NPU driver; in a container, mount {_HOME}/driver",
            needed_by=_NEEDS,
        )
    return Finding(subject="NPU driver", state=State.OK, text=version[1])


def _npu_smi(host: Host) -> Finding:
    """For people; nothing needs it."""
    ran = host.run("npu-smi", "info")
    if ran is None or ran.code != 0:
        found = "not on PATH" if ran is None else "does not answer"
        return Finding(subject="npu-smi", state=State.NOTE, text=found)
    rows = re.findall(r"^\|\s*\d+\s+(\S+)\s+\|\s*(\w+)\s+\|", ran.text, re.MULTILINE)
    ill = [f"{name} ({health})" for name, health in rows if health != "OK"]
    if ill:
        return Finding(subject="npu-smi", state=State.NOTE, text=f"not well: {', '.join(ill)}")
    text = ", ".join(name for name, _ in rows) or "answers, but lists no card that we can read"
    return Finding(subject="npu-smi", state=State.OK, text=text)


def _cann(host: Host) -> Finding:
    """CANN must be installed and its set_env.sh sourced: torch-npu loads its libraries by those variables."""
    home = host.env.get("ASCEND_HOME_PATH") or host.env.get("ASCEND_TOOLKIT_HOME")
    if home:
        version = _cann_version(host, home)
        if not host.path(home).is_dir():
            return Finding(
                subject="CANN",
                state=State.MISSING,
                text=f"ASCEND_HOME_PATH is {home}, which is not there",
                remedy="install CANN, then source its set_env.sh",
                needed_by=_NEEDS,
            )
        return Finding(
            subject="CANN", state=State.OK, text=f"{version or 'of unknown version'} in {home}"
        )
    for name in _CANN_HOMES:
        home = f"{_HOME}/{name}"
        if host.path(home).is_dir():
            found = _cann_version(host, home) or "of unknown version"
            return Finding(
                subject="CANN",
                state=State.MISSING,
                text=f"{found} in {home}, but its variables are not set",
                remedy=f"source {_set_env(host, home)}",
                needed_by=_NEEDS,
            )
    return Finding(
        subject="CANN",
        state=State.MISSING,
        text="not installed (ASCEND_HOME_PATH is not set)",
        remedy="install Huawei's CANN toolkit and the operator package of this NPU, then source its set_env.sh",
        needed_by=_NEEDS,
    )


def _set_env(host: Host, home: str) -> str:
    """The script beside or above the folder."""
    for folder in (Path(home), Path(home).parent):
        if host.path(folder / "set_env.sh").is_file():
            return str(folder / "set_env.sh")
    return f"{home}/set_env.sh"


def _cann_version(host: Host, home: str) -> str | None:
    """From the file that the installer leaves, as torch-npu itself reads it, else from version.cfg."""
    for pattern in ("ascend_*_install.info", "*/ascend_*_install.info"):
        for path in host.glob(f"{home}/{pattern}"):
            text = host.text(f"/{path.relative_to(host.root)}") or ""
            found = re.search(r"^version=(\S+)", text, re.MULTILINE)
            if found:
                return found[1]
    # toolkit_running_version=[7.6.0.1.220:8.1.RC1]: the part's own version, then CANN's
    found = re.search(r"_version=\[[^:\]]*:([^\]]+)\]", host.text(f"{home}/version.cfg") or "")
    return found[1] if found else None


def _pair(build: TorchBuild | None, torch_npu: str | None) -> Finding:
    """torch-npu goes with the one torch of its own number, and not with one that has CUDA."""
    subject = "torch-npu"
    if torch_npu is None:
        return Finding(
            subject=subject,
            state=State.MISSING,
            text="not installed",
            remedy=_EXTRA,
            needed_by=_NEEDS,
        )
    if build is None:
        return Finding(
            subject=subject,
            state=State.MISSING,
            text=f"{torch_npu}, without torch",
            remedy=_EXTRA,
            needed_by=_NEEDS,
        )
    wanted = re.match(r"\d+\.\d+\.\d+", torch_npu)
    if wanted is None or wanted[0] != build.release:
        return Finding(
            subject=subject,
            state=State.MISSING,
            text=f"{torch_npu} does not go with torch {build.version}",
            remedy=f"pip install torch=={wanted[0] if wanted else torch_npu}+cpu",
            needed_by=_NEEDS,
        )
    if build.cuda is not None:
        return Finding(
            subject=subject,
            state=State.MISSING,
            text=f"{torch_npu} refuses torch {build.version}, which has CUDA {build.cuda}",
            remedy=f"pip install torch=={build.release}+cpu --index-url https://download.pytorch.org/whl/cpu",
            needed_by=_NEEDS,
        )
    return Finding(subject=subject, state=State.OK, text=f"{torch_npu}, with torch {build.version}")


def _pairing(torch_npu: str) -> Finding:
    return Finding(
        subject="CANN and torch-npu",
        state=State.UNKNOWN,
        text=f"the CANN that pairs with torch-npu {torch_npu} is not stated in its wheel: unknown",
        remedy="if operators are missing, try a newer CANN; `deepflow verify --device npu` tells",
    )
