"""The decoder in torch, over any device: one definition for Llama, SmolLM2, Mistral, Qwen2 and Qwen3, and
for the mixtures of experts Mixtral, Qwen2-MoE and Qwen3-MoE.

A step's rows are (sequence, position) pairs of any mix of sequences, decode rows and prompt chunks alike; everything
but attention works row by row. Several executors may hold one model: then each computes its heads, hidden values and
tokens of the layers of its stage, and the stages hand the rows on. This module must not know requests, sampling, which
device it runs on, or who owns which block.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from services.worker.flowserve import pic
from services.worker.flowserve.checkpoint import Checkpoint
from services.worker.flowserve.config import ModelConfig
from services.worker.flowserve.decoder import Floats, StepInput, View
from services.worker.flowserve.device.device import (
    KV,
    Device,
    Plan,
    SplicingKV,
    as_graph_device,
)
from services.worker.flowserve.graphs import Graphs
from services.worker.flowserve.prepared import open_prepared
from services.worker.flowserve.rank import Rank
from services.worker.flowserve.rope import RotaryTable
from services.worker.flowserve.rotation import RotatedCheckpoint
from services.worker.flowserve.spmd.collective import Alone, Collective
from services.worker.flowserve.torch_weights import Layer, Weights, from_checkpoint, from_prepared


class TorchDecoder:
    """A `decoder.Decoder`, or one executor's share of it. `config` is the whole model's.

    Decode steps are replayed as graphs where the device and the collective let them, unless `graphs` is False; not in
    pipelines, whose rows come from and go to another executor between the layers.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        dtype: str,
        *,
        device: Device,
        rank: Rank | None = None,
        collective: Collective | None = None,
        graphs: bool = True,
    ) -> None:
        self.config = config
        self._weights = weights
        self._dtype = dtype
        self._device = device
        self._rank = rank or Rank()
        self._collective = collective or Alone()
        self._own = self._rank.part(config)
        self._kv: KV | None = None
        self._page = device.page
        self._rotary = RotaryTable(config)  # of splices
        may_record = graphs and self._collective.in_graphs and self._rank.pp_size == 1
        self._recorder = as_graph_device(device) if may_record else None
        self._graphs: Graphs | None = None

    @classmethod
    def load(
        cls,
        folder: Path,
        *,
        dtype: str,
        cache_dir: Path,
        device: Device,
        rank: Rank | None = None,
        collective: Collective | None = None,
        graphs: bool = True,
    ) -> TorchDecoder:
        """Reads a model folder in Hugging Face form; the CPU's W8A8 comes from prepared weights below `cache_dir`.
        Raises ModelError naming the architecture, key or tensor at fault."""
        rank = rank or Rank()
        config = ModelConfig.from_folder(folder)
        rank.part(config)  # raises before anything is read
        device.activations(dtype)
        if dtype == "w8a8" and device.reads_prepared:
            weights = from_prepared(open_prepared(folder, cache_dir), device, rank)
        elif dtype == "w8a8":
            rotated = RotatedCheckpoint(config, Checkpoint(folder))
            weights = from_checkpoint(config, rotated, dtype, device, rank)
        else:
            weights = from_checkpoint(config, Checkpoint(folder), dtype, device, rank)
        return cls(
            config,
            weights,
            dtype,
            device=device,
            rank=rank,
            collective=collective,
            graphs=graphs,
        )

    @property
    def description(self) -> str:
        """What computes, in a few words."""
        graphs = ", graphs" if self._recorder is not None else ""
        return f"{self._device.description}, {self._dtype}{graphs}"

    @property
    def timings(self) -> dict[str, float]:
        """Nobody measures here."""
        return {}

    @property
    def kv(self) -> KV:
        """The cache, once it is allocated."""
        assert self._kv is not None, "allocate comes first"
        return self._kv

    @property
    def splices(self) -> bool:
        """See `Splicer`. What other executors are told of a step has no splices."""
        return self._rank.size == 1 and isinstance(self._kv, SplicingKV)

    @property
    def num_graphs(self) -> int:
        """Graphs recorded so far."""
        return self._graphs.num_recorded if self._graphs is not None else 0

    def bytes_per_block(self, page: int) -> int:
        """Memory of one KV block of `page` positions over this executor's layers."""
        return self._device.bytes_per_block(self._own, page, self._dtype)

    @property
    def block_bytes(self) -> int:
        """See `Movable`."""
        return self.bytes_per_block(self._page)

    @property
    def memory(self) -> None:
        """See `Movable`: a block is spread over the layers' tensors."""

    def block_view(self, block: int) -> None:
        """See `Movable`."""

    def read_blocks(self, blocks: Sequence[int]) -> View:
        """See `Movable`."""
        return self.kv.read_blocks(blocks)

    def write_blocks(self, blocks: Sequence[int], data: View) -> None:
        """See `Movable`."""
        self.kv.write_blocks(blocks, data)

    def allocate(self, num_blocks: int, page: int) -> None:
        """Makes the KV cache."""
        self._page = page
        self._graphs = None  # they hold the former cache
        sizes = (self._own, num_blocks, page, self._dtype)
        if self._recorder is None:
            self._kv = self._device.allocate_kv(*sizes)
            return
        self._kv = kv = self._recorder.allocate_kv(*sizes)
        self._graphs = Graphs(
            self._recorder,
            kv,
            self._decode,
            context=self.config.context,
            vocab=self.config.vocab,
            dtype=self._device.activations(self._dtype),
            may_fail=self._rank.size == 1,
        )

    @torch.inference_mode()
    def forward(self, step: StepInput) -> Floats:
        """Computes the rows of `step`, stores their keys and values, and returns logits fp32
        [len(step.sample_rows), vocab]; no rows, in a stage that is not the last."""
        if step.splices:
            self._splice(step)
        if self._graphs is not None and (logits := self._graphs.logits(step)) is not None:
            return self._device.floats(logits)
        device, rank, none = self._device, self._rank, np.empty((0, self.config.vocab), np.float32)
        # All that goes to the device goes before the layers: a copy after them would wait for them.
        plan = self.kv.plan(step.spans)
        rows = device.tensor(np.array(step.sample_rows, np.int64)) if rank.is_last else None
        if rank.is_first:
            x = self._embed(device.tensor(np.array(step.tokens)))
        else:
            shape = (len(step.tokens), self.config.width)
            x = self._collective.recv(shape, device.activations(self._dtype))
        x = self._layers(x, plan, self.kv.layers)
        if rows is None:
            self._collective.send(x)
            return none
        return device.floats(self._logits(x[rows])) if step.sample_rows else none

    def _splice(self, step: StepInput) -> None:
        assert isinstance(self._kv, SplicingKV), "nothing is to be spliced here"
        table = self._rotary.upto(max(span.start + span.length for span in step.spans))
        for splice in step.splices:
            places = (splice.source_start, splice.start, splice.length)
            self._kv.splice(splice, pic.turn_between(*table, *places))

    def _decode(self, ids: torch.Tensor, plan: Plan) -> torch.Tensor:
        """Tokens [T] -> logits [T, vocab]: all of a step, in a model that is not in stages."""
        return self._logits(self._layers(self._embed(ids), plan, self.kv.layers))

    def _embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Tokens [T] -> [T, width]."""
        embed = self._weights.embed
        assert embed is not None
        if self._rank.tp_size == 1:
            return embed(ids)
        own = self._rank.vocab(self.config.vocab)
        is_own = (ids >= own.start) & (ids < own.stop)
        x = embed((ids - own.start).masked_fill_(~is_own, 0))
        return self._collective.all_reduce(x.mul_(is_own.unsqueeze(1)))

    def _layers(self, x: torch.Tensor, plan: Plan, caches: Sequence[Any]) -> torch.Tensor:
        """x [T, width] through the layers of this stage."""
        device, eps, layers = self._device, self.config.norm_eps, self._weights.layers
        h = device.rms_norm(x, layers[0].attention_norm, eps)
        for index, (layer, cache) in enumerate(zip(layers, caches, strict=True)):
            attended = self._collective.all_reduce(self._attend(layer, h, plan, cache))
            h, x = device.add_rms_norm(attended, x, layer.mlp_norm, eps)
            h = self._collective.all_reduce(layer.mlp(h))
            if index + 1 < len(layers):
                h, x = device.add_rms_norm(h, x, layers[index + 1].attention_norm, eps)
        return x + h

    def _attend(self, layer: Layer, x: torch.Tensor, plan: Plan, cache: Any) -> torch.Tensor:
        """x [T, width] -> [T, width], this rank's share."""
        own, eps = self._own, self.config.norm_eps
        qkv = layer.qkv(x).view(x.shape[0], -1, own.head_dim)  # [T, H + 2 * KH, D]
        heads = own.num_heads
        q, k, v = qkv[:, :heads], *qkv[:, heads:].chunk(2, dim=1)
        if layer.q_norm is not None and layer.k_norm is not None:
            q = self._device.rms_norm(q, layer.q_norm, eps)
            k = self._device.rms_norm(k, layer.k_norm, eps)
        q, k = plan.rotate(q, k)
        plan.write(cache, k, v)
        return layer.out(plan.attend(cache, q, layer.window))

    def _logits(self, x: torch.Tensor) -> torch.Tensor:
        """x [S, width] -> [S, vocab]."""
        norm, head = self._weights.norm, self._weights.head
        assert norm is not None
        assert head is not None
        h = self._device.rms_norm(x, norm, self.config.norm_eps)
        return self._collective.all_gather(head(h))[:, : self.config.vocab]
