"""Programs: their text, their errors, and the CPU executor against the torch reference executor."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from paging import PagedSequences, relative_error

from fastpage import ops
from fastpage._C import CpuExecutor, Operand, Program
from fastpage.errors import InvalidArgument, ResourceExhausted
from fastpage.models import DecoderSpec, MoeSpec, RotarySpec, decoder
from fastpage.models.constants import alibi_slopes
from fastpage.models.rotary import cos_sin_table

TorchExecutor = pytest.importorskip("fastpage.executors.torch").TorchExecutor
pytestmark = pytest.mark.usefixtures("one_torch_thread")

NUM_BLOCKS, MAX_POSITION, VOCAB = 24, 96, 61

GOLDEN = """\
weight table [7, 6]
weight norm [6]
weight proj [8, 6]
weight proj.bias [8]
weight cos_sin [5, 2]
weight head [7, 4]
%0: tokens x 6 = embed(table)
%1: tokens x 6 = norm(%0, norm, eps=1e-05, group=6, kind="rms")
%2: tokens x 8 = linear(%1, proj, proj.bias)
%3: tokens x 6 = rotary(%2[0:6], cos_sin, head_dim=2, style="neox")
write_cache(%3[4:6], %2[6:8], layer=0)
%5: tokens x 4 = attend(%3[0:4], head_dim=2, layer=0, num_heads=2, num_kv_heads=1, \
scale=0.5, sliding_window=3, soft_cap=0)
%6: tokens x 2 = activate(%5, kind="silu_and_mul")
%7: tokens x 2 = add(%6, %5[2:4])
%8: logits x 4 = gather_rows(%5)
%9: logits x 7 = linear(%8, head)
output %9
"""


def small_program() -> Program:
    with ops.trace() as program:
        x = ops.embed(ops.weight("table", (7, 6)))
        x = ops.norm(x, ops.weight("norm", (6,)), eps=1e-5)
        x = ops.linear(x, ops.weight("proj", (8, 6)), ops.weight("proj.bias", (8,)))
        qk, v = ops.split(x, (6, 2))
        q, k = ops.split(ops.rotary(qk, ops.weight("cos_sin", (5, 2)), head_dim=2), (4, 2))
        ops.write_cache(k, v, layer=0)
        x = ops.attend(
            q, layer=0, num_heads=2, num_kv_heads=1, head_dim=2, scale=0.5, sliding_window=3
        )
        ops.add(ops.activate(x), ops.split(x, (2, 2))[1])
        ops.output(ops.linear(ops.gather_rows(x), ops.weight("head", (7, 4))))
    return program


def test_text_of_a_program() -> None:
    program = small_program()
    assert str(program) == GOLDEN
    assert program.kv_cache_spec == (1, 1, 2)
    assert program.vocab_size == 7
    attend = program.ops[5]
    assert attend.kind == "attend"
    assert attend.attrs["sliding_window"] == 3 and attend.attrs["scale"] == 0.5
    assert (attend.inputs[0].offset, attend.inputs[0].cols) == (0, 4)


def test_tracing_errors() -> None:
    with pytest.raises(RuntimeError, match=r"with ops.trace\(\)"):
        ops.weight("w", (2,))
    with pytest.raises(ValueError, match="do not add up to 6"), ops.trace():
        ops.split(ops.embed(ops.weight("table", (7, 6))), (3, 2))
    with pytest.raises(InvalidArgument, match="has no output"), ops.trace():
        ops.embed(ops.weight("table", (7, 6)))
    with pytest.raises(InvalidArgument, match="unknown op 'softmax'"):
        Program().add_op("softmax", [Operand(0)], [], {})


# ---- the two executors side by side


class Pair:
    """The CPU executor and the reference, with the same weights and steps."""

    def __init__(
        self,
        program: Program,
        dtype: str,
        block_size: int,
        seed: int,
        num_host_kv_blocks: int = 0,
        kv_cache_dtype: str | None = None,
        activations: str = "float32",
    ) -> None:
        random = np.random.default_rng(seed)
        options: dict[str, Any] = {"num_kv_blocks": NUM_BLOCKS, "block_size": block_size}
        options |= {"weight_dtype": dtype, "kv_cache_dtype": kv_cache_dtype or dtype}
        options |= {"num_host_kv_blocks": num_host_kv_blocks}
        self.cpu = CpuExecutor(
            program, max_num_tokens=128, max_num_logits=13, activations=activations, **options
        )
        self.torch = TorchExecutor(program, **options)
        for buffer in program.buffers:
            if buffer.kind != "weight":
                continue
            values = random.standard_normal(buffer.shape, np.float32)
            if "cos_sin" in buffer.name:
                values = cos_sin_table(RotarySpec(buffer.shape[1]), buffer.shape[0])
            elif len(buffer.shape) == 2 and buffer.name != "embed":
                values /= buffer.shape[1] ** 0.5
            for executor in (self.cpu, self.torch):
                executor.load_weight(buffer.name, values)
        self.cpu.finish_loading()
        self.torch.finish_loading()

    def error(self, step: dict[str, Any]) -> float:
        return relative_error(self.cpu.forward_arrays(**step), self.torch.forward_arrays(**step))


def random_tokens(random: np.random.Generator, lengths: list[int]) -> list[list[int]]:
    return [random.integers(0, VOCAB, length).tolist() for length in lengths]


def mixed_steps(paged: PagedSequences, random: np.random.Generator) -> list[dict[str, Any]]:
    """Lets every sequence catch up: some by single tokens, some by chunks, some pausing."""
    steps = []
    while True:
        left = {
            row: len(tokens) - done
            for row, (tokens, done) in enumerate(
                zip(paged.sequences, paged.num_computed, strict=True)
            )
            if done < len(tokens)
        }
        if not left:
            return steps
        rows = [row for row in left if random.random() < 0.8] or list(left)
        new = {row: int(min(left[row], random.choice([1, 1, 5, 16, 33]))) for row in rows}
        total = sum(new.values())
        wanted = np.flatnonzero(random.random(total) < 0.6)
        steps.append(paged.step(new, wanted if len(wanted) else [total - 1]))


HIDDEN = 24
OPS: dict[str, Callable[[ops.Tensor], ops.Tensor]] = {
    "embed": lambda x: x,
    "norm": lambda x: ops.norm(x, ops.weight("w", (HIDDEN,)), 1e-3),
    "norm-groups": lambda x: ops.norm(x, ops.weight("w", (8,)), 1e-3),
    "norm-columns": lambda x: ops.norm(ops.split(x, (5, 19))[1], ops.weight("w", (19,)), 1e-3),
    "linear": lambda x: ops.linear(x, ops.weight("w", (37, HIDDEN))),
    "linear-bias": lambda x: ops.linear(x, ops.weight("w", (37, HIDDEN)), ops.weight("b", (37,))),
    "linear-columns": lambda x: ops.linear(ops.split(x, (7, 17))[1], ops.weight("w", (16, 17))),
    "rotary": lambda x: ops.rotary(x, ops.weight("cos_sin", (MAX_POSITION, 8)), 8),
    "rotary-partial": lambda x: ops.rotary(x, ops.weight("cos_sin", (MAX_POSITION, 6)), 12),
    "rotary-interleaved": lambda x: ops.rotary(
        ops.split(x, (8, 16))[1], ops.weight("cos_sin", (MAX_POSITION, 8)), 8, "interleaved"
    ),
    "norm-bias": lambda x: ops.norm(x, ops.weight("w", (8,)), 1e-3, ops.weight("b", (8,))),
    "layer-norm": lambda x: ops.norm(x, ops.weight("w", (HIDDEN,)), 1e-3, kind="layer"),
    "layer-norm-each-head": lambda x: ops.norm(
        x, ops.weight("w", (HIDDEN,)), 1e-3, ops.weight("b", (HIDDEN,)), kind="layer", group=6
    ),
    "embed-positions": lambda x: ops.add(
        x, ops.embed_positions(ops.weight("positions", (MAX_POSITION + 3, HIDDEN)), offset=3)
    ),
    **{
        f"activate-{kind}{gate}": lambda x, kind=kind + gate: ops.activate(x, kind)
        for kind in DecoderSpec.ACTIVATIONS
        for gate in ("", "_and_mul")
    },
    "scale": lambda x: ops.scale(x, 0.3),
    "clamp": lambda x: ops.clamp(x, 0.3),
    "soft-cap": lambda x: ops.soft_cap(x, 1.5),
    "add": lambda x: ops.add(*ops.split(x, (12, 12))),
    "attend": lambda x: attention(x, num_heads=2, num_kv_heads=2, head_dim=4),
    "attend-grouped": lambda x: attention(x, num_heads=6, num_kv_heads=2, head_dim=5),
    "attend-window": lambda x: attention(
        x, num_heads=2, num_kv_heads=1, head_dim=16, sliding_window=11
    ),
    "attend-soft-cap": lambda x: attention(
        x, num_heads=3, num_kv_heads=1, head_dim=8, scale=1.5, soft_cap=2.0
    ),
    "moe": lambda x: mixture(x, 5, top_k=2, renormalize=True),
    "moe-gelu": lambda x: mixture(x, 3, top_k=3, renormalize=False, kind="gelu_tanh_and_mul"),
    "attend-alibi": lambda x: attention(
        x, num_heads=6, num_kv_heads=2, head_dim=8, alibi_slopes=ops.weight("slopes", (6,))
    ),
}


def attention(
    x: ops.Tensor, num_heads: int, num_kv_heads: int, head_dim: int, **more: Any
) -> ops.Tensor:
    widths = [heads * head_dim for heads in (num_heads, num_kv_heads, num_kv_heads)]
    q, k, v = ops.split(ops.linear(x, ops.weight("qkv", (sum(widths), x.cols))), widths)
    ops.write_cache(k, v, layer=0)
    heads = {"num_heads": num_heads, "num_kv_heads": num_kv_heads, "head_dim": head_dim}
    return ops.attend(q, layer=0, **heads, **more)


def mixture(x: ops.Tensor, num_experts: int, **more: Any) -> ops.Tensor:
    experts = [
        (ops.weight(f"gate_up{i}", (34, x.cols)), ops.weight(f"down{i}", (x.cols, 17)))
        for i in range(num_experts)
    ]
    return ops.moe(x, ops.linear(x, ops.weight("router", (num_experts, x.cols))), experts, **more)


def test_text_of_a_mixture() -> None:
    for num_experts, experts in ((1, "gate_up0, down0"), (3, "gate_up0 .. down2")):
        with ops.trace() as program:
            x = ops.embed(ops.weight("embed", (VOCAB, HIDDEN)))
            x = mixture(x, num_experts, top_k=1, renormalize=True)
            ops.output(ops.gather_rows(x))
        line = str(program).splitlines()[-3]
        assert line == (
            f"%2: tokens x {HIDDEN} = moe(%0, %1, {experts}, "
            'kind="silu_and_mul", renormalize=1, top_k=1)'
        )


@pytest.mark.parametrize("name", OPS)
def test_op_by_op(name: str) -> None:
    with ops.trace() as program:
        x = OPS[name](ops.embed(ops.weight("embed", (VOCAB, HIDDEN))))
        ops.output(ops.gather_rows(x))
    random = np.random.default_rng(3)
    pair = Pair(program, "float32", block_size=16, seed=4)
    paged = PagedSequences(random_tokens(random, [40, 1, 90, 17]), NUM_BLOCKS, 16)
    for step in mixed_steps(paged, random):
        assert pair.error(step) < 1e-5


def random_spec(random: np.random.Generator) -> DecoderSpec:
    num_layers = int(random.integers(1, 4))
    num_kv_heads = int(random.integers(1, 4))
    num_heads = num_kv_heads * int(random.integers(1, 5))
    head_dim = 2 * int(random.integers(2, 20))
    windows = tuple(int(w) for w in random.choice([0, 5, 30], num_layers))

    def coin() -> bool:
        return bool(random.random() < 0.5)

    def one_of(values: Sequence[str]) -> str:
        return str(random.choice(values))

    def rotary() -> RotarySpec:
        dim = 2 * int(random.integers(1, head_dim // 2 + 1))
        return RotarySpec(dim=dim, style=one_of(["neox", "interleaved"]))

    def number(usual: float) -> float:
        return usual if coin() else float(random.uniform(0.5, 2))

    norm_place = one_of(DecoderSpec.NORM_PLACES)
    return DecoderSpec(
        vocab_size=VOCAB,
        hidden_size=int(random.integers(5, 90)),
        intermediate_size=int(random.integers(5, 150)),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        norm_eps=1e-5,
        max_position_embeddings=MAX_POSITION,
        rotary=rotary() if coin() else None,
        local_rotary=rotary() if coin() else None,
        alibi_slopes=alibi_slopes(num_heads) if coin() else (),
        learned_positions=MAX_POSITION + 2 if coin() else 0,
        position_offset=int(random.integers(0, 3)),
        norm_kind=one_of(DecoderSpec.NORM_KINDS),
        norm_weight=coin(),
        norm_bias=coin(),
        norm_place=norm_place,
        embed_norm=coin(),
        final_norm=coin(),
        qk_norm=one_of(DecoderSpec.QK_NORMS),
        residual=one_of(DecoderSpec.RESIDUALS) if norm_place == "pre" else "sequential",
        activation=one_of(DecoderSpec.ACTIVATIONS),
        gated_mlp=coin(),
        qkv_bias=coin(),
        o_bias=coin(),
        mlp_bias=coin(),
        lm_head_bias=coin(),
        tie_embeddings=coin(),
        embed_size=int(random.integers(5, 60)) if coin() else 0,
        embed_scale=number(1),
        residual_scale=number(1),
        logits_scale=number(1),
        logits_soft_cap=number(0),
        attention_soft_cap=number(0),
        attention_scales=tuple(random.uniform(0.1, 1, num_layers)) if coin() else (),
        qkv_clip=number(0),
        sliding_windows=windows if coin() else (),
        rotary_layers=tuple(coin() for _ in range(num_layers)) if coin() else (),
    )


@pytest.mark.parametrize("seed", range(12))
def test_random_models(seed: int) -> None:
    random = np.random.default_rng(seed)
    spec = random_spec(random)
    block_size = int(random.choice([16, 32]))
    pair = Pair(decoder(spec), "float32", block_size, seed)
    paged = PagedSequences(random_tokens(random, [70, 3, 33, 90]), NUM_BLOCKS, block_size, seed)
    for step in mixed_steps(paged, random):
        # Some have attention scores in the hundreds, whose rounding softmax amplifies: the CPU's
        # instruction sets are 6e-5 apart then.
        assert pair.error(step) < 2e-4, spec


def with_experts(spec: DecoderSpec, random: np.random.Generator) -> DecoderSpec:
    num_experts = int(random.integers(1, 10))
    layers = tuple(bool(x) for x in random.random(spec.num_layers) < 0.7)
    moe = MoeSpec(
        num_experts=num_experts,
        top_k=int(random.integers(1, num_experts + 1)),
        intermediate_size=int(random.integers(1, 80)),
        renormalize=bool(random.random() < 0.5),
        layers=layers if random.random() < 0.5 else (),
    )
    return dataclasses.replace(spec, moe=moe)


@pytest.mark.parametrize("seed", range(40, 48))
def test_random_mixtures(seed: int) -> None:
    random = np.random.default_rng(seed)
    spec = with_experts(random_spec(random), random)
    pair = Pair(decoder(spec), "float32", 16, seed)
    paged = PagedSequences(random_tokens(random, [70, 3, 33, 90]), NUM_BLOCKS, 16, seed)
    for step in mixed_steps(paged, random):
        assert pair.error(step) < 2e-4, spec


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("seed", range(20, 24))
def test_random_models_in_half_precision(seed: int, dtype: str) -> None:
    random = np.random.default_rng(seed)
    pair = Pair(decoder(random_spec(random)), dtype, 16, seed)
    paged = PagedSequences(random_tokens(random, [70, 3, 33, 90]), NUM_BLOCKS, 16, seed)
    for step in mixed_steps(paged, random):
        # An ulp of fp32 may move a key or a value to the next number of the cache's type.
        assert pair.error(step) < 3e-3


@pytest.mark.parametrize("seed", range(20, 24))
def test_random_models_with_activations_like_the_weights(seed: int) -> None:
    """Where the CPU multiplies bf16, activations are rounded to it in front of linear layers."""
    random = np.random.default_rng(seed)
    pair = Pair(decoder(random_spec(random)), "bfloat16", 16, seed, activations="quantized")
    paged = PagedSequences(random_tokens(random, [70, 3, 33, 90]), NUM_BLOCKS, 16, seed)
    for step in mixed_steps(paged, random):
        # 2 ** -9 a product, and attention scores in the hundreds.
        assert pair.error(step) < 1e-1


@pytest.mark.parametrize("seed", range(30, 33))
def test_random_models_with_an_int8_cache(seed: int) -> None:
    random = np.random.default_rng(seed)
    program = decoder(random_spec(random))
    pair = Pair(program, "float32", 16, seed, kv_cache_dtype="int8")
    exact = Pair(program, "float32", 16, seed).cpu
    steps = [
        mixed_steps(
            PagedSequences(
                random_tokens(np.random.default_rng(1), [70, 3, 33, 90]), NUM_BLOCKS, 16
            ),
            np.random.default_rng(2),
        )
        for _ in range(2)
    ]
    loss = []
    for step, same in zip(*steps, strict=True):
        assert pair.error(step) < 2e-2  # an ulp of fp32 may move a key to the next integer
        loss.append(relative_error(pair.cpu.forward_arrays(**step), exact.forward_arrays(**same)))
    assert 1e-6 < max(loss) < 2e-1


def test_rows_do_not_depend_on_their_batch() -> None:
    """Bitwise: alone and among others, in one chunk and in several, sliced logits or not."""
    random = np.random.default_rng(7)
    program = decoder(random_spec(random))
    sequences = random_tokens(random, [50, 80, 9, 30])
    alone, together = (Pair(program, "bfloat16", 16, seed=1).cpu for _ in range(2))
    expected = [
        alone.forward_arrays(**PagedSequences([tokens], NUM_BLOCKS, 16).step({0: len(tokens)}))
        for tokens in sequences
    ]
    paged = PagedSequences(sequences, NUM_BLOCKS, 16, seed=5)
    found: list[list[np.ndarray]] = [[] for _ in sequences]
    for new in ({0: 7, 1: 1, 3: 30}, {0: 43, 2: 9, 1: 60}, {1: 19}):
        logits = together.forward_arrays(**paged.step(new))
        starts = np.cumsum([0, *new.values()])
        for row, begin, end in zip(new, starts, starts[1:], strict=False):
            found[row].append(logits[begin:end])
    for row, parts in enumerate(found):
        np.testing.assert_array_equal(np.concatenate(parts), expected[row])


def test_transfers_before_a_step() -> None:
    """Both executors: a sequence goes on in blocks that were away, copied and brought back."""
    random = np.random.default_rng(3)
    pair = Pair(decoder(random_spec(random)), "float32", 16, seed=2, num_host_kv_blocks=5)
    paged = PagedSequences(random_tokens(random, [40, 35]), NUM_BLOCKS - 6, 16)
    assert pair.error(paged.step({0: 30, 1: 30})) < 1e-5
    step = paged.step({0: 10, 1: 5})
    expected = pair.cpu.forward_arrays(**step)
    tables = step["block_tables"]
    free = np.arange(NUM_BLOCKS - 6, NUM_BLOCKS, dtype=np.int32)
    # Sequence 0 leaves for the host and comes back elsewhere; 1 is copied, twice, from and to
    # blocks that 0 has left.
    swap_outs = np.stack([tables[0], [4, 0, 2]], axis=1)
    block_copies = np.stack([[*tables[1], *tables[0]], [*tables[0], *free[:3]]], axis=1)
    swap_ins = np.stack([free[3:6], [4, 0, 2]], axis=1)
    for executor in (pair.cpu, pair.torch):
        executor.apply_transfers(swap_outs, block_copies, swap_ins)
    moved = np.stack([free[3:6], free[:3]])
    at = np.concatenate([np.arange(30, 40), np.arange(30, 35)])
    blocks = moved[np.repeat([0, 1], [10, 5]), at // 16]
    step |= {"block_tables": moved, "slot_mapping": (blocks * 16 + at % 16).astype(np.int32)}
    np.testing.assert_array_equal(pair.cpu.forward_arrays(**step), expected)
    assert pair.error(step) < 1e-5
    with pytest.raises(InvalidArgument, match="host cache's 5"):
        pair.cpu.apply_transfers(np.array([[0, 5]]), block_copies[:0], swap_ins[:0])


# ---- errors


def test_loading_errors() -> None:
    executor = CpuExecutor(small_program(), num_kv_blocks=2)
    with pytest.raises(InvalidArgument, match="no weight 'nonsense'"):
        executor.load_weight("nonsense", np.zeros(3, np.float32))
    with pytest.raises(InvalidArgument, match=r"'table' has shape \[6, 7\].*wants \[7, 6\]"):
        executor.load_weight("table", np.zeros((6, 7), np.float32))
    with pytest.raises(InvalidArgument, match="'norm' is int32"):
        executor.load_weight("norm", np.zeros(6, np.int32))
    executor.load_weight("norm", np.zeros(6, np.float32))
    with pytest.raises(InvalidArgument, match="'norm' is loaded twice"):
        executor.load_weight("norm", np.zeros(6, np.float32))
    with pytest.raises(InvalidArgument, match=r"5 weight\(s\) not loaded: cos_sin, head"):
        executor.finish_loading()


def test_configuration_errors() -> None:
    program = small_program()
    for options, words in (
        ({"num_kv_blocks": 0}, "num_kv_blocks is 0"),
        ({"num_kv_blocks": 2, "block_size": 24}, "block_size is 24: a multiple of 16"),
        ({"num_kv_blocks": 2, "num_host_kv_blocks": -1}, "num_host_kv_blocks is -1"),
        ({"num_kv_blocks": 2, "max_num_logits": 0}, "max_num_logits is 0"),
        ({"num_kv_blocks": 2, "weight_dtype": "int32"}, "weight_dtype is int32"),
        ({"num_kv_blocks": 2, "kv_cache_dtype": "float8"}, "unknown dtype 'float8'"),
    ):
        with pytest.raises(InvalidArgument, match=words):
            CpuExecutor(program, **options)


def test_a_cache_that_does_not_fit_is_refused() -> None:
    executor = CpuExecutor(small_program(), num_kv_blocks=2**31 - 1, block_size=16384)
    for buffer in small_program().buffers:
        if buffer.kind == "weight":
            executor.load_weight(buffer.name, np.zeros(buffer.shape, np.float32))
    with pytest.raises(ResourceExhausted, match=r"the KV cache needs \d+ MiB"):
        executor.finish_loading()


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("token_ids", [1, VOCAB], f"token_ids holds {VOCAB}"),
        ("positions", [0, MAX_POSITION], f"positions holds {MAX_POSITION}"),
        ("slot_mapping", [0, NUM_BLOCKS * 16], "slot_mapping holds"),
        ("query_start_loc", [0, 3], "query_start_loc must run from 0 to 2"),
        ("seq_lens", [1], "has 2 new tokens of 1"),
        ("seq_lens", [40], "needs 3 blocks, its block table has 1"),
        ("seq_lens", [2**31 - 1], "needs 134217728 blocks, its block table has 1"),
        ("block_tables", [[NUM_BLOCKS]], "block_tables holds"),
        ("logits_indices", [2], "logits_indices holds 2"),
        ("positions", [0], "positions has 1 entries, 2 needed"),
    ],
)
@pytest.mark.parametrize("positions", ["rotary", "learned"])
def test_batches_out_of_range_are_refused(
    field: str, value: list[Any], words: str, positions: str
) -> None:
    spec = dataclasses.replace(
        random_spec(np.random.default_rng(0)),
        rotary=RotarySpec(dim=4) if positions == "rotary" else None,
        learned_positions=MAX_POSITION + 2 if positions == "learned" else 0,
        position_offset=2,
    )
    executor = Pair(decoder(spec), "float32", 16, seed=0).cpu
    step = PagedSequences([[1, 2]], NUM_BLOCKS, 16).step({0: 2})
    with pytest.raises(InvalidArgument, match=words):
        executor.forward_arrays(**{**step, field: np.asarray(value, np.int32)})
    assert np.isfinite(executor.forward_arrays(**step)).all()


def test_profile_by_op_kind() -> None:
    executor = Pair(decoder(random_spec(np.random.default_rng(0))), "float32", 16, seed=0).cpu
    paged = PagedSequences([list(range(20))], NUM_BLOCKS, 16)
    executor.forward_arrays(**paged.step({0: 10}))
    assert set(executor.profile().values()) == {0.0}
    executor.set_profiling(True)
    executor.forward_arrays(**paged.step({0: 10}))
    profile = executor.profile()
    assert all(profile[op.kind] > 0 for op in executor.program.ops)


def test_a_weight_may_be_embedding_linear_and_rotary_table_at_once() -> None:
    values = np.random.default_rng(0).standard_normal((8, 4), np.float32)

    def logits(rotary_table: str) -> np.ndarray:
        with ops.trace() as program:
            table = ops.weight("table", (8, 4))
            cos_sin = table if rotary_table == "table" else ops.weight(rotary_table, (8, 4))
            x = ops.rotary(ops.embed(table), cos_sin, head_dim=4)
            ops.output(ops.linear(ops.gather_rows(x), table))
        executor = CpuExecutor(program, num_kv_blocks=1, weight_dtype="float32")
        for name in {"table", rotary_table}:
            executor.load_weight(name, values)
        executor.finish_loading()
        return executor.forward_arrays(**PagedSequences([[1, 2]], 1, 16).step({0: 2}))

    np.testing.assert_array_equal(logits("table"), logits("copy"))
