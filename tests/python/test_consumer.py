"""A stranger's C++ project builds against an installed libfastpage and gets right answers."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


def run(*command: str | Path) -> str:
    done = subprocess.run(
        [str(part) for part in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, f"{command[0]}: exit status {done.returncode}\n{done.stdout}"
    return done.stdout


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """libfastpage, installed; from the CMake build that FASTPAGE_BUILD_DIR names, if it is set."""
    build = os.environ.get("FASTPAGE_BUILD_DIR")
    if not build:
        build = str(REPOSITORY / "build" / "library")
        run("cmake", "-S", REPOSITORY, "-B", build)
        run("cmake", "--build", build, "-j", str(os.cpu_count()))
    prefix = tmp_path_factory.mktemp("prefix")
    run("cmake", "--install", build, "--prefix", prefix)
    return prefix


def test_installed_files(prefix: Path) -> None:
    """Every public header and nothing private; no path of the build is left in what CMake reads."""
    public = {path.name for path in (REPOSITORY / "cpp/include/fastpage").glob("*.h")}
    assert {path.name for path in (prefix / "include/fastpage").iterdir()} == public
    assert not list(prefix.rglob("*.py")), "the Python package is not part of the C++ library"
    config = next(prefix.rglob("fastpageConfig.cmake")).parent
    for path in config.iterdir():
        assert str(REPOSITORY) not in path.read_text(), path.name


def test_consumer(prefix: Path, tmp_path: Path) -> None:
    source = REPOSITORY / "tests" / "consumer"
    run("cmake", "-S", source, "-B", tmp_path, f"-DCMAKE_PREFIX_PATH={prefix}")
    run("cmake", "--build", tmp_path)
    print(run(tmp_path / "consumer"))
