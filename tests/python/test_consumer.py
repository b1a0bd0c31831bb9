"""A stranger's C++ project builds against an installed libfastpage and gets right answers."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
CMAKE = (sys.executable, "-m", "cmake")


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
        run(*CMAKE, "-S", REPOSITORY, "-B", build)
        run(*CMAKE, "--build", build, "-j", str(os.cpu_count()))
    prefix = tmp_path_factory.mktemp("prefix")
    run(*CMAKE, "--install", build, "--prefix", prefix)
    return prefix


def test_installed_files(prefix: Path) -> None:
    """Every public header and nothing private; no path of the build is left in what CMake reads."""
    public = {path.name for path in (REPOSITORY / "cpp/include/fastpage").glob("*.h")}
    assert {path.name for path in (prefix / "include/fastpage").iterdir()} == public
    assert not list(prefix.rglob("*.py")), "the Python package is not part of the C++ library"
    config = next(prefix.rglob("fastpageConfig.cmake")).parent
    for path in config.iterdir():
        assert str(REPOSITORY) not in path.read_text(), path.name


def build_and_run(project: Path, prefix: Path, build: Path) -> str:
    run(*CMAKE, "-S", project, "-B", build, f"-DCMAKE_PREFIX_PATH={prefix}")
    run(*CMAKE, "--build", build)
    return run(build / "consumer")


def test_consumer(prefix: Path, tmp_path: Path) -> None:
    print(build_and_run(REPOSITORY / "tests" / "consumer", prefix, tmp_path))


def test_readme(prefix: Path, tmp_path: Path) -> None:
    """The C++ program in the README does what it says."""
    readme = (REPOSITORY / "README.md").read_text()
    (tmp_path / "main.cc").write_text(readme.split("```cpp\n")[1].split("```")[0])
    shutil.copy(REPOSITORY / "tests" / "consumer" / "CMakeLists.txt", tmp_path)
    assert build_and_run(tmp_path, prefix, tmp_path / "build").strip() == "6 12 24 48 96"
