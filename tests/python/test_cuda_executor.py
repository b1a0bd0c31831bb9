"""Models on CudaExecutor, on a GPU or over the emulated kernels, beside TorchExecutor."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from cuda_kernels import Kernels, multiply_row_by_row
from paging import PagedSequences, relative_error, run_in_chunks
from small_decoder import VOCAB, load_random_weights, small_spec

from fastpage import _C
from fastpage.engine.args import EngineArgs
from fastpage.errors import InvalidArgument
from fastpage.executors.cuda import CudaExecutor
from fastpage.executors.torch import TorchExecutor, TorchRunner
from fastpage.models import DecoderSpec, RotarySpec, decoder

torch = pytest.importorskip("torch")

NUM_BLOCKS, MAX_LEN = 12, 120
SPEC = small_spec(head_dim=16, max_model_len=MAX_LEN)
TOKENS = np.random.default_rng(1).integers(0, VOCAB, 100).tolist()


@pytest.fixture(scope="module")
def cuda() -> Kernels:
    return Kernels(("descending", True, 0))


def load(executor: Any, spec: DecoderSpec = SPEC) -> Any:
    return load_random_weights(executor, executor.program, spec, scale=0.3)


def new_executor(cuda: Kernels, spec: DecoderSpec = SPEC, **options: Any) -> Any:
    options = {"num_kv_blocks": NUM_BLOCKS, "dtype": "float16"} | options
    kernels = None if cuda.is_gpu else cuda.ops
    return load(CudaExecutor(decoder(spec), device=cuda.device, kernels=kernels, **options), spec)


SPECS = {
    "llama": SPEC,
    "windows-caps-qk-norm": replace(
        SPEC, sliding_windows=(20, 0), attention_soft_cap=5.0, qk_norm="head"
    ),
    "alibi-layer-norm": replace(
        SPEC,
        rotary=None,
        alibi_slopes=(0.5, 0.25, 0.1, 0.05),
        norm_kind="layer",
        norm_bias=True,
        gated_mlp=False,
        activation="gelu",
        qkv_bias=True,
    ),
    "interleaved": replace(SPEC, rotary=RotarySpec(dim=8, style="interleaved")),
}


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_logits_are_those_of_torch(cuda: Kernels, name: str, dtype: str) -> None:
    """In chunks, through scattered blocks, against the reference in fp32."""
    spec = SPECS[name]
    reference = load(TorchExecutor(decoder(spec), num_kv_blocks=NUM_BLOCKS), spec)
    chunks = (1, 40, 1, 1, 57)
    want = run_in_chunks(reference, TOKENS, chunks, NUM_BLOCKS, 16)
    got = run_in_chunks(new_executor(cuda, spec, dtype=dtype), TOKENS, chunks, NUM_BLOCKS, 16)
    limit = {"float16": 1e-2, "bfloat16": 6e-2, "float32": 1e-5}[dtype]
    assert relative_error(got, want) < limit


def test_several_sequences_in_a_step(cuda: Kernels) -> None:
    reference = load(TorchExecutor(decoder(SPEC), num_kv_blocks=NUM_BLOCKS))
    executor = new_executor(cuda)
    sequences = [PagedSequences([TOKENS[:50], TOKENS[50:70]], NUM_BLOCKS, 16) for _ in range(2)]
    for new in ({0: 30, 1: 1}, {0: 1, 1: 15}, {0: 1, 1: 1}):
        want, got = (
            x.forward_arrays(**s.step(new))
            for x, s in zip((reference, executor), sequences, strict=True)
        )
        assert relative_error(got, want) < 1e-2


@pytest.mark.parametrize("has_scales", [False, True])
@pytest.mark.parametrize("name", ["llama", "alibi-layer-norm"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_float8_cache(cuda: Kernels, dtype: str, name: str, has_scales: bool) -> None:
    """Beside the reference with the same rounding, and none."""
    spec, options = SPECS[name], {"num_kv_blocks": NUM_BLOCKS}
    reference, unrounded = (
        load(TorchExecutor(decoder(spec), kv_cache_dtype=kept, **options), spec)  # type: ignore[arg-type]
        for kept in ("float8_e4m3", None)
    )
    executor = new_executor(cuda, spec, dtype=dtype, kv_cache_dtype="float8_e4m3")
    if has_scales:
        # With the first, most values are saturated; with the second, most are below the least.
        k, v = np.array([1e-3, 0.3], np.float32), np.array([2.0, 1e4], np.float32)
        for each in (reference, executor):
            each.set_kv_scales(1, k, v)
    chunks = (60, 1, 1, 1, 37)
    want, beside, got = (
        run_in_chunks(each, TOKENS, chunks, NUM_BLOCKS, 16)
        for each in (reference, unrounded, executor)
    )
    error = relative_error(got, want)
    assert error < (5e-2 if dtype == "float16" else 0.1)
    assert not has_scales or relative_error(got, beside) > 10 * error


@pytest.mark.parametrize("qk_norm", ["", "head"])
def test_rotary_and_cache_in_one(cuda: Kernels, qk_norm: str) -> None:
    """Into a float8 cache, as op by op to the bit; norms of heads go along."""
    options = {"dtype": "float16", "kv_cache_dtype": "float8_e4m3"}
    results = []
    for disabled in ([], ["fuse_rotary_cache"]):
        spec = replace(SPEC, qk_norm=qk_norm)
        executor = new_executor(cuda, spec, disabled_passes=disabled, **options)
        assert ("rotary" in [op.kind for op in executor.program.ops]) == bool(disabled)
        executor.set_kv_scales(1, np.array([0.1, 0.3], np.float32), np.ones(2, np.float32))
        results.append(run_in_chunks(executor, TOKENS, (60, 1, 39), NUM_BLOCKS, 16))
    assert np.array_equal(*results)


def test_scales_of_a_float8_cache(cuda: Kernels) -> None:
    ones = np.ones(2, np.float32)
    with pytest.raises(InvalidArgument, match="the cache is not float8_e4m3"):
        new_executor(cuda).set_kv_scales(0, ones, ones)
    executor = new_executor(cuda, kv_cache_dtype="float8_e4m3")
    for layer, k in ((2, ones), (-1, ones), (0, ones[:1])):
        with pytest.raises(InvalidArgument, match=f"of layer {layer}.* 2 layers of 2 KV heads"):
            executor.set_kv_scales(layer, k, ones)


def test_transfers(cuda: Kernels) -> None:
    reference = load(TorchExecutor(decoder(SPEC), num_kv_blocks=6, num_host_kv_blocks=4))
    executor = new_executor(cuda, num_kv_blocks=6, num_host_kv_blocks=4)
    for cache in ("_keys", "_values"):
        values = torch.randn(getattr(reference, cache).shape).half()
        getattr(reference, cache).copy_(values)
        getattr(executor, cache).copy_(values)
    none = np.zeros((0, 2), np.int32)
    for transfers in (
        (np.array([[1, 3], [5, 0]]), np.array([[2, 1], [1, 5]]), np.array([[0, 3], [4, 0]])),
        (none, none, np.array([[3, 3]])),
        (none, none, none),
    ):
        for each in (reference, executor):
            each.apply_transfers(*transfers)
    for cache in ("_keys", "_values", "_host_keys", "_host_values"):
        got = getattr(executor, cache).float().cpu()
        assert torch.equal(got, getattr(reference, cache))


def engine_tokens(cuda: Kernels, num_blocks: int, num_host_blocks: int = 0) -> list[list[int]]:
    """Four greedy requests of two samples each."""
    executor = new_executor(cuda, num_kv_blocks=num_blocks, num_host_kv_blocks=num_host_blocks)
    config = _C.EngineConfig(
        scheduler=_C.SchedulerConfig(
            num_blocks=num_blocks,
            num_host_blocks=num_host_blocks,
            block_size=16,
            max_num_seqs=8,
            max_num_batched_tokens=40,
            max_model_len=MAX_LEN,
        ),
        vocab_size=VOCAB,
    )
    engine = _C.Engine(config, TorchRunner(executor))
    ids = []
    for i in range(4):
        params = _C.SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True, n=2)
        ids.append(engine.add_request(TOKENS[i : i + 20 + 9 * i], params))
    tokens: list[list[int]] = [[] for _ in range(8)]
    while engine.has_unfinished():
        for output in engine.step().outputs:
            tokens[2 * ids.index(output.request_id) + output.index] += output.new_token_ids
    assert engine.stats().scheduler.num_blocks_copied > 0
    if num_host_blocks:
        assert engine.stats().scheduler.num_blocks_swapped_in > 0
    return tokens


def test_an_engine_generates(cuda: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks are copied for samples, and swapped where there are few: the tokens stay the same."""
    multiply_row_by_row(monkeypatch)
    roomy, tight = engine_tokens(cuda, 40), engine_tokens(cuda, 9, num_host_blocks=12)
    assert [len(tokens) for tokens in roomy] == [20] * 8
    assert roomy[::2] == roomy[1::2]  # greedy: both samples alike
    assert roomy == tight


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda c: new_executor(c, dtype="float8"), "unknown dtype 'float8'"),
        (
            lambda c: new_executor(c, dtype="float32", kv_cache_dtype="float8_e4m3"),
            "kv_cache_dtype float8_e4m3: with float32 CUDA kernels need float32",
        ),
        (
            lambda c: new_executor(c, kv_cache_dtype="int8"),
            "kv_cache_dtype int8: with float16 CUDA kernels need float16 or float8_e4m3",
        ),
    ],
)
def test_what_kernels_cannot_do(
    cuda: Kernels, make: Callable[[Kernels], Any], message: str
) -> None:
    with pytest.raises(InvalidArgument, match=message):
        make(cuda)


@pytest.mark.skipif(_C.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_reason_is_given() -> None:
    reason = _C.cuda.unavailable_reason()
    assert reason
    with pytest.raises(InvalidArgument) as error:
        CudaExecutor(decoder(SPEC), num_kv_blocks=4)
    assert reason in str(error.value)


def test_engine_args_know_it() -> None:
    EngineArgs(model="x", executor="cuda")
    with pytest.raises(InvalidArgument, match="needs executor='cpu'"):
        EngineArgs(model="x", executor="cuda", quantization="int8")
    for name in ("fp8", "fp8_e4m3", "float8_e4m3"):
        args = EngineArgs(model="x", executor="cuda", kv_cache_dtype=name)
        assert args.kv_cache_dtype == "float8_e4m3"
    with pytest.raises(InvalidArgument, match="'float8_e4m3' needs executor='cuda'"):
        EngineArgs(model="x", kv_cache_dtype="fp8")
    EngineArgs(model="x", executor="cuda", enforce_eager=True)
    EngineArgs(model="x", executor="cuda", cudagraph_capture_sizes=[1, 64])
    for options, message in (
        ({"enforce_eager": 1}, "enforce_eager=1 is not True or False"),
        ({"cudagraph_capture_sizes": []}, r"cudagraph_capture_sizes=\[\] is not a list"),
        ({"cudagraph_capture_sizes": [0]}, "between 1 and max_num_seqs=64"),
        ({"cudagraph_capture_sizes": [65]}, "between 1 and max_num_seqs=64"),
        ({"cudagraph_capture_sizes": [4], "enforce_eager": True}, "with enforce_eager: leave out"),
    ):
        with pytest.raises(InvalidArgument, match=message):
            EngineArgs(model="x", executor="cuda", **options)  # type: ignore[arg-type]


def test_options_of_the_command_line() -> None:
    parser = argparse.ArgumentParser()
    EngineArgs.add_cli_args(parser)
    words = ["--model", "x", "--cudagraph-capture-sizes", "1", "8", "--no-enforce-eager"]
    words += ["--executor", "cuda", "--kv-cache-dtype", "fp8", "--batch-invariant"]
    args = EngineArgs.from_cli_args(parser.parse_args(words))
    assert args.cudagraph_capture_sizes == [1, 8]
    assert args.kv_cache_dtype == "float8_e4m3"
    assert args.batch_invariant
    assert not args.enforce_eager
