"""Prepared weights: made once, mapped from then on, made anew when anything changed or broke; and who uses them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from services.worker.flowserve import native_decoder
from services.worker.flowserve.backend import Backend, load_decoder
from services.worker.flowserve.checkpoint import Checkpoint
from services.worker.flowserve.config import ModelConfig, ModelError
from services.worker.flowserve.decoder import Floats
from services.worker.flowserve.layout import ALIGNMENT
from services.worker.flowserve.prepared import Prepared, open_prepared
from services.worker.flowserve.quantise import from_bfloat16, to_bfloat16, unpack
from services.worker.settings import read_kernels
from shared.config import ConfigError, Reader
from tests.worker.tiny import make_tiny

ODD: dict[str, Any] = {  # nothing is a multiple of 32
    "vocab_size": 515,
    "hidden_size": 72,
    "head_dim": 18,
    "intermediate_size": 90,
    "attention_bias": True,
    "mlp_bias": True,
}


def _state(prepared: Prepared) -> tuple[Path, int, int]:
    """What changes when a file is written again."""
    stat = prepared.path.stat()
    return prepared.path, stat.st_ino, stat.st_mtime_ns


def _equal(a: Prepared, b: Prepared) -> bool:
    return a.arrays.keys() == b.arrays.keys() and all(
        np.array_equal(a.arrays[name], b.arrays[name]) for name in a.arrays
    )


def _files(cache_dir: Path) -> list[str]:
    """What lies below the cache, without the locks."""
    return sorted(
        path.name for path in cache_dir.rglob("*") if path.is_file() and path.name != "lock"
    )


WHOLE = ["packed.json", "packed.safetensors"]  # the sidecar, and the weights


def _dequantised(prepared: Prepared, name: str) -> Floats:
    codes, scales = unpack(prepared.arrays[f"{name}.codes"], prepared.arrays[f"{name}.scales"])
    return codes * np.repeat(scales, 32, axis=1)


def test_the_second_time_it_is_only_mapped(tmp_path: Path) -> None:
    """Opening again writes nothing, and gives the same read-only, aligned arrays, which the library can read too."""
    folder, cache_dir = make_tiny(tmp_path / "tiny", "qwen3", **ODD), tmp_path / "cache"
    first = open_prepared(folder, cache_dir)
    second = open_prepared(folder, cache_dir)
    assert _state(first) == _state(second)
    assert _equal(first, second)
    for name, array in second.arrays.items():
        assert not array.flags.writeable
        # The file begins a page, so an offset in it is an offset in memory.
        assert array.ctypes.data % ALIGNMENT == 0, name
    assert _files(cache_dir) == WHOLE
    with safe_open(first.path, framework="numpy") as file:
        assert set(file.keys()) == set(first.arrays)


def _rotation(width: int) -> Floats:
    """Sylvester's Hadamard matrix in blocks of up to 64: its entry (i, j) is -1 to the number of ones in i & j."""
    size = min(width & -width, 64)
    signs = [[(-1.0) ** (i & j).bit_count() for j in range(size)] for i in range(size)]
    return np.kron(np.eye(width // size), np.array(signs) / size**0.5).astype(np.float32)


@pytest.mark.parametrize("overrides", [{}, ODD], ids=["even", "odd"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_every_weight_is_found_in_its_place(
    tmp_path: Path, family: str, overrides: dict[str, Any]
) -> None:
    """Dequantised and undone of padding and order, each product is the checkpoint's own, to half a step."""
    folder = make_tiny(tmp_path / "tiny", family, layers=1, **overrides)
    prepared = open_prepared(folder, tmp_path)
    config, source = prepared.config, load_file(folder / "model.safetensors")
    D, Dp = config.head_dim, -(-config.head_dim // 32) * 32
    hidden = -(-config.hidden // 32) * 32

    def weight(name: str) -> Floats:
        array: Floats = source[f"model.layers.0.{name}.weight"]
        return array

    def close(packed: Floats, wanted: Floats) -> None:
        np.testing.assert_allclose(packed, wanted, rtol=0, atol=np.abs(wanted).max() / 200)

    turn = _rotation(config.width)  # its own inverse: symmetric and orthogonal

    def norm(name: str) -> Floats:
        array: Floats = source[f"model.{name}.weight"]
        return array

    qkv = _dequantised(prepared, "layers.0.qkv")[:, : config.width]
    heads = qkv.reshape(-1, Dp, config.width)
    projections = [weight(f"self_attn.{kind}_proj") for kind in "qkv"]
    wanted = np.concatenate(projections) * norm("layers.0.input_layernorm") @ turn
    close(heads[:, :D].reshape(-1, config.width), wanted)
    assert not heads[:, D:].any()
    out = _dequantised(prepared, "layers.0.out")[: config.width]
    by_head = out.reshape(config.width, -1, Dp)
    close(by_head[:, :, :D].reshape(config.width, -1), turn @ weight("self_attn.o_proj"))
    assert not by_head[:, :, D:].any()
    gate_up = _dequantised(prepared, "layers.0.gate_up")[:, : config.width]
    panels = gate_up.reshape(-1, 2, 16, config.width)
    for part, name in enumerate(("gate", "up")):
        rows = panels[:, part].reshape(hidden, config.width)
        wanted = weight(f"mlp.{name}_proj") * norm("layers.0.post_attention_layernorm") @ turn
        close(rows[: config.hidden], wanted)
        assert not rows[config.hidden :].any()
    down = _dequantised(prepared, "layers.0.down")
    close(down[: config.width, : config.hidden], turn @ weight("mlp.down_proj"))
    name = "model.embed_tokens.weight" if config.tied else "lm_head.weight"
    head = _dequantised(prepared, "head")[: config.vocab, : config.width]
    close(head, source[name] * norm("norm") @ turn)
    embed = source["model.embed_tokens.weight"] @ turn
    np.testing.assert_allclose(prepared.arrays["embed"], embed, rtol=0, atol=1e-5)
    if overrides:
        bias = prepared.arrays["layers.0.qkv.bias"].reshape(-1, Dp)
        biases = [source[f"model.layers.0.self_attn.{kind}_proj.bias"] for kind in "qkv"]
        assert np.array_equal(bias[:, :D].reshape(-1), np.concatenate(biases))


def test_a_changed_checkpoint_is_prepared_again(tmp_path: Path) -> None:
    """Other weights, another time of modification or another config make another file, and the old one goes."""
    folder, other = (make_tiny(tmp_path / name) for name in ("tiny", "other"))
    kept = open_prepared(other, tmp_path)
    weights, config = folder / "model.safetensors", folder / "config.json"
    seen = [open_prepared(folder, tmp_path)]
    os.utime(weights, ns=(0, weights.stat().st_mtime_ns + 1))
    seen.append(open_prepared(folder, tmp_path))
    config.write_text(config.read_text().replace("1e-05", "1e-06"))
    seen.append(open_prepared(folder, tmp_path))
    save_file(load_file(weights) | {"model.norm.weight": np.zeros(64, np.float32)}, weights)
    seen.append(open_prepared(folder, tmp_path))
    assert len({prepared.path for prepared in seen}) == 4
    assert _equal(seen[0], seen[1])  # who had it mapped still has it
    assert (seen[-1].arrays["head.codes"] == 128).all()  # zeros: the norm's weights are in there
    files = sorted((tmp_path / "prepared").glob("*/*.safetensors"))
    assert files == sorted([kept.path, seen[-1].path])


def test_weights_of_models_that_are_gone_are_removed(tmp_path: Path) -> None:
    """The next preparation clears away what belongs to a model folder that no longer exists."""
    gone, here = (make_tiny(tmp_path / name) for name in ("gone", "here"))
    before = open_prepared(gone, tmp_path)
    gone.rename(tmp_path / "elsewhere")
    after = open_prepared(here, tmp_path)
    assert (before.path.exists(), after.path.exists()) == (False, True)


@pytest.mark.parametrize("damage", ["cut", "empty", "foreign", "header"])
def test_a_broken_file_is_prepared_again(tmp_path: Path, damage: str) -> None:
    """A file that was cut off, emptied, or replaced by another is noticed, and made anew."""
    folder, cache_dir = make_tiny(tmp_path / "tiny"), tmp_path / "cache"
    first = open_prepared(folder, cache_dir)
    path, whole = first.path, first.path.read_bytes()
    path.unlink()
    if damage == "foreign":
        path.write_bytes((folder / "model.safetensors").read_bytes())
    else:
        cut = {"cut": whole[:-1], "empty": b"", "header": b"\xff" * 8 + whole[8:]}
        path.write_bytes(cut[damage])
    assert _equal(open_prepared(folder, cache_dir), first)
    assert path.read_bytes() == whole


_PREPARE = """
import sys
from pathlib import Path
from services.worker.flowserve import prepared
if len(sys.argv) > 3:  # die as a killed process does, after so many tensors
    import os, signal
    tensors_of = prepared.tensors_of
    def until(*arguments):
        for number, tensor in enumerate(tensors_of(*arguments)):
            if number == int(sys.argv[3]):
                os.kill(os.getpid(), signal.SIGKILL)
            yield tensor
    prepared.tensors_of = until
print(prepared.open_prepared(Path(sys.argv[1]), Path(sys.argv[2])).path.stat().st_ino)
"""


def _start(folder: Path, cache_dir: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", _PREPARE, str(folder), str(cache_dir), *more]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_a_killed_preparation_leaves_nothing_behind(tmp_path: Path) -> None:
    """A process killed half way holds no lock and leaves no file that is taken for whole; the next one starts over."""
    folder, cache_dir = make_tiny(tmp_path / "tiny"), tmp_path / "cache"
    process = _start(folder, cache_dir, "9")
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert _files(cache_dir) == ["packed.partial"]
    prepared = open_prepared(folder, cache_dir)
    assert np.isfinite(prepared.arrays["norm"]).all()
    assert _files(cache_dir) == WHOLE


def test_processes_that_start_together_prepare_once(tmp_path: Path) -> None:
    """Three at once end with one and the same file."""
    folder, cache_dir = make_tiny(tmp_path / "tiny"), tmp_path / "cache"
    processes = [_start(folder, cache_dir) for _ in range(3)]
    inodes = {process.communicate()[0] for process in processes}
    assert inodes == {f"{open_prepared(folder, cache_dir).path.stat().st_ino}\n"}


def test_half_precision_checkpoints(tmp_path: Path) -> None:
    """float16 and bfloat16 are read as the numbers they are."""
    folder = make_tiny(tmp_path / "tiny")
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    embed, turn = tensors["model.embed_tokens.weight"], _rotation(64)
    save_file({name: array.astype(np.float16) for name, array in tensors.items()}, weights)
    exact = open_prepared(folder, tmp_path).arrays["embed"].copy()
    assert np.allclose(exact, embed.astype(np.float16) @ turn, atol=1e-5)
    import torch
    from safetensors.torch import save_file as save_torch

    save_torch({n: torch.from_numpy(array).bfloat16() for n, array in tensors.items()}, weights)
    brain = open_prepared(folder, tmp_path).arrays["embed"]
    assert np.allclose(brain, from_bfloat16(to_bfloat16(embed)) @ turn, atol=1e-5)
    norm = Checkpoint(folder).floats("model.norm.weight", (64,))
    assert np.array_equal(norm, torch.from_numpy(tensors["model.norm.weight"]).bfloat16().float())


def test_what_cannot_be_prepared_is_named(tmp_path: Path) -> None:
    """A weight that is no number names its tensor; a cache that cannot be written names its folder."""
    folder = make_tiny(tmp_path / "tiny")
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ModelError, match="file/prepared"):
        open_prepared(folder, tmp_path / "file")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][3, 5] = np.nan
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.down_proj.*finite"):
        open_prepared(folder, tmp_path / "cache")
    assert _files(tmp_path / "cache") == []


def test_the_choice_of_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Native where it computes the dtype, holds the heads and was built; asked for in vain, it says why."""
    folder = make_tiny(tmp_path / "tiny")
    config = ModelConfig.from_folder(folder)
    pick = partial(Backend.pick, config, device="cpu")
    why_not = native_decoder.available()
    best = "native" if why_not is None else "torch"
    assert pick().kernels == best
    assert pick().dtype == "w8a8"
    assert Backend.pick(config, device="npu").dtype == "bf16"
    assert pick(kernels="torch").kernels == "torch"
    assert pick(dtype="fp32").kernels == "torch"
    assert pick(tp=2).kernels == "torch"
    with pytest.raises(ModelError, match="not fp32"):
        pick(dtype="fp32", kernels="native")
    with pytest.raises(ModelError, match="unknown kernels 'metal'"):
        pick(kernels="metal")
    with pytest.raises(ModelError, match="unknown dtype 'fp4'"):
        pick(dtype="fp4")
    with pytest.raises(ModelError, match="3 ranks cannot share 4 attention heads"):
        pick(tp=3)
    large = ModelConfig.from_folder(make_tiny(tmp_path / "large", head_dim=1024, layers=1))
    assert Backend.pick(large, device="cpu").kernels == "torch"
    monkeypatch.setattr(native_decoder, "LIBRARY", tmp_path / "nowhere.so")
    assert pick().kernels == "torch"
    with pytest.raises(ModelError, match="not built"):
        load_decoder(folder, cache_dir=tmp_path, kernels="native")


def test_kernels_and_cache_come_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever says nothing gets what DEEPFLOW_KERNELS and DEEPFLOW_CACHE say."""
    monkeypatch.setenv("DEEPFLOW_KERNELS", "torch")
    monkeypatch.setenv("DEEPFLOW_CACHE", str(tmp_path / "cache"))
    decoder = load_decoder(make_tiny(tmp_path / "tiny"), threads=1)
    assert decoder.description == "torch, 1 threads, w8a8"
    assert _files(tmp_path / "cache") == WHOLE
    with pytest.raises(ConfigError, match="DEEPFLOW_KERNELS"):
        read_kernels(Reader({"DEEPFLOW_KERNELS": "metal"}))


def test_native_kernels_start_without_torch(tmp_path: Path) -> None:
    """Preparing, loading and a first step import no torch, whose import alone takes longer than all of it."""
    if why_not := native_decoder.available():
        pytest.skip(why_not)
    script = """
import sys
from pathlib import Path
from services.worker.flowserve.backend import load_decoder
from services.worker.flowserve.decoder import Span, StepInput
decoder = load_decoder(Path(sys.argv[1]), cache_dir=Path(sys.argv[2]), kernels="native", threads=1)
decoder.allocate(4, 16)
assert decoder.forward(StepInput([5, 6], [Span(0, 2, [3])], [1])).shape == (1, 512)
assert "torch" not in sys.modules
"""
    folder = make_tiny(tmp_path / "tiny")
    subprocess.run([sys.executable, "-c", script, str(folder), str(tmp_path)], check=True)
