"""CudaExecutor(batch_invariant=True): logits, tokens and log probabilities are the same to the bit
whatever else is computed, and however a sequence is cut into steps."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from cuda_kernels import Kernels
from paging import PagedSequences
from test_cuda_executor import MAX_LEN, SPECS, TOKENS, VOCAB, new_executor
from test_cuda_experts import MOE

from fastpage import _C
from fastpage.engine.args import EngineArgs
from fastpage.errors import FastpageError, InvalidArgument
from fastpage.executors import cuda as cuda_executor
from fastpage.executors.cuda_runner import CudaRunner
from fastpage.executors.fixed_rows import NUM_ROWS, FixedRows

torch = pytest.importorskip("torch")

NUM_BLOCKS = 40


@pytest.fixture(scope="module")
def cuda() -> Kernels:
    return Kernels(("descending", True, 0))


@pytest.fixture(scope="module", autouse=True)
def fewer_rows(cuda: Kernels) -> Iterator[None]:
    """On the emulation, which takes long for many."""
    with pytest.MonkeyPatch.context() as patch:
        if not cuda.is_gpu:
            patch.setattr(cuda_executor, "FixedRows", functools.partial(FixedRows, num_rows=16))
        yield


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(torch.uint8).cpu()


# ---- matrix products


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_row_is_the_same_wherever_it_lies(
    cuda: Kernels, dtype: torch.dtype, has_bias: bool
) -> None:
    """Alone, in batches, at every place among NUM_ROWS; in a graph, too."""
    shapes = [(96, 50), (64, 384)]
    if cuda.is_gpu:  # layers of Llama 3 8B, with a vocabulary that is odd
        shapes += [(4096, 6144), (4096, 4096), (4096, 28672), (14336, 4096), (4096, 50257)]
    for cols, out_cols in shapes:
        draw = functools.partial(cuda.random, dtype=dtype, scale=cols**-0.5)
        x, weight = draw(2 * NUM_ROWS + 3, cols, seed=1), draw(out_cols, cols, seed=2)
        bias = draw(out_cols, seed=3) if has_bias else None
        linear = functools.partial(FixedRows().linear, weight=weight, bias=bias)
        whole = bits(linear(x))
        want = torch.nn.functional.linear(x.double(), weight.double()).to(dtype)
        got = linear(x) - (0 if bias is None else bias)
        assert (got - want).abs().max() < {torch.float32: 1e-4}.get(dtype, 5e-2) * want.abs().max()
        for row in (0, 1, NUM_ROWS - 1, NUM_ROWS, len(x) - 1):
            assert torch.equal(bits(linear(x[row : row + 1]))[0], whole[row]), row
        for begin, end in ((5, 7), (1, NUM_ROWS + 1), (3, 2 * NUM_ROWS + 3)):
            assert torch.equal(bits(linear(x[begin:end])), whole[begin:end]), (begin, end)
        for place in range(NUM_ROWS):
            assert torch.equal(bits(linear(x[:NUM_ROWS].roll(place, 0))[place]), whole[0]), place
        # A part of something wider, as a merged projection is.
        wide = torch.cat((x, x), dim=1)[:, cols:]
        assert torch.equal(bits(linear(wide)), whole)
        assert torch.equal(bits(linear(wide[7:8]))[0], whole[7])
        if cuda.is_gpu:
            for rows in (slice(0, NUM_ROWS), slice(9, 10)):
                got = in_a_graph(functools.partial(linear, x[rows]))
                assert torch.equal(bits(got), whole[rows]), rows


def in_a_graph(launch: Any) -> torch.Tensor:
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        launch()
    with torch.cuda.graph(graph, stream=stream):
        out = launch()
    graph.replay()
    torch.cuda.synchronize()
    return out


def test_no_rows(cuda: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    """Most steps of a long prompt want no logits: their weights are not read."""
    linear, weight = FixedRows().linear, cuda.random(5, 8, dtype=torch.float16, seed=1)
    linear(weight, weight, None)  # is looked at
    monkeypatch.delattr(torch, "mm")
    assert linear(weight[:0], weight, None).shape == (0, 5)


def test_a_product_in_which_the_place_shows_is_refused(
    cuda: Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    mm = torch.mm

    def by_place(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
        mm(x, weight, out=out)
        out[70, 3] = torch.nextafter(out[70, 3], out.new_tensor(9.0))

    linear, (x, weight) = FixedRows().linear, torch.ones(2, 4, 8, device=cuda.device)
    monkeypatch.setattr(torch, "mm", by_place)
    for _ in range(2):  # it is not forgotten
        with pytest.raises(FastpageError, match=r"layer of \[4, 8\]: .* CUBLAS_WORKSPACE_CONFIG"):
            linear(x, weight, None)


# ---- logits

# In 16 bits the order within attention shows; that within the CPU's products only in float32.
VARIANTS: dict[str, dict[str, Any]] = {
    "llama": {"spec": SPECS["llama"]},
    "bfloat16": {"spec": SPECS["llama"], "dtype": "bfloat16"},
    "float32": {"spec": SPECS["llama"], "dtype": "float32"},
    "float8": {"spec": SPECS["llama"], "kv_cache_dtype": "float8_e4m3"},
    "windows-caps-qk-norm": {"spec": SPECS["windows-caps-qk-norm"]},
    "alibi-layer-norm": {"spec": SPECS["alibi-layer-norm"], "dtype": "bfloat16"},
    "experts": {"spec": MOE},
    "experts, other shares": {
        "spec": replace(MOE, moe=replace(MOE.moe, top_k=4, renormalize=False)),
        "dtype": "float32",
    },
}


def warm(executor: Any, graph_sizes: list[int]) -> Any:
    executor.warm_up(
        max_num_seqs=8,
        max_num_batched_tokens=160,
        max_model_len=MAX_LEN,
        graph_sizes=graph_sizes,
    )
    return executor


SEQUENCES = [TOKENS[:90], TOKENS[10:100], TOKENS[30:80], TOKENS[5:40]]
# How many tokens of which sequence a step computes: the first sequence as a whole, in chunks, and
# decoded; alone, beside others.
ALONE: list[dict[int, int]] = [{0: 90}]
CUTS: dict[str, list[dict[int, int]]] = {
    "chunks": [{0: 1}, {0: 17}, {0: 30}, {0: 1}, {0: 41}],
    "decoded": [{0: 70}, *[{0: 1}] * 20],
    "beside another": [{1: 40, 0: 90, 2: 20}],
    "decoded beside others": [
        {3: 30, 0: 50, 1: 70, 2: 1},
        *[{1: 1, 0: 1}] * 10,
        *[{2: 1, 0: 1, 3: 1, 1: 1}] * 5,
        {2: 9, 0: 1, 1: 5},
        {0: 2, 2: 30},
        *[{0: 1, 2: 1}] * 4,
        {0: 18},
    ],
}


def logits_of_first(executor: Any, steps: list[dict[int, int]], seed: int = 0) -> Any:
    paged = PagedSequences(SEQUENCES, NUM_BLOCKS, 16, seed)
    rows = []
    for new in steps:
        logits = executor.forward_arrays(**paged.step(new))
        begin = sum(list(new.values())[: list(new).index(0)])
        rows.append(logits[begin : begin + new[0]].copy())  # a graph's are valid for a step
    return np.concatenate(rows)


@pytest.mark.parametrize("name", VARIANTS)
def test_logits(cuda: Kernels, name: str) -> None:
    options = {"num_kv_blocks": NUM_BLOCKS, "batch_invariant": True} | VARIANTS[name]
    eager = warm(new_executor(cuda, **options), [])
    graphs = warm(new_executor(cuda, **options), [3, 8])
    assert graphs.graph_sizes == [NUM_ROWS if cuda.is_gpu else 16]  # as many as products have
    want = logits_of_first(eager, ALONE)
    assert want.shape == (90, VOCAB)
    for cut, steps in CUTS.items():
        for executor in (eager, graphs):
            got = logits_of_first(executor, steps, seed=1)
            assert np.array_equal(got.view(np.uint32), want.view(np.uint32)), cut


def test_logits_of_a_long_sequence(cuda: Kernels) -> None:
    """Whose keys and values are cut: steps before and behind that, in plans for other lengths."""
    length, cut = 530, 512
    spec = replace(SPECS["llama"], num_layers=1, max_position_embeddings=600)
    tokens = np.random.default_rng(2).integers(0, VOCAB, (2, length)).tolist()
    executor = new_executor(cuda, spec, num_kv_blocks=80, batch_invariant=True)

    def last_logits(steps: list[dict[int, int]]) -> Any:
        paged = PagedSequences(tokens, 80, 16)
        rows = [executor.forward_arrays(**paged.step(new))[: new[0]].copy() for new in steps]
        return np.concatenate(rows)[cut - 10 :]

    want = last_logits([{0: length}])
    executor.warm_up(
        max_num_seqs=2, max_num_batched_tokens=length, max_model_len=600, graph_sizes=[2]
    )
    for steps in (
        [{0: cut - 10}, *[{0: 1}] * 28],
        [{0: 300}, {0: cut - 300, 1: 400}, {0: 18, 1: 130}],
        [{0: cut - 5, 1: cut}, *[{0: 1, 1: 1}] * 10, {0: 13}],
    ):
        assert np.array_equal(last_logits(steps), want), steps


def test_without_the_mode_logits_differ(cuda: Kernels) -> None:
    """Or the test above says nothing."""
    executor = warm(new_executor(cuda, num_kv_blocks=NUM_BLOCKS), [])
    want = logits_of_first(executor, ALONE)
    for cut in ("decoded", "decoded beside others"):
        assert not np.array_equal(logits_of_first(executor, CUTS[cut]), want)


# ---- an engine

REQUESTS: list[tuple[list[int], dict[str, Any]]] = [
    (TOKENS[:11], {"temperature": 0.0, "logprobs": 2}),
    (TOKENS[1:50], {"seed": 1, "logprobs": 5, "prompt_logprobs": 1}),
    (TOKENS[20:45], {"seed": 2, "n": 2, "top_p": 0.9, "logprobs": 0}),
    (TOKENS[3:70], {"seed": 3, "top_k": 20, "repetition_penalty": 1.3, "logprobs": 1}),
    (TOKENS[:60], {"seed": 4, "min_p": 0.02, "logit_bias": {9: 2.0}, "logprobs": 3}),
]

Logprobs = list[tuple[list[int], list[float]]]
Sample = tuple[list[int], Logprobs, Logprobs]


class Engine:
    def __init__(
        self,
        cuda: Kernels,
        *,
        graph_sizes: tuple[int, ...] = (),
        steps: int = 1,
        num_blocks: int = NUM_BLOCKS,
        num_host_blocks: int = 0,
        dtype: str = "float16",
        **scheduler: Any,
    ) -> None:
        executor = new_executor(
            cuda,
            num_kv_blocks=num_blocks,
            num_host_kv_blocks=num_host_blocks,
            dtype=dtype,
            batch_invariant=True,
        )
        config = _C.EngineConfig(
            scheduler=_C.SchedulerConfig(
                num_blocks=num_blocks,
                num_host_blocks=num_host_blocks,
                block_size=16,
                max_num_seqs=8,
                max_model_len=MAX_LEN,
                **({"max_num_batched_tokens": 24} | scheduler),
            ),
            vocab_size=VOCAB,
            async_scheduling=steps == 2,
        )
        runner = CudaRunner(warm(executor, list(graph_sizes)), max_steps_in_flight=steps)
        self._engine = _C.Engine(config, runner)

    def serve(self, requests: list[tuple[list[int], dict[str, Any]]]) -> list[Sample]:
        """Of each sample the tokens, their log probabilities, and the prompt's."""
        samples: dict[tuple[int, int], Sample] = {}
        for prompt, options in requests:
            params = _C.SamplingParams(**({"max_tokens": 12, "ignore_eos": True} | options))
            request = self._engine.add_request(prompt, params)
            samples |= {(request, i): ([], [], []) for i in range(params.n)}
        while self._engine.has_unfinished():
            for output in self._engine.step().outputs:
                tokens, logprobs, prompt_logprobs = samples[output.request_id, output.index]
                tokens += output.new_token_ids
                logprobs += [(x.token_ids, x.logprobs) for x in output.logprobs]
                prompt_logprobs += [(x.token_ids, x.logprobs) for x in output.prompt_logprobs]
        return list(samples.values())

    @property
    def stats(self) -> Any:
        return self._engine.stats().scheduler


Alone = Callable[[str], list[Sample]]


@pytest.fixture(scope="module")
def alone(cuda: Kernels) -> Alone:
    """By type, one request after the other."""

    @functools.cache
    def serve(dtype: str) -> list[Sample]:
        engine = Engine(cuda, dtype=dtype, max_num_batched_tokens=128, enable_prefix_caching=False)
        return [sample for request in REQUESTS for sample in engine.serve([request])]

    return serve


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_num_batched_tokens": 128, "dtype": "float32"},
        {"max_num_batched_tokens": 9, "graph_sizes": (8,)},
        {"graph_sizes": (1, 2, 4, 8), "steps": 2, "dtype": "float32"},
        {"num_speculative_tokens": 3},
    ],
    ids=str,
)
def test_requests_together(cuda: Kernels, alone: Alone, options: dict[str, Any]) -> None:
    engine, want = Engine(cuda, **options), alone(options.get("dtype", "float16"))
    assert engine.serve(REQUESTS) == want
    # Prefixes of all, and again in another order: now they are found in the cache.
    found = engine.stats.prefix_cache_hits
    turned = engine.serve(REQUESTS[::-1])
    assert engine.stats.prefix_cache_hits > found + 100
    counts = [options.get("n", 1) for _, options in REQUESTS]
    ends = np.cumsum(counts)
    assert turned == [x for i in (4, 3, 2, 1, 0) for x in want[ends[i] - counts[i] : ends[i]]]


@pytest.mark.parametrize("num_host_blocks", [0, 12])
@pytest.mark.parametrize(("steps", "dtype"), [(1, "float32"), (2, "float16")])
def test_requests_that_are_preempted(
    cuda: Kernels, alone: Alone, num_host_blocks: int, steps: int, dtype: str
) -> None:
    engine = Engine(
        cuda,
        steps=steps,
        graph_sizes=(4,),
        num_blocks=9,
        num_host_blocks=num_host_blocks,
        swap_cost_per_block=0.1,
        dtype=dtype,
    )
    for _ in range(2):
        assert engine.serve(REQUESTS) == alone(dtype)
    assert engine.stats.num_preemptions > 0
    assert (engine.stats.num_blocks_swapped_in > 0) == (num_host_blocks > 0)


# ---- the option


def test_who_has_the_option() -> None:
    for executor in ("cpu", "cuda"):
        assert EngineArgs(model="x", executor=executor, batch_invariant=True).batch_invariant
    with pytest.raises(InvalidArgument, match="needs executor='cuda', or 'cpu'"):
        EngineArgs(model="x", executor="torch", batch_invariant=True)
    with pytest.raises(InvalidArgument, match="batch_invariant=1 is not True or False"):
        EngineArgs(model="x", executor="cuda", batch_invariant=1)  # type: ignore[arg-type]
