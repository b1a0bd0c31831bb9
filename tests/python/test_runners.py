"""The engine on a Program: ProgramRunner in C++ and TorchRunner in Python give the same tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from small_decoder import VOCAB, load_random_weights, small_spec

from fastpage import _C
from fastpage.models import decoder

reference = pytest.importorskip("fastpage.executors.torch")
pytestmark = pytest.mark.usefixtures("one_torch_thread")

NUM_BLOCKS, MAX_LEN = 9, 100

SPEC = small_spec(head_dim=8, max_model_len=MAX_LEN)
PROGRAM = decoder(SPEC)


def load(executor: Any) -> Any:
    return load_random_weights(executor, PROGRAM, SPEC)


def make_runner(kind: str, max_steps_in_flight: int, num_host_blocks: int) -> _C.ModelRunner:
    blocks = {"num_kv_blocks": NUM_BLOCKS, "num_host_kv_blocks": num_host_blocks}
    if kind == "torch":
        executor = load(reference.TorchExecutor(PROGRAM, **blocks))
        return reference.TorchRunner(executor, max_steps_in_flight=max_steps_in_flight)
    options = {"weight_dtype": "float32", "kv_cache_dtype": "float32"}
    return _C.ProgramRunner(load(_C.CpuExecutor(PROGRAM, **blocks, **options)), max_steps_in_flight)


def generate(
    kind: str, max_steps_in_flight: int = 1, num_host_blocks: int = 0, n: int = 1
) -> dict[tuple[int, int], list[int]]:
    """Greedy and seeded requests, more than the pool holds at once: tokens by (request, sample)."""
    runner = make_runner(kind, max_steps_in_flight, num_host_blocks)
    assert runner.max_steps_in_flight() == max_steps_in_flight
    config = _C.EngineConfig(
        scheduler=_C.SchedulerConfig(
            num_blocks=NUM_BLOCKS,
            num_host_blocks=num_host_blocks,
            block_size=16,
            max_num_seqs=4,
            max_num_batched_tokens=24,
            max_model_len=MAX_LEN,
        ),
        vocab_size=VOCAB,
        seed=1,
        async_scheduling=max_steps_in_flight == 2,
    )
    engine = _C.Engine(config, runner)
    random = np.random.default_rng(2)
    ids = []
    for i in range(6):
        prompt = random.integers(0, VOCAB, 10 + 8 * i).tolist()
        temperature = 0.0 if i % 2 == 0 else 0.8
        params = _C.SamplingParams(
            temperature=temperature, seed=i, max_tokens=30, ignore_eos=True, n=n
        )
        ids.append(engine.add_request(prompt, params))
    tokens: dict[tuple[int, int], list[int]] = {(i, j): [] for i in range(6) for j in range(n)}
    while engine.has_unfinished():
        for output in engine.step().outputs:
            tokens[ids.index(output.request_id), output.index] += output.new_token_ids
        engine.check_integrity()
    stats = engine.stats().scheduler
    assert stats.num_free_blocks == NUM_BLOCKS
    assert stats.num_preemptions > 0
    assert (stats.num_blocks_swapped_in > 0) == (num_host_blocks > 0)
    assert (stats.num_blocks_copied > 0) == (n > 1)
    assert [len(t) for t in tokens.values()] == [30] * 6 * n
    return tokens


@pytest.fixture(scope="module")
def expected() -> dict[tuple[int, int], list[int]]:
    tokens = generate("cpu")
    assert len({tuple(t) for t in tokens.values()}) == 6
    return tokens


def test_both_runners_give_the_same_tokens(expected: dict[tuple[int, int], list[int]]) -> None:
    assert generate("torch") == expected


@pytest.mark.parametrize("kind", ["cpu", "torch"])
@pytest.mark.parametrize("num_host_blocks", [0, 12])
@pytest.mark.parametrize("max_steps_in_flight", [1, 2])
def test_steps_in_flight_and_swaps_change_no_token(
    expected: dict[tuple[int, int], list[int]],
    kind: str,
    max_steps_in_flight: int,
    num_host_blocks: int,
) -> None:
    assert generate(kind, max_steps_in_flight, num_host_blocks) == expected


def test_samples_of_one_prompt(expected: dict[tuple[int, int], list[int]]) -> None:
    """Sample 0 is what the request is alone, in whatever blocks it writes."""
    one_by_one = generate("cpu", n=3)
    assert {key: t for key, t in one_by_one.items() if key[1] == 0} == expected
    assert len({tuple(t) for t in one_by_one.values()}) == 3 + 3 * 3
    assert generate("cpu", max_steps_in_flight=2, n=3) == one_by_one
    assert generate("torch", num_host_blocks=12, n=3) == one_by_one


def test_a_failing_step_leaves_the_runner_usable() -> None:
    """A step that the executor refuses, with another one behind it, and then the next request."""
    executor = load(
        _C.CpuExecutor(
            PROGRAM,
            num_kv_blocks=NUM_BLOCKS,
            max_num_tokens=8,
            weight_dtype="float32",
            kv_cache_dtype="float32",
        )
    )
    for max_steps_in_flight in (1, 2):
        config = _C.EngineConfig(
            scheduler=_C.SchedulerConfig(
                num_blocks=NUM_BLOCKS,
                block_size=16,
                max_num_seqs=4,
                max_num_batched_tokens=24,
                max_model_len=MAX_LEN,
            ),
            vocab_size=VOCAB,
            async_scheduling=max_steps_in_flight == 2,
        )
        engine = _C.Engine(config, _C.ProgramRunner(executor, max_steps_in_flight))
        params = _C.SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
        engine.add_request([1] * 60, params)
        reasons = []
        with pytest.raises(_C.InvalidArgument, match="exceeds max_num_tokens 8"):
            engine.step()
        engine.add_request([1] * 5, params)
        while engine.has_unfinished():
            reasons += [output.finish_reason for output in engine.step().outputs]
        assert reasons.count(_C.FinishReason.ABORT) == 1
        assert reasons[-1] == _C.FinishReason.LENGTH
        engine.check_integrity()
