"""Quantized weights through loader, executor and engine."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from paging import relative_error, run_in_chunks

from fastpage import LLM, SamplingParams
from fastpage._C import CpuExecutor
from fastpage.checkpoints import open_checkpoint
from fastpage.engine.args import EngineArgs
from fastpage.errors import InvalidArgument
from fastpage.models import build_model

NUM_BLOCKS = 8
TOKENS = np.random.default_rng(0).integers(0, 49152, 70)


def logits(path: Path, keep_blocks: bool = False, **options: Any) -> np.ndarray:
    checkpoint = open_checkpoint(path)
    model = build_model(checkpoint.config, max_model_len=128)
    executor = CpuExecutor(
        model.program,
        num_kv_blocks=NUM_BLOCKS,
        kv_cache_dtype="float32",
        max_num_tokens=128,
        max_num_logits=128,
        **options,
    )
    model.load_weights(checkpoint, executor, keep_blocks=keep_blocks)
    return run_in_chunks(executor, TOKENS, (len(TOKENS),), NUM_BLOCKS, 16)


@pytest.fixture(scope="module")
def exact(smollm2_gguf: Path) -> np.ndarray:
    return logits(smollm2_gguf, weight_dtype="float32")


def test_blocks_of_the_file_lose_nothing(smollm2_gguf: Path, exact: np.ndarray) -> None:
    got = logits(smollm2_gguf, keep_blocks=True, activations="float32")
    assert relative_error(got, exact) < 1e-4


@pytest.mark.parametrize(
    "options, limit",
    [
        ({"keep_blocks": True}, 0.06),
        ({"quantization": "int8"}, 0.12),
        ({"quantization": "int8", "activations": "float32"}, 0.1),
        ({"quantization": "int4"}, 0.15),
    ],
    ids=str,
)
def test_logits_stay_near(
    smollm2_gguf: Path, exact: np.ndarray, options: dict[str, Any], limit: float
) -> None:
    error = relative_error(logits(smollm2_gguf, **options), exact)
    assert 1e-4 < error < limit


def test_weights_of_a_step_shrink(smollm2_gguf: Path) -> None:
    sizes = {}
    for quantization in ("none", "int8", "int4", "gguf"):
        llm = LLM(str(smollm2_gguf), quantization=quantization, num_kv_blocks=16, max_model_len=256)
        sizes[quantization] = llm.info.weight_bytes
        text = llm.generate(
            ["The capital of France is"], SamplingParams(temperature=0, max_tokens=2)
        )
        assert text[0].outputs[0].text.startswith(" Paris")
    values = sizes["none"] / 2
    assert values <= sizes["int8"] < 1.02 * values
    assert 0.7 * values < sizes["int4"] < 0.72 * values  # of it 21 % the logits, at 8 bits
    assert 0.7 * values < sizes["gguf"] < 0.74 * values


def test_torch_refuses_quantization() -> None:
    with pytest.raises(InvalidArgument, match="quantization='int8' needs executor='cpu'"):
        EngineArgs(model="x", executor="torch", quantization="int8")


def test_blocks_that_do_not_fit_are_named(smollm2_gguf: Path) -> None:
    model = build_model(open_checkpoint(smollm2_gguf).config, max_model_len=128)
    executor = CpuExecutor(model.program, num_kv_blocks=1)
    shapes = {b.name: tuple(b.shape) for b in model.program.buffers if b.kind == "weight"}
    matrix = next(name for name, shape in shapes.items() if shape == (576, 576))
    vector = next(name for name, shape in shapes.items() if shape == (576,))
    for name, blocks, kind, words in [
        (matrix, np.zeros((576, 18 * 17), np.uint8), "q4_0", "has shape"),
        (matrix, np.zeros((576, 18 * 17), np.uint8), "q4_1", "no blocks of q4_1"),
        (matrix, np.zeros((576, 18 * 20), np.int8), "q4_1", "uint8 is needed"),
        (matrix, np.zeros((576, 18 * 20), np.uint8), "q4_k", "unknown weight format"),
        (vector, np.zeros((1, 18 * 20), np.uint8), "q4_1", "has shape"),
        ("nonsense", np.zeros((1, 20), np.uint8), "q4_1", "no weight 'nonsense'"),
    ]:
        with pytest.raises(InvalidArgument, match=words):
            executor.load_weight_blocks(name, blocks, kind)
    executor.load_weight_blocks(matrix, np.zeros((576, 18 * 20), np.uint8), "q4_1")
    with pytest.raises(InvalidArgument, match="loaded twice"):
        executor.load_weight_blocks(matrix, np.zeros((576, 18 * 20), np.uint8), "q4_1")
