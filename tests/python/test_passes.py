"""Passes over a Program: what they make of it, and that they change nothing else."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from paging import PagedSequences, relative_error
from test_program import MAX_POSITION, NUM_BLOCKS, VOCAB, mixed_steps, random_spec, random_tokens

from fastpage import ops
from fastpage._C import CpuExecutor, Operand, Program, ThreadPool, apply_passes, passes
from fastpage.errors import InvalidArgument
from fastpage.models import DecoderSpec, MoeSpec, RotarySpec, decoder
from fastpage.models.rotary import cos_sin_table

TorchExecutor = pytest.importorskip("fastpage.executors.torch").TorchExecutor
pytestmark = pytest.mark.usefixtures("one_torch_thread")

NAMES = [name for name, _ in passes()]

FUSED = """\
%0: tokens x 6 = embed(embed)
%2: tokens x 16 = linear(%0, layers.0.attn.qkv, layers.0.attn_norm, norm_eps=1e-05)
%3.q: tokens x 8 = rotary_write_cache(%2[0:8], %2[8:12], %2[12:16], rotary.cos_sin, head_dim=4, \
layer=0, style="neox")
%5: tokens x 8 = attend(%3.q, head_dim=4, layer=0, num_heads=2, num_kv_heads=1, scale=0.5, \
sliding_window=0, soft_cap=0)
%6: logits x 8 = gather_rows(%5)
%7: logits x 6 = gather_rows(%0)
%9: logits x 6 = linear(%6, layers.0.attn.o, %7, residual=1)
%12: logits x 64 = linear(%9, layers.0.mlp.gate_up, layers.0.mlp_norm, \
activation="silu_and_mul", norm_eps=1e-05)
%14: logits x 6 = linear(%12, layers.0.mlp.down, %9, residual=1)
%16: logits x 61 = linear(%14, embed, final_norm, norm_eps=1e-05)
output %16
"""

FUSED_FOR_A_GPU = """\
%0: tokens x 6 = embed(embed)
%1: tokens x 6 = norm(%0, layers.0.attn_norm, eps=1e-05, group=6, kind="rms")
%2: tokens x 16 = linear(%1, layers.0.attn.qkv)
%3.q: tokens x 8 = rotary_write_cache(%2[0:8], %2[8:12], %2[12:16], rotary.cos_sin, head_dim=4, \
layer=0, style="neox")
%5: tokens x 8 = attend(%3.q, head_dim=4, layer=0, num_heads=2, num_kv_heads=1, scale=0.5, \
sliding_window=0, soft_cap=0)
%6: logits x 8 = gather_rows(%5)
%7: logits x 6 = gather_rows(%0)
%8: logits x 6 = linear(%6, layers.0.attn.o)
%10: logits x 6 = %9: logits x 6 = norm(%8, layers.0.mlp_norm, %7, eps=1e-05, group=6, \
kind="rms", residual=1)
%11: logits x 128 = linear(%10, layers.0.mlp.gate_up)
%12: logits x 64 = activate(%11, kind="silu_and_mul")
%13: logits x 6 = linear(%12, layers.0.mlp.down)
%15: logits x 6 = %14: logits x 6 = norm(%13, final_norm, %9, eps=1e-05, group=6, kind="rms", \
residual=1)
%16: logits x 61 = linear(%15, embed)
output %16
"""


def spec(**changes: Any) -> DecoderSpec:
    return DecoderSpec(
        **{
            "vocab_size": VOCAB,
            "hidden_size": 6,
            "intermediate_size": 64,
            "num_layers": 1,
            "num_heads": 2,
            "num_kv_heads": 1,
            "head_dim": 4,
            "norm_eps": 1e-5,
            "max_position_embeddings": MAX_POSITION,
            "rotary": RotarySpec(dim=4),
            "tie_embeddings": True,
            **changes,
        }
    )


# Wide enough for several threads, whole panels, sums in several blocks, and rows in several too.
WIDE = spec(
    hidden_size=160,
    intermediate_size=1152,
    num_layers=2,
    num_heads=6,
    num_kv_heads=2,
    head_dim=16,
    rotary=RotarySpec(dim=12),
    qkv_bias=True,
    mlp_bias=True,
)


def kinds(program: Program) -> list[str]:
    return [op.kind for op in program.ops]


def test_text_of_a_fused_program() -> None:
    assert str(apply_passes(decoder(spec()))).endswith(FUSED)
    assert str(apply_passes(decoder(spec()), target="gpu")).endswith(FUSED_FOR_A_GPU)


def test_each_pass_by_its_name() -> None:
    program = decoder(spec(num_layers=2))
    assert str(apply_passes(program, ["all"])) == str(program)
    assert NAMES == ["fuse_rotary_cache", "fuse_activation", "fuse_residual", "fuse_norm"]
    gone = {
        "fuse_rotary_cache": {"rotary", "write_cache"},
        "fuse_activation": {"activate"},
        "fuse_residual": {"add"},
        "fuse_norm": {"norm"},
    }
    for name in NAMES:
        alone = apply_passes(program, [other for other in NAMES if other != name])
        assert set(kinds(program)) - set(kinds(alone)) == gone[name]
        assert gone[name] <= set(kinds(apply_passes(program, [name])))
    with pytest.raises(InvalidArgument, match="unknown pass 'fuse': one of all, fuse_rotary_cache"):
        apply_passes(program, ["fuse"])
    assert [name for name, _ in passes("gpu")] == [
        "fuse_rotary_cache",
        "fuse_add_norm",
        "fuse_qk_norm",
    ]
    assert "add" in kinds(apply_passes(program, ["fuse_add_norm"], target="gpu"))
    with pytest.raises(InvalidArgument, match="unknown target 'tpu': one of cpu, gpu"):
        passes("tpu")


def test_switched_off_in_the_executor(monkeypatch: pytest.MonkeyPatch) -> None:
    program = decoder(spec())
    found = kinds(CpuExecutor(program, num_kv_blocks=1).program)
    assert not {"norm", "rotary", "write_cache", "activate", "add"} & set(found)
    off = CpuExecutor(program, num_kv_blocks=1, disabled_passes=["fuse_norm"])
    assert "norm" in kinds(off.program) and "add" not in kinds(off.program)
    monkeypatch.setenv("FASTPAGE_DISABLED_PASSES", "fuse_residual,fuse_activation")
    found = kinds(CpuExecutor(program, num_kv_blocks=1).program)
    assert {"add", "activate"} <= set(found) and "norm" not in found
    monkeypatch.setenv("FASTPAGE_DISABLED_PASSES", "nonsense")
    with pytest.raises(InvalidArgument, match="unknown pass 'nonsense'"):
        CpuExecutor(program, num_kv_blocks=1)


# ---- what must not be fused


def two_readers(x: ops.Tensor) -> ops.Tensor:
    normed = ops.norm(x, ops.weight("norm", (8,)), 1e-5)
    return ops.add(ops.linear(normed, ops.weight("w", (8, 8))), normed)


def norm_of_groups(x: ops.Tensor) -> ops.Tensor:
    return ops.linear(ops.norm(x, ops.weight("norm", (4,)), 1e-5), ops.weight("w", (8, 8)))


def part_of_a_linear(x: ops.Tensor) -> ops.Tensor:
    y = ops.linear(x, ops.weight("w", (24, 8)))
    return ops.add(ops.activate(ops.split(y, (16, 8))[0]), ops.split(y, (16, 8))[1])


def added_to_itself(x: ops.Tensor) -> ops.Tensor:
    y = ops.linear(x, ops.weight("w", (8, 8)))
    return ops.add(y, y)


def rotated_read_again(x: ops.Tensor) -> ops.Tensor:
    x = ops.rotary(x, ops.weight("cos_sin", (MAX_POSITION, 4)), 4)
    ops.write_cache(x, x, layer=0)
    y = ops.attend(x, layer=0, num_heads=2, num_kv_heads=2, head_dim=4, scale=0.5)
    return ops.add(x, y)


def sum_of_what_stays(x: ops.Tensor) -> ops.Tensor:
    y = ops.scale(x, 2.0)
    z = ops.norm(ops.add(x, y), ops.weight("norm", (8,)), 1e-5)
    return ops.linear(ops.add(z, ops.add(x, y)), ops.weight("w", (8, 8)))


def sum_read_before_the_norm(x: ops.Tensor) -> ops.Tensor:
    x = ops.add(x, ops.scale(x, 2.0))
    y = ops.scale(x, 0.5)
    return ops.add(ops.norm(x, ops.weight("norm", (8,)), 1e-5), y)


def norm_of_a_part(x: ops.Tensor) -> ops.Tensor:
    x = ops.split(ops.add(x, ops.scale(x, 2.0)), (4, 4))[1]
    return ops.norm(x, ops.weight("norm", (4,)), 1e-5)


def sum_of_parts(x: ops.Tensor) -> ops.Tensor:
    return ops.norm(ops.add(*ops.split(x, (4, 4))), ops.weight("norm", (4,)), 1e-5)


def sum_with_itself(x: ops.Tensor) -> ops.Tensor:
    return ops.norm(ops.add(x, x), ops.weight("norm", (8,)), 1e-5)


@pytest.mark.parametrize(
    "build",
    [
        sum_of_what_stays,
        sum_read_before_the_norm,
        norm_of_a_part,
        sum_of_parts,
        sum_with_itself,
    ],
)
def test_left_as_it_is_on_a_gpu(build: Callable[[ops.Tensor], ops.Tensor]) -> None:
    with ops.trace() as program:
        ops.output(ops.gather_rows(build(ops.embed(ops.weight("embed", (VOCAB, 8))))))
    assert str(apply_passes(program, target="gpu")) == str(program)


@pytest.mark.parametrize(
    "build", [two_readers, norm_of_groups, part_of_a_linear, added_to_itself, rotated_read_again]
)
def test_left_as_it_is(build: Callable[[ops.Tensor], ops.Tensor]) -> None:
    with ops.trace() as program:
        x = build(ops.embed(ops.weight("embed", (VOCAB, 8))))
        ops.output(ops.gather_rows(x))
    fused = apply_passes(program, ["fuse_residual"] if build is two_readers else [])
    assert str(fused) == str(program)


@pytest.mark.parametrize(
    ("changes", "count"),
    [
        ({"qk_norm": "head"}, 0),
        ({"qk_norm": "each_head"}, 2),  # a weight for each head
        ({"qk_norm": "all"}, 2),  # not of heads
        ({"qk_norm": "head", "norm_kind": "layer"}, 2),
        ({"qk_norm": "head", "rotary": None}, 2),
    ],
)
def test_norms_of_query_and_key_heads_on_a_gpu(changes: dict[str, Any], count: int) -> None:
    program = decoder(spec(num_heads=4, num_kv_heads=2, num_layers=2, **changes))
    fused = apply_passes(program, target="gpu")
    assert kinds(fused).count("norm") == kinds(program).count("norm") - 2 * (2 - count)


def test_norms_of_query_and_key_heads_that_differ() -> None:
    """Nothing is fused; nor where what is normed is read by more than rotary."""
    for k_eps, again in ((1e-6, False), (1e-5, True)):
        with ops.trace() as program:
            x = ops.embed(ops.weight("embed", (VOCAB, 24)))
            q, k, v = ops.split(x, (8, 8, 8))
            q = ops.norm(q, ops.weight("q_norm", (4,)), 1e-5)
            k = ops.norm(k, ops.weight("k_norm", (4,)), k_eps)
            table = ops.weight("cos_sin", (MAX_POSITION, 4))
            turned_q, turned_k = ops.rotary(q, table, 4), ops.rotary(k, table, 4)
            ops.write_cache(turned_k, v, layer=0)
            y = ops.attend(turned_q, layer=0, num_heads=2, num_kv_heads=2, head_dim=4)
            ops.output(ops.gather_rows(ops.add(y, q) if again else y))
        fused = kinds(apply_passes(program, target="gpu"))
        assert fused.count("rotary_write_cache") == 1
        assert fused.count("norm") == 2


def test_norms_of_query_and_key_heads_with_rotary_are_not_for_the_cpu() -> None:
    program = apply_passes(decoder(spec(qk_norm="head")), target="gpu")
    with pytest.raises(InvalidArgument, match="with norms of q and k is for a GPU"):
        load(CpuExecutor(program, num_kv_blocks=1), program, 0)


def test_a_norm_with_a_residual_is_checked() -> None:
    def program(cols: int = 8, outputs: int = 2, same: bool = False, flag: int = 1) -> None:
        with ops.trace() as program:
            x = ops.embed(ops.weight("embed", (VOCAB, 8)))
            y = ops.embed(ops.weight("other", (VOCAB, cols)))
            results = [program.add_activation(name, "tokens", 8) for name in "ab"]
            program.add_op(
                "norm",
                [x.operand(), ops.weight("norm", (8,)).operand(), y.operand()],
                [Operand(results[0 if same else i], 0, 8) for i in range(outputs)],
                {"kind": "rms", "eps": 1e-5, "residual": flag},
            )
            ops.output(ops.gather_rows(ops.Tensor(results[1], 0, 8, "tokens")))

    program()
    with pytest.raises(InvalidArgument, match=r"residual '1' \(6 columns\) differs in shape"):
        program(cols=6)
    with pytest.raises(InvalidArgument, match="1 outputs, 2 needed"):
        program(outputs=1)
    with pytest.raises(InvalidArgument, match=r"both outputs are 'a'"):
        program(same=True)
    with pytest.raises(InvalidArgument, match="attribute residual must be 1"):
        program(flag=2)


# ---- the same bits


def load(executor: Any, program: Program, seed: int) -> Any:
    random = np.random.default_rng(seed)
    for buffer in program.buffers:
        if buffer.kind != "weight":
            continue
        values = random.standard_normal(buffer.shape, np.float32)
        if "cos_sin" in buffer.name:
            values = cos_sin_table(RotarySpec(buffer.shape[1]), buffer.shape[0])
        elif len(buffer.shape) == 2 and buffer.name != "embed":
            values /= buffer.shape[1] ** 0.5
        executor.load_weight(buffer.name, values)
    executor.finish_loading()
    return executor


def assert_same_bits(program: Program, disabled: list[str], seed: int = 0, **options: Any) -> None:
    fused, plain = (
        load(
            CpuExecutor(
                program,
                num_kv_blocks=NUM_BLOCKS,
                max_num_tokens=384,
                max_num_logits=210,
                disabled_passes=off,
                pool=ThreadPool(3),
                **options,
            ),
            program,
            seed,
        )
        for off in (disabled, ["all"])
    )
    assert len(fused.program.ops) < len(plain.program.ops)
    random = np.random.default_rng(seed)
    sequences = random_tokens(random, [70, 3, 90, 64, 90])
    paged = PagedSequences(sequences, NUM_BLOCKS, 16, seed)
    steps = [paged.step({0: 60, 2: 89, 4: 90})]  # 239 rows
    for step in steps + mixed_steps(paged, random):
        np.testing.assert_array_equal(fused.forward_arrays(**step), plain.forward_arrays(**step))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_each_pass_alone(name: str, dtype: str) -> None:
    others = [other for other in NAMES if other != name]
    options = {"weight_dtype": dtype, "kv_cache_dtype": dtype}
    assert_same_bits(decoder(WIDE), others, **options)


@pytest.mark.parametrize("seed", range(10))
def test_random_models(seed: int) -> None:
    program = decoder(random_spec(np.random.default_rng(seed)))
    assert_same_bits(program, [], seed, weight_dtype="float32", kv_cache_dtype="float32")


@pytest.mark.parametrize("quantization", ["int8", "int4"])
@pytest.mark.parametrize("activations", ["quantized", "float32"])
def test_quantized(quantization: str, activations: str) -> None:
    options = {"quantization": quantization, "activations": activations, "kv_cache_dtype": "int8"}
    assert_same_bits(decoder(WIDE), [], **options)


MIXTURE = MoeSpec(num_experts=6, top_k=2, intermediate_size=128, layers=(True, False))


@pytest.mark.parametrize("quantization", ["none", "int8", "int4"])
def test_mixtures_of_experts(quantization: str) -> None:
    """The norm before one has two readers, and what it gives is no linear layer's."""
    program = decoder(dataclasses.replace(WIDE, moe=MIXTURE))
    fused = kinds(apply_passes(program))
    at = fused.index("moe")
    assert fused[at - 2 : at + 2] == ["norm", "linear", "moe", "add"]
    assert_same_bits(program, [], quantization=quantization)


def test_query_and_key_norms() -> None:
    """They stay between the linear layer and rotary, which is then of q and of k apart."""
    program = decoder(spec(qk_norm="head", num_layers=2))
    assert kinds(apply_passes(program)).count("norm") == 4
    assert kinds(apply_passes(program)).count("rotary_write_cache") == 2
    assert_same_bits(program, [], weight_dtype="float32")


def test_rows_do_not_depend_on_their_batch() -> None:
    random = np.random.default_rng(7)
    program = decoder(WIDE)
    sequences = random_tokens(random, [50, 80, 9, 30])
    options = {"num_kv_blocks": NUM_BLOCKS, "max_num_tokens": 384, "max_num_logits": 210}
    alone, together = (
        load(CpuExecutor(program, pool=ThreadPool(n), **options), program, 1) for n in (1, 2)
    )
    expected = [
        alone.forward_arrays(**PagedSequences([tokens], NUM_BLOCKS, 16).step({0: len(tokens)}))
        for tokens in sequences
    ]
    paged = PagedSequences(sequences, NUM_BLOCKS, 16, seed=5)
    found: list[list[np.ndarray]] = [[] for _ in sequences]
    for new in ({0: 7, 1: 1, 3: 30}, {0: 43, 2: 9, 1: 60}, {1: 18}, {1: 1}):
        logits = together.forward_arrays(**paged.step(new))
        starts = np.cumsum([0, *new.values()])
        for row, begin, end in zip(new, starts, starts[1:], strict=False):
            found[row].append(logits[begin:end])
    for row, parts in enumerate(found):
        np.testing.assert_array_equal(np.concatenate(parts), expected[row])


def test_the_reference_runs_fused_programs() -> None:
    program = decoder(WIDE)
    options = {"num_kv_blocks": NUM_BLOCKS, "weight_dtype": "float32", "kv_cache_dtype": "float32"}
    fused = load(TorchExecutor(apply_passes(program), **options), program, 2)
    plain = load(TorchExecutor(program, **options), program, 2)
    paged = PagedSequences(random_tokens(np.random.default_rng(0), [70, 3]), NUM_BLOCKS, 16)
    for new in ({0: 40, 1: 3}, {0: 30}):
        step = paged.step(new)
        error = relative_error(fused.forward_arrays(**step), plain.forward_arrays(**step))
        assert error < 1e-6
