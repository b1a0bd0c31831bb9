"""executor='cuda' from a checkpoint's files to text, beside executor='torch'."""

from __future__ import annotations

import functools
import json
import shutil
import string
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cuda_kernels import Kernels

from fastpage import LLM, SamplingParams
from fastpage.errors import CheckpointError, InvalidArgument, ResourceExhausted
from fastpage.executors import cuda as cuda_executor
from fastpage.executors.cuda import CudaExecutor
from fastpage.executors.cuda_runner import CudaRunner

torch = pytest.importorskip("torch")

tokenizers = pytest.importorskip("tokenizers")
safetensors = pytest.importorskip("safetensors.numpy")

TOKENS = [*string.ascii_lowercase, " ", ".", "<end>"]
FILE = "model.safetensors"
HIDDEN, HEADS, KV_HEADS, HEAD_DIM, LAYERS = 64, 4, 2, 16, 2


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(TOKENS),
        "hidden_size": HIDDEN,
        "intermediate_size": 96,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "hidden_act": "silu",
        "max_position_embeddings": 96,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "eos_token_id": len(TOKENS) - 1,
    }
    (path / "config.json").write_text(json.dumps(config))
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (len(TOKENS), HIDDEN),
        "model.norm.weight": (HIDDEN,),
        "lm_head.weight": (len(TOKENS), HIDDEN),
    }
    for i in range(LAYERS):
        layer = f"model.layers.{i}"
        for name, rows in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
            shapes[f"{layer}.self_attn.{name}_proj.weight"] = (rows * HEAD_DIM, HIDDEN)
        shapes |= {
            f"{layer}.self_attn.o_proj.weight": (HIDDEN, HEADS * HEAD_DIM),
            f"{layer}.mlp.gate_proj.weight": (96, HIDDEN),
            f"{layer}.mlp.up_proj.weight": (96, HIDDEN),
            f"{layer}.mlp.down_proj.weight": (HIDDEN, 96),
            f"{layer}.input_layernorm.weight": (HIDDEN,),
            f"{layer}.post_attention_layernorm.weight": (HIDDEN,),
        }
    random = np.random.default_rng(0)
    weights = {n: random.standard_normal(s, np.float32) * 0.3 for n, s in shapes.items()}
    safetensors.save_file(weights, path / FILE)
    vocabulary = {token: i for i, token in enumerate(TOKENS)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.decoder = tokenizers.decoders.Fuse()
    tokenizer.add_special_tokens([TOKENS[-1]])
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"eos_token": TOKENS[-1]}))
    return path


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Kernels:
    """Where there is no GPU its executor runs over the emulated kernels."""
    kernels = Kernels()
    if not kernels.is_gpu:
        kernels.ops.set_schedule("descending", True, 0)
        emulated = functools.partial(CudaExecutor, kernels=kernels.ops, device=kernels.device)
        monkeypatch.setattr(cuda_executor, "CudaExecutor", emulated)
        monkeypatch.setattr(cuda_executor, "free_bytes", lambda: 8 << 20)
    return kernels


OPTIONS: dict[str, Any] = {"dtype": "float32", "max_num_seqs": 3, "max_num_batched_tokens": 16}


def generate(checkpoint: Path, **options: Any) -> tuple[list[str], LLM]:
    llm = LLM(str(checkpoint), **(OPTIONS | options))
    prompts = ["the quick brown fox", "jumps", "over the lazy dog. the", "a"]
    params = [
        SamplingParams(temperature=0, max_tokens=16),
        SamplingParams(seed=1, max_tokens=16, ignore_eos=True),
        SamplingParams(seed=2, top_p=0.8, repetition_penalty=1.2, max_tokens=16),
        SamplingParams(seed=3, top_k=7, logprobs=2, max_tokens=16, min_tokens=5),
    ]
    return [output.outputs[0].text for output in llm.generate(prompts, params)], llm


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"enforce_eager": True, "num_kv_blocks": 20},
        {"enforce_eager": True, "batch_invariant": True},
        {"cudagraph_capture_sizes": [2], "async_scheduling": True},
    ],
)
def test_text(cuda: Kernels, checkpoint: Path, options: dict[str, Any]) -> None:
    want, _ = generate(checkpoint, executor="torch", num_kv_blocks=20)
    assert len(set(want)) == len(want)
    got, llm = generate(checkpoint, executor="cuda", **options)
    assert got == want
    runner = llm._loaded.runner
    assert isinstance(runner, CudaRunner)
    sizes = options.get("cudagraph_capture_sizes", [1, 2, 3])
    assert runner._executor.batch_invariant == options.get("batch_invariant", False)
    assert runner._executor.graph_sizes == ([] if options.get("enforce_eager") else sizes)


def with_scales(checkpoint: Path, to: Path, scales: dict[str, list[float]]) -> Path:
    """The checkpoint with more tensors, of its layers' attention."""
    shutil.copytree(checkpoint, to)
    weights = safetensors.load_file(checkpoint / FILE)
    more = {
        f"model.layers.{name}": np.asarray(x, np.float32).reshape(-1 if len(x) > 1 else ())
        for name, x in scales.items()
    }
    safetensors.save_file(weights | more, to / FILE)
    return to


SCALES = {  # with the first, most keys are saturated; with the second, most are below the least
    "0.self_attn.k_scale": [1e-3],
    "1.self_attn.k_scale": [0.02, 300.0],
    "1.self_attn.v_scale": [1e-3],
}


@pytest.mark.parametrize("scales", [{}, SCALES], ids=["no scales", "scales"])
def test_a_float8_cache(
    cuda: Kernels, checkpoint: Path, tmp_path: Path, scales: dict[str, list[float]]
) -> None:
    """Beside the reference with the same rounding, and with none: what both think of a text."""
    path = with_scales(checkpoint, tmp_path / "model", scales)
    params = SamplingParams(temperature=0, max_tokens=3, prompt_logprobs=0, ignore_eos=True)
    prompts = ["the quick brown fox jumps over the lazy dog.", "and what does the dog do"]

    def logprobs(executor: str, kv_cache_dtype: str) -> Any:
        llm = LLM(
            str(path),
            executor=executor,
            kv_cache_dtype=kv_cache_dtype,
            num_kv_blocks=20,
            **(OPTIONS | {"dtype": "float16"}),
        )
        info = llm._loaded.info
        if kv_cache_dtype != "auto":
            assert info.kv_cache_dtype == "float8_e4m3"
            assert info.kv_block_bytes == 2 * LAYERS * 16 * KV_HEADS * HEAD_DIM
        outputs = llm.generate(prompts, params)
        assert all(len(output.outputs[0].token_ids) == 3 for output in outputs)
        entries = [entry for output in outputs for entry in output.prompt_logprobs[1:]]
        return np.asarray([x.logprob for entry in entries for x in entry.values()])

    want, unrounded = logprobs("torch", "fp8"), logprobs("torch", "auto")
    got = logprobs("cuda", "fp8_e4m3")
    error = np.abs(got - want).max()
    assert error < 0.25  # some values are rounded the other way
    assert not scales or np.abs(got - unrounded).max() > 5 * error


@pytest.mark.parametrize("scale", [[1.0] * 3, [0.0], [-1.0], [float("nan")]])
def test_scales_that_are_none(
    cuda: Kernels, checkpoint: Path, tmp_path: Path, scale: list[float]
) -> None:
    path = with_scales(checkpoint, tmp_path / "model", {"1.self_attn.v_scale": scale})
    options = OPTIONS | {"dtype": "float16", "num_kv_blocks": 20}
    with pytest.raises(CheckpointError, match=r"layers.1.self_attn.v_scale .* for each of 2 heads"):
        LLM(str(path), executor="cuda", kv_cache_dtype="fp8", **options)
    LLM(str(path), executor="cuda", **options)  # which needs none


def test_the_cache_takes_what_the_gpu_has(
    cuda: Kernels, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def num_blocks(free: int, **options: Any) -> int:
        monkeypatch.setattr(cuda_executor, "free_bytes", lambda: free)
        llm = LLM(str(checkpoint), executor="cuda", enforce_eager=True, **OPTIONS, **options)
        return llm._loaded.info.num_kv_blocks

    assert num_blocks(1 << 30) == 3 * 6  # what three sequences of 96 tokens can use
    block_bytes = 2 * LAYERS * 16 * KV_HEADS * HEAD_DIM * 4
    weight_bytes = sum(
        weight.nbytes for weight in safetensors.load_file(checkpoint / FILE).values()
    )
    room = weight_bytes + 96 * HEAD_DIM * 4  # and the table of rotary embedding
    assert num_blocks(room + 10 * block_bytes) == 8
    # Two blocks on the host have four for staging on the device.
    assert num_blocks(room + 14 * block_bytes, host_cache_memory=2 * block_bytes) == 8
    monkeypatch.setattr(cuda_executor, "free_bytes", lambda: 1000)
    with pytest.raises(ResourceExhausted, match="the memory that is free"):
        LLM(str(checkpoint), executor="cuda", **OPTIONS)


def test_memory_of_the_gpu_that_runs_out(
    cuda: Kernels, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def launch(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore about it")

    monkeypatch.setattr(CudaExecutor, "launch", launch)
    with pytest.raises(ResourceExhausted, match=r"Tried to allocate 2 GiB.*kv_cache_memory"):
        LLM(str(checkpoint), executor="cuda", **OPTIONS)


def test_without_a_gpu(checkpoint: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(InvalidArgument, match="executor='cuda': "):
        LLM(str(checkpoint), executor="cuda", **OPTIONS)
