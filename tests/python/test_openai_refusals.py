"""What fastpage-openai refuses, and that it costs nobody else anything."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import openai
import pytest
from fakes import Gate
from openai_harness import SAY, TEXT, Client, run, texts_of
from waiting import PATIENCE, until

from fastpage import AsyncEngine
from fastpage.serving.openai.completions import Completions
from fastpage.serving.openai.errors import to_api_error
from fastpage.serving.openai.state import ServerState

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
        assert permits.acquire(timeout=PATIENCE)
        reading.pop()
        return understand(self, body, *arguments)

    monkeypatch.setattr(Completions, "understand", slowly)

    async def test(client: Client) -> None:
        body = {"prompt": "a" * 1_000_000}
        huge = [asyncio.create_task(client.request("/v1/completions", body)) for _ in range(4)]
        await until(lambda: reading)
        assert texts_of(await client.complete("abc")) == ["defgh"]
        permits.release(4)
        for status, answer, _ in await asyncio.gather(*huge):
            assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")
        assert most_at_once == [1] * 4

    run(test)


def test_huge_bodies_that_wait_for_that_are_bounded() -> None:
    gate = threading.Event()

    def slowly(body: bytes) -> int:
        assert gate.wait(PATIENCE)
        return len(body)

    async def main() -> None:
        state = ServerState()
        body = bytes(8 << 20)
        reading = [asyncio.create_task(state.aside(body, slowly)) for _ in range(20)]
        await until(lambda: sum(task.done() for task in reading) == 12)
        assert await state.aside(b"short", len) == 5
        gate.set()
        results = await asyncio.gather(*reading, return_exceptions=True)
        assert results[:8] == [len(body)] * 8
        assert {to_api_error(error).status for error in results[8:]} == {429}
        assert await state.aside(bytes(100 << 20), len) == 100 << 20

    asyncio.run(asyncio.wait_for(main(), 2 * PATIENCE))


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
        await until(lambda: client.scheduler.num_running)
        second = asyncio.create_task(client.complete("b"))
        await until(lambda: client.scheduler.num_waiting)
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
