"""llama.cpp: its server with continuous batching, driven over a loopback socket with token ids.

One server has a slot for every request of a batch, each with a KV stream of its own (a cache that
all share is slower on CPUs); the other has one slot, for single streams. Neither keeps prompts. All
connections of a batch are open at once.
"""

from __future__ import annotations

import http.client
import json
import signal
import socket
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import runner

START_SECONDS = 60
opts = runner.options()
program = Path(opts["peer_folder"]) / "build" / "bin" / "llama-server"


class Server:
    def __init__(self, slots: int, tokens_per_slot: int) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        options = {
            "--model": opts["model"],
            "--host": "127.0.0.1",
            "--port": self.port,
            "--threads": opts["threads"],
            "--parallel": slots,
            "--ctx-size": slots * tokens_per_slot,
            "--batch-size": opts["max_num_batched_tokens"],
            "--flash-attn": "on",
            "--cache-ram": 0,
            "--log-verbosity": 1,
            **opts["settings"],
        }
        command = [str(program), "--no-kv-unified", "--no-webui"]
        command += [str(word) for option in options.items() for word in option]
        self.process = subprocess.Popen(command, preexec_fn=runner.end_with_parent)
        self.wait()

    def wait(self) -> None:
        began = time.monotonic()
        while time.monotonic() - began < START_SECONDS and self.process.poll() is None:
            try:
                connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=2)
                connection.request("GET", "/health")
                if connection.getresponse().status == 200:
                    return
            except OSError:
                time.sleep(0.02)
        raise RuntimeError(f"llama-server did not start, exit status {self.process.poll()}")

    def complete(self, request: runner.Request) -> list[int]:
        body = {
            "prompt": request["prompt"],
            "n_predict": request["out"],
            "ignore_eos": True,
            "cache_prompt": False,
            "return_tokens": True,
            "temperature": 0.0,
            "samplers": ["temperature"],
        }
        connection = http.client.HTTPConnection("127.0.0.1", self.port)
        connection.request("POST", "/completion", json.dumps(body))
        answer = connection.getresponse()
        content = json.loads(answer.read())
        connection.close()
        if answer.status != 200:
            raise RuntimeError(f"llama-server: {str(content)[:300]}")
        return content["tokens"]

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait()


def rounded(tokens: int) -> int:
    return -(-tokens // 256) * 256


def tokens_per_slot() -> int:
    with open(opts["workload"]) as file:
        requests = json.load(file)["W1"]
    return rounded(max(len(request["prompt"]) + request["out"] for request in requests) + 8)


batches = Server(opts["max_num_seqs"], tokens_per_slot())
streams = Server(1, rounded(opts["max_model_len"]))
senders = ThreadPoolExecutor(opts["max_num_seqs"])


def generate(requests: list[runner.Request]) -> list[list[int]]:
    if len(requests) == 1:
        return [streams.complete(requests[0])]
    return list(senders.map(batches.complete, requests))


def version() -> str:
    """The build number: the version of the package that the sources came in."""
    lines = (Path(opts["peer_folder"]) / "source" / "PKG-INFO").read_text().splitlines()
    number = next(line for line in lines if line.startswith("Version: "))
    return "b" + number.removeprefix("Version: ").split(".")[0]


try:
    runner.serve(opts, f"llama.cpp {version()}", generate)
finally:
    batches.stop()
    streams.stop()
