"""transformers as the oracle of an architecture: tiny random checkpoints, their logits and tokens.

CASES = {"llama-tied": Case("Llama", {"tie_word_embeddings": True}), ...}
checkpoint = checkpoint_fixture(CASES)

def test_...(case, checkpoint):
    path, oracle = checkpoint(case)
    check_logits(path, oracle)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from paging import relative_error, run_in_chunks

from fastpage import _C
from fastpage.checkpoints import open_checkpoint
from fastpage.errors import FastpageError
from fastpage.models import Model, build_model

NUM_BLOCKS, BLOCK_SIZE = 12, 16
NUM_TOKENS = 75  # several blocks
CHUNKS = (1, 1, 17, 40, 15, 1)
TOLERANCE = 1e-5  # relative to the largest logit; tight enough to tell the two kinds of GELU

# Odd sizes on purpose: no multiples of a vector, a panel or a block.
SMALL = {
    "vocab_size": 131,
    "hidden_size": 54,
    "intermediate_size": 77,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
}


@dataclass(frozen=True)
class Case:
    """A tiny model of `family`, as transformers' {family}Config names it.

    model: transformers' class, {family}ForCausalLM unless given.
    """

    family: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    base: Mapping[str, Any] = field(default_factory=lambda: SMALL)
    model: str = ""

    def make(self, seed: int) -> Any:
        """transformers' model, in fp32 and eval mode. Every parameter is random: biases start at
        zero and norms at one, which would hide them."""
        import torch
        import transformers

        config = getattr(transformers, f"{self.family}Config")(**{**self.base, **self.changes})
        config._attn_implementation = "eager"
        config._experts_implementation = "eager"  # the others want widths of whole vectors
        torch.manual_seed(seed)
        model = getattr(transformers, self.model or f"{self.family}ForCausalLM")(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * (1.0 / parameter.shape[-1] ** 0.5))
        return model


MakeCheckpoint = Callable[[str], tuple[Path, Any]]


def checkpoint_fixture(cases: Mapping[str, Case]) -> Any:
    """A fixture that makes the checkpoint of a case, once: its directory, transformers' model. Its
    weights are a case's own, whichever tests run."""

    @pytest.fixture(scope="module")
    def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> MakeCheckpoint:
        made: dict[str, tuple[Path, Any]] = {}

        def make(case: str) -> tuple[Path, Any]:
            if case not in made:
                model = cases[case].make(seed=list(cases).index(case))
                path = tmp_path_factory.mktemp(case)
                model.save_pretrained(path)
                made[case] = path, model
            return made[case]

        return make

    return checkpoint


def make_executor(model: Model, executor_type: str, **options: str) -> Any:
    """executor_type: "cpu" or "torch". In fp32 throughout, unless `options` of a CpuExecutor say
    otherwise."""
    if executor_type == "torch":
        from fastpage.executors.torch import TorchExecutor

        return TorchExecutor(model.program, num_kv_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE)
    return _C.CpuExecutor(
        model.program,
        num_kv_blocks=NUM_BLOCKS,
        block_size=BLOCK_SIZE,
        max_num_tokens=NUM_TOKENS,
        max_num_logits=32,
        **{"weight_dtype": "float32", "kv_cache_dtype": "float32", **options},
    )


def load(path: Path, executor_type: str, **options: str) -> Any:
    checkpoint = open_checkpoint(path)
    model = build_model(checkpoint.config, checkpoint=checkpoint)
    executor = make_executor(model, executor_type, **options)
    model.load_weights(checkpoint, executor)
    return executor


def vocab_size(path: Path) -> int:
    return build_model(open_checkpoint(path).config).program.vocab_size


def random_tokens(vocab_size: int, count: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, vocab_size, count)


def check_logits(path: Path, oracle: Any) -> None:
    """Logits of every position, the prompt in one chunk and in several, by both executors."""
    import torch

    tokens = random_tokens(vocab_size(path), NUM_TOKENS)
    with torch.no_grad():
        expected = oracle(torch.from_numpy(tokens)[None]).logits[0].numpy()
    for executor_type in ("cpu", "torch"):
        for chunks in ((NUM_TOKENS,), CHUNKS):
            executor = load(path, executor_type)
            logits = run_in_chunks(executor, tokens, chunks, NUM_BLOCKS, BLOCK_SIZE)
            error = relative_error(logits, expected)
            assert error < TOLERANCE, f"{executor_type}, chunks {chunks}: {error:.2e}"


def check_less_precise(path: Path, options: Mapping[str, str]) -> None:
    """Logits with less precise weights, and a less precise cache if `options` name one: those of
    the rounded weights, keys and values, and with rounded activations not far from that."""
    tokens = random_tokens(vocab_size(path), NUM_TOKENS)

    def logits(executor: Any) -> np.ndarray:
        return run_in_chunks(executor, tokens, CHUNKS, NUM_BLOCKS, BLOCK_SIZE)

    def distance(a: np.ndarray, b: np.ndarray) -> float:
        """Over all logits. Of the worst one of thousands alone little can be foretold."""
        return float(np.linalg.norm(a - b))

    exact = logits(load(path, "cpu"))
    weights = {name: value for name, value in options.items() if name != "kv_cache_dtype"}
    expected = logits(_load_rounded(path, **weights))
    rounded = logits(load(path, "cpu", **weights, activations="float32"))
    error = relative_error(rounded, expected)
    assert error < TOLERANCE < relative_error(rounded, exact), f"{weights}: {error:.2e}"
    if weights != options:
        # A value next to the middle between two steps may go either way: few do.
        with_cache = logits(_load_rounded(path, **options))
        effect = distance(with_cache, expected)
        rounded = logits(load(path, "cpu", **options, activations="float32"))
        error = distance(rounded, with_cache)
        assert error < effect / 10, f"{options}: {error:.2e}, and the cache does {effect:.2e}"
    # Activations are cut into steps as fine as those of the weights: both cost about the same.
    cost = distance(logits(load(path, "cpu", **options)), rounded)
    of_weights = distance(rounded, exact)
    least = of_weights / 4 if "quantization" in options else 0  # bf16 is not rounded everywhere
    assert least <= cost < 2 * of_weights, f"{options}: {cost:.3g}, the weights' {of_weights:.3g}"


def _load_rounded(path: Path, quantization: str = "none", **options: str) -> Any:
    """A TorchExecutor with the weights and the cache as they are stored."""
    from fastpage.executors.torch import TorchExecutor

    pool = _C.ThreadPool(1)

    class Rounded(TorchExecutor):
        def load_weight(self, name: str, weight: Any, source_dtype: str | None = None) -> None:
            if quantization == "int8" and self._ids[name] in self._packed:
                packed = _C.ops.PackedWeight(weight, "int8", pool)
                weight = _C.ops.embed(pool, np.arange(len(weight)), packed)
            super().load_weight(name, weight, source_dtype)

    checkpoint = open_checkpoint(path)
    model = build_model(checkpoint.config, checkpoint=checkpoint)
    executor = Rounded(model.program, num_kv_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE, **options)
    model.load_weights(checkpoint, executor)
    return executor


def check_greedy(path: Path, oracle: Any, max_tokens: int = 64) -> None:
    """Greedy tokens of several prompts at once, in chunks, out of a pool too small for all of them,
    equal to what transformers picks position by position."""
    import torch

    prompts = [random_tokens(vocab_size(path), n, seed=n).tolist() for n in (1, 5, 17, 33, 50)]
    for prompt, generated in zip(prompts, generate(path, prompts, max_tokens), strict=True):
        assert len(generated) == max_tokens
        with torch.no_grad():
            logits = oracle(torch.tensor([prompt + generated])).logits[0, len(prompt) - 1 : -1]
        # A tie within rounding may go either way.
        gaps = logits.max(dim=-1).values - logits[range(max_tokens), generated]
        assert float(gaps.max()) <= TOLERANCE * float(logits.abs().max()), f"prompt {len(prompt)}"


def generate(path: Path, prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
    """Greedy tokens, by an engine that has to chunk the prompts and to preempt."""
    executor = load(path, "cpu")
    engine = _C.Engine(
        _C.EngineConfig(
            scheduler=_C.SchedulerConfig(
                num_blocks=NUM_BLOCKS,
                block_size=BLOCK_SIZE,
                max_num_seqs=4,
                max_num_batched_tokens=24,
                max_model_len=NUM_BLOCKS * BLOCK_SIZE,
            ),
            vocab_size=executor.program.vocab_size,
        ),
        _C.ProgramRunner(executor),
    )
    params = _C.SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    tokens: dict[int, list[int]] = {engine.add_request(p, params): [] for p in prompts}
    while engine.has_unfinished():
        for output in engine.step().outputs:
            tokens[output.request_id] += output.new_token_ids
    assert engine.stats().scheduler.num_preemptions > 0
    return list(tokens.values())


RUBBISH: tuple[Any, ...] = (
    *(None, "x", "", True, [], [1], {}, {"x": 1}),
    *(-1, 0, 1, 1.5, 1e-320, 1e308, float("nan"), 2**31 - 1, 10**30, 10**400),
)


def check_rubbish(config: Mapping[str, Any]) -> None:
    """Whatever is in one of its fields, the model is built, or the error is one line."""
    build_model(config)
    for tampered in _tampered(config):
        try:
            build_model(tampered, max_model_len=1).constants()
        except FastpageError as error:
            assert "\n" not in str(error)


def _tampered(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    for name, given in config.items():
        for value in RUBBISH:
            yield {**config, name: value}
        if isinstance(given, dict):
            for inner in _tampered(given):
                yield {**config, name: inner}
