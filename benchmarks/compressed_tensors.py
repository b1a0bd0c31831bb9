"""Quantizes a checkpoint into the compressed-tensors format, for vLLM.

Linear layers only, symmetrically, scales by the largest magnitude: int8 with one scale an output
feature and int8 activations (a scale per token, found as it runs), or int4 with one scale for 32
input features. Embeddings and logits stay bf16.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import make_checkpoint
import numpy as np
from make_checkpoint import Tensor

from fastpage.checkpoints import open_checkpoint

INT4_GROUP = 32


def config(bits: int) -> dict[str, Any]:
    common = {"num_bits": bits, "type": "int", "symmetric": True}
    if bits == 8:
        weights = common | {"strategy": "channel", "dynamic": False}
        activations = common | {"strategy": "token", "dynamic": True}
    else:
        weights = common | {"strategy": "group", "group_size": INT4_GROUP, "dynamic": False}
        activations = None
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized" if bits == 8 else "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": weights,
                "input_activations": activations,
            }
        },
    }


def bf16(array: np.ndarray) -> Tensor:
    return "BF16", make_checkpoint.as_bfloat16(array, "float32")


def int8_weight(name: str, weight: np.ndarray) -> dict[str, Tensor]:
    """[out, in] fp32 -> int8 of that shape and scales [out, 1]."""
    scale = np.abs(weight).max(axis=1, keepdims=True) / 127
    values = np.rint(weight / np.maximum(scale, 1e-12)).astype(np.int8)
    return {f"{name}.weight": ("I8", values), f"{name}.weight_scale": bf16(scale)}


def int4_weight(name: str, weight: np.ndarray) -> dict[str, Tensor]:
    """[out, in] fp32 -> eight values, plus 8, to a word [out, in / 8] and scales [out, in / 32]."""
    groups = weight.reshape(len(weight), -1, INT4_GROUP)
    scale = np.abs(groups).max(axis=2, keepdims=True) / 7
    values = np.rint(groups / np.maximum(scale, 1e-12)).clip(-8, 7).astype(np.int64) + 8
    eights = values.reshape(len(weight), -1, 8).astype(np.uint32)
    words = np.bitwise_or.reduce(eights << np.arange(0, 32, 4, dtype=np.uint32), axis=2)
    return {
        f"{name}.weight_packed": ("I32", words),
        f"{name}.weight_scale": bf16(scale[:, :, 0]),
        f"{name}.weight_shape": ("I64", np.array(weight.shape, np.int64)),
    }


def convert(gguf: Path, bits: int, folder: Path) -> None:
    checkpoint = open_checkpoint(gguf)
    quantize = int8_weight if bits == 8 else int4_weight
    tensors: dict[str, Tensor] = {}
    for name in checkpoint.names():
        array = make_checkpoint.as_float32(*checkpoint.tensor(name))
        if name.endswith("_proj.weight"):
            tensors |= quantize(name.removesuffix(".weight"), array)
        else:
            tensors[name] = bf16(array)
    folder.mkdir(parents=True)
    plain = make_checkpoint.cached(gguf)
    for path in plain.iterdir():
        if path.suffix == ".json":
            (folder / path.name).write_bytes(path.read_bytes())
    described = json.loads((plain / "config.json").read_text())
    described["quantization_config"] = config(bits)
    (folder / "config.json").write_text(json.dumps(described, indent=2))
    make_checkpoint.write_safetensors(tensors, folder / "model.safetensors")
