"""What we define is what torch-npu declares, and what we demand is what it documents."""

from __future__ import annotations

import inspect
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from tests.npu.operators.contract import RULES
from tests.npu.schemas import KERNELS, NAMESPACE
from tests.npu.wheel import VERSION, Wheel, WheelError, fetch


@pytest.mark.parametrize("name", sorted(KERNELS))
def test_every_operator_has_the_signature_of_the_wheel(
    name: str, npu_wheel: Wheel, npu_operators: None
) -> None:
    """The dispatcher holds calls to the very signature that torch-npu declares."""
    operator = getattr(getattr(torch.ops, NAMESPACE), name).default
    assert str(operator._schema) == str(
        torch._C.parse_schema(f"{NAMESPACE}::{npu_wheel.schemas[name]}")
    )


@pytest.mark.parametrize("name", sorted(KERNELS))
def test_every_implementation_takes_the_arguments_of_the_wheel(name: str, npu_wheel: Wheel) -> None:
    """A reference's arguments have the wheel's names, order, kinds and defaults; `**` stands for those it refuses."""
    declared = {argument.name: argument for argument in _arguments(npu_wheel, name)}
    parameters = inspect.signature(KERNELS[name]).parameters.values()
    taken = [each for each in parameters if each.kind is not inspect.Parameter.VAR_KEYWORD]
    assert {each.name for each in taken} <= set(declared)
    if len(taken) == len(parameters):
        assert [each.name for each in taken] == list(declared)
    for each in taken:
        argument = declared[each.name]
        assert argument.kwarg_only == (each.kind is inspect.Parameter.KEYWORD_ONLY)
        assert argument.has_default_value() == (each.default is not inspect.Parameter.empty)
        if argument.has_default_value():
            default = argument.default_value
            assert (tuple(default) if isinstance(default, list) else default) == each.default


def test_an_operator_that_is_not_listed_does_not_exist(npu_operators: None) -> None:
    """A call of one that torch-npu lacks, or that we did not list, fails by its name."""
    with pytest.raises(AttributeError, match="npu_flash_of_insight"):
        _ = torch.ops.npu.npu_flash_of_insight


def test_the_dispatcher_refuses_arguments_the_wheel_does_not_have(npu_operators: None) -> None:
    """Names and types of arguments are checked before any implementation runs."""
    x = torch.ones(2, 16)
    with pytest.raises(RuntimeError, match="Unknown keyword argument 'eps'"):
        torch.ops.npu.npu_rms_norm(x, torch.ones(16), eps=1e-5)
    with pytest.raises(
        RuntimeError, match="Expected a value of type 'Tensor' for argument 'gamma'"
    ):
        torch.ops.npu.npu_rms_norm(x, 1.0)


def test_every_rule_is_a_sentence_of_the_documentation(npu_wheel: Wheel) -> None:
    """No constraint is of our own making: each is quoted word for word from the text on its function."""
    documentation = npu_wheel.documentation
    assert len(RULES) > 50
    invented = [
        f"{rule.function}: {rule.sentence}"
        for rule in RULES
        if rule.sentence not in documentation[rule.function]
    ]
    assert invented == []


def test_the_wheel_is_the_one_that_pairs_with_torch(npu_wheel: Wheel) -> None:
    """torch-npu pairs with exactly one minor version of torch: ours."""
    assert torch.__version__.split("+")[0].split(".")[:2] == VERSION.split(".")[:2]
    assert npu_wheel.path.name.startswith(f"torch_npu-{VERSION}-")


def test_torch_npu_itself_is_never_imported(npu_operators: None) -> None:
    """Its operators come from its text alone."""
    assert "torch_npu" not in sys.modules


def test_a_wheel_that_cannot_be_fetched_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without an index the tests fail with pip's words and leave nothing half done."""
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(WheelError, match="cannot fetch the wheel"):
        fetch(tmp_path)
    assert [
        path for path in tmp_path.rglob("*") if path.is_file() or path.name.startswith(".")
    ] == []


def test_two_fetches_at_once_leave_one_whole_wheel(
    tmp_path: Path, npu_wheel: Wheel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Test workers that start together do not see half of each other's wheel."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(npu_wheel.path.parent))
    with ThreadPoolExecutor(2) as threads:
        wheels = list(threads.map(fetch, [tmp_path, tmp_path]))
    assert wheels[0].path == wheels[1].path
    assert wheels[0].path.read_bytes() == npu_wheel.path.read_bytes()
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [wheels[0].path]


def test_a_fetched_wheel_is_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once in the cache, pip is not asked again."""
    monkeypatch.setattr(subprocess, "run", _never)
    folder = tmp_path / "torch-npu" / VERSION
    folder.mkdir(parents=True)
    path = folder / f"torch_npu-{VERSION}-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", "text")
    assert fetch(tmp_path).path == path
    assert Wheel(path).read("a.txt") == "text"
    with pytest.raises(WheelError, match=r"has no b\.txt"):
        Wheel(path).read("b.txt")


def _arguments(wheel: Wheel, name: str) -> list[torch.Argument]:
    return list(torch._C.parse_schema(wheel.schemas[name]).arguments)


def _never(*_: object, **__: object) -> None:
    raise AssertionError("a process was started")
