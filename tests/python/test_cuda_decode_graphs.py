"""Decode steps in recorded form: padded to a fixed size, over fixed buffers.

Without a GPU what would be captured is called again instead: everything but the capture is tested.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from cuda_kernels import Kernels
from paging import PagedSequences, relative_error
from test_cuda_executor import MAX_LEN, NUM_BLOCKS, TOKENS, new_executor

from fastpage.errors import InvalidArgument
from fastpage.executors.decode_graphs import default_sizes

torch = pytest.importorskip("torch")

SEQUENCES = [TOKENS[:37], TOKENS[20:70], TOKENS[60:90]]


@pytest.fixture(scope="module")
def cuda() -> Kernels:
    return Kernels(("random", True, 1))


def warm(executor: Any, graph_sizes: list[int]) -> Any:
    executor.warm_up(
        max_num_seqs=8,
        max_num_batched_tokens=16,
        max_model_len=MAX_LEN,
        graph_sizes=graph_sizes,
    )
    return executor


def caches(executor: Any) -> torch.Tensor:
    return torch.stack((executor._keys, executor._values)).cpu()


def prefilled(executor: Any) -> PagedSequences:
    paged = PagedSequences(SEQUENCES, NUM_BLOCKS, 16)
    executor.forward_arrays(**paged.step({0: 30, 1: 40, 2: 17}))
    return paged


def test_sizes() -> None:
    assert default_sizes(1) == [1]
    assert default_sizes(8) == [1, 2, 4, 8]
    assert default_sizes(9) == [1, 2, 4, 8, 9]
    assert default_sizes(100) == [1, 2, 4, 8, 16, 32, 64, 100]


def test_a_step_goes_to_the_next_larger_graph(
    cuda: Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    executor = warm(new_executor(cuda), [4, 1, 2, 1])
    assert executor.graph_sizes == [1, 2, 4]
    used: list[int] = []
    for size, graph in executor._graphs._graphs.items():
        run = graph.run
        monkeypatch.setattr(graph, "run", lambda *a, s=size, r=run: used.append(s) or r(*a))
    sequences = [TOKENS[i : i + 16] for i in range(5)]
    paged = PagedSequences(sequences, NUM_BLOCKS, 16)
    executor.forward_arrays(**paged.step(dict.fromkeys(range(5), 3)))
    for count in (1, 2, 3, 4, 5):
        executor.forward_arrays(**paged.step(dict.fromkeys(range(count), 1)))
    executor.forward_arrays(**paged.step({0: 1, 1: 2}))
    assert used == [1, 2, 4, 4]  # neither five sequences, nor two tokens of one


@pytest.mark.parametrize(
    ("sizes", "dtype"), [([3], "float16"), ([4], "float16"), ([8], "bfloat16"), ([8], "float32")]
)
def test_logits_are_those_of_the_step_as_it_is(cuda: Kernels, sizes: list[int], dtype: str) -> None:
    """To the bit where nothing is padded. Where there is, matrix products have other shapes.

    (On a GPU they may take another way within a graph.)
    """
    limit = {"float16": 5e-3, "bfloat16": 3e-2, "float32": 1e-5}[dtype]
    eager = warm(new_executor(cuda, dtype=dtype), [])
    graphed = warm(new_executor(cuda, dtype=dtype), sizes)
    assert eager.graph_sizes == []
    pages = [prefilled(executor) for executor in (eager, graphed)]
    # Logits of all sequences, of some, of none; sequences that end, and come back.
    for rows, wanted in (
        ((0, 1, 2), None),
        ((0, 2), None),
        ((2, 0), [1]),
        ((1,), None),
        ((2, 0), []),
        ((0, 2), None),
    ):
        want, got = (
            x.forward_arrays(**page.step(dict.fromkeys(rows, 1), wanted))
            for x, page in zip((eager, graphed), pages, strict=True)
        )
        assert got.shape == want.shape
        if len(rows) == sizes[0] and not cuda.is_gpu:
            assert np.array_equal(got, want)
        elif len(want):
            assert relative_error(got, want) < limit


def test_padding_writes_nothing(cuda: Kernels) -> None:
    executor = warm(new_executor(cuda), [8])
    paged = prefilled(executor)
    before = caches(executor)
    step = paged.step({0: 1, 2: 1})
    executor.forward_arrays(**step)
    changed = (caches(executor) != before).any(dim=(0, 1, 4, 5)).flatten()
    assert changed.nonzero().flatten().tolist() == sorted(step["slot_mapping"].tolist())


def test_warming_up_writes_nothing(cuda: Kernels) -> None:
    executor = new_executor(cuda)
    for cache in (executor._keys, executor._values):
        cache.fill_(0.5)
    warm(executor, [1, 4])
    assert (caches(executor) == 0.5).all()


def test_padding_is_read_by_nobody(cuda: Kernels) -> None:
    """What an earlier, larger step has left in the buffers shows nowhere."""
    graphed = warm(new_executor(cuda), [8])
    results = []
    for others in ([], [2, 1]):
        paged = prefilled(graphed)
        for other in others:
            graphed.forward_arrays(**paged.step(dict.fromkeys((0, other), 1)))
            paged.num_computed[0] -= 1
        results.append(graphed.forward_arrays(**paged.step({0: 1})))
    assert np.array_equal(*results)


def test_what_cannot_be_recorded(cuda: Kernels) -> None:
    with pytest.raises(InvalidArgument, match=r"sizes of CUDA graphs must be at least 1"):
        warm(new_executor(cuda), [4, 0])
