"""The gRPC service, in this process with a fake model."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import NoReturn

import grpc
import pytest
import raw_http2 as h2
from fakes import EOS_ID, Gate, load_alphabet
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_harness import (
    NOT_SERVING,
    SERVING,
    Client,
    collect,
    run,
    serve,
    text_request,
)
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)
from waiting import PATIENCE, until

from fastpage import LLM, AsyncEngine, SamplingParams
from fastpage.serving.grpc.server import GrpcServer
from fastpage.serving.grpc.service import FastpageService
from fastpage.v1 import fastpage_pb2 as pb

# ---------------------------------------------------------------- with the alphabet


def test_generate_from_text_and_from_tokens() -> None:
    async def test(client: Client) -> None:
        texts, ids, responses = await collect(client.stub.Generate(text_request("abc")))
        assert (texts, ids) == ({0: "defgh"}, {0: [3, 4, 5, 6, 7]})
        last = responses[-1]
        assert last.outputs[0].finish_reason == pb.FINISH_REASON_LENGTH
        assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (3, 5)
        assert not any(response.HasField("usage") for response in responses[:-1])
        assert len({response.request_id for response in responses}) == 1

        request = pb.GenerateRequest(
            token_ids=pb.TokenIds(ids=[0]),
            sampling_params=pb.SamplingParams(temperature=0, max_tokens=2),
            output_kind=pb.OUTPUT_KIND_FINAL_ONLY,
        )
        texts, _, responses = await collect(client.stub.Generate(request))
        assert (texts, len(responses)) == ({0: "bc"}, 1)

    run(test)


def test_without_max_tokens_the_model_decides() -> None:
    async def test(client: Client) -> None:
        request = pb.GenerateRequest(text="a", sampling_params=pb.SamplingParams(temperature=0))
        _, ids, responses = await collect(client.stub.Generate(request))
        assert len(ids[0]) == 127
        assert responses[-1].outputs[0].finish_reason == pb.FINISH_REASON_LENGTH

    run(test)


def test_stop_reasons() -> None:
    async def test(client: Client) -> None:
        texts, _, responses = await collect(
            client.stub.Generate(text_request("a", stop=["ef"], max_tokens=50))
        )
        end = responses[-1].outputs[0]
        assert texts == {0: "bcd"}
        assert (end.finish_reason, end.stop_string) == (pb.FINISH_REASON_STOP, "ef")

        _, ids, responses = await collect(
            client.stub.Generate(text_request("a", stop_token_ids=[3], max_tokens=50))
        )
        end = responses[-1].outputs[0]
        assert ids == {0: [1, 2, 3]}
        assert (end.finish_reason, end.stop_token_id) == (pb.FINISH_REASON_STOP, 3)

        _, ids, responses = await collect(client.stub.Generate(text_request(".")))
        end = responses[-1].outputs[0]
        assert ids == {0: [EOS_ID]}
        assert end.finish_reason == pb.FINISH_REASON_STOP
        assert end.WhichOneof("stop_reason") is None

    run(test)


def test_samples_and_logprobs() -> None:
    async def test(client: Client) -> None:
        request = text_request("ab", n=3, temperature=2.0, seed=5, logprobs=2, prompt_logprobs=0)
        _, ids, responses = await collect(client.stub.Generate(request))
        assert sorted(ids) == [0, 1, 2]
        for response in responses:
            for delta in response.outputs:
                assert [p.tokens[0].token_id for p in delta.logprobs] == list(delta.token_ids)
        prompt = [p for response in responses for p in response.prompt_logprobs]
        assert [p.tokens[0].token_id for p in prompt] == [1]
        assert prompt[0].tokens[0].text == "b"

    run(test)


def test_best_of_and_beams() -> None:
    async def test(client: Client) -> None:
        options = {"n": 2, "best_of": 4, "temperature": 3.0, "seed": 5, "ignore_eos": True}
        request = text_request("ab", max_tokens=6, **options)
        _, ids, responses = await collect(client.stub.Generate(request))
        assert len(responses) == 1
        first, second = responses[0].outputs
        assert (first.index, second.index) == (0, 1)
        assert first.cumulative_logprob > second.cumulative_logprob
        assert not first.HasField("score")
        assert len(ids[0]) == len(ids[1]) == 6
        assert responses[0].usage.prompt_tokens == 2
        assert responses[0].usage.completion_tokens == 12
        assert (await client.stats()).num_computed_tokens == 2 + 4 * 5

        options = {"n": 3, "beam_width": 3, "length_penalty": 2.0, "max_tokens": 6}
        for early_stopping in (pb.EARLY_STOPPING_NO, pb.EARLY_STOPPING_YES, None):
            request = text_request("ab", early_stopping=early_stopping, **options)
            texts, _, responses = await collect(client.stub.Generate(request))
            assert texts[0] == "cdefgh"
            assert len(responses) == 1
            scores = [delta.score for delta in responses[0].outputs]
            assert scores == sorted(scores, reverse=True)
            delta = responses[0].outputs[0]
            assert delta.score == pytest.approx(delta.cumulative_logprob / 6**2)

        _, _, responses = await collect(client.stub.Generate(text_request("ab", logprobs=0)))
        assert responses[-1].outputs[0].cumulative_logprob < 0
        _, _, responses = await collect(client.stub.Generate(text_request("ab")))
        assert not responses[-1].outputs[0].HasField("cumulative_logprob")

        for bad, words in (
            ({"best_of": 1, "n": 2}, "best_of"),
            ({"beam_width": 2, "temperature": 0.5}, "temperature"),
            ({"beam_width": 2, "early_stopping": 9}, "early_stopping=9"),
            ({"best_of": 2, "temperature": 1.0, "stop": ["a"]}, "stop does not go with best_of"),
        ):
            with pytest.raises(grpc.aio.AioRpcError, match=words) as error:
                await collect(client.stub.Generate(text_request("ab", **bad)))
            assert error.value.code() == grpc.StatusCode.INVALID_ARGUMENT

    run(test)


def test_chat_and_cached_tokens() -> None:
    async def test(client: Client) -> None:
        request = pb.ChatRequest(
            messages=[
                pb.ChatMessage(role="system", content="abcdefgh"),
                pb.ChatMessage(role="user", content="ij"),
            ],
            sampling_params=pb.SamplingParams(temperature=0, max_tokens=3),
        )
        for cached in (0, 8):
            texts, _, responses = await collect(client.stub.Chat(request))
            assert texts == {0: "klm"}
            assert responses[-1].usage.cached_tokens == cached
        request.cache_salt = "another tenant"
        _, _, responses = await collect(client.stub.Chat(request))
        assert responses[-1].usage.cached_tokens == 0

    run(test)


def test_a_cancelled_call_frees_its_blocks() -> None:
    gate = Gate()

    async def test(client: Client) -> None:
        call = client.stub.Generate(text_request("a", max_tokens=120))
        gate.open(2)
        await call.read()
        assert (await client.stats()).num_running == 1
        call.cancel()
        await until(lambda: not client.engine._streams)
        # The step that was in progress, and no other one.
        gate.open()
        await client.wait_until_idle()

    run(test, before_step=gate)


def test_abort() -> None:
    gate = Gate()

    async def test(client: Client) -> None:
        request = text_request("a", max_tokens=100)
        request.request_id = "r7"
        call = client.stub.Generate(request)
        gate.open()
        first = await call.read()
        assert first.request_id == "r7"
        again = client.stub.Generate(request)
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await again.read()
        assert error.value.code() == grpc.StatusCode.ALREADY_EXISTS

        assert (await client.stub.Abort(pb.AbortRequest(request_id="r7"))).found
        last = await call.read()
        assert last.outputs[0].finish_reason == pb.FINISH_REASON_ABORT
        assert last.HasField("usage")
        assert await call.read() is grpc.aio.EOF
        assert not (await client.stub.Abort(pb.AbortRequest(request_id="r7"))).found
        gate.open(100)

    run(test, before_step=gate)


def test_model_info_stats_and_reflection() -> None:
    async def test(client: Client) -> None:
        info = await client.stub.GetModelInfo(pb.GetModelInfoRequest())
        assert (info.model, info.vocab_size, info.max_model_len) == ("alphabet", 29, 128)
        assert info.default_sampling_params.temperature == 1.0

        await collect(client.stub.Generate(text_request("abcdefgh")))
        stats = await client.stats()
        assert (stats.kv_blocks_total, stats.kv_block_size) == (256, 4)
        assert stats.num_generated_tokens == 5
        assert stats.num_computed_tokens == 12
        assert stats.kv_blocks_used_peak >= 3
        assert stats.prefix_cache_queries > 0
        assert stats.num_draft_tokens == stats.num_accepted_tokens == 0
        assert stats.host_blocks_total == stats.num_preemptions == 0

        def look_up() -> tuple[list[str], list[str]]:
            with grpc.insecure_channel(client.address) as channel:
                database = ProtoReflectionDescriptorDatabase(channel)
                service = DescriptorPool(database).FindServiceByName("fastpage.v1.Fastpage")
                return list(database.get_services()), [m.name for m in service.methods]

        services, methods = await asyncio.to_thread(look_up)
        assert {"fastpage.v1.Fastpage", "grpc.health.v1.Health"} <= set(services)
        assert "Generate" in methods

    run(test)


def test_stats_of_preemptions_swaps_copies_and_proposals() -> None:
    async def test(client: Client) -> None:
        request = text_request("abc", n=4, temperature=1.0, seed=1, max_tokens=20)
        await collect(client.stub.Generate(request))
        alphabet = "abcdefghijklmnopqrstuvwxyz" * 2
        requests = [text_request(alphabet[i : i + 31], max_tokens=16) for i in range(4)]
        await asyncio.gather(*(collect(client.stub.Generate(r)) for r in requests))
        stats = await client.stats()
        assert stats.num_blocks_copied == 3
        assert 0 < stats.num_accepted_tokens <= stats.num_draft_tokens
        assert stats.host_blocks_total == 64
        assert stats.num_preemptions >= stats.num_preemptions_swap
        assert stats.num_preemptions > 0
        assert stats.preempted_cache_queries >= stats.preempted_cache_hits
        assert stats.num_blocks_swapped_out > 0
        assert stats.host_blocks_cached > 0

    options = {"num_speculative_tokens": 3, "num_host_blocks": 64, "swap_cost_per_block": 0.1}
    run(test, num_blocks=15, max_model_len=60, **options)


def test_not_ready_before_the_model_is_loaded_nor_after_stop() -> None:
    gate = Gate()

    async def main() -> None:
        server = GrpcServer([FastpageService()])
        client = Client(await server.start())
        assert await client.status() == NOT_SERVING
        for call in (
            client.stub.Generate(text_request("a")).read(),
            client.stub.GetModelInfo(pb.GetModelInfoRequest()),
            client.stub.Abort(pb.AbortRequest(request_id="x")),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await call
            assert error.value.code() == grpc.StatusCode.UNAVAILABLE

        watch = client.health.Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == NOT_SERVING
        engine = AsyncEngine(load_alphabet(gate))
        await server.set_engine(engine)
        assert (await watch.read()).status == SERVING

        call = client.stub.Generate(text_request("a", max_tokens=100))
        gate.open()
        await call.read()
        await server.drain()
        assert (await watch.read()).status == NOT_SERVING
        stopping = asyncio.create_task(engine.shutdown())
        await until(lambda: not engine._streams)
        gate.open(100)
        await stopping
        with pytest.raises(grpc.aio.AioRpcError) as error:
            while await call.read() is not grpc.aio.EOF:
                pass
        assert error.value.code() == grpc.StatusCode.UNAVAILABLE
        await server.stop(0)
        await client.channel.close()

    asyncio.run(asyncio.wait_for(main(), timeout=PATIENCE))


def test_a_watch_that_nobody_reads_holds_up_nobody() -> None:
    async def main() -> None:
        server = GrpcServer([FastpageService()])
        address = await server.start()
        with h2.connect(address) as connection:
            call = h2.call_headers("/grpc.health.v1.Health/Watch", 1) + h2.call_message(b"", 1)
            connection.sendall(h2.PREFACE + h2.settings(initial_window_size=0) + call)
            kind = None
            while kind != h2.HEADERS:  # those of the answer, whose message has no room
                kind, _, _ = await asyncio.to_thread(h2.read_frame, connection)

            client = Client(address)
            watch = client.health.Watch(health_pb2.HealthCheckRequest())
            assert (await watch.read()).status == NOT_SERVING
            engine = AsyncEngine(load_alphabet())
            await server.set_engine(engine)
            assert (await watch.read()).status == await client.status() == SERVING
            await server.drain()
            assert (await watch.read()).status == await client.status() == NOT_SERVING
            await engine.shutdown()
            await server.stop(0)
            await client.channel.close()

    asyncio.run(asyncio.wait_for(main(), timeout=PATIENCE))


def test_health_of_names() -> None:
    async def test(client: Client) -> None:
        for name in ("", "fastpage.v1.Fastpage"):
            request = health_pb2.HealthCheckRequest(service=name)
            assert (await client.health.Check(request)).status == SERVING
            assert (await client.health.Watch(request).read()).status == SERVING
        unknown = health_pb2.HealthCheckRequest(service="nobody")
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await client.health.Check(unknown)
        assert error.value.code() == grpc.StatusCode.NOT_FOUND
        watch = client.health.Watch(unknown)
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN

    run(test)


def test_a_watch_that_begins_as_the_server_stops_is_ended() -> None:
    class Context:
        async def write(self, message: object) -> None:
            raise AssertionError("nothing is to be written")

        async def abort(self, code: grpc.StatusCode, details: str) -> NoReturn:
            raise grpc.aio.AbortError(f"{code.name}: {details}")

    async def main() -> None:
        server = GrpcServer([FastpageService()])
        await server.start()
        await server.stop(0)
        with pytest.raises(grpc.aio.AbortError, match="UNAVAILABLE: the server is shutting down"):
            await server._health.Watch(health_pb2.HealthCheckRequest(), Context())

    asyncio.run(asyncio.wait_for(main(), timeout=PATIENCE))


# ---------------------------------------------------------------- with the real model


def test_64_clients_of_which_a_quarter_cancels(smollm2_gguf: Path) -> None:
    text = "The quick brown fox jumps over the lazy dog near the bank of the river"
    prompts = [text[i % 5 : i % 5 + 12 + 5 * (i % 9)] for i in range(64)]
    lengths = [4 + 5 * i % 17 for i in range(64)]
    llm = LLM(str(smollm2_gguf), max_model_len=256, max_num_seqs=24, num_kv_blocks=100)
    params = [
        SamplingParams(temperature=0.8, seed=i, max_tokens=length, ignore_eos=True)
        for i, length in enumerate(lengths)
    ]
    expected = [out.outputs[0] for out in llm.generate(prompts, params, use_tqdm=False)]

    async def one(client: Client, i: int) -> None:
        await asyncio.sleep(i % 8 * 0.02)
        request = text_request(
            prompts[i], temperature=0.8, seed=i, max_tokens=lengths[i], ignore_eos=True
        )
        call = client.stub.Generate(request)
        if i % 4 == 0:
            for _ in range(lengths[i] // 2):
                await call.read()
            call.cancel()
            return
        texts, ids, responses = await collect(call)
        assert ids[0] == list(expected[i].token_ids)
        assert texts[0] == expected[i].text
        assert responses[-1].usage.completion_tokens == lengths[i]

    async def main() -> None:
        async with serve(llm._loaded) as client:
            await asyncio.gather(*(one(client, i) for i in range(64)))

    asyncio.run(asyncio.wait_for(main(), timeout=300))
    llm._core.check_integrity()


def test_clients_may_ping_without_a_call() -> None:
    """By default grpc hangs up after three pings within five minutes."""

    def ping(address: str) -> None:
        with h2.connect(address) as connection:
            connection.settimeout(PATIENCE)
            connection.sendall(h2.PREFACE + h2.settings())
            for i in range(10):
                connection.sendall(h2.frame(h2.PING, 0, 0, i.to_bytes(8, "big")))
                kind, flags, payload = h2.read_frame(connection)
                while (kind, flags) != (h2.PING, h2.ACK):
                    assert kind != h2.GOAWAY, payload
                    kind, flags, payload = h2.read_frame(connection)
                assert payload == i.to_bytes(8, "big")

    async def test(client: Client) -> None:
        await asyncio.to_thread(ping, client.address)

    run(test)
