"""vllm.grpc.engine.VllmEngine over a real server with a fake model: what a gateway relies on."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import io
import json
import sys
import zipfile
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from fakes import EOS_ID, Gate, load_alphabet
from kv_index import Index
from smg_grpc_proto.generated import common_pb2 as common
from smg_grpc_proto.generated import vllm_engine_pb2 as pb
from smg_grpc_proto.generated import vllm_engine_pb2_grpc as pb_grpc
from waiting import PATIENCE, is_idle, until

from fastpage import AsyncEngine
from fastpage.engine.core import EngineDied
from fastpage.engine.loading import LoadedModel
from fastpage.serving.worker import convert, create_worker_service, service
from fastpage.serving.worker.loads import LoadMeter
from fastpage.serving.worker.service import VllmEngineService
from fastpage.serving.worker.tokenizer_archive import build_archive, split
from fastpage.tokenizer import Tokenizer

STATUS = grpc.StatusCode


class Client:
    def __init__(
        self, stub: pb_grpc.VllmEngineStub, engine: AsyncEngine, worker: VllmEngineService
    ) -> None:
        self.stub = stub
        self.engine = engine
        self.worker = worker

    async def wait_until_idle(self) -> None:
        await until(lambda: is_idle(self.engine.stats().scheduler), "requests are left over")

    async def wait_until_ended(self) -> None:
        """No request is known, whatever the step in progress still computes."""
        while (await self.stub.GetServerInfo(pb.GetServerInfoRequest())).active_requests:
            await asyncio.sleep(0.01)

    async def wait_until_running(self) -> None:
        await until(lambda: self.engine.stats().scheduler.num_running)

    def subscribe(self, start: int = 0, loads_first: bool = False) -> Any:
        request = common.SubscribeKvEventsRequest(
            start_sequence_number=start, load_records_before_first_batch=loads_first
        )
        return self.stub.SubscribeKvEvents(request)


@contextlib.asynccontextmanager
async def serve(loaded: LoadedModel) -> AsyncIterator[Client]:
    server = grpc.aio.server()
    worker = VllmEngineService(slow_client_timeout=PATIENCE)
    worker.register(server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    engine = AsyncEngine(loaded)
    worker.set_engine(engine)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        client = Client(pb_grpc.VllmEngineStub(channel), engine, worker)
        yield client
        worker.drain()
        await engine.shutdown()
        await server.stop(1)


def run(
    test: Callable[[Client], Coroutine[Any, Any, None]],
    before_step: Callable[[], None] | None = None,
    **options: Any,
) -> None:
    async def main() -> None:
        loaded = load_alphabet(before_step, enable_kv_events=True, **options)
        async with serve(loaded) as client:
            with Gate.opened_at_the_end(before_step):
                await asyncio.wait_for(test(client), timeout=PATIENCE)
                await client.wait_until_idle()

    asyncio.run(main())


def generate(text: str = "", request_id: str = "r", stream: bool = False, **sampling: Any) -> Any:
    sampling = {"temperature": 0.0, "max_tokens": 5, **sampling}
    return pb.GenerateRequest(
        request_id=request_id,
        tokenized=pb.TokenizedInput(
            original_text=text,
            input_ids=[" .".find(c) + 26 if c in " ." else ord(c) - 97 for c in text],
        ),
        sampling_params=pb.SamplingParams(**sampling),
        stream=stream,
    )


async def collect(call: Any) -> tuple[list[Any], list[Any]]:
    """The chunks and the completes of a call."""
    chunks, completes = [], []
    async for response in call:
        if response.WhichOneof("response") == "chunk":
            chunks.append(response.chunk)
        else:
            completes.append(response.complete)
    return chunks, completes


async def refused(call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        if hasattr(call, "__aiter__"):
            await collect(call)
        else:
            await call
    return error.value


# ---------------------------------------------------------------- Generate


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


# ---------------------------------------------------------------- the end of a request


def test_abort_ends_the_stream() -> None:
    gate = Gate()

    async def test(client: Client) -> None:
        for stream in (True, False):
            call = client.stub.Generate(generate("ab", n=2, stream=stream, max_tokens=100))
            responses = aiter(call)
            gate.open(2)
            if stream:
                await anext(responses)
            else:
                await client.wait_until_running()
            await client.stub.Abort(pb.AbortRequest(request_ids=["somebody else", "r"]))
            _, completes = await collect(responses)
            assert [c.finish_reason for c in completes] == ["abort", "abort"]
            assert await call.code() == STATUS.OK
            gate.open(5)
            await client.wait_until_idle()

    run(test, gate)


def test_an_abort_comes_while_the_prompt_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(client: Client) -> None:
        looked_at, go_on = asyncio.Event(), asyncio.Event()

        async def slowly(request: Any, call: Callable[..., Any], *args: Any) -> Any:
            looked_at.set()
            await go_on.wait()
            return call(*args)

        monkeypatch.setattr(service, "aside", slowly)
        call = client.stub.Generate(generate("ab", max_tokens=100))
        first = asyncio.ensure_future(collect(call))
        await looked_at.wait()
        error = await refused(client.stub.Generate(generate("ab")))
        assert error.code() == STATUS.ALREADY_EXISTS
        await client.stub.Abort(pb.AbortRequest(request_ids=["r"]))
        go_on.set()
        _, completes = await first
        assert [c.finish_reason for c in completes] == ["abort"]

    run(test)


def test_cancellation_and_deadlines_free_the_blocks() -> None:
    gate = Gate()

    async def test(client: Client) -> None:
        for stream in (True, False):
            call = client.stub.Generate(generate("ab", stream=stream, max_tokens=100))
            gate.open(1)
            await client.wait_until_running()
            error = await refused(client.stub.Generate(generate("ab")))
            assert error.code() == STATUS.ALREADY_EXISTS
            call.cancel()
            await client.wait_until_ended()
        call = client.stub.Generate(generate("ab", max_tokens=100), timeout=0.2)
        error = await refused(call)
        assert error.code() == STATUS.DEADLINE_EXCEEDED
        await client.wait_until_ended()
        # The step in progress is the last one.
        gate.open(2)
        await client.wait_until_idle()

    run(test, gate)


# ---------------------------------------------------------------- what it says of itself


def test_before_the_model_is_loaded() -> None:
    async def main() -> None:
        server = grpc.aio.server()
        VllmEngineService(slow_client_timeout=PATIENCE).register(server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            stub = pb_grpc.VllmEngineStub(channel)
            for call in (
                stub.HealthCheck(pb.HealthCheckRequest()),
                stub.GetModelInfo(pb.GetModelInfoRequest()),
                stub.GetServerInfo(pb.GetServerInfoRequest()),
                stub.GetLoads(pb.GetLoadsRequest()),
                stub.GetTokenizer(common.GetTokenizerRequest()),
                stub.SubscribeKvEvents(common.SubscribeKvEventsRequest()),
                stub.FlushCache(common.FlushCacheRequest()),
                stub.Abort(pb.AbortRequest()),
                stub.Generate(generate("a")),
            ):
                assert (await refused(call)).code() == STATUS.UNAVAILABLE
        await server.stop(0)

    asyncio.run(main())


def test_health_and_info() -> None:
    async def test(client: Client) -> None:
        health = await client.stub.HealthCheck(pb.HealthCheckRequest())
        assert health.healthy
        client.worker._defaults.temperature = 0.6
        client.engine.get_default_sampling_params = lambda: client.worker._defaults  # type: ignore
        model = await client.stub.GetModelInfo(pb.GetModelInfoRequest())
        assert (model.served_model_name, model.is_generation) == ("alphabet", True)
        assert (model.max_context_length, model.vocab_size) == (128, 29)
        assert list(model.eos_token_ids) == [EOS_ID]
        assert json.loads(model.default_sampling_params_json) == {"temperature": 0.6}
        server = await client.stub.GetServerInfo(pb.GetServerInfoRequest())
        assert (server.max_num_seqs, server.block_size, server.data_parallel_size) == (16, 4, 1)
        assert server.uptime_seconds > 0
        client.worker.drain()
        health = await client.stub.HealthCheck(pb.HealthCheckRequest())
        assert not health.healthy

    run(test)


def test_what_there_is_not() -> None:
    async def test(client: Client) -> None:
        for call in (
            client.stub.Embed(pb.EmbedRequest(request_id="r")),
            client.stub.StartProfile(common.StartProfileRequest()),
            client.stub.StopProfile(common.StopProfileRequest()),
        ):
            assert (await refused(call)).code() == STATUS.UNIMPLEMENTED

    run(test)


def test_loads_count_what_cannot_be_evicted() -> None:
    gate = Gate()

    async def test(client: Client) -> None:
        async def load() -> Any:
            response = await client.stub.GetLoads(pb.GetLoadsRequest())
            assert response.dp_rank_count == len(response.loads) == 1
            return response.loads[0]

        assert (await load()).max_total_num_tokens == 16 * 4
        calls = [
            client.stub.Generate(generate("abcdefghij", request_id=f"{i}", max_tokens=6))
            for i in range(3)
        ]
        gate.open(1)
        reading = [asyncio.ensure_future(collect(call)) for call in calls]
        while (await load()).num_running_reqs != 1 or (await load()).num_waiting_reqs != 2:
            await asyncio.sleep(0.01)
        busy = await load()
        assert busy.num_total_reqs == 3
        assert busy.max_running_requests == 1
        assert busy.num_used_tokens == 12
        assert busy.token_usage == pytest.approx(3 / 16)
        assert busy.num_waiting_uncached_tokens > 0
        gate.open(100)
        await asyncio.gather(*reading)
        idle = await load()
        assert (idle.num_total_reqs, idle.token_usage, idle.num_used_tokens) == (0, 0, 0)
        assert idle.cache_hit_rate > 0
        assert idle.gen_throughput > 0

    run(test, gate, num_blocks=16, max_num_seqs=1, max_model_len=32)


def test_rates_are_of_the_last_seconds() -> None:
    now = 100.0
    scheduler = SimpleNamespace(
        num_running=0,
        num_waiting=0,
        num_blocks=10,
        num_free_blocks=10,
        prefix_cache_queries=0,
        prefix_cache_hits=0,
    )
    stats = SimpleNamespace(scheduler=scheduler, num_generated_tokens=0)
    info = SimpleNamespace(block_size=4, max_num_seqs=2)
    engine: Any = SimpleNamespace(stats=lambda: stats, info=info, add_observer=lambda _: None)
    meter = LoadMeter(engine, clock=lambda: now)
    assert meter.read().gen_throughput == 0
    for _ in range(60):
        now += 1
        stats.num_generated_tokens += 50
        scheduler.prefix_cache_queries += 10
        scheduler.prefix_cache_hits += 5
        load = meter.read()
        assert load.gen_throughput == pytest.approx(50)
        assert load.cache_hit_rate == pytest.approx(0.5)
    for _ in range(12):
        now += 1
        load = meter.read()
    assert load.gen_throughput == 0
    # An engine that was started again counts from 0.
    now += 1
    stats.num_generated_tokens = 7
    assert meter.read().gen_throughput >= 0


def test_without_its_messages_there_is_no_worker(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert create_worker_service() is not None
    # As if it did not go with the grpcio that is there.
    monkeypatch.setitem(sys.modules, "fastpage.serving.worker.service", None)
    assert create_worker_service() is None
    assert "is not served: smg-grpc-proto" in caplog.text
    # As if it were not there.
    caplog.clear()
    monkeypatch.setitem(sys.modules, "smg_grpc_proto", None)
    assert create_worker_service() is None
    assert caplog.text == ""


# ---------------------------------------------------------------- the tokenizer


def unpack(chunks: Iterable[common.GetTokenizerChunk], path: Path) -> Tokenizer:
    *first, last = chunks
    assert all(len(chunk.data) == 64 << 10 and not chunk.sha256 for chunk in first)
    data = b"".join(chunk.data for chunk in (*first, last))
    assert hashlib.sha256(data).hexdigest() == last.sha256
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        assert len(archive.namelist()) <= 50
        archive.extractall(path)
    return Tokenizer.from_directory(path)


def test_get_tokenizer(tmp_path: Path) -> None:
    async def test(client: Client) -> None:
        calls = [client.stub.GetTokenizer(common.GetTokenizerRequest()) for _ in range(2)]
        for i, call in enumerate(calls):
            tokenizer = unpack([chunk async for chunk in call], tmp_path / str(i))
            assert tokenizer.encode("abc.") == client.engine.tokenizer.encode("abc.")
            assert tokenizer.chat_template == client.engine.tokenizer.chat_template
            assert tokenizer.eos_token_ids == [EOS_ID]

    run(test)


def test_the_tokenizer_of_a_gguf_file_as_an_archive(smollm2_gguf: Path, tmp_path: Path) -> None:
    from fastpage.checkpoints import open_checkpoint

    own = open_checkpoint(str(smollm2_gguf)).tokenizer()
    archive = build_archive(own)
    assert archive == build_archive(own)
    chunks = list(split(archive))
    assert len(chunks) > 2
    copy = unpack(chunks, tmp_path)
    assert copy.special_tokens == own.special_tokens
    assert copy.eos_token_ids == own.eos_token_ids
    texts = [
        "Hello, 12345 worlds!\n\n  tabs\tand  spaces ",
        "naïve café Ωμέγα 你好 \U0001f600 \u200d",
        "<|im_start|>user\nhi<|im_end|>\n",
        "def f(x):\n    return x ** 2  # 3.14\r\n",
    ]
    messages = [{"role": "user", "content": "Hi"}]
    texts.append(own.apply_chat_template(messages))
    assert copy.apply_chat_template(messages) == texts[-1]
    for text in texts:
        assert copy.encode(text) == own.encode(text)
        ids = own.encode(text)
        assert copy.decode(ids) == own.decode(ids)


# ---------------------------------------------------------------- the cache


async def read_batches(call: Any, number: int) -> list[common.KvEventBatch]:
    """That many with events in them."""
    batches: list[common.KvEventBatch] = []
    while len(batches) < number:
        batch = await call.read()
        assert batch is not grpc.aio.EOF
        if batch.load.load_only:
            assert not batch.events
        else:
            batches.append(batch)
    return batches


def test_kv_events_tell_what_is_cached() -> None:
    async def test(client: Client) -> None:
        call = client.subscribe()
        # Headers at once, though there is nothing to say.
        await call.initial_metadata()
        await collect(client.stub.Generate(generate("abcdefghijkl", max_tokens=2)))
        (first,) = await read_batches(call, 1)
        assert not first.HasField("snapshot")
        assert first.load.max_running_requests == 16
        index = Index()
        index.apply(first)
        assert index.prompts() == {tuple(range(4)), tuple(range(8)), tuple(range(12))}
        (stored,) = [event.stored for event in first.events]
        assert [len(stored.blocks), stored.HasField("parent_block_hash")] == [3, False]

        await collect(client.stub.Generate(generate("abcdzzzz", max_tokens=1)))
        (second,) = await read_batches(call, 1)
        assert second.sequence_number == first.sequence_number + 1
        (stored,) = [event.stored for event in second.events]
        assert stored.parent_block_hash == first.events[0].stored.blocks[0].block_hash
        call.cancel()

        # Who comes back gets what came after; who comes late the state as it is.
        again = client.subscribe(first.sequence_number)
        assert [b.events for b in await read_batches(again, 1)] == [second.events]
        again.cancel()
        late = client.subscribe()
        (snapshot,) = await read_batches(late, 1)
        assert (snapshot.snapshot.index, snapshot.snapshot.count) == (0, 1)
        assert snapshot.snapshot.blocks == 4
        assert snapshot.sequence_number == second.sequence_number
        index.apply(second)
        other = Index()
        other.apply(snapshot)
        assert other.prompts() == index.prompts()

        assert (await client.stub.FlushCache(common.FlushCacheRequest())).success
        await collect(client.stub.Generate(generate("a", max_tokens=1)))
        (cleared,) = await read_batches(late, 1)
        assert cleared.sequence_number == second.sequence_number + 1
        other.apply(cleared)
        assert other.prompts() == set()
        late.cancel()

        for cursor in (1, cleared.sequence_number + 1, 2**64 - 1):
            error = await refused(client.subscribe(cursor))
            assert error.code() == STATUS.OUT_OF_RANGE

    run(test)


def test_evictions_are_told() -> None:
    async def test(client: Client) -> None:
        call = client.subscribe()
        index = Index()
        letters = "abcdefghijklmnopqrstuvwxyz"
        for i in range(12):
            await collect(client.stub.Generate(generate(letters[i : i + 12], max_tokens=1)))
            for batch in await read_batches(call, 1):
                index.apply(batch)
            assert len(index.blocks) <= 8
        assert tuple(range(11, 23)) in index.prompts()
        assert tuple(range(4)) not in index.prompts()
        call.cancel()

    run(test, num_blocks=8, max_model_len=32)


def test_loads_are_pushed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "_SECONDS_BETWEEN_LOADS", 0.01)
    monkeypatch.setattr(service, "_HEARTBEAT_SECONDS", 0.05)
    gate = Gate()

    async def test(client: Client) -> None:
        call = client.subscribe(loads_first=True)
        records = [await call.read() for _ in range(3)]
        assert all(r.load.load_only and r.sequence_number == 0 for r in records)
        assert [r.load.sample for r in records] == [1, 2, 3]
        # It is not for everybody to hear before there was a batch.
        other = client.subscribe()

        generating = client.stub.Generate(generate("abcdefgh", max_tokens=3))
        collecting = asyncio.ensure_future(collect(generating))
        gate.open(1)
        while not (record := await call.read()).load.running_requests:
            pass
        assert record.load.token_usage == record.load.active_token_usage > 0
        batch = await other.read()
        assert batch.events and not batch.load.load_only
        gate.open(20)
        await collecting
        for stream in (call, other):
            record = await stream.read()
            while record.load.running_requests or not record.load.load_only:
                record = await stream.read()
            assert record.sequence_number == batch.sequence_number
            assert record.load.token_usage == 0

        # The streams end with the server, and no new one begins.
        client.worker.drain()
        for stream in (call, other):
            while await stream.read() is not grpc.aio.EOF:
                pass
            assert await stream.code() == STATUS.OK
        assert (await refused(client.subscribe())).code() == STATUS.UNAVAILABLE

    run(test, gate)


def test_flush_waits_as_long_as_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(client: Client) -> None:
        tries = 0

        async def busy_at_first() -> bool:
            nonlocal tries
            tries += 1
            return tries > 2

        monkeypatch.setattr(client.engine, "reset_prefix_cache", busy_at_first)
        answer = await client.stub.FlushCache(common.FlushCacheRequest())
        assert not answer.success and "in progress" in answer.message
        assert (await client.stub.FlushCache(common.FlushCacheRequest(timeout_s=30))).success
        assert tries == 3
        for seconds in (-1.0, float("nan"), float("inf")):
            request = common.FlushCacheRequest(timeout_s=seconds)
            error = await refused(client.stub.FlushCache(request))
            assert error.code() == STATUS.INVALID_ARGUMENT

    run(test)


def test_an_engine_that_dies_meanwhile_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    async def dies() -> bool:
        raise EngineDied("its process has ended")

    async def test(client: Client) -> None:
        monkeypatch.setattr(client.engine, "reset_prefix_cache", dies)
        error = await refused(client.stub.FlushCache(common.FlushCacheRequest()))
        assert (error.code(), error.details()) == (STATUS.UNAVAILABLE, "its process has ended")

    run(test)


def test_a_tokenizer_archive_that_fails_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(tokenizer: Tokenizer) -> bytes:
        raise MemoryError

    async def test(client: Client) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(service, "build_archive", fails)
            error = await refused(client.stub.GetTokenizer(common.GetTokenizerRequest()))
            assert (error.code(), error.details()) == (STATUS.INTERNAL, "MemoryError")
        chunks = [c async for c in client.stub.GetTokenizer(common.GetTokenizerRequest())]
        assert chunks[-1].sha256

    run(test)
