"""Sampling parameters over HTTP, in the words of OpenAI and of vLLM."""

from __future__ import annotations

from typing import Any

import openai
import pytest
from openai_harness import Client, collect, run, texts_of

# What is asked for -> text, finish_reason, stop_reason of what follows "abc".
SAMPLING = [
    ({"stop": "fg"}, "de", "stop", "fg"),
    ({"stop": ["xx", "f"]}, "de", "stop", "f"),
    ({"stop": "fg", "include_stop_str_in_output": True}, "defg", "stop", "fg"),
    ({"stop_token_ids": [6]}, "def", "stop", 6),
    ({"logit_bias": {"25": 100}, "max_tokens": 2}, "zz", "length", None),
    ({"allowed_token_ids": [7]}, "hhhhh", "length", None),
    ({"bad_words": ["d"], "max_tokens": 1}, "a", "length", None),
    ({"temperature": 5.0, "top_k": 1}, "defgh", "length", None),
    ({"temperature": 5.0, "top_p": 0.01}, "defgh", "length", None),
    ({"temperature": 5.0, "min_p": 1.0}, "defgh", "length", None),
    ({"truncate_prompt_tokens": 1, "prompt": "xya", "max_tokens": 2}, "bc", "length", None),
    # "b" would come after "a", with a logit of 10; "z" is next.
    (
        {"repetition_penalty": 100.0, "prompt": "ba", "max_tokens": 1, "logit_bias": {"25": 1}},
        "z",
        "length",
        None,
    ),
    ({"presence_penalty": 2.0, "logit_bias": {"25": 10.5}}, "zabcd", "length", None),
    ({"frequency_penalty": 2.0, "logit_bias": {"25": 10.5}}, "zabcd", "length", None),
    ({"prompt": ".", "max_tokens": 5}, "", "stop", None),
    ({"prompt": ".", "skip_special_tokens": False}, "", "stop", None),
    (
        {
            "prompt": ".",
            "skip_special_tokens": False,
            "include_stop_str_in_output": True,
            "spaces_between_special_tokens": False,
        },
        "<end>",
        "stop",
        None,
    ),
    ({"add_special_tokens": False}, "defgh", "length", None),
    ({"user": "u", "metadata": {"a": "b"}, "store": False}, "defgh", "length", None),
    ({"response_format": {"type": "text"}}, "defgh", "length", None),
    ({"best_of": 1, "n": 1, "seed": 7, "priority": 0}, "defgh", "length", None),
]


@pytest.mark.parametrize(("options", "text", "finish", "stop"), SAMPLING)
def test_sampling_parameters(options: Any, text: str, finish: str, stop: Any) -> None:
    async def test(client: Client) -> None:
        body = {"prompt": "abc", "temperature": 0, "max_tokens": 5, **options}
        status, answer, _ = await client.request("/v1/completions", body)
        assert status == 200, answer
        (choice,) = answer["choices"]
        assert (choice["text"], choice["finish_reason"]) == (text, finish)
        assert choice["stop_reason"] == stop

        body["messages"] = [{"role": "user", "content": body.pop("prompt")}]
        body.pop("add_special_tokens", None)
        status, answer, _ = await client.request("/v1/chat/completions", body)
        assert status == 200, answer
        (choice,) = answer["choices"]
        assert (choice["message"]["content"], choice["finish_reason"]) == (text, finish)

    run(test)


def test_the_end_of_sequence_can_be_put_off() -> None:
    async def test(client: Client) -> None:
        for extra in ({"ignore_eos": True}, {"min_tokens": 5}):
            answer = await client.complete(".", extra_body=extra)
            assert answer.usage.completion_tokens == 5
            assert answer.choices[0].finish_reason == "length"
        answer = await client.complete("a", stop="bcd", extra_body={"min_tokens": 5}, max_tokens=9)
        assert texts_of(answer) == ["bcdefghij"]

    run(test)


def test_seeds_samples_and_best_of() -> None:
    async def test(client: Client) -> None:
        options = {"temperature": 8.0, "seed": 5, "n": 3, "max_tokens": 8}
        first = await client.complete("ab", extra_body={"ignore_eos": True}, **options)
        again = await client.complete("ab", extra_body={"ignore_eos": True}, **options)
        streamed, _ = await collect(
            await client.complete("ab", extra_body={"ignore_eos": True}, stream=True, **options)
        )
        assert texts_of(first) == texts_of(again) == [streamed[i] for i in range(3)]
        assert len(set(texts_of(first))) == 3
        other = await client.complete("ab", **{**options, "seed": 6})
        assert texts_of(other) != texts_of(first)
        assert first.usage.completion_tokens == 24 and first.usage.prompt_tokens == 2

        best = await client.complete("ab", best_of=6, **{**options, "n": 2})
        assert len(best.choices) == 2
        texts, _ = await collect(
            await client.complete("ab", best_of=6, stream=True, **{**options, "n": 2})
        )
        assert [texts[0], texts[1]] == texts_of(best)

    run(test)


def test_beam_search() -> None:
    async def test(client: Client) -> None:
        extra = {"use_beam_search": True, "length_penalty": 2.0, "early_stopping": "never"}
        answer = await client.complete("ab", n=3, max_tokens=6, extra_body=extra)
        assert texts_of(answer)[0] == "cdefgh"
        scores = [choice.score for choice in answer.choices]
        assert scores == sorted(scores, reverse=True) and len(scores) == 3
        first = answer.choices[0]
        assert first.score == pytest.approx(first.cumulative_logprob / 6**2)

        chat = await client.chat("ab", max_tokens=6, extra_body={"beam_width": 4})
        assert texts_of(chat) == ["cdefgh"]
        texts, _ = await collect(
            await client.chat("ab", max_tokens=6, stream=True, extra_body={"beam_width": 4})
        )
        assert texts == {0: "cdefgh"}
        for extra, field in (
            ({"beam_width": 2, "use_beam_search": False}, "beam_width"),
            ({"beam_width": 2, "top_k": 3}, "top_k"),
            ({"beam_width": 2, "stop": "a"}, "stop"),
            ({"early_stopping": "sometimes"}, "early_stopping"),
        ):
            with pytest.raises(openai.BadRequestError) as error:
                await client.complete("ab", extra_body=extra)
            assert error.value.param == field

    run(test)
