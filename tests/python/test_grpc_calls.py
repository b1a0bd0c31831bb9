"""Unary calls, text and tokens, chat options; and how calls end: deadlines, slow clients, a full
queue."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from typing import Any, ClassVar

import grpc
import pytest
from fakes import Gate, letter_tokenizer, load_alphabet
from google.protobuf import struct_pb2
from grpc_harness import Client, collect, run, serve, text_request
from waiting import PATIENCE, until

from fastpage.engine.prompts import chat_text
from fastpage.serving.grpc import calls
from fastpage.serving.grpc.service import FastpageService
from fastpage.v1 import fastpage_pb2 as pb
from fastpage.v1 import fastpage_pb2_grpc as pb_grpc

INVALID = grpc.StatusCode.INVALID_ARGUMENT


async def refusal(call: Any) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await call
    return error.value.code(), error.value.details() or ""


def all_of(responses: list[pb.GenerateResponse]) -> pb.GenerateResponse:
    """What the messages of a stream come to."""
    whole = pb.GenerateResponse(request_id=responses[0].request_id)
    by_index: dict[int, pb.CompletionDelta] = {}
    for response in responses:
        whole.prompt_logprobs.extend(response.prompt_logprobs)
        if response.HasField("usage"):
            whole.usage.CopyFrom(response.usage)
        for delta in response.outputs:
            output = by_index.setdefault(delta.index, pb.CompletionDelta())
            text = output.text + delta.text
            output.MergeFrom(delta)  # appends what is repeated, replaces the rest
            output.text = text
    whole.outputs.extend(by_index[index] for index in sorted(by_index))
    return whole


# ---------------------------------------------------------------- unary


@pytest.mark.parametrize(
    "sampling",
    [
        {},
        {"stop": ["gh"], "max_tokens": 20},
        {"n": 3, "temperature": 2.0, "seed": 5, "logprobs": 2, "prompt_logprobs": 1},
        {"n": 2, "best_of": 4, "temperature": 3.0, "seed": 5, "ignore_eos": True},
        {"n": 2, "beam_width": 3, "max_tokens": 6},
        {"detokenize": False},
    ],
)
def test_a_unary_call_brings_what_its_stream_does(sampling: dict[str, Any]) -> None:
    async def test(client: Client) -> None:
        request = text_request("abc", **sampling)
        request.request_id = "r"
        _, _, responses = await collect(client.stub.Generate(request))
        unary = await client.stub.GenerateUnary(request)
        # The stream had to compute the prompt, and a block of it was cached then.
        unary.usage.cached_tokens = responses[-1].usage.cached_tokens
        assert unary == all_of(responses)

        chat = pb.ChatRequest(
            request_id="r",
            messages=[pb.ChatMessage(role="user", content="abc")],
            sampling_params=request.sampling_params,
        )
        answer = await client.stub.ChatUnary(chat)
        answer.usage.cached_tokens = unary.usage.cached_tokens
        assert answer == unary

    run(test)


def test_a_unary_call_is_refused_cancelled_and_aborted_as_a_stream_is() -> None:
    gate = Gate()

    async def test(client: Client) -> None:
        request = text_request("a", max_tokens=100)
        request.output_kind = pb.OUTPUT_KIND_DELTA
        code, details = await refusal(client.stub.GenerateUnary(request))
        assert (code, details.split("=")[0]) == (INVALID, "output_kind")
        code, details = await refusal(client.stub.ChatUnary(pb.ChatRequest()))
        assert (code, details.split()[0]) == (INVALID, "messages")

        request.output_kind = pb.OUTPUT_KIND_FINAL_ONLY
        request.request_id = "r8"
        call = client.stub.GenerateUnary(request)
        while not (await client.stats()).num_waiting + (await client.stats()).num_running:
            await asyncio.sleep(0.001)
        call.cancel()
        while client.engine._streams:
            await asyncio.sleep(0.001)
        gate.open(1)
        await client.wait_until_idle()

        call = client.stub.GenerateUnary(request)
        gate.open(3)
        while not (await client.stats()).num_running:
            await asyncio.sleep(0.001)
        assert (await client.stub.Abort(pb.AbortRequest(request_id="r8"))).found
        answer = await call
        assert answer.outputs[0].finish_reason == pb.FINISH_REASON_ABORT
        gate.open(10)

    run(test, before_step=gate)


# ---------------------------------------------------------------- text and tokens


def test_tokenize_and_detokenize() -> None:
    async def test(client: Client) -> None:
        answer = await client.stub.Tokenize(pb.TokenizeRequest(text="cab.", return_tokens=True))
        assert (list(answer.token_ids), list(answer.tokens)) == ([2, 0, 1, 27], [*"cab."])
        assert answer.max_model_len == 128
        assert not (await client.stub.Tokenize(pb.TokenizeRequest(text=""))).token_ids

        messages = [pb.ChatMessage(role="user", content=text) for text in ("ab", "c")]
        answer = await client.stub.Tokenize(
            pb.TokenizeRequest(conversation=pb.Conversation(messages=messages))
        )
        assert (list(answer.token_ids), list(answer.tokens)) == ([0, 1, 2], [])

        answer = await client.stub.Detokenize(pb.DetokenizeRequest(token_ids=[2, 0, 28]))
        assert answer.text == "ca<end>"
        request = pb.DetokenizeRequest(token_ids=[2, 0, 28], skip_special_tokens=True)
        assert (await client.stub.Detokenize(request)).text == "ca"
        assert (await client.stub.Detokenize(pb.DetokenizeRequest())).text == ""

        stub = client.stub
        for call, word in (
            (stub.Tokenize(pb.TokenizeRequest()), "input"),
            (stub.Tokenize(pb.TokenizeRequest(conversation=pb.Conversation())), "messages"),
            (stub.Detokenize(pb.DetokenizeRequest(token_ids=[1, 29])), "token_ids[1]=29"),
            (stub.Detokenize(pb.DetokenizeRequest(token_ids=[-1])), "token_ids[0]=-1"),
        ):
            code, details = await refusal(call)
            assert (code, details.split()[0]) == (INVALID, word)
        code, _ = await refusal(stub.Tokenize(pb.TokenizeRequest(text="a", model="b")))
        assert code == grpc.StatusCode.NOT_FOUND

    run(test)


def test_a_long_request_does_not_hold_up_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its checks are made on another thread."""
    token_ids = [1] * 1_000_000
    token_ids[-1] = 99
    long = pb.GenerateRequest(token_ids=pb.TokenIds(ids=token_ids))
    read = FastpageService._read
    being_read, others_answered = threading.Event(), threading.Event()

    def held(service: FastpageService, request: Any, *args: Any) -> Any:
        if request == long:
            being_read.set()
            assert threading.current_thread() is not threading.main_thread()
            assert others_answered.wait(PATIENCE)
        return read(service, request, *args)

    monkeypatch.setattr(FastpageService, "_read", held)

    async def test(client: Client) -> None:
        refused = asyncio.ensure_future(refusal(client.stub.GenerateUnary(long)))
        assert await asyncio.to_thread(being_read.wait, PATIENCE)
        answer = await client.stub.GenerateUnary(text_request("a"))
        assert answer.outputs[0].text == "bcdef"
        others_answered.set()
        code, details = await refused
        assert (code, details.split()[0]) == (INVALID, "token_ids[999999]=99")

    run(test)


# ---------------------------------------------------------------- the prompt


TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }} {{ m.content | trim }}.{% endfor %}"
    "{% if add_generation_prompt %}a {% endif %}{{ style }}{{ size }}"
)


def test_options_of_the_chat_template() -> None:
    async def main() -> None:
        loaded = dataclasses.replace(load_alphabet(), tokenizer=letter_tokenizer(TEMPLATE))
        async with serve(loaded) as client:

            async def prompt(**options: Any) -> str:
                messages = [pb.ChatMessage(role="user", content="hi")]
                messages.append(pb.ChatMessage(role="assistant", content="yo u "))
                conversation = pb.Conversation(messages=messages, **options)
                tokens = await client.stub.Tokenize(pb.TokenizeRequest(conversation=conversation))
                request = pb.ChatRequest(messages=messages, **options)
                request.sampling_params.max_tokens = 1
                usage = (await client.stub.ChatUnary(request)).usage
                assert usage.prompt_tokens == len(tokens.token_ids)
                ids = pb.DetokenizeRequest(token_ids=tokens.token_ids)
                return (await client.stub.Detokenize(ids)).text

            assert await prompt() == "u hi.a yo u.a "
            assert await prompt(add_generation_prompt=True) == "u hi.a yo u.a "
            assert await prompt(add_generation_prompt=False) == "u hi.a yo u."
            assert await prompt(continue_final_message=True) == "u hi.a yo u "
            kwargs = struct_pb2.Struct()
            kwargs.update({"style": "x", "unused": [1, {"deep": None}]})
            assert await prompt(template_kwargs=kwargs) == "u hi.a yo u.a x"

            for options, word in (
                (
                    {"continue_final_message": True, "add_generation_prompt": True},
                    "add_generation_prompt",
                ),
                ({"template_kwargs": {"messages": 1}}, "template_kwargs"),
                ({"template_kwargs": {"self": 1}}, "template_kwargs"),
            ):
                with pytest.raises(grpc.aio.AioRpcError, match=word) as error:
                    await prompt(**options)
                assert error.value.code() == INVALID
                assert error.value.details().startswith(word)

    asyncio.run(asyncio.wait_for(main(), timeout=PATIENCE))


def test_a_message_to_go_on_with_is_rendered_without_a_new_ones_beginning() -> None:
    """Some templates ask for it before they come to the end."""
    template = "{{ 'new' if add_generation_prompt else 'old' }} {{ messages[0].content }} <end>"
    tokenizer, messages = letter_tokenizer(template), [{"role": "assistant", "content": "hi"}]
    for options, text in (
        ({}, "new hi <end>"),
        ({"add_generation_prompt": False}, "old hi <end>"),
        ({"continue_final_message": True}, "old hi"),
        ({"continue_final_message": True, "add_generation_prompt": False}, "old hi"),
    ):
        assert chat_text(messages, tokenizer, **options) == text


def test_truncated_prompts_and_tokens_without_text() -> None:
    async def test(client: Client) -> None:
        answer = await client.stub.GenerateUnary(text_request("abcxyz", truncate_prompt_tokens=2))
        assert (answer.usage.prompt_tokens, answer.outputs[0].text) == (2, "abcde")
        request = text_request("abc" * 100, truncate_prompt_tokens=-1, max_tokens=8)
        assert (await client.stub.GenerateUnary(request)).usage.prompt_tokens == 120
        answer = await client.stub.GenerateUnary(text_request("abc", detokenize=False))
        assert (answer.outputs[0].text, list(answer.outputs[0].token_ids)) == ("", [3, 4, 5, 6, 7])
        for bad, word in (
            ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
            ({"detokenize": False, "stop": ["a"]}, "stop"),
        ):
            code, details = await refusal(client.stub.GenerateUnary(text_request("abc", **bad)))
            assert (code, details.split()[0]) == (INVALID, word)

    run(test)


# ---------------------------------------------------------------- how calls end


def test_an_expired_deadline_frees_the_blocks_within_a_step() -> None:
    gate = Gate()

    async def test(client: Client) -> None:
        for seconds in (0.2, 2.0, 20.0):  # until it is enough for the call to arrive
            call = client.stub.Generate(text_request("a", max_tokens=120), timeout=seconds)
            ended = asyncio.ensure_future(refusal(collect(call)))
            await until(lambda: client.engine._streams or ended.done())  # noqa: B023
            code, _ = await ended
            assert code == grpc.StatusCode.DEADLINE_EXCEEDED
            await until(lambda: not client.engine._streams)
            # The step that was in progress, and no other one.
            gate.open(1)
            await client.wait_until_idle()
            if client.runner.num_steps:
                break
        gate.open(10)

    run(test, before_step=gate)


def test_a_client_that_takes_nothing_loses_the_call() -> None:
    gate = Gate()

    async def main() -> None:
        loaded = load_alphabet(gate, num_blocks=1024)
        async with serve(loaded, slow_client_timeout=0.2) as client:
            # 6 kB a step, of which nobody reads any; grpc must not find out that it would take more
            # than 64 kB unread.
            options = [("grpc.http2.bdp_probe", 0), ("grpc.use_local_subchannel_pool", 1)]
            channel = grpc.aio.insecure_channel(client.address, options)
            generate = pb_grpc.FastpageStub(channel).Generate
            request = text_request("a", n=16, logprobs=28, temperature=1.0, max_tokens=120)
            request.sampling_params.ignore_eos = True
            call = generate(request)
            await until(lambda: loaded.runner.num_steps)
            # One by one: many writes, the last of which waits.
            for i in range(1, 100):
                gate.open(1)
                await until(lambda: loaded.runner.num_steps > i or not client.engine._streams)  # noqa: B023
                if not client.engine._streams:
                    break
            await until(lambda: not client.engine._streams)
            # The step that was in progress, and no other one.
            gate.open(1)
            await client.wait_until_idle()

            gate.open(100)
            bystander = await client.stub.GenerateUnary(text_request("a"))
            assert bystander.outputs[0].text == "bcdef"
            code, details = await refusal(collect(call))
            assert code == grpc.StatusCode.RESOURCE_EXHAUSTED
            assert "took no message for 0.2 s" in details
            await channel.close()

    asyncio.run(asyncio.wait_for(main(), timeout=PATIENCE))


def test_a_client_that_takes_its_time_keeps_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """However long it takes in all, and however long nothing comes."""
    watches: list[Any] = []

    def looks_when_told(watch: Any) -> None:
        watches.append(watch)
        watch._timer = asyncio.get_running_loop().call_later(PATIENCE, pytest.fail)

    monkeypatch.setattr(calls._WriteWatch, "_wait", looks_when_told)

    def look() -> None:
        for _ in range(3):
            watches[-1]._look()

    class Stream:
        aborted = 0

        async def __aiter__(self) -> Any:
            for i in range(5):
                look()
                look()
                await asyncio.sleep(0)
                yield i

        def abort(self) -> None:
            self.aborted += 1

    class Context:
        taken: ClassVar[list[int]] = []
        status = None

        async def write(self, message: int) -> None:
            look()
            await asyncio.sleep(0)
            if message == 4:
                look()
                await asyncio.sleep(0)
            self.taken.append(message)

        async def abort(self, status: Any, *_: Any) -> None:
            self.status = status
            raise grpc.aio.AbortError

    async def main() -> None:
        stream, context = Stream(), Context()
        with pytest.raises(grpc.aio.AbortError):
            await calls.write_outputs(stream, context, lambda i: (i,), 60.0)
        assert context.taken == [0, 1, 2, 3]
        assert context.status is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert stream.aborted

    asyncio.run(main())


def test_a_full_queue_says_when_to_come_back() -> None:
    gate = Gate()

    async def test(client: Client) -> None:
        gate.open(1)
        running = client.stub.Generate(text_request("a", max_tokens=3))
        await running.read()
        waiting = client.stub.GenerateUnary(text_request("b", max_tokens=3))
        while not (await client.stats()).num_waiting:
            await asyncio.sleep(0.001)
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await client.stub.GenerateUnary(text_request("c"))
        assert error.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        trailer = dict(error.value.trailing_metadata())
        assert 0 < int(trailer["retry-after-ms"]) <= 30_000
        assert trailer["grpc-retry-pushback-ms"] == trailer["retry-after-ms"]
        gate.open(100)
        await collect(running)
        assert (await waiting).outputs[0].text == "cde"

    run(test, before_step=gate, max_num_seqs=1, max_num_waiting=1)


def test_long_requests_that_wait_to_be_read_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "a" * 30_000
    monkeypatch.setattr(calls, "_MOST_WAITING_BYTES", 2 * len(text))
    gate = threading.Event()
    read = FastpageService._read

    def slowly(*args: Any) -> Any:
        assert gate.wait(PATIENCE)
        return read(*args)

    monkeypatch.setattr(FastpageService, "_read", slowly)

    async def test(client: Client) -> None:
        first = client.stub.GenerateUnary(text_request(text))
        while not calls._long_requests.num_bytes:
            await asyncio.sleep(0.001)
        first.cancel()  # it is still in memory
        second = client.stub.GenerateUnary(text_request(text))
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await second
        assert error.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert dict(error.value.trailing_metadata())["retry-after-ms"] == "1000"
        gate.set()
        while calls._long_requests.num_bytes:
            await asyncio.sleep(0.001)
        code, message = await refusal(client.stub.GenerateUnary(text_request(text)))
        assert code == INVALID and "max_model_len" in message

    run(test)
