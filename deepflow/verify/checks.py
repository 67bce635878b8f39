"""`python -m deepflow.verify.checks`: the checks that need the device, one question each, in a process of its own.

Whoever asks survives whatever a driver does to this process. This module must not know how a report is made.
"""

from __future__ import annotations

import contextlib
import os
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from deepflow.bench.child import conversation
from deepflow.verify.compare import compare
from deepflow.verify.replay import Blocks, Trace, choose, replay, step
from services.worker.flowserve.backend import Backend, load_decoder
from services.worker.flowserve.config import ModelConfig, ModelError
from services.worker.flowserve.decoder import Decoder, Floats
from services.worker.flowserve.device.pick import PAGES, open_device

if TYPE_CHECKING:
    from services.worker.flowserve.device.device import Device
    from services.worker.flowserve.torch_decoder import TorchDecoder

_NUM_TOKENS: Final = 12  # chosen after each prompt
_CHUNK: Final = 48  # rows of a prompt in a step: no divisor of a page, nor a page of it

Answer = dict[str, Any]


class Refused(Exception):
    """The device, or this version of the engine, does not do what was asked: a reason, not a failure."""


def main() -> None:
    """Answer until nobody asks."""
    with conversation() as (questions, answer):
        for question in questions:
            answer(ask(question))


def ask(question: dict[str, Any]) -> Answer:
    """One check. Whatever it raises is its answer."""
    check = _CHECKS[question.pop("check")]
    try:
        return {"state": "passed", **check(**question)}
    except Refused as error:
        return {"state": "skipped", "reason": str(error)}
    except Exception as error:
        traceback.print_exc()
        return {"state": "failed", "reason": " ".join(f"{type(error).__name__}: {error}".split())}


# --------------------------------------------------------------------------------------------------------- checks


def devices(device: str) -> Answer:
    """How many there are, their names and their memory."""
    import torch

    from services.worker.flowserve.device.device import as_graph_device

    first = open_device(device)
    num = 1 if device == "cpu" else int(getattr(torch, device).device_count())
    found = []
    for index in range(num):
        one = first if index == 0 else open_device(device, index)
        memory = one.memory()
        found.append(
            {"name": one.description, "free_bytes": memory.free, "total_bytes": memory.total}
        )
    return {"devices": found, "num_devices": num, "has_graphs": as_graph_device(first) is not None}


def parity(
    device: str, folder: str, dtype: str, cache_dir: str, tp: int = 1, pp: int = 1
) -> Answer:
    """What would serve, batched as an engine batches, against the CPU in fp32, one sequence at a time."""
    page = PAGES[device]
    traces = reference(Path(folder), cache_dir, page)
    with _loaded(folder, dtype, device, cache_dir, tp, pp) as decoder:
        answer = against(traces, decoder, page, dtype)
        return {"computes": decoder.description, **answer}


def graphs(device: str, folder: str, dtype: str, cache_dir: str) -> Answer:
    """See `graphs_on`."""
    return graphs_on(open_device(device), Path(folder), dtype, Path(cache_dir))


def graphs_on(device: Device, folder: Path, dtype: str, cache_dir: Path) -> Answer:
    """The same steps give the same tokens whether those that only decode are captured or eager."""
    traces = reference(folder, str(cache_dir), device.page)
    eager = _in_torch(device, folder, dtype, cache_dir, graphs=False)
    as_traces = [
        Trace(trace.prompt, trace.chosen, logits)
        for trace, logits in zip(traces, _replayed(eager, device.page, traces), strict=True)
    ]
    captured = _in_torch(device, folder, dtype, cache_dir, graphs=True)
    answer = against(as_traces, captured, device.page, dtype)
    if captured.num_graphs == 0:
        raise AssertionError("nothing was captured")
    return {"num_graphs": captured.num_graphs, **answer}


def blocks(device: str, folder: str, dtype: str, cache_dir: str) -> Answer:
    """See `blocks_on`."""
    return blocks_on(open_device(device), Path(folder), dtype, Path(cache_dir))


def blocks_on(device: Device, folder: Path, dtype: str, cache_dir: Path) -> Answer:
    """KV blocks copied to the host and back to other places serve a sequence as the first ones did, bit for bit."""
    decoder = _in_torch(device, folder, dtype, cache_dir, graphs=False)
    prompt = _prompts(decoder.config, device.page)[-1]
    pool = Blocks(decoder, device.page, 2 * len(prompt) + 2, 2)
    table = pool.take(len(prompt) + 1)
    step(decoder, prompt, 0, table)
    data = decoder.kv.read_blocks(table)
    expected = step(decoder, [7], len(prompt), table)
    moved = pool.take(len(prompt) + 1)
    decoder.kv.write_blocks(moved, data)
    if not np.array_equal(data, decoder.kv.read_blocks(moved)):
        raise AssertionError("what was written to blocks is not what is read from them")
    found = step(decoder, [7], len(prompt), moved)
    if not np.array_equal(expected, found):
        furthest = float(np.abs(expected - found).max())
        raise AssertionError(f"moved blocks give other logits, up to {furthest:.3g} away")
    return {"num_blocks": len(table), "bytes_per_block": int(data.shape[1])}


_CHECKS: Final[dict[str, Callable[..., Answer]]] = {
    "devices": devices,
    "parity": parity,
    "graphs": graphs,
    "blocks": blocks,
}


# ---------------------------------------------------------------------------------------------------------- parts


def reference(folder: Path, cache_dir: str, page: int) -> list[Trace]:
    """What the CPU's torch path chooses in fp32, after prompts that a cache of such pages finds hard."""
    try:
        config = ModelConfig.from_folder(folder)
    except ModelError as error:
        raise Refused(error.message) from error
    decoder = load_decoder(
        folder, dtype="fp32", device="cpu", kernels="torch", cache_dir=Path(cache_dir)
    )
    prompts = _prompts(config, page)
    num_tokens = sum(len(prompt) + _NUM_TOKENS for prompt in prompts)
    pool = Blocks(decoder, PAGES["cpu"], num_tokens, len(prompts))
    return [choose(decoder, pool, prompt, _NUM_TOKENS) for prompt in prompts]


def against(traces: list[Trace], decoder: Decoder, page: int, dtype: str) -> Answer:
    """The same tokens on `decoder`, compared. Raises AssertionError with what is wrong."""
    routed = decoder.config.moe is not None
    difference = compare(traces, _replayed(decoder, page, traces), dtype, routed=routed)
    if difference.faults:
        raise AssertionError("; ".join(difference.faults))
    return dict(difference.numbers)


def _prompts(config: ModelConfig, page: int) -> list[list[int]]:
    """Of lengths at which something begins or ends: a token, a page, a chunk."""
    rng = Random(page)
    lengths = (1, page - 1, page, page + 1, _CHUNK + 1, 2 * page + 7)
    return [rng.choices(range(1, config.vocab), k=length) for length in lengths]


def _replayed(decoder: Decoder, page: int, traces: list[Trace]) -> list[Floats]:
    num_tokens = sum(len(trace.rows) for trace in traces)
    return replay(decoder, Blocks(decoder, page, num_tokens, len(traces)), traces, chunk=_CHUNK)


@contextlib.contextmanager
def _loaded(
    folder: str, dtype: str, device: str, cache_dir: str, tp: int, pp: int
) -> Iterator[Decoder]:
    """The decoder that would serve, and the end of its executors."""
    try:
        backend = Backend.of(Path(folder), dtype=dtype, device=device, tp=tp, pp=pp)
        decoder = backend.load(Path(folder), cache_dir=Path(cache_dir))
    except ModelError as error:
        raise Refused(error.message) from error
    try:
        yield decoder
    finally:
        close = getattr(decoder, "close", None)
        if close is not None:
            close()


def _in_torch(
    device: Device, folder: Path, dtype: str, cache_dir: Path, *, graphs: bool
) -> TorchDecoder:
    """A decoder in torch, also where native kernels would serve."""
    from services.worker.flowserve.torch_decoder import TorchDecoder

    return TorchDecoder.load(folder, dtype=dtype, cache_dir=cache_dir, device=device, graphs=graphs)


if __name__ == "__main__":
    main()
    os._exit(0)  # a device's own threads may hang at the end
