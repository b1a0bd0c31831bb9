"""fastpage-openai in this process, with a fake model: the openai client, curl, and bare sockets."""

from __future__ import annotations

import asyncio
import contextlib
import json
import select
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import openai
import pytest
import trustme
from fakes import EOS_ID, Gate, load_alphabet

from fastpage import AsyncEngine
from fastpage.engine.loading import LoadedModel
from fastpage.errors import FastpageError
from fastpage.serving.openai.completions import Completions
from fastpage.serving.openai.exchange import Limits
from fastpage.serving.openai.server import HttpOptions, HttpServer
from fastpage.serving.security import BearerTokens, TlsFiles


class Client:
    """`openai` is the real client; request() is curl; connect() a socket."""

    def __init__(self, url: str, engine: AsyncEngine) -> None:
        self.url = url
        self.engine = engine
        self.openai = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)

    async def complete(self, prompt: Any, **options: Any) -> Any:
        options = {"temperature": 0, "max_tokens": 5, **options}
        return await self.openai.completions.create(model="alphabet", prompt=prompt, **options)

    async def chat(self, text: str, **options: Any) -> Any:
        options = {"temperature": 0, "max_tokens": 5, **options}
        messages = options.pop("messages", [{"role": "user", "content": text}])
        return await self.openai.chat.completions.create(
            model="alphabet", messages=messages, **options
        )

    async def request(self, path: str, body: Any = None, *options: str) -> tuple[int, Any, str]:
        """Status, JSON (or text), and the headers."""
        if body is not None:
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            options += ("-H", "Content-Type: application/json", "--data-binary", "@-")
        else:
            data = b""
        process = await asyncio.create_subprocess_exec(
            *("curl", "-sS", "-D", "/dev/stderr", "-w", "\n%{http_code}", *options),
            self.url + path,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        out, headers = await process.communicate(data)
        text, _, status = out.decode().rpartition("\n")
        try:
            value = json.loads(text)
        except ValueError:
            value = text
        return int(status), value, headers.decode().lower()

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        host, _, port = self.url.rpartition("/")[2].rpartition(":")
        return await asyncio.open_connection(host, int(port))

    async def post(self, path: str, body: Any) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Sends it and does not wait for the answer."""
        reader, writer = await self.connect()
        writer.write(request_bytes(path, body))
        return reader, writer

    @property
    def scheduler(self) -> Any:
        return self.engine.stats().scheduler

    async def wait_for(self, condition: Callable[[], Any]) -> None:
        deadline = time.monotonic() + 20
        while not condition():
            assert time.monotonic() < deadline
            await asyncio.sleep(0.005)

    async def wait_until_idle(self) -> None:
        def idle() -> bool:
            stats = self.scheduler
            free = stats.num_free_blocks == stats.num_blocks
            return free and not stats.num_running and not stats.num_waiting

        await self.wait_for(idle)


def request_bytes(path: str, body: Any) -> bytes:
    data = json.dumps(body).encode()
    return (
        b"POST %b HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n%b" % (path.encode(), len(data), data)
    )


@contextlib.asynccontextmanager
async def serve(loaded: LoadedModel, options: HttpOptions | None = None) -> AsyncIterator[Client]:
    server = HttpServer(options)
    url = await server.start()
    engine = AsyncEngine(loaded)
    await server.set_engine(engine)
    client = Client(url, engine)
    try:
        yield client
        await client.wait_until_idle()
    finally:
        await client.openai.close()
        await engine.shutdown()
        await server.stop(5)


def run(
    test: Callable[[Client], Coroutine[Any, Any, None]],
    before_step: Callable[[], None] | None = None,
    http: HttpOptions | None = None,
    **options: Any,
) -> None:
    """Runs `test(client)` against the alphabet; afterwards every block must be free."""

    async def main() -> None:
        async with serve(load_alphabet(before_step, **options), http) as client:
            await asyncio.wait_for(test(client), timeout=60)

    asyncio.run(main())


async def collect(stream: Any) -> tuple[dict[int, str], list[Any]]:
    """The texts by index, and the chunks."""
    texts: dict[int, str] = {}
    chunks = []
    async for chunk in stream:
        chunks.append(chunk)
        for choice in chunk.choices:
            text = choice.text if hasattr(choice, "text") else choice.delta.content
            texts[choice.index] = texts.get(choice.index, "") + (text or "")
    return texts, chunks


def texts_of(answer: Any) -> list[str]:
    return [c.text if hasattr(c, "text") else c.message.content for c in answer.choices]


# ---------------------------------------------------------------- completions


def test_prompts_in_all_forms() -> None:
    async def test(client: Client) -> None:
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
        assert answer.model == "alphabet" and abs(answer.created - time.time()) < 60

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


# ---------------------------------------------------------------- chat


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


# ---------------------------------------------------------------- sampling parameters

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


# ---------------------------------------------------------------- what is refused

TEXT = {"prompt": "abc"}
SAY = {"messages": [{"role": "user", "content": "abc"}]}
TOOLS = [{"type": "function", "function": {"name": "f"}}]

REFUSALS = [
    ({}, "prompt", "missing_required_parameter"),
    ({"prompt": ""}, "prompt", "invalid_value"),
    ({"prompt": []}, "prompt", "invalid_value"),
    ({"prompt": [[]]}, "prompt", "invalid_value"),
    ({"prompt": [1, "a"]}, "prompt", "invalid_value"),
    ({"prompt": [99]}, "prompt", "invalid_value"),
    ({"prompt": [-1]}, "prompt", "invalid_value"),
    ({"prompt": [2**70]}, "prompt", "invalid_value"),
    ({"prompt": [["a"]]}, "prompt", "invalid_type"),
    ({"prompt": {"a": 1}}, "prompt", "invalid_type"),
    ({"prompt": "a" * 128}, "prompt", "context_length_exceeded"),
    ({"prompt": [1] * 128}, "prompt", "context_length_exceeded"),
    ({"prompt": ["a"] * 2049}, "prompt", "invalid_value"),
    ({"prompt": ["a", ""]}, "prompt", "invalid_value"),
    ({**TEXT, "max_tokens": 126}, "prompt", "context_length_exceeded"),
    ({**TEXT, "max_tokens": 0}, "max_tokens", "invalid_value"),
    ({**TEXT, "max_tokens": "5"}, "max_tokens", "invalid_type"),
    ({**TEXT, "temperature": -1}, "temperature", "invalid_value"),
    ({**TEXT, "n": 0}, "n", "invalid_value"),
    ({**TEXT, "n": 2**70}, "n", "invalid_value"),
    ({**TEXT, "n": 1.5}, "n", "invalid_type"),
    ({**TEXT, "best_of": 1, "n": 2}, "best_of", "invalid_value"),
    ({**TEXT, "top_p": 0}, "top_p", "invalid_value"),
    ({**TEXT, "logprobs": 2000}, "logprobs", "invalid_value"),
    ({**TEXT, "logprobs": True}, "logprobs", "invalid_type"),
    ({**TEXT, "logit_bias": {"x": 1}}, "logit_bias", "invalid_value"),
    ({**TEXT, "logit_bias": {"99": 1}}, "logit_bias", "invalid_value"),
    ({**TEXT, "logit_bias": [1]}, "logit_bias", "invalid_type"),
    ({**TEXT, "stop": ["a", 1]}, "stop", "invalid_type"),
    ({**TEXT, "stop": ""}, "stop", "invalid_value"),
    ({**TEXT, "stop_token_ids": [2**40]}, "stop_token_ids", "invalid_value"),
    ({**TEXT, "priority": 3}, "priority", "invalid_value"),
    ({**TEXT, "suffix": "z"}, "suffix", "unsupported_value"),
    ({**TEXT, "response_format": {"type": "json_object"}}, "response_format", "unsupported_value"),
    ({**TEXT, "guided_json": {}}, "guided_json", "unsupported_value"),
    ({**TEXT, "temprature": 1}, "temprature", "unknown_parameter"),
    ({**TEXT, "stream": True, "prompt_logprobs": 1}, "prompt_logprobs", "invalid_value"),
    (
        {**TEXT, "stream": True, "stream_options": {"usage": True}},
        "stream_options.usage",
        "unknown_parameter",
    ),
    ({**TEXT, "request_id": "a b"}, "request_id", "invalid_value"),
    ({**TEXT, "request_id": "\r\nx: y"}, "request_id", "invalid_value"),
    ({**SAY, "messages": []}, "messages", "invalid_value"),
    ({"messages": None}, "messages", "missing_required_parameter"),
    ({**SAY, "messages": ["a"]}, "messages", "invalid_type"),
    ({**SAY, "messages": [{"content": "a"}]}, "messages", "invalid_value"),
    ({**SAY, "messages": [{"role": "user", "content": 3}]}, "messages", "invalid_value"),
    (
        {**SAY, "messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        "messages",
        "invalid_value",
    ),
    ({**SAY, "tools": TOOLS}, "tools", "unsupported_value"),
    ({**SAY, "tools": TOOLS, "tool_choice": "auto"}, "tool_choice", "unsupported_value"),
    ({**SAY, "tool_choice": "required"}, "tool_choice", "unsupported_value"),
    ({**SAY, "functions": [{"name": "f"}]}, "functions", "unsupported_value"),
    ({**SAY, "modalities": ["text", "audio"]}, "modalities", "unsupported_value"),
    ({**SAY, "audio": {"voice": "x"}}, "audio", "unsupported_value"),
    ({**SAY, "reasoning_effort": "high"}, "reasoning_effort", "unsupported_value"),
    ({**SAY, "service_tier": "flex"}, "service_tier", "unsupported_value"),
    ({**SAY, "store": True}, "store", "unsupported_value"),
    ({**SAY, "chat_template": "{{ 1 }}"}, "chat_template", "unsupported_value"),
    (
        {**SAY, "response_format": {"type": "json_schema", "json_schema": {}}},
        "response_format",
        "unsupported_value",
    ),
    ({**SAY, "top_logprobs": 3}, "top_logprobs", "invalid_value"),
    ({**SAY, "logprobs": True, "top_logprobs": 3000}, "top_logprobs", "invalid_value"),
    ({**SAY, "logprobs": 3}, "logprobs", "invalid_type"),
    (
        {**SAY, "max_tokens": 3, "max_completion_tokens": 4},
        "max_completion_tokens",
        "invalid_value",
    ),
    (
        {**SAY, "continue_final_message": True, "add_generation_prompt": True},
        "add_generation_prompt",
        "invalid_value",
    ),
    (
        {"messages": [{"role": "user"}], "continue_final_message": True},
        "continue_final_message",
        "invalid_value",
    ),
    ({**SAY, "chat_template_kwargs": {"tools": 1}}, "chat_template_kwargs", "invalid_value"),
]


def test_refusals_name_the_field() -> None:
    async def test(client: Client) -> None:
        for body, param, code in REFUSALS:
            path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
            status, answer, _ = await client.request(path, body)
            assert status == 400, (body, answer)
            error = answer["error"]
            assert (error["param"], error["code"]) == (param, code), (body, error)
            assert error["type"] == "invalid_request_error"
            assert error["message"] and "\n" not in error["message"]

        with pytest.raises(openai.NotFoundError) as missing:
            await client.openai.completions.create(model="gpt-4", prompt="a")
        assert (missing.value.param, missing.value.code) == ("model", "model_not_found")
        assert texts_of(await client.complete("abc")) == ["defgh"]

    run(test)


MALFORMED = [
    b"",
    b"{",
    b"[]",
    b"null",
    b"3",
    b"\xff\xfe{}",
    b'{"prompt": "\xff"}',
    b'{"prompt": "\\ud800"}',
    b'{"prompt": "a", "temperature": NaN}',
    b'{"prompt": "a", "temperature": 1e999}',
    b'{"prompt": "a", "n": ' + b"9" * 100_000 + b"}",
    b'{"prompt": ' + b"[" * 1_000_000,
    b'{"messages": [{"a": ' + b"[" * 1_000_000 + b"]" * 1_000_000 + b"}]}",
    b'{"messages": [{"role": "user", "content": "a", "b": ' + b"[" * 900 + b"]" * 900 + b"}]}",
    b'{"prompt": "a"}{"prompt": "a"}',
    b"\x00" * 1000,
]


def test_malformed_bodies() -> None:
    async def test(client: Client) -> None:
        for body in MALFORMED:
            path = "/v1/chat/completions" if b"messages" in body else "/v1/completions"
            for each in (path, "/generate", "/tokenize", "/detokenize"):
                status, answer, _ = await client.request(each, body)
                assert status == 400, (body[:50], answer)
                assert answer["error"]["type"] == "invalid_request_error"
        assert texts_of(await client.complete("abc")) == ["defgh"]

    run(test)


def test_size_and_type_of_bodies() -> None:
    async def test(client: Client) -> None:
        huge = {"prompt": "a" * 10_000_000}
        status, answer, _ = await client.request("/v1/completions", huge)
        assert (status, answer["error"]["code"]) == (413, "request_too_large")
        # Without being told to wait, as most clients are.
        status, answer, _ = await client.request("/v1/completions", huge, "-H", "Expect:")
        assert (status, answer["error"]["code"]) == (413, "request_too_large")
        chunked = ("-H", "Expect:", "-H", "Transfer-Encoding: chunked")
        status, answer, _ = await client.request("/v1/completions", huge, *chunked)
        assert (status, answer["error"]["code"]) == (413, "request_too_large")
        with pytest.raises(openai.APIStatusError) as error:
            await client.complete("a" * 10_000_000)
        assert error.value.status_code == 413
        # Tokenized, and then found to be too long.
        status, answer, _ = await client.request("/v1/completions", {"prompt": "a" * 1_000_000})
        assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")

        plain = ("-H", "Content-Type: text/plain", "-d", '{"prompt": "a"}')
        status, answer, _ = await client.request("/v1/completions", None, *plain)
        assert (status, answer["error"]["code"]) == (415, "unsupported_media_type")

        for path, method, expected in (
            ("/v1/embeddings", "POST", "not_found"),
            ("/v1/completions", "GET", "method_not_allowed"),
            ("/%ff%00", "GET", "not_found"),
        ):
            status, answer, _ = await client.request(path, None, "-X", method)
            assert answer["error"]["code"] == expected
            assert status == (405 if expected == "method_not_allowed" else 404)

    run(test)


def test_huge_bodies_are_read_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """And off the event loop, where they hold nobody up."""
    understand = Completions.understand
    permits = threading.Semaphore(0)
    reading: list[int] = []
    most_at_once: list[int] = []

    def slowly(self: Completions, body: bytes, *arguments: Any) -> Any:
        if len(body) < 1_000_000:
            return understand(self, body, *arguments)
        reading.append(1)
        most_at_once.append(len(reading))
        assert permits.acquire(timeout=60)
        reading.pop()
        return understand(self, body, *arguments)

    monkeypatch.setattr(Completions, "understand", slowly)

    async def test(client: Client) -> None:
        body = {"prompt": "a" * 1_000_000}
        huge = [asyncio.create_task(client.request("/v1/completions", body)) for _ in range(4)]
        await client.wait_for(lambda: reading)
        assert texts_of(await client.complete("abc")) == ["defgh"]
        permits.release(4)
        for status, answer, _ in await asyncio.gather(*huge):
            assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")
        assert most_at_once == [1] * 4

    run(test)


def test_many_short_prompts_hold_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are tokenized off the event loop, and added some at a time."""
    understand = Completions.understand
    add_request = AsyncEngine.add_request
    threads: set[threading.Thread] = set()
    added: list[int] = []
    most_in_a_turn = 0

    def watched(self: Completions, *arguments: Any) -> Any:
        threads.add(threading.current_thread())
        return understand(self, *arguments)

    async def counted(self: AsyncEngine, *arguments: Any, **options: Any) -> Any:
        added.append(1)
        return await add_request(self, *arguments, **options)

    async def take_turns() -> None:
        nonlocal most_in_a_turn
        while True:
            before = len(added)
            await asyncio.sleep(0)
            most_in_a_turn = max(most_in_a_turn, len(added) - before)

    monkeypatch.setattr(Completions, "understand", watched)
    monkeypatch.setattr(AsyncEngine, "add_request", counted)

    async def test(client: Client) -> None:
        turns = asyncio.create_task(take_turns())
        answer = await client.complete(["a", "b"] * 500, max_tokens=1)
        turns.cancel()
        assert texts_of(answer) == ["b", "c"] * 500
        assert threading.main_thread() not in threads
        assert len(added) == 1000 and most_in_a_turn <= 32

    run(test)


def test_a_full_queue_and_a_request_id_in_use() -> None:
    gate = Gate()

    async def test(client: Client) -> None:
        first = asyncio.create_task(client.complete("a", extra_body={"request_id": "r1"}))
        await client.wait_for(lambda: client.scheduler.num_running)
        second = asyncio.create_task(client.complete("b"))
        await client.wait_for(lambda: client.scheduler.num_waiting)
        body = {"prompt": "c", "max_tokens": 1}
        status, answer, headers = await client.request("/v1/completions", body)
        assert (status, answer["error"]["type"]) == (429, "rate_limit_error")
        assert "retry-after: " in headers
        with pytest.raises(openai.RateLimitError):
            await client.complete("c")
        # All prompts of a request, or none.
        with pytest.raises(openai.RateLimitError):
            await client.complete(["c", "d"])
        status, answer, _ = await client.request("/v1/completions", {**body, "request_id": "r1"})
        assert (status, answer["error"]["code"]) == (409, "duplicate_request_id")
        gate.open(100)
        assert (await first).id == "cmpl-r1"
        assert texts_of(await second) == ["cdefg"]

    run(test, before_step=gate, max_num_seqs=1, max_num_waiting=1)


def test_request_ids() -> None:
    async def test(client: Client) -> None:
        _, answer, headers = await client.request("/generate", TEXT, "-H", "X-Request-Id: abc")
        assert "x-request-id: abc\r\n" in headers
        _, answer, headers = await client.request(
            "/v1/completions", TEXT, "-H", "X-Request-Id: abc"
        )
        assert answer["id"].startswith("cmpl-abc-")
        _, answer, headers = await client.request("/v1/completions", TEXT)
        assert f"x-request-id: {answer['id']}\r\n" in headers

    run(test)


# ---------------------------------------------------------------- clients that go, or stall

LONG = {"max_tokens": 100, "temperature": 0}
DISCONNECTS = [
    ("/v1/completions", {"prompt": "a", "stream": True, **LONG}),
    ("/v1/completions", {"prompt": "a", **LONG}),
    ("/v1/completions", {"prompt": ["a", "b", "c"], "n": 3, "stream": True, **LONG}),
    ("/v1/completions", {"prompt": ["a", "b", "c"], "n": 3, **LONG}),
    ("/v1/chat/completions", {**SAY, "n": 2, "stream": True, **LONG}),
    ("/v1/chat/completions", {**SAY, "beam_width": 3, **LONG}),
    ("/generate", {"prompt": "a", "stream": True, **LONG}),
]


@pytest.mark.parametrize(("path", "body"), DISCONNECTS)
def test_a_client_that_goes_frees_its_blocks(path: str, body: Any) -> None:
    gate = Gate()

    async def test(client: Client) -> None:
        _reader, writer = await client.post(path, body)
        gate.open(4)
        await client.wait_for(lambda: client.engine.stats().num_steps >= 3)
        assert client.scheduler.num_running > 0
        writer.close()
        await client.wait_for(lambda: not client.engine._streams)
        gate.open(2)  # aborts are taken in between two steps
        await client.wait_until_idle()
        assert client.engine.stats().num_steps <= 6

    run(test, before_step=gate)


def test_a_client_that_goes_while_it_waits_or_sends() -> None:
    gate = Gate()

    async def test(client: Client) -> None:
        running = asyncio.create_task(client.complete("a"))
        await client.wait_for(lambda: client.scheduler.num_running)
        _, writer = await client.post("/v1/completions", {"prompt": "a", **LONG})
        await client.wait_for(lambda: client.scheduler.num_waiting)
        writer.close()
        await client.wait_for(lambda: len(client.engine._streams) == 1)
        _, writer = await client.connect()
        writer.write(b"POST /v1/completions HTTP/1.1\r\nContent-Length: 100\r\n\r\n{")
        writer.close()
        gate.open(50)
        assert texts_of(await running) == ["bcdef"]

    run(test, before_step=gate, max_num_seqs=1)


def test_requests_sent_ahead_end_the_connection() -> None:
    gate = Gate()

    async def test(client: Client) -> None:
        reader, writer = await client.post("/v1/completions", {"prompt": "a", **LONG})
        await client.wait_for(lambda: client.scheduler.num_running)
        writer.write(b"GET /health HTTP/1.1\r\n\r\n")
        with contextlib.suppress(ConnectionResetError):
            assert await reader.read() == b""
        await client.wait_for(lambda: not client.engine._streams)
        gate.open(5)

    run(test, before_step=gate)


def test_half_sent_requests_end() -> None:
    async def test(client: Client) -> None:
        halves = (b"", b"GET /hea", b"GET /health HTTP/1.1\r\nA: b\r\n")
        for half in halves:
            reader, writer = await client.connect()
            writer.write(half)
            with contextlib.suppress(ConnectionResetError):
                assert await reader.read() == b""
            writer.close()
        reader, writer = await client.connect()
        writer.write(
            b"POST /generate HTTP/1.1\r\nContent-Type: application/json\r\n"
            b"Content-Length: 100\r\n\r\n{"
        )
        assert b" 408 " in await reader.readline()
        writer.close()
        # Headers without end.
        reader, writer = await client.connect()
        with contextlib.suppress(ConnectionError):
            writer.write(b"GET /health HTTP/1.1\r\n")
            for _ in range(100):
                writer.write(b"A: " + b"b" * 10_000 + b"\r\n")
                await writer.drain()
            await reader.read()
        writer.close()
        # A body that nobody waits for, not even after a part of it has come.
        reader, writer = await client.connect()
        writer.write(b"GET /health HTTP/1.1\r\nContent-Length: 100\r\n\r\n")
        await reader.readuntil(b'"ready"}')
        writer.write(b"x")
        with contextlib.suppress(ConnectionResetError):
            assert await reader.read() == b""
        writer.close()
        # A connection that is used goes on, for as long as one likes.
        reader, writer = await client.connect()
        for _ in range(3):
            writer.write(b"GET /health HTTP/1.1\r\n\r\n")
            assert b" 200 " in await reader.readuntil(b"\r\n\r\n")
            await reader.readexactly(len(b'{"status":"ready"}'))
            await asyncio.sleep(0.3)
        writer.close()

    run(test, http=HttpOptions(limits=Limits(request_timeout_seconds=0.25)))


@pytest.mark.parametrize("part", [b"A: b\r\n", b"A: b"], ids=["many", "one without end"])
def test_trailers_have_an_end(part: bytes) -> None:
    """Headers behind a body, which are no headers of the request."""

    async def test(client: Client) -> None:
        chunked = b"Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
        body = json.dumps({"prompt": "abc", "max_tokens": 2}).encode()
        reader, writer = await client.connect()
        writer.write(b"POST /generate HTTP/1.1\r\n" + chunked)
        writer.write(b"%x\r\n%b\r\n0\r\nX-Request-Id: mine\r\n\r\n" % (len(body), body))
        head = await reader.readuntil(b"\r\n\r\n")
        assert b" 200 " in head and b"mine" not in head
        writer.close()
        reader, writer = await client.connect()
        writer.write(b"GET /health HTTP/1.1\r\n" + chunked + b"0\r\n")
        await reader.readuntil(b'"ready"}')
        with contextlib.suppress(ConnectionError):
            for _ in range(100):
                writer.write(part * 10_000)
                await writer.drain()
            assert await reader.read() == b""
        writer.close()

    run(test)


def test_a_client_that_does_not_read_is_dropped(tmp_path: Path) -> None:
    path = str(tmp_path / "http.sock")  # what lies between the two is small there

    async def test(client: Client) -> None:
        # Few steps that say much: the log probabilities of all letters.
        body = {"prompt": ["a"] * 8, "n": 2, "logprobs": 29, "stream": True, **LONG}
        stalled = socket.socket(socket.AF_UNIX)
        stalled.connect(path)
        stalled.sendall(request_bytes("/v1/completions", body))
        poll = select.poll()
        poll.register(stalled, select.POLLRDHUP)
        assert await asyncio.to_thread(poll.poll, 20_000), "the connection is still there"
        await client.wait_until_idle()
        stalled.close()
        client.url = "http://localhost"
        status, _, _ = await client.request("/v1/completions", TEXT, "--unix-socket", path)
        assert status == 200

    limits = Limits(slow_client_timeout_seconds=0.2)
    run(test, http=HttpOptions(uds=path, limits=limits))


def test_many_streams_at_once() -> None:
    async def test(client: Client) -> None:
        async def one(i: int) -> None:
            start = i % 26
            prompt = chr(ord("a") + start)
            stream = await client.complete(prompt, stream=True, max_tokens=20 + i % 7)
            texts, _ = await collect(stream)
            expected = "".join(chr(ord("a") + (start + 1 + k) % 26) for k in range(20 + i % 7))
            assert texts == {0: expected}

        await asyncio.gather(*(one(i) for i in range(100)))

    run(test)


# ---------------------------------------------------------------- errors of the engine


def test_a_step_that_fails_costs_its_requests_alone() -> None:
    failing = [False]

    def before_step() -> None:
        if failing[0]:
            failing[0] = False
            raise RuntimeError("the model is on fire")
        time.sleep(0.002)

    async def test(client: Client) -> None:
        failing[0] = True
        with pytest.raises(openai.InternalServerError, match="on fire") as error:
            await client.complete("a", max_tokens=50)
        assert (error.value.status_code, error.value.code) == (500, "internal_error")

        stream = await client.complete("a", max_tokens=100, stream=True)
        await anext(stream)
        failing[0] = True
        with pytest.raises(openai.APIError, match="on fire") as in_stream:
            await collect(stream)
        assert in_stream.value.code == "internal_error"
        assert texts_of(await client.complete("abc")) == ["defgh"]

    run(test, before_step=before_step)


def test_not_ready_before_the_model_is_loaded_nor_when_stopping() -> None:
    async def main() -> None:
        server = HttpServer()
        client = Client(await server.start(), None)  # type: ignore[arg-type]
        assert (await client.request("/health"))[0] == 503
        assert (await client.request("/version"))[0] == 200
        for path, body in (("/v1/models", None), ("/v1/completions", TEXT), ("/tokenize", TEXT)):
            status, answer, headers = await client.request(path, body)
            assert (status, answer["error"]["code"]) == (503, "loading")
            assert "retry-after: 2" in headers

        engine = AsyncEngine(load_alphabet(lambda: time.sleep(0.01)))
        await server.set_engine(engine)
        assert (await client.request("/health"))[0] == 200
        stream = await client.complete("a", max_tokens=100, stream=True)
        await anext(stream)
        await server.drain()
        assert (await client.request("/health"))[0] == 503
        status, answer, _ = await client.request("/v1/completions", TEXT)
        assert (status, answer["error"]["code"]) == (503, "shutting_down")
        await anext(stream)
        await engine.shutdown()
        with pytest.raises(openai.APIError) as error:
            await collect(stream)
        assert error.value.code == "shutting_down"
        await server.stop(5)
        with pytest.raises(OSError):
            await client.connect()
        await client.openai.close()

    asyncio.run(asyncio.wait_for(main(), timeout=60))


# ---------------------------------------------------------------- the other endpoints


def test_generate() -> None:
    async def test(client: Client) -> None:
        body = {"prompt": "abc", "temperature": 0, "max_tokens": 3, "n": 2}
        status, answer, _ = await client.request("/generate", body)
        assert status == 200
        assert answer == {"text": ["abcdef"] * 2, "finish_reason": ["length"] * 2}
        _, answer, _ = await client.request("/generate", {**body, "prompt": [0, 1, 2]})
        assert answer["text"] == ["abcdef"] * 2
        _, lines, headers = await client.request("/generate", {**body, "stream": True})
        assert "application/x-ndjson" in headers
        last = lines if isinstance(lines, dict) else json.loads(lines.splitlines()[-1])
        assert last == {"text": ["abcdef"] * 2, "finish_reason": ["length"] * 2}
        _, answer, _ = await client.request("/generate", {"prompt": "a"})
        assert len(answer["text"][0]) == 1 + 16

    run(test)


def test_tokenize_models_load_and_version() -> None:
    async def test(client: Client) -> None:
        _, answer, _ = await client.request(
            "/tokenize", {"prompt": "ab", "return_token_strs": True}
        )
        expected = {"count": 2, "max_model_len": 128, "tokens": [0, 1], "token_strs": ["a", "b"]}
        assert answer == expected
        _, answer, _ = await client.request("/tokenize", SAY)
        assert answer["tokens"] == [0, 1, 2]
        _, answer, _ = await client.request("/detokenize", {"tokens": [0, 1, EOS_ID]})
        assert answer == {"prompt": "ab<end>"}
        for path, body, param in (
            ("/tokenize", {}, "prompt"),
            ("/tokenize", {**TEXT, **SAY}, "prompt"),
            ("/tokenize", {"prompt": 3}, "prompt"),
            ("/detokenize", {}, "tokens"),
            ("/detokenize", {"tokens": [99]}, "tokens"),
            ("/detokenize", {"tokens": [-1]}, "tokens"),
            ("/detokenize", {"tokens": [2**70]}, "tokens"),
            ("/detokenize", {"tokens": "a"}, "tokens"),
        ):
            status, answer, _ = await client.request(path, body)
            assert (status, answer["error"]["param"]) == (400, param), answer

        models = [model async for model in await client.openai.models.list()]
        assert [model.id for model in models] == ["alphabet"]
        assert models[0].max_model_len == 128
        assert (await client.openai.models.retrieve("alphabet")).id == "alphabet"
        with pytest.raises(openai.NotFoundError):
            await client.openai.models.retrieve("owner/other")
        _, answer, _ = await client.request("/load")
        assert answer["server_load"] == 0
        _, answer, _ = await client.request("/version")
        assert set(answer) == {"version"}

    run(test)


def test_metrics() -> None:
    async def test(client: Client) -> None:
        await client.complete("abc", n=2)
        status, text, headers = await client.request("/metrics")
        assert status == 200 and "content-type: text/plain" in headers
        assert 'vllm:generation_tokens_total{engine="0",model_name="alphabet"} 10.0' in text
        assert "vllm:time_to_first_token_seconds_bucket" in text

    run(test)


def test_tokens() -> None:
    async def test(client: Client) -> None:
        assert (await client.request("/health"))[0] == 200
        for path in ("/v1/models", "/load", "/version", "/nothing"):
            for options in ((), ("-H", "Authorization: Bearer wrong"), ("-H", "Authorization: k1")):
                status, answer, headers = await client.request(path, None, *options)
                assert (status, answer["error"]["code"]) == (401, "invalid_api_key")
                assert "www-authenticate: bearer" in headers
        with pytest.raises(openai.AuthenticationError):
            await client.complete("a")
        for key in ("k1", "k2"):
            authorized = client.openai.with_options(api_key=key)
            answer = await authorized.completions.create(
                model="alphabet", prompt="abc", max_tokens=1
            )
            assert texts_of(answer) == ["d"]

    run(test, http=HttpOptions(tokens=BearerTokens(["k1", "k2"])))


def test_cross_origin() -> None:
    async def test(client: Client) -> None:
        for origin, allowed in (("https://a.example", True), ("https://b.example", False)):
            _, _, headers = await client.request("/v1/models", None, "-H", f"Origin: {origin}")
            assert (f"access-control-allow-origin: {origin}" in headers) == allowed

    run(test, http=HttpOptions(cors_origins=["https://a.example"]))


def test_unix_socket(tmp_path: Path) -> None:
    path = tmp_path / "http.sock"

    async def main() -> None:
        for _ in range(2):
            async with serve(load_alphabet(), HttpOptions(uds=str(path))) as client:
                client.url = "http://localhost"
                status, answer, _ = await client.request(
                    "/v1/models", None, "--unix-socket", str(path)
                )
                assert (status, answer["data"][0]["id"]) == (200, "alphabet")
                with pytest.raises(FastpageError, match="address already in use"):
                    await HttpServer(HttpOptions(uds=str(path))).start()
            assert not path.exists()

        with socket.socket(socket.AF_UNIX) as killed:
            killed.bind(str(path))
        async with serve(load_alphabet(), HttpOptions(uds=str(path))):
            pass
        path.write_text("somebody's")
        with pytest.raises(FastpageError, match="address already in use"):
            await HttpServer(HttpOptions(uds=str(path))).start()
        assert path.read_text() == "somebody's"

    asyncio.run(main())


def test_tls_and_its_renewal(tmp_path: Path) -> None:
    authority, stranger = trustme.CA(), trustme.CA()
    files = TlsFiles(*(tmp_path / name for name in ("cert.pem", "key.pem", "ca.pem")))
    client_files = {
        name: tmp_path / f"client-{name}.pem" for name in ("authority", "stranger", "cert")
    }

    def renew(ca: trustme.CA) -> None:
        issued = ca.issue_cert("localhost", "127.0.0.1")
        files.cert.write_bytes(issued.cert_chain_pems[0].bytes())
        files.key.write_bytes(issued.private_key_pem.bytes())

    renew(authority)
    authority.cert_pem.write_to_path(str(files.client_ca))
    authority.cert_pem.write_to_path(str(client_files["authority"]))
    stranger.cert_pem.write_to_path(str(client_files["stranger"]))
    authority.issue_cert("client").private_key_and_cert_chain_pem.write_to_path(
        str(client_files["cert"])
    )
    certificate = ("--cert", str(client_files["cert"]))

    async def test(client: Client) -> None:
        async def status(ca: str, *options: str) -> int:
            ca_file = str(client_files[ca])
            return (await client.request("/v1/models", None, "--cacert", ca_file, *options))[0]

        assert client.url.startswith("https://")
        assert await status("authority", *certificate) == 200
        assert await status("authority") == 0  # without a certificate
        assert await status("stranger", *certificate) == 0
        files.cert.write_text("half a file")
        assert await status("authority", *certificate) == 200
        renew(stranger)
        assert await status("stranger", *certificate) == 200
        assert await status("stranger") == 0

    run(test, http=HttpOptions(tls=files))
