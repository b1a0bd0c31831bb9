"""Engines on CudaRunner give the tokens that they give on TorchRunner, which samples on the CPU."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from cuda_kernels import Kernels, NoWaiting, multiply_row_by_row
from test_cuda_executor import MAX_LEN, TOKENS, VOCAB, new_executor

from fastpage import _C
from fastpage.executors import cuda_runner
from fastpage.executors.cuda_runner import CudaRunner
from fastpage.executors.decode_graphs import FutureTokens
from fastpage.executors.staging import Received
from fastpage.executors.torch import TorchRunner

NUM_BLOCKS, EOS = 40, 3

REQUESTS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"seed": 1, "n": 2},
    {"temperature": 0.0, "repetition_penalty": 1.4, "n": 1},
    {"seed": 2, "top_k": 20, "top_p": 0.9, "logprobs": 3},
    {"seed": 3, "frequency_penalty": 1.0, "bad_words": [[5], [6, 7]], "prompt_logprobs": 1},
    {"seed": 4, "min_tokens": 6, "logit_bias": {EOS: 4.0, 9: 1.0}, "ignore_eos": False},
    {"seed": 5, "min_p": 0.05, "allowed_token_ids": list(range(10, 40))},
]


@pytest.fixture(scope="module")
def cuda() -> Kernels:
    return Kernels(("descending", True, 0))


@pytest.fixture
def rows_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    multiply_row_by_row(monkeypatch)


Results = list[tuple[list[int], list[list[int]], list[float]]]


def generate(
    runner: _C.ModelRunner,
    *,
    requests: list[dict[str, Any]] = REQUESTS,
    num_blocks: int = NUM_BLOCKS,
    num_host_blocks: int = 0,
    **scheduler: Any,
) -> Results:
    """For each sample its tokens, the tokens that its log probabilities name, and those."""
    config = _C.EngineConfig(
        scheduler=_C.SchedulerConfig(
            num_blocks=num_blocks,
            num_host_blocks=num_host_blocks,
            block_size=16,
            max_num_seqs=8,
            max_num_batched_tokens=24,
            max_model_len=MAX_LEN,
            eos_token_ids=[EOS],
            **scheduler,
        ),
        vocab_size=VOCAB,
        async_scheduling=runner.max_steps_in_flight() == 2,
    )
    engine = _C.Engine(config, runner)
    samples: dict[tuple[int, int], tuple[list[int], list[list[int]], list[float]]] = {}
    for i, options in enumerate(requests):
        params = _C.SamplingParams(**({"max_tokens": 12, "ignore_eos": True} | options))
        request = engine.add_request(TOKENS[i : i + 11 + 7 * i], params)
        samples |= {(request, j): ([], [], []) for j in range(params.n)}
    while engine.has_unfinished():
        for output in engine.step().outputs:
            tokens, named, logprobs = samples[output.request_id, output.index]
            tokens += output.new_token_ids
            for entry in (*output.logprobs, *output.prompt_logprobs):
                named.append(entry.token_ids)
                logprobs += entry.logprobs
    engine.check_integrity()
    if num_host_blocks:
        assert engine.stats().scheduler.num_blocks_swapped_in > 0
    return list(samples.values())


def assert_same(got: Results, want: Results) -> None:
    assert [x[:2] for x in got] == [x[:2] for x in want]
    for (_, _, a), (_, _, b) in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def cuda_runner_of(
    cuda: Kernels, max_steps_in_flight: int = 1, graph_sizes: tuple[int, ...] = (), **options: Any
) -> CudaRunner:
    executor = new_executor(cuda, **({"num_kv_blocks": NUM_BLOCKS} | options))
    executor.warm_up(
        max_num_seqs=8,
        max_num_batched_tokens=24,
        max_model_len=MAX_LEN,
        graph_sizes=graph_sizes,
    )
    return CudaRunner(executor, max_steps_in_flight=max_steps_in_flight)


Expected = Callable[..., Results]


@pytest.fixture(scope="module")
def expected(cuda: Kernels) -> Expected:
    """By steps in flight and the scheduler's options, which decide what is computed together."""

    @functools.cache
    def generate_on_cpu(max_steps_in_flight: int, **options: Any) -> Results:
        executor = new_executor(
            cuda,
            num_kv_blocks=NUM_BLOCKS,
            num_host_kv_blocks=options.get("num_host_blocks", 0),
        )
        runner = TorchRunner(executor, max_steps_in_flight=max_steps_in_flight)
        return generate(runner, **options)

    return generate_on_cpu


@pytest.mark.usefixtures("rows_one_by_one")
@pytest.mark.parametrize(
    ("max_steps_in_flight", "graph_sizes"), [(1, ()), (1, (1, 2, 4, 8)), (2, ()), (2, (5,))]
)
def test_the_same_tokens(
    cuda: Kernels, expected: Expected, max_steps_in_flight: int, graph_sizes: tuple[int, ...]
) -> None:
    want = expected(max_steps_in_flight)
    assert len({tuple(tokens) for tokens, _, _ in want}) == 8
    runner = cuda_runner_of(cuda, max_steps_in_flight, graph_sizes)
    assert_same(generate(runner), want)
    assert not runner.fallbacks


@pytest.mark.usefixtures("rows_one_by_one")
def test_few_blocks_and_proposed_tokens(cuda: Kernels, expected: Expected) -> None:
    for steps, options in (
        (2, {"num_blocks": 9, "num_host_blocks": 12}),
        (1, {"num_speculative_tokens": 2}),
    ):
        runner = cuda_runner_of(cuda, steps, (8,), num_host_kv_blocks=12)
        assert_same(generate(runner, **options), expected(steps, **options))


class FallingBack(CudaRunner):
    """Every third row is the CPU's to sample, and what the device has of it is wrong."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        launch = self._sampler.launch

        def launch_wrongly(*args: Any) -> Any:
            sampled = launch(*args)
            sampled.tokens[::3] = 0
            return sampled

        self._sampler.launch = launch_wrongly  # type: ignore[method-assign]

    def rows_for_cpu(self, sampling: _C.SamplingArrays) -> dict[int, str]:
        return dict.fromkeys(range(0, len(sampling.arrays["top_k"]), 3), "every third")


@pytest.mark.usefixtures("rows_one_by_one")
@pytest.mark.parametrize("max_steps_in_flight", [1, 2])
def test_rows_that_the_device_cannot_sample(
    cuda: Kernels, max_steps_in_flight: int, caplog: pytest.LogCaptureFixture
) -> None:
    requests = [REQUESTS[i] for i in (0, 1, 3, 6)]  # for the others' sake steps wait anyhow
    executor = cuda_runner_of(cuda, 1, (8,))._executor
    want = generate(
        TorchRunner(executor, max_steps_in_flight=max_steps_in_flight), requests=requests
    )
    runner = FallingBack(executor, max_steps_in_flight=max_steps_in_flight)
    assert_same(generate(runner, requests=requests), want)
    assert runner.fallbacks["every third"] > 10
    assert [record.getMessage() for record in caplog.records] == [
        "sampled on the CPU, which the step waits for: every third"
    ]


# ---- nobody waits


@pytest.mark.usefixtures("rows_one_by_one")
def test_a_step_waits_for_nothing(cuda: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither forward pass nor sampling: the next step takes its tokens on the device."""
    requests = [REQUESTS[i] for i in (0, 1, 3, 5, 6)]
    want = generate(cuda_runner_of(cuda), requests=requests)
    runner = cuda_runner_of(cuda, 2, (8,))
    calls = {"future tokens": 0, "execute": 0}
    is_launching = False

    def count_write(self: FutureTokens, *args: Any, real: Any = FutureTokens.write) -> None:
        calls["future tokens"] += 1
        real(self, *args)

    def wait(self: Received, real: Any = Received.wait) -> Any:
        assert not is_launching
        return real(self)

    @contextlib.contextmanager
    def launching() -> Iterator[None]:
        nonlocal is_launching
        is_launching = True
        try:
            with NoWaiting(cuda):
                yield
        finally:
            is_launching = False

    def execute(batch: _C.InputBatch, real: Any = runner.execute) -> None:
        calls["execute"] += 1
        with launching():
            real(batch)

    monkeypatch.setattr(FutureTokens, "write", count_write)
    monkeypatch.setattr(Received, "wait", wait)
    monkeypatch.setattr(runner, "execute", execute)
    assert_same(generate(runner, requests=requests), want)
    assert calls["future tokens"] > calls["execute"] / 2


def test_tokens_that_the_cpu_has_to_know_are_waited_for(
    cuda: Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With penalties no token of the step before is taken from the device."""
    monkeypatch.setattr(FutureTokens, "write", lambda *_: pytest.fail("not known on the CPU"))
    runner = cuda_runner_of(cuda, 2)
    tokens = generate(runner, requests=[{"repetition_penalty": 1.2, "n": 2}])
    assert [len(x[0]) for x in tokens] == [12, 12]


# ---- failures


def test_a_step_that_fails_takes_only_its_requests(
    cuda: Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = cuda_runner_of(cuda, 2)
    want = generate(runner, requests=REQUESTS[:2])
    waits = 0

    def wait(self: Received, real: Any = Received.wait) -> Any:
        nonlocal waits
        waits += 1
        if waits == 3:
            raise RuntimeError("a CUDA error")
        return real(self)

    with monkeypatch.context() as patch:
        patch.setattr(cuda_runner.Received, "wait", wait)
        patch.setattr(Received, "wait", wait)
        with pytest.raises(RuntimeError, match="a CUDA error"):
            generate(runner, requests=REQUESTS[:2])
    assert_same(generate(runner, requests=REQUESTS[:2]), want)


def test_a_vocabulary_that_the_device_cannot_sample(
    cuda: Kernels, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    executor = new_executor(cuda)
    assert isinstance(cuda_runner.new_runner(executor, 1, 2, 8), CudaRunner)
    monkeypatch.setattr(cuda_runner, "MAX_VOCAB_SIZE", VOCAB - 1)
    runner = cuda_runner.new_runner(executor, 1, 2, 8)
    assert isinstance(runner, TorchRunner)
    assert runner.max_steps_in_flight() == 2
    assert f"the vocabulary has {VOCAB} tokens" in caplog.text


def test_steps_that_were_not_executed(cuda: Kernels) -> None:
    with pytest.raises(ValueError, match="wait for step 7"):
        cuda_runner_of(cuda).wait(7)
