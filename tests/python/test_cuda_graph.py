"""What only a GPU can show: kernels inside a captured CUDA graph, and on a stream of their own."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cuda_kernels import Kernels, relative_error
from test_cuda_attention import DECODE, Attention

from fastpage import _C

pytestmark = pytest.mark.skipif(
    not _C.cuda.is_available(), reason=_C.cuda.unavailable_reason() or "there is a GPU"
)


@pytest.fixture(scope="module")
def cuda() -> Kernels:
    return Kernels()


def test_a_graph_replays_with_new_lengths(cuda: Kernels) -> None:
    limits = {"max_num_seqs": 3, "max_num_tokens": 3, "max_seq_len": 4096}
    lens = [700, 1500, 40]
    case = replace(DECODE, seq_lens=[4096] * 3, fixed_grid=True, plan=limits)
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
    out.zero_()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        cuda.ops.activate(x, "relu", out)
    assert not stream.query()
    assert not out.any()
    stream.synchronize()
    assert torch.equal(out, x.relu())
