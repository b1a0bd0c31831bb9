"""Mixtures of experts on CudaExecutor: what does not wait for the device, beside the reference."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from cuda_kernels import Kernels, NoWaiting
from paging import PagedSequences, relative_error, run_in_chunks
from test_cuda_executor import MAX_LEN, NUM_BLOCKS, SPEC, TOKENS, load, new_executor

from fastpage.executors import experts as experts_module
from fastpage.executors.experts import Experts
from fastpage.executors.torch import TorchExecutor, activate
from fastpage.models import MoeSpec, decoder

torch = pytest.importorskip("torch")
functional = torch.nn.functional


@pytest.fixture(scope="module")
def cuda() -> Kernels:
    return Kernels()


@pytest.fixture
def few_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experts_module, "MOST_TOKENS_FOR_ALL", 12)


SILU = functools.partial(activate, kind="silu_and_mul")


def reference(
    x: torch.Tensor,
    logits: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    top_k: int,
    renormalize: bool,
) -> torch.Tensor:
    """Token by token, in float64, on the CPU."""
    x, gate_up, down = (t.double().cpu() for t in (x, gate_up, down))
    shares = logits.double().cpu().softmax(dim=1)
    y = torch.zeros_like(x)
    for row, probabilities in enumerate(shares.tolist()):
        # The lower id first on ties.
        order = sorted(range(len(down)), key=lambda e: (-probabilities[e], e))[:top_k]
        total = sum(probabilities[e] for e in order) if renormalize else 1.0
        for e in order:
            gate, up = functional.linear(x[row], gate_up[e]).chunk(2)
            part = functional.linear(functional.silu(gate) * up, down[e])
            y[row] += probabilities[e] / total * part
    return y


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("tokens", "count", "top_k", "way"),
    [
        (1, 8, 2, "_by_choice"),
        (3, 32, 3, "_by_choice"),
        (1, 6, 2, "_by_all"),
        (5, 8, 8, "_by_all"),
        (12, 8, 2, "_by_all"),
        (13, 8, 2, "_by_expert"),
        (40, 30, 1, "_by_expert"),
        (0, 4, 2, "_by_choice"),
    ],
)
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.usefixtures("few_for_all")
def test_every_way(
    cuda: Kernels,
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    tokens: int,
    count: int,
    top_k: int,
    way: str,
    renormalize: bool,
) -> None:
    hidden, intermediate = 24, 40
    x = cuda.random(tokens, hidden, dtype=dtype, seed=1)
    logits = cuda.random(tokens, count, dtype=dtype, seed=2, scale=2).round()  # ties
    gate_up = cuda.random(count, 2 * intermediate, hidden, dtype=dtype, seed=3, scale=0.3)
    down = cuda.random(count, hidden, intermediate, dtype=dtype, seed=4, scale=0.3)
    experts = Experts(gate_up, down, top_k=top_k, renormalize=renormalize, activate=SILU)
    taken: list[str] = []
    for name in ("_by_choice", "_by_all", "_by_expert"):
        real = getattr(experts, name)
        monkeypatch.setattr(experts, name, lambda *a, n=name, r=real: taken.append(n) or r(*a))
    got = experts.run(x, logits, may_wait=True)
    assert taken == [way]
    assert got.dtype == dtype and got.shape == x.shape
    want = reference(x, logits, gate_up, down, top_k, renormalize)
    limit = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}[dtype]
    assert float((got.double().cpu() - want).norm()) <= limit * float(want.norm())
    with NoWaiting(cuda):
        again = experts.run(x, logits, may_wait=False)
    assert float((again.double().cpu() - want).norm()) <= limit * float(want.norm())
    assert "_by_expert" not in taken[1:]


def test_what_was_not_asked_of_an_expert_does_not_show(cuda: Kernels) -> None:
    """One that overflows for what it was not chosen for; a row that is no number."""
    count, hidden = 6, 16
    x = cuda.random(4, hidden, dtype=torch.float16, seed=1)
    gate_up = cuda.random(count, 2 * hidden, hidden, dtype=torch.float16, seed=2)
    down = cuda.random(count, hidden, hidden, dtype=torch.float16, seed=3)
    gate_up[5] *= 6e4
    logits = torch.zeros(4, count, device=cuda.device)
    logits[:, 5] = -9
    x[3] = float("nan")  # as what is behind the last row of a padded step
    logits[3] = float("nan")
    experts = Experts(gate_up, down, top_k=2, renormalize=True, activate=SILU)
    got = experts.run(x, logits, may_wait=False)
    want = reference(x[:3], logits[:3], gate_up, down, 2, True)
    assert float((got[:3].double().cpu() - want).norm()) < 5e-3 * float(want.norm())


MOE = replace(SPEC, moe=MoeSpec(num_experts=8, top_k=2, intermediate_size=48))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.usefixtures("few_for_all")
def test_logits_are_those_of_torch(cuda: Kernels, dtype: str) -> None:
    whole = load(TorchExecutor(decoder(MOE), num_kv_blocks=NUM_BLOCKS), MOE)
    executor = new_executor(cuda, MOE, dtype=dtype)
    chunks = (1, 40, 1, 1, 8, 49)
    want, got = (run_in_chunks(each, TOKENS, chunks, NUM_BLOCKS, 16) for each in (whole, executor))
    limit = {"float16": 2e-2, "bfloat16": 0.3, "float32": 1e-5}[dtype]
    assert relative_error(got, want) < limit


def warm(executor: Any, graph_sizes: list[int]) -> Any:
    limits = {"max_num_seqs": 8, "max_num_batched_tokens": 24, "max_model_len": MAX_LEN}
    executor.warm_up(**limits, graph_sizes=graph_sizes)
    return executor


@pytest.mark.usefixtures("few_for_all")
def test_decode_steps_are_recorded(cuda: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    eager, graphed = (warm(new_executor(cuda, MOE), sizes) for sizes in ([], [1, 2, 16]))
    assert graphed.graph_sizes == [1, 2, 16]
    sequences = [TOKENS[:37], TOKENS[20:70], TOKENS[60:90]]
    pages = [PagedSequences(sequences, NUM_BLOCKS, 16) for _ in range(2)]
    for new in ({0: 15, 1: 20, 2: 9}, {0: 1}, {0: 1, 2: 1}, {0: 1, 1: 1, 2: 1}, {1: 1, 2: 1}):
        want, got = (
            each.forward_arrays(**page.step(new))
            for each, page in zip((eager, graphed), pages, strict=True)
        )
        assert relative_error(got, want) < 1e-2
        assert np.isfinite(got).all()
        # Nothing waits, not even in the graph for more tokens than all experts compute.
        monkeypatch.setattr(Experts, "_by_expert", lambda *_: pytest.fail("waits for the device"))
