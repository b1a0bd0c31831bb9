"""fastpage._C.cuda with and without CUDA in the build, with and without a driver."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
from cuda_kernels import load_emulation

import fastpage
from fastpage import _C

STUB = Path(fastpage.__file__).parent / "_C" / "cuda.pyi"
IMPORT = "import _C; print(_C.cuda.is_available()); print(_C.cuda.unavailable_reason())"


def test_what_is_missing_is_said() -> None:
    assert bool(_C.cuda.unavailable_reason()) != _C.cuda.is_available()


def test_a_build_imports_without_a_driver() -> None:
    """The C++ tests' build, which has CUDA where nvcc is."""
    folder = Path(os.environ.get("FASTPAGE_BUILD_DIR", "none")) / "python"
    if not list(folder.glob("_C.*.so")):
        pytest.skip("FASTPAGE_BUILD_DIR names no build with the extension")
    command = [sys.executable, "-c", IMPORT]
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    available, reason = run.stdout.split("\n")[:2]
    assert (available, bool(reason)) in [("True", False), ("False", True)]


def test_stub_names_every_function() -> None:
    module = load_emulation()
    if module is None:
        pytest.skip("there is no emulation in FASTPAGE_BUILD_DIR")
    nodes = [n for n in ast.parse(STUB.read_text()).body if isinstance(n, ast.FunctionDef)]
    stated = {
        node.name: [a.arg for a in (*node.args.args, *node.args.kwonlyargs)] for node in nodes
    }
    only_there = {"is_available", "unavailable_reason"}
    functions = {
        name for name, x in vars(module).items() if callable(x) and not isinstance(x, type)
    }
    functions -= {"set_schedule", "set_max_shared", "bytes_loaded", "load_ptx", "ptx_counts"}
    assert set(stated) - only_there == functions
    for name in functions:
        text = getattr(module, name).__doc__.split(" -> ")[0]
        assert [p for p in stated[name] if f"{p}:" not in text] == [], name
