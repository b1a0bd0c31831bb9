"""The stubs of fastpage._C say what the module has: every class, member, function and parameter."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import fastpage._C.ops
from fastpage import _C

STUBS = Path(fastpage.__file__).parent / "_C"
MODULES = [(_C, STUBS / "__init__.pyi"), (_C.ops, STUBS / "ops.pyi")]


def public(names: Any) -> set[str]:
    return {name for name in names if not name.startswith("_")}


def decorators(node: Any) -> set[str]:
    return {d.id for d in node.decorator_list if isinstance(d, ast.Name)}


def definitions(module: ModuleType, stub: Path) -> Iterator[tuple[ast.stmt, Any]]:
    """Each class and function of the stub, beside the real one."""
    for node in ast.parse(stub.read_text()).body:
        is_one = isinstance(node, ast.ClassDef | ast.FunctionDef)
        if is_one and "type_check_only" not in decorators(node):
            yield node, getattr(module, node.name)


def parameters(function: Any) -> list[list[str]]:
    """Of each overload, without self, as pybind11 writes them into the docstring."""
    lines = [line for line in function.__doc__.splitlines() if " -> " in line and "(" in line]
    name = re.escape(function.__name__)
    signatures = [re.search(rf"\b{name}\((.*)\) -> ", line) for line in lines]
    names = [re.findall(r"(?:^|, )\*{0,2}(\w+)(?=:|,|$)", _flat(s[1])) for s in signatures if s]
    return [[each for each in some if each != "self"] for some in names]


def _flat(signature: str) -> str:
    """Without what stands in brackets: it has commas of its own."""
    while True:
        shorter = re.sub(r"\[[^\[\]]*\]|\([^()]*\)|\{[^{}]*\}|'[^']*'", "", signature)
        if shorter == signature:
            return signature
        signature = shorter


def stub_parameters(node: ast.FunctionDef) -> list[str]:
    names = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
    names += [node.args.kwarg.arg] if node.args.kwarg else []
    return [name for name in names if name != "self"]


@pytest.mark.parametrize(("module", "stub"), MODULES, ids=["_C", "_C.ops"])
def test_names(module: ModuleType, stub: Path) -> None:
    stated = {node.name for node, _ in definitions(module, stub)}
    real = {n for n in public(vars(module)) if not isinstance(getattr(module, n), ModuleType)}
    assert public(stated) == real
    for node, cls in definitions(module, stub):
        if not isinstance(node, ast.ClassDef):
            continue
        kinds = ast.FunctionDef | ast.ClassDef
        members = {each.name for each in node.body if isinstance(each, kinds)}
        members |= {e.target.id for e in node.body if isinstance(e, ast.AnnAssign)}
        members, real = public(members), public(dir(cls))
        assert members <= real, node.name
        assert public(vars(cls)) <= members, node.name


@pytest.mark.parametrize(("module", "stub"), MODULES, ids=["_C", "_C.ops"])
def test_parameters(module: ModuleType, stub: Path) -> None:
    checked = 0
    for node, real in definitions(module, stub):
        methods = [node] if isinstance(node, ast.FunctionDef) else node.body
        for method in methods:
            if not isinstance(method, ast.FunctionDef) or "property" in decorators(method):
                continue
            function = real if method is node else getattr(real, method.name)
            overloads = parameters(function) if function.__doc__ else []
            if overloads:  # what Python itself adds to a class has none
                assert stub_parameters(method) in overloads, f"{node.name}.{method.name}"
                checked += 1
    assert checked > 10
