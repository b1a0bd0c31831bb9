"""A pytest plugin of run_cuda.py: says which test runs and how each ended, as it happens, in the
file that FASTPAGE_CUDA_RESULTS names, a JSON object a line. What is in that file is not run again.
With FASTPAGE_CUDA_SHARE=2/5 it is the second fifth of the tests that are run.

A kernel that fails leaves an error in the process which every later call returns: the process ends
there, so that no other test is blamed, and run_cuda.py starts one for the rest.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

RESULTS = Path(os.environ["FASTPAGE_CUDA_RESULTS"])
LOST = 86  # exit code: the device cannot be used any more


def note(**fields: Any) -> None:
    with RESULTS.open("a") as file:
        file.write(json.dumps(fields) + "\n")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    lines = RESULTS.read_text().splitlines() if RESULTS.exists() else []
    done = {json.loads(line).get("test") for line in lines}
    share, of = (int(x) for x in os.environ.get("FASTPAGE_CUDA_SHARE", "1/1").split("/"))
    items[:] = [item for item in items[share - 1 :: of] if item.nodeid not in done]
    note(collected=len(items))


def pytest_runtest_logstart(nodeid: str) -> None:
    note(test=nodeid, outcome="started")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when != "call" and report.passed:
        return
    message = ""
    if report.skipped:
        message = str(report.longrepr[-1]) if isinstance(report.longrepr, tuple) else "skipped"
    elif report.failed:
        message = report.longreprtext
    note(test=report.nodeid, outcome=report.outcome, seconds=report.duration, message=message)


def pytest_runtest_logfinish(nodeid: str) -> None:
    error = device_error()
    if error:
        note(test=nodeid, outcome="failed", seconds=0.0, message=f"the device is lost: {error}")
        os._exit(LOST)


def device_error() -> str:
    torch: Any = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return ""
    try:
        torch.cuda.synchronize()
    except Exception as error:
        return str(error)
    return ""
