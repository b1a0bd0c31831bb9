"""What servers log: both formats, a line a request, and the commands' options."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import signal
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path
from typing import Any

import grpc
import pytest
from fakes import load_alphabet
from prometheus_client.parser import text_string_to_metric_families
from waiting import PATIENCE

from fastpage import AsyncEngine, SamplingParams
from fastpage.errors import FastpageError, InvalidArgument
from fastpage.serving.request_log import RequestLog
from fastpage.v1 import fastpage_pb2 as pb
from fastpage.v1 import fastpage_pb2_grpc as pb_grpc

TIME = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z"

# ---------------------------------------------------------------- formats


def run_logging(config: str, code: str) -> subprocess.CompletedProcess[str]:
    """Loggers are of a whole process."""
    lines = f"import logging, warnings\nfrom fastpage import logs\nlogs.configure({config})\n{code}"
    return subprocess.run(
        [sys.executable, "-c", lines], capture_output=True, text=True, timeout=PATIENCE, check=False
    )


LINES = """
log = logging.getLogger("fastpage.test")
log.debug("quiet")
log.info("%d of %d", 1, 2, extra={"fields": {"request_id": 'a "b"\\nc', "n": 2, "s": 0.25}})
logging.getLogger("other").debug("never")
logging.getLogger("other").warning("two\\nlines")
warnings.warn("old")
logs.announce("ready\\nor not")
raise RuntimeError("the end")
"""


def test_text() -> None:
    done = run_logging("logs.LogConfig()", LINES)
    lines = done.stderr.splitlines()
    line = re.fullmatch(rf"{TIME} INFO fastpage\.test: (.*)", lines[0])
    assert line is not None
    # A client's request id cannot pretend to be another line, or another field.
    assert line[1] == r'1 of 2 request_id="a \"b\"\nc" n=2 s=0.25'
    assert "WARNING other: two" in lines[1]
    assert "WARNING py.warnings:" in done.stderr
    assert "CRITICAL fastpage: uncaught" in done.stderr
    assert done.stderr.rstrip().endswith("RuntimeError: the end")
    assert "quiet" not in done.stderr and "never" not in done.stderr
    assert done.stdout == "ready\nor not\n"


def test_json() -> None:
    done = run_logging("logs.LogConfig('debug', 'json')", LINES)
    quiet, counted, two, old, end = map(json.loads, done.stderr.splitlines())
    assert quiet["message"] == "quiet" and quiet["level"] == "debug"
    assert re.fullmatch(TIME, counted["time"])
    assert isinstance(counted.pop("pid"), int)
    assert counted == {
        "time": counted["time"],
        "level": "info",
        "logger": "fastpage.test",
        "message": "1 of 2",
        "request_id": 'a "b"\nc',
        "n": 2,
        "s": 0.25,
    }
    assert (two["logger"], two["message"]) == ("other", "two\nlines")
    assert "old" in old["message"]
    assert end["level"] == "critical"
    assert "RuntimeError: the end" in end["exception"]
    (ready,) = map(json.loads, done.stdout.splitlines())
    assert ready["message"] == "ready\nor not"


# ---------------------------------------------------------------- requests


def records_of(caplog: pytest.LogCaptureFixture) -> list[tuple[str, str, dict[str, Any]]]:
    return [
        (record.levelname, record.getMessage(), record.fields)  # type: ignore[attr-defined]
        for record in caplog.records
        if record.name == "fastpage.requests"
    ]


@pytest.mark.parametrize(("at_info", "level"), [(True, "INFO"), (False, "DEBUG")])
def test_a_line_for_each_request(
    caplog: pytest.LogCaptureFixture, at_info: bool, level: str
) -> None:
    async def main() -> None:
        fail = threading.Event()

        def before_step() -> None:
            if fail.is_set():
                raise RuntimeError("the model\nbroke")

        engine = AsyncEngine(load_alphabet(before_step), RequestLog(at_info))
        params = SamplingParams(temperature=0, max_tokens=4, n=2)
        async for _ in engine.generate("abcdefgh", params, request_id="one"):
            pass
        with pytest.raises(InvalidArgument):
            await engine.add_request("abc", SamplingParams(logit_bias={999: 1.0}), "two")
        (await engine.add_request("abc", request_id="three")).abort()
        fail.set()
        stream = await engine.add_request("abc", request_id="four")
        with pytest.raises(FastpageError):
            async for _ in stream:
                pass
        fail.clear()
        await engine.shutdown()

    with caplog.at_level(logging.DEBUG, "fastpage"):
        asyncio.run(main())
    one, two, three, four = records_of(caplog)
    assert one[:2] == (level, "done")
    assert {k: v for k, v in one[2].items() if "seconds" not in k} == {
        "request_id": "one",
        "finish_reason": "length",
        "prompt_tokens": 8,
        "cached_tokens": 0,
        "output_tokens": 8,
        "n": 2,
    }
    assert 0 < one[2]["first_token_seconds"] < one[2]["seconds"]
    assert one[2]["queue_seconds"] > 0
    assert two[:2] == (level, "refused")
    assert two[2]["request_id"] == "two"
    assert two[2]["error"].startswith("logit_bias")
    assert three[:2] == (level, "done")
    assert three[2]["finish_reason"] == "abort"
    # Whoever runs the server wants to know, whether they asked for lines or not.
    assert four[:2] == ("WARNING", "failed")
    assert four[2]["error"].endswith("the model broke")


def test_what_a_client_wrote_does_not_fill_the_log(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with AsyncEngine(load_alphabet(), RequestLog(at_info=True)) as engine:
            with pytest.raises(InvalidArgument):
                await engine.add_request("abc", request_id="i" * 1_000_000)
            with pytest.raises(InvalidArgument):
                await engine.add_request({"p" * 1_000_000: 1})  # type: ignore[misc]

    with caplog.at_level(logging.INFO, "fastpage"):
        asyncio.run(main())
    for _, what, fields in records_of(caplog):
        assert what == "refused"
        assert max(map(len, fields.values())) < 2000
    assert len(records_of(caplog)) == 2


def test_nothing_is_said_of_requests_unless_asked(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with AsyncEngine(load_alphabet(), RequestLog(at_info=False)) as engine:
            async for _ in engine.generate("abc", SamplingParams(max_tokens=2)):
                pass

    with caplog.at_level(logging.INFO, "fastpage"):
        asyncio.run(main())
    assert records_of(caplog) == []


# ---------------------------------------------------------------- the command


def test_the_servers_options(smollm2_gguf: Path) -> None:
    options = ["--log-format", "json", "--log-requests", "--metrics-port", "0", "--port", "0"]
    options += ["--num-kv-blocks", "64", "--max-model-len", "512", "--dtype", "bfloat16"]
    process = subprocess.Popen(
        [sys.executable, "-m", "fastpage.serving.grpc.cli", "--model", str(smollm2_gguf), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        listening = json.loads(process.stdout.readline())["message"]
        assert json.loads(process.stdout.readline())["message"].startswith("fastpage ")
        address, metrics = re.findall(r"127\.0\.0\.1:\d+", listening)
        with grpc.insecure_channel(address) as channel:
            params = pb.SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
            request = pb.GenerateRequest(text="a", request_id="mine", sampling_params=params)
            list(pb_grpc.FastpageStub(channel).Generate(request))
        with urllib.request.urlopen(f"http://{metrics}/metrics", timeout=PATIENCE) as response:
            families = list(text_string_to_metric_families(response.read().decode()))
        values = {s.name: s.value for family in families for s in family.samples}
        assert values["vllm:generation_tokens_total"] == 3
        assert values["fastpage:engine_up"] == 1
        phases = next(f for f in families if f.name == "fastpage:startup_seconds").samples
        assert {"imports", "engine weights"} <= {sample.labels["phase"] for sample in phases}
        process.send_signal(signal.SIGTERM)
        stdout, stderr = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
    assert process.returncode == 0
    assert [json.loads(line)["message"] for line in stdout.splitlines()][-1].endswith("stopped")
    # What else a server has to say on a busy machine is no fault.
    lines = map(json.loads, stderr.splitlines())
    (line,) = (line for line in lines if line["logger"] == "fastpage.requests")
    assert (line["request_id"], line["output_tokens"]) == ("mine", 3)


def test_why_a_server_does_not_start_is_json_as_well() -> None:
    command = [sys.executable, "-m", "fastpage.serving.grpc.cli", "--model", "/nowhere/at/all"]
    command += ["--port", "0", "--log-format", "json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 1
    (line,) = map(json.loads, done.stderr.splitlines())
    assert line["level"] == "error"
    assert line["message"].startswith("fastpage-grpc: error: ")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--log-level", "loud"], "argument --log-level: invalid choice: 'loud'"),
        (["--otlp-traces-endpoint", "there:4317"], "--otlp-traces-endpoint there:4317 is not http"),
        (["--metrics-port", "70000"], "--metrics-port 70000 is not between 0 and 65535"),
    ],
)
def test_options_that_cannot_be(options: list[str], message: str) -> None:
    command = [sys.executable, "-m", "fastpage.serving.grpc.cli", "--model", "x", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
