"""An executor's place among those that hold one model together: which layers, heads and outputs are its own.

Tensor parallelism cuts each layer (Megatron-LM, arXiv 1909.08053): heads, the hidden values of the MLP, the vocabulary.
Pipeline parallelism gives each stage a run of layers. This module must not know tensors or processes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

from services.worker.flowserve.config import ModelConfig, ModelError

# Hidden values are dealt out in groups of W8A8, which are also whole rows of a matrix unit.
HIDDEN_UNIT: Final = 32


@dataclass(frozen=True, slots=True)
class Rank:
    """Slice `tp` of `tp_size` in stage `pp` of `pp_size`."""

    tp: int = 0
    tp_size: int = 1
    pp: int = 0
    pp_size: int = 1

    @property
    def index(self) -> int:
        """Its number among all: stage by stage, 0 beside the engine."""
        return self.pp * self.tp_size + self.tp

    @property
    def size(self) -> int:
        """All executors of the model."""
        return self.tp_size * self.pp_size

    @property
    def is_first(self) -> bool:
        """Whether this stage turns tokens into embeddings."""
        return self.pp == 0

    @property
    def is_last(self) -> bool:
        """Whether this stage turns hidden states into logits."""
        return self.pp == self.pp_size - 1

    def layers(self, num_layers: int) -> range:
        """The layers of this stage; where they do not go round, the last one, which has the head too, has fewer."""
        begin, end = (-(-num_layers * stage // self.pp_size) for stage in (self.pp, self.pp + 1))
        return range(begin, end)

    def heads(self, config: ModelConfig) -> range:
        """The query heads of this slice."""
        each = config.num_heads // self.tp_size
        return range(self.tp * each, (self.tp + 1) * each)

    def kv_heads(self, config: ModelConfig) -> range:
        """The key/value heads that they share; one head is on several ranks where there are more ranks than heads."""
        heads = self.heads(config)
        return range(heads.start // config.group, (heads.stop - 1) // config.group + 1)

    def hidden(self, size: int) -> range:
        """The hidden values of an MLP of this slice: whole units, and what is left over in the last."""
        num_units = -(-size // HIDDEN_UNIT)
        begin, end = (num_units * slice_ // self.tp_size for slice_ in (self.tp, self.tp + 1))
        return range(begin * HIDDEN_UNIT, min(end * HIDDEN_UNIT, size))

    def vocab(self, size: int) -> range:
        """The tokens of this slice. All slices are of one size, so the last may reach beyond the vocabulary."""
        each = -(-size // self.tp_size)
        return range(self.tp * each, (self.tp + 1) * each)

    def part(self, config: ModelConfig) -> ModelConfig:
        """The config as if this executor's heads and layers were all there are. Raises ModelError where the model
        cannot be cut like that."""
        if config.num_heads % self.tp_size:
            raise ModelError(
                f"{self.tp_size} ranks cannot share {config.num_heads} attention heads evenly"
            )
        if config.num_kv_heads % self.tp_size and self.tp_size % config.num_kv_heads:
            raise ModelError(
                f"{self.tp_size} ranks cannot share {config.num_kv_heads} key/value heads evenly"
            )
        smallest = min(config.mlp_sizes)
        if -(-smallest // HIDDEN_UNIT) < self.tp_size:
            raise ModelError(
                f"{self.tp_size} ranks cannot share an MLP of {smallest} hidden values"
            )
        if (self.tp_size - 1) * -(-config.vocab // self.tp_size) >= config.vocab:
            raise ModelError(f"{self.tp_size} ranks cannot share {config.vocab} tokens")
        if config.num_layers < self.pp_size:
            raise ModelError(f"{self.pp_size} stages cannot share {config.num_layers} layers")
        layers = self.layers(config.num_layers)
        return replace(
            config,
            num_layers=len(layers),
            num_heads=len(self.heads(config)),
            num_kv_heads=len(self.kv_heads(config)),
            windows=config.windows[layers.start : layers.stop],
            sparse=config.sparse[layers.start : layers.stop],
        )
