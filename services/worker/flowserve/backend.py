"""What computes a model: the device, the kernels, the arithmetic, and over how many executors.

Picked once, from settings and machine, before anything is loaded: a model's KV pages are named by it. torch takes
seconds to import, so it is imported here and only where it is going to compute. This module must not know how anything
computes.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from services.worker.flowserve import native_decoder
from services.worker.flowserve.config import ModelConfig, ModelError
from services.worker.flowserve.device import pick
from services.worker.flowserve.prepared import RECIPE, open_prepared
from services.worker.flowserve.rank import Rank
from services.worker.settings import (
    DTYPES,
    KERNELS,
    default_threads,
    num_cores,
    read_graphs,
    read_kernels,
)
from shared import log
from shared.config import Reader, Settings

if TYPE_CHECKING:
    from services.worker.flowserve.decoder import Decoder
    from services.worker.flowserve.prepared import Prepared
    from services.worker.flowserve.spmd.crew import Loss


# By measure: W8A8 in groups (CPU) puts fp32's likeliest token first 97 times in 100, by output and row (accelerators)
# 94 times, which misses the bar of 95.
DEFAULT_DTYPES: Final = {"cpu": "w8a8", "cuda": "bf16", "npu": "bf16"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Backend:
    """`device` is cpu, cuda or npu, `kernels` native or torch, `dtype` w8a8, fp32 or bf16; `tp` slices of `pp` stages.
    `why` says in words why this device and these kernels."""

    config: ModelConfig
    device: str
    kernels: str
    dtype: str
    tp: int
    pp: int
    why: str

    @classmethod
    def pick(
        cls,
        config: ModelConfig,
        *,
        device: str = "auto",
        dtype: str = "auto",
        kernels: str = "auto",
        tp: int = 1,
        pp: int = 1,
    ) -> Backend:
        """`auto` stands for what is best here. Raises ModelError for an unknown device, dtype or kernels, for native
        ones that cannot be had, and where the model cannot be cut into `tp` times `pp` parts."""
        if dtype not in DTYPES:
            raise ModelError(f"unknown dtype {dtype!r}; served are {', '.join(DTYPES)}")
        if kernels not in KERNELS:
            raise ModelError(f"unknown kernels {kernels!r}; there are {', '.join(KERNELS)}")
        picked = pick.pick(device)
        if dtype == "auto":
            dtype = DEFAULT_DTYPES[picked.name]
        Rank(tp_size=tp, pp_size=pp).part(config)
        why_not = _why_not_native(config, picked.name, dtype, tp * pp)
        if kernels == "native" and why_not is not None:
            raise ModelError(f"native kernels are wished for, but {why_not}")
        native = kernels != "torch" and why_not is None
        reasons = [f"{picked.name}: {picked.why}"]
        if not native:
            reasons.append(f"torch: {'it is set' if kernels == 'torch' else why_not}")
        return cls(
            config=config,
            device=picked.name,
            kernels="native" if native else "torch",
            dtype=dtype,
            tp=tp,
            pp=pp,
            why="; ".join(reasons),
        )

    @classmethod
    def of(
        cls,
        folder: Path,
        *,
        device: str = "auto",
        dtype: str = "auto",
        kernels: str | None = None,
        tp: int = 1,
        pp: int = 1,
    ) -> Backend:
        """As `pick`, for the model in `folder`; `kernels`, where None, are what `DEEPFLOW_KERNELS` says."""
        kernels = kernels or read_kernels(Reader(os.environ))
        config = ModelConfig.from_folder(folder)
        return cls.pick(config, device=device, dtype=dtype, kernels=kernels, tp=tp, pp=pp)

    @property
    def page(self) -> int:
        """Tokens of a KV block, and of a page that is hashed."""
        return pick.PAGES[self.device]

    @property
    def arithmetic(self) -> str:
        """What tokens and KV pages depend on besides weights and page: pages of equal names may stand for each other.
        They are the same bits in the CPU's W8A8; on accelerators, and in floats, bits depend on batch and library too.
        """
        if self.kernels == "native":
            return f"native {native_decoder.VERSION} {RECIPE}"
        computes = "torch" if self.device == "cpu" else f"torch {self.device}"
        parts = "" if self.tp == self.pp == 1 else f" tp{self.tp} pp{self.pp}"
        recipe = RECIPE if (self.device, self.dtype) == ("cpu", "w8a8") else self.dtype
        return f"{computes}{parts} {recipe}"

    @property
    def bytes_per_block(self) -> int:
        """Of the executor with the most layers, as its decoder says once it is loaded."""
        if self.kernels == "native":
            return native_decoder.bytes_per_block(self.config, self.page)
        stages = (Rank(tp_size=self.tp, pp=pp, pp_size=self.pp) for pp in range(self.pp))
        most = max((rank.part(self.config) for rank in stages), key=lambda part: part.num_layers)
        return most.kv_bytes(self.page, 4 if self.dtype == "fp32" else 2)

    def load(
        self,
        folder: Path,
        *,
        threads: int | None = None,
        cache_dir: Path | None = None,
        prepared: Prepared | None = None,
        on_loss: Callable[[Loss], None] | None = None,
    ) -> Decoder:
        """The decoder for the model in `folder`; prepared weights, unless the caller has them, are kept below
        `cache_dir`, by default what `DEEPFLOW_CACHE` says. Of several executors each has `threads`, by default this
        machine's share (`default_threads`), and `on_loss` is `SpmdDecoder.start`'s. Raises ModelError naming what is
        wrong with the model or missing for the device."""
        native = self.kernels == "native"
        threads = threads or default_threads(num_cores(), self.tp * self.pp, native=native)
        cache_dir = cache_dir or Settings.read(Reader(os.environ))["cache_dir"]
        decoder: Decoder
        if native:
            prepared = prepared or open_prepared(folder, cache_dir)
            decoder = native_decoder.NativeDecoder(prepared, threads=threads)
        else:
            decoder = self._load_torch(folder, threads, cache_dir, on_loss)
        log.note("decoder_loaded", model=folder.name, decoder=decoder.description, why=self.why)
        return decoder

    def _load_torch(
        self,
        folder: Path,
        threads: int,
        cache_dir: Path,
        on_loss: Callable[[Loss], None] | None,
    ) -> Decoder:
        import torch

        from services.worker.flowserve.spmd.decoder import SpmdDecoder
        from services.worker.flowserve.torch_decoder import TorchDecoder

        torch.set_num_threads(threads)
        device = pick.open_device(self.device)
        if self.tp * self.pp == 1:
            return TorchDecoder.load(
                folder,
                dtype=self.dtype,
                cache_dir=cache_dir,
                device=device,
                graphs=read_graphs(Reader(os.environ)),
            )
        return SpmdDecoder.start(
            folder,
            dtype=self.dtype,
            cache_dir=cache_dir,
            device=device,
            tp=self.tp,
            pp=self.pp,
            threads=threads,
            on_loss=on_loss,
        )


def load_decoder(
    folder: Path,
    *,
    dtype: str = "auto",
    device: str = "auto",
    threads: int | None = None,
    cache_dir: Path | None = None,
    kernels: str | None = None,
) -> Decoder:
    """The decoder for the model in `folder`, as `Backend.of` and `Backend.load` find it. Raises ModelError."""
    backend = Backend.of(folder, device=device, dtype=dtype, kernels=kernels)
    return backend.load(folder, threads=threads, cache_dir=cache_dir)


def _why_not_native(config: ModelConfig, device: str, dtype: str, num_ranks: int) -> str | None:
    """The reason in words, None if there is none."""
    if device != "cpu":
        return f"they compute on the CPU, not on {device}"
    if dtype != "w8a8":
        return f"they compute w8a8, not {dtype}"
    if num_ranks > 1:
        return "they compute in one process"
    if config.moe is not None:
        return "they know no mixtures of experts"
    if config.head_dim > native_decoder.MAX_HEAD_DIM:
        return f"they hold heads of up to {native_decoder.MAX_HEAD_DIM}, not {config.head_dim}"
    return native_decoder.available()
