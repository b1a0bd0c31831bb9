"""SamplingParams: vLLM's names and defaults, one-line errors that name the field, to_core()."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fastpage import _C
from fastpage.errors import InvalidArgument
from fastpage.sampling_params import SamplingParams

WRONG = [
    ({"temperature": -1}, "temperature must be >= 0, got -1"),
    ({"temperature": math.nan}, "temperature must be >= 0, got nan"),
    ({"temperature": math.inf}, "temperature must be finite, got inf"),
    ({"temperature": "hot"}, "temperature must be a number, got 'hot'"),
    ({"top_p": 0}, "top_p must be in (0, 1], got 0"),
    ({"top_p": 1.5}, "top_p must be in (0, 1], got 1.5"),
    ({"top_p": None}, "top_p must be a number, got None"),
    ({"top_k": -2}, "top_k must be >= 1, or 0 or -1 for all tokens, got -2"),
    ({"top_k": 1.5}, "top_k must be an integer, got 1.5"),
    ({"min_p": -0.1}, "min_p must be in [0, 1], got -0.1"),
    ({"n": 0}, "n must be between 1 and 1024, got 0"),
    ({"n": 10**9}, "n must be between 1 and 1024, got 1000000000"),
    ({"n": 10**10}, "n is out of range: 10000000000"),
    ({"n": True}, "n must be an integer, got True"),
    ({"repetition_penalty": 0}, "repetition_penalty must be > 0, got 0"),
    ({"presence_penalty": 2.1}, "presence_penalty must be in [-2, 2], got 2.1"),
    ({"frequency_penalty": -3}, "frequency_penalty must be in [-2, 2], got -3"),
    ({"max_tokens": 0}, "max_tokens must be >= 1, got 0"),
    ({"max_tokens": -1}, "max_tokens must be >= 1, got -1"),
    ({"min_tokens": -1}, "min_tokens must be >= 0, got -1"),
    ({"min_tokens": 17}, "min_tokens must be at most max_tokens (16), got 17"),
    ({"logprobs": -1}, "logprobs must be between 0 and 1024, got -1"),
    ({"logprobs": 1025}, "logprobs must be between 0 and 1024, got 1025"),
    ({"prompt_logprobs": -2}, "prompt_logprobs must be between 0 and 1024, got -2"),
    ({"seed": "a"}, "seed must be an integer, got 'a'"),
    ({"stop": 3}, "stop must be a list of strings, got 3"),
    ({"stop": [3]}, "stop must be a string or a list of strings, got 3"),
    ({"stop": ["a", ""]}, "stop must not contain an empty string"),
    ({"stop": [str(i) for i in range(1025)]}, "stop must have at most 1024 strings, got 1025"),
    ({"stop": ["a", "b" * 4096]}, "stop must have at most 4096 characters in all, got 4097"),
    (
        {"bad_words": [str(i) for i in range(16385)]},
        "bad_words must have at most 16384 strings, got 16385",
    ),
    ({"stop": "a", "detokenize": False}, "stop strings need detokenize=True"),
    ({"stop_token_ids": 3}, "stop_token_ids must be a list of token ids, got 3"),
    ({"stop_token_ids": ["x"]}, "stop_token_ids must be an integer, got 'x'"),
    (
        {"stop_token_ids": [-1]},
        "stop_token_ids: token id -1 is negative",
    ),
    ({"bad_words": [""]}, "bad_words must not contain an empty string"),
    ({"allowed_token_ids": []}, "allowed_token_ids must not be empty"),
    ({"logit_bias": [1]}, "logit_bias must be a dict, got [1]"),
    ({"logit_bias": {"x": 1}}, "logit_bias must map token ids, got 'x'"),
    ({"logit_bias": {1: math.inf}}, "logit_bias must be finite, got inf"),
    ({"logit_bias": {1: "x"}}, "logit_bias must be a number, got 'x'"),
    ({"ignore_eos": 1}, "ignore_eos must be True or False, got 1"),
    ({"detokenize": None}, "detokenize must be True or False, got None"),
    ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens must be >= 1 or -1, got 0"),
    ({"n": 3, "best_of": 2}, "best_of must be between n (3) and 1024, or 0 for n, got 2"),
    ({"best_of": -1}, "best_of must be between n (1) and 1024, or 0 for n, got -1"),
    ({"best_of": 1025}, "best_of must be between n (1) and 1024, or 0 for n, got 1025"),
    ({"best_of": "all"}, "best_of must be an integer, got 'all'"),
    (
        {"best_of": 2, "temperature": 0},
        "best_of=2 with temperature=0 draws the same output again and again: set temperature > 0, "
        "or best_of to 0",
    ),
    ({"beam_width": -1}, "beam_width must be between n and 64, or 0 for no beam search, got -1"),
    ({"beam_width": 65}, "beam_width must be between n and 64, or 0 for no beam search, got 65"),
    ({"beam_width": 2.0}, "beam_width must be an integer, got 2.0"),
    ({"beam_width": 2, "n": 3}, "n must be at most beam_width (2), got 3"),
    ({"beam_width": 2, "length_penalty": math.inf}, "length_penalty must be finite, got inf"),
    ({"beam_width": 2, "length_penalty": math.nan}, "length_penalty must be finite, got nan"),
    ({"beam_width": 2, "length_penalty": "x"}, "length_penalty must be a number, got 'x'"),
    (
        {"beam_width": 2, "early_stopping": "always"},
        "early_stopping must be False, True or 'never', got 'always'",
    ),
    (
        {"beam_width": 2, "early_stopping": 1},
        "early_stopping must be False, True or 'never', got 1",
    ),
    (
        {"beam_width": 24, "stop_token_ids": list(range(1001))},
        "number of stop_token_ids must be at most 1024 - beam_width (24), got 1001",
    ),
    (
        {"beam_width": 2, "stop": "end"},
        "stop does not go with beam search, which knows tokens only: use stop_token_ids",
    ),
    (
        {"length_penalty": 2},
        "length_penalty=2 needs beam search: set beam_width, or leave it at 1",
    ),
    (
        {"early_stopping": True},
        "early_stopping needs beam search: set beam_width, or leave it at False",
    ),
]

# With beam search: the field, what the message calls it, the remedy.
NOT_WITH_BEAM_SEARCH = [
    ({"best_of": 2}, "best_of=2", "leave it at 0"),
    ({"temperature": 0.5}, "temperature=0.5", "leave it at 1 or 0 (it is deterministic anyhow)"),
    ({"top_p": 0.5}, "top_p=0.5", "leave it at 1"),
    ({"top_k": 5}, "top_k=5", "leave it at 0"),
    ({"min_p": 0.1}, "min_p=0.1", "leave it at 0"),
    ({"repetition_penalty": 1.1}, "repetition_penalty=1.1", "leave it at 1"),
    ({"presence_penalty": 1}, "presence_penalty=1", "leave it at 0"),
    ({"frequency_penalty": 1}, "frequency_penalty=1", "leave it at 0"),
    ({"logit_bias": {1: 1.0}}, "logit_bias", "leave it empty"),
    ({"allowed_token_ids": [1, 2, 3]}, "allowed_token_ids", "leave it empty"),
    ({"logprobs": 0}, "logprobs=0", "leave it unset (each output has its score)"),
    ({"prompt_logprobs": 1}, "prompt_logprobs=1", "leave it unset"),
]


@pytest.mark.parametrize(("fields", "message"), WRONG)
def test_wrong_values(fields: dict, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        SamplingParams(**fields)
    assert str(caught.value) == message


@pytest.mark.parametrize(("fields", "name", "remedy"), NOT_WITH_BEAM_SEARCH)
def test_what_does_not_go_with_beam_search(fields: dict, name: str, remedy: str) -> None:
    SamplingParams(**fields)
    with pytest.raises(InvalidArgument) as caught:
        SamplingParams(beam_width=2, **fields)
    assert str(caught.value) == (
        f"{name} does not go with beam search: {remedy}, or set beam_width to 0"
    )


def test_bad_words_do_not_go_with_beam_search() -> None:
    params = SamplingParams(beam_width=2, bad_words=["cat"])
    with pytest.raises(InvalidArgument, match="bad_words does not go with beam search"):
        params.to_core(_Words())


def test_beam_search_within_the_vocabulary() -> None:
    core = SamplingParams(beam_width=8).to_core()
    core.validate(8)
    with pytest.raises(InvalidArgument, match="beam_width must be at most the vocabulary of 7"):
        core.validate(7)


@pytest.mark.parametrize("early_stopping", [False, True, "never"])
@pytest.mark.parametrize("temperature", [0, 1])
def test_beam_search_fields(early_stopping: object, temperature: float) -> None:
    params = SamplingParams(
        n=2,
        beam_width=4,
        length_penalty=-0.5,
        early_stopping=early_stopping,
        temperature=temperature,
        top_k=-1,
        min_tokens=3,
        stop_token_ids=[5],
    )
    core = params.to_core()
    assert (core.n, core.beam_width, core.length_penalty) == (2, 4, -0.5)
    assert core.early_stopping is early_stopping or core.early_stopping == "never"


def test_unknown_fields_are_named() -> None:
    with pytest.raises(TypeError, match="temprature"):
        SamplingParams(temprature=1.0)
    with pytest.raises(TypeError, match="no field 'temprature'"):
        _C.SamplingParams(temprature=1.0)


def test_defaults_are_vllms() -> None:
    params = SamplingParams()
    assert (params.n, params.temperature, params.top_p, params.top_k, params.min_p) == (
        (1, 1.0, 1.0, 0, 0.0)
    )
    assert (params.max_tokens, params.min_tokens, params.stop, params.stop_token_ids) == (
        (16, 0, [], [])
    )
    assert params.seed is None and params.logprobs is None and not params.ignore_eos
    core = params.to_core()
    default = _C.SamplingParams()
    fields = [name for name in dir(_C.SamplingParams) if isinstance(_attribute(name), property)]
    assert len(fields) == 22
    for name in fields:
        assert getattr(core, name) == getattr(default, name), name


def _attribute(name: str) -> object:
    return vars(_C.SamplingParams).get(name)


def test_to_core_carries_every_field() -> None:
    params = SamplingParams(
        n=2,
        best_of=2,
        temperature=0.5,
        top_p=0.25,
        top_k=np.int64(7),
        min_p=0.125,
        repetition_penalty=1.5,
        presence_penalty=-0.5,
        frequency_penalty=0.75,
        logit_bias={"3": 1.5},
        allowed_token_ids=(3, 4, 3),
        max_tokens=None,
        min_tokens=5,
        stop_token_ids=[9, 9],
        ignore_eos=True,
        seed=2**64 - 1,
        logprobs=True,
        prompt_logprobs=0,
        stop="end",
    )
    assert params.stop == ["end"]
    core = params.to_core()
    assert (core.n, core.best_of, core.temperature) == (2, 2, 0.5)
    assert (core.top_p, core.top_k) == (0.25, 7)
    assert (core.min_p, core.repetition_penalty) == (0.125, 1.5)
    assert (core.presence_penalty, core.frequency_penalty) == (-0.5, 0.75)
    assert core.logit_bias == {3: 1.5}
    assert core.allowed_token_ids == [3, 4]
    assert (core.max_tokens, core.min_tokens, core.stop_token_ids) == (-1, 5, [9])
    assert (core.ignore_eos, core.seed) == (True, 2**64 - 1)
    assert (core.logprobs, core.prompt_logprobs) == (1, 0)


def test_later_changes_are_checked_again() -> None:
    params = SamplingParams()
    params.temperature = -2.0
    with pytest.raises(InvalidArgument, match="temperature must be >= 0, got -2"):
        params.to_core()


def test_seed_minus_one_is_none() -> None:
    assert SamplingParams(seed=-1).to_core().seed is None


class _Words:
    """Encodes known texts; what is unknown has no tokens."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        assert add_special_tokens is False
        known = {"cat": [1], " cat": [2], "black cat": [3, 1], " black cat": [3, 2]}
        known |= {"odd": [4], " odd": [5, 6]}
        return known.get(text, [])


def test_bad_words_with_and_without_a_space() -> None:
    params = SamplingParams(bad_words=["cat", " black cat", "odd", "cat"])
    # The spaced form counts if it is another token of as many (vLLM).
    assert params.to_core(_Words()).bad_words == [[1], [2], [3, 1], [4]]
    with pytest.raises(InvalidArgument, match="bad_words need a tokenizer"):
        params.to_core()
    with pytest.raises(InvalidArgument, match="at least one token each, got 'unknown'"):
        SamplingParams(bad_words=["unknown"]).to_core(_Words())
