"""Sampling on the GPU (or its emulation): the tokens that the CPU's sampler draws."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from cuda_kernels import SCHEDULES, Kernels

from fastpage import _C

torch = pytest.importorskip("torch")


@pytest.fixture(scope="module")
def cuda() -> Kernels:
    return Kernels()


def draw(
    cuda: Kernels, logits: torch.Tensor, params: list[dict[str, Any]], position: int = 17
) -> tuple[list[int], list[int]]:
    """By the GPU and by the CPU; row i with seed i * 2^33 + 5."""
    rows, vocab = logits.shape
    seeds = [i * 2**33 + 5 for i in range(rows)]

    def floats(key: str, default: float) -> torch.Tensor:
        values = [p.get(key, default) for p in params]
        return torch.tensor(values, dtype=torch.float32, device=cuda.device)

    workspace = cuda.poisoned(2 * rows * vocab, dtype=torch.float32)
    out = cuda.poisoned(rows, dtype=torch.int32)
    on_device = logits.to(cuda.device)
    arguments = (
        floats("temperature", 1.0),
        cuda.ints([p.get("top_k", 0) for p in params]),
        floats("top_p", 1.0),
        floats("min_p", 0.0),
        cuda.ints(seeds, dtype=torch.int64),
        cuda.ints([position] * rows, dtype=torch.int64),
    )
    cuda.run(lambda: cuda.ops.sample(on_device, *arguments, workspace, out), out)
    tokens = [[1] * position] * rows
    want, _ = _C.sample_logits(
        logits.numpy(), [native(p) for p in params], tokens, [3] * rows, seeds
    )
    return out.tolist(), want.tolist()


def native(params: dict[str, Any]) -> Any:
    result = _C.SamplingParams()
    for key, value in params.items():
        setattr(result, key, value)
    return result


SETTINGS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.0},
    {"temperature": 0.3},
    {"temperature": 7.0},
    {"top_k": 1},
    {"top_k": 5},
    {"top_k": 500},
    {"top_k": 700},
    {"top_p": 0.9},
    {"top_p": 0.05},
    {"top_p": 0.999999},
    {"min_p": 0.1},
    {"min_p": 1.0},
    {"top_k": 50, "top_p": 0.9},
    {"top_k": 50, "top_p": 0.7, "min_p": 0.05, "temperature": 1.5},
    {"min_p": 0.02, "top_p": 0.5},
]


@pytest.mark.parametrize("vocab", [1, 31, 1024, 3001, 20011])
@pytest.mark.parametrize("scale", [0.1, 4.0])
def test_the_draws_of_the_cpu(cuda: Kernels, vocab: int, scale: float) -> None:
    logits = cuda.random(len(SETTINGS), vocab, dtype=torch.float32, seed=vocab, scale=scale).cpu()
    got, want = draw(cuda, logits, SETTINGS)
    assert got == want


@pytest.mark.parametrize("shared_memory", [26 << 10, 64 << 10])
def test_rows_longer_than_shared_memory(cuda: Kernels, shared_memory: int) -> None:
    logits = cuda.random(len(SETTINGS), 20011, dtype=torch.float32, seed=3, scale=2.0).cpu()
    with cuda.shared_memory(shared_memory):
        got, want = draw(cuda, logits, SETTINGS)
    assert got == want


def test_more_tokens_than_2_to_the_18(cuda: Kernels) -> None:
    settings = [{"top_p": 0.9}, {"top_k": 40, "top_p": 0.8}]
    logits = torch.zeros(2, (1 << 18) + 77)
    logits[1] = torch.randn(logits.shape[1], generator=torch.Generator().manual_seed(4))
    got, want = draw(cuda, logits, settings)
    assert got == want


@pytest.mark.parametrize("scale", [0.0, 0.1, 5.0])
def test_top_p_alone_reads_a_row_less_than_three_times(cuda: Kernels, scale: float) -> None:
    """Of 131,072 logits, on a device whose blocks have 227 KB of shared memory."""
    if cuda.is_gpu:
        pytest.skip("only the emulation counts")
    vocab = 1 << 17
    logits = cuda.random(1, vocab, dtype=torch.float32, seed=5, scale=scale)
    before = cuda.ops.bytes_loaded()
    got, want = draw(cuda, logits, [{"top_p": 0.9}])
    assert got == want
    rows_read = (cuda.ops.bytes_loaded() - before) / len(SCHEDULES) / (4 * vocab)
    # Where all are equal, the threshold's bin holds all: they are listed, and read again.
    assert rows_read < (6 if scale == 0 else 3)


def test_many_seeds(cuda: Kernels) -> None:
    logits = torch.randn(1, 300, generator=torch.Generator().manual_seed(1)).repeat(64, 1)
    got, want = draw(cuda, logits, [{"top_p": 0.95}] * 64)
    assert got == want
    assert len(set(got)) > 20


def test_ties_and_what_is_no_number(cuda: Kernels) -> None:
    inf, nan = float("inf"), float("nan")
    rows = [
        [-inf] * 40,
        [nan, -inf] * 20,
        [0.0, inf, 1.0, inf] * 10,
        [nan, 1.0, 2.0, -inf] * 10,
        [2.0] * 40,
        [-3e38, 1.0] * 20,
        [-1.0, -2.0, -1.0, -inf] * 10,
    ]
    settings = (
        {},
        {"temperature": 0.0},
        {"top_k": 3, "top_p": 0.9},
        {"min_p": 0.5},
        {"top_p": 0.5},
    )
    for setting in settings:
        got, want = draw(cuda, torch.tensor(rows), [setting] * len(rows))
        # Where nothing is possible, what to make of it is the caller's.
        assert got[:2] == [-1, -1]
        assert got[2:] == want[2:]


def test_processed_logits(cuda: Kernels) -> None:
    """Masks, bias and penalties: what the CPU draws, greedily, from a row after each."""
    rows, vocab, prompt = 5, 70, 4
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(rows, vocab, generator=generator)
    tokens = [torch.randint(0, vocab, (12 + i,), generator=generator).tolist() for i in range(rows)]
    repetition, frequency, presence = (
        [1.0, 1.3, 1.0, 2.0, 1.5],
        [0.0, 0.0, 0.5, -1.0, 0.0],
        [0.0, 0.2, 0.0, 0.3, 0.0],
    )
    bias = [{}, {3: 2.5, 69: -1.0}, {}, {5: 0.25}, {1: -float("inf")}]
    allowed = torch.rand(rows, vocab, generator=generator) < 0.7
    want = reference(logits, tokens, prompt, repetition, frequency, presence, bias, allowed)

    bits = np.packbits(
        np.pad(allowed.numpy(), ((0, 0), (0, -vocab % 32))), axis=1, bitorder="little"
    )
    starts = np.cumsum([0] + [len(t) for t in tokens])
    bias_starts = np.cumsum([0] + [len(b) for b in bias])
    counts = torch.zeros(rows, vocab, dtype=torch.int32, device=cuda.device)

    def floats(values: Any) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float32, device=cuda.device)

    arguments = {
        "allowed": torch.from_numpy(bits.view(np.int32).copy()).to(cuda.device),
        "bias_start": cuda.ints(bias_starts),
        "bias_ids": cuda.ints([t for b in bias for t in b]),
        "bias": floats([x for b in bias for x in b.values()]),
        "token_start": cuda.ints(starts),
        "tokens": cuda.ints([t for row in tokens for t in row]),
        "num_prompt_tokens": cuda.ints([prompt] * rows),
        "repetition_penalty": floats(repetition),
        "frequency_penalty": floats(frequency),
        "presence_penalty": floats(presence),
        "counts": counts,
    }
    got = logits.to(cuda.device)
    cuda.run(lambda: cuda.ops.process_logits(got, **arguments), got, counts)
    assert torch.equal(got.cpu(), want)
    assert not counts.any()


def reference(
    logits: torch.Tensor,
    tokens: list[list[int]],
    prompt: int,
    repetition: list[float],
    frequency: list[float],
    presence: list[float],
    bias: list[dict[int, float]],
    allowed: torch.Tensor,
) -> torch.Tensor:
    """In fp32, one operation after the other."""
    want = logits.masked_fill(~allowed, -float("inf")).numpy().copy()
    for i, row in enumerate(want):
        for token, value in bias[i].items():
            row[token] += np.float32(value)
        for token in set(tokens[i]):
            penalty = np.float32(repetition[i])
            row[token] = row[token] / penalty if row[token] > 0 else row[token] * penalty
        output = tokens[i][prompt:]
        for token in set(output):
            row[token] -= np.float32(frequency[i]) * np.float32(output.count(token))
            row[token] -= np.float32(presence[i])
    return torch.from_numpy(want)


@pytest.mark.parametrize("k", [0, 1, 5, 20])
@pytest.mark.parametrize("vocab", [20, 2500])
def test_logprobs(cuda: Kernels, k: int, vocab: int) -> None:
    rows = 4
    logits = cuda.random(rows, vocab, dtype=torch.float32, seed=k, scale=3).cpu()
    logits[1] = logits[1].round()  # ties
    logits[2, ::3] = -float("inf")
    logits[3, 1], logits[3, 2] = float("inf"), float("nan")
    params = [{"temperature": 0.0, "logprobs": k}] * rows
    chosen, entries = _C.sample_logits(
        logits.numpy(), [native(p) for p in params], [[1]] * rows, [1] * rows, [0] * rows
    )
    workspace = cuda.poisoned(2 * rows * vocab, dtype=torch.float32)
    ids = cuda.poisoned(rows, 1 + k, dtype=torch.int32)
    values = cuda.poisoned(rows, 1 + k, dtype=torch.float32)
    ranks = cuda.poisoned(rows, dtype=torch.int32)
    on_device, tokens = logits.to(cuda.device), cuda.ints(chosen)
    cuda.run(
        lambda: cuda.ops.logprobs(on_device, tokens, workspace, ids, values, ranks),
        ids,
        values,
        ranks,
    )
    for row, entry in enumerate(entries):
        assert entry is not None
        possible = np.asarray(entry.logprobs) > -float("inf")
        assert ranks[row] == entry.rank
        assert (
            ids[row].cpu().numpy()[possible].tolist()
            == np.asarray(entry.token_ids)[possible].tolist()
        )
        np.testing.assert_allclose(values[row].cpu().numpy(), entry.logprobs, rtol=1e-6, atol=1e-6)


def test_errors_name_the_argument(cuda: Kernels) -> None:
    logits = cuda.random(2, 8, dtype=torch.float32, seed=1)
    ids = cuda.ints([1, 2])
    with pytest.raises(ValueError, match="workspace has 3 elements, not 32"):
        ops_sample(cuda, logits, workspace=logits.flatten()[:3])
    with pytest.raises(ValueError, match="logits must be float32"):
        ops_sample(cuda, logits.half())
    with pytest.raises(ValueError, match="tokens is needed for token_start"):
        cuda.ops.process_logits(logits, token_start=cuda.ints([0, 0, 0]))
    with pytest.raises(ValueError, match="out_ids must be int32"):
        cuda.ops.logprobs(logits, ids, logits.flatten().repeat(2), logits, logits, ids)


def ops_sample(cuda: Kernels, logits: torch.Tensor, workspace: torch.Tensor | None = None) -> None:
    ones = torch.ones(2, device=cuda.device)
    longs = cuda.ints([0, 0], dtype=torch.int64)
    ids = cuda.ints([0, 0])
    space = torch.zeros(32, device=cuda.device) if workspace is None else workspace
    cuda.ops.sample(logits, ones, ids, ones, ones, longs, longs, space, ids)
