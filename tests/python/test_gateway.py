"""Workers behind the real SMG gateway, driven with the real openai client."""

from __future__ import annotations

import contextlib
import http.client
import io
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import httpx
import openai
import pytest
from checkpoint_files import (
    CORPUS,
    byte_level_vocabulary,
    model_metadata,
    sentencepiece_vocabulary,
    write_gguf,
)
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)
from server_process import ENDLESS, GRPC, SERVING, ServerProcess, write_endless_model
from test_tokenizer import TEXTS
from waiting import PATIENCE, eventually

from fastpage import LLM, SamplingParams
from fastpage.checkpoints.gguf_file import GgufFile
from fastpage.serving.worker.tokenizer_archive import build_archive
from fastpage.tokenizer import Tokenizer
from fastpage.v1 import fastpage_pb2 as pb
from fastpage.v1 import fastpage_pb2_grpc as pb_grpc

README = Path(__file__).resolve().parents[2] / "README.md"
SMG = Path(sys.executable).with_name("smg")
BLOCK_SIZE = 16


class Gateway:
    """`smg launch` in front of some workers, until the end of the with block."""

    def __init__(self, workers: list[str], *options: str) -> None:
        self._ports = contextlib.ExitStack()
        port, metrics_port = (self._ports.enter_context(reserved_port()) for _ in range(2))
        self.url = f"http://127.0.0.1:{port}"
        self._metrics_url = f"http://127.0.0.1:{metrics_port}/metrics"
        self._workers = [f"grpc://{address}" for address in workers]
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        command = [SMG, "launch", "--host", "127.0.0.1"]
        command += ["--port", str(port), "--worker-urls", *self._workers]
        command += ["--prometheus-host", "127.0.0.1", "--prometheus-port", str(metrics_port)]
        # The models are loaded while it starts.
        command += ["--worker-startup-check-interval", "1", *options]
        self.process = subprocess.Popen(command, stdout=self._log, stderr=subprocess.STDOUT)
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    def wait_until_ready(self) -> None:
        eventually("every worker's KV events are subscribed to", self._is_ready)

    def _is_ready(self) -> bool:
        assert self.process.poll() is None, self.log
        try:
            return is_ready(self.url) and all(
                self.metric("smg_kv_event_subscriptions_total", worker) for worker in self._workers
            )
        except httpx.ConnectError:  # its metrics come later
            return False

    def metric(self, name: str, worker: str) -> float:
        """Of the worker at that address; 0 if there is none."""
        worker = "grpc://" + worker.removeprefix("grpc://")
        text = httpx.get(self._metrics_url, timeout=PATIENCE).text
        found = re.search(rf'^{name}{{[^}}]*"{re.escape(worker)}"[^}}]*}} (\S+)$', text, re.M)
        return float(found[1]) if found else 0.0

    @property
    def log(self) -> str:
        self._log.seek(0)
        return self._log.read()

    def __enter__(self) -> Gateway:
        return self

    def __exit__(self, *exc: object) -> None:
        self.process.kill()
        self.process.wait()
        self.client.close()
        self._log.close()
        self._ports.close()


def is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/readiness", timeout=PATIENCE).status_code == 200
    except httpx.TransportError:
        return False


@contextlib.contextmanager
def reserved_port() -> Iterator[int]:
    """The system gives it to nobody else, while a server that is told of it may listen there."""
    with socket.socket() as reservation:
        reservation.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        reservation.bind(("127.0.0.1", 0))
        yield reservation.getsockname()[1]


class Worker(ServerProcess):
    """fastpage-grpc, and its own protocol to look into it."""

    def __init__(self, model: Path, *options: str) -> None:
        options = ("--threads", "1", "--num-kv-blocks", "16384", *options)
        super().__init__(GRPC, model, "--served-model-name", "tiny", *options)

    def call(self, method: str, request: Any) -> Any:
        with grpc.insecure_channel(self.address) as channel:
            return getattr(pb_grpc.FastpageStub(channel), method)(request, timeout=PATIENCE)

    @property
    def stats(self) -> pb.GetServerStatsResponse:
        response: pb.GetServerStatsResponse = self.call(
            "GetServerStats", pb.GetServerStatsRequest()
        )
        return response

    def is_idle(self) -> bool:
        stats = self.stats
        return (
            not stats.num_running
            + stats.num_waiting
            + (stats.kv_blocks_total - stats.kv_blocks_free)
        )

    @contextlib.contextmanager
    def full(self) -> Iterator[None]:
        """A request that does not end by itself has its only place."""
        request = pb.GenerateRequest(text="z", output_kind=pb.OUTPUT_KIND_FINAL_ONLY)
        request.sampling_params.max_tokens = ENDLESS
        request.sampling_params.ignore_eos = True
        with grpc.insecure_channel(self.address) as channel:
            call = pb_grpc.FastpageStub(channel).Generate(request)
            eventually("it runs", lambda: self.stats.num_running == 1)
            yield
            call.cancel()

    def warm(self, text: str) -> None:
        """Has it compute a prompt that the gateway does not see."""
        with grpc.insecure_channel(self.address) as channel:
            request = pb.GenerateRequest(text=text)
            request.sampling_params.max_tokens = 1
            list(pb_grpc.FastpageStub(channel).Generate(request, timeout=PATIENCE))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_endless_model(tmp_path_factory.mktemp("gateway") / "tiny.gguf")


@pytest.fixture(scope="module")
def llm(tiny: Path) -> LLM:
    return LLM(str(tiny), threads=1, num_kv_blocks=16384)


class Fleet:
    def __init__(self, gateway: Gateway, workers: list[Worker]) -> None:
        self.gateway = gateway
        self.workers = workers
        self.client = gateway.client

    def warm(self, worker: Worker, text: str) -> None:
        """Until the gateway has heard of it."""
        before = self.gateway.metric("smg_kv_index_blocks", worker.address)
        worker.warm(text)
        eventually(
            "the gateway hears of what is cached",
            lambda: self.gateway.metric("smg_kv_index_blocks", worker.address) > before,
        )


@contextlib.contextmanager
def start_fleet(model: Path, *options: str) -> Iterator[Fleet]:
    with contextlib.ExitStack() as stack:
        ports = [str(stack.enter_context(reserved_port())) for _ in range(2)]
        workers = [stack.enter_context(Worker(model, "--port", p, *options)) for p in ports]
        gateway = stack.enter_context(Gateway([worker.address for worker in workers]))
        gateway.wait_until_ready()
        yield Fleet(gateway, workers)


@pytest.fixture(scope="module")
def fleet(tiny: Path) -> Iterator[Fleet]:
    with start_fleet(tiny) as fleet:
        yield fleet
        for worker in fleet.workers:
            eventually("a request is left over", worker.is_idle)


def whole(text: str) -> str:
    """Without what is left of a character at the end: the gateway leaves it out."""
    return text.rstrip("\ufffd")


PROMPT = "the quick brown fox jumps over"
MESSAGES: Any = [{"role": "user", "content": "What does the fox say?"}]


# ---------------------------------------------------------------- one worker or the other


def test_models(fleet: Fleet) -> None:
    assert [model.id for model in fleet.client.models.list()] == ["tiny"]


def test_the_service_is_listed_and_healthy(fleet: Fleet) -> None:
    """For Kubernetes and grpcurl; the gateway asks the service itself."""
    with grpc.insecure_channel(fleet.workers[0].address) as channel:
        name = "vllm.grpc.engine.VllmEngine"
        assert name in ProtoReflectionDescriptorDatabase(channel).get_services()
        request = health_pb2.HealthCheckRequest(service=name)
        assert health_pb2_grpc.HealthStub(channel).Check(request).status == SERVING


def test_completions_are_the_engine_s(fleet: Fleet, llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=20)
    (expected,) = llm.generate(PROMPT, params)
    options: Any = {"model": "tiny", "prompt": PROMPT, "temperature": 0, "max_tokens": 20}
    answer = fleet.client.completions.create(**options)
    assert whole(answer.choices[0].text) == whole(expected.outputs[0].text)
    assert answer.choices[0].finish_reason == expected.outputs[0].finish_reason
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(expected.prompt_token_ids)
    assert answer.usage.completion_tokens == len(expected.outputs[0].token_ids)
    stream = fleet.client.completions.create(**options, stream=True)
    assert "".join(c.choices[0].text for c in stream if c.choices) == answer.choices[0].text


def test_several_prompts_and_samples(fleet: Fleet) -> None:
    answer = fleet.client.completions.create(
        model="tiny", prompt=[PROMPT, "hello"], n=2, temperature=1.0, seed=3, max_tokens=4
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.usage is not None and answer.usage.completion_tokens == 16


def test_chat(fleet: Fleet, llm: LLM) -> None:
    (expected,) = llm.chat(MESSAGES, SamplingParams(temperature=0, max_tokens=20))
    options: Any = {"model": "tiny", "messages": MESSAGES, "temperature": 0, "max_tokens": 20}
    answer = fleet.client.chat.completions.create(**options)
    assert whole(answer.choices[0].message.content or "") == whole(expected.outputs[0].text)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(expected.prompt_token_ids)

    chunks = list(
        fleet.client.chat.completions.create(
            **options, stream=True, stream_options={"include_usage": True}
        )
    )
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == answer.choices[0].message.content
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == answer.usage.completion_tokens


def test_stop_strings_end_the_work(fleet: Fleet, llm: LLM) -> None:
    (free,) = llm.generate(PROMPT, SamplingParams(temperature=0, max_tokens=40))
    stop = free.outputs[0].text[9:13]
    (expected,) = llm.generate(PROMPT, SamplingParams(temperature=0, max_tokens=40, stop=stop))
    options: Any = {"model": "tiny", "prompt": PROMPT, "temperature": 0, "max_tokens": 40}
    for stream in (False, True):
        answer = fleet.client.completions.create(**options, stop=[stop], stream=stream)
        if stream:
            choices = [chunk.choices[0] for chunk in answer if chunk.choices]
            assert "".join(choice.text for choice in choices) == expected.outputs[0].text
            assert choices[-1].finish_reason == "stop"
            continue
        assert answer.choices[0].text == expected.outputs[0].text
        assert answer.choices[0].finish_reason == "stop"
        # What comes after the stop string was not computed.
        assert answer.usage.completion_tokens == len(expected.outputs[0].token_ids) < 40


def test_logprobs(fleet: Fleet) -> None:
    options: Any = {"model": "tiny", "messages": MESSAGES, "temperature": 0, "max_tokens": 6}
    answer = fleet.client.chat.completions.create(**options, logprobs=True, top_logprobs=3, n=2)
    for choice in answer.choices:
        assert choice.logprobs is not None and choice.logprobs.content is not None
        assert len(choice.logprobs.content) == 6
        for token in choice.logprobs.content:
            assert len(token.top_logprobs) == 3
            # Greedy.
            assert token.top_logprobs[0].token == token.token
            assert token.top_logprobs[0].logprob == token.logprob <= 0


def test_what_is_refused_is_refused_by_name(fleet: Fleet) -> None:
    schema: Any = {"type": "json_schema", "json_schema": {"name": "a", "schema": {}}}
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError, match="json_schema is not supported"):
            fleet.client.chat.completions.create(
                model="tiny", messages=MESSAGES, response_format=schema, stream=stream
            )
        with pytest.raises(openai.BadRequestError, match="max_tokens 300000 > max_model_len"):
            fleet.client.completions.create(
                model="tiny", prompt=PROMPT, max_tokens=300_000, stream=stream
            )
    with pytest.raises(openai.BadRequestError, match="maximum context length is 262144"):
        fleet.client.completions.create(model="tiny", prompt=PROMPT * 40_000)
    # Nobody's circuit breaker opened for that.
    test_models(fleet)
    fleet.client.completions.create(model="tiny", prompt=PROMPT, max_tokens=1)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_blocks(fleet: Fleet, stream: bool) -> None:
    def total(field: str) -> int:
        return sum(getattr(worker.stats, field) for worker in fleet.workers)

    before = total("num_generated_tokens")
    options: Any = {"model": "tiny", "prompt": PROMPT, "max_tokens": ENDLESS, "stream": stream}
    if stream:
        answer = fleet.client.completions.create(**options, extra_body={"ignore_eos": True})
        next(iter(answer))
        answer.close()
    else:
        connection = http.client.HTTPConnection(fleet.gateway.url.removeprefix("http://"))
        headers = {"Content-Type": "application/json"}
        body = json.dumps({**options, "ignore_eos": True})
        connection.request("POST", "/v1/completions", body, headers)
        eventually("it is being served", lambda: total("num_running"))
        connection.close()
    for worker in fleet.workers:
        eventually("the blocks are free", worker.is_idle)
    assert total("num_generated_tokens") > before


# ---------------------------------------------------------------- tokenizers

KINDS = ["gpt-2", "smollm", "llama-bpe", "tekken", "qwen2", "sentencepiece"]


@pytest.fixture(scope="module")
def byte_level() -> dict[str, Any]:
    return byte_level_vocabulary(CORPUS, 2000)


@pytest.mark.parametrize("kind", KINDS)
def test_the_gateway_tokenizes_as_the_worker_does(
    fleet: Fleet, tmp_path: Path, byte_level: dict[str, Any], kind: str
) -> None:
    """What GetTokenizer makes of a GGUF file, in the gateway's own code."""
    if kind == "sentencepiece":
        vocabulary = sentencepiece_vocabulary(CORPUS, 2000)
    else:
        vocabulary = byte_level | {"tokenizer.ggml.pre": kind}
    path = tmp_path / "tiny.gguf"
    write_gguf(path, "llama", {}, model_metadata("llama") | vocabulary)
    own = Tokenizer.from_gguf_metadata(GgufFile(path).metadata, path.name)
    with zipfile.ZipFile(io.BytesIO(build_archive(own))) as archive:
        archive.extractall(tmp_path)
    gateway = httpx.Client(base_url=f"{fleet.gateway.url}/v1")
    gateway.post("/tokenizers", json={"name": kind, "source": str(tmp_path)})

    def is_registered() -> bool:
        known = gateway.get("/tokenizers").json()["tokenizers"]
        return kind in [tokenizer["name"] for tokenizer in known]

    eventually("the tokenizer is registered", is_registered)
    answer = gateway.post("/tokenize", json={"model": kind, "prompt": TEXTS}).json()
    for text, tokens in zip(TEXTS, answer["tokens"], strict=True):
        # It adds no special tokens, but finds those in the text.
        assert tokens == own.encode(text, add_special_tokens=False), text


# ---------------------------------------------------------------- two workers


def cached_tokens(fleet: Fleet, prompt: str) -> int | None:
    answer = fleet.client.completions.create(model="tiny", prompt=prompt, max_tokens=1)
    assert answer.usage is not None and answer.usage.prompt_tokens_details is not None
    return answer.usage.prompt_tokens_details.cached_tokens


def test_requests_go_where_their_prefix_is(fleet: Fleet) -> None:
    """Prefixes that the gateway never saw: it knows of them by the workers' KV events only."""
    prefixes = [f"{i} " + letter * 200 for i, letter in enumerate("abcd")]
    for i, prefix in enumerate(prefixes):
        fleet.warm(fleet.workers[i % 2], prefix)
    for tail in ("one", "two"):
        for prefix in prefixes:
            cached = cached_tokens(fleet, f"{prefix} {tail}")
            assert cached is not None and cached >= 4 * BLOCK_SIZE, (prefix, tail)


def test_an_engine_that_dies_costs_nobody_an_answer(tiny: Path, tmp_path: Path) -> None:
    # As long as it is away, the engine cannot come back.
    model = Path(shutil.copy(tiny, tmp_path / "model.gguf"))
    away = tmp_path / "away"
    with start_fleet(model, "--max-num-seqs", "1") as fleet, ThreadPoolExecutor() as pool:
        victim = fleet.workers[0]
        fleet.warm(victim, "k" * 200)
        with victim.full():
            asking = pool.submit(
                fleet.client.completions.create, model="tiny", prompt="k" * 200, max_tokens=20
            )
            eventually("it goes where its prefix is", lambda: victim.stats.num_waiting)
            _, engine = victim.pids()
            model.rename(away)
            os.kill(engine, signal.SIGKILL)
            # The gateway asks somebody else.
            assert asking.result(PATIENCE).choices[0].finish_reason
        eventually(
            "the gateway forgets what was cached there",
            lambda: fleet.gateway.metric("smg_kv_index_blocks", victim.address) == 0,
        )
        away.rename(model)
        eventually("the engine is back", lambda: victim.stats.ready)
        fleet.warm(victim, "m" * 200)
        assert cached_tokens(fleet, "m" * 200 + " z")


def test_a_worker_drains_and_another_takes_its_place(tiny: Path) -> None:
    options = ("--max-num-seqs", "1", "--drain-timeout", "600")
    with start_fleet(tiny, *options) as fleet, ThreadPoolExecutor() as pool:
        leaving, staying = fleet.workers
        fleet.warm(leaving, "x" * 200)
        made = staying.stats.num_generated_tokens
        asking: Any = {"model": "tiny", "prompt": "x" * 200, "extra_body": {"ignore_eos": True}}
        with leaving.full():
            waiting = pool.submit(fleet.client.completions.create, max_tokens=50, **asking)
            eventually("it waits", lambda: leaving.stats.num_waiting == 1)
            leaving.process.send_signal(signal.SIGTERM)
            eventually("it drains", lambda: not leaving.stats.ready)
            # What it has goes on to the end, and the rest goes to the other one.
            for _ in range(4):
                fleet.client.completions.create(max_tokens=2, **asking)
            assert staying.stats.num_generated_tokens == made + 8
        assert waiting.result(PATIENCE).choices[0].finish_reason == "length"
        assert leaving.process.wait(PATIENCE) == 0
        for _ in range(4):
            fleet.client.completions.create(max_tokens=2, **asking)
        assert staying.stats.num_generated_tokens == made + 16

        # One that starts at its address is found again, and so is what it has cached.
        port = leaving.address.rpartition(":")[2]
        with Worker(tiny, "--port", port) as back:
            eventually(
                "the gateway subscribes again",
                lambda: fleet.gateway.metric("smg_kv_event_subscriptions_total", back.address) > 1,
            )
            fleet.warm(back, "y" * 200)
            assert cached_tokens(fleet, "y" * 200 + " z")


# ---------------------------------------------------------------- the real model


def test_the_commands_of_the_readme(smollm2_gguf: Path, tmp_path: Path) -> None:
    (tmp_path / smollm2_gguf.name).symlink_to(smollm2_gguf)
    block = re.search(r"```sh\n([^`]*smg launch[^`]*)```", README.read_text())
    assert block is not None
    text = block[1].replace("\\\n", "")
    stack = contextlib.ExitStack()
    for port in ("50051", "50052", "30000"):
        text = text.replace(port, str(stack.enter_context(reserved_port())))
    programs = {"fastpage-grpc": [sys.executable, "-m", GRPC], "smg": [str(SMG)]}
    with stack:
        _, *servers, curl = [shlex.split(line.rstrip(" &")) for line in text.splitlines()]
        for program, *options in servers:
            if program == "smg":
                options += ["--prometheus-port", str(stack.enter_context(reserved_port()))]
                options += ["--worker-startup-check-interval", "1"]
            process = subprocess.Popen(
                [*programs[program], *options], cwd=tmp_path, stdout=subprocess.DEVNULL
            )
            stack.callback(process.wait)
            stack.callback(process.kill)
        url = curl[1].removesuffix("/v1/chat/completions")
        eventually("the gateway is ready", lambda: is_ready(url))
        done = subprocess.run(curl, capture_output=True, text=True, timeout=PATIENCE, check=True)
        assert json.loads(done.stdout)["choices"][0]["message"]["content"]
        check_answer(url)


def check_answer(url: str) -> None:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    messages: Any = [{"role": "user", "content": "What is the capital of France?"}]
    answer = client.chat.completions.create(
        model="smollm2", messages=messages, temperature=0, max_tokens=12
    )
    assert "Paris" in (answer.choices[0].message.content or "")
    assert answer.choices[0].finish_reason == "stop"
