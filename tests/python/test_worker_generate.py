"""vllm.grpc.engine.VllmEngine: what Generate answers, and what it refuses."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import grpc
import pytest
from fakes import EOS_ID, Gate
from smg_grpc_proto.generated import vllm_engine_pb2 as pb
from worker_harness import STATUS, Client, collect, generate, refused, run

from fastpage import SamplingParams
from fastpage.serving.worker import convert, service


def test_without_streaming_there_is_one_complete_an_index() -> None:
    async def test(client: Client) -> None:
        chunks, completes = await collect(client.stub.Generate(generate("abcdefgh", n=2)))
        assert chunks == []
        assert sorted(c.index for c in completes) == [0, 1]
        for complete in completes:
            assert list(complete.output_ids) == [8, 9, 10, 11, 12]
            assert complete.finish_reason == "length"
            assert (complete.prompt_tokens, complete.completion_tokens) == (8, 5)
            assert complete.cached_tokens == 0
            assert complete.WhichOneof("matched_stop") is None
            assert not complete.HasField("output_logprobs")
        # The last token is always computed anew, so that of two full blocks one is found.
        _, completes = await collect(client.stub.Generate(generate("abcdefgh")))
        assert completes[0].cached_tokens == 4

    run(test)


def test_streams_are_deltas_and_one_complete_an_index() -> None:
    async def test(client: Client) -> None:
        request = generate("ab", n=2, temperature=2.0, seed=-7, stream=True, logprobs=1)
        chunks, completes = await collect(client.stub.Generate(request))
        ids: dict[int, list[int]] = {0: [], 1: []}
        for chunk in chunks:
            ids[chunk.index] += chunk.token_ids
            assert list(chunk.output_logprobs.token_ids) == list(chunk.token_ids)
            assert chunk.completion_tokens == len(ids[chunk.index])
            assert chunk.prompt_tokens == 2
        assert ids == {c.index: list(c.output_ids) for c in completes}
        assert {c.finish_reason for c in completes} <= {"length", "stop"}
        # The same without a stream: seeds of below zero are seeds.
        request.stream = False
        _, again = await collect(client.stub.Generate(request))
        assert ids == {c.index: list(c.output_ids) for c in again}

    run(test)


def test_text_and_defaults() -> None:
    async def test(client: Client) -> None:
        request = pb.GenerateRequest(request_id="r", text="xyz")
        request.sampling_params.temperature = 0
        _, completes = await collect(client.stub.Generate(request))
        # Up to the model's length.
        assert len(completes[0].output_ids) == 125
        # No parameters at all: sampled, as the model's author recommends, till the model ends.
        client.worker._defaults.top_k = 1
        request.sampling_params.Clear()
        request.sampling_params.max_tokens = 3
        _, completes = await collect(client.stub.Generate(request))
        assert len(completes[0].output_ids) == 3

    run(test)


@pytest.mark.parametrize("stream", [False, True])
def test_stops(stream: bool) -> None:
    async def test(client: Client) -> None:
        async def end(text: str, **sampling: Any) -> Any:
            request = generate(text, stream=stream, **{"max_tokens": 50, **sampling})
            _, (complete,) = await collect(client.stub.Generate(request))
            assert complete.finish_reason == "stop"
            return complete

        complete = await end("a", stop=["x", "efg"])
        assert complete.matched_stop_str == "efg"
        assert list(complete.output_ids) == [1, 2, 3, 4, 5, 6]
        complete = await end("a", stop_token_ids=[3])
        assert complete.matched_token_id == 3
        assert list(complete.output_ids) == [1, 2, 3]
        complete = await end(".")
        assert complete.WhichOneof("matched_stop") is None
        assert list(complete.output_ids) == [EOS_ID]

    run(test)


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs(stream: bool) -> None:
    async def test(client: Client) -> None:
        request = generate("abcdefgh", stream=stream, logprobs=2, prompt_logprobs=1, max_tokens=3)
        chunks, completes = await collect(client.stub.Generate(request))
        messages = chunks if stream else completes
        inputs = [m.input_logprobs for m in messages if m.HasField("input_logprobs")]
        assert len(inputs) == 1
        assert list(inputs[0].token_ids) == list(range(8))
        assert [p.HasField("value") for p in inputs[0].token_logprobs] == [False] + [True] * 7
        assert inputs[0].token_logprobs[1].value > -0.1
        assert [list(top.token_ids) for top in inputs[0].top_logprobs] == [
            [],
            *([i] for i in range(1, 8)),
        ]
        token_ids = [i for m in messages for i in m.output_logprobs.token_ids]
        assert token_ids == [8, 9, 10]
        for message in messages:
            logprobs = message.output_logprobs
            for token_id, value, top in zip(
                logprobs.token_ids, logprobs.token_logprobs, logprobs.top_logprobs, strict=True
            ):
                assert len(top.token_ids) == 2
                assert (top.token_ids[0], top.values[0]) == (token_id, value)
                assert top.values[1] < value

    # The prompt takes two steps.
    run(test, max_num_batched_tokens=6)


def test_what_is_not_likely_enough_for_json() -> None:
    async def test(client: Client) -> None:
        request = generate("a", max_tokens=1, logprobs=1, logit_bias={7: -100.0})
        _, (complete,) = await collect(client.stub.Generate(request))
        assert all(value >= -9999 for value in complete.output_logprobs.token_logprobs)

    run(test)


def with_fields(**fields: Any) -> pb.GenerateRequest:
    request = generate("ab")
    request.MergeFrom(pb.GenerateRequest(**fields))
    return request


BAD_REQUESTS = [
    (pb.GenerateRequest(request_id="r"), "input is not set"),
    (pb.GenerateRequest(request_id="r", text=""), "text is empty"),
    (generate(""), "tokenized.input_ids is empty"),
    (generate("a", request_id=""), "request_id is empty"),
    (
        pb.GenerateRequest(request_id="r", tokenized=pb.TokenizedInput(input_ids=[0, 99])),
        r"tokenized.input_ids\[1\]=99",
    ),
    (generate("a" * 200), "max_model_len 128"),
    (generate("ab", max_tokens=127), "max_tokens 127"),
    (generate("ab", temperature=-1), "temperature"),
    (generate("ab", temperature=float("nan")), "temperature"),
    (generate("ab", top_p=1.5), "top_p"),
    (generate("ab", n=5000), "n must be"),
    (generate("ab", logprobs=-1), "logprobs must be"),
    (generate("ab", stop=[""]), "stop must not contain an empty string"),
    (generate("ab", stop_token_ids=[4_000_000_000]), "stop_token_ids"),
    (generate("ab", json_schema="{}"), "sampling_params.json_schema is not supported"),
    (generate("ab", json_object=True), "sampling_params.json_object is not supported"),
    (generate("ab", regex="a"), "sampling_params.regex is not supported"),
    (generate("ab", choice=pb.ChoiceConstraint(choices=["a"])), "sampling_params.choice"),
    (with_fields(mm_inputs=pb.MultimodalInputs()), "mm_inputs is not supported"),
    (with_fields(extra_mm_inputs=[pb.MultimodalInputs()]), "extra_mm_inputs is not supported"),
    (with_fields(media_refs=pb.MediaRefs()), "media_refs is not supported"),
    (with_fields(kv_transfer_params_json="{}"), "kv_transfer_params_json is not supported"),
    (with_fields(data_parallel_rank=1), "data_parallel_rank=1"),
]


def test_bad_requests_are_refused_by_name() -> None:
    async def test(client: Client) -> None:
        for request, words in BAD_REQUESTS:
            for request.stream in (False, True):
                error = await refused(client.stub.Generate(request))
                assert error.code() == STATUS.INVALID_ARGUMENT, words
                with pytest.raises(AssertionError, match=words):
                    raise AssertionError(error.details())
        _, completes = await collect(client.stub.Generate(generate("ab")))
        assert len(completes) == 1

    run(test)


def test_a_long_request_does_not_hold_up_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it is looked at on another thread."""
    threads: list[threading.Thread] = []
    convert = service.sampling_params_from_proto

    def watched(message: pb.SamplingParams, defaults: SamplingParams) -> SamplingParams:
        threads.append(threading.current_thread())
        return convert(message, defaults)

    monkeypatch.setattr(service, "sampling_params_from_proto", watched)

    async def test(client: Client) -> None:
        long = generate("a", logit_bias={token: 1.0 for token in range(10_000)})
        error = await refused(client.stub.Generate(long))
        assert error.code() == STATUS.INVALID_ARGUMENT
        await collect(client.stub.Generate(generate("a")))
        assert [thread is threading.main_thread() for thread in threads] == [False, True]

    run(test)


def test_a_full_queue() -> None:
    gate = Gate()

    async def test(client: Client) -> None:
        calls = [
            asyncio.ensure_future(
                collect(client.stub.Generate(generate("ab", request_id=f"{i}", max_tokens=2)))
            )
            for i in range(8)
        ]
        # Nothing moves: whoever has an answer is refused.
        await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED)
        gate.open(100)
        answers = await asyncio.gather(*calls, return_exceptions=True)
        errors = [answer for answer in answers if isinstance(answer, grpc.aio.AioRpcError)]
        assert 0 < len(errors) < 8
        for error in errors:
            assert error.code() == STATUS.RESOURCE_EXHAUSTED
            assert "retry-after-ms" in dict(error.trailing_metadata())

    run(test, gate, max_num_seqs=1, max_num_waiting=2)


def test_a_model_that_fails_fails_the_request() -> None:
    def fail() -> None:
        raise RuntimeError("out of luck")

    async def test(client: Client) -> None:
        for stream in (False, True):
            error = await refused(client.stub.Generate(generate("ab", stream=stream)))
            assert error.code() == STATUS.INTERNAL
            assert "out of luck" in (error.details() or "")

    run(test, fail)


def test_answers_that_no_message_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert, "MAX_MESSAGE_BYTES", 1000)

    async def test(client: Client) -> None:
        error = await refused(client.stub.Generate(generate("a" * 60, prompt_logprobs=5)))
        assert error.code() == STATUS.INVALID_ARGUMENT
        assert "prompt_logprobs=5 of 60 prompt tokens" in (error.details() or "")
        request = generate("ab", logprobs=20, max_tokens=50)
        error = await refused(client.stub.Generate(request))
        assert error.code() == STATUS.INVALID_ARGUMENT
        assert "logprobs=20: the answer" in (error.details() or "")
        request.stream = True
        _, completes = await collect(client.stub.Generate(request))
        assert len(completes[0].output_ids) == 50

    run(test)


def test_a_long_prompt_shows_that_it_is_being_worked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "_PATIENCE_SECONDS", 0.01)
    gate = Gate()

    async def test(client: Client) -> None:
        call = client.stub.Generate(generate("a" * 100, stream=True))
        gate.open()
        # While nothing moves nothing is said, and then once for each step that was made.
        responses = aiter(call)
        assert (await anext(responses)).chunk == pb.GenerateStreamChunk()
        gate.open(20)
        chunks, completes = await collect(responses)
        ids = [i for chunk in chunks for i in chunk.token_ids]
        assert ids == list(completes[0].output_ids) == [1, 2, 3, 4, 5]

    run(test, gate, max_num_batched_tokens=10)
