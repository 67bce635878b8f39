"""Triton's kernels without a GPU, each way in a process of its own (`python -m tests.worker.kernels WAY`): Triton
decides when it is imported whether it interprets, and an import cannot be taken back.

`interpret` runs them on the CPU through Triton's interpreter, in fp32 and fp16: it cannot multiply bfloat16. `compile`
makes machine code for cards that are not here.
"""

from __future__ import annotations

import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from services.worker.flowserve.config import ModelConfig
from services.worker.flowserve.device.cpu import CpuDevice
from services.worker.flowserve.device.cuda import CudaDevice
from services.worker.flowserve.torch_decoder import TorchDecoder
from tests.worker.drive import Driver, random_ids
from tests.worker.tiny import make_tiny

CPU = torch.device("cpu")


def interpret(root: Path) -> None:
    """The kernels against plain torch for heads of several sizes and numbers, then a whole model in them."""
    from services.worker.flowserve.device.paged_kernels import KernelKV, check

    class Interpreted(CudaDevice):
        def _kind_of_kv(self, *_: Any) -> type[KernelKV]:
            return KernelKV

    folder = make_tiny(root / "tiny", "mistral", with_tokenizer=False, sliding_window=48)
    config = ModelConfig.from_folder(folder)
    config = replace(config, windows=(48, None))
    check(config, 16, torch.float16, CPU)
    check(replace(config, num_heads=6, num_kv_heads=2, head_dim=24), 32, torch.float32, CPU)
    check(replace(config, num_heads=3, num_kv_heads=3, head_dim=16), 16, torch.float32, CPU)
    prompt = random_ids(70)
    greedy = []
    for device in (CpuDevice(), Interpreted(CPU)):
        decoder = TorchDecoder.load(folder, dtype="fp32", cache_dir=root, device=device)
        greedy.append(Driver(decoder).greedy(prompt, 6, 40))
    assert greedy[0] == greedy[1]
    assert isinstance(decoder.kv, KernelKV)


def compile_(root: Path) -> None:
    """Machine code of all kernels for Ampere and Hopper, in bf16, for heads of 128."""
    os.environ["TRITON_CACHE_DIR"] = str(root)
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from services.worker.flowserve.device import paged_kernels as kernels

    config = ModelConfig.from_folder(make_tiny(root / "tiny", with_tokenizer=False))
    config = replace(config, num_heads=32, num_kv_heads=8, head_dim=128)
    shape = kernels._Shape(config, torch.bfloat16)
    pointers = {
        **dict.fromkeys(("x", "k", "v", "layer", "queries", "out"), "*bf16"),
        **dict.fromkeys(("cos", "sin", "parts", "tops", "totals"), "*fp32"),
        **dict.fromkeys(("items", "positions", "tables", "cells"), "*i32"),
        "scale": "fp32",
    }
    heads = {"NUM_KV": 8, "DIM": 128, "DIM_WIDE": 128}
    attend = heads | {"GROUP": 4, "PAGE": 16, "KEYS": shape.num_keys, "PRECISION": shape.precision}
    jobs: list[tuple[Any, dict[str, Any]]] = [
        (kernels._rotate_rows, {"HEADS": 32, "HEADS_WIDE": 32, "HALF": 64, "HALF_WIDE": 64}),
        (kernels._write_rows, heads | {"NUM_KV_WIDE": 8, "PAGE": 16}),
        (kernels._attend_items, attend | {"ROWS": shape.single_rows, "IS_SPLIT": True}),
        (kernels._attend_items, attend | {"ROWS": shape.tile_rows, "IS_SPLIT": False}),
        (kernels._join_parts, {"HEADS": 32, "DIM": 128, "DIM_WIDE": 128, "MOST": 32}),
    ]
    for capability in (80, 90):
        for kernel, constants in jobs:
            names = kernel.arg_names
            types = {name: pointers.get(name, "i32") for name in names}
            if constants.get("IS_SPLIT") is False:  # then these are the result once more
                types |= dict.fromkeys(("parts", "tops", "totals"), "*bf16")
            source = ASTSource(
                fn=kernel,
                signature=types | dict.fromkeys(constants, "constexpr"),
                constexprs={(names.index(name),): value for name, value in constants.items()},
            )
            options = {"num_warps": 4, "num_stages": 2}
            compiled = triton.compile(source, GPUTarget("cuda", capability, 32), options)
            assert compiled.asm["cubin"]
            assert compiled.metadata.shared < 100 << 10


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as root:
        {"interpret": interpret, "compile": compile_}[sys.argv[1]](Path(root))
