"""Models of the Hugging Face hub, through `huggingface_hub`, which honours HF_ENDPOINT and HF_TOKEN.

Only what a model folder needs is downloaded, never a pickle, never code. Tested against a local server that speaks the
hub's protocol; the real hub was not tried.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from deepflow.models import store
from deepflow.models.folder import INDEX, NEEDED, OPTIONAL
from deepflow.models.progress import Progress, watching
from shared.errors import InvalidRequest, NotFound, Unavailable

_SMALL_FILES = (*NEEDED, *OPTIONAL, INDEX)


def fetch(repository: str, revision: str | None, folder: Path, progress: Progress) -> Path:
    """Downloads `repository` ("org/name") at `revision` (default: its main branch) into `folder`.

    Raises NotFound if there is no such repository or it is not open to us, InvalidRequest if it holds no safetensors,
    Unavailable if the hub does not answer, or a large file's SHA-256 is not the one the hub states.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.utils.tqdm import disable_progress_bars

    disable_progress_bars()  # we have our own
    with _translated(repository):
        info = HfApi().model_info(repository, revision=revision, files_metadata=True)
    files = {file.rfilename: file.size or 0 for file in info.siblings or []}
    wanted = {name: size for name, size in files.items() if _wanted(name)}
    if not any(name.endswith(".safetensors") for name in wanted):
        raise InvalidRequest(
            f"hf:{repository} has no safetensors (pickles such as .bin may run any code when read); "
            f"it holds: {', '.join(sorted(files)[:12])}",
            param="model",
        )
    progress.step(f"downloading hf:{repository}", sum(wanted.values()))
    with _translated(repository), watching(folder, progress):
        snapshot_download(
            repository,
            revision=info.sha,  # a push meanwhile does not mix two states
            local_dir=folder,
            allow_patterns=list(wanted),
        )
    hashes = {file.rfilename: file.lfs.sha256 for file in info.siblings or [] if file.lfs}
    checked = {folder / name: hashes[name] for name in wanted if name in hashes}
    progress.step("verifying", sum(wanted[path.name] for path in checked))
    for path, sha256 in checked.items():
        if store.hash_file(path, progress) != sha256:
            raise Unavailable(f"hf:{repository}: {path.name} is not what the hub says; pull again")
    return folder


@contextmanager
def _translated(repository: str) -> Iterator[None]:
    """The library's errors as ours."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except (RepositoryNotFoundError, RevisionNotFoundError, GatedRepoError) as error:
        raise NotFound(
            f"hf:{repository}: {_line(error)} (a private or gated model needs HF_TOKEN)",
            param="model",
        ) from error
    except HFValidationError as error:
        raise InvalidRequest(
            f"not a repository of the hub: {_line(error)}", param="model"
        ) from error
    except Exception as error:  # of whichever HTTP library this version of the hub's uses
        raise Unavailable(f"hf:{repository} could not be downloaded: {_line(error)}") from error


def _line(error: Exception) -> str:
    """The library's words, which come in paragraphs, as one line."""
    return " ".join(str(error).split())


def _wanted(name: str) -> bool:
    """Of the top folder: the texts we know, and weights, except those in the form of the original authors."""
    return name in _SMALL_FILES or (
        name.endswith(".safetensors") and "/" not in name and not name.startswith("consolidated")
    )
