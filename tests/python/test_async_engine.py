"""AsyncEngine and what it stands on, with a real core and a model that recites the alphabet."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import pytest
from fakes import (
    EOS_ID,
    Gate,
    letter_tokenizer,
    load_alphabet,
    serve_front_ends,
    serve_on_a_thread,
)
from waiting import PATIENCE, is_idle, until

from fastpage import _C, AsyncEngine, RequestOutput, SamplingParams
from fastpage.engine.channel_core import ChannelCore
from fastpage.engine.core import DuplicateRequestId, EngineDied, EngineStopped, LocalCore
from fastpage.engine.engine_thread import PreemptionLog
from fastpage.engine.loading import LoadedModel
from fastpage.engine.observer import EngineObserver
from fastpage.engine.output_processor import EngineStepError, OutputProcessor, RequestState
from fastpage.engine.prompts import Prompt
from fastpage.errors import FastpageError, InvalidArgument, ResourceExhausted
from fastpage.outputs import RequestOutputKind
from fastpage.tokenizer import stop_strings

GREEDY = {"temperature": 0.0}


_core_kind = "local"


@pytest.fixture(autouse=True, params=["local", "channel"])
def core_kind(request: pytest.FixtureRequest) -> None:
    """Every test with run() is made with either core."""
    global _core_kind
    _core_kind = request.param


@contextlib.asynccontextmanager
async def start_engine(loaded: LoadedModel) -> AsyncIterator[AsyncEngine]:
    if _core_kind == "local":
        async with AsyncEngine(loaded) as engine:
            yield engine
        return
    with serve_on_a_thread(loaded) as fileno:
        core = ChannelCore()
        core.open(fileno)
        async with AsyncEngine(loaded, core=core) as engine:
            yield engine


def run(
    test: Callable[[AsyncEngine], Coroutine[Any, Any, None]],
    before_step: Callable[[], None] | None = None,
    **options: Any,
) -> None:
    """Runs `test(engine)`; afterwards nothing is left running and every block is free."""

    async def main() -> None:
        loaded = load_alphabet(before_step, **options)
        async with start_engine(loaded) as engine:
            with Gate.opened_at_the_end(before_step):
                await asyncio.wait_for(test(engine), timeout=PATIENCE)
                await wait_until_idle(engine)
            loaded.engine.check_integrity()

    asyncio.run(main())


async def wait_until_idle(engine: AsyncEngine) -> None:
    await until(lambda: is_idle(engine.stats().scheduler), "requests or blocks are left")


async def has_heard(engine: AsyncEngine) -> None:
    """The core has, of all that it was told before this."""
    with pytest.raises(InvalidArgument, match="max_model_len"):
        await engine.add_request([0] * 1000, SamplingParams(max_tokens=1))


async def last_of(engine: AsyncEngine, *args: Any, **kwargs: Any) -> RequestOutput:
    outputs = [output async for output in engine.generate(*args, **kwargs)]
    assert outputs[-1].finished
    return outputs[-1]


def test_text_tokens_and_usage() -> None:
    async def test(engine: AsyncEngine) -> None:
        out = await last_of(engine, "abc", SamplingParams(max_tokens=5, **GREEDY), "mine")
        assert out.request_id == "mine"
        assert out.prompt == "abc"
        assert out.prompt_token_ids == [0, 1, 2]
        assert out.outputs[0].text == "defgh"
        assert out.outputs[0].token_ids == [3, 4, 5, 6, 7]
        assert out.outputs[0].finish_reason == "length"
        assert out.outputs[0].stop_reason is None
        assert out.metrics.arrival_time <= out.metrics.first_token_time

        out = await last_of(
            engine, {"prompt_token_ids": [24, 25]}, SamplingParams(max_tokens=2, **GREEDY)
        )
        assert out.prompt is None
        assert out.outputs[0].text == "ab"

    run(test)


def test_deltas_join_to_the_cumulative_text() -> None:
    async def test(engine: AsyncEngine) -> None:
        params = SamplingParams(max_tokens=30, logprobs=1, n=2, **GREEDY)
        whole = await last_of(engine, "x", params)
        texts, ids, logprobs, ends = ["", ""], [[], []], [[], []], [0, 0]
        async for out in engine.generate("x", params, output_kind=RequestOutputKind.DELTA):
            for part in out.outputs:
                texts[part.index] += part.text
                ids[part.index] += part.token_ids
                logprobs[part.index] += part.logprobs
                ends[part.index] += part.finish_reason is not None
        for i in range(2):
            assert texts[i] == whole.outputs[i].text
            assert ids[i] == whole.outputs[i].token_ids
            assert logprobs[i] == whole.outputs[i].logprobs
        assert ends == [1, 1]

    run(test)


def test_final_only_gives_one_output() -> None:
    async def test(engine: AsyncEngine) -> None:
        params = SamplingParams(max_tokens=9, **GREEDY)
        stream = engine.generate("a", params, output_kind=RequestOutputKind.FINAL_ONLY)
        outputs = [out async for out in stream]
        assert [out.outputs[0].text for out in outputs] == ["bcdefghij"]

    run(test)


@pytest.mark.parametrize("include", [False, True])
def test_stop_string(include: bool) -> None:
    gate = Gate()

    async def test(engine: AsyncEngine) -> None:
        gate.open(7)
        params = SamplingParams(
            max_tokens=120, stop=["ghi", "zz"], include_stop_str_in_output=include, **GREEDY
        )
        out = (await last_of(engine, "ab", params)).outputs[0]
        assert out.text == ("cdefghi" if include else "cdef")
        assert out.token_ids == list(range(2, 9))
        assert (out.finish_reason, out.stop_reason) == ("stop", "ghi")
        await has_heard(engine)
        # The step that was in progress, and no other one.
        gate.open()
        await wait_until_idle(engine)

    run(test, before_step=gate)


def test_a_stop_string_ends_one_sample_and_not_its_siblings() -> None:
    async def test(engine: AsyncEngine) -> None:
        # At this temperature the samples differ; each must end where its own text says so.
        params = SamplingParams(n=8, temperature=4.0, seed=3, max_tokens=60, stop=["e"])
        out = await last_of(engine, "a", params)
        assert len({sample.text for sample in out.outputs}) > 1
        assert {sample.finish_reason for sample in out.outputs} >= {"stop"}
        for sample in out.outputs:
            assert "e" not in sample.text
            if sample.finish_reason == "length":
                assert len(sample.token_ids) == 60

    run(test)


def test_stop_strings_are_prepared_once_for_all_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = []
    prepare = stop_strings._Automaton

    def automaton(strings: list[str]) -> stop_strings._Automaton:
        prepared.append(strings)
        return prepare(strings)

    monkeypatch.setattr(stop_strings, "_Automaton", automaton)
    prompt = Prompt("a", [0])
    params = SamplingParams(n=8, stop=["cd", "ce"])
    state = RequestState("id", 0, prompt, params, letter_tokenizer())
    assert prepared == [["cd", "ce"]]
    state.samples[0].push(2, None)
    state.samples[1].push(3, None)
    assert not state.samples[1].finished
    state.samples[0].push(3, None)
    assert state.samples[0].finished


@pytest.mark.parametrize("kind", list(RequestOutputKind))
@pytest.mark.parametrize("beams", [False, True])
def test_ranked_outputs_come_whole_at_the_end(kind: RequestOutputKind, beams: bool) -> None:
    async def test(engine: AsyncEngine) -> None:
        if beams:
            params = SamplingParams(n=2, beam_width=3, max_tokens=9, **GREEDY)
        else:
            params = SamplingParams(n=2, best_of=5, temperature=3.0, seed=1, max_tokens=9)
        outputs = [out async for out in engine.generate("ab", params, output_kind=kind)]
        assert len(outputs) == 1
        (out,) = outputs
        assert out.finished
        assert [sample.index for sample in out.outputs] == [0, 1]
        first, second = out.outputs
        assert first.token_ids != second.token_ids
        assert first.cumulative_logprob > second.cumulative_logprob
        assert first.logprobs is None
        if beams:
            assert first.text == "cdefghijk"
            assert first.score == pytest.approx(first.cumulative_logprob / 9)
        else:
            assert first.score is None
        assert out.num_output_tokens == len(first.token_ids) + len(second.token_ids)

    run(test)


def test_ranked_outputs_that_are_aborted() -> None:
    gate = Gate()

    async def test(engine: AsyncEngine) -> None:
        params = SamplingParams(n=2, best_of=5, temperature=3.0, max_tokens=60)
        stream = await engine.add_request("a", params, "r1")
        gate.open(5)
        await until(lambda: engine.stats().num_steps >= 3)
        assert engine.abort("r1")
        out = await anext(stream)
        assert [(sample.text, sample.finish_reason) for sample in out.outputs] == [
            ("", "abort")
        ] * 2
        gate.open(100)

    run(test, before_step=gate)


def test_min_tokens_delays_stop_strings() -> None:
    async def test(engine: AsyncEngine) -> None:
        params = SamplingParams(max_tokens=60, min_tokens=10, stop=["d"], **GREEDY)
        out = (await last_of(engine, "a", params)).outputs[0]
        assert out.text == "bcdefghijklmnopqrstuvwxyzabc"

    run(test)


def test_eos_and_stop_tokens_have_no_text() -> None:
    async def test(engine: AsyncEngine) -> None:
        out = (await last_of(engine, ".", SamplingParams(**GREEDY))).outputs[0]
        assert (out.text, out.token_ids) == ("", [EOS_ID])
        assert (out.finish_reason, out.stop_reason) == ("stop", None)

        out = (await last_of(engine, "a", SamplingParams(stop_token_ids=[4], **GREEDY))).outputs[0]
        assert (out.text, out.token_ids) == ("bcd", [1, 2, 3, 4])
        assert (out.finish_reason, out.stop_reason) == ("stop", 4)

    run(test)


def test_logprobs() -> None:
    async def test(engine: AsyncEngine) -> None:
        params = SamplingParams(max_tokens=3, logprobs=2, prompt_logprobs=1, **GREEDY)
        out = await last_of(engine, "abd", params)
        sample = out.outputs[0]
        assert [next(iter(position)) for position in sample.logprobs] == sample.token_ids
        first = next(iter(sample.logprobs[0].values()))
        assert (first.rank, first.decoded_token) == (1, "e")
        assert sample.cumulative_logprob == pytest.approx(3 * first.logprob)
        assert len(sample.logprobs[0]) == 2

        assert out.prompt_logprobs[0] is None
        assert [next(iter(p)) for p in out.prompt_logprobs[1:]] == [1, 3]
        # "d" after "b" is a surprise: the likely "c" is listed beside it.
        assert out.prompt_logprobs[2][3].rank > 1
        assert out.prompt_logprobs[2][2].rank == 1

    run(test)


def test_a_reader_that_goes_away_frees_its_blocks() -> None:
    gate = Gate()

    async def test(engine: AsyncEngine) -> None:
        params = SamplingParams(max_tokens=120, **GREEDY)
        gate.open()
        async for _ in engine.generate("a", params):
            break
        await until(lambda: not engine._streams)
        await has_heard(engine)
        # The step that was in progress, and no other one.
        gate.open()
        await wait_until_idle(engine)

        task = asyncio.create_task(last_of(engine, "a", params))
        await until(lambda: engine._streams)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await has_heard(engine)
        gate.open()
        await wait_until_idle(engine)

    run(test, before_step=gate)


def test_abort_by_id() -> None:
    gate = Gate()

    async def test(engine: AsyncEngine) -> None:
        params = SamplingParams(max_tokens=100, **GREEDY)
        stream = await engine.add_request("a", params, "r1")
        gate.open()
        assert (await anext(stream)).outputs[0].text == "b"
        assert engine.abort("r1")
        out = await anext(stream)
        assert out.finished
        assert (out.outputs[0].text, out.outputs[0].finish_reason) == ("b", "abort")
        with pytest.raises(StopAsyncIteration):
            await anext(stream)
        assert not engine.abort("r1")
        gate.open(100)

    run(test, before_step=gate)


def test_a_failed_step_costs_its_requests_only() -> None:
    gate = Gate()
    failing = False

    def before_step() -> None:
        gate()
        if failing:
            raise RuntimeError("a bit fell over")

    async def test(engine: AsyncEngine) -> None:
        nonlocal failing
        stream = await engine.add_request("a", SamplingParams(max_tokens=50, **GREEDY))
        gate.open()
        await anext(stream)
        failing = True
        gate.open()
        with pytest.raises(EngineStepError, match="a bit fell over"):
            await anext(stream)
        failing = False
        gate.open(100)
        out = await last_of(engine, "a", SamplingParams(max_tokens=3, **GREEDY))
        assert out.outputs[0].text == "bcd"

    run(test, before_step=before_step)


def test_a_slow_reader_finds_several_steps_in_one_output() -> None:
    async def test(engine: AsyncEngine) -> None:
        stream = await engine.add_request(
            "a", SamplingParams(max_tokens=20, **GREEDY), output_kind=RequestOutputKind.DELTA
        )
        await until(lambda: not engine._streams)
        out = await anext(stream)
        assert out.finished
        assert out.outputs[0].text == "bcdefghijklmnopqrstu"
        assert [more async for more in stream] == []

    run(test)


def test_requests_that_cannot_be_served() -> None:
    async def test(engine: AsyncEngine) -> None:
        params = SamplingParams(max_tokens=5, **GREEDY)
        for prompt, words in [
            ("", "prompt is empty"),
            ([], "prompt_token_ids is empty"),
            ([0, 99], r"prompt_token_ids\[1\]=99"),
            ([0, 2**40], r"prompt_token_ids\[1\]"),
            ([0, -1], r"prompt_token_ids\[1\]=-1"),
            ([0, "a"], r"prompt_token_ids\[1\]='a'"),
            ({"promt": "a"}, "unknown keys: promt"),
            ({"prompt": 5}, "must be a string"),
            (7, "int"),
            ("a" * 128, "128"),
        ]:
            with pytest.raises(InvalidArgument, match=words):
                await last_of(engine, prompt, params)
        with pytest.raises(InvalidArgument, match="priority=1"):
            await last_of(engine, "a", params, priority=1)
        # Nobody was hurt.
        assert (await last_of(engine, "a", params)).outputs[0].text == "bcdef"

    run(test)


def test_one_id_is_one_request() -> None:
    gate = Gate()

    async def test(engine: AsyncEngine) -> None:
        params = SamplingParams(max_tokens=2, **GREEDY)
        first = await engine.add_request("a", params, "same")
        with pytest.raises(DuplicateRequestId, match="same"):
            await engine.add_request("b", params, "same")
        gate.open(10)
        async for _ in first:
            pass
        assert (await last_of(engine, "c", params, "same")).outputs[0].text == "de"

    run(test, before_step=gate)


def test_no_id_of_a_callers_is_in_the_way_of_those_made_up_here() -> None:
    gate = Gate()

    async def test(engine: AsyncEngine) -> None:
        params = SamplingParams(max_tokens=100, **GREEDY)
        streams = [await engine.add_request("a", params)]
        prefix = streams[0].request_id.rstrip("0123456789")
        ids = {f"{prefix}{i}" for i in range(8)} - {streams[0].request_id}
        for request_id in (*ids, None):
            streams.append(await engine.add_request("a", params, request_id))
        for stream in streams:
            stream.abort()
        gate.open(1000)

    run(test, before_step=gate)


@pytest.mark.parametrize(
    "much",
    [
        {"bad_words": ["a" * 5000]},
        {"bad_words": ["a" * i for i in range(1, 110)]},
        {"allowed_token_ids": list(range(5000))},
        {"stop_token_ids": list(range(5000))},
        {"logit_bias": {i: 1.0 for i in range(5000)}},
    ],
)
def test_long_parameters_hold_nobody_up(
    much: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[threading.Thread] = []
    to_core = SamplingParams.to_core

    def watched(self: SamplingParams, *arguments: Any) -> Any:
        threads.append(threading.current_thread())
        return to_core(self, *arguments)

    monkeypatch.setattr(SamplingParams, "to_core", watched)

    async def test(engine: AsyncEngine) -> None:
        params = SamplingParams(max_tokens=1, **much)
        with contextlib.suppress(InvalidArgument):
            await last_of(engine, "a", params)
        await last_of(engine, "a", SamplingParams(max_tokens=1))
        assert [thread is threading.main_thread() for thread in threads] == [False, True]

    run(test)


class FirstOfTwo:
    """async_engine.Siblings."""

    index = 0

    def __init__(self) -> None:
        self.other: AsyncEngine | None = None

    async def abort(self, request_id: str) -> bool:
        return self.other is not None and self.other.abort(request_id)


def test_an_id_is_free_in_all_front_ends_when_its_request_has_ended() -> None:
    """As its client sees it: here the engine does not know of the stop string yet."""
    gate = Gate()

    async def main() -> None:
        loaded = load_alphabet(gate)
        with serve_front_ends(loaded, 2) as filenos:
            cores = [ChannelCore(), ChannelCore()]
            for core, fileno in zip(cores, filenos, strict=True):
                core.open(fileno)
            one, other = (AsyncEngine(loaded, core=core, siblings=FirstOfTwo()) for core in cores)
            async with one, other:
                params = SamplingParams(max_tokens=50, stop=["c"], **GREEDY)
                stream = await one.add_request("a", params, "mine")
                with pytest.raises(DuplicateRequestId, match="request_id='mine' is in use"):
                    await other.add_request("a", params, "mine")
                gate.open(2)
                assert [output async for output in stream][-1].outputs[0].finish_reason == "stop"
                (await other.add_request("a", params, "mine")).abort()
                gate.open(1000)

    asyncio.run(asyncio.wait_for(main(), timeout=PATIENCE))


def test_abort_finds_a_request_while_another_front_end_asks_for_its_id_too() -> None:
    gate = Gate()

    async def main() -> None:
        loaded = load_alphabet(gate)
        with serve_front_ends(loaded, 2) as filenos, Gate.opened_at_the_end(gate):
            cores = [ChannelCore(), ChannelCore()]
            for core, fileno in zip(cores, filenos, strict=True):
                core.open(fileno)
            siblings = FirstOfTwo()
            one = AsyncEngine(loaded, core=cores[0], siblings=FirstOfTwo())
            other = AsyncEngine(loaded, core=cores[1], siblings=siblings)
            siblings.other = one
            async with one, other:
                params = SamplingParams(max_tokens=50, **GREEDY)
                stream = await one.add_request("a", params, "mine")
                refused = asyncio.create_task(other.add_request("a", params, "mine"))
                await asyncio.sleep(0)
                assert "mine" in other._core_ids and not refused.done()
                assert await other.abort_anywhere("mine")
                assert not one._streams and not other._streams
                assert [output async for output in stream][-1].outputs[0].finish_reason == "abort"
                await refused

    asyncio.run(asyncio.wait_for(main(), timeout=PATIENCE))


def test_more_logprobs_than_max_logprobs() -> None:
    async def test(engine: AsyncEngine) -> None:
        engine._model.info = dataclasses.replace(engine.info, max_logprobs=3)
        for name in ("logprobs", "prompt_logprobs"):
            with pytest.raises(InvalidArgument, match=rf"^{name} must be between 0 and 3 "):
                await engine.add_request("a", SamplingParams(**{name: 4}))
            params = SamplingParams(max_tokens=1, **{name: 3})
            async for _ in await engine.add_request("a", params):
                pass

    run(test)


def test_a_full_queue_refuses() -> None:
    gate = Gate()

    async def test(engine: AsyncEngine) -> None:
        params = SamplingParams(max_tokens=2, **GREEDY)
        streams = []
        with pytest.raises(ResourceExhausted):
            for _ in range(10):
                streams.append(await engine.add_request("a", params))
        gate.open(100)
        for stream in streams:
            async for _ in stream:
                pass

    run(test, before_step=gate, max_num_seqs=2, max_num_waiting=4)


class _Stats:
    num_free_blocks = 3
    num_blocks = 64
    num_host_blocks = 0

    def __init__(self, num_preemptions: int = 0) -> None:
        self.num_preemptions = num_preemptions
        self.num_preemptions_swap = 0


def test_preemptions_are_logged_a_line_for_all_of_several_seconds(
    caplog: pytest.LogCaptureFixture,
) -> None:
    now = 100.0
    log = PreemptionLog(lambda: now)
    stats = _Stats()
    with caplog.at_level(logging.WARNING, "fastpage.engine"):
        log.look_at(stats)
        assert caplog.messages == []
        stats.num_preemptions, stats.num_preemptions_swap = 3, 1
        log.look_at(stats)
        log.look_at(stats)
        stats.num_preemptions = 10
        log.look_at(stats)
        now += 60
        stats.num_host_blocks = 8
        log.look_at(stats)
        log.look_at(stats)
    first, second = caplog.messages
    assert "3 preempted (1 by swapping to the host cache, 2 to be computed again)" in first
    assert "3 of 64 blocks are free" in first
    assert "host_cache_memory" in first
    # More urgent requests and beams push others out, too, with any number of blocks free.
    assert "KV cache was full" not in first
    assert "max_num_seqs" in first
    assert "7 preempted (0 by swapping" in second
    assert "host_cache_memory" not in second


def test_preemptions_of_an_engine_that_was_started_again_begin_anew(
    caplog: pytest.LogCaptureFixture,
) -> None:
    now = 100.0
    log = PreemptionLog(lambda: now)
    with caplog.at_level(logging.WARNING, "fastpage.engine"):
        log.look_at(_Stats(5))
        now += 60
        log.look_at(_Stats())
        log.look_at(_Stats(2))
    first, second = caplog.messages
    assert "5 preempted" in first
    assert "2 preempted" in second


def test_an_observer_that_fails_costs_nobody_anything(caplog: pytest.LogCaptureFixture) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("a clumsy observer")

    class Clumsy(EngineObserver):
        request_added = request_refused = request_finished = fail
        stepped = engine_started = engine_died = fail

    class Careful(EngineObserver):
        def __init__(self) -> None:
            self.heard: list[str] = []

        def request_added(self, request: RequestState) -> None:
            self.heard.append("added")

        def request_refused(self, request_id: str, error: Exception) -> None:
            self.heard.append("refused")

        def request_finished(self, request: RequestState) -> None:
            self.heard.append("finished")

        def engine_died(self, error: EngineDied) -> None:
            self.heard.append("died")

        def engine_started(self, engine: AsyncEngine) -> None:
            self.heard.append("started")

    async def test(engine: AsyncEngine) -> None:
        careful = Careful()
        engine.listen_to_kv_events(fail)
        engine.add_observer(Clumsy())
        engine.add_observer(careful)
        outputs = [o async for o in engine.generate("abcdef", SamplingParams(**GREEDY))]
        assert outputs[-1].outputs[0].text == "ghijklmnopqrstuv"
        with pytest.raises(InvalidArgument):
            await engine.add_request("", SamplingParams(**GREEDY))
        engine.on_died(EngineDied("as a test"))
        engine.on_started()
        assert careful.heard == ["started", "added", "finished", "refused", "died", "started"]

    run(test, enable_kv_events=True)
    assert "Clumsy" in caplog.text and "a clumsy observer" in caplog.text


class Counting(EngineObserver):
    """Of each request it must hear as often that it ends as that it begins."""

    def __init__(self) -> None:
        self.in_progress: list[RequestState] = []
        self.num_finished = 0

    def request_added(self, request: RequestState) -> None:
        self.in_progress.append(request)

    def request_finished(self, request: RequestState) -> None:
        self.in_progress.remove(request)
        self.num_finished += 1


class EndsAtOnce(LocalCore):
    """A request is at its end before add_request() gets to go on: it was aborted, or its engine
    died."""

    def __init__(self, loaded: LoadedModel, end: Callable[[], object]) -> None:
        super().__init__(loaded.engine)
        self._end = end

    async def accepted(self, core_id: int) -> None:
        self._end()


@pytest.mark.parametrize("dies", [False, True])
def test_observers_hear_of_the_end_of_what_ends_at_once(dies: bool) -> None:
    def end() -> None:
        if dies:
            engine.on_died(EngineDied("as a test"))
        else:
            assert engine.abort("it")

    async def main() -> None:
        nonlocal engine
        loaded = load_alphabet()
        counting = Counting()
        async with AsyncEngine(loaded, counting, EndsAtOnce(loaded, end)) as engine:
            stream = await engine.add_request("a", SamplingParams(**GREEDY), "it")
            assert (counting.in_progress, counting.num_finished) == ([], 1)
            if dies:
                with pytest.raises(EngineDied):
                    await anext(stream)
            else:
                assert (await anext(stream)).outputs[0].finish_reason == "abort"

    engine: AsyncEngine
    asyncio.run(main())


def test_an_observer_may_abort(caplog: pytest.LogCaptureFixture) -> None:
    class Impatient(Counting):
        def request_finished(self, request: RequestState) -> None:
            super().request_finished(request)
            for other in list(self.in_progress):
                engine.abort(other.request_id)

    async def test(to_be_watched: AsyncEngine) -> None:
        nonlocal engine
        engine = to_be_watched
        observer = Impatient()
        engine.add_observer(observer)
        params = SamplingParams(max_tokens=1, **GREEDY)
        streams = [await engine.add_request("a", params) for _ in range(4)]
        gate.open(4)
        for stream in streams:
            [output] = [output async for output in stream]
            assert output.outputs[0].finish_reason in ("length", "abort")
        assert (observer.in_progress, observer.num_finished) == ([], 4)

    engine: AsyncEngine
    gate = Gate()
    run(test, gate)
    assert not caplog.records


def test_the_error_of_a_step_is_not_that_of_later_ones() -> None:
    class Lost:
        index = 0
        finish_reason = _C.FinishReason.ABORT

        def __init__(self, core_id: int) -> None:
            self.request_id = core_id

    def error_of_one() -> str:
        state = processor.add(1, "it", Prompt("a", [0]), SamplingParams())
        processor.process([Lost(1)])  # type: ignore[list-item]
        return str(state.error)

    processor = OutputProcessor(letter_tokenizer())
    processor.step_failed(RuntimeError("out of luck"))
    assert "out of luck" in error_of_one()
    assert "out of luck" not in error_of_one()


@pytest.mark.parametrize("error", [MemoryError(), FastpageError("no message")])
def test_an_engine_that_cannot_be_understood_counts_as_dead(error: Exception) -> None:
    class Deaf:
        closed = True

        def __init__(self, client: Any) -> None:
            self.abort = client.abort
            self.has_unsent = False

        def receive(self) -> list[Any]:
            raise error

    gate = Gate()

    async def main() -> None:
        loaded = load_alphabet(gate)
        with serve_on_a_thread(loaded) as fileno:
            core = ChannelCore()
            core.open(fileno)
            async with AsyncEngine(loaded, core=core) as engine:
                stream = await engine.add_request("a", SamplingParams(max_tokens=100, **GREEDY))
                gate.open()
                await anext(stream)
                assert engine.stats().scheduler.num_running == 1
                core._client = Deaf(core._client)  # type: ignore[assignment]
                gate.open(100)
                with pytest.raises(EngineDied):
                    async for _ in stream:
                        pass
                assert not engine.ready
                assert engine.stats().scheduler.num_running == 0

    asyncio.run(asyncio.wait_for(main(), timeout=PATIENCE))


@pytest.mark.parametrize("error", [MemoryError(), KeyError("a fault of ours")])
def test_news_that_cannot_be_taken_in_count_as_the_engines_end(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: object) -> None:
        raise error

    async def main() -> None:
        loaded = load_alphabet()
        with serve_on_a_thread(loaded) as fileno:
            core = ChannelCore()
            core.open(fileno)
            async with AsyncEngine(loaded, core=core) as engine:
                monkeypatch.setattr(engine._processor, "process", fail)
                with pytest.raises(EngineDied):
                    await last_of(engine, "a", SamplingParams(max_tokens=5, **GREEDY))
                await core.wait_closed()
                assert not engine.ready

    asyncio.run(asyncio.wait_for(main(), timeout=PATIENCE))


def test_shutdown_ends_what_is_in_progress() -> None:
    gate = Gate()

    async def main() -> None:
        engine = AsyncEngine(load_alphabet(gate))
        stream = await engine.add_request("a", SamplingParams(max_tokens=100, **GREEDY))
        gate.open()
        await anext(stream)
        stopping = asyncio.create_task(engine.shutdown())
        await until(lambda: not engine._streams)
        gate.open(100)
        await stopping
        with pytest.raises(EngineStopped):
            async for _ in stream:
                pass
        with pytest.raises(EngineStopped):
            await engine.add_request("a", SamplingParams())

    asyncio.run(asyncio.wait_for(main(), timeout=PATIENCE))


def test_many_at_once_equal_one_alone() -> None:
    async def test(engine: AsyncEngine) -> None:
        async def one(i: int) -> RequestOutput:
            await asyncio.sleep(i % 7 * 0.001)
            params = SamplingParams(temperature=2.0, seed=i, max_tokens=5 + i % 20, logprobs=1)
            return await last_of(engine, "abcdefgh"[: 1 + i % 8], params)

        together = await asyncio.gather(*(one(i) for i in range(48)))
        for i in range(0, 48, 7):
            alone = await one(i)
            assert alone.outputs == together[i].outputs

    run(test, num_blocks=40)


LEAVES_ITS_THREAD_RUNNING = """
import sys, time
from fastpage import _C
from fastpage.engine.engine_thread import EngineThread

config = _C.EngineConfig(scheduler=_C.SchedulerConfig(num_blocks=4), vocab_size=8)
EngineThread(_C.Engine(config, _C.ModelRunner()), print, print).start()

class Lingers:  # longer than the thread sleeps while there is no work
    def __del__(self, sleep=time.sleep):
        sleep(1.2)

sys.lingers = Lingers()
"""


def test_an_engine_that_was_not_shut_down_does_not_crash_the_interpreters_exit() -> None:
    script = [sys.executable, "-c", LEAVES_ITS_THREAD_RUNNING]
    result = subprocess.run(script, capture_output=True, text=True, timeout=PATIENCE)
    assert (result.returncode, result.stderr) == (0, "")


def test_an_output_that_cannot_be_taken_in_costs_its_request_and_ends_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gate = Gate()

    async def main() -> None:
        async with AsyncEngine(load_alphabet(gate)) as engine:
            monkeypatch.setattr(engine._processor, "_token_text", lambda _: 1 // 0)
            params = SamplingParams(n=1, best_of=3, max_tokens=100, prompt_logprobs=1)
            gate.open()
            with pytest.raises(ZeroDivisionError):
                await last_of(engine, "abc", params)
            # The step that was in progress, and no other one.
            gate.open()
            await wait_until_idle(engine)

    asyncio.run(main())
