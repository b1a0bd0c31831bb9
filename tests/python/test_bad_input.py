"""What cannot be served is refused in one line that names it, and costs nobody else anything."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from fakes import load_alphabet
from grpc_harness import collect, serve, text_request
from waiting import PATIENCE

from fastpage import LLM, SamplingParams
from fastpage.engine.args import EngineArgs, parse_cpus
from fastpage.errors import InvalidArgument, ModelError, ResourceExhausted
from fastpage.v1 import fastpage_pb2 as pb

# ---------------------------------------------------------------- the command line


def serve_command(*options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "fastpage.serving.grpc.cli", *options],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )


def refuse(result: subprocess.CompletedProcess[str], code: int, *words: str) -> None:
    assert result.returncode == code, result.stderr
    assert result.stderr.startswith("fastpage-grpc: error: ")
    assert result.stderr.count("\n") == 1, result.stderr
    for word in words:
        assert word in result.stderr


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], ["--model"]),
        (["--model"], ["--model"]),
        (["--model", "x", "--no-such-option"], ["--no-such-option"]),
        (["--model", "x", "--dtype", "int3"], ["--dtype", "int3"]),
        (["--model", "x", "--port", "99999"], ["--port", "99999"]),
        (["--model", "x", "--block-size", "0"], ["block_size=0"]),
        (["--model", "x", "--max-num-seqs", "-4"], ["max_num_seqs=-4"]),
        (["--model", "x", "--max-num-seqs", "many"], ["--max-num-seqs", "many"]),
        (["--model", "x", "--kv-cache-memory", "plenty"], ["kv_cache_memory", "plenty"]),
        (["--model", "x", "--kv-cache-memory", "9" * 400], ["kv_cache_memory"]),
        (["--model", "x", "--kv-cache-memory", "0.5"], ["kv_cache_memory", "0.5"]),
    ],
)
def test_options(options: list[str], words: list[str]) -> None:
    refuse(serve_command(*options), 2, *words)


def test_help_and_version() -> None:
    result = serve_command("--help")
    assert result.returncode == 0
    assert max(map(len, result.stdout.splitlines())) <= 80
    for words in ("--kv-cache-memory", "Memory and batching", "50051"):
        assert words in result.stdout
    assert serve_command("--version").stdout.startswith("fastpage ")


@pytest.mark.parametrize("model", ["/no/such/model.gguf", "no-such-model.gguf", "/no/such/dir"])
def test_unknown_model(model: str) -> None:
    refuse(serve_command("--port", "0", "--model", model), 1, model)


def test_unsupported_architecture(tmp_path: Path) -> None:
    write_model(tmp_path, {"architectures": ["MambaForCausalLM"], "model_type": "mamba"})
    refuse(serve_command("--port", "0", "--model", str(tmp_path)), 1, "MambaForCausalLM")


def test_broken_files(tmp_path: Path, smollm2_gguf: Path) -> None:
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(smollm2_gguf.read_bytes()[: 8 << 20])
    refuse(serve_command("--port", "0", "--model", str(cut)), 1, "cut.gguf")
    noise = tmp_path / "noise.gguf"
    noise.write_bytes(np.random.default_rng(0).bytes(4096))
    refuse(serve_command("--port", "0", "--model", str(noise)), 1, "noise.gguf")


def test_demo_without_a_model_that_can_be_served(tmp_path: Path) -> None:
    model = tmp_path / "broken.gguf"
    model.write_bytes(b"junk")
    demo = Path(__file__).parents[2] / "examples" / "demo.py"
    done = subprocess.run(
        [sys.executable, str(demo), str(model)], capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 1
    assert done.stderr.count("\n") == 2
    assert "broken.gguf" in done.stderr and "did not become ready" in done.stderr


def test_port_in_use(smollm2_gguf: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        result = serve_command("--port", port, "--model", str(smollm2_gguf))
    refuse(result, 1, f"127.0.0.1:{port}", "address already in use")


def test_host_that_is_not_ours(smollm2_gguf: Path) -> None:
    options = ("--host", "203.0.113.7", "--port", "0", "--model", str(smollm2_gguf))
    refuse(serve_command(*options), 1, "203.0.113.7:0")


def test_more_memory_than_there_is(smollm2_gguf: Path) -> None:
    result = serve_command(
        "--model", str(smollm2_gguf), "--port", "0", "--kv-cache-memory", "900TB"
    )
    refuse(result, 1, "KV cache", "available")


def test_ctrl_c_before_the_server_listens() -> None:
    interrupted = (
        "import signal, sys; from fastpage.serving import lifecycle; sys.argv = ['fastpage-grpc'];"
        "lifecycle._seconds_since_process_start = lambda: signal.raise_signal(signal.SIGINT);"
        "from fastpage.serving.grpc import cli; cli.main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", interrupted], capture_output=True, timeout=PATIENCE
    )
    assert (done.returncode, done.stderr) == (-signal.SIGINT, b"")


def test_too_little_memory_for_one_sequence(smollm2_gguf: Path) -> None:
    options = ("--kv-cache-memory", "1MiB", "--dtype", "bfloat16", "--max-model-len", "2048")
    result = serve_command("--port", "0", "--model", str(smollm2_gguf), *options)
    # 30 layers, keys and values, 3 heads of 64, 2 bytes: 23,040 bytes a token.
    refuse(result, 1, "kv_cache_memory=1MiB", "max_model_len=2048", str(23040 * 2048))


def write_model(folder: Path, config: dict[str, Any]) -> None:
    """A safetensors checkpoint with one tensor that nobody needs."""
    (folder / "config.json").write_text(json.dumps(config))
    header = {"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))


# ---------------------------------------------------------------- gRPC

BAD_SAMPLING = [
    ({"temperature": -1.0}, "temperature"),
    ({"temperature": float("nan")}, "temperature"),
    ({"temperature": float("inf")}, "temperature"),
    ({"top_p": 0.0}, "top_p"),
    ({"top_p": 1.5}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"min_p": 2.0}, "min_p"),
    ({"repetition_penalty": 0.0}, "repetition_penalty"),
    ({"presence_penalty": 3.0}, "presence_penalty"),
    ({"frequency_penalty": -3.0}, "frequency_penalty"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": 10**9}, "prompt 3 + max_tokens"),
    ({"min_tokens": -1}, "min_tokens"),
    ({"min_tokens": 9, "max_tokens": 3}, "min_tokens"),
    ({"n": 0}, "n "),
    ({"n": 10**9}, "n "),
    ({"logprobs": -5}, "logprobs"),
    ({"logprobs": 10**6}, "logprobs"),
    ({"stop": [""]}, "stop"),
    ({"stop_token_ids": [29]}, "stop_token_ids"),
    ({"allowed_token_ids": [-1]}, "allowed_token_ids"),
    ({"logit_bias": {99: 1.0}}, "logit_bias"),
    ({"logit_bias": {1: float("nan")}}, "logit_bias"),
]


def with_unknown_field(message: Any) -> Any:
    """As a client with a newer protocol would send it: field 999, a varint."""
    message.MergeFromString(b"\xb8\x3e\x01")
    return message


def bad_requests() -> list[tuple[Any, grpc.StatusCode, str]]:
    invalid = grpc.StatusCode.INVALID_ARGUMENT
    cases: list[tuple[Any, grpc.StatusCode, str]] = [
        (text_request("abc", **sampling), invalid, name) for sampling, name in BAD_SAMPLING
    ]
    prompts: list[tuple[dict[str, Any], str]] = [
        ({}, "prompt"),
        ({"text": ""}, "text"),
        ({"text": "a" * 200}, "prompt"),
        ({"token_ids": pb.TokenIds()}, "token_ids is empty"),
        ({"token_ids": pb.TokenIds(ids=[1, 29])}, "token_ids[1]=29"),
        ({"token_ids": pb.TokenIds(ids=[-1])}, "token_ids[0]=-1"),
        ({"text": "a", "priority": 3}, "priority"),
        ({"text": "a", "output_kind": 7}, "output_kind"),
    ]
    cases += [(pb.GenerateRequest(**fields), invalid, name) for fields, name in prompts]
    nested = text_request("abc")
    with_unknown_field(nested.sampling_params)
    message = pb.ChatMessage(role="user", content="a")
    return [
        *cases,
        (with_unknown_field(text_request("abc")), invalid, "request has field number 999"),
        (nested, invalid, "sampling_params has field number 999"),
        (pb.GenerateRequest(text="a", model="gpt"), grpc.StatusCode.NOT_FOUND, "model 'gpt'"),
        (pb.ChatRequest(), invalid, "messages"),
        (pb.ChatRequest(messages=[message] * 200), invalid, "prompt"),
        (pb.ChatRequest(messages=[with_unknown_field(message)]), invalid, "messages[0]"),
    ]


def test_requests_are_refused_alone() -> None:
    async def main() -> None:
        async with serve(load_alphabet()) as client:
            bystander = client.stub.Generate(text_request("a", max_tokens=100))
            for request, status, word in bad_requests():
                method = (
                    client.stub.Chat
                    if isinstance(request, pb.ChatRequest)
                    else client.stub.Generate
                )
                with pytest.raises(grpc.aio.AioRpcError) as error:
                    await collect(method(request))
                details = error.value.details()
                assert error.value.code() == status, (request, details)
                assert details.startswith(word), (request, details)
                assert "\n" not in details
            texts, _, _ = await collect(bystander)
            assert len(texts[0]) == 100
            texts, _, _ = await collect(client.stub.Generate(text_request("a")))
            assert texts == {0: "bcdef"}

    asyncio.run(asyncio.wait_for(main(), timeout=PATIENCE))


def test_bytes_that_are_no_request() -> None:
    async def main() -> None:
        async with serve(load_alphabet()) as client:
            raw = client.channel.unary_stream("/fastpage.v1.Fastpage/Generate")
            rng = np.random.default_rng(1)
            for _ in range(200):
                with pytest.raises(grpc.aio.AioRpcError):
                    await collect(raw(b"\xff" + rng.bytes(int(rng.integers(1, 64)))))
            texts, _, _ = await collect(client.stub.Generate(text_request("a")))
            assert texts == {0: "bcdef"}

    asyncio.run(asyncio.wait_for(main(), timeout=PATIENCE))


def test_a_long_chat_is_read_off_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        threads = []
        async with serve(load_alphabet()) as client:
            render = client.engine.tokenizer.apply_chat_template

            def apply_chat_template(*args: Any, **options: Any) -> str:
                threads.append(threading.current_thread())
                return render(*args, **options)

            monkeypatch.setattr(client.engine.tokenizer, "apply_chat_template", apply_chat_template)
            message = pb.ChatMessage(role="user", content="a" * 100_000)
            with pytest.raises(grpc.aio.AioRpcError, match="max_model_len"):
                await collect(client.stub.Chat(pb.ChatRequest(messages=[message])))
        assert threads
        assert threading.current_thread() not in threads

    asyncio.run(asyncio.wait_for(main(), timeout=PATIENCE))


def test_a_request_of_unreasonable_size() -> None:
    async def main() -> None:
        async with serve(load_alphabet()) as client:
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await collect(client.stub.Generate(text_request("a" * (5 << 20))))
            assert error.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED

    asyncio.run(asyncio.wait_for(main(), timeout=PATIENCE))


# ---------------------------------------------------------------- fastpage-chat


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--max-tokens", str(10**11), "hi"], 1, "--max-tokens 100000000000"),
        (["--max-tokens", "many", "hi"], 2, "--max-tokens: invalid int value: 'many'"),
        (["--bogus", "hi"], 2, "--bogus"),
        (["--seed", "-1", "hi"], 1, "--seed -1"),
        ([b"\xff\xfe"], 1, "UTF-8"),
        (["--system", b"\xff", "hi"], 1, "UTF-8"),
        (["hi"], 1, "127.0.0.1:1"),
    ],
)
def test_chat_client_errors(arguments: list[str | bytes], code: int, words: str) -> None:
    command = [sys.executable, "-m", "fastpage.serving.chat", "--address", "127.0.0.1:1"]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == code
    assert words in done.stderr
    assert done.stderr.count("\n") == 1, done.stderr


# ---------------------------------------------------------------- Python


@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        ({"tensor_parallel_size": 2}, InvalidArgument, "tensor_parallel_size=2"),
        ({"max_model_length": 5}, InvalidArgument, "max_model_length"),
        ({"dtype": "int3"}, InvalidArgument, "dtype='int3'"),
        ({"max_model_len": 10**6}, InvalidArgument, "max_model_len"),
        ({"num_kv_blocks": 3}, ResourceExhausted, "num_kv_blocks=3"),
        ({"kv_cache_memory": "no"}, InvalidArgument, "kv_cache_memory='no'"),
        ({"max_num_seqs": 0}, InvalidArgument, "max_num_seqs=0"),
        ({"host_cache_memory": "no"}, InvalidArgument, "host_cache_memory='no'"),
        ({"host_cache_memory": 100}, ResourceExhausted, "too little for one KV block"),
        ({"num_speculative_tokens": -1}, InvalidArgument, "num_speculative_tokens=-1"),
        ({"max_logprobs": -1}, InvalidArgument, "max_logprobs=-1"),
        ({"prompt_lookup_min": 5}, InvalidArgument, "prompt_lookup_min=5 is more than"),
        ({"max_num_partial_prefills": 1.5}, InvalidArgument, "max_num_partial_prefills=1.5"),
        ({"host_cache_memory": float("nan")}, InvalidArgument, "host_cache_memory=nan"),
        ({"host_cache_memory": True}, InvalidArgument, "host_cache_memory=True"),
        ({"async_scheduling": "no"}, InvalidArgument, "async_scheduling='no' is not True or"),
        ({"enable_prefix_caching": 0}, InvalidArgument, "enable_prefix_caching=0"),
        ({"record_scheduler": 5}, InvalidArgument, "record_scheduler=5"),
    ],
)
def test_llm_options(
    smollm2_gguf: Path, options: dict[str, Any], kind: type[Exception], words: str
) -> None:
    with pytest.raises(kind, match=words):
        LLM(str(smollm2_gguf), **options)


def test_what_the_core_refuses_is_known_before_the_weights_are_loaded(
    smollm2_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastpage.engine.loading._load_runner", lambda *_: pytest.fail("too late"))
    for options in ({"num_speculative_tokens": 5000}, {"max_num_batched_tokens": 1 << 30}):
        with pytest.raises(InvalidArgument, match=next(iter(options))):
            LLM(str(smollm2_gguf), **options)


def test_llm_with_an_unsupported_model(tmp_path: Path) -> None:
    write_model(tmp_path, {"architectures": ["MambaForCausalLM"], "model_type": "mamba"})
    with pytest.raises(ModelError, match="MambaForCausalLM"):
        LLM(str(tmp_path))
    with pytest.raises(ValueError, match="no such file"):
        LLM("/no/such/model")


def test_sampling_params() -> None:
    for options, name in BAD_SAMPLING:
        if name in ("stop_token_ids", "logit_bias") or options.get("max_tokens") == 10**9:
            continue  # whether these fit depends on the model
        with pytest.raises(ValueError, match=name):
            SamplingParams(**options)
    with pytest.raises(TypeError):
        SamplingParams(temprature=1.0)


@pytest.mark.parametrize("text", ["", "x", "1-", "-1", "3-1", "0,0", "0-99999999999", "1 2"])
def test_cpu_affinity(text: str) -> None:
    with pytest.raises(InvalidArgument, match="cpu_affinity"):
        EngineArgs(model="x", cpu_affinity=text)
    assert parse_cpus("0-3, 8") == [0, 1, 2, 3, 8]
