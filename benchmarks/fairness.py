"""What a prompt of 32k tokens does to everybody else, chunked and unchunked.

A Llama of random weights, small enough that the prompt takes seconds, on the CPU executor. While
`--running` requests are decoding, the long prompt is added, and after it a short request every
`--every` milliseconds. Measured until the long prompt's first token: the time between two tokens
of a running request (p50, p99, longest), the time to first token of the short requests, and that
of the long one. In a second part the long prompt meets a stream of short requests that never ends,
as many as fill every step: does it get its turn, and how much later than alone?

The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fastpage import _C
from fastpage.models import build_model
from fastpage.models.rotary import cos_sin_table

MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 4096,
    "max_position_embeddings": 40_960,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
}
BLOCK_SIZE = 16
SHORT_PROMPT, SHORT_OUTPUT = 128, 8
NUM_BLOCKS = 8192


@dataclass(frozen=True)
class Setting:
    name: str
    num_long: int  # prompts that are added at once
    max_num_batched_tokens: int
    long_prefill_token_threshold: int = 0
    max_num_partial_prefills: int = 0


# Unchunked is a budget that the whole prompt fits into.
SETTINGS = (
    Setting("unchunked", 1, 36_864),
    Setting("chunks of 2,048", 1, 2048),
    Setting("  at most 1,024 of one prompt", 1, 2048, 1024),
    Setting("    two such prompts", 2, 2048, 1024),
    Setting("    two, one of them at a time", 2, 2048, 1024, 1),
    Setting("chunks of 512", 1, 512),
    Setting("  at most 256 of one prompt", 1, 512, 256),
)


class Model:
    """One set of weights, for executors of every step size."""

    def __init__(self, threads: int) -> None:
        self.pool = _C.ThreadPool(threads)
        self.model = build_model(MODEL)
        rng = np.random.default_rng(0)
        self.weights = {
            buffer.name: (rng.standard_normal(tuple(buffer.shape), np.float32) * 0.05)
            for buffer in self.model.program.buffers
            if buffer.kind == "weight"
        }
        rotary = self.model.spec.rotary
        self.weights["rotary.cos_sin"] = cos_sin_table(rotary, MODEL["max_position_embeddings"])

    def engine(self, running: int, setting: Setting) -> _C.Engine:
        executor = _C.CpuExecutor(
            self.model.program,
            num_kv_blocks=NUM_BLOCKS,
            weight_dtype="bfloat16",
            kv_cache_dtype="bfloat16",
            block_size=BLOCK_SIZE,
            max_num_tokens=setting.max_num_batched_tokens,
            max_num_logits=256,
            pool=self.pool,
        )
        for name, values in self.weights.items():
            executor.load_weight(name, values)
        executor.finish_loading()
        scheduler = _C.SchedulerConfig(
            num_blocks=NUM_BLOCKS,
            block_size=BLOCK_SIZE,
            max_num_seqs=4 * running + 64,
            max_model_len=MODEL["max_position_embeddings"],
            enable_prefix_caching=False,
            max_num_batched_tokens=setting.max_num_batched_tokens,
            long_prefill_token_threshold=setting.long_prefill_token_threshold,
            max_num_partial_prefills=setting.max_num_partial_prefills,
        )
        config = _C.EngineConfig(scheduler=scheduler, vocab_size=MODEL["vocab_size"])
        return _C.Engine(config, _C.ProgramRunner(executor))


@dataclass
class Times:
    arrived: float
    tokens: list[float] = field(default_factory=list)  # when each came


class Clients:
    """Adds requests to an engine, runs it, and notes when tokens come."""

    def __init__(self, engine: _C.Engine) -> None:
        self.engine = engine
        self.rng = np.random.default_rng(1)
        self.requests: dict[int, Times] = {}
        self.num_steps = 0

    def add(self, prompt: int, output: int, arrived: float | None = None) -> int:
        ids = self.rng.integers(0, MODEL["vocab_size"], prompt, dtype=np.int32)
        params = _C.SamplingParams(temperature=0, max_tokens=output, ignore_eos=True)
        request = self.engine.add_request(ids, params)
        self.requests[request] = Times(time.perf_counter() if arrived is None else arrived)
        return request

    def step(self) -> None:
        outputs = self.engine.step().outputs
        now = time.perf_counter()
        self.num_steps += 1
        for output in outputs:
            times = self.requests[output.request_id].tokens
            times.extend([now] * len(output.new_token_ids))

    def first_token(self, request: int) -> float:
        """Seconds from its arrival."""
        times = self.requests[request]
        return times.tokens[0] - times.arrived


def admit_long_prompt(
    engine: _C.Engine, options: argparse.Namespace, num_long: int
) -> dict[str, Any]:
    clients = Clients(engine)
    running = [clients.add(64, 100_000 // options.running) for _ in range(options.running)]
    for _ in range(30):
        clients.step()
    calm = time.perf_counter()
    for _ in range(30):
        clients.step()
    began = time.perf_counter()
    long = clients.add(options.prompt, 2)
    for _ in range(num_long - 1):
        clients.add(options.prompt, 2)
    short: list[int] = []
    due = [began + (i + 1) * options.every / 1e3 for i in range(options.short)]
    while len(short) < len(due) or not all(clients.requests[i].tokens for i in (long, *short)):
        while len(short) < len(due) and due[len(short)] <= time.perf_counter():
            short.append(clients.add(SHORT_PROMPT, SHORT_OUTPUT, due[len(short)]))
        clients.step()
    ended = clients.requests[long].tokens[0]
    waits = [clients.first_token(request) for request in short]
    return {
        "calm_gap_ms": 1e3 * float(np.median(gaps(clients, running, calm, began))),
        **summary("gap", gaps(clients, running, began, ended)),
        **summary("short_first", waits),
        "long_first_s": clients.first_token(long),
    }


def gaps(clients: Clients, requests: list[int], begin: float, end: float) -> list[float]:
    """Between two tokens of a request, those that end within the time."""
    out = []
    for request in requests:
        times = clients.requests[request].tokens
        for before, after in itertools.pairwise(times):
            if begin < after <= end:
                out.append(after - before)
    return out


def summary(name: str, seconds: list[float]) -> dict[str, float]:
    """In milliseconds; a percentile is a value that occurred."""
    ordered = sorted(1e3 * each for each in seconds)
    p99 = ordered[min(len(ordered) - 1, math.ceil(0.99 * len(ordered)) - 1)]
    return {
        f"{name}_p50_ms": ordered[len(ordered) // 2],
        f"{name}_p99_ms": p99,
        f"{name}_max_ms": ordered[-1],
    }


def stream_against_long_prompt(
    engine: _C.Engine, options: argparse.Namespace, each_step: int
) -> dict[str, Any]:
    """`each_step` short requests are added before each step."""
    clients = Clients(engine)
    for _ in range(4):
        for _ in range(each_step):
            clients.add(SHORT_PROMPT, SHORT_OUTPUT)
        if engine.has_unfinished():
            clients.step()
    long = clients.add(options.prompt, 2)
    steps = clients.num_steps
    while not clients.requests[long].tokens:
        for _ in range(each_step):
            clients.add(SHORT_PROMPT, SHORT_OUTPUT)
        clients.step()
    return {"first_s": clients.first_token(long), "steps": clients.num_steps - steps}


def print_admission(results: dict[str, dict[str, Any]]) -> None:
    print("ms between tokens of running requests   | ms to first token, short | long, s")
    print(f"{'':32}" + "".join(f"{c:>9}" for c in ("p50", "p99", "max", "p50", "p99", "long")))
    for name, r in results.items():
        cells = [r[f"gap_{c}_ms"] for c in ("p50", "p99", "max")]
        cells += [r[f"short_first_{c}_ms"] for c in ("p50", "p99")]
        line = "".join(f"{cell:>9,.1f}" for cell in cells)
        print(f"{name:32}{line}{r['long_first_s']:>9.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompt", type=int, default=32_768)
    parser.add_argument("--running", type=int, default=16)
    parser.add_argument("--short", type=int, default=20)
    parser.add_argument("--every", type=float, default=100, help="milliseconds between short ones")
    parser.add_argument("--threads", type=int, default=0)
    options = parser.parse_args()

    model = Model(options.threads)
    results = {}
    for setting in SETTINGS:
        engine = model.engine(options.running, setting)
        results[setting.name] = admit_long_prompt(engine, options, setting.num_long)
    print_admission(results)

    setting = Setting("stream", 1, 2048)
    starvation = {}
    for name, stream in (("alone", False), ("against the stream", True)):
        engine = model.engine(options.running, setting)
        each_step = setting.max_num_batched_tokens // SHORT_PROMPT if stream else 0
        starvation[name] = stream_against_long_prompt(engine, options, each_step)
        figures = starvation[name]
        print(
            f"long prompt {name}: first token after {figures['first_s']:.2f} s, "
            f"{figures['steps']} steps"
        )
    rounded = {
        part: {name: {k: round(v, 3) for k, v in each.items()} for name, each in figures.items()}
        for part, figures in (("admission", results), ("starvation", starvation))
    }
    print(json.dumps({"prompt": options.prompt, "running": options.running, **rounded}))


if __name__ == "__main__":
    main()
