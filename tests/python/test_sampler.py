"""The sampler against its definition in float64 (sampler_reference.py) and against transformers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import sampler_reference as reference

from fastpage import _C

Params = _C.SamplingParams
EOS = (3, 11)


def sample(
    logits: np.ndarray,
    params: Params | list[Params],
    seeds: list[int] | range,
    tokens: list[list[int]] | None = None,
    num_prompt_tokens: int = 0,
    num_threads: int = 1,
) -> tuple[np.ndarray, list[Any]]:
    """One row per seed; a single row of logits, or a single Params, is used for all."""
    rows = len(seeds)
    logits = np.broadcast_to(logits, (rows, logits.shape[-1]))
    return _C.sample_logits(
        np.ascontiguousarray(logits, np.float32),
        params if isinstance(params, list) else [params] * rows,
        tokens if tokens is not None else [[]] * rows,
        [num_prompt_tokens] * rows,
        seeds,
        EOS,
        num_threads,
    )


def random_params(rng: np.random.Generator, vocab: int) -> dict[str, Any]:
    """Each field is set with some probability, so that all combinations come up."""
    some = rng.integers(0, vocab, size=(4, 4))
    fields: dict[str, Any] = {
        "temperature": float(rng.choice([0.3, 0.8, 1.0, 2.0])),
        "top_p": float(rng.choice([0.05, 0.5, 0.9, 0.99])),
        "top_k": int(rng.integers(1, vocab + 5)),
        "min_p": float(rng.choice([0.001, 0.05, 0.3])),
        "repetition_penalty": float(rng.uniform(0.5, 2)),
        "presence_penalty": float(rng.uniform(-2, 2)),
        "frequency_penalty": float(rng.uniform(-2, 2)),
        "logit_bias": {int(t): float(rng.normal() * 5) for t in some[0]},
        "allowed_token_ids": rng.integers(0, vocab, size=max(4, vocab // 2)).tolist(),
        "bad_words": [[int(some[1][0])], some[2][:2].tolist(), some[3][:3].tolist()],
        "min_tokens": int(rng.integers(0, 12)),
        "stop_token_ids": [int(some[1][1])],
        "ignore_eos": True,
    }
    return {name: value for name, value in fields.items() if rng.random() < 0.4}


def random_tokens(rng: np.random.Generator, vocab: int, params: Params) -> list[int]:
    tokens = rng.integers(0, vocab, size=15).tolist()
    if params.bad_words and rng.random() < 0.7:
        prefix = params.bad_words[-1][:-1]
        tokens[len(tokens) - len(prefix) :] = prefix
    return tokens


@pytest.mark.parametrize("trial", range(120))
def test_random_combinations_of_parameters(trial: int) -> None:
    rng = np.random.default_rng(trial)
    vocab = int(rng.choice([12, 33, 200, 1025, 3000]))
    logits = (rng.normal(size=vocab) * rng.choice([1.0, 4.0])).astype(np.float32)
    if trial % 7 == 0:
        logits = np.round(logits)  # ties
    params = Params(**random_params(rng, vocab), max_tokens=64)
    tokens = random_tokens(rng, vocab, params)
    processed = reference.process(logits, params, tokens, 7, EOS)
    args = {"tokens": [tokens] * 40, "num_prompt_tokens": 7}

    greedy = Params(**{name: getattr(params, name) for name in FIELDS} | {"temperature": 0})
    best = np.sort(processed)[-2:]
    if best[1] - best[0] > 1e-5 or best[1] == best[0]:
        assert set(sample(logits, greedy, range(40), **args)[0]) == {int(np.argmax(processed))}

    kept, margin = reference.kept_logits(processed, params)
    if margin < 1e-5:
        return
    drawn, _ = sample(logits, params, range(40), **args)
    for seed, token in enumerate(drawn):
        expected, distance = reference.draw(kept, reference.philox_uniform(seed, len(tokens)))
        assert token == expected or distance < 1e-6


FIELDS = [name for name, value in vars(Params).items() if isinstance(value, property)]


@pytest.mark.parametrize(
    "fields",
    [
        {"top_k": 1},
        {"top_k": 5},
        {"top_k": 30},
        {"top_p": 0.001},
        {"top_p": 0.5},
        {"top_p": 0.97},
        {"min_p": 0.2},
        {"min_p": 0.99},
        {"top_k": 20, "top_p": 0.8, "min_p": 0.05},
    ],
)
def test_kept_tokens(fields: dict[str, Any]) -> None:
    """With a draw for each of many seeds, what is kept is what comes up."""
    logits = np.random.default_rng(5).normal(size=40).astype(np.float32)
    params = Params(**fields)
    kept, margin = reference.kept_logits(logits.astype(np.float64), params)
    assert margin > 1e-5
    drawn, _ = sample(logits, params, range(5000))
    assert set(drawn) == set(np.flatnonzero(kept > -np.inf))


@pytest.mark.parametrize("spread", [0.01, 1.0, 5.0])
@pytest.mark.parametrize("vocab", [49152, 50257])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"top_p": 0.9},
        {"top_p": 0.9999},
        {"top_k": 50},
        {"top_k": 20000, "temperature": 0.7},
        {"min_p": 0.02},
        {"top_k": 100, "top_p": 0.95, "temperature": 0.6},
    ],
)
def test_whole_vocabularies(fields: dict[str, Any], vocab: int, spread: float) -> None:
    logits = (np.random.default_rng(8).normal(size=vocab) * spread).astype(np.float32)
    params = Params(**fields)
    x = logits.astype(np.float64) / params.temperature
    if params.min_p > 0:
        x[x < x.max() + np.log(params.min_p)] = -np.inf
    if params.top_k > 0:
        x[x < np.sort(x)[-params.top_k]] = -np.inf
    order = np.argsort(-x)
    if params.top_p < 1:
        probs = np.exp(reference.log_softmax(x))[order]
        x[order[np.cumsum(probs) - probs >= params.top_p]] = -np.inf
    drawn, _ = sample(logits, params, range(30))
    for seed, token in enumerate(drawn):
        expected, distance = reference.draw(x, reference.philox_uniform(seed, 0))
        # A token or two at the border may fall on either side of it.
        assert token == expected or distance < 1e-5


@pytest.mark.parametrize("fields", [{}, {"temperature": 0.5}, {"top_k": 12}, {"top_p": 0.8}])
def test_frequencies_are_the_probabilities(fields: dict[str, Any]) -> None:
    rng = np.random.default_rng(3)
    logits = rng.normal(size=30).astype(np.float32)
    params = Params(**fields)
    kept, _ = reference.kept_logits(logits.astype(np.float64), params)
    probs = np.exp(reference.log_softmax(kept))
    num_draws = 40_000
    # Half of the draws differ in the seed, half in the position.
    by_seed, _ = sample(logits, params, [int(s) for s in rng.integers(0, 2**63, num_draws // 2)])
    rows = [[0] * (i % 100) for i in range(num_draws // 2)]
    by_position, _ = sample(logits, params, [i // 100 for i in range(num_draws // 2)], rows)
    for drawn in (by_seed, by_position):
        seen = np.bincount(drawn, minlength=30)
        expected = probs * len(drawn)
        assert seen[expected == 0].sum() == 0
        used = expected > 0
        chi_square = ((seen[used] - expected[used]) ** 2 / expected[used]).sum()
        freedom = used.sum() - 1
        assert chi_square < freedom + 4 * np.sqrt(2 * freedom)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("fields", [{}, {"logit_bias": {2: 30.0}, "repetition_penalty": 1.3}])
def test_logprobs_are_those_of_the_raw_logits(fields: dict[str, Any], temperature: float) -> None:
    rng = np.random.default_rng(2)
    for vocab in (5, 100, 49152):
        logits = (rng.normal(size=vocab) * 5).astype(np.float32)
        logits[1] = logits[0]
        params = Params(temperature=temperature, logprobs=5, **fields)
        [token], [entry] = sample(logits, params, [7], [[0, 4]])
        assert token == 2 or not fields
        expected = reference.log_softmax(logits)
        assert entry.rank == 1 + (logits > logits[token]).sum()
        order = np.lexsort((np.arange(vocab), -logits))[:5]
        assert entry.token_ids == [token, *order]
        np.testing.assert_allclose(entry.logprobs, expected[[token, *order]], atol=1e-5)


def test_more_logprobs_than_tokens() -> None:
    _, [entry] = sample(np.zeros(3, np.float32), Params(logprobs=20), [0])
    assert len(entry.token_ids) == 4


def test_sampler_of_a_scheduled_step() -> None:
    """Sampler fills in what a step asks for, prompt log probabilities too."""
    config = _C.SchedulerConfig(
        num_blocks=32, block_size=4, max_num_seqs=8, max_num_batched_tokens=64, max_model_len=64
    )
    scheduler = _C.Scheduler(config)
    scheduler.add_request([1, 2, 3], Params(temperature=0, prompt_logprobs=1), 1)
    scheduler.add_request([4, 5], Params(logprobs=2, top_k=7), 2)
    batch = _C.InputBatch()
    scheduler.prepare(scheduler.schedule(), batch)
    logits = np.random.default_rng(0).normal(size=(batch.num_logits, 100)).astype(np.float32)
    raw = logits.copy()
    out = _C.Sampler(100, num_threads=2).sample(logits, batch)
    assert out.step_id == batch.step_id
    assert out.sampled_token_ids[0] == raw[2].argmax()
    assert out.sampled_token_ids[1] == sample(raw[3], Params(top_k=7), [2], [[4, 5]])[0]
    assert [entry.token_ids[0] for entry in out.prompt_logprobs] == [2, 3]
    assert [entry.token_ids[1] for entry in out.prompt_logprobs] == list(raw[:2].argmax(1))
    assert len(out.logprobs[1].token_ids) == 3
    with pytest.raises(ValueError, match=r"logits must be of shape \[4, vocab_size\]"):
        _C.Sampler(100).sample(raw[:2].copy(), batch)
    with pytest.raises(ValueError, match="logits have 100 columns, the vocabulary has 99"):
        _C.Sampler(99).sample(raw, batch)


def test_logprobs_are_there_for_who_asks() -> None:
    logits = np.random.default_rng(2).normal(size=50).astype(np.float32)
    _, entries = sample(logits, [Params(), Params(logprobs=0), Params(logprobs=2)], [1, 2, 3])
    assert entries[0] is None
    assert [len(entry.token_ids) for entry in entries[1:]] == [1, 3]


def test_tied_logprobs_are_complete_and_in_order() -> None:
    logits = np.zeros(40, np.float32)
    logits[[4, 9]] = -np.inf
    _, [entry] = sample(logits, Params(temperature=0, logprobs=40), [0])
    assert entry.token_ids == [0, *(i for i in range(40) if i not in (4, 9)), 4, 9]
    assert entry.logprobs[-2:] == [-np.inf, -np.inf]
    assert entry.rank == 1


def bits(result: tuple[np.ndarray, list[Any]]) -> list[Any]:
    tokens, entries = result
    return [
        (int(token), entry and (entry.token_ids, entry.logprobs, entry.rank))
        for token, entry in zip(tokens, entries, strict=True)
    ]


def test_a_row_is_the_same_alone_and_among_others() -> None:
    rng = np.random.default_rng(4)
    vocab = 2000
    rows = 33
    logits = (rng.normal(size=(rows, vocab)) * 3).astype(np.float32)
    logits[5, :] = np.nan
    logits[6, ::3] = np.inf
    logits[7, :] = -np.inf
    fields = [random_params(rng, vocab) | {"max_tokens": 64} for _ in range(rows)]
    params = [Params(**f, logprobs=i % 4 - 1) for i, f in enumerate(fields)]
    tokens = [random_tokens(rng, vocab, p) for p in params]
    together = bits(sample(logits, params, range(rows), tokens, 7))
    assert bits(sample(logits, params, range(rows), tokens, 7, num_threads=2)) == together
    for i in range(rows):
        alone = sample(logits[i], [params[i]], [i], [tokens[i]], 7)
        assert bits(alone) == [together[i]]


def samples_of_one_prompt(
    fields: dict[str, Any], logits: np.ndarray, num_threads: int
) -> tuple[_C.InputBatch, _C.ModelRunnerOutput]:
    config = _C.SchedulerConfig(
        num_blocks=64, block_size=4, max_num_seqs=32, max_num_batched_tokens=64, max_model_len=64
    )
    scheduler = _C.Scheduler(config)
    scheduler.add_request([7, 8], Params(temperature=0), 0)
    scheduler.add_request([1, 2, 1, 3], Params(**fields), 5)
    scheduler.add_request([9], Params(temperature=0), 0)
    batch = _C.InputBatch()
    scheduler.prepare(scheduler.schedule(), batch)
    return batch, _C.Sampler(logits.shape[1], num_threads).sample(logits, batch)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"temperature": 0.0},
        {"top_k": 50, "top_p": 0.9},
        {"repetition_penalty": 1.4, "min_p": 0.01},
        {"temperature": 0.0, "logit_bias": {4: 30.0}},
        {"allowed_token_ids": [5, 6, 7, 8, 9, 10]},
        {"top_p": 0.8, "logprobs": 7},
    ],
)
@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_samples_that_share_a_row_of_logits(fields: dict[str, Any], num_threads: int) -> None:
    """Each is what it is alone, with a row of its own; the logits stay as they are."""
    rng = np.random.default_rng(6)
    logits = (rng.normal(size=(3, 1500)) * 2).astype(np.float32)
    logits.flags.writeable = False
    n = 13
    batch, out = samples_of_one_prompt(fields | {"n": n}, logits, num_threads)
    assert (batch.num_logits, batch.num_samples) == (3, n + 2)
    tokens = out.sampled_token_ids
    assert tokens[0] == logits[0].argmax() and tokens[-1] == logits[2].argmax()
    assert len(set(tokens[1:-1])) == 1 if fields.get("temperature") == 0 else len(set(tokens)) > 3
    for i in range(n):
        # Sample i's seed is the scheduler's affair: n = 1 + i rows have the same for the first i.
        _, alone = samples_of_one_prompt(fields | {"n": i + 1}, logits, 1)
        assert alone.sampled_token_ids[1 + i] == tokens[1 + i]
        if "logprobs" in fields:
            entry, expected = out.logprobs[1 + i], alone.logprobs[1 + i]
            assert entry.token_ids == expected.token_ids
            assert entry.logprobs == expected.logprobs and entry.rank == expected.rank
    reference_tokens, _ = sample(logits[1], Params(**fields), [5], [[1, 2, 1, 3]], 4)
    assert reference_tokens[0] == tokens[1], "sample 0 has the request's own seed"


@pytest.mark.parametrize("vocab", [300, 49152])
@pytest.mark.parametrize("k", [130, 192, 299, 1024])
def test_many_logprobs(vocab: int, k: int) -> None:
    """As beams ask for them: in order, the lower id first among equals."""
    rng = np.random.default_rng(k)
    for logits in (rng.normal(size=vocab) * 3, np.round(rng.normal(size=vocab) * 3)):
        logits = logits.astype(np.float32)
        _, [entry] = sample(logits, Params(temperature=0, logprobs=k), [0])
        order = np.lexsort((np.arange(vocab), -logits))[: min(k, vocab)]
        assert entry.token_ids == [order[0], *order]
        expected = reference.log_softmax(logits)[order]
        np.testing.assert_allclose(entry.logprobs[1:], expected, atol=1e-5)


def test_bad_words_do_not_count_the_prompt() -> None:
    logits = np.array([0.0, 1.0, 5.0], np.float32)
    params = Params(temperature=0, bad_words=[[1, 2]])
    assert sample(logits, params, [0], [[0, 1]], 2)[0] == 2
    assert sample(logits, params, [0], [[0, 1]], 1)[0] == 1


def test_logits_are_not_changed() -> None:
    logits = np.random.default_rng(1).normal(size=(2, 100)).astype(np.float32)
    before = logits.copy()
    _C.sample_logits(logits, [Params(top_p=0.5)] * 2, [[], []], [0, 0], [1, 2])
    assert (logits == before).all()


def test_wrong_arguments() -> None:
    logits = np.zeros((2, 10), np.float32)
    with pytest.raises(ValueError, match="one entry for each of the 2 rows"):
        _C.sample_logits(logits, [Params()], [[], []], [0, 0], [1, 2])
    with pytest.raises(ValueError, match="stop_token_ids: token id 10 is outside"):
        _C.sample_logits(logits, [Params(stop_token_ids=[10])] * 2, [[], []], [0, 0], [1, 2])
    with pytest.raises(ValueError, match="num_prompt_tokens must be between 0"):
        _C.sample_logits(logits, [Params()] * 2, [[], []], [1, 0], [1, 2])
    with pytest.raises(ValueError, match="logits must be of shape"):
        _C.sample_logits(logits[0], [Params()], [[]], [0], [1])


@pytest.mark.parametrize("seed", range(4))
def test_transformers_keeps_the_same_tokens(seed: int) -> None:
    torch = pytest.importorskip("torch")
    warpers = pytest.importorskip("transformers.generation.logits_process")
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=60).astype(np.float32)
    tokens = rng.integers(0, 60, size=20).tolist()
    cases = [
        ({"top_k": 7}, [warpers.TopKLogitsWarper(7)]),
        ({"top_p": 0.8}, [warpers.TopPLogitsWarper(0.8)]),
        ({"min_p": 0.1}, [warpers.MinPLogitsWarper(0.1)]),
        (
            {"repetition_penalty": 1.7, "top_k": 10, "top_p": 0.9},
            [
                warpers.RepetitionPenaltyLogitsProcessor(1.7),
                warpers.TopKLogitsWarper(10),
                warpers.TopPLogitsWarper(0.9),
            ],
        ),
    ]
    for fields, processors in cases:
        scores = torch.tensor(logits)[None]
        for processor in processors:
            scores = processor(torch.tensor([tokens]), scores)
        kept = np.flatnonzero(np.isfinite(scores[0].numpy()))
        drawn, _ = sample(logits, Params(**fields), range(8000), [tokens] * 8000)
        assert set(drawn) == set(kept), fields
