"""The decoder on native kernels: W8A8, one call into the library per step, no torch.

Weights are the prepared file, mapped; the cache is one array of bfloat16 blocks. What a step computes, and how, is in
`native/`; here is only what Python has to say to it. This module must not know requests, sampling, or who owns a block.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import POINTER, Structure, byref, c_char_p, c_double, c_int, c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Final

import numpy as np
import numpy.typing as npt

from services.worker.flowserve import pic
from services.worker.flowserve.config import ModelConfig, ModelError
from services.worker.flowserve.decoder import Floats, Splice, StepInput, View
from services.worker.flowserve.layout import padded
from services.worker.flowserve.prepared import Prepared
from services.worker.flowserve.quantise import GROUP
from services.worker.flowserve.rope import RotaryTable
from shared.errors import Internal

LIBRARY: Final = Path(__file__).parent / "native" / "libflowserve.so"
LANES: Final = 16  # positions of a block of keys and values; heads are padded to it in the cache
ISAS: Final = ("avx2", "avx512", "avx512bf16")  # by the library's numbers
MAX_HEAD_DIM: Final = 512
VERSION: Final = 2  # changes with every change of a bit that a step computes
# The library's parts, and what a reader of timings wants them summed to.
_PARTS = ("embed", "norms", "linears", "attention", "linears", "linears", "linears", "head")


class _Linear(Structure):
    _fields_: ClassVar[list[tuple[str, Any]]] = [
        ("codes", c_void_p),
        ("scales", c_void_p),
        ("bias", c_void_p),
        ("num_outputs", c_int64),
        ("num_inputs", c_int64),
    ]


class _Layer(Structure):
    _fields_: ClassVar[list[tuple[str, Any]]] = [
        ("attention_norm", c_void_p),
        ("mlp_norm", c_void_p),
        ("head_norm", c_void_p),
        ("qkv", _Linear),
        ("out", _Linear),
        ("gate_up", _Linear),
        ("down", _Linear),
        ("window", c_int64),
    ]


class _Model(Structure):
    _fields_: ClassVar[list[tuple[str, Any]]] = [
        ("vocab", c_int64),
        ("width", c_int64),
        ("num_layers", c_int64),
        ("num_heads", c_int64),
        ("num_kv_heads", c_int64),
        ("head_dim", c_int64),
        ("norm_eps", c_double),
        ("embed", c_void_p),
        ("norm", c_void_p),
        ("head", _Linear),
        ("layers", POINTER(_Layer)),
    ]


class _Cache(Structure):
    _fields_: ClassVar[list[tuple[str, Any]]] = [
        ("blocks", c_void_p),
        ("num_blocks", c_int64),
        ("page", c_int64),
    ]


class _Splice(Structure):
    _fields_: ClassVar[list[tuple[str, Any]]] = [
        ("source", c_void_p),
        ("table", c_void_p),
        ("source_start", c_int64),
        ("start", c_int64),
        ("length", c_int64),
        ("cos", c_void_p),
        ("sin", c_void_p),
    ]


class _Step(Structure):
    _fields_: ClassVar[list[tuple[str, Any]]] = [
        ("num_rows", c_int64),
        ("num_spans", c_int64),
        ("num_samples", c_int64),
        ("tokens", c_void_p),
        ("spans", c_void_p),
        ("tables", c_void_p),
        ("sample_rows", c_void_p),
        ("cos", c_void_p),
        ("sin", c_void_p),
        ("logits", c_void_p),
        ("seconds", c_void_p),
    ]


def best_isa() -> str:
    """The best of ISAS that this processor has; only where the kernels are `available`."""
    number = _library().fs_best_isa()
    if number < 0:
        raise ModelError("this processor has no AVX2")
    return ISAS[number]


def available() -> str | None:
    """Why the native kernels cannot be used here; None if they can."""
    if not LIBRARY.exists():
        return "they were not built: no C++ compiler when DeepFlow was installed"
    try:
        library = _library()
    except (OSError, AttributeError) as error:
        return f"{LIBRARY.name} does not load: {error}"
    if library.fs_abi() != 1 << 24 | ctypes.sizeof(_Model) << 12 | ctypes.sizeof(_Step):
        return f"{LIBRARY.name} was built from other sources: install DeepFlow again"
    return "this processor has no AVX2" if library.fs_best_isa() < 0 else None


@cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(LIBRARY))
    library.fs_sources.restype = c_char_p
    library.fs_best_isa.restype = c_int64
    library.fs_abi.restype = c_int64
    library.fs_create.restype = c_void_p
    library.fs_create.argtypes = [c_int64, c_int64]
    library.fs_destroy.argtypes = [c_void_p]
    library.fs_destroy.restype = None
    library.fs_run.argtypes = [c_void_p, POINTER(_Model), POINTER(_Cache), POINTER(_Step)]
    library.fs_run.restype = c_int
    library.fs_move.argtypes = [POINTER(_Model), POINTER(_Cache), POINTER(_Splice)]
    library.fs_move.restype = None
    library.fs_quantise.argtypes = [c_int64, c_void_p, c_int64, c_void_p, c_void_p]
    library.fs_quantise.restype = None
    library.fs_multiply.argtypes = [c_int64, c_void_p, c_int64, POINTER(_Linear), c_void_p]
    library.fs_multiply.restype = c_int
    return library


class NativeDecoder:
    """See `Decoder`. `isa` is one of ISAS, the best of this processor unless given. A forked child has no threads: it
    must make its own.

    Raises ModelError for a head that the kernels cannot hold.
    """

    def __init__(self, prepared: Prepared, *, threads: int, isa: str | None = None) -> None:
        config = prepared.config
        if config.head_dim > MAX_HEAD_DIM:
            raise ModelError(f"config.json: head_dim ({config.head_dim}) is above {MAX_HEAD_DIM}")
        if threads < 1:
            raise ValueError(f"{threads} threads compute nothing")
        self.config = config
        self._prepared = prepared  # keeps the mapping
        best = ISAS.index(best_isa())
        number = best if isa is None else ISAS.index(isa)
        if number > best:
            raise ModelError(f"this processor has no {isa}")
        self.description = f"native {ISAS[number]}, w8a8, {threads} threads"
        self._model = _model(config, prepared)
        self._cache: _Cache | None = None
        self._blocks: npt.NDArray[np.uint16] = np.empty(0, np.uint16)
        self._rotary = RotaryTable(config)
        self._seconds = np.zeros(len(_PARTS))
        self._logits = np.empty((0, config.vocab), np.float32)
        self._handle = _library().fs_create(number, threads)
        if not self._handle:
            raise MemoryError("no memory, or no threads, for the decoder")

    def __del__(self) -> None:
        if getattr(self, "_handle", None):
            _library().fs_destroy(self._handle)

    @property
    def splices(self) -> bool:
        """See `Splicer`."""
        return True

    @property
    def timings(self) -> dict[str, float]:
        timings = dict.fromkeys(_PARTS, 0.0)
        for part, seconds in zip(_PARTS, self._seconds.tolist(), strict=True):
            timings[part] += seconds
        return timings

    def bytes_per_block(self, page: int) -> int:
        """As `bytes_per_block` below, for this model."""
        return bytes_per_block(self.config, page)

    def allocate(self, num_blocks: int, page: int) -> None:
        """Zeroed, and so given memory by the system only block by block, as they are first written."""
        if page % LANES:
            raise ValueError(f"a page of {page} positions is no multiple of {LANES}")
        size = num_blocks * self.bytes_per_block(page) // 2
        memory = np.zeros(size + 2048, np.uint16)
        # On a page of memory, as the arena's slots are: a few bytes beyond one, copies would take twice as long.
        start = -memory.ctypes.data % 4096 // 2
        self._blocks = memory[start : start + size]
        self._cache = _Cache(self._blocks.ctypes.data, num_blocks, page)

    @property
    def block_bytes(self) -> int:
        """See `Movable`."""
        return 0 if self._cache is None else self.bytes_per_block(self._cache.page)

    @property
    def memory(self) -> View:
        """See `Movable`."""
        return self._blocks.view(np.uint8)

    def block_view(self, block: int) -> View:
        """See `Movable`: [layer][keys, values][kv head] ..., as `native/abi.h` says."""
        size = self.block_bytes
        return self.memory[block * size : (block + 1) * size]

    def read_blocks(self, blocks: Sequence[int]) -> View:
        """See `Movable`."""
        data: View = self.memory.reshape(-1, self.block_bytes)[list(blocks)]
        return data

    def write_blocks(self, blocks: Sequence[int], data: View) -> None:
        """See `Movable`."""
        self.memory.reshape(-1, self.block_bytes)[list(blocks)] = data

    def forward(self, step: StepInput) -> Floats:
        assert self._cache is not None, "allocate first"
        page = self._cache.page
        num_samples = len(step.sample_rows)
        if len(self._logits) < num_samples:
            self._logits = np.empty((num_samples, self.config.vocab), np.float32)
        spans: list[int] = []
        tables: list[int] = []
        end = 1
        for span in step.spans:
            spans += (span.start, span.length, len(tables))
            stop = span.start + span.length
            end = max(end, stop)
            num_pages = -(-stop // page)
            assert len(span.table) >= num_pages, "a row without a block"
            tables += span.table[:num_pages]
        cos, sin = self._rotary.upto(end - 1)
        for splice in step.splices:
            self._move(splice)
        # Held here until the call returns; the library keeps nothing.
        held = (
            np.array(step.tokens, np.int32),
            np.array(spans, np.int64),
            np.array(tables, np.int32),
            np.array(step.sample_rows, np.int32),
        )
        pointers = [array.ctypes.data for array in (*held, cos, sin, self._logits, self._seconds)]
        arguments = _Step(len(step.tokens), len(step.spans), num_samples, *pointers)
        failed = _library().fs_run(
            self._handle, byref(self._model), byref(self._cache), byref(arguments)
        )
        if failed:
            raise Internal("no memory for this step" if failed == 1 else "the kernels failed")
        return self._logits[:num_samples]

    def _move(self, splice: Splice) -> None:
        """Do a splice."""
        assert self._cache is not None, "allocate first"
        places = (splice.source_start, splice.start, splice.length)
        tables = [np.array(table, np.int32) for table in (splice.source, splice.table)]
        turn: list[Floats] = []  # of keys; none, where they stay
        if splice.source_start != splice.start:
            cos, sin = self._rotary.upto(max(splice.source_start, splice.start) + splice.length)
            turn += map(np.ascontiguousarray, pic.turn_between(cos, sin, *places))
        source, table = (array.ctypes.data for array in tables)
        arguments = _Splice(source, table, *places, *(array.ctypes.data for array in turn))
        _library().fs_move(byref(self._model), byref(self._cache), byref(arguments))


def bytes_per_block(config: ModelConfig, page: int) -> int:
    """Memory of one KV block over all layers, in bfloat16."""
    elements = page * padded(config.head_dim, LANES)
    return config.num_layers * 2 * config.num_kv_heads * elements * 2


def quantise(x: Floats, isa: str) -> tuple[npt.NDArray[np.int8], Floats]:
    """The kernel alone: x [T, K] -> codes [T, K], scales [T, K / 32]."""
    x = np.ascontiguousarray(x)
    codes = np.empty(x.shape, np.int8)
    scales = np.empty((x.shape[0], x.shape[1] // GROUP), np.float32)
    addresses = (codes.ctypes.data, scales.ctypes.data)
    _library().fs_quantise(ISAS.index(isa), x.ctypes.data, scales.size, *addresses)
    return codes, scales


def multiply(x: Floats, arrays: dict[str, Any], name: str, isa: str) -> Floats:
    """The kernels alone: x fp32 [T, K], quantised, times the packed product `name` -> [T, N]."""
    x = np.ascontiguousarray(x)
    linear = _linear(arrays, name)
    y = np.empty((len(x), linear.num_outputs), np.float32)
    number = ISAS.index(isa)
    if _library().fs_multiply(number, x.ctypes.data, len(x), byref(linear), y.ctypes.data):
        raise MemoryError("no memory for the product")
    return y


def sources() -> str:
    """The digest of the sources that the library was built from."""
    built_from: bytes = _library().fs_sources()
    return built_from.decode()


def _model(config: ModelConfig, prepared: Prepared) -> _Model:
    arrays = prepared.arrays
    layers = (_Layer * config.num_layers)()
    for index, layer in enumerate(layers):
        name = f"layers.{index}"
        layer.attention_norm = arrays[f"{name}.attention_norm"].ctypes.data
        layer.mlp_norm = arrays[f"{name}.mlp_norm"].ctypes.data
        layer.head_norm = _address(arrays, f"{name}.head_norm")
        for product in ("qkv", "out", "gate_up", "down"):
            setattr(layer, product, _linear(arrays, f"{name}.{product}"))
        layer.window = config.windows[index] or 0
    return _Model(
        config.vocab,
        config.width,
        config.num_layers,
        config.num_heads,
        config.num_kv_heads,
        config.head_dim,
        config.norm_eps,
        arrays["embed"].ctypes.data,
        arrays["norm"].ctypes.data,
        _linear(arrays, "head"),
        layers,
    )


def _linear(arrays: dict[str, Any], name: str) -> _Linear:
    codes = arrays[f"{name}.codes"]
    panels, steps, panel, inputs = codes.shape
    return _Linear(
        codes.ctypes.data,
        arrays[f"{name}.scales"].ctypes.data,
        _address(arrays, f"{name}.bias"),
        panels * panel,
        steps * inputs,
    )


def _address(arrays: dict[str, Any], name: str) -> int | None:
    array = arrays.get(name)
    return None if array is None else int(array.ctypes.data)
