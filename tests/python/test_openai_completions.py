"""POST /v1/completions: prompts, streams, echo, log probabilities."""

from __future__ import annotations

import json
import time

from fakes import Gate
from openai_harness import Client, collect, run, texts_of


def test_prompts_in_all_forms() -> None:
    async def test(client: Client) -> None:
        began = int(time.time())
        for prompt, expected in (
            ("abc", ["defgh"]),
            ([0, 1, 2], ["defgh"]),
            (["abc", "x"], ["defgh", "yzabc"]),
            ([[0, 1, 2], [23]], ["defgh", "yzabc"]),
            (["abc", [23]], ["defgh", "yzabc"]),
        ):
            answer = await client.complete(prompt)
            assert texts_of(answer) == expected
            assert [c.index for c in answer.choices] == list(range(len(expected)))
            assert [c.finish_reason for c in answer.choices] == ["length"] * len(expected)
            num_prompt = 3 if len(expected) == 1 else 4
            assert answer.usage.prompt_tokens == num_prompt
            assert answer.usage.completion_tokens == 5 * len(expected)
            assert answer.usage.total_tokens == num_prompt + 5 * len(expected)
            texts, _ = await collect(await client.complete(prompt, stream=True))
            assert [texts[i] for i in range(len(expected))] == expected
        assert answer.object == "text_completion" and answer.id.startswith("cmpl-")
        assert answer.model == "alphabet" and began <= answer.created <= time.time()

        # By OpenAI's rules: 16 tokens unless said otherwise.
        answer = await client.complete("a", max_tokens=None)
        assert answer.usage.completion_tokens == 16

    run(test)


def test_streams_and_their_usage() -> None:
    gate = Gate()

    async def test(client: Client) -> None:
        gate.open(1000)
        texts, chunks = await collect(await client.complete("abc", stream=True))
        assert texts == {0: "defgh"}
        assert [c.choices[0].finish_reason for c in chunks][-1] == "length"
        assert {c.object for c in chunks} == {"text_completion"}
        assert len({c.id for c in chunks}) == 1
        assert not any(c.usage for c in chunks)

        options = {"stream": True, "stream_options": {"include_usage": True}, "n": 2}
        texts, chunks = await collect(await client.complete(["abc", "d"], **options))
        assert texts == {0: "defgh", 1: "defgh", 2: "efghi", 3: "efghi"}
        assert chunks[-1].choices == [] and not any(c.usage for c in chunks[:-1])
        assert "usage" in chunks[0].model_fields_set  # null, as OpenAI does it
        assert chunks[-1].usage.prompt_tokens == 4
        assert chunks[-1].usage.completion_tokens == 20

        options["stream_options"] = {"include_usage": True, "continuous_usage_stats": True}
        _, chunks = await collect(await client.chat("abc", **options))
        counts = [chunk.usage.completion_tokens for chunk in chunks]
        assert counts == sorted(counts) and counts[-1] == 10
        assert all(chunk.usage.prompt_tokens == 3 for chunk in chunks)

        status, error, _ = await client.request(
            "/v1/completions", {"prompt": "a", "stream_options": {"include_usage": True}}
        )
        assert (status, error["error"]["param"]) == (400, "stream_options")

    run(test, before_step=gate)


def test_events_are_sent_as_they_come() -> None:
    """One step, one event: nothing is kept back until more is there."""
    gate = Gate()

    async def test(client: Client) -> None:
        body = {"prompt": "a", "temperature": 0, "max_tokens": 3, "stream": True}
        reader, writer = await client.post("/v1/completions", body)
        head = await reader.readuntil(b"\r\n\r\n")
        assert b" 200 " in head and b"text/event-stream" in head
        events = []
        for letter in "bcd":
            gate.open()
            size = int(await reader.readline(), 16)
            event = await reader.readexactly(size + 2)
            assert event.startswith(b"data: {") and event.endswith(b"}\n\n\r\n")
            events.append(json.loads(event[6:]))
            assert events[-1]["choices"][0]["text"] == letter
        rest = await reader.readuntil(b"0\r\n\r\n")
        assert b"data: [DONE]\n\n" in rest
        assert [e["choices"][0]["finish_reason"] for e in events] == [None, None, "length"]
        writer.close()

    run(test, before_step=gate)


def test_echo_and_logprobs() -> None:
    async def test(client: Client) -> None:
        plain = await client.complete("abc", logprobs=2)
        logprobs = plain.choices[0].logprobs
        assert logprobs.tokens == list("defgh")
        assert logprobs.text_offset == [0, 1, 2, 3, 4]
        for letter, top in zip("defgh", logprobs.top_logprobs, strict=True):
            assert len(top) == 2 and max(top, key=top.__getitem__) == letter

        for options in ({}, {"stream": True}):
            answer = await client.complete(["abc", "xy"], echo=True, logprobs=1, n=2, **options)
            texts: dict[int, str] = {}
            offsets: dict[int, list[int]] = {}
            tokens: dict[int, list[str]] = {}
            values: dict[int, list[float]] = {}
            if options:
                _, chunks = await collect(answer)
                choices = [choice for chunk in chunks for choice in chunk.choices]
            else:
                choices = answer.choices
            for choice in choices:
                texts[choice.index] = texts.get(choice.index, "") + choice.text
                offsets.setdefault(choice.index, []).extend(choice.logprobs.text_offset)
                tokens.setdefault(choice.index, []).extend(choice.logprobs.tokens)
                values.setdefault(choice.index, []).extend(choice.logprobs.token_logprobs)
            assert texts == {0: "abcdefgh", 1: "abcdefgh", 2: "xyzabcd", 3: "xyzabcd"}
            for index, text in texts.items():
                assert tokens[index] == list(text)
                assert offsets[index] == list(range(len(text)))
                assert values[index][0] is None and all(v < 0 for v in values[index][1:])

        # What evaluations ask for: how likely is this text?
        for options in ({}, {"stream": True}):
            answer = await client.complete("abc", echo=True, max_tokens=0, logprobs=0, **options)
            if options:
                _, chunks = await collect(answer)
                choice = next(c for chunk in chunks for c in chunk.choices)
            else:
                choice = answer.choices[0]
                assert answer.usage.completion_tokens == 0
            assert choice.text == "abc"
            assert choice.logprobs.tokens == ["a", "b", "c"]
            assert choice.finish_reason == "length"

        by_ids = await client.complete([0, 1], echo=True, extra_body={"return_token_ids": True})
        assert texts_of(by_ids) == ["abcdefg"]
        assert by_ids.choices[0].token_ids == [2, 3, 4, 5, 6]
        assert by_ids.choices[0].prompt_token_ids == [0, 1]
        as_ids = await client.complete(
            "a", logprobs=1, extra_body={"return_tokens_as_token_ids": True}
        )
        assert as_ids.choices[0].logprobs.tokens[0] == "token_id:1"

        answer = await client.complete("abc", extra_body={"prompt_logprobs": 1})
        positions = answer.choices[0].prompt_logprobs
        assert positions[0] is None
        assert positions[1]["1"]["decoded_token"] == "b" and positions[1]["1"]["rank"] == 1

    run(test)
