"""Who takes part in offline.py, with which settings, and the form of the model that each reads.

Everyone's weights come from one GGUF file: through a bf16 checkpoint of it (make_checkpoint.py) or,
for llama.cpp, straight from it. What was made is kept under build/checkpoints.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import compressed_tensors
import make_checkpoint

PRECISIONS = ("bf16", "int8", "int4")


class Unavailable(Exception):
    """Why a contestant cannot take part."""


@dataclass(frozen=True)
class Contestant:
    engine: str  # run_<engine>.py is its runner
    variant: str
    precision: str  # whom it is measured against: `bf16` stands for any float type
    form: str  # of the model: a key of FORMS, and after a colon what the maker is told
    settings: dict[str, Any] = field(default_factory=dict)
    w1_requests: int = 64  # fewer for the slowest, which would take most of the run

    @property
    def name(self) -> str:
        return f"{self.engine}-{self.variant}"


BF16, F32 = {"dtype": "bfloat16"}, {"dtype": "float32"}
INT8, INT4 = BF16 | {"quantization": "int8"}, BF16 | {"quantization": "int4"}
# Activations of OpenVINO's integer products get a scale for so many values.
OPENVINO_GROUPS = {"DYNAMIC_QUANTIZATION_GROUP_SIZE": 64}

CONTESTANTS = (
    Contestant("fastpage", "bf16", "bf16", "checkpoint", BF16),
    Contestant("llamacpp", "bf16", "bf16", "gguf:BF16"),
    Contestant("llamacpp", "f32", "bf16", "gguf:F32"),
    Contestant("openvino", "bf16", "bf16", "openvino:fp32", {"INFERENCE_PRECISION_HINT": "bf16"}),
    Contestant("openvino", "f32", "bf16", "openvino:fp32", {"INFERENCE_PRECISION_HINT": "f32"}),
    Contestant("vllm", "bf16", "bf16", "checkpoint", BF16),
    Contestant("vllm", "f32", "bf16", "checkpoint", F32),
    Contestant("ctranslate2", "f32", "bf16", "ctranslate2:float32", w1_requests=8),
    Contestant("transformers", "bf16", "bf16", "checkpoint", BF16, w1_requests=16),
    Contestant("transformers", "f32", "bf16", "checkpoint", F32, w1_requests=16),
    Contestant("fastpage", "int8", "int8", "checkpoint", INT8),
    Contestant("llamacpp", "q8_0", "int8", "gguf:Q8_0"),
    Contestant("openvino", "int8", "int8", "openvino:int8", OPENVINO_GROUPS),
    Contestant("vllm", "int8", "int8", "compressed:int8", BF16),
    Contestant("ctranslate2", "int8", "int8", "ctranslate2:int8", w1_requests=8),
    Contestant("fastpage", "int4", "int4", "checkpoint", INT4),
    Contestant("fastpage", "gguf", "int4", "gguf", BF16 | {"quantization": "gguf"}),
    Contestant("llamacpp", "q4_1", "int4", "gguf"),
    Contestant("llamacpp", "q4_0", "int4", "gguf:Q4_0"),
    Contestant("llamacpp", "q4_k_m", "int4", "gguf:Q4_K_M"),
    Contestant("openvino", "int4", "int4", "openvino:int4", OPENVINO_GROUPS),
    Contestant("vllm", "int4", "int4", "compressed:int4", BF16),
)


def has_bf16_instructions() -> bool:
    flags = Path("/proc/cpuinfo").read_text()
    return "avx512_bf16" in flags or "amx_bf16" in flags


def only_by_name() -> set[str]:
    """Left out unless they are asked for, to spare time: floats of the type that this CPU is slower
    with, and the 4-bit variants that another one led in every figure where we looked."""
    names = {who.name for who in CONTESTANTS}
    slower, faster = ("-f32", "-bf16") if has_bf16_instructions() else ("-bf16", "-f32")
    floats = {
        name
        for name in names
        if name.endswith(slower) and name.removesuffix(slower) + faster in names
    }
    return floats | {"llamacpp-q4_1", "llamacpp-q4_k_m", "vllm-int4"}


class Forms:
    """The model in the forms that engines read, each made when first asked for."""

    def __init__(self, gguf: Path, peers: Path) -> None:
        self._gguf = gguf
        self._peers = peers

    def path(self, form: str) -> Path:
        """Raises Unavailable if it is not there and cannot be made."""
        kind, _, precision = form.partition(":")
        if form == "gguf":
            return self._gguf
        if form == "checkpoint":
            return make_checkpoint.cached(self._gguf)
        made = make_checkpoint.CACHE / f"{self._gguf.stem}-{kind}-{precision}"
        if not made.exists():
            print(f"-- converting the model: {made.name}", file=sys.stderr)
            makers: dict[str, Callable[[str, Path], None]] = {
                "gguf": self._requantize,
                "openvino": self._export_to_openvino,
                "ctranslate2": self._convert_to_ctranslate2,
                "compressed": self._compress,
            }
            partial = made.with_name(made.name + ".partial")
            partial.parent.mkdir(parents=True, exist_ok=True)
            if partial.is_dir():
                shutil.rmtree(partial)
            makers[kind](precision, partial)
            partial.rename(made)
        return made

    def _run(self, command: list[str]) -> None:
        try:
            done = subprocess.run(command, capture_output=True, text=True)
        except OSError as error:
            raise Unavailable(f"not installed: {error}") from error
        if done.returncode:
            lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
            raise Unavailable(f"{Path(command[0]).name}: {lines[-1] if lines else 'failed'}")

    def _compress(self, precision: str, out: Path) -> None:
        compressed_tensors.convert(self._gguf, {"int8": 8, "int4": 4}[precision], out)

    def _requantize(self, precision: str, out: Path) -> None:
        program = self._peers / "llamacpp" / "build" / "bin" / "llama-quantize"
        self._run([str(program), "--allow-requantize", str(self._gguf), str(out), precision])

    def _export_to_openvino(self, precision: str, out: Path) -> None:
        command = [
            str(self._peers / "openvino" / "bin" / "optimum-cli"), "export", "openvino",
            "--model", str(self.path("checkpoint")),
            "--task", "text-generation-with-past",
            "--weight-format", precision,
        ]  # fmt: skip
        if precision == "int4":
            command += ["--group-size", "64", "--ratio", "1.0"]
        self._run([*command, str(out)])

    def _convert_to_ctranslate2(self, precision: str, out: Path) -> None:
        program = self._peers / "ctranslate2" / "bin" / "ct2-transformers-converter"
        command = [
            str(program),
            "--model", str(self.path("checkpoint")),
            "--quantization", precision,
            "--output_dir", str(out),
        ]  # fmt: skip
        self._run(command)
