"""Which decoder serves a model: native kernels or torch, by arithmetic, processor and what is wished.

torch takes seconds to import, so it is imported here and only where it is going to compute. This module must not know
how either computes.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from services.worker.flowserve import native_decoder
from services.worker.flowserve.config import ModelConfig, ModelError
from services.worker.flowserve.prepared import RECIPE, open_prepared
from services.worker.settings import DTYPES, KERNELS, default_threads, num_cores, read_kernels
from shared import log
from shared.config import Reader, Settings

if TYPE_CHECKING:
    from services.worker.flowserve.decoder import Decoder


def load_decoder(
    folder: Path,
    *,
    dtype: str = "w8a8",
    threads: int | None = None,
    cache_dir: Path | None = None,
    kernels: str | None = None,
) -> Decoder:
    """The decoder for the model in `folder`, whose W8A8 weights are prepared below `cache_dir`.

    `kernels` is auto, native or torch. It and `cache_dir`, where None, are what `DEEPFLOW_KERNELS` and `DEEPFLOW_CACHE`
    say, `threads` this machine's share (`default_threads`). Raises ModelError naming what is wrong with the model, or
    why native kernels cannot be had.
    """
    reader = Reader(os.environ)
    kernels = kernels or read_kernels(reader)
    cache: Path = cache_dir or Settings.read(reader)["cache_dir"]
    config = ModelConfig.from_folder(folder)
    decoder: Decoder
    native = choose_kernels(config, dtype=dtype, kernels=kernels) == "native"
    threads = threads or default_threads(num_cores(), 1, native=native)
    if native:
        decoder = native_decoder.NativeDecoder(open_prepared(folder, cache), threads=threads)
        log.note("decoder_loaded", model=folder.name, decoder=decoder.description)
        return decoder
    import torch

    from services.worker.flowserve.device.cpu import CpuDevice
    from services.worker.flowserve.torch_decoder import TorchDecoder

    torch.set_num_threads(threads)
    decoder = TorchDecoder.load(folder, dtype=dtype, cache_dir=cache, device=CpuDevice())
    why = "wished" if kernels == "torch" else _why_not_native(config, dtype)
    log.note("decoder_loaded", model=folder.name, decoder=decoder.description, why_not_native=why)
    return decoder


def choose_kernels(config: ModelConfig, *, dtype: str, kernels: str) -> str:
    """native or torch. Raises ModelError for an unknown dtype or kernels, or native ones that cannot be had."""
    if dtype not in DTYPES:
        raise ModelError(f"unknown dtype {dtype!r}; served are {', '.join(DTYPES)}")
    if kernels not in KERNELS:
        raise ModelError(f"unknown kernels {kernels!r}; there are {', '.join(KERNELS)}")
    if kernels == "torch":
        return "torch"
    why_not = _why_not_native(config, dtype)
    if why_not is None:
        return "native"
    if kernels == "native":
        raise ModelError(f"native kernels are wished for, but {why_not}")
    return "torch"


def arithmetic(config: ModelConfig, *, dtype: str, kernels: str) -> str:
    """What tokens and KV pages depend on besides weights and page size: equal names compute equal bits."""
    chosen = choose_kernels(config, dtype=dtype, kernels=kernels)
    if chosen == "native":
        chosen = native_decoder.arithmetic()
    return f"{chosen} {RECIPE}" if dtype == "w8a8" else f"{chosen} {dtype}"


def bytes_per_block(config: ModelConfig, page: int, *, dtype: str, kernels: str) -> int:
    """What the decoder that would be loaded says, before it is."""
    if choose_kernels(config, dtype=dtype, kernels=kernels) == "native":
        return native_decoder.bytes_per_block(config, page)
    elements = config.num_layers * 2 * config.num_kv_heads * page * config.head_dim
    return elements * (4 if dtype == "fp32" else 2)


def _why_not_native(config: ModelConfig, dtype: str) -> str | None:
    """The reason in words, None if there is none."""
    if dtype != "w8a8":
        return f"they compute w8a8, not {dtype}"
    if config.head_dim > native_decoder.MAX_HEAD_DIM:
        return f"they hold heads of up to {native_decoder.MAX_HEAD_DIM}, not {config.head_dim}"
    return native_decoder.available()
