"""What follows attention in a layer: one MLP, or a mixture of many of which each row sees few.

Where several ranks hold a layer, each computes its share, from its slice of the hidden values of every MLP; all of them
route alike. This module must not know where weights come from, or who adds up the shares.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from services.worker.flowserve.device.device import Device, Experts, Linear


class Mlp(Protocol):
    """x [T, width] -> [T, width], the share of this rank."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor: ...


@dataclass(frozen=True, slots=True)
class DenseMlp:
    """SwiGLU between two products, of which the second may want its inputs rotated, block by block."""

    device: Device
    gate_up: Linear  # width -> 2 * hidden, the gate's half first
    down: Linear  # hidden -> width
    rotation: torch.Tensor | None = None  # [block, block]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        h = self.device.swiglu(self.gate_up(x))
        if self.rotation is not None:
            h = (h.view(-1, len(self.rotation)) @ self.rotation).view(h.shape)
        return self.down(h)


@dataclass(frozen=True, slots=True)
class SharedMlp:
    """The expert that all rows share, times the sigmoid of its gate (Qwen2-MoE)."""

    mlp: Mlp
    gate: Linear  # width -> 1

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        # The sigmoid is spelt out: torch's own rounds differently where a vector ends (`device.cpu`).
        share = self.gate(x).float().neg_().exp_().add_(1.0).reciprocal_()
        return self.mlp(x).mul_(share)


@dataclass(frozen=True, slots=True)
class MoeMlp:
    """A mixture of experts: the `num_chosen` best by the router, and the shared one where there is one."""

    device: Device
    router: Linear  # width -> experts
    experts: Experts
    num_chosen: int
    renormalise: bool
    shared: SharedMlp | None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        weights, chosen = self.device.route(
            self.router(x), self.num_chosen, renormalise=self.renormalise
        )
        y = self.experts(x, weights, chosen)
        return y if self.shared is None else y.add_(self.shared(x))
