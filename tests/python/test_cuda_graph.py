"""What only a GPU can show: kernels and whole steps inside a captured CUDA graph, kernels on a
stream of their own."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import paging
import pytest
from cuda_kernels import Kernels, relative_error
from test_cuda_attention import DECODE, Attention
from test_cuda_executor import MAX_LEN, NUM_BLOCKS, TOKENS, new_executor

from fastpage import _C

torch = pytest.importorskip("torch")

pytestmark = pytest.mark.skipif(
    not _C.cuda.is_available(), reason=_C.cuda.unavailable_reason() or "there is a GPU"
)


@pytest.fixture(scope="module")
def cuda() -> Kernels:
    return Kernels()


@pytest.mark.parametrize("batch_invariant", [False, True])
def test_a_graph_replays_with_new_lengths(cuda: Kernels, batch_invariant: bool) -> None:
    limits = {"max_num_seqs": 3, "max_num_tokens": 3, "max_seq_len": 4096}
    lens = [700, 1500, 40]
    case = replace(DECODE, seq_lens=[4096] * 3, fixed_grid=True, plan=limits)
    case = replace(case, batch_invariant=batch_invariant)
    attention = Attention(cuda, case)
    buffer = torch.zeros(attention.plan.plan_size, dtype=torch.int32, device="cuda")
    out = cuda.poisoned(3, case.heads * case.head_dim, dtype=case.dtype)
    graph = torch.cuda.CUDAGraph()

    def lay_out(seq_lens: list[int]) -> None:
        starts = torch.tensor([0, 1, 2, 3])
        attention.plan.plan(starts, torch.tensor(seq_lens), attention.plan_buffer)
        buffer.copy_(attention.plan_buffer)

    def launch() -> None:
        cuda.ops.paged_attention(
            attention.q,
            attention.k,
            attention.v,
            attention.block_tables,
            attention.plan,
            buffer,
            attention.workspace,
            attention.counters,
            out,
            scale=attention.scale,
        )

    lay_out(lens)
    launch()  # modules are loaded, limits of shared memory set
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        launch()
    for seq_lens in (lens, [1, 4000, 17], [3000, 2999, 3001]):
        lay_out(seq_lens)
        out.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        attention.case = replace(case, seq_lens=seq_lens)
        assert relative_error(out, attention.reference()) < 1e-2


def test_work_runs_on_the_current_stream(cuda: Kernels) -> None:
    """Behind a long wait on a stream of its own: nothing is written before that is over."""
    x = cuda.random(64, 4096, dtype=torch.bfloat16, seed=1)
    out = torch.empty_like(x)
    cuda.ops.activate(x, "relu", out)  # to load a kernel may wait for the whole device
    stream, awake = torch.cuda.Stream(), torch.cuda.Event()
    cycles = 200_000_000
    while True:
        out.zero_()
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(cycles)
            awake.record()
            cuda.ops.activate(x, "relu", out)
        is_written = bool(out.any())
        if not awake.query():
            break
        cycles *= 2  # this process was held up for longer than the wait took
    assert not is_written
    stream.synchronize()
    assert torch.equal(out, x.relu())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("sizes", [[3], [8], [1, 2, 4]])
def test_captured_decode_steps_beside_the_same_run_as_they_come(
    cuda: Kernels, dtype: str, sizes: list[int]
) -> None:
    """Between steps memory is filled with what shows if a graph reads what it does not own."""
    executors = [new_executor(cuda, dtype=dtype) for _ in range(2)]
    for executor, graph_sizes in zip(executors, ([], sizes), strict=True):
        executor.warm_up(
            max_num_seqs=8,
            max_num_batched_tokens=64,
            max_model_len=MAX_LEN,
            graph_sizes=graph_sizes,
        )
    graphs = executors[1]._graphs._graphs
    assert all(isinstance(g._replay.__self__, torch.cuda.CUDAGraph) for g in graphs.values())
    sequences = [TOKENS[:37], TOKENS[20:70], TOKENS[60:90]]
    pages = [paging.PagedSequences(sequences, NUM_BLOCKS, 16) for _ in executors]
    for step, new in enumerate(
        [{0: 20, 1: 30, 2: 9}, *[{0: 1, 1: 1, 2: 1}] * 6, {2: 1}, {1: 1, 0: 1}, {0: 1, 1: 1, 2: 1}]
    ):
        torch.cuda.empty_cache()
        poison = [torch.full((n,), float("nan"), device="cuda") for n in (64, 4096, 1 << 20)]
        del poison
        want, got = (
            executor.forward_arrays(**page.step(new))
            for executor, page in zip(executors, pages, strict=True)
        )
        assert paging.relative_error(got, want) < (5e-3 if dtype == "float16" else 3e-2), step


def test_replays_take_no_memory(cuda: Kernels) -> None:
    executor = new_executor(cuda)
    options = {"max_num_seqs": 4, "max_num_batched_tokens": 64, "max_model_len": MAX_LEN}
    executor.warm_up(**options, graph_sizes=[4])
    paged = paging.PagedSequences([TOKENS[:90]], NUM_BLOCKS, 16)
    executor.forward_arrays(**paged.step({0: 1}))
    before = torch.cuda.memory_allocated()
    logits = [executor.forward_arrays(**paged.step({0: 1})) for _ in range(80)]
    assert torch.cuda.memory_allocated() == before
    assert np.isfinite(logits).all()


def test_what_is_swapped_out_goes_beside_the_steps(cuda: Kernels) -> None:
    """A step is done while the stream of the swaps is still held up."""
    executor = new_executor(cuda, num_kv_blocks=6, num_host_kv_blocks=4)
    outs, none = np.array([[1, 3], [2, 0]], np.int32), np.zeros((0, 2), np.int32)
    paged = paging.PagedSequences([TOKENS[:90]], 6, 16)
    executor.apply_transfers(outs, none, none)  # to load a kernel may wait for the whole device
    executor.forward_arrays(**paged.step({0: 1}))
    before = executor._keys[:, [1, 2]].cpu()
    side, awake = executor._transfers._side._stream, torch.cuda.Event()
    for doubling in range(6):
        torch.cuda.synchronize()
        executor._host_keys.zero_()
        with torch.cuda.stream(side):
            torch.cuda._sleep(200_000_000 << doubling)
            awake.record()
        executor._keys[:, [1, 2]] = before.to("cuda")
        executor.apply_transfers(outs, none, none)
        executor._keys[:, [1, 2]] = 0
        executor.forward_arrays(**paged.step({0: 1}))
        if not awake.query():
            break
    else:
        pytest.fail("the steps wait for what is swapped out")
    torch.cuda.synchronize()
    assert torch.equal(executor._host_keys[:, [3, 0]], before)
