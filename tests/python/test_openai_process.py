"""fastpage-openai as a process: the real model behind it, signals, an engine that is killed."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
from server_process import (
    ENDLESS,
    ENDLESS_OPTIONS,
    HTTP,
    ServerProcess,
    event_loop_of,
    is_alive,
    write_endless_model,
)
from waiting import PATIENCE, eventually

from fastpage import LLM, SamplingParams

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


def is_ready(server: ServerProcess) -> bool:
    try:
        with urllib.request.urlopen(f"http://{server.address}/health") as answer:
            return answer.status == 200
    except urllib.error.HTTPError:
        return False


def start(model: Path, *options: str) -> ServerProcess:
    server = ServerProcess(HTTP, model, *options)
    eventually("the server is ready", lambda: is_ready(server))
    return server


def client_of(server: ServerProcess) -> openai.OpenAI:
    base_url = f"http://{server.address}/v1"
    return openai.OpenAI(base_url=base_url, api_key="none", max_retries=0, timeout=PATIENCE)


def curl_command(server: ServerProcess, path: str, body: Any) -> list[str]:
    command = ["curl", "-sS", "-N", f"http://{server.address}{path}", "-d", json.dumps(body)]
    return [*command, "-H", "Content-Type: application/json"]


def curl(server: ServerProcess, path: str, body: Any) -> str:
    command = curl_command(server, path, body)
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def usage_and_load(server: ServerProcess) -> tuple[float, float]:
    with urllib.request.urlopen(f"http://{server.address}/load") as answer:
        load = json.load(answer)
    return load["kv_cache_usage"], load["server_load"]


def num_aborted(server: ServerProcess) -> float:
    with urllib.request.urlopen(f"http://{server.address}/metrics") as answer:
        found = re.search(
            r'_success_total\{.*finished_reason="abort".*\} (.*)', answer.read().decode()
        )
    assert found is not None
    return float(found[1])


@pytest.fixture(scope="module")
def smol(smollm2_gguf: Path) -> Iterator[ServerProcess]:
    options = ("--max-model-len", "1024", "--num-kv-blocks", "512", "--served-model-name", "smol")
    with start(smollm2_gguf, *options) as server:
        yield server
        assert "Traceback" not in server.err


def test_a_chat(smol: ServerProcess) -> None:
    client = client_of(smol)
    assert [model.id for model in client.models.list()] == ["smol"]
    options: Any = {"model": "smol", "messages": QUESTION, "temperature": 0, "max_tokens": 12}
    whole = client.chat.completions.create(**options)
    text = whole.choices[0].message.content
    assert text is not None and "Paris" in text
    stream = client.chat.completions.create(
        **options, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    parts = [chunk.choices[0].delta.content or "" for chunk in chunks[:-1]]
    assert "".join(parts) == text
    assert chunks[-1].usage is not None and whole.usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens

    # An answer is gone on with as if it had not been interrupted.
    messages = [*QUESTION, {"role": "assistant", "content": "The capital of France is"}]
    rest = client.chat.completions.create(
        **{**options, "messages": messages}, extra_body={"continue_final_message": True}
    )
    assert rest.choices[0].message.content == " Paris."


def test_same_outputs_as_offline(smol: ServerProcess, smollm2_gguf: Path) -> None:
    """Many at once, greedy and drawn, streamed and whole."""
    llm = LLM(str(smollm2_gguf), max_model_len=1024, num_kv_blocks=512)
    prompts = [f"The {i}th letter of the alphabet is" for i in range(12)]
    params = [
        SamplingParams(temperature=0.8 * (i % 2), seed=i, max_tokens=6 + i) for i in range(12)
    ]
    expected = [out.outputs[0].text for out in llm.generate(prompts, params, use_tqdm=False)]
    client = client_of(smol)

    def one(i: int) -> str:
        answer: Any = client.completions.create(
            model="smol",
            prompt=prompts[i],
            temperature=params[i].temperature,
            seed=i,
            max_tokens=6 + i,
            stream=i % 3 == 0,
        )
        if i % 3:
            return str(answer.choices[0].text)
        return "".join(chunk.choices[0].text for chunk in answer)

    with ThreadPoolExecutor(12) as pool:
        assert list(pool.map(one, range(12))) == expected


def test_with_curl(smol: ServerProcess) -> None:
    body: Any = {"model": "smol", "messages": QUESTION, "temperature": 0, "max_tokens": 6}
    lines = curl(smol, "/v1/chat/completions", {**body, "stream": True}).splitlines()
    assert lines[-2:] == ["data: [DONE]", ""]
    assert all(line == "" or line.startswith("data: ") for line in lines)
    answer = json.loads(curl(smol, "/v1/chat/completions", body))
    assert answer["choices"][0]["finish_reason"] == "length"

    answer = json.loads(curl(smol, "/tokenize", {"messages": QUESTION}))
    text = json.loads(curl(smol, "/detokenize", {"tokens": answer["tokens"]}))["prompt"]
    assert text.endswith("<|im_start|>assistant\n")
    tokens = json.loads(curl(smol, "/tokenize", {"prompt": text}))["tokens"]
    assert tokens == answer["tokens"]
    without = json.loads(
        curl(smol, "/tokenize", {"messages": QUESTION, "add_generation_prompt": False})
    )
    assert answer["tokens"][: without["count"]] == without["tokens"]
    assert without["count"] < answer["count"]
    answer = json.loads(
        curl(smol, "/generate", {"prompt": "Once upon a", "temperature": 0, "max_tokens": 1})
    )
    assert answer["text"] == ["Once upon a time"]


def test_a_curl_that_is_killed_frees_its_blocks(smol: ServerProcess) -> None:
    body = {"prompt": ["a", "b"], "n": 2, "max_tokens": 900, "ignore_eos": True, "stream": True}
    command = curl_command(smol, "/v1/completions", body)

    def is_aborted() -> bool:
        before = num_aborted(smol)
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None and process.stdout.readline()
            process.kill()
        eventually("all blocks are free", lambda: usage_and_load(smol) == (0, 0))
        return num_aborted(smol) > before

    # On a machine that is fast beyond measure, or pauses, the answer may have ended before.
    eventually("an answer is given up", is_aborted)


# ---------------------------------------------------------------- the process's end


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_endless_model(tmp_path_factory.mktemp("model") / "endless.gguf")


ENDLESS_REQUEST = {"prompt": "a", "max_tokens": ENDLESS, "ignore_eos": True}
ONE_PLACE = (*ENDLESS_OPTIONS, "--max-num-seqs", "1", "--engine-timeout", "0")


@contextlib.contextmanager
def occupied(server: ServerProcess) -> Iterator[subprocess.Popen[bytes]]:
    """Its only place is taken, by a request that does not end before the process is killed."""
    command = curl_command(server, "/v1/completions", ENDLESS_REQUEST)
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        eventually("it is running", lambda: usage_and_load(server)[1] == 1)
        yield process
        process.kill()


def stream_in_the_queue(server: ServerProcess) -> Any:
    """It has been accepted, and nothing of it can come yet."""
    return client_of(server).completions.create(
        model="endless", prompt="a", max_tokens=20, stream=True, extra_body={"ignore_eos": True}
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_streams_after_a_while(endless: Path, number: signal.Signals) -> None:
    with start(endless, *ONE_PLACE, "--drain-timeout", "0.2") as server, occupied(server):
        stream = stream_in_the_queue(server)
        server.process.send_signal(number)
        with pytest.raises(openai.APIError) as error:
            for _ in stream:
                pass
        assert error.value.code == "shutting_down"
        assert server.process.wait(PATIENCE) == 0
        assert server.err == ""


def test_a_signal_lets_streams_end(endless: Path, server_loop: str) -> None:
    with start(endless, *ONE_PLACE, "--drain-timeout", "600") as server:
        assert event_loop_of(server.process.pid) == server_loop
        with occupied(server):
            stream = stream_in_the_queue(server)
            server.process.send_signal(signal.SIGTERM)
            eventually("it is not ready", lambda: not is_ready(server))
            with pytest.raises(openai.InternalServerError) as error:
                client_of(server).completions.create(model="endless", prompt="a")
            assert (error.value.status_code, error.value.code) == (503, "shutting_down")
        assert [chunk.choices[0].finish_reason for chunk in stream][-1] == "length"
        assert server.process.wait(PATIENCE) == 0
        assert server.err == ""


def test_an_engine_that_is_killed_comes_back(endless: Path, server_loop: str) -> None:
    with start(endless, *ONE_PLACE) as server, occupied(server):
        stream = stream_in_the_queue(server)
        engine = next(pid for pid in server.pids()[1:] if is_alive(pid))
        os.kill(engine, signal.SIGKILL)
        with pytest.raises(openai.APIError) as error:
            for _ in stream:
                pass
        assert error.value.code == "engine_died"
        eventually("it is ready again", lambda: is_ready(server))
        answer = json.loads(curl(server, "/v1/completions", {"prompt": "a", "max_tokens": 3}))
        assert answer["usage"]["completion_tokens"] == 3
        assert server.stop() == 0


def test_a_command_line_that_is_wrong(endless: Path) -> None:
    for options, words in (
        (["--port", "70000"], "--port 70000"),
        (["--max-body-bytes", "0"], "--max-body-bytes 0"),
        (["--request-timeout", "0"], "--request-timeout"),
        (["--tls-cert", "x"], "--tls-key is missing"),
        (["--auth-token-file", "/nowhere"], "--auth-token-file"),
        (["--host", "no.such.host.invalid"], "cannot listen on no.such.host.invalid:8000"),
    ):
        done = subprocess.run(
            [sys.executable, "-m", HTTP, "--model", str(endless), *options],
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )
        assert done.returncode in (1, 2)
        assert words in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_a_missing_extra_is_named() -> None:
    program = (
        "import sys; sys.modules['uvicorn'] = None; sys.argv = ['x', '--model', 'm']; "
        "from fastpage.serving.openai.cli import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 2
    assert "uvicorn" in done.stderr and "pip install 'fastpage[openai]'" in done.stderr
    assert done.stderr.count("\n") == 1
