"""`deepflow pull` and `deepflow models`: bringing models onto this machine, and listing them."""

from __future__ import annotations

import time

from rich.table import Table

from deepflow.cli.home import Home
from deepflow.cli.screen import bars, console, say
from shared import catalog
from shared.catalog import ModelFolder
from shared.errors import ModelNotFound


def pull(
    home: Home, reference: str, name: str | None = None, *, verify: bool = False
) -> ModelFolder:
    """Fetch a model, showing what is fetched and how large it is. Raises DeepFlowError."""
    from deepflow.models import pull as source  # reads GGUF: slow to import

    started = time.monotonic()
    with bars() as progress:
        model = source.pull(reference, home.cache, progress=progress, name=name, verify=verify)
    say(f"{model.name} is here ({_megabytes(model)}, {time.monotonic() - started:.0f} s).")
    return model


def ensure(home: Home, reference: str) -> ModelFolder:
    """The model, pulled if it is not on this machine yet. Raises DeepFlowError."""
    try:
        return catalog.open_model(home.cache, reference)
    except ModelNotFound:
        say(f"Model {reference} is not on this machine yet: fetching it.")
        return pull(home, reference)


def show(home: Home) -> None:
    """List the models of this machine."""
    models = catalog.list_models(home.cache)
    if not models:
        say(f"No models in {home.cache} yet: `deepflow pull smollm2-135m` fetches the default one.")
        return
    table = Table("model", "size", "context", "vocabulary", "fetched", box=None)
    for model in models:
        fetched = time.strftime("%Y-%m-%d %H:%M", time.localtime(model.created))
        table.add_row(model.name, _megabytes(model), f"{model.context}", f"{model.vocab}", fetched)
    console.print(table)


def _megabytes(model: ModelFolder) -> str:
    size = sum(file.stat().st_size for file in model.path.iterdir() if file.is_file())
    return f"{size / 1e6:.0f} MB"
