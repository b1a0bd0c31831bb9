"""What loading a checkpoint takes: peak memory against packed weights + one tensor, and time.

Makes a checkpoint of random bf16 weights of Llama 3.2 1B's shape, in shards, in a temporary folder
(2.5 GB; --layers makes it smaller), and loads it in a process of its own for each kind of weights.
Peaks are sampled from /proc/self/status while loading, over what was there before:
"anonymous" is memory of the process's own; "with file" adds those pages of the memory-mapped
checkpoint that are resident just then. Neither must exceed packed weights + the largest tensor of
the checkpoint, or the exit status is 1. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

CASES = {
    "bfloat16": {},
    "float32": {"weight_dtype": "float32"},
    "int8": {"quantization": "int8"},
    "int4": {"quantization": "int4"},
}
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
}
SHARD_BYTES = 1 << 30
SLACK = 16 << 20  # of the bound: Python objects, kernels' scratch


def shapes(config: dict[str, int]) -> dict[str, tuple[int, ...]]:
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    kv = config["num_key_value_heads"] * config["head_dim"]
    found: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config["vocab_size"], hidden),
        "model.norm.weight": (hidden,),
    }
    for layer in range(config["num_hidden_layers"]):
        for name, shape in {
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (kv, hidden),
            "self_attn.v_proj": (kv, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
            "input_layernorm": (hidden,),
            "post_attention_layernorm": (hidden,),
        }.items():
            found[f"model.layers.{layer}.{name}.weight"] = shape
    return found


def write_checkpoint(folder: Path, config: dict[str, int]) -> None:
    """Shards that each begin with a new tensor once the last one is full, as save_pretrained's."""
    values = np.random.default_rng(0).normal(0, 0.02, 1 << 22).astype(np.float32)
    pattern = (values.view(np.uint32) >> 16).astype(np.uint16)
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    size = 0
    for name, shape in shapes(config).items():
        if size > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = shape
        size += 2 * math.prod(shape)
    weight_map = {}
    for i, shard in enumerate(shards):
        file = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        header, position = {}, 0
        for name, shape in shard.items():
            end = position + 2 * math.prod(shape)
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [position, end]}
            position = end
        text = json.dumps(header).encode()
        with (folder / file).open("wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            for shape in shard.values():
                left = math.prod(shape)
                while left:
                    out.write(pattern[:left].tobytes())
                    left -= min(left, len(pattern))
        weight_map |= dict.fromkeys(shard, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config))


class PeakMemory:
    """The largest RssAnon and VmRSS while it runs, in bytes."""

    def __init__(self) -> None:
        self.anonymous = self.resident = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakMemory:
        self.before = _status()
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()
        self._take()

    def _watch(self) -> None:
        while not self._stop.wait(0.002):
            self._take()

    def _take(self) -> None:
        now = _status()
        self.anonymous = max(self.anonymous, now["RssAnon"] - self.before["RssAnon"])
        self.resident = max(self.resident, now["VmRSS"] - self.before["VmRSS"])


def _status() -> dict[str, int]:
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    return {name: int(fields[name].split()[0]) * 1024 for name in ("RssAnon", "VmRSS")}


def load(folder: str, case: str, threads: int) -> None:
    """In a process of its own: prints one JSON object."""
    from fastpage import _C
    from fastpage.checkpoints import open_checkpoint
    from fastpage.models import build_model

    checkpoint = open_checkpoint(folder)
    model = build_model(checkpoint.config, checkpoint=checkpoint)
    options = {"weight_dtype": "bfloat16", **CASES[case]}
    pool = _C.ThreadPool(threads)
    executor = _C.CpuExecutor(
        model.program, num_kv_blocks=1, block_size=16, max_num_tokens=16, pool=pool, **options
    )
    began = time.perf_counter()
    with PeakMemory() as peak:
        model.load_weights(checkpoint, executor)
        seconds = time.perf_counter() - began
    end = _status()["RssAnon"] - peak.before["RssAnon"]
    largest = max(2 * math.prod(checkpoint.shape(name)) for name in checkpoint.names())
    print(
        json.dumps(
            {
                "packed": executor.weight_bytes,
                "largest_tensor": largest,
                "peak_anonymous": peak.anonymous,
                "peak_resident": peak.resident,
                "anonymous_after": end,
                "seconds": seconds,
            }
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", 1)[0])
    parser.add_argument("--layers", type=int, default=CONFIG["num_hidden_layers"])
    parser.add_argument("--model", help="a checkpoint in bf16 instead of a random one")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--load", nargs=2, metavar=("MODEL", "CASE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.load:
        load(*options.load, options.threads)
        return

    results = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.model or temporary
        if not options.model:
            write_checkpoint(Path(folder), {**CONFIG, "num_hidden_layers": options.layers})
        print(f"{'MB':<10}{'packed':>8}{'+ largest':>11}{'anonymous':>11}{'with file':>11}{'s':>7}")
        for case in CASES:
            command = [sys.executable, __file__, "--threads", str(options.threads)]
            done = subprocess.run(
                [*command, "--load", folder, case], stdout=subprocess.PIPE, text=True, check=True
            )
            row = results[case] = json.loads(done.stdout)
            columns = (
                row["packed"],
                row["packed"] + row["largest_tensor"],
                row["peak_anonymous"],
                row["peak_resident"],
            )
            print(
                f"{case:<10}{columns[0] / 1e6:>8.0f}{columns[1] / 1e6:>11.0f}"
                f"{columns[2] / 1e6:>11.0f}{columns[3] / 1e6:>11.0f}{row['seconds']:>7.1f}",
                flush=True,
            )
    print(json.dumps(results))
    for case, row in results.items():
        if row["peak_resident"] > row["packed"] + row["largest_tensor"] + SLACK:
            sys.exit(f"error: {case} takes more than packed weights + the largest tensor")


if __name__ == "__main__":
    main()
