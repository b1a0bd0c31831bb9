"""DeviceSampler beside Sampler, on the batches of an engine: the same tokens, the same logprobs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from cuda_kernels import Kernels

from fastpage import _C
from fastpage.errors import InvalidArgument
from fastpage.executors import device_sampler
from fastpage.executors.device_sampler import DeviceSampler

torch = pytest.importorskip("torch")

VOCAB, MAX_LEN, EOS = 150, 64, 149


@pytest.fixture(scope="module")
def cuda() -> Kernels:
    return Kernels(("random", True, 3))


class BothSamplers(_C.ModelRunner):
    """Random logits, which both sample. The engine gets what the device's says."""

    def __init__(self, cuda: Kernels, make_logits: Any, dtype: torch.dtype, max_rows: int) -> None:
        super().__init__()
        self._cpu = _C.Sampler(VOCAB)
        self._device = torch.device(cuda.device)
        self._sampler = DeviceSampler(cuda.ops, VOCAB, self._device, max_rows)
        self._make_logits, self._dtype = make_logits, dtype
        self._random = np.random.default_rng(1)
        self._output: _C.ModelRunnerOutput | None = None
        self.num_logprobs = 0

    def execute(self, batch: _C.InputBatch) -> None:
        values = self._make_logits(self._random, batch.num_logits)
        logits = torch.from_numpy(values.astype(np.float32)).to(self._dtype)
        want = self._cpu.sample(logits.float().numpy(), batch)
        sampling = batch.sampling_arrays(VOCAB)
        before = logits.to(self._device, copy=True)
        on_device = before.clone()
        sampled = self._sampler.launch(on_device, sampling.arrays)
        assert torch.equal(on_device.view(torch.uint8), before.view(torch.uint8))
        got = sampled.wait(batch.step_id)
        assert got.step_id == batch.step_id
        assert not sampling.unsupported
        assert got.sampled_token_ids.tolist() == want.sampled_token_ids.tolist()
        assert sampled.tokens.tolist() == want.sampled_token_ids.tolist()
        self.compare(got.logprobs, want.logprobs)
        self.compare(got.prompt_logprobs, want.prompt_logprobs)
        self._output = got

    def compare(self, got: Any, want: Any) -> None:
        assert len(got) == len(want)
        for a, b in zip(got, want, strict=True):
            assert (a.token_ids, a.rank) == (b.token_ids, b.rank)
            np.testing.assert_allclose(a.logprobs, b.logprobs, rtol=1e-6, atol=1e-6)
            self.num_logprobs += len(a.logprobs)

    def wait(self, step_id: int) -> _C.ModelRunnerOutput:
        assert self._output is not None
        return self._output


def normal(random: np.random.Generator, rows: int) -> Any:
    return random.standard_normal((rows, VOCAB)) * 3


def degenerate(random: np.random.Generator, rows: int) -> Any:
    """Ties, and what is no number; some rows in which nothing is possible."""
    logits = np.round(random.standard_normal((rows, VOCAB)))  # -0 and 0 are equal
    kind = random.integers(0, 6, rows)
    logits[kind == 0, ::2] = -np.inf
    logits[kind == 1, 5] = np.inf
    logits[kind == 2] = np.nan
    logits[kind == 3, 2:] = -np.inf
    logits[kind == 4, 1:] = np.nan
    return logits


def run(cuda: Kernels, requests: list[dict[str, Any]], **options: Any) -> BothSamplers:
    settings = {"make_logits": normal, "dtype": torch.float32, "max_rows": 256}
    runner = BothSamplers(
        cuda, **(settings | {k: options.pop(k) for k in settings if k in options})
    )
    config = _C.EngineConfig(
        scheduler=_C.SchedulerConfig(
            num_blocks=64,
            block_size=16,
            max_num_seqs=16,
            max_num_batched_tokens=24,
            max_model_len=MAX_LEN,
            eos_token_ids=[EOS],
            **options,
        ),
        vocab_size=VOCAB,
        seed=5,
    )
    engine = _C.Engine(config, runner)
    prompt = np.random.default_rng(0).integers(0, VOCAB - 1, 40)
    for i, params in enumerate(requests):
        engine.add_request(prompt[: 6 + 2 * i], _C.SamplingParams(**({"max_tokens": 8} | params)))
    while engine.has_unfinished():
        engine.step()
    return runner


PLAIN: list[dict[str, Any]] = [
    {},
    {"temperature": 0.0},
    {"top_k": 5, "temperature": 0.4, "seed": 2**63 + 5},
    {"top_p": 0.7},
    {"min_p": 0.1},
    {"top_k": -1, "n": 3},
]
PROCESSED: list[dict[str, Any]] = [
    {"repetition_penalty": 1.3},
    {"frequency_penalty": 0.8, "temperature": 0.0},
    {"presence_penalty": -1.5, "n": 2},
    {"repetition_penalty": 0.7, "frequency_penalty": 0.3, "presence_penalty": 0.5},
    {"logit_bias": {3: 5.0, 7: -4.0}},
    {"allowed_token_ids": [1, 33, 70, 149], "ignore_eos": True},
    {"min_tokens": 4, "stop_token_ids": [1, 2, 3], "logit_bias": {2: 9.0, EOS: 40.0}},
    {"bad_words": [[5], [9, 10], [11]], "temperature": 0.0},
    # All that is allowed is forbidden: the most likely token of all.
    {"allowed_token_ids": [5, 6], "bad_words": [[5], [6]], "temperature": 0.0},
    {},
]
LOGPROBS: list[dict[str, Any]] = [
    {"logprobs": 0},
    {"logprobs": 5, "prompt_logprobs": 2},
    {"logprobs": 5, "repetition_penalty": 1.3, "n": 2},
    {"prompt_logprobs": 0},
    {"logprobs": 1000, "max_tokens": 2},
    {},
]


@pytest.mark.parametrize("requests", [PLAIN, PROCESSED, LOGPROBS, PLAIN + PROCESSED + LOGPROBS])
@pytest.mark.parametrize("max_rows", [256, 3])
def test_the_tokens_of_the_cpu(
    cuda: Kernels, requests: list[dict[str, Any]], max_rows: int
) -> None:
    runner = run(cuda, requests, max_rows=max_rows)
    assert (runner.num_logprobs > 0) == any("logprobs" in r for r in requests)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_of_16_bits(cuda: Kernels, dtype: torch.dtype) -> None:
    run(cuda, PLAIN + PROCESSED[:4] + LOGPROBS[1:3], dtype=dtype)


def test_ties_and_what_is_no_number(cuda: Kernels) -> None:
    run(cuda, PLAIN + PROCESSED + LOGPROBS, make_logits=degenerate)


def test_proposed_tokens_and_beams(cuda: Kernels) -> None:
    run(cuda, [{"temperature": 0.0, "repetition_penalty": 1.1}, {}], num_speculative_tokens=3)
    run(cuda, [{"beam_width": 3, "n": 2, "temperature": 0.0}, {}])


def test_the_vocabulary_of_gemma_3(cuda: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than 2^18 tokens; what is allowed or likelier for a bias is beyond them."""
    monkeypatch.setitem(globals(), "VOCAB", 262208)
    assert VOCAB <= device_sampler.MAX_VOCAB_SIZE
    last = [VOCAB - 2, VOCAB - 1]
    options: list[dict[str, Any]] = [
        {"top_k": 20, "logprobs": 2},
        {"repetition_penalty": 1.3, "logit_bias": dict.fromkeys(last, 12.0), "ignore_eos": True},
        {"allowed_token_ids": last, "ignore_eos": True},
    ]
    run(cuda, [{"max_tokens": 2} | each for each in options])


def test_the_largest_vocabulary(cuda: Kernels) -> None:
    """Is that of the kernel."""
    size = device_sampler.MAX_VOCAB_SIZE + 1
    with pytest.raises(InvalidArgument, match=f"between 1 and {size - 1} columns"):
        DeviceSampler(cuda.ops, size, torch.device(cuda.device)).warm_up(1)


def test_a_huge_vocabulary_takes_no_more_memory(
    cuda: Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = []
    workspace = DeviceSampler._workspace

    def counted(self: DeviceSampler, rows: int) -> torch.Tensor:
        taken.append(rows)
        return workspace(self, rows)

    monkeypatch.setattr(DeviceSampler, "_workspace", counted)
    for most, rows in ((3 * VOCAB - 1, 2), (VOCAB - 1, 1)):
        monkeypatch.setattr(device_sampler, "_MOST_LOGITS", most)
        taken.clear()
        run(cuda, PLAIN[:2] + PROCESSED[:2] + LOGPROBS[1:3])
        assert max(taken) == rows
