"""What the runners of all engines share: the protocol with offline.py, the clock, memory and CPU.

A runner is a process of its own, in whatever Python its engine needs. It is started with one JSON
argument (Options), says when its engine is ready, then measures one part of the workload for each
line on stdin and answers with one JSON line. What its engine prints goes to stderr.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import signal
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple, TypedDict


class Request(TypedDict):
    prompt: list[int]
    out: int


Generate = Callable[[list[Request]], list[list[int]]]
"""Serves all requests greedily, ignoring EOS, and returns the output token ids."""


class Options(TypedDict):
    model: str  # a path, in the form that the engine reads
    settings: dict[str, Any]  # the contestant's own (contestants.py)
    peer_folder: str  # where the engine is installed, if not in this Python
    threads: int
    workload: str  # path of workload.json
    w1_requests: int  # only the first so many of W1
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int


class CpuTimes(NamedTuple):
    clock: float
    machine: float  # CPU seconds, all processes
    own: float  # CPU seconds of this process and its descendants

    def load_until(self, end: CpuTimes) -> dict[str, float]:
        """Cores busy on average: with this process tree's work, and with anybody else's."""
        seconds = max(end.clock - self.clock, 1e-6)
        own = end.own - self.own
        foreign = max(0.0, end.machine - self.machine - own)
        return {
            "own_cores": round(own / seconds, 2),
            "foreign_cores": round(foreign / seconds, 2),
        }


def process_tree() -> list[int]:
    """This process and all of its descendants."""
    children: dict[int, list[int]] = {}
    for entry in filter(str.isdigit, os.listdir("/proc")):
        fields = stat_fields(int(entry))
        if fields:
            children.setdefault(int(fields[1]), []).append(int(entry))
    found = [os.getpid()]
    for pid in found:  # grows while it is read
        found.extend(children.get(pid, ()))
    return found


def stat_fields(pid: int) -> list[str]:
    """/proc/PID/stat from the state on (field 3); empty if the process is gone."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()
    except OSError:
        return []


def cpu_times() -> CpuTimes:
    ticks = os.sysconf("SC_CLK_TCK")
    with open("/proc/stat") as file:
        user, nice, system, _, _, irq, softirq, steal = map(int, file.readline().split()[1:9])
    own = sum(int(f[11]) + int(f[12]) for f in map(stat_fields, process_tree()) if f)
    machine = user + nice + system + irq + softirq + steal
    return CpuTimes(time.perf_counter(), machine / ticks, own / ticks)


def peak_rss_mib() -> float:
    """Peak resident memory, summed over the process tree."""
    kib = 0
    for pid in process_tree():
        try:
            with open(f"/proc/{pid}/status") as file:
                kib += sum(int(line.split()[1]) for line in file if line.startswith("VmHWM"))
        except OSError:
            pass
    return round(kib / 1024, 1)


def timed(generate: Generate, requests: list[Request]) -> tuple[float, list[list[int]]]:
    began = time.perf_counter()
    outputs = generate(requests)
    seconds = time.perf_counter() - began
    lengths, wanted = [len(ids) for ids in outputs], [request["out"] for request in requests]
    if lengths != wanted:
        raise RuntimeError(f"wrong output lengths: {lengths}, asked for: {wanted}")
    return seconds, outputs


def measure_w1(generate: Generate, requests: list[Request]) -> dict[str, Any]:
    seconds, outputs = timed(generate, requests)
    tokens_out = sum(map(len, outputs))
    tokens_in = sum(len(request["prompt"]) for request in requests)
    return {
        "requests": len(requests),
        "seconds": round(seconds, 3),
        "out_tok_s": round(tokens_out / seconds, 2),
        "total_tok_s": round((tokens_in + tokens_out) / seconds, 2),
        "digest": hashlib.sha256(json.dumps(outputs).encode()).hexdigest()[:12],
    }


def measure_w2(generate: Generate, requests: list[Request]) -> dict[str, Any]:
    """Time to first token: a request of its own with fresh ids and one output token."""
    first, per_token = [], []
    for i, request in enumerate(requests[:4]):
        other = requests[(i + 1) % len(requests)]
        ttft, _ = timed(generate, [{**other, "out": 1}])
        total, _ = timed(generate, [request])
        first.append(ttft)
        per_token.append((total - ttft) / (request["out"] - 1))
    return {
        "ttft_ms": round(1e3 * statistics.median(first), 2),
        "tpot_ms": round(1e3 * statistics.median(per_token), 3),
        "tpot_min_ms": round(1e3 * min(per_token), 3),
    }


def measure_w3(generate: Generate, requests: list[Request]) -> dict[str, Any]:
    seconds = statistics.median(timed(generate, [request])[0] for request in requests[:3])
    return {
        "seconds": round(seconds, 4),
        "tok_s": round(len(requests[0]["prompt"]) / seconds, 1),
    }


MEASURES = {"W1": measure_w1, "W2": measure_w2, "W3": measure_w3}


def end_with_parent() -> None:
    """Linux ends this process when the one that started it is gone, even while it is stopped."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def options() -> Options:
    """Call it first: from here on, stdout belongs to the protocol alone, and offline.py stops and
    continues this process and its helpers as one group."""
    global answers
    os.setpgrp()
    end_with_parent()
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    return json.loads(sys.argv[1])


answers: Any = None
process_began = time.perf_counter()


def serve(
    opts: Options,
    engine: str,
    generate: Generate,
    facts: Callable[[str], dict[str, Any]] = lambda part: {},
    about: dict[str, Any] | None = None,
) -> None:
    """Measures what stdin asks for. facts(part): more figures about the part just measured;
    `about`: about the engine."""
    with open(opts["workload"]) as file:
        workload = json.load(file)
    workload["W1"] = workload["W1"][: opts["w1_requests"]]
    loaded = time.perf_counter() - process_began
    generate(workload["warm"])
    ready = {"engine": engine, "load_s": round(loaded, 2), "peak_rss_mib": peak_rss_mib()}
    facts("warm")
    print(json.dumps(ready | (about or {})), file=answers)
    for line in sys.stdin:
        part = line.strip()
        began = cpu_times()
        figures = MEASURES[part](generate, workload[part])
        figures.update(began.load_until(cpu_times()))
        figures.update(facts(part), peak_rss_mib=peak_rss_mib())
        print(json.dumps(figures), file=answers)
