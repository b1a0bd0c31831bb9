"""POST /v1/chat/completions: messages, streams, log probabilities, tools."""

from __future__ import annotations

import openai
import pytest
from openai_harness import Client, collect, run, texts_of


def test_chat() -> None:
    async def test(client: Client) -> None:
        for limit in ({"max_tokens": 3}, {"max_tokens": None, "max_completion_tokens": 3}):
            answer = await client.chat("abcdefgh", **limit)
            assert texts_of(answer) == ["ijk"]
        assert answer.choices[0].message.role == "assistant"
        assert answer.object == "chat.completion" and answer.id.startswith("chatcmpl-")
        assert answer.usage.prompt_tokens_details.cached_tokens == 4
        salted = await client.chat("abcdefgh", extra_body={"cache_salt": "another tenant"})
        assert salted.usage.prompt_tokens_details.cached_tokens == 0

        # To the end of the context unless said otherwise.
        answer = await client.chat("a", max_tokens=None)
        assert answer.usage.completion_tokens == 127

        texts, chunks = await collect(await client.chat("abc", stream=True, n=2))
        assert texts == {0: "defgh", 1: "defgh"}
        for index in texts:
            mine = [c.choices[0] for c in chunks if c.choices[0].index == index]
            assert mine[0].delta.role == "assistant" and mine[0].delta.content == ""
            assert [c.delta.role for c in mine[1:]] == [None] * (len(mine) - 1)
            assert [c.finish_reason for c in mine[:-1]] == [None] * (len(mine) - 1)
            assert mine[-1].finish_reason == "length"
        assert {c.object for c in chunks} == {"chat.completion.chunk"}

        parts = [{"type": "text", "text": "ab"}, {"type": "text", "text": "c"}]
        answer = await client.chat("", messages=[{"role": "user", "content": parts}])
        assert texts_of(answer) == ["defgh"]

        messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "xy"}]
        answer = await client.chat(
            "",
            messages=messages,
            extra_body={
                "continue_final_message": True,
                "echo": True,
                "return_token_ids": True,
            },
        )
        assert texts_of(answer) == ["xyzabcd"]
        assert answer.prompt_token_ids == [0, 23, 24]

    run(test)


def test_chat_logprobs() -> None:
    async def test(client: Client) -> None:
        whole = await client.chat("abc", logprobs=True, top_logprobs=2)
        content = whole.choices[0].logprobs.content
        assert [entry.token for entry in content] == list("defgh")
        for entry in content:
            assert next(t.token for t in entry.top_logprobs) == entry.token
            assert len(entry.top_logprobs) == 2 and entry.bytes == list(entry.token.encode())
            assert entry.logprob == entry.top_logprobs[0].logprob < 0

        _, chunks = await collect(
            await client.chat("abc", logprobs=True, top_logprobs=2, stream=True)
        )
        streamed = [
            entry
            for chunk in chunks
            if chunk.choices[0].logprobs
            for entry in chunk.choices[0].logprobs.content
        ]
        assert streamed == content

        bare = await client.chat("abc", logprobs=True)
        assert all(entry.top_logprobs == [] for entry in bare.choices[0].logprobs.content)
        # The chosen token need not be among the likeliest.
        unlikely = await client.chat(
            "a", logprobs=True, top_logprobs=1, logit_bias={"25": 50}, max_tokens=1
        )
        (entry,) = unlikely.choices[0].logprobs.content
        assert (entry.token, [t.token for t in entry.top_logprobs]) == ("z", ["b"])
        assert (await client.chat("abc")).choices[0].logprobs is None
        answer = await client.chat("abc", extra_body={"prompt_logprobs": 0})
        assert [p and next(iter(p)) for p in answer.prompt_logprobs] == [None, "1", "2"]

    run(test)


def test_tools_that_must_not_be_called() -> None:
    async def test(client: Client) -> None:
        tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
        answer = await client.chat("abc", tools=tools, tool_choice="none")
        assert texts_of(answer) == ["defgh"]
        call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
        messages = [
            {"role": "user", "content": "ab"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": "c", "tool_call_id": "1"},
        ]
        assert texts_of(await client.chat("", messages=messages)) == ["defgh"]
        call["function"]["arguments"] = "{"
        with pytest.raises(openai.BadRequestError, match="arguments of a tool call"):
            await client.chat("", messages=messages)

    run(test)
