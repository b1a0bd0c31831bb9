"""tests/run_cuda.py, with tests that end as those of a GPU may: one that fails hides no other."""

from __future__ import annotations

import importlib.util
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

FILE = """
import os, pathlib, signal
import cuda_session
import pytest

def test_first():
    pass

@pytest.mark.parametrize("n", [1, 2])
def test_fails(n):
    assert n == 1, "as it should"

def test_crashes():
    os.kill(os.getpid(), signal.SIGSEGV)

def test_skipped():
    pytest.skip("no such GPU")

def test_loses_the_device(monkeypatch):
    cuda_session.device_error = lambda: "an illegal memory access"
    assert False, "what was seen of it"

def test_after_that():
    pass

def test_hangs():
    pathlib.Path(__file__).with_name("hangs").touch()
    signal.pause()

def test_last():
    pass
"""


@pytest.fixture
def run_cuda(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    path = Path(__file__).parents[1] / "run_cuda.py"
    spec = importlib.util.spec_from_file_location("run_cuda", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(__import__("sys").modules, "run_cuda", module)  # for its dataclasses
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "TESTS", tmp_path)
    return module


def outcomes(report: object) -> dict[str, str]:
    return {x.name.split("::")[-1]: x.outcome for x in report.outcomes}  # type: ignore[attr-defined]


def test_every_test_has_an_outcome(
    run_cuda: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hangs, hours = tmp_path / "hangs", 0

    def clock() -> float:
        """An hour passes whenever it is asked for while a test hangs."""
        nonlocal hours
        hours += hangs.exists()
        return time.monotonic() + 3600 * hours

    def kill(*args: Any, real: Any = run_cuda.kill) -> None:
        real(*args)
        hangs.unlink(missing_ok=True)

    monkeypatch.setattr(run_cuda, "kill", kill)
    monkeypatch.setattr(run_cuda, "clock", clock)
    (tmp_path / "test_cuda_x.py").write_text(FILE)
    report = run_cuda.Report("cuda-test", tmp_path / "logs")
    run_cuda.test_file(report, "test_cuda_x.py", each=600, until=time.monotonic() + 90_000)
    assert outcomes(report) == {
        "test_first": "passed",
        "test_fails[1]": "passed",
        "test_fails[2]": "failed",
        "test_crashes": "failed",
        "test_skipped": "skipped",
        "test_loses_the_device": "failed",
        "test_after_that": "passed",
        "test_hangs": "failed",
        "test_last": "passed",
    }
    summary = report.summary.read_text()
    for said in (
        "as it should",
        "ended its process: -11",
        "the device is lost: an illegal memory access",
        "took longer than 600 s",
        "in test_hangs",  # where it was
        "no such GPU",
        "4 passed, 4 failed, 1 skipped",
    ):
        assert said in summary, said
    assert "what was seen of it" in report.log.read_text()


def test_shares_are_the_whole(run_cuda: ModuleType, tmp_path: Path) -> None:
    file = "import pytest\n@pytest.mark.parametrize('n', range(7))\ndef test_it(n): pass\n"
    (tmp_path / "test_cuda_x.py").write_text(file)
    report = run_cuda.Report("cuda-test", tmp_path / "logs")
    seen = []
    for share in ("1/3", "2/3", "3/3"):
        until = time.monotonic() + 900
        run_cuda.test_file(report, "test_cuda_x.py", 600, until, share=share, processes=3)
        seen.append(len(report.outcomes))
    assert seen == [3, 5, 7]
    assert outcomes(report) == {f"test_it[{n}]": "passed" for n in range(7)}


def test_plugins_of_this_python_stay_out(
    run_cuda: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that cannot be loaded, as found by its entry point."""
    info = tmp_path / "site" / "bad-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: bad\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[pytest11]\nbad = no_such_module\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    (tmp_path / "test_cuda_x.py").write_text("def test_it(): pass")
    report = run_cuda.Report("cuda-test", tmp_path / "logs")
    run_cuda.test_file(report, "test_cuda_x.py", each=600, until=time.monotonic() + 900)
    assert outcomes(report) == {"test_it": "passed"}


def test_a_file_that_cannot_be_read(run_cuda: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "test_cuda_x.py").write_text("import no_such_module")
    report = run_cuda.Report("cuda-test", tmp_path / "logs")
    run_cuda.test_file(report, "test_cuda_x.py", each=600, until=time.monotonic() + 900)
    assert outcomes(report) == {"(the rest)": "failed"}
    assert "no_such_module" in report.text(all_tests=False)


def test_no_time_is_left(run_cuda: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "test_cuda_x.py").write_text("def test_it(): pass")
    report = run_cuda.Report("cuda-test", tmp_path / "logs")
    run_cuda.test_file(report, "test_cuda_x.py", each=60, until=time.monotonic())
    assert outcomes(report) == {"(the rest)": "failed"}
    assert "no time was left" in report.text(all_tests=False)


def test_tools_beside_this_python_are_found(
    run_cuda: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a virtual environment that is not active."""
    (tmp_path / "cmake").touch(mode=0o755)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(run_cuda.sysconfig, "get_path", lambda name: str(tmp_path))
    report = run_cuda.Report("cuda-test", tmp_path / "logs")
    assert run_cuda.look_around(report) is None
    assert "nvidia-smi lists none" in report.facts[0]
    assert "cmake" not in report.facts[0]
