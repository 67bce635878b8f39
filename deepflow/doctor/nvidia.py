"""NVIDIA cards: on the bus, in /dev, their driver, and whether this torch was built for it."""

from __future__ import annotations

import re
from typing import Final

from deepflow.doctor.finding import Finding, State
from deepflow.doctor.host import Host
from deepflow.doctor.torch_probe import Seen
from services.worker.flowserve.device.torch_build import TorchBuild

_VENDOR: Final = "0x10de"
_CLASSES: Final = (
    "0x0300",
    "0x0302",
)  # displays and 3D controllers; not their sound or their bridges
_NEEDS: Final = ("cuda",)


def examine(host: Host, build: TorchBuild | None) -> list[Finding]:
    """Cards, driver and torch's build."""
    smi = host.run(
        "nvidia-smi",
        "--query-gpu=name,memory.total,compute_cap,driver_version",
        "--format=csv,noheader",
    )
    cards = smi.text.strip().splitlines() if smi is not None and smi.code == 0 else []
    return [_card(host, cards), *_driver(host, cards, smi is not None), _torch(host, build)]


def judge(seen: Seen) -> Finding:
    """What torch itself saw."""
    if seen.error or not seen.names:
        return Finding(
            subject="torch.cuda",
            state=State.MISSING,
            text=seen.error or "torch sees no cuda device",
            remedy="mend what is said above; in a container, hand the devices in",
            needed_by=_NEEDS,
        )
    return Finding(subject="torch.cuda", state=State.OK, text=", ".join(seen.names))


def _card(host: Host, cards: list[str]) -> Finding:
    if cards:
        names = [", ".join(part.strip() for part in card.split(",")[:3]) for card in cards]
        return Finding(
            subject="NVIDIA card",
            state=State.OK,
            text="; ".join(f"{name} compute capability" for name in names),
        )
    nodes = host.nodes("nvidia")
    if nodes:
        return Finding(subject="NVIDIA card", state=State.OK, text=", ".join(nodes))
    on_bus = host.num_pci(_VENDOR, _CLASSES)
    if on_bus:
        return Finding(
            subject="NVIDIA card",
            state=State.MISSING,
            text=f"{on_bus} on the bus, none in /dev",
            remedy="install NVIDIA's driver; in a container, start it with the cards (`--gpus all`)",
            needed_by=_NEEDS,
        )
    return Finding(
        subject="NVIDIA card", state=State.MISSING, text="no NVIDIA card here", needed_by=_NEEDS
    )


def _driver(host: Host, cards: list[str], has_smi: bool) -> list[Finding]:
    """Nothing to say where there is neither a driver nor a card."""
    kernel = re.search(
        r"Kernel Module.*?\s(\d+\.\d+(?:\.\d+)?)\s", host.text("/proc/driver/nvidia/version") or ""
    )
    version = cards[0].split(",")[-1].strip() if cards else kernel[1] if kernel else ""
    if version:
        text = version if cards else f"{version} (nvidia-smi does not answer)"
        state = State.OK if cards else State.NOTE
        return [Finding(subject="NVIDIA driver", state=state, text=text)]
    if not (has_smi or host.nodes("nvidia") or host.num_pci(_VENDOR, _CLASSES)):
        return []
    return [
        Finding(
            subject="NVIDIA driver",
            state=State.MISSING,
            text="not loaded",
            remedy="install NVIDIA's driver for this kernel",
            needed_by=_NEEDS,
        )
    ]


def _torch(host: Host, build: TorchBuild | None) -> Finding:
    """The driver must know at least the CUDA major version that torch was built for."""
    subject = "torch for CUDA"
    if build is None or build.cuda is None:
        remedy = "pip install 'deepflow[cuda]'"
        if build is not None:  # the CPU build satisfies the extra
            remedy = f"pip install --force-reinstall torch=={build.release} (from PyPI: the CUDA build on Linux)"
        return Finding(
            subject=subject,
            state=State.MISSING,
            text="torch is not installed"
            if build is None
            else f"torch {build.version} has no CUDA",
            remedy=remedy,
            needed_by=_NEEDS,
        )
    shown = host.run("nvidia-smi")
    driver = re.search(r"CUDA Version: (\d+)\.(\d+)", shown.text if shown is not None else "")
    text = f"torch {build.version} is built for CUDA {build.cuda}"
    if driver is None:
        return Finding(
            subject=subject, state=State.UNKNOWN, text=f"{text}; what the driver knows is unknown"
        )
    knows = f"{driver[1]}.{driver[2]}"
    if int(driver[1]) < int(build.cuda.partition(".")[0]):
        return Finding(
            subject=subject,
            state=State.MISSING,
            text=f"{text}, the driver knows CUDA {knows} at most",
            remedy="a newer driver, or torch for an older CUDA from https://download.pytorch.org/whl/",
            needed_by=_NEEDS,
        )
    return Finding(subject=subject, state=State.OK, text=f"{text}, the driver knows CUDA {knows}")
