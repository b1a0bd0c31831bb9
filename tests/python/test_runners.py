"""The engine on a Program: ProgramRunner in C++ and TorchRunner in Python give the same tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fastpage import _C
from fastpage.models import DecoderSpec, RotarySpec, decoder
from fastpage.models.rotary import cos_sin_table

reference = pytest.importorskip("fastpage.executors.torch")
pytestmark = pytest.mark.usefixtures("one_torch_thread")

NUM_BLOCKS, VOCAB, MAX_LEN = 9, 67, 100

SPEC = DecoderSpec(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    norm_eps=1e-5,
    max_position_embeddings=MAX_LEN,
    rotary=RotarySpec(dim=8),
)


PROGRAM = decoder(SPEC)


def load(executor: Any) -> Any:
    random = np.random.default_rng(0)
    for buffer in PROGRAM.buffers:
        if buffer.kind != "weight":
            continue
        values = random.standard_normal(buffer.shape, np.float32)
        if buffer.name == "rotary.cos_sin":
            values = cos_sin_table(SPEC.rotary, MAX_LEN)
        executor.load_weight(buffer.name, values)
    executor.finish_loading()
    return executor


def make_runner(kind: str) -> _C.ModelRunner:
    if kind == "torch":
        return reference.TorchRunner(
            load(reference.TorchExecutor(PROGRAM, num_kv_blocks=NUM_BLOCKS))
        )
    options = {"weight_dtype": "float32", "kv_cache_dtype": "float32"}
    return _C.ProgramRunner(load(_C.CpuExecutor(PROGRAM, num_kv_blocks=NUM_BLOCKS, **options)))


def generate(kind: str) -> list[tuple[int, ...]]:
    """Greedy and seeded requests, more than the pool holds at once."""
    config = _C.EngineConfig(
        scheduler=_C.SchedulerConfig(
            num_blocks=NUM_BLOCKS,
            block_size=16,
            max_num_seqs=4,
            max_num_batched_tokens=24,
            max_model_len=MAX_LEN,
        ),
        vocab_size=VOCAB,
        seed=1,
    )
    engine = _C.Engine(config, make_runner(kind))
    random = np.random.default_rng(2)
    ids = []
    for i in range(6):
        prompt = random.integers(0, VOCAB, 10 + 8 * i).tolist()
        temperature = 0.0 if i % 2 == 0 else 0.8
        params = _C.SamplingParams(
            temperature=temperature, seed=i, max_tokens=30, ignore_eos=True, n=1
        )
        ids.append(engine.add_request(prompt, params))
    tokens: dict[int, list[int]] = {i: [] for i in ids}
    while engine.has_unfinished():
        for output in engine.step().outputs:
            tokens[output.request_id] += output.new_token_ids
    assert engine.stats().scheduler.num_free_blocks == NUM_BLOCKS
    assert engine.stats().scheduler.num_preemptions > 0
    return [tuple(tokens[i]) for i in ids]


def test_both_runners_give_the_same_tokens() -> None:
    tokens = generate("cpu")
    assert [len(t) for t in tokens] == [30] * 6
    assert len(set(tokens)) == 6
    assert generate("torch") == tokens
