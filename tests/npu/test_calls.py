"""Our own source against the wheel, whether a test reaches the call or not."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.npu.schemas import KERNELS
from tests.npu.wheel import Wheel

SOURCES = Path(__file__).parents[2] / "services"
DIRECT = "torch.ops.npu."


def faults(source: str, wheel: Wheel) -> Iterator[str]:
    """What is wrong with the calls of torch-npu's operators in a module."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        callee, name = ast.unparse(node.func), node.func.attr
        if callee.startswith(DIRECT):
            name = callee.removeprefix(DIRECT).partition(".")[0]
        elif not name.lstrip("_").startswith("npu_"):
            continue
        where = f"line {node.lineno}: {callee}"
        if name not in wheel.schemas or name not in KERNELS:
            yield f"{where}: torch-npu has no such operator, or it has no reference"
            continue
        arguments = torch._C.parse_schema(wheel.schemas[name]).arguments
        unknown = {each.arg for each in node.keywords if each.arg} - {
            each.name for each in arguments
        }
        if unknown:
            yield f"{where}: no arguments {sorted(unknown)}"
        if len(node.args) > sum(not each.kwarg_only for each in arguments):
            yield f"{where}: {len(node.args)} arguments by position"


@pytest.mark.parametrize(
    ("call", "fault"),
    [
        ("torch.ops.npu.npu_rms_norm(x, gamma, epsilon=1e-5)", ""),
        ("torch.ops.npu.npu_rms_norm.default(x, gamma)", ""),
        ("ops.npu_swiglu(x, dim=-1)", ""),
        ("torch.ops.npu.npu_rms_normal(x)", "no such operator"),
        ("torch.ops.npu.npu_gelu(x)", "no reference"),
        ("torch.ops.npu.npu_rms_norm(x, gamma, eps=1e-5)", "no arguments ['eps']"),
        ("ops.npu_swiglu(x, axis=-1)", "no arguments ['axis']"),
        ("torch_npu._npu_paged_attention(x)", "no such operator"),
        ("torch.ops.npu.npu_rms_norm(x, gamma, 1e-5, True)", "4 arguments by position"),
    ],
)
def test_a_call_that_the_wheel_does_not_have_is_found(
    call: str, fault: str, npu_wheel: Wheel
) -> None:
    """An unknown operator, keyword or surplus argument shows in the source alone."""
    found = list(faults(call, npu_wheel))
    assert bool(found) == bool(fault)
    assert fault in "".join(found)


def test_our_calls_are_ones_the_wheel_has(npu_wheel: Wheel) -> None:
    """No module of the services calls an operator or names an argument that torch-npu lacks."""
    found = {
        str(path.relative_to(SOURCES)): problems
        for path in SOURCES.rglob("*.py")
        if (problems := list(faults(path.read_text(), npu_wheel)))
    }
    assert found == {}
