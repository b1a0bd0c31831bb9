"""The whole engine with a real model: transformers says the same, whatever the batch looks like."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from fastpage import _C, LLM, EngineArgs, SamplingParams
from fastpage.engine.loading import LoadedModel, load_model
from fastpage.engine.prompts import chat_prompt

NUM_OUTPUT_TOKENS = 64
# Of different lengths; some share a beginning, so that the prefix cache has something to find.
STORY = "Once upon a time, in a small village by the sea, far away from any city, there lived"
PROMPTS = [
    "The capital of France is",
    "The capital of France is Paris, and the capital of Germany is",
    "The capital of France is Paris, and the capital of Italy is Rome. The capital of Spain is",
    f"{STORY} an old fisherman who",
    f"{STORY} a young girl who",
    f"{STORY} a cat",
    "def fibonacci(n):\n    ",
    "import numpy as np\n\ndef softmax(x):\n    ",
    "Water boils at 100 degrees Celsius because",
    "1, 2, 3, 4, 5,",
    "Dear Sir or Madam,\n\nI am writing to",
    "Q: What is photosynthesis?\nA:",
    "Q: How do airplanes fly?\nA:",
    "In 1969, astronauts",
    "The best way to learn a new language is",
    "<html>\n<head>\n<title>",
    "A recipe for pancakes. Ingredients:",
    "Albert Einstein was born in",
    "The Moon orbits the Earth once every",
    "To be, or not to be, that is the question: whether it is nobler in the mind to suffer",
]
CHATS = [
    "Why is the sky blue?",
    "Write a haiku about rain.",
    "What is 17 times 23?",
    "Write a Python function that reverses a string.",
    "Suggest a name for a cat.",
]


Tokens = tuple[int, ...]


@pytest.fixture(scope="module")
def greedy_by_transformers(smollm2_hf: Any) -> Callable[[Sequence[Tokens], Sequence[Tokens]], Any]:
    """(prompts, outputs) -> what transformers would have chosen at each place of the outputs.

    If that is the outputs themselves, it is what its generate() gives: one forward pass tells as
    much as 64 steps, and costs a tenth of them.
    """
    import torch

    model = smollm2_hf.model

    @functools.cache
    def choose(prompts: tuple[Tokens, ...], outputs: tuple[Tokens, ...]) -> list[Tokens]:
        rows = [prompt + output for prompt, output in zip(prompts, outputs, strict=True)]
        longest = max(map(len, rows))
        input_ids = torch.tensor([row + (0,) * (longest - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
        chosen = []
        with torch.inference_mode():
            hidden = model.model(input_ids, attention_mask=mask).last_hidden_state
            for i, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
                logits = model.lm_head(hidden[i, len(prompt) - 1 : len(row) - 1])
                # The output is as long as was asked for: no end before that.
                logits[:, model.config.eos_token_id] = -torch.inf
                chosen.append(tuple(logits.argmax(-1).tolist()))
        return chosen

    return lambda prompts, outputs: choose(tuple(prompts), tuple(outputs))


@pytest.fixture(scope="module")
def float32_model(smollm2_gguf: Path) -> LoadedModel:
    """With room for about eight of PROMPTS at full length."""
    return load_model(
        EngineArgs(
            model=str(smollm2_gguf),
            dtype="float32",
            max_model_len=128,
            num_kv_blocks=56,
            max_num_seqs=len(PROMPTS) + len(CHATS),
            max_num_batched_tokens=512,
        )
    )


@pytest.mark.parametrize("enable_prefix_caching", [True, False])
@pytest.mark.parametrize("chunk", [16, 512])
def test_greedy_equals_transformers(
    float32_model: LoadedModel,
    greedy_by_transformers: Callable[[Sequence[Tokens], Sequence[Tokens]], Any],
    chunk: int,
    enable_prefix_caching: bool,
) -> None:
    info = float32_model.info
    scheduler = _C.SchedulerConfig(
        num_blocks=info.num_kv_blocks,
        block_size=info.block_size,
        max_num_seqs=min(info.max_num_seqs, chunk),
        max_num_batched_tokens=chunk,
        max_model_len=info.max_model_len,
        enable_prefix_caching=enable_prefix_caching,
        eos_token_ids=info.eos_token_ids,
    )
    config = _C.EngineConfig(scheduler=scheduler, vocab_size=info.vocab_size)
    engine = _C.Engine(config, float32_model.runner)
    params = _C.SamplingParams(
        temperature=0.0, min_tokens=NUM_OUTPUT_TOKENS, max_tokens=NUM_OUTPUT_TOKENS
    )
    tokenizer = float32_model.tokenizer
    prompts = [tuple(tokenizer.encode(prompt)) for prompt in PROMPTS]
    prompts += [
        tuple(chat_prompt([{"role": "user", "content": text}], tokenizer).token_ids)
        for text in CHATS
    ]
    rng = random.Random(chunk)
    waiting = list(range(len(prompts)))
    prompt_of: dict[int, int] = {}
    outputs: list[list[int]] = [[] for _ in prompts]
    while waiting or engine.has_unfinished():
        # A few arrive, then a few steps pass.
        for _ in range(rng.randrange(4)):
            if waiting:
                i = waiting.pop(0)
                prompt_of[engine.add_request(prompts[i], params)] = i
        for _ in range(rng.randrange(1, 6)):
            for output in engine.step().outputs:
                outputs[prompt_of[output.request_id]] += output.new_token_ids

    stats = engine.stats().scheduler
    assert stats.num_preemptions > 0
    assert (stats.prefix_cache_hits > 0) == enable_prefix_caching
    assert stats.num_free_blocks == stats.num_blocks
    engine.check_integrity()
    assert {len(output) for output in outputs} == {NUM_OUTPUT_TOKENS}
    assert [tuple(output) for output in outputs] == greedy_by_transformers(
        prompts, [tuple(output) for output in outputs]
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_seeded_request_is_the_same_alone_and_among_31_others(
    smollm2_gguf: Path, dtype: str
) -> None:
    llm = LLM(str(smollm2_gguf), dtype=dtype, max_model_len=256, num_kv_blocks=400)
    prompt = "Once upon a time, in a small village by the sea,"
    params = SamplingParams(temperature=1.0, seed=1234, max_tokens=32, logprobs=5, ignore_eos=True)
    alone = llm.generate(prompt, params, use_tqdm=False)[0].outputs[0]
    # Nothing to be found in the prefix cache: all is computed again, in another company.
    assert llm.reset_prefix_cache()

    prompts = [f"{text} {i}" for i in range(2) for text in PROMPTS][:31]
    others = [
        SamplingParams(temperature=0.5 + i / 20, top_k=i, seed=i, max_tokens=8 + i % 24)
        for i in range(31)
    ]
    outputs = llm.generate(
        [*prompts[:9], prompt, *prompts[9:]], [*others[:9], params, *others[9:]], use_tqdm=False
    )
    among = outputs[9].outputs[0]
    assert among.token_ids == alone.token_ids
    assert among.logprobs == alone.logprobs  # floats, compared exactly
    assert len(among.logprobs) == 32
