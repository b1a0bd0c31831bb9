"""A server at saturation, for FASTPAGE_SOAK_SECONDS (`make soak`: 600): more streams than it takes,
of all kinds, some of which are left, aborted or out of time. Every token that comes is compared
with what LLM makes of the same request: none may be lost, doubled or another's.

Among the other tests it takes a model of random weights, whose steps cost next to nothing: as many
streams as the real one has in a minute come in a second or two.
"""

from __future__ import annotations

import asyncio
import collections
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import grpc
import pytest
from server_process import GRPC, GrpcClient, ServerProcess, write_tiny_model
from waiting import PATIENCE

from fastpage import LLM, RequestOutput, SamplingParams
from fastpage.v1 import fastpage_pb2 as pb

SECONDS = float(os.environ.get("FASTPAGE_SOAK_SECONDS", "2"))
IS_REAL = "FASTPAGE_SOAK_SECONDS" in os.environ
NUM_WORKS = 90 if not IS_REAL else 27 if SECONDS < 60 else 270
SEED = int(os.environ.get("FASTPAGE_SEED", "6"))
NUM_CLIENTS = 96
# Room for 24 sequences of which some must be preempted now and then, and a short queue: what does
# not fit is refused, and tried again.
OPTIONS = ("--max-num-seqs", "24", "--num-kv-blocks", "192")
# Of LLM and server. The other model's tokens are shorter, and a second thread has nothing to do.
COMMON = {"max_model_len": 1024, "threads": 0} if IS_REAL else {"max_model_len": 2048, "threads": 1}
QUEUE = ("--max-num-waiting", "48")

TEXTS = (
    "The quick brown fox jumps over the lazy dog near the bank of the river.",
    "Once upon a time, in a country far away, there lived a king who had three daughters.",
    "def fibonacci(n):\n    if n < 2:\n        return n\n",
    "To be, or not to be: \u00e0 propos, \u4f60\u597d \U0001f9ff, that is the question.",
)

# What each stream asks for: one of these, with a prompt and a seed of its own.
KINDS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0, "max_tokens": 60},
    "sampled": {"temperature": 0.9, "top_p": 0.95, "max_tokens": 80},
    "penalised": {"temperature": 0.7, "top_k": 40, "repetition_penalty": 1.1, "max_tokens": 40},
    "samples": {"temperature": 1.0, "n": 3, "max_tokens": 30},
    "stop strings": {"temperature": 0.8, "stop": [" the", "\n", "."], "max_tokens": 80},
    "logprobs": {"temperature": 0.5, "logprobs": 3, "prompt_logprobs": 1, "max_tokens": 20},
    "best of": {"temperature": 1.0, "n": 2, "best_of": 4, "max_tokens": 16},
    "beams": {"temperature": 0.0, "n": 2, "beam_width": 4, "max_tokens": 16},
    "long": {"temperature": 0.9, "min_p": 0.05, "max_tokens": 300, "ignore_eos": True},
}

ENDINGS = ("whole", "whole", "whole", "cancelled", "aborted", "deadline")


@dataclass
class Work:
    kind: str
    prompt: str
    params: dict[str, Any]
    expected: RequestOutput | None = None

    def request(self, request_id: str, rng: Random) -> pb.GenerateRequest:
        assert self.expected is not None
        message = pb.GenerateRequest(
            request_id=request_id, sampling_params=pb.SamplingParams(**self.params)
        )
        if rng.random() < 0.5:
            message.text = self.prompt
        else:
            message.token_ids.ids.extend(self.expected.prompt_token_ids)
        if rng.random() < 0.1:
            message.output_kind = pb.OUTPUT_KIND_FINAL_ONLY
        return message


def make_work(rng: Random, count: int) -> list[Work]:
    """Prompts that share beginnings, so that blocks are shared too."""
    made = []
    for i in range(count):
        kind = list(KINDS)[i % len(KINDS)]
        common = " ".join(TEXTS[: rng.randint(0, len(TEXTS))] * rng.randint(1, 4))
        prompt = common + rng.choice(TEXTS)[: rng.randint(1, 60)]
        params = KINDS[kind] | {"seed": rng.randrange(1 << 32)}
        made.append(Work(kind, prompt, params))
    return made


@pytest.fixture(scope="module")
def model(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if IS_REAL:
        return smollm2_gguf
    return write_tiny_model(tmp_path_factory.mktemp("soak") / "tiny.gguf")


@pytest.fixture(scope="module")
def work(model: Path) -> Iterator[list[Work]]:
    """With what LLM makes of each."""
    work = make_work(Random(SEED), NUM_WORKS)
    llm = LLM(str(model), max_num_seqs=64, **COMMON)
    outputs = llm.generate(
        [one.prompt for one in work], [SamplingParams(**one.params) for one in work], use_tqdm=False
    )
    for one, output in zip(work, outputs, strict=True):
        one.expected = output
    del llm
    yield work


@dataclass
class Tally:
    ends: collections.Counter[str] = field(default_factory=collections.Counter)
    tokens: int = 0
    memory: list[tuple[float, int]] = field(default_factory=list)

    def report(self, seconds: float) -> str:
        streams = ", ".join(f"{count} {name}" for name, count in sorted(self.ends.items()))
        mib = [size / (1 << 20) for _, size in self.memory]
        return (
            f"{seconds:.0f} s, seed {SEED}: {streams}; {self.tokens} tokens compared, "
            f"{self.tokens / seconds:.0f} a second; memory {mib[0]:.0f} MiB at the start, "
            f"{min(mib):.0f} to {max(mib):.0f}, {mib[-1]:.0f} at the end, "
            f"slope of the second half {self.slope() / (1 << 10):+.1f} KiB a minute"
        )

    def slope(self) -> float:
        """Bytes a minute, over the second half."""
        half = self.memory[(len(self.memory) - 1) // 2 :]
        times, sizes = zip(*half, strict=True)
        return statistics.linear_regression(times, sizes).slope * 60


class Stream:
    """What came of one call, and whether it is what should have come."""

    def __init__(self, work: Work) -> None:
        self.work = work
        self.ids: dict[int, list[int]] = collections.defaultdict(list)
        self.texts: dict[int, str] = collections.defaultdict(str)
        self.ended: dict[int, int] = {}
        self.positions = 0
        self.usage: pb.Usage | None = None

    def take_in(self, response: pb.GenerateResponse) -> None:
        self.positions += len(response.prompt_logprobs)
        assert self.usage is None, "a message after the last one"
        for delta in response.outputs:
            assert delta.index not in self.ended, "a delta after the end"
            self.ids[delta.index] += delta.token_ids
            self.texts[delta.index] += delta.text
            if "logprobs" in self.work.params:
                assert [p.tokens[0].token_id for p in delta.logprobs] == list(delta.token_ids)
            if delta.finish_reason:
                self.ended[delta.index] = delta.finish_reason
        if response.HasField("usage"):
            self.usage = response.usage

    def check_so_far(self) -> None:
        """It ended early, or another way: what came is the beginning of what should have."""
        assert self.work.expected is not None
        for out in self.work.expected.outputs:
            ids, text = self.ids[out.index], self.texts[out.index]
            assert ids == list(out.token_ids)[: len(ids)], self.work
            # An abort lets out the beginnings of a character and of a stop string.
            stopped = out.stop_reason if isinstance(out.stop_reason, str) else ""
            assert (out.text + stopped).startswith(text.rstrip("\ufffd")), self.work

    def check_whole(self) -> None:
        expected = self.expected()
        for index, (ids, text, reason) in expected.items():
            assert (self.ids[index], self.texts[index]) == (ids, text), self.work
            assert self.ended[index] == reason, self.work
        assert self.ids.keys() == expected.keys() and self.usage is not None
        output = self.work.expected
        assert output is not None
        assert self.usage.prompt_tokens == len(output.prompt_token_ids)
        assert self.usage.completion_tokens == output.num_output_tokens
        if "prompt_logprobs" in self.work.params:
            assert self.positions == len(output.prompt_token_ids) - 1

    def expected(self) -> dict[int, tuple[list[int], str, int]]:
        reasons = {"stop": pb.FINISH_REASON_STOP, "length": pb.FINISH_REASON_LENGTH}
        assert self.work.expected is not None
        return {
            out.index: (list(out.token_ids), out.text, reasons[out.finish_reason or ""])
            for out in self.work.expected.outputs
        }


class Soak:
    def __init__(self, client: GrpcClient, work: list[Work], seconds: float) -> None:
        self.client = client
        self.work = work
        self.rng = Random(SEED + 1)
        self.until = time.monotonic() + seconds
        self.tally = Tally()
        self.num_requests = 0

    async def run(self, memory: Callable[[], int]) -> None:
        self.tally.memory.append((time.monotonic(), memory()))
        clients = asyncio.gather(*(self._client() for _ in range(NUM_CLIENTS)))
        try:
            while not clients.done():
                await asyncio.wait([clients], timeout=0.5)
                self.tally.memory.append((time.monotonic(), memory()))
            await clients
        finally:
            clients.cancel()

    async def _client(self) -> None:
        while time.monotonic() < self.until or not self._has_seen_all():
            work, ending = self.rng.choice(self.work), self.rng.choice(ENDINGS)
            self.num_requests += 1
            await self._until_served(work, ending, f"request {self.num_requests}")

    def _has_seen_all(self) -> bool:
        return all(self.tally.ends[ending] for ending in ENDINGS)

    async def _until_served(self, work: Work, ending: str, request_id: str) -> None:
        """Tried again while the queue is full."""
        while True:
            try:
                return await self._one(work, ending, request_id)
            except grpc.aio.AioRpcError as error:
                assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED, error
                self.tally.ends["refused"] += 1
                hints = dict(error.trailing_metadata() or ())
                await asyncio.sleep(min(int(hints["retry-after-ms"]) / 1000, 5.0))

    async def _one(self, work: Work, ending: str, request_id: str) -> None:
        stream = Stream(work)
        timeout = self.rng.uniform(0.0, 4.0) if ending == "deadline" else None
        call = self.client.stub.Generate(work.request(request_id, self.rng), timeout=timeout)
        stop_after = self.rng.randint(1, 30)
        try:
            await self._read(call, stream, ending, stop_after, request_id)
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.DEADLINE_EXCEEDED or ending != "deadline":
                raise
        finally:
            call.cancel()
        self.tally.tokens += sum(map(len, stream.ids.values()))
        if pb.FINISH_REASON_ABORT in stream.ended.values():
            assert ending == "aborted"
        elif stream.usage is not None:
            stream.check_whole()
            ending = "whole"
        stream.check_so_far()
        self.tally.ends[ending] += 1

    async def _read(
        self, call: Any, stream: Stream, ending: str, stop_after: int, request_id: str
    ) -> None:
        count = 0
        while (response := await call.read()) is not grpc.aio.EOF:
            stream.take_in(response)
            count += 1
            if count == stop_after and ending == "cancelled":
                return
            if count == stop_after and ending == "aborted":
                await self.client.stub.Abort(pb.AbortRequest(request_id=request_id))
            if count % 16 == stop_after % 16:
                await asyncio.sleep(self.rng.random() * 0.2)  # a slow reader, now and then


def test_soak(model: Path, work: list[Work]) -> None:
    async def main(server: ServerProcess) -> None:
        async with GrpcClient(server.address) as client:
            await client.wait_until_serving()
            began = time.monotonic()
            soak = Soak(client, work, SECONDS)
            await soak.run(server.memory)
            print("\n" + soak.tally.report(time.monotonic() - began))
            await client.wait_until_idle()
            stats = await client.stats()
            print(f"{stats.num_preemptions} preemptions, {stats.num_steps} steps")
            # A quarter of an hour of this would be 15 MiB.
            assert SECONDS < 60 or soak.tally.slope() < 1 << 20

    common = [f"--{name.replace('_', '-')}={value}" for name, value in COMMON.items()]
    with ServerProcess(GRPC, model, *common, *OPTIONS, *QUEUE) as server:
        asyncio.run(asyncio.wait_for(main(server), timeout=SECONDS + 2 * PATIENCE))
        assert server.stop() == 0
        assert "Traceback" not in server.err and " ERROR " not in server.err, server.err
