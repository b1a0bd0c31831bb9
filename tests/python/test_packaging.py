"""What a user gets: the sdist, the wheel, what importing costs, and stubs that tell the truth."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from fastpage import _C

REPOSITORY = Path(__file__).resolve().parents[2]
MIB = 1 << 20

LIST_MODULES = """
import importlib, json, sys, time
began = time.perf_counter()
importlib.import_module(sys.argv[1])
json.dump([time.perf_counter() - began, sorted(sys.modules)], sys.stdout)
"""


def in_new_python(*arguments: str) -> str:
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    build = "import sys, scikit_build_core.build as b; b.build_sdist(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, str(folder)], cwd=REPOSITORY, check=True)
    return next(folder.glob("fastpage-*.tar.gz"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the checkout, in the build directory that `pip install .` uses too."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = ["-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "-w", str(folder)]
    in_new_python(*pip, str(REPOSITORY))
    return next(folder.glob("fastpage-*.whl"))


def test_sdist_has_all_that_a_build_needs(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames()}
    tracked = subprocess.run(
        ["git", "ls-files", "-z"], cwd=REPOSITORY, capture_output=True, text=True
    )
    if tracked.returncode != 0:
        pytest.skip("not a git checkout")
    expected = {name for name in tracked.stdout.split("\0") if name and name[:4] != ".ci/"}
    assert names - expected == {"PKG-INFO"}, "more than what git tracks"
    missing = {name for name in expected - names if (REPOSITORY / name).exists()}
    assert not missing


def test_wheel_has_the_package_and_nothing_else(wheel: Path) -> None:
    size = wheel.stat().st_size
    print(f"\nwheel: {size / MIB:.2f} MiB")
    assert size < 10e6
    names = zipfile.ZipFile(wheel).namelist()
    extensions = [name for name in names if name.endswith(".so")]
    assert len(extensions) == 1 and extensions[0].startswith("fastpage/_C.")
    for name in ("_C/__init__.pyi", "_C/ops.pyi", "py.typed", "__init__.py"):
        assert f"fastpage/{name}" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    allowed = (".py", ".pyi", ".so", "py.typed", ".proto")
    for name in names:
        inside = name.startswith("fastpage/") and name.endswith(allowed)
        assert inside or ".dist-info/" in name, name


def test_wheel_is_stripped(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    binary = archive.read(next(name for name in archive.namelist() if name.endswith(".so")))
    assert b".debug_info" not in binary and b".symtab" not in binary


@pytest.mark.parametrize("module", ["fastpage", "fastpage._C", "fastpage.llm"])
def test_import_needs_neither_torch_nor_transformers(module: str) -> None:
    seconds, modules = json.loads(in_new_python("-c", LIST_MODULES, module))
    print(f"\nimport {module}: {1e3 * seconds:.0f} ms")
    loaded = {name.split(".")[0] for name in modules}
    assert not loaded & {"torch", "transformers", "huggingface_hub", "grpc"}


def test_extension_has_all_its_symbols() -> None:
    """The loader resolves functions lazily: one that was never defined shows only here."""
    environment = {**os.environ, "LD_BIND_NOW": "1"}
    command = [sys.executable, "-c", "import fastpage._C"]
    subprocess.run(command, env=environment, check=True)


# True of every pybind11 class, and nothing that a stub could say.
PYBIND11 = ("metaclass differs", 'stub does not have *args parameter "args"')


def test_stubs_match() -> None:
    """The stub of fastpage._C against the built module, argument by argument."""
    command = [sys.executable, "-m", "mypy.stubtest", "--concise", "fastpage._C"]
    done = subprocess.run(command, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("fastpage._C.")]
    errors = [line for line in lines if not line.endswith(PYBIND11)]
    if not hasattr(_C.cuda, "norm"):  # built without CUDA
        errors = [line for line in errors if not line.startswith("fastpage._C.cuda.")]
    assert len(errors) < len(lines), f"stubtest did not run: {done.stdout}{done.stderr}"
    assert not errors, "\n".join(errors)
