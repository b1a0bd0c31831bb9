"""The control plane alone, no model: what the scheduler costs, in C++ and through fastpage._C.

scheduler_work.py describes the work: S1, S2, S5 and `pool`; in C++ also what single features cost a
step of S1. Times are wall clock; a step's is schedule + update, prepare (the input arrays) stands
apart. Each figure is the lowest median (S1,
pool) or the lowest total (S2, S5) of the repeats. From Python a call's time includes reading its
results as arrays. `cold`: 64 MiB are streamed through the caches before schedule and before update.

    scheduler.py --cpp PATH           PATH: scheduler_bench, built with FASTPAGE_BENCHMARKS=ON
    scheduler.py --vllm-python PATH   a Python that has vLLM: its scheduler on the same work,
                                      measured by thread CPU time, which leaves out what others took

The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import scheduler_work as work

from fastpage import _C

HERE = Path(__file__).parent
now = time.perf_counter_ns
Figures = dict[str, float]


def median_us(ns: list[int]) -> float:
    return statistics.median(ns) / 1e3


class Driver:
    """Runs steps and remembers what each took, in ns."""

    def __init__(self, sizes: work.Sizes) -> None:
        self.scheduler = _C.Scheduler(
            _C.SchedulerConfig(block_size=work.BLOCK_SIZE, hash_key_lo=1, **vars(sizes))
        )
        self.batch = _C.InputBatch()
        self.sampled = np.arange(sizes.max_num_seqs, dtype=np.int32)
        self.memory = np.zeros(0, np.uint64)  # streamed through the caches between calls
        self.forget()

    def forget(self) -> None:
        self.schedule: list[int] = []
        self.prepare: list[int] = []
        self.update: list[int] = []

    @property
    def both(self) -> list[int]:
        return [a + b for a, b in zip(self.schedule, self.update, strict=True)]

    def add(self, prompt: list[int], max_tokens: int) -> None:
        params = _C.SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
        self.scheduler.add_request(prompt, params)

    def step(self) -> _C.SchedulerOutput:
        self.memory += 1
        t0 = now()
        step = self.scheduler.schedule()
        _ = step.request_ids, step.num_computed_tokens, step.num_new_tokens, step.num_sampling_rows
        t1 = now()
        batch = self.batch
        self.scheduler.prepare(step, batch)
        _ = batch.token_ids, batch.positions, batch.slot_mapping, batch.query_start_loc
        _ = batch.seq_lens, batch.block_tables, batch.logits_indices
        t2 = now()
        sampled = self.sampled[: batch.num_samples]
        self.memory += 1
        t3 = now()
        updates = self.scheduler.update(step, sampled)
        _ = updates.request_ids, updates.num_new_tokens, updates.new_token_ids
        _ = updates.finish_reasons
        t4 = now()
        self.schedule.append(t1 - t0)
        self.prepare.append(t2 - t1)
        self.update.append(t4 - t3)
        return step

    def steady(self, num_seqs: int, base: int, steps: int, cold: bool) -> None:
        """Times `steps` steps of sequences that are decoding."""
        for i in range(num_seqs):
            prompt = work.tokens(i, work.s1_prompt_len(i, base))
            self.add(prompt, work.S1_WARM_UP + steps + 2)
        for _ in range(work.S1_WARM_UP):
            self.step()
        self.forget()
        settle()
        if cold:
            self.memory = np.zeros(work.COLD_BYTES // 8, np.uint64)
        for _ in range(steps):
            self.step()
        if self.batch.num_tokens != num_seqs:
            raise RuntimeError("not in a steady state")


def settle() -> None:
    """What is there now is no matter of the garbage collector's any more, which stays on."""
    gc.collect()
    gc.freeze()


def s1(num_seqs: int, cold: bool) -> Figures:
    steps = work.S1_COLD_STEPS if cold else work.S1_STEPS
    driver = Driver(work.s1_sizes(num_seqs, steps))
    driver.steady(num_seqs, 992, steps, cold)
    name = f"s1_{num_seqs}_py_cold" if cold else f"s1_{num_seqs}_py"
    return {
        f"{name}_us": median_us(driver.both),
        f"{name}_schedule_us": median_us(driver.schedule),
        f"{name}_prepare_us": median_us(driver.prepare),
        f"{name}_update_us": median_us(driver.update),
    }


def s2() -> Figures:
    driver = Driver(work.s2_sizes())
    prompts = [work.tokens(100_000 + i, work.S2_TOKENS) for i in range(work.S2_REQUESTS)]
    settle()
    began = now()
    for prompt in prompts:
        driver.add(prompt, 64)
    add = now() - began
    if driver.step().num_scheduled_tokens != work.S2_REQUESTS * work.S2_TOKENS:
        raise RuntimeError("S2: not all of it in one step")
    per_request = 1e-3 / work.S2_REQUESTS
    schedule, update = driver.schedule[0], driver.update[0]
    return {
        "s2_py_us": (add + schedule) * per_request,
        "s2_py_add_us": add * per_request,
        "s2_py_schedule_us": schedule * per_request,
        "s2_py_update_us": update * per_request,
        "s2_py_with_update_us": (add + schedule + update) * per_request,
    }


def s5(trace: list[tuple[int, int]]) -> Figures:
    driver = Driver(work.S5_SIZES)
    prompts = [work.tokens(300_000 + i, prompt) for i, (prompt, _) in enumerate(trace)]
    settle()
    began = now()
    for prompt, (_, output) in zip(prompts, trace, strict=True):
        driver.add(prompt, output)
    add = now() - began
    while driver.scheduler.has_unfinished():
        driver.step()
    return {
        "s5_py_total_s": sum(driver.both) / 1e9,
        "s5_py_add_s": add / 1e9,
        "s5_py_prepare_s": sum(driver.prepare) / 1e9,
        "s5_py_steps": len(driver.schedule),
    }


def pool(num_blocks: int) -> Figures:
    driver = Driver(work.pool_sizes(num_blocks))
    for i in range(num_blocks // (work.POOL_FILL // work.BLOCK_SIZE) + 1):
        driver.add(work.tokens(400_000 + i, work.POOL_FILL), 1)
    while driver.scheduler.has_unfinished():
        driver.step()
    driver.steady(work.POOL_SEQS, work.POOL_PROMPT, work.POOL_STEPS, cold=False)
    return {f"pool_{num_blocks}_py_us": median_us(driver.both)}


def through_python(trace: list[tuple[int, int]], repeats: int) -> Figures:
    best: Figures = {}
    for _ in range(repeats):
        parts = [s1(num_seqs, cold) for num_seqs in work.S1_SEQS for cold in (False, True)]
        parts += [s2(), s5(trace)]
        parts += [pool(num_blocks) for num_blocks in work.POOL_BLOCKS]
        for name, value in (item for part in parts for item in part.items()):
            best[name] = min(value, best.get(name, value))
    return best


def through_cpp(program: Path, trace_path: Path, repeats: int) -> Figures:
    done = subprocess.run([program, trace_path, str(repeats)], stdout=subprocess.PIPE, text=True)
    if done.returncode != 0:
        sys.exit(f"error: {program} ended with {done.returncode}")
    lines = (line.split() for line in done.stdout.splitlines())
    return {name: float(value) for name, value in lines}


def through_vllm(python: Path, trace_path: Path, repeats: int) -> Figures:
    runner = HERE / "peers" / "schedule_vllm.py"
    environment = {**os.environ, "PYTHONPATH": str(HERE)}
    command = [python, runner, trace_path, str(repeats)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode != 0:
        sys.exit(f"{done.stderr}error: {runner} ended with {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


FEATURES = {
    "two steps in flight": "async",
    "speculation, 5 tokens each": "speculation",
    "speculation in vain": "speculation_in_vain",
    "64 requests of 4 samples": "n4",
    "host tier": "host_tier",
    "recorded": "recorded",
}
ROWS = [
    *((f"S1, {n} running, us a step", f"s1_{n}{{}}_us") for n in work.S1_SEQS),
    *(
        (f"  {part}, {n}", f"s1_{n}{{}}_{part}_us")
        for n in (256,)
        for part in ("schedule", "update")
    ),
    *((f"  prepare, {n}", f"s1_{n}{{}}_prepare_us") for n in work.S1_SEQS),
    *((f"S1 cold, {n} running, us a step", f"s1_{n}{{}}_cold_us") for n in work.S1_SEQS),
    ("  prepare, 256", "s1_256{}_cold_prepare_us"),
    *(
        line
        for title, name in FEATURES.items()
        for line in (
            (f"  256, {title}", f"s1_256{{}}_{name}_us"),
            ("    prepare", f"s1_256{{}}_{name}_prepare_us"),
        )
    ),
    ("  bytes recorded a step", "recorded{}_bytes_a_step"),
    ("fork of 1,000 tokens, us", "fork{}_us"),
    ("8 searches of 4 beams, us a step", "beams{}_8x4_us"),
    ("S2, us a request", "s2{}_us"),
    ("  construct and add", "s2{}_add_us"),
    ("  first schedule", "s2{}_schedule_us"),
    ("  with its update", "s2{}_with_update_us"),
    ("S5, seconds", "s5{}_total_s"),
    ("  construct and add", "s5{}_add_s"),
    ("  prepare", "s5{}_prepare_s"),
    ("  steps", "s5{}_steps"),
    ("  preemptions", "s5{}_preemptions"),
    ("  scheduled tokens", "s5{}_tokens"),
    ("  KV slots allocated, unused", "s5{}_kv_waste"),
    *((f"pool of {n:,} blocks, us a step", f"pool_{n}{{}}_us") for n in work.POOL_BLOCKS),
    *((f"  cold, {n:,}", f"pool_{n}{{}}_cold_us") for n in work.POOL_BLOCKS),
]


def table(figures: Figures) -> str:
    columns = {"C++": ("", ""), "Python": ("", "_py"), "vLLM": ("vllm_", "_py")}
    lines = [f"{'':36}" + "".join(f"{name:>12}" for name in columns)]
    for title, key in ROWS:
        names = [before + key.format(infix) for before, infix in columns.values()]
        cells = [f"{figures[name]:>12,.6g}" if name in figures else " " * 12 for name in names]
        if any(map(str.strip, cells)):
            lines.append(f"{title:36}" + "".join(cells))
    return "\n".join(lines)


def with_common_names(vllm: Figures) -> Figures:
    """vLLM's scheduler is Python: one figure stands beside both of ours."""
    names = {name: f"vllm_{name}" for name in vllm}
    plain = {name: full.replace("_py", "") for name, full in names.items()}
    return {key: vllm[name] for name in vllm for key in (names[name], plain[name])}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cpp", type=Path, help="scheduler_bench")
    parser.add_argument("--vllm-python", type=Path, help="a Python with vLLM")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--vllm-repeats", type=int, default=2)
    args = parser.parse_args()

    trace = work.s5_trace()
    figures: Figures = {}
    with tempfile.TemporaryDirectory() as folder:
        trace_path = Path(folder) / "trace.txt"
        work.write_trace(trace_path)
        if args.cpp:
            figures |= through_cpp(args.cpp, trace_path, args.repeats)
        figures |= through_python(trace, args.repeats)
        if args.vllm_python:
            figures |= with_common_names(
                through_vllm(args.vllm_python, trace_path, args.vllm_repeats)
            )
    print(table(figures))
    counts = ("steps", "preemptions", "tokens")
    print(
        json.dumps(
            {
                name: int(value) if name.endswith(counts) else round(value, 6)
                for name, value in sorted(figures.items())
            }
        )
    )


if __name__ == "__main__":
    main()
