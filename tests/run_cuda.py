"""The CUDA kernels on a GPU: builds, then tests or times them: python tests/run_cuda.py test|bench.

For a machine that is there for minutes, and a build that may never have run on one: what fails is
told, and the rest goes on. Tests run in a process a file (or a share of it), several at once; a
test that hangs, crashes or loses the device is a failure of its own, and a new process has the
rest. All output goes to one file, the summary to another, which is up to date whenever this is
killed: both in the folder that OUT names, or in build/cuda-logs. Nothing is installed. Exit status
0: all has passed.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build" / "cuda"
TESTS = ROOT / "tests" / "python"
MODULES = ("torch", "numpy", "pybind11", "pytest")
# What runs beside is the last: it may have to be compiled first.
SECTIONS = ("decode", "prefill", "cache", "sampling", "steps", "experts", "peers")
# What takes longest, and into how many processes it is split.
SHARES = {"test_cuda_attention_combinations.py": 5}
SANITIZED = ("attention", "batch_invariant", "cache", "elementwise", "sampling")
SANITIZED_TESTS = (
    "plain or sequences_share or in_order or many_seeds or cache_float8 or residual or processed"
)
SANITIZERS = {
    # Torch asks the driver for what is not there, and goes on.
    "memcheck": ["--report-api-errors", "no"],
    "racecheck": [],
    "synccheck": [],
}
MOST_RESTARTS = 6  # of a file's process
# Reads what torch consists of from the disk, beside the build: gigabytes, the first time.
WARM_UP = """
import torch
x = torch.ones(1024, 1024, device="cuda", dtype=torch.bfloat16)
torch.cuda.CUDAGraph()
print(f"{torch.cuda.get_device_name()}: {float((x @ x)[0, 0]):.0f} of 1024")
"""
SHOWN_LINES = 14  # of a failure, in the summary


def clock() -> float:
    return time.monotonic()


@dataclass
class Outcome:
    name: str
    outcome: str  # passed, failed or skipped
    seconds: float = 0.0
    message: str = ""


@dataclass
class Report:
    """What is known so far; written whenever there is more."""

    title: str
    folder: Path
    started: float = field(default_factory=clock)
    facts: list[str] = field(default_factory=list)
    outcomes: list[Outcome] = field(default_factory=list)
    tables: list[str] = field(default_factory=list)
    lock: threading.RLock = field(default_factory=threading.RLock)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.log = self.folder / f"{self.title}-log.txt"
        self.summary = self.folder / f"{self.title}-summary.txt"
        self.log.write_text("")

    def say(self, line: str) -> None:
        with self.lock:
            print(f"[{clock() - self.started:5.0f} s] {line}", flush=True)

    def fact(self, line: str) -> None:
        self.say(line)
        self.facts.append(line)

    def keep(self, title: str, text: str) -> None:
        with self.lock, self.log.open("a") as file:
            file.write(f"\n===== {title}\n{text.rstrip()}\n")

    def add(self, *outcomes: Outcome) -> None:
        with self.lock:
            self.outcomes += outcomes
            self.summary.write_text(self.text(all_tests=True) + "\n")

    def failed(self) -> list[Outcome]:
        return [x for x in self.outcomes if x.outcome == "failed"]

    def text(self, all_tests: bool) -> str:
        failed = self.failed()
        parts = [*self.facts, ""]
        for outcome in failed if all_tests else failed[:12]:
            lines = outcome.message.rstrip().splitlines()
            left = len(lines) - SHOWN_LINES
            parts += [f"FAILED {outcome.name}"]
            parts += [f"    ... ({left} lines more in the log)"] if left > 0 else []
            parts += [f"    {line[:160]}" for line in lines[-SHOWN_LINES:]]
        if len(failed) > 12 and not all_tests:
            parts.append(f"... and {len(failed) - 12} more: see {self.summary}")
        parts += ["", *self.tables]
        if self.outcomes:
            parts.append(count_table(self.outcomes, by_file=not all_tests))
        counts = collections.Counter(x.outcome for x in self.outcomes)
        reasons = collections.Counter(x.message for x in self.outcomes if x.outcome == "skipped")
        parts += [f"skipped {n}: {reason}" for reason, n in reasons.items()]
        parts.append(
            f"{counts['passed']} passed, {counts['failed']} failed, {counts['skipped']} skipped in "
            f"{clock() - self.started:.0f} s; the whole output: {self.log}"
        )
        return "\n".join(parts)


def count_table(outcomes: Sequence[Outcome], by_file: bool) -> str:
    rows: dict[str, collections.Counter[str]] = {}
    for x in outcomes:
        name = x.name.split("::")[0] if by_file else x.name.split("[")[0]
        row = rows.setdefault(name.replace("tests/python/", ""), collections.Counter())
        row[x.outcome] += 1
        row["seconds"] += x.seconds  # type: ignore[assignment]
    lines = [f"| {'':78} | passed | failed | skipped | seconds |", f"|{'-' * 80}|{'---:|' * 4}"]
    for name, row in sorted(rows.items()):
        counts = f"{row['passed']:6} | {row['failed']:6} | {row['skipped']:7}"
        lines.append(f"| {name:78} | {counts} | {row['seconds']:7.1f} |")
    return "\n".join(lines)


# ---- processes


def kill(process: subprocess.Popen[Any], *signals: int) -> None:
    """The process and its children. One that the driver holds back is left behind."""
    for each in signals:
        try:
            os.killpg(process.pid, each)
            process.wait(5)
            return
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def run(command: Sequence[str], limit: float, **options: Any) -> tuple[int | None, str]:
    """Exit status, None if it took longer than `limit`, and output."""
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True, **options
        )
        status: int | None = None
        try:
            status = process.wait(max(1.0, limit))
        except subprocess.TimeoutExpired:
            kill(process, signal.SIGTERM, signal.SIGKILL)
        output.seek(0)
        return status, output.read()


def ask(*command: str) -> str:
    try:
        status, output = run(command, 30)
    except OSError:
        return ""
    return output.strip() if status == 0 else ""


def environment(**more: str) -> dict[str, str]:
    path = os.pathsep.join([str(ROOT / "python"), str(ROOT / "tests")])
    old = os.environ.get("PYTHONPATH")
    return os.environ | {
        "PYTHONPATH": path + (os.pathsep + old if old else ""),
        "PYTHONUNBUFFERED": "1",
        "FASTPAGE_TEST_GPU": "1",
        "HF_HUB_OFFLINE": "1",
        **more,
    }


def pytest_command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]


def test_environment(processes: int, **more: str) -> dict[str, str]:
    """Of one of so many processes: threads for its share of the CPUs, and no plugins but ours,
    whatever this Python has."""
    threads = max(1, (os.cpu_count() or 1) // processes)
    return environment(OMP_NUM_THREADS=str(threads), PYTEST_DISABLE_PLUGIN_AUTOLOAD="1", **more)


# ---- the machine and the build


def find_nvcc() -> str | None:
    found = shutil.which("nvcc")
    if found is None:
        places = [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))]
        places += sorted(Path("/usr/local").glob("cuda-*"), reverse=True)
        found = next((str(p / "bin/nvcc") for p in places if (p / "bin/nvcc").exists()), None)
    return found


def toolkit() -> Path:
    """Where CUDA's headers and tools are: nvcc on the PATH may be a script elsewhere."""
    nvcc = Path(find_nvcc() or "nvcc")
    places = [nvcc.resolve().parents[1], Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))]
    return next((p for p in places if (p / "include/cuda_runtime.h").exists()), places[0])


def look_around(report: Report) -> tuple[str, str] | None:
    """The GPU's architecture and nvcc, unless something is missing."""
    # A virtual environment that was not activated has its cmake and ninja there.
    os.environ["PATH"] = os.pathsep.join(
        [os.environ.get("PATH", os.defpath), sysconfig.get_path("scripts")]
    )
    gpu = ask("nvidia-smi", "--query-gpu=name,compute_cap,driver_version", "--format=csv,noheader")
    nvcc = find_nvcc()
    missing = [
        f"{name}: {sys.executable} -m pip install {name}"
        for name in MODULES
        if importlib.util.find_spec(name) is None
    ]
    missing += [] if gpu else ["a GPU: nvidia-smi lists none"]
    missing += [] if nvcc else ["nvcc: on the PATH, in CUDA_HOME or in /usr/local/cuda"]
    missing += [] if shutil.which("cmake") else ["cmake, on the PATH"]
    header = Path(sysconfig.get_path("include")) / "Python.h"
    missing += [] if header.exists() else [f"{header}: the package python3-dev or the like"]
    if missing or nvcc is None:
        report.fact("error: nothing was built or run. Missing: " + "; ".join(missing))
        return None
    report.fact(f"GPU: {gpu.splitlines()[0]}")
    report.fact(f"nvcc: {ask(nvcc, '--version').rpartition(chr(10))[2]}")
    modules = " ".join(f"{name} {importlib.metadata.version(name)}" for name in MODULES)
    report.fact(f"Python {platform.python_version()} with {modules}; {os.cpu_count()} CPUs")
    return gpu.splitlines()[0].split(",")[1].strip().replace(".", ""), nvcc


def warm_up(report: Report, limit: float) -> None:
    begin = clock()
    status, output = run([sys.executable, "-c", WARM_UP], limit)
    report.keep("torch on the GPU", output)
    outcome = Outcome("torch on the GPU", "passed", clock() - begin)
    if status != 0:
        outcome.outcome, outcome.message = "failed", output
    report.add(outcome)
    report.say(f"torch on the GPU: {outcome.outcome} in {outcome.seconds:.0f} s")


def build(report: Report, architecture: str, nvcc: str, jobs: int, limit: float) -> bool:
    begin = clock()
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    if (BUILD / "CMakeCache.txt").exists():
        generator = []  # the one it has
    definitions = {
        "FASTPAGE_CUDA": "ON",
        "FASTPAGE_PYTHON": "ON",
        "FASTPAGE_INPLACE": "ON",
        "CMAKE_CUDA_COMPILER": nvcc,
        "CMAKE_CUDA_ARCHITECTURES": architecture,
        "Python_EXECUTABLE": sys.executable,
    }
    configure = ["cmake", "-S", str(ROOT), "-B", str(BUILD), *generator]
    configure += [f"-D{name}={value}" for name, value in definitions.items()]
    status, output = run(configure, limit, cwd=ROOT)
    report.keep("cmake", output)
    if status == 0:
        uses_ninja = (BUILD / "build.ninja").exists()
        go_on = ["--", "-k", "0"] if uses_ninja else ["--", "-k"]
        command = ["cmake", "--build", str(BUILD), "--target", "_C", "-j", str(jobs), *go_on]
        status, output = run(command, limit - (clock() - begin), cwd=ROOT)
        report.keep("build", output)
    seconds = clock() - begin
    if status == 0:
        command = [
            sys.executable,
            "-c",
            "from fastpage import _C; print(_C.cuda.unavailable_reason())",
        ]
        status, output = run(command, 60, env=environment())
        reason = output.strip()
        if status == 0 and not reason:
            report.add(Outcome("build", "passed", seconds))
            report.say(f"built for sm_{architecture} in {seconds:.0f} s")
            return True
        report.keep("import", output)
        output = f"the extension was built, but cannot be used: {reason}"
    errors = [line for line in output.splitlines() if "error" in line.lower()]
    told = "took too long" if status is None else "\n".join(errors[:10] + output.splitlines()[-10:])
    report.add(Outcome("build", "failed", seconds, told))
    return False


# ---- tests


def read_results(path: Path) -> tuple[list[Outcome], str | None]:
    """What has ended, and the test that has only begun."""
    outcomes: dict[str, Outcome] = {}
    started = None
    for line in path.read_text().splitlines() if path.exists() else []:
        fields = json.loads(line)
        name = fields.get("test")
        if name is None:
            continue
        if fields["outcome"] == "started":
            started = name
            continue
        started = None if started == name else started
        new = Outcome(name, fields["outcome"], fields["seconds"], fields["message"])
        old = outcomes.get(name)
        if old is None or old.outcome != "failed":
            outcomes[name] = new
        elif new.outcome == "failed":
            old.message += "\n" + new.message
    return list(outcomes.values()), started


def wait_for(process: subprocess.Popen[Any], results: Path, each: float, until: float) -> str:
    """Empty once it has ended by itself; else why it was ended."""
    last, since = -1, clock()
    while process.poll() is None:
        size = results.stat().st_size if results.exists() else 0
        now = clock()
        if size != last:
            last, since = size, now
        reason = ""
        # Until it has said how many tests it collected, it imports.
        allowed = each if size > 0 else 2 * each
        if now - since > allowed:
            reason = f"took longer than {allowed:.0f} s"
        elif now > until:
            reason = "no time was left"
        if reason:
            # SIGABRT: Python says where every thread is.
            kill(process, signal.SIGABRT, signal.SIGKILL)
            return reason
        time.sleep(0.2)
    return ""


def last_words(output: str) -> str:
    """Where Python was, the innermost call first, if it says so."""
    _, fatal, stack = output.rpartition("Fatal Python error")
    if not fatal:
        return output[-3000:]
    return "\n".join((fatal + stack).splitlines()[: SHOWN_LINES - 1])


def test_file(
    report: Report, name: str, each: float, until: float, *, share: str = "1/1", processes: int = 1
) -> None:
    """One file's tests or a share of them, in as many processes as it takes; `processes` run
    beside each other."""
    begin = clock()
    title = name if share == "1/1" else f"{name} {share}"
    with tempfile.TemporaryDirectory() as folder:
        results, output = Path(folder) / "results", Path(folder) / "output"
        env = test_environment(
            processes, FASTPAGE_CUDA_RESULTS=str(results), FASTPAGE_CUDA_SHARE=share
        )
        command = pytest_command("-p", "cuda_session", str(TESTS / name))
        failure = ""
        for _ in range(MOST_RESTARTS + 1):
            with output.open("w") as file:
                process = subprocess.Popen(
                    command, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, env=env,
                    start_new_session=True,
                )  # fmt: skip
                reason = wait_for(process, results, each, until)
            text = output.read_text(errors="replace")
            report.keep(f"pytest {title}: {reason or f'exit status {process.returncode}'}", text)
            outcomes, started = read_results(results)
            if started is not None:
                ending = reason or f"ended its process: {process.returncode}"
                message = f"{last_words(text)}\n{ending}"
                with results.open("a") as file:
                    fields = {"test": started, "outcome": "failed", "seconds": 0.0}
                    file.write(json.dumps(fields | {"message": message}) + "\n")
                outcomes, _ = read_results(results)
            lost_device = process.returncode == 86
            if process.returncode in (0, 1, 5) and not reason:
                break  # passed, failed, or nothing was left to do
            if reason == "no time was left" or (started is None and not lost_device):
                failure = f"{text[-3000:]}\n{reason or f'exit status {process.returncode}'}"
                break
        else:
            failure = f"given up after {MOST_RESTARTS} processes"
        if failure:
            outcomes.append(Outcome(f"tests/python/{title}::(the rest)", "failed", 0.0, failure))
        # Pytest tells at its end, which a process may not see.
        for outcome in outcomes:
            if outcome.outcome == "failed":
                report.keep(f"FAILED {outcome.name}", outcome.message)
        report.add(*outcomes)
    counts = collections.Counter(x.outcome for x in outcomes)
    report.say(f"{title}: {dict(counts)} in {clock() - begin:.0f} s")


def sanitize(report: Report, tool: str, limit: float) -> None:
    name = f"compute-sanitizer {tool}, on a part"
    begin = clock()
    sanitizer = shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path=str(toolkit() / "bin")
    )
    if sanitizer is None:
        report.add(Outcome(name, "skipped", 0.0, "there is no compute-sanitizer"))
        return
    if limit < 20:
        report.add(Outcome(name, "skipped", 0.0, "no time was left for compute-sanitizer"))
        return
    command = [sanitizer, "--tool", tool, *SANITIZERS[tool], "--error-exitcode", "9"]
    files = [str(TESTS / f"test_cuda_{name}.py") for name in SANITIZED]
    command += pytest_command(*files, "-k", SANITIZED_TESTS)
    env = test_environment(len(SANITIZERS), PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    status, output = run(command, limit, cwd=ROOT, env=env)
    report.keep(name, output)
    outcome = Outcome(name, "passed", clock() - begin)
    said = [line for line in output.splitlines() if line.startswith("=========")]
    if status is None and len(said) <= 1:  # it introduces itself
        outcome.outcome, outcome.message = "skipped", f"{name}: not done in {limit:.0f} s"
    elif status != 0:
        outcome.outcome = "failed"
        outcome.message = "\n".join(said[:SHOWN_LINES] or output.splitlines()[-SHOWN_LINES:])
    report.add(outcome)
    report.say(f"{name}: {outcome.outcome} in {outcome.seconds:.0f} s")


def test(report: Report, options: argparse.Namespace, until: float) -> None:
    processes = options.processes
    # The slowest first.
    files = sorted(
        TESTS.glob("test_cuda_*.py"), key=lambda p: (-SHARES.get(p.name, 1), -p.stat().st_size)
    )
    with concurrent.futures.ThreadPoolExecutor(processes) as pool:
        futures = []
        for file in files:
            count = SHARES.get(file.name, 1)
            for share in (f"{i}/{count}" for i in range(1, count + 1)):
                arguments = (report, file.name, options.each, until - 60)
                options_ = {"share": share, "processes": processes}
                futures.append(pool.submit(test_file, *arguments, **options_))
        for future in futures:
            future.result()
    with concurrent.futures.ThreadPoolExecutor(len(SANITIZERS)) as pool:
        for future in [pool.submit(sanitize, report, tool, until - clock()) for tool in SANITIZERS]:
            future.result()


# ---- benchmarks


def bench(report: Report, options: argparse.Namespace, until: float) -> None:
    """A process a section, one after the other."""
    rows: list[dict[str, Any]] = []
    for section in SECTIONS:
        begin = clock()
        path = report.folder / "cuda-bench.json"
        with tempfile.TemporaryDirectory() as folder:
            part = Path(folder) / "rows.json"
            command = [sys.executable, str(ROOT / "benchmarks" / "kernels_cuda.py")]
            command += ["--sections", section, "--json", str(part)]
            limit = until - begin
            if section != SECTIONS[-1]:
                limit = min(options.each, limit)
            # What FlashInfer compiles with, and to.
            env = environment(CUDA_HOME=str(toolkit()), FLASHINFER_WORKSPACE_BASE=str(BUILD))
            status, output = run(command, limit, cwd=ROOT, env=env)
            rows += json.loads(part.read_text())["rows"] if part.exists() else []
        report.keep(f"benchmark {section}", output)
        report.tables.append(output.rstrip())
        told = f"{output[-3000:]}\n" + (f"took longer than {limit:.0f} s" if status is None else "")
        outcome = Outcome(f"benchmark {section}", "passed", clock() - begin)
        if status != 0:
            outcome.outcome, outcome.message = "failed", told
        report.add(outcome)
        path.write_text(json.dumps({"facts": report.facts, "rows": rows}, indent=1))
        report.say(f"{section}: {outcome.outcome} in {outcome.seconds:.0f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("test", "bench"))
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 4, help="compilers at once")
    parser.add_argument("--processes", type=int, default=7, help="of tests at once")
    parser.add_argument("--each", type=float, default=60, help="most seconds of a test or section")
    parser.add_argument("--limit", type=float, default=540, help="seconds for all")
    options = parser.parse_args()
    folder = Path(os.environ.get("OUT") or ROOT / "build" / "cuda-logs")
    report = Report(f"cuda-{options.what}", folder)
    until = report.started + options.limit
    found = look_around(report)
    if found is None:
        sys.exit(1)
    warm = threading.Thread(target=warm_up, args=(report, options.limit * 0.3))
    warm.start()
    is_built = build(report, *found, options.jobs, options.limit * 0.7)
    warm.join()
    if is_built:
        (test if options.what == "test" else bench)(report, options, until)
    report.add()
    print(report.text(all_tests=False))
    sys.exit(1 if report.failed() else 0)


if __name__ == "__main__":
    main()
