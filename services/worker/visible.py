"""Which accelerators a TE may see: its own, by the variable that their runtime reads before it is initialised.

The executors of a model take them in the order of the list, which is ascending: Ascend's runtime takes no other. Pure:
environment and number of devices are passed in. This module must not know processes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final

from services.worker.flowserve.config import ModelError

VARIABLES: Final = {"cuda": "CUDA_VISIBLE_DEVICES", "npu": "ASCEND_RT_VISIBLE_DEVICES"}
_NODES: Final = {"cuda": "nvidia[0-9]*", "npu": "davinci[0-9]*"}


def present(device: str, folder: Path = Path("/dev")) -> int:
    """How many accelerators of a kind have a device node; 0 for the CPU, and where there are no nodes (WSL)."""
    return sum(1 for _ in folder.glob(_NODES[device])) if device in _NODES else 0


def visible(
    device: str, env: Mapping[str, str], *, num_present: int, place: int, num_ranks: int
) -> dict[str, str]:
    """The environment that shows TE number `place` its `num_ranks` accelerators, of those that `env` allows.

    Where there are fewer than all TEs want, they share from the first on. Empty for the CPU, and where nothing is known
    about the devices. Raises ModelError where one TE wants more than there are.
    """
    if device not in VARIABLES:
        return {}
    variable, names = VARIABLES[device], _names(device, env, num_present)
    if not names and num_ranks == 1:
        return {}
    if len(names) < num_ranks:
        shown = f"{variable}={env[variable]}" if variable in env else f"there are {len(names)}"
        raise ModelError(f"a model over {num_ranks} executors needs as many devices, but {shown}")
    if all(name.isdigit() for name in names):  # CUDA also takes names of cards, in any order
        names.sort(key=int)
    begin = place % (len(names) // num_ranks) * num_ranks
    return {variable: ",".join(names[begin : begin + num_ranks])}


def num_places(
    device: str, env: Mapping[str, str], *, num_present: int, num_ranks: int
) -> int | None:
    """How many TEs have accelerators of their own; None for the CPU, and where nothing is known about the devices."""
    names = _names(device, env, num_present) if device in VARIABLES else []
    return len(names) // num_ranks if names else None


def _names(device: str, env: Mapping[str, str], num_present: int) -> list[str]:
    """The accelerators that `env` allows."""
    variable = VARIABLES[device]
    if variable not in env:
        return [str(index) for index in range(num_present)]
    # Set, but empty: all are hidden.
    return [name.strip() for name in env[variable].split(",") if name.strip()]
