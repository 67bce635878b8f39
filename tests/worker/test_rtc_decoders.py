"""Pages of real models, moved from one engine's memory to another's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from services.worker.flowserve import native_decoder
from services.worker.flowserve.decoder import Movable
from tests.worker.bench import PROMPT, request
from tests.worker.courier import Courier
from tests.worker.drive import load
from tests.worker.tiny import make_tiny

KERNELS = [
    pytest.param(
        "w8a8",
        "native",
        marks=pytest.mark.skipif(
            native_decoder.available() is not None, reason="no native kernels here"
        ),
    ),
    ("fp32", "torch"),
]


@pytest.mark.parametrize(("dtype", "kernels"), KERNELS)
def test_pages_of_one_engine_serve_another(tmp_path: Path, dtype: str, kernels: str) -> None:
    """What one engine computed and copied out, the other finds, block numbers and all being different, and goes on as
    the first did; where the host can address them, a block's memory is where it is said to be."""
    folder = make_tiny(tmp_path / "models" / "tiny", with_tokenizer=False)
    first, second = (load(folder, dtype, kernels) for _ in range(2))
    assert isinstance(first, Movable)
    source = Courier(first)
    source.submit(request(temperature=0))
    source.ready(source.want())
    source.finish("r")
    source.save_all()
    assert len(source.store) == 5
    memory = source.engine.memory()
    assert (memory is not None) == (kernels == "native")
    if memory is not None:
        size = source.engine.page_bytes
        view = first.block_view(3)
        assert view is not None
        assert np.shares_memory(view, memory[3 * size : 4 * size])
        assert view.nbytes == size
    source.close()
    courier = Courier(second, source.store)
    courier.submit(request("other", PROMPT[::-1], max_tokens=3))
    courier.ready(courier.want())
    courier.finish("other")
    courier.submit(request(temperature=0))
    want = courier.want()
    courier.populate(want, courier.load_of(want))
    courier.finish("r")
    assert courier.cached["r"] == 64
    assert courier.tokens() == source.tokens()
    courier.close()
