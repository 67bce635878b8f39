"""The one module that calls `torch.npu` itself: against the wheel's source, and where there is no NPU."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.worker.flowserve.config import ModelError
from services.worker.flowserve.device import npu_runtime
from services.worker.flowserve.device.npu import NpuDevice
from tests.npu.wheel import Wheel

SERVICES = Path(__file__).parents[2] / "services"
SOURCE = ast.parse(Path(npu_runtime.__file__).read_text())
NPU = "torch_npu/npu/__init__.py"


def exports(source: str) -> set[str]:
    """The names in a module's `__all__`."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            names: list[str] = ast.literal_eval(node.value)
            return set(names)
    raise AssertionError("no __all__")


def runtime_calls() -> Iterator[ast.Call]:
    """Calls of `torch.npu` in our module."""
    for node in ast.walk(SOURCE):
        if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("self._npu."):
            yield node


def arguments(wheel: Wheel, member: str, owner: str, name: str) -> set[str]:
    """Of the function or method `name`, of the class `owner` or, where that is empty, of the module."""
    module = ast.parse(wheel.read(member))
    scopes = [node for node in ast.walk(module) if isinstance(node, ast.ClassDef | ast.Module)]
    (scope,) = (each for each in scopes if getattr(each, "name", "") == owner)
    (function,) = (
        each for each in scope.body if isinstance(each, ast.FunctionDef) and each.name == name
    )
    return {each.arg for each in function.args.args + function.args.kwonlyargs}


def test_the_runtime_has_what_we_call(npu_wheel: Wheel) -> None:
    """Every attribute of `torch.npu` that we use is one that it exports."""
    used = {
        node.attr
        for node in ast.walk(SOURCE)
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "self._npu"
    }
    assert {"NPUGraph", "graph", "mem_get_info", "set_device"} <= used
    assert used <= exports(npu_wheel.read(NPU))


def test_the_runtime_takes_the_arguments_we_name(npu_wheel: Wheel) -> None:
    """Keywords of functions, of graphs and of their updates are in the wheel's signatures."""
    named = {
        ast.unparse(c.func).rpartition(".")[2]: {k.arg for k in c.keywords} for c in runtime_calls()
    }
    graphs = "torch_npu/npu/graphs.py"
    assert named.pop("set_compile_mode") <= arguments(
        npu_wheel, "torch_npu/npu/npu_config.py", "", "set_compile_mode"
    )
    assert named.pop("graph") <= arguments(npu_wheel, graphs, "graph", "__init__")
    assert not any(named.values())
    assert arguments(npu_wheel, graphs, "NPUGraph", "update") == {"self", "cpu_update_input"}
    assert arguments(npu_wheel, graphs, "NPUGraph", "replay") == {"self"}


def test_other_threads_may_use_the_npu_while_one_records() -> None:
    """As those of collectives do, which the default takes for an error."""
    (recording,) = (call for call in runtime_calls() if ast.unparse(call.func) == "self._npu.graph")
    modes = [ast.unparse(k.value) for k in recording.keywords if k.arg == "capture_error_mode"]
    assert modes == ["'thread_local'"]


def test_only_one_module_imports_torch_npu() -> None:
    """By hand, inside a function: no import of ours loads it."""
    importing = [
        path.name
        for path in SERVICES.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Import | ast.ImportFrom)
        and "torch_npu" in {getattr(node, "module", None), *(name.name for name in node.names)}
    ]
    assert importing == ["npu_runtime.py"]
    at_top = [ast.unparse(node) for node in SOURCE.body if isinstance(node, ast.Import)]
    assert "import torch_npu" not in at_top


def test_without_torch_npu_the_extra_is_named() -> None:
    """Opening the device where torch-npu is not installed says what to install."""
    with pytest.raises(ModelError, match=r"pip install 'deepflow\[npu\]'.*CANN"):
        NpuDevice.open()


@pytest.mark.parametrize(
    ("module", "words"),
    [
        ("raise ImportError('libhccl.so: cannot open shared object file')", "libhccl.*set_env.sh"),
        ("import numpy_of_another_kind", "numpy_of_another_kind.*pip install"),
        ("class npu:\n    is_available = staticmethod(lambda: False)", "no device.*driver"),
        (
            """class npu:
    is_available = staticmethod(lambda: True)
    device_count = staticmethod(lambda: 1)""",
            "no NPU 1: torch-npu sees 1",
        ),
        (
            """class npu:
    is_available = staticmethod(lambda: True)
    device_count = staticmethod(lambda: 2)

    @staticmethod
    def set_compile_mode(jit_compile):
        raise RuntimeError("aclInit failed, 507899")""",
            "NPU 1 does not open: aclInit failed",
        ),
    ],
)
def test_an_installation_that_does_not_work_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, words: str
) -> None:
    """CANN's libraries that are not found, a missing package, no driver, a number that no card has, or an ill card."""
    (tmp_path / "torch_npu.py").write_text(module)
    monkeypatch.syspath_prepend(tmp_path)
    try:
        with pytest.raises(ModelError, match=words):
            NpuDevice.open(1)
    finally:
        sys.modules.pop("torch_npu", None)
