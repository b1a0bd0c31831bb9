"""What CudaExecutor makes of a program before it runs it: the same bits, in fewer launches."""

from __future__ import annotations

import functools
import importlib
import json
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from cuda_kernels import Kernels, Launches
from paging import PagedSequences, relative_error
from small_decoder import VOCAB
from test_cuda_executor import MAX_LEN, NUM_BLOCKS, SPEC, TOKENS
from test_cuda_runner import generate

from fastpage import _C, ops
from fastpage.executors.cuda import CudaExecutor
from fastpage.executors.cuda_runner import CudaRunner
from fastpage.executors.torch import TorchExecutor, TorchRunner
from fastpage.models import DecoderSpec, RotarySpec, decoder
from fastpage.models.constants import constants

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.usefixtures("one_torch_thread")

HEAD_DIM = 16


@pytest.fixture(scope="module")
def cuda() -> Kernels:
    return Kernels(("descending", True, 0))


def executor_of(cuda: Kernels, program: Any, **options: Any) -> CudaExecutor:
    options = {"kernels": None if cuda.is_gpu else cuda.ops, "dtype": "float16"} | options
    return CudaExecutor(program, device=cuda.device, num_kv_blocks=NUM_BLOCKS, **options)


def load(executor: Any, known: dict[str, Any]) -> Any:
    """The same weights for every executor of a program; `known`: some of them."""
    random = np.random.default_rng(0)
    for buffer in executor.program.buffers:
        if buffer.kind == "weight":
            values = random.standard_normal(buffer.shape, np.float32)
            if len(buffer.shape) == 2:
                values /= buffer.shape[1] ** 0.5
            elif buffer.name.endswith(".bias"):
                values *= 0.2  # more of it, and every token is the same
            executor.load_weight(buffer.name, known.get(buffer.name, values))
    executor.finish_loading()
    return executor


def run(executor: Any) -> Any:
    """Logits of two sequences, in chunks and token by token; of all tokens, and of some."""
    paged = PagedSequences([TOKENS[:30], TOKENS[40:60]], NUM_BLOCKS, 16)
    steps = [({0: 20, 1: 5}, [19, 24]), ({0: 1, 1: 1}, None), ({1: 1}, None), ({0: 5, 1: 1}, [5])]
    return np.concatenate([executor.forward_arrays(**paged.step(*step)) for step in steps])


def check(cuda: Kernels, program: Any, known: dict[str, Any], limit: float = 1e-5) -> None:
    """Against the program as it is, to the bit; and against the reference, which runs both."""
    plain, fused = (
        run(load(executor_of(cuda, program, disabled_passes=disabled), known))
        for disabled in (["all"], [])
    )
    np.testing.assert_array_equal(fused, plain)
    want, same = (
        run(load(TorchExecutor(p, num_kv_blocks=NUM_BLOCKS), known))
        for p in (program, _C.apply_passes(program, target="gpu"))
    )
    np.testing.assert_array_equal(same, want)
    got = run(load(executor_of(cuda, program, dtype="float32"), known))
    assert relative_error(got, want) < limit


# ---- every model


@functools.cache
def cases() -> dict[str, Any]:
    """Those that are compared with transformers."""
    pytest.importorskip("transformers")
    found: dict[str, Any] = {}
    for name in ("models", "models_alibi", "models_gpt", "models_modern", "models_moe"):
        found |= importlib.import_module(f"test_{name}").CASES
    return found


def spec_of(case: Any) -> DecoderSpec:
    """The case's, with heads as wide as kernels take them."""
    import transformers

    from fastpage.models.registry import find_architecture

    config = getattr(transformers, f"{case.family}Config")(**{**case.base, **case.changes})
    config.architectures = [case.model or f"{case.family}ForCausalLM"]
    config = json.loads(config.to_json_string())
    spec = find_architecture(config).spec(config)

    def wider(rotary: RotarySpec | None) -> RotarySpec | None:
        if rotary is None:
            return None
        dim = rotary.dim if rotary.dim < spec.head_dim else HEAD_DIM
        return RotarySpec(dim=min(dim, HEAD_DIM), style=rotary.style)

    return replace(
        spec,
        head_dim=HEAD_DIM,
        rotary=wider(spec.rotary),
        local_rotary=wider(spec.local_rotary),
    )


NAMES = """
    llama llama-biases llama-one-head llama-gelu mistral qwen2 qwen3
    bloom falcon-7b falcon-40b falcon-11b falcon-rw falcon-40b-alibi falcon-sequential mpt mpt-clip
    gpt2 gpt2-inner bigcode bigcode-multi-head gptj neox neox-sequential neox-quarter
    opt opt-350m opt-projected-pre-norm opt-no-final-norm opt-350m-bare-norms
    smollm3 gemma gemma2 gemma2-no-caps gemma3 phi3 granite granite-biases-tied olmo2 olmo3
    cohere cohere-qk-norm-biases cohere2 starcoder2 stablelm stablelm-parallel glm glm4
    mixtral mixtral-one-of-three qwen3-moe qwen3-moe-dense-layers
""".split()  # noqa: SIM905


@pytest.mark.parametrize("name", NAMES)
def test_every_model_gives_the_same(cuda: Kernels, name: str) -> None:
    spec = spec_of(cases()[name])
    check(cuda, decoder(spec), constants(spec))


def test_every_architecture_is_among_them() -> None:
    from fastpage.models.registry import _BUILT_IN

    modules = {_BUILT_IN[cases()[n].model or f"{cases()[n].family}ForCausalLM"] for n in NAMES}
    assert set(_BUILT_IN.values()) - modules == {"baichuan"}  # Llama's or MPT's layers


# ---- what is launched


def launches(cuda: Kernels, spec: DecoderSpec) -> Counter[str]:
    """By a decode step of one sequence, op by op."""
    counted = Launches(cuda.ops)
    executor = executor_of(cuda, decoder(spec), kernels=counted.kernels)
    load(executor, constants(spec))
    paged = PagedSequences([TOKENS[:20]], NUM_BLOCKS, 16)
    executor.forward_arrays(**paged.step({0: 19}))
    step = paged.step({0: 1})
    counted.counts.clear()
    with torch.inference_mode(), counted:
        executor.launch(step)
    return counted.counts


SPARE = {"linear": 4, "paged_attention": 1, "activate": 1, "norm": 2}
LAYERS: dict[str, tuple[DecoderSpec, dict[str, int]]] = {
    "llama": (SPEC, SPARE | {"rotary_and_cache": 1}),
    "qwen2": (replace(SPEC, qkv_bias=True), SPARE | {"rotary_and_cache": 1}),
    "qwen3": (replace(SPEC, qk_norm="head"), SPARE | {"rotary_and_cache": 1}),
    "gemma2": (
        replace(SPEC, norm_place="sandwich", attention_soft_cap=50.0),
        SPARE | {"rotary_and_cache": 1, "norm": 4},
    ),
    "olmo2": (
        replace(SPEC, norm_place="output", qk_norm="all"),
        SPARE | {"rotary_and_cache": 1, "norm": 4, "add": 2},
    ),
    "falcon": (
        replace(SPEC, residual="parallel", norm_kind="layer"),
        SPARE | {"rotary_and_cache": 1, "norm": 1, "add": 1},
    ),
    "gpt2": (
        replace(
            SPEC,
            rotary=None,
            learned_positions=MAX_LEN,
            norm_kind="layer",
            norm_bias=True,
            qkv_bias=True,
            o_bias=True,
            mlp_bias=True,
            gated_mlp=False,
        ),
        SPARE | {"reshape_and_cache": 1},
    ),
    "granite": (
        replace(SPEC, residual_scale=0.3),
        SPARE | {"rotary_and_cache": 1, "mul": 2},
    ),
}


@pytest.mark.parametrize("name", LAYERS)
def test_launches_of_a_layer(cuda: Kernels, name: str) -> None:
    spec, want = LAYERS[name]
    two, three = (launches(cuda, replace(spec, num_layers=n)) for n in (2, 3))
    assert three - two == Counter(want)
    assert sum((two - three).values()) == 0


def test_launches_beside_the_layers(cuda: Kernels) -> None:
    """Of a whole recorded step."""
    if cuda.is_gpu:
        pytest.skip("what was recorded there is replayed as a whole")
    counted = Launches(cuda.ops)
    spec = replace(LAYERS["gpt2"][0], position_offset=2, learned_positions=MAX_LEN + 2)
    for each, want in ((SPEC, {"embed": 1}), (spec, {"embed": 2})):
        executor = load(executor_of(cuda, decoder(each), kernels=counted.kernels), constants(each))
        limits = {"max_num_seqs": 2, "max_num_batched_tokens": 16, "max_model_len": MAX_LEN}
        executor.warm_up(**limits, graph_sizes=[2])
        counted.counts.clear()
        with torch.inference_mode(), counted:
            executor._graphs._graphs[2]._replay()
        layers = Counter(LAYERS["llama" if each is SPEC else "gpt2"][1])
        # The last norm and the logits; these as float32, where the sampler looks for them.
        assert counted.counts - layers - layers == want | {"norm": 1, "linear": 1, "copy_": 1}


def test_passes_are_left_out_by_name(cuda: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    def kinds(**options: Any) -> set[str]:
        return {op.kind for op in executor_of(cuda, decoder(SPEC), **options).program.ops}

    apart = {"rotary", "write_cache", "add"}
    assert not apart & kinds()
    assert apart & kinds(disabled_passes=["fuse_add_norm"]) == {"add"}
    assert apart <= kinds(disabled_passes=["all"])
    monkeypatch.setenv("FASTPAGE_DISABLED_PASSES", "fuse_rotary_cache")
    assert apart & kinds() == {"rotary", "write_cache"}


# ---- engines


@pytest.mark.parametrize("name", LAYERS)
def test_greedy_tokens_are_those_of_torch(cuda: Kernels, name: str) -> None:
    """With recorded steps, padded, and samples that share blocks."""
    spec = LAYERS[name][0]
    requests = [{"temperature": 0.0, "n": n} for n in (1, 2, 1)]
    executor = load(executor_of(cuda, decoder(spec), dtype="float32"), constants(spec))
    limits = {"max_num_seqs": 8, "max_num_batched_tokens": 24, "max_model_len": MAX_LEN}
    executor.warm_up(**limits, graph_sizes=[1, 3, 8])
    reference = load(TorchExecutor(decoder(spec), num_kv_blocks=NUM_BLOCKS), constants(spec))
    got, want = (
        [tokens for tokens, _, _ in generate(runner, requests=requests, num_blocks=NUM_BLOCKS)]
        for runner in (CudaRunner(executor), TorchRunner(reference))
    )
    assert len(got) == 4
    assert got == want
    assert len({tuple(tokens) for tokens in got}) == 3  # both samples of a request alike


# ---- what is written over is needed by nobody


def random_program(seed: int) -> Any:
    """Ops that may write over what they read, over whatever there is."""
    random = np.random.default_rng(seed)
    with ops.trace() as program:
        x = ops.embed(ops.weight("table", (VOCAB, 32)))
        alive = [x]

        def pick() -> ops.Tensor:
            # Mostly what is new, so that much of what is old ends somewhere.
            return alive[max(0, len(alive) - 1 - int(random.exponential(0.8)))]

        def add_ops(count: int) -> None:
            for _ in range(count):
                x, n = pick(), len(program.ops)
                kind = random.choice(["add", "add+norm", "norm", "scale", "clamp", "split"])
                if kind.startswith("add"):
                    y = ops.add(x, pick())
                    if kind == "add+norm":
                        alive.append(y)
                        y = ops.norm(y, ops.weight(f"norm{n}", (32,)), 1e-5)
                elif kind == "norm":
                    y = ops.norm(x, ops.weight(f"norm{n}", (32,)), 1e-5)
                elif kind == "scale":
                    y = ops.scale(x, 0.7)
                elif kind == "clamp":
                    y = ops.clamp(x, 1.5)
                else:
                    wide = ops.linear(x, ops.weight(f"w{n}", (64, 32)))
                    y = ops.add(*ops.split(wide, (32, 32)))
                    alive.append(ops.split(wide, (32, 32))[int(random.integers(2))])
                alive.append(y)

        add_ops(12)
        alive = [ops.gather_rows(x) for x in (*alive[-3:], alive[-1])]
        add_ops(6)
        x = functools.reduce(ops.add, alive[-3:])
        ops.output(ops.soft_cap(ops.linear(x, ops.weight("head", (VOCAB, 32))), 5.0))
    return program


@pytest.mark.parametrize("seed", range(40))
def test_random_programs(cuda: Kernels, seed: int) -> None:
    program = random_program(seed)
    fused = _C.apply_passes(program, target="gpu")
    options: dict[str, Any] = {"num_kv_blocks": 2}
    cpu_options = options | {"weight_dtype": "float32", "disabled_passes": ["all"]}
    executors = [
        load(executor, {})
        for executor in (
            TorchExecutor(program, **options),
            TorchExecutor(fused, **options),
            _C.CpuExecutor(program, **cpu_options),
            _C.CpuExecutor(fused, **cpu_options),
            executor_of(cuda, program, dtype="float32"),
        )
    ]
    for wanted in ([3, 19], list(range(20))):
        step = PagedSequences([TOKENS[:20]], 2, 16).step({0: 20}, wanted)
        plain, same, cpu, same_cpu, got = (each.forward_arrays(**step) for each in executors)
        np.testing.assert_array_equal(same, plain)
        np.testing.assert_array_equal(same_cpu, cpu)
        assert relative_error(cpu, plain) < 1e-4
        assert relative_error(got, plain) < 1e-4


def test_random_programs_are_fused() -> None:
    """Else the test above says nothing."""
    programs = [_C.apply_passes(random_program(seed), target="gpu") for seed in range(40)]
    norms = [op for program in programs for op in program.ops if op.kind == "norm"]
    fused = [op for op in norms if "residual" in op.attrs]
    assert 20 < len(fused) < len(norms) - 20


def test_rows_that_are_gathered_twice(cuda: Kernels) -> None:
    """All of them: each is a tensor of its own."""
    with ops.trace() as program:
        x = ops.embed(ops.weight("table", (VOCAB, 32)))
        once, again = ops.gather_rows(x), ops.gather_rows(x)
        ops.output(ops.add(ops.scale(once, 2.0), again))
    step = PagedSequences([TOKENS[:20]], 2, 16).step({0: 20})
    want, got = (
        load(executor, {}).forward_arrays(**step)
        for executor in (
            TorchExecutor(program, num_kv_blocks=2),
            executor_of(cuda, program, dtype="float32"),
        )
    )
    np.testing.assert_array_equal(got, want)


def test_a_residual_that_is_read_again(cuda: Kernels) -> None:
    """No pass makes such an op, but it is one."""
    with ops.trace() as program:
        x = ops.embed(ops.weight("table", (VOCAB, 32)))
        for i, residual in enumerate((x, ops.scale(x, 2.0))):
            outputs = [program.add_activation(f"{i}{name}", "tokens", 32) for name in ("y", "sum")]
            operands = [ops.scale(x, 3.0).operand(), ops.weight(f"norm{i}", (32,)).operand()]
            program.add_op(
                "norm",
                [*operands, residual.operand()],
                [_C.Operand(out, 0, 32) for out in outputs],
                {"kind": "rms", "eps": 1e-5, "residual": 1},
            )
            for out in outputs:
                x = ops.add(x, ops.Tensor(out, 0, 32, "tokens"))
            x = ops.add(x, residual)
        ops.output(ops.gather_rows(x))
    step = PagedSequences([TOKENS[:20]], 2, 16).step({0: 20})
    want, cpu, got = (
        load(executor, {}).forward_arrays(**step)
        for executor in (
            TorchExecutor(program, num_kv_blocks=2),
            _C.CpuExecutor(program, num_kv_blocks=2, weight_dtype="float32"),
            executor_of(cuda, program, dtype="float32"),
        )
    )
    assert relative_error(cpu, want) < 1e-5
    assert relative_error(got, want) < 1e-5
