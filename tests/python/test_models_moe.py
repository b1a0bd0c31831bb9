"""Mixtures of experts against transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from oracle import (
    BLOCK_SIZE,
    NUM_BLOCKS,
    NUM_TOKENS,
    SMALL,
    Case,
    MakeCheckpoint,
    check_greedy,
    check_logits,
    check_rubbish,
    checkpoint_fixture,
    load,
    random_tokens,
)
from paging import relative_error, run_in_chunks

from fastpage._C import CpuExecutor, ThreadPool, ops
from fastpage.checkpoints import open_checkpoint
from fastpage.errors import CheckpointError
from fastpage.models import build_model

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("one_torch_thread")

MIXTRAL = {"num_local_experts": 5, "num_experts_per_tok": 2}
QWEN3_MOE = {"num_experts": 7, "num_experts_per_tok": 3, "moe_intermediate_size": 21}

CASES = {
    "mixtral": Case("Mixtral", MIXTRAL),
    "mixtral-window": Case("Mixtral", {**MIXTRAL, "sliding_window": 9}),
    "mixtral-gelu": Case("Mixtral", {**MIXTRAL, "hidden_act": "gelu_pytorch_tanh"}),
    "mixtral-one-of-three": Case("Mixtral", {"num_local_experts": 3, "num_experts_per_tok": 1}),
    "mixtral-wide": Case("Mixtral", {**MIXTRAL, "intermediate_size": 128, "hidden_size": 64}),
    "qwen3-moe": Case("Qwen3Moe", QWEN3_MOE),
    "qwen3-moe-renormalized": Case("Qwen3Moe", {**QWEN3_MOE, "norm_topk_prob": True}),
    "qwen3-moe-dense-layers": Case(
        "Qwen3Moe", {**QWEN3_MOE, "mlp_only_layers": [1], "attention_bias": True}
    ),
    "qwen3-moe-sparse-step": Case(
        "Qwen3Moe", {**QWEN3_MOE, "decoder_sparse_step": 2, "num_hidden_layers": 4}
    ),
    "qwen3-moe-window": Case(
        "Qwen3Moe", {**QWEN3_MOE, "use_sliding_window": True, "sliding_window": 8}
    ),
    "qwen3-moe-tied": Case("Qwen3Moe", {**QWEN3_MOE, "tie_word_embeddings": True}),
}
checkpoint = checkpoint_fixture(CASES)


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(case: str, checkpoint: MakeCheckpoint) -> None:
    check_logits(*checkpoint(case))


@pytest.mark.parametrize("case", ["mixtral", "qwen3-moe", "qwen3-moe-dense-layers"])
def test_greedy_tokens_equal_transformers(case: str, checkpoint: MakeCheckpoint) -> None:
    check_greedy(*checkpoint(case))


@pytest.mark.parametrize("case", ["mixtral", "qwen3-moe"])
def test_stacked_experts(case: str, checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    """As transformers 5 holds them in memory, and writes them if asked to."""
    path, oracle = checkpoint(case)
    oracle.save_pretrained(tmp_path, save_original_format=False)
    stacked = "model.layers.1.mlp.experts.gate_up_proj"
    assert stacked in open_checkpoint(tmp_path).names()
    tokens = random_tokens(SMALL["vocab_size"], NUM_TOKENS)
    logits = [
        run_in_chunks(load(p, "cpu"), tokens, (NUM_TOKENS,), NUM_BLOCKS, BLOCK_SIZE)
        for p in (path, tmp_path)
    ]
    np.testing.assert_array_equal(*logits)
    config = json.loads((tmp_path / "config.json").read_text())
    with pytest.raises(CheckpointError, match=f"{stacked} .* should make layers.1.moe.experts.0"):
        model = build_model({**config, "num_local_experts": 4})
        model.load_weights(open_checkpoint(tmp_path), None)  # type: ignore[arg-type]


def test_a_missing_expert_is_named(checkpoint: MakeCheckpoint) -> None:
    path, _ = checkpoint("qwen3-moe")
    config = json.loads((path / "config.json").read_text())
    for num_experts, words in (
        (8, "missing model.layers.0.mlp.experts.7.down_proj.weight"),
        (6, "surplus model.layers.0.mlp.experts.6.down_proj.weight"),
    ):
        model = build_model({**config, "num_local_experts": num_experts})
        with pytest.raises(CheckpointError, match=words):
            model.load_weights(open_checkpoint(path), None)  # type: ignore[arg-type]


def test_both_names_of_the_number_of_experts() -> None:
    base = {**SMALL, "architectures": ["Qwen3MoeForCausalLM"], "num_experts_per_tok": 3}
    for name in ("num_experts", "num_local_experts"):
        assert build_model({**base, name: 6}).spec.moe.num_experts == 6
    assert build_model(base).spec.moe.num_experts == 128


@pytest.mark.parametrize("family", ["Mixtral", "Qwen3Moe"])
def test_rubbish_in_a_config_is_an_error_of_one_line(family: str) -> None:
    config: dict[str, Any] = {
        **SMALL,
        **(MIXTRAL if family == "Mixtral" else QWEN3_MOE),
        "architectures": [f"{family}ForCausalLM"],
        "sliding_window": 9,
        "use_sliding_window": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [0],
        "norm_topk_prob": True,
    }
    check_rubbish(config)
    with pytest.raises(CheckpointError, match="num_experts_per_tok 9: a whole number, 1 to"):
        build_model({**config, "num_experts_per_tok": 9})
    with pytest.raises(CheckpointError, match="num_experts 60000: a whole number, 1 to 6553,"):
        build_model({**config, "num_hidden_layers": 10, "num_experts": 60_000})


class Dequantized:
    """Rounds matrices as an executor with `quantization` stores them, and passes them on."""

    def __init__(self, executor: Any, quantization: str) -> None:
        self.executor = executor
        self.quantization = quantization
        self.pool = ThreadPool(1)

    def load_weight(self, name: str, weight: np.ndarray, source_dtype: str | None = None) -> None:
        assert source_dtype is None
        if weight.ndim == 2 and not name.endswith((".router", "cos_sin")):
            is_q4_1 = self.quantization == "int4" and name not in ("embed", "lm_head")
            packed = ops.PackedWeight(weight, "q4_1" if is_q4_1 else "int8", self.pool)
            weight = ops.embed(self.pool, np.arange(len(weight)), packed)
        self.executor.load_weight(name, weight)

    def finish_loading(self) -> None:
        self.executor.finish_loading()


@pytest.mark.parametrize("quantization", ["int8", "int4"])
@pytest.mark.parametrize("case", ["mixtral-wide", "qwen3-moe-dense-layers"])
def test_quantized(case: str, quantization: str, checkpoint: MakeCheckpoint) -> None:
    opened = open_checkpoint(checkpoint(case)[0])
    tokens = random_tokens(SMALL["vocab_size"], NUM_TOKENS)

    def run(wrap: Any = None, **options: Any) -> np.ndarray:
        model = build_model(opened.config)
        executor = CpuExecutor(
            model.program,
            num_kv_blocks=NUM_BLOCKS,
            block_size=BLOCK_SIZE,
            weight_dtype="float32",
            kv_cache_dtype="float32",
            max_num_tokens=NUM_TOKENS,
            **options,
        )
        model.load_weights(opened, wrap(executor) if wrap else executor)
        return run_in_chunks(executor, tokens, (NUM_TOKENS,), NUM_BLOCKS, BLOCK_SIZE)

    exact = run(lambda executor: Dequantized(executor, quantization))
    got = run(quantization=quantization, activations="float32")
    assert relative_error(got, exact) < 1e-4
    rounded = run(quantization=quantization)
    # Rounded activations send a token to another expert now and then.
    errors = [relative_error(a, b) for a, b in zip(rounded, exact, strict=True)]
    assert 1e-4 < np.median(errors) < 0.1
