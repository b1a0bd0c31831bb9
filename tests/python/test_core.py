"""The core through its bindings: Scheduler with arrays, Engine with a Python ModelRunner."""

import ctypes
import gc
import math
import sys
import threading
import time
import weakref

import numpy as np
import pytest
from waiting import PATIENCE

from fastpage import _C

VOCAB_SIZE = 100


def scheduler_config(**overrides):
    settings = dict(
        num_blocks=32,
        block_size=4,
        max_num_seqs=8,
        max_num_batched_tokens=32,
        max_model_len=64,
        eos_token_ids=[0],
    )
    return _C.SchedulerConfig(**{**settings, **overrides})


def make_engine(runner, **overrides):
    config = _C.EngineConfig(scheduler=scheduler_config(**overrides), vocab_size=VOCAB_SIZE)
    return _C.Engine(config, runner)


def params(**kwargs):
    return _C.SamplingParams(**{"temperature": 0.0, "ignore_eos": True, "max_tokens": 4, **kwargs})


class CountingRunner(_C.ModelRunner):
    """Says the number after the last one, so that a mixed up batch shows."""

    def __init__(self):
        super().__init__()
        self.error = None
        self.gate = threading.Event()
        self.gate.set()
        self.inside = threading.Event()

    def execute(self, batch):
        self.inside.set()
        self.gate.wait()
        if self.error is not None:
            raise self.error
        assert batch.num_tokens == len(batch.token_ids) == len(batch.positions)
        assert batch.query_start_loc[-1] == batch.num_tokens
        assert batch.block_tables.shape[0] == batch.num_seqs
        for i in range(batch.num_seqs):
            begin, end = batch.query_start_loc[i : i + 2]
            positions = batch.positions[begin:end]
            assert positions[-1] + 1 == batch.seq_lens[i]
            slots = batch.block_tables[i][positions // 4] * 4 + positions % 4
            assert np.array_equal(slots, batch.slot_mapping[begin:end])
        self.output = _C.ModelRunnerOutput()
        self.output.step_id = batch.step_id
        last = batch.token_ids[batch.logits_indices[batch.sampling_logits_rows]]
        self.output.sampled_token_ids = (last + 1) % VOCAB_SIZE

    def wait(self, step_id):
        assert step_id == self.output.step_id
        return self.output


def drain(engine):
    tokens, reasons = {}, {}
    while engine.has_unfinished():
        for output in engine.step().outputs:
            key = (output.request_id, output.index)
            tokens.setdefault(key, []).extend(output.new_token_ids)
            reasons[key] = output.finish_reason
    return tokens, reasons


# ---------------------------------------------------------------- Scheduler


def test_scheduler_step_as_arrays():
    scheduler = _C.Scheduler(scheduler_config())
    a = scheduler.add_request([1, 2, 3, 4, 5], params(max_tokens=2))
    b = scheduler.add_request(np.array([7, 8], np.int32), params(max_tokens=1))
    batch = _C.InputBatch()
    step = scheduler.schedule()
    scheduler.prepare(step, batch)
    assert step.request_ids.tolist() == [a, b]
    assert step.request_ids.dtype == np.uint64
    assert step.num_computed_tokens.tolist() == [0, 0]
    assert step.num_new_tokens.tolist() == [5, 2]
    assert step.num_sampling_rows.tolist() == [1, 1]
    assert step.indices.tolist() == [0, 0]
    assert step.num_scheduled_tokens == 7
    assert batch.token_ids.tolist() == [1, 2, 3, 4, 5, 7, 8]
    assert batch.logits_indices.tolist() == [4, 6]
    for transfers in (batch, step):
        assert transfers.block_copies.shape == (0, 2)
        assert transfers.swap_outs.shape == transfers.swap_ins.shape == (0, 2)

    news = scheduler.update(step, np.array([50, 51], np.int32))
    assert news.request_ids.tolist() == [a, b]
    assert news.new_token_ids.tolist() == [50, 51]
    assert news.num_new_tokens.tolist() == [1, 1]
    assert news.sampling_rows.tolist() == [0, 1]
    assert news.num_output_tokens.tolist() == [1, 1]
    assert news.stop_token_ids.tolist() == [-1, -1]
    assert news.finish_reasons.tolist() == [
        _C.FinishReason.NONE.value,
        _C.FinishReason.LENGTH.value,
    ]
    assert scheduler.abort(a)
    assert not scheduler.abort(a)
    assert not scheduler.has_unfinished()
    assert scheduler.schedule().request_ids.size == 0
    assert scheduler.stats().num_free_blocks == 32
    scheduler.check_integrity()


def run_step(scheduler, batch, sampled=None):
    """One step; each row samples the number after its last token, or `sampled`."""
    step = scheduler.schedule()
    scheduler.prepare(step, batch)
    if sampled is None:
        sampled = batch.token_ids[batch.logits_indices[batch.sampling_logits_rows]] + 1
    return step, scheduler.update(step, sampled)


def test_samples_of_one_prompt():
    scheduler = _C.Scheduler(scheduler_config())
    batch = _C.InputBatch()
    request = scheduler.add_request([1, 2, 3, 4, 5], params(n=3, temperature=1.0), seed=7)
    step, news = run_step(scheduler, batch, [50, 51, 52])
    assert step.num_sampling_rows.tolist() == [3]
    assert batch.num_samples == 3
    assert batch.num_logits == 1
    assert batch.sampling_logits_rows.tolist() == [0, 0, 0]
    assert news.request_ids.tolist() == [request] * 3
    assert news.indices.tolist() == [0, 1, 2]
    assert news.new_token_ids.tolist() == [50, 51, 52]
    assert news.sampling_rows.tolist() == [0, 1, 2]

    step, news = run_step(scheduler, batch)
    assert step.indices.tolist() == [0, 1, 2]
    assert news.new_token_ids.tolist() == [51, 52, 53]
    assert len(step.block_copies) == 2  # the last holder writes in place
    assert batch.block_copies.tolist() == step.block_copies.tolist()

    assert scheduler.abort(request, 1)
    assert not scheduler.abort(request, 1)
    assert scheduler.fork(request, 2, seed=9) == 3
    step, news = run_step(scheduler, batch)
    assert news.indices.tolist() == [0, 2, 3]
    assert news.new_token_ids.tolist() == [52, 54, 54]
    with pytest.raises(_C.InvalidArgument, match="fork of sample 1"):
        scheduler.fork(request, 1, seed=9)
    assert scheduler.stats().num_blocks_copied == 3
    scheduler.check_integrity()
    assert len({_C.sample_seed(7, i) for i in range(5)} | {7}) == 5


def test_proposed_tokens():
    scheduler = _C.Scheduler(scheduler_config())
    batch = _C.InputBatch()
    request = scheduler.add_request([1, 2, 3], params(max_tokens=20))
    run_step(scheduler, batch, [10])
    assert scheduler.propose(request, 0, [11, 12, 77])
    step, news = run_step(scheduler, batch, [11, 12, 13, 99])
    assert step.num_sampling_rows.tolist() == [4]
    assert batch.token_ids.tolist() == [10, 11, 12, 77]
    assert news.num_new_tokens.tolist() == [3]
    assert news.new_token_ids.tolist() == [11, 12, 13]
    stats = scheduler.stats()
    assert (stats.num_draft_tokens, stats.num_accepted_tokens) == (3, 2)
    assert not scheduler.propose(request + 1, 0, [1])


def test_two_steps_in_flight_and_a_discarded_one():
    scheduler = _C.Scheduler(scheduler_config(max_steps_in_flight=2))
    batches = [_C.InputBatch(), _C.InputBatch()]
    request = scheduler.add_request([1, 2, 3], params(max_tokens=20))
    first = scheduler.schedule()
    scheduler.prepare(first, batches[0])
    second = scheduler.schedule()
    scheduler.prepare(second, batches[1])
    assert batches[1].token_ids.tolist() == [-1]
    assert batches[1].future_tokens.tolist() == [[0, 0]]
    with pytest.raises(_C.InvalidArgument, match="2 steps under way"):
        scheduler.schedule()
    with pytest.raises(_C.InvalidArgument, match="not the oldest"):
        scheduler.update(second, [5])
    batches[1].resolve([4])
    assert batches[1].token_ids.tolist() == [4]
    assert scheduler.update(first, [4]).new_token_ids.tolist() == [4]
    scheduler.discard(second)
    step, news = run_step(scheduler, batches[0])
    assert step.request_ids.tolist() == [request]
    assert news.new_token_ids.tolist() == [5]
    scheduler.check_integrity()


def test_a_beam_search_by_hand():
    scheduler = _C.Scheduler(scheduler_config())
    batch = _C.InputBatch()
    scheduler.add_request([1, 2, 3], params(beam_width=2, n=2, max_tokens=2))
    step = scheduler.schedule()
    scheduler.prepare(step, batch)
    with pytest.raises(_C.InvalidArgument, match="without the logprobs of sampling row 0"):
        scheduler.update(step, [9])
    news = scheduler.update(step, [9], [_C.TokenLogprobs([9, 7, 8], [-1.0, -1.0, -2.0], 1)])
    assert news.new_token_ids.size == 0
    step = scheduler.schedule()
    scheduler.prepare(step, batch)
    assert sorted(batch.token_ids.tolist()) == [7, 8]
    after = {7: [-3.0, -4.0], 8: [-0.5, -5.0]}
    rows = [_C.TokenLogprobs([20, 20, 21], [0.0, *after[t]], 1) for t in batch.token_ids.tolist()]
    news = scheduler.update(step, [20, 20], rows)
    assert news.indices.tolist() == [0, 1]
    assert news.num_new_tokens.tolist() == [2, 2]
    assert news.new_token_ids.tolist() == [8, 20, 7, 20]
    assert news.scores.tolist() == [-1.25, -2.0]
    assert not scheduler.has_unfinished()


def test_updates_keep_what_they_point_to():
    scheduler = _C.Scheduler(scheduler_config())
    batch = _C.InputBatch()
    scheduler.add_request([1, 2, 3], params())
    for sampled in (np.array([41], np.int32), np.array([41]), [41], np.array([41, 0])[::2]):
        step = scheduler.schedule()
        scheduler.prepare(step, batch)
        is_taken_as_it_is = isinstance(sampled, np.ndarray) and sampled.dtype == np.int32
        references = sys.getrefcount(sampled)
        news = scheduler.update(step, sampled)
        assert sys.getrefcount(sampled) == references + is_taken_as_it_is
        assert news.new_token_ids.tolist() == [41]


def test_old_updates_show_the_latest_and_never_freed_memory():
    scheduler = _C.Scheduler(scheduler_config())
    batch = _C.InputBatch()
    for i in range(6):
        scheduler.add_request([1, 2, i], params())
    _, old = run_step(scheduler, batch, [50] * 6)
    for token in (60, 61):
        run_step(scheduler, batch, [token] * 6)  # the answer is dropped
        gc.collect()
        others = [np.full(6, 77, np.int32) for _ in range(100)]  # they take what was freed
        assert old.new_token_ids.tolist() == [token] * 6
        del others


@pytest.mark.parametrize("sampled", [None, "a", [1.5], [[1]], np.array([[1]], np.int32), [None]])
def test_sampled_tokens_that_are_none(sampled):
    scheduler = _C.Scheduler(scheduler_config())
    scheduler.add_request([1, 2, 3], params())
    step = scheduler.schedule()
    with pytest.raises(TypeError, match="sampled_token_ids"):
        scheduler.update(step, sampled)
    for logprobs in (5, [None]):
        with pytest.raises(TypeError, match=r"^logprobs must be a sequence of TokenLogprobs$"):
            scheduler.update(step, [1], logprobs)
    assert scheduler.update(step, [1]).new_token_ids.tolist() == [1]  # the step is still there


def test_a_loop_of_steps_keeps_nothing():
    """Python's share of it: pybind11 remembers who keeps whom alive, call by call."""
    scheduler = _C.Scheduler(scheduler_config(max_steps_in_flight=2, max_model_len=4096))
    batch = _C.InputBatch()
    forget = weakref.finalize(batch, lambda: None)

    def steps(count):
        for _ in range(count):
            scheduler.add_request([1, 2, 3], params(max_tokens=1))
            run_step(scheduler, batch)

    steps(100)
    before = allocated_bytes()
    steps(8_000)
    assert allocated_bytes() - before < 20_000
    assert forget.alive


def allocated_bytes():
    """As malloc counts them, the extension's own included."""

    class Mallinfo2(ctypes.Structure):
        _fields_ = [(f"field{i}", ctypes.c_size_t) for i in range(10)]

    gc.collect()
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = Mallinfo2
    return mallinfo2().field7  # uordblks


def test_host_tier_and_kv_events():
    config = scheduler_config(
        num_blocks=4, num_host_blocks=8, enable_kv_events=True, max_model_len=16
    )
    scheduler = _C.Scheduler(config)
    batch = _C.InputBatch()

    def run(prompt):
        scheduler.add_request(prompt, params(max_tokens=1))
        step, _ = run_step(scheduler, batch)
        assert batch.swap_outs.tolist() == step.swap_outs.tolist()
        return step, scheduler.take_kv_events()

    first = list(range(1, 14))
    _, events = run(first)
    assert [(e.kind, e.tier, e.token_ids) for e in events] == [
        ("stored", "device", first[i : i + 4]) for i in (0, 4, 8)
    ]
    assert events[0].parent_hash is None
    assert [e.parent_hash for e in events[1:]] == [e.hash for e in events[:2]]
    assert all(len(e.hash) == 16 for e in events)
    hashes = {e.hash for e in events}

    step, events = run([50] * 13)  # takes the blocks of the first, which go to the host
    assert len(step.swap_outs) == 3
    assert {(e.kind, e.tier) for e in events if e.hash in hashes} == {
        ("removed", "device"),
        ("stored", "host"),
    }
    step, _ = run(first)
    assert len(step.swap_ins) == 3
    assert step.num_computed_tokens.tolist() == [12]
    stats = scheduler.stats()
    assert stats.num_host_blocks == 8
    assert stats.num_blocks_swapped_in == 3
    assert stats.num_blocks_swapped_out >= 3
    assert stats.num_cached_host_blocks >= 3
    assert scheduler.reset_prefix_cache()
    assert [e.kind for e in scheduler.take_kv_events()] == ["cleared"]
    scheduler.check_integrity()


def test_arrays_are_read_only_and_keep_their_owner_alive():
    scheduler = _C.Scheduler(scheduler_config())
    scheduler.add_request([1, 2, 3], params())
    step = scheduler.schedule()
    batch = _C.InputBatch()
    scheduler.prepare(step, batch)
    ids, tokens = step.request_ids, batch.token_ids
    with pytest.raises(ValueError):
        ids[0] = 1
    with pytest.raises(ValueError):
        tokens[0] = 1
    del scheduler, step
    gc.collect()
    assert tokens.tolist() == [1, 2, 3]
    assert len(ids) == 1
    assert batch.block_tables.shape[0] == 1


def test_config_names_what_is_wrong():
    with pytest.raises(TypeError, match="SchedulerConfig has no field 'num_block'"):
        _C.SchedulerConfig(num_block=3)
    with pytest.raises(TypeError, match=r"^SchedulerConfig: num_host_blocks cannot be 1\.5$"):
        _C.SchedulerConfig(num_host_blocks=1.5)
    with pytest.raises(TypeError, match=r"^EngineConfig: async_scheduling cannot be 'yes'$"):
        _C.EngineConfig(async_scheduling="yes")
    with pytest.raises(ValueError, match="policy is 'lifo': must be 'fcfs' or 'priority'"):
        _C.SchedulerConfig(policy="lifo")
    with pytest.raises(_C.InvalidArgument, match="num_blocks is 0"):
        _C.Scheduler(_C.SchedulerConfig())
    assert _C.SchedulerConfig(policy="priority").policy == "priority"


@pytest.mark.parametrize(
    ("prompt", "error", "message"),
    [
        ([], ValueError, "the prompt is empty"),
        ("abc", TypeError, "must be a sequence of integers"),
        (3, TypeError, "must be a sequence of integers"),
        ([1, 2.5], TypeError, r"prompt_token_ids\[1\] must be an integer, got 2.5"),
        ([1, None], TypeError, r"prompt_token_ids\[1\] must be an integer, got None"),
        ([1, 10**30], ValueError, "out of range for a token id"),
        ([2**31], ValueError, "2147483648 is out of range for a token id"),
        ([-1], ValueError, r"prompt token 0 is -1: not in \[0, 100\)"),
        ([1, 100], ValueError, r"prompt token 1 is 100: not in \[0, 100\)"),
        (np.array([1.0]), TypeError, "float64"),
        (np.array([[1]]), TypeError, "one-dimensional"),
        (np.array([2**40]), ValueError, "out of range for a token id"),
        ([1] * 61, ValueError, "prompt 61 \\+ max_tokens 4 > max_model_len 64"),
    ],
)
def test_bad_prompts_are_refused(prompt, error, message):
    engine = make_engine(CountingRunner())
    with pytest.raises(error, match=message):
        engine.add_request(prompt, params())
    assert not engine.has_unfinished()


@pytest.mark.parametrize(
    "prompt",
    [
        [5, 6],
        (5, 6),
        np.array([5, 6], np.int32),
        np.array([5, 6], np.int64),
        np.array([5, 6], np.uint8),
        np.array([5, 0, 6, 0], np.int32)[::2],
        [np.int64(5), np.int32(6)],
        range(5, 7),
    ],
)
def test_prompts_of_every_integer_kind(prompt):
    engine = make_engine(CountingRunner())
    request = engine.add_request(prompt, params())
    tokens, _ = drain(engine)
    assert tokens[request, 0] == [7, 8, 9, 10]


# ---------------------------------------------------------------- Engine


def test_engine_with_a_python_runner():
    engine = make_engine(CountingRunner())
    requests = [engine.add_request([i, 10 * i], params(n=1 + i % 2)) for i in range(1, 10)]
    tokens, reasons = drain(engine)
    for i, request in enumerate(requests, start=1):
        for index in range(1 + i % 2):
            assert tokens[request, index] == [(10 * i + k) % VOCAB_SIZE for k in range(1, 5)]
            assert reasons[request, index] == _C.FinishReason.LENGTH
    stats = engine.stats()
    assert stats.scheduler.num_free_blocks == stats.scheduler.num_blocks == 32
    assert stats.num_generated_tokens == sum(map(len, tokens.values()))
    engine.check_integrity()


def test_stop_token():
    engine = make_engine(CountingRunner())
    engine.add_request([5], params(max_tokens=20, stop_token_ids=[8]))
    outputs = []
    while engine.has_unfinished():
        outputs += engine.step().outputs
    assert outputs[-1].finish_reason == _C.FinishReason.STOP
    assert outputs[-1].finish_reason.name == "STOP"
    assert outputs[-1].stop_token_id == 8
    assert outputs[-1].num_output_tokens == 3


def test_logprobs_of_a_python_runner_reach_the_output():
    class Runner(CountingRunner):
        def execute(self, batch):
            super().execute(batch)
            self.output.logprobs = [_C.TokenLogprobs([6, 7], [-0.5, -1.0], 1)]

    engine = make_engine(Runner())
    engine.add_request([5], params(max_tokens=1, logprobs=1))
    (output,) = engine.step().outputs
    assert output.logprobs[0].token_ids == [6, 7]
    assert output.logprobs[0].logprobs == [-0.5, -1.0]
    assert output.logprobs[0].rank == 1


def test_best_of_and_its_logprobs():
    class Runner(CountingRunner):
        def execute(self, batch):
            super().execute(batch)
            tokens = self.output.sampled_token_ids + np.arange(batch.num_samples)
            self.output.sampled_token_ids = tokens % VOCAB_SIZE
            self.output.logprobs = [
                _C.TokenLogprobs([t], [-float(t % 7)], 1)
                for t in self.output.sampled_token_ids.tolist()
            ]

    engine = make_engine(Runner())
    with pytest.raises(ValueError, match="best_of"):
        engine.add_request([5], params(n=3, best_of=2))
    request = engine.add_request([5], params(n=2, best_of=5, temperature=1.0))
    outputs = []
    while engine.has_unfinished():
        assert not engine.abort(request, 0)
        outputs += engine.step().outputs
    assert [output.index for output in outputs] == [0, 1]
    assert outputs[0].cumulative_logprob >= outputs[1].cumulative_logprob
    for output in outputs:
        expected = -sum(token % 7 for token in output.new_token_ids)
        assert output.cumulative_logprob == expected
        assert output.logprobs == []
        assert output.num_output_tokens == 4


class AsyncRunner(CountingRunner):
    """Computes a step when it is waited for."""

    def __init__(self):
        super().__init__()
        self.batches = []
        self.num_futures = 0

    def max_steps_in_flight(self):
        return 2

    def execute(self, batch):
        self.num_futures += len(batch.future_tokens)
        self.batches.append(batch)

    def wait(self, step_id):
        super().execute(self.batches.pop(0))
        if self.batches:
            self.batches[0].resolve(self.output.sampled_token_ids)
        return super().wait(step_id)


def test_async_scheduling_with_a_python_runner():
    runner = AsyncRunner()
    scheduler = scheduler_config()
    config = _C.EngineConfig(scheduler=scheduler, vocab_size=VOCAB_SIZE, async_scheduling=True)
    with pytest.raises(ValueError, match="turn async_scheduling off"):
        _C.Engine(config, CountingRunner())
    engine = _C.Engine(config, runner)
    requests = [engine.add_request([i, 10 * i], params(max_tokens=3 + i)) for i in range(1, 8)]
    tokens, _ = drain(engine)
    for i, request in enumerate(requests, start=1):
        assert tokens[request, 0] == [(10 * i + k) % VOCAB_SIZE for k in range(1, 4 + i)]
    assert runner.num_futures > 20
    assert engine.stats().scheduler.num_free_blocks == 32
    engine.check_integrity()


def test_kv_events_of_an_engine():
    engine = make_engine(CountingRunner(), enable_kv_events=True)
    engine.add_request([1, 2, 3, 4, 5], params(max_tokens=1))
    (event,) = engine.step().kv_events
    assert (event.kind, event.token_ids) == ("stored", [1, 2, 3, 4])


def test_a_recorded_engine_can_be_replayed(tmp_path):
    engine = make_engine(CountingRunner())
    engine.record(str(tmp_path / "log"))
    for i in range(1, 5):
        engine.add_request([i, i + 1, i + 2], params(n=i, temperature=1.0))
    with pytest.raises(_C.InvalidArgument, match="before the first request"):
        engine.record(str(tmp_path / "other"))
    engine.step()
    result = _C.replay(str(tmp_path / "log"))
    assert result.complete
    assert result.divergence == ""
    assert result.num_steps == 1
    drain(engine)


class Oops(Exception):
    pass


def test_exception_of_a_python_runner_reaches_the_caller_of_step():
    runner = CountingRunner()
    engine = make_engine(runner)
    lost = engine.add_request([1, 2, 3], params())
    runner.error = Oops("no luck")
    with pytest.raises(Oops, match="no luck"):
        engine.step()
    runner.error = None
    kept = engine.add_request([1, 2, 3], params())
    tokens, reasons = drain(engine)
    assert reasons[lost, 0] == _C.FinishReason.ABORT
    assert tokens[kept, 0] == [4, 5, 6, 7]
    assert engine.stats().scheduler.num_free_blocks == 32


def test_runners_that_are_none():
    class Silent(_C.ModelRunner):
        def execute(self, batch):
            pass

        def wait(self, step_id):
            return "nothing"

    class Half(_C.ModelRunner):
        pass

    with pytest.raises(ValueError, match="runner is null"):
        make_engine(None)
    engine = make_engine(Silent())
    engine.add_request([1], params())
    with pytest.raises(TypeError, match="must return a ModelRunnerOutput, got <class 'str'>"):
        engine.step()
    engine = make_engine(Half())
    engine.add_request([1], params())
    with pytest.raises(_C.Error, match=r"ModelRunner.execute\(\) is not implemented"):
        engine.step()


def test_the_engine_keeps_its_runner_alive():
    engine = make_engine(CountingRunner())
    gc.collect()
    engine.add_request([1], params())
    tokens, _ = drain(engine)
    assert list(tokens.values()) == [[2, 3, 4, 5]]


def test_a_full_queue():
    engine = make_engine(CountingRunner(), max_num_waiting=1)
    engine.add_request([1], params())
    with pytest.raises(_C.ResourceExhausted, match="the queue is full: 1 waiting"):
        engine.add_request([1], params())


def test_priority_policy():
    engine = make_engine(CountingRunner(), policy="priority", max_num_seqs=1)
    late = engine.add_request([1], params(max_tokens=1), priority=5)
    soon = engine.add_request([2], params(max_tokens=1), priority=-5)
    order = []
    while engine.has_unfinished():
        order += [output.request_id for output in engine.step().outputs]
    assert order == [soon, late]


def test_calls_from_other_threads_while_a_step_runs():
    runner = CountingRunner()
    engine = make_engine(runner)
    first = engine.add_request([1, 2], params(max_tokens=30))
    runner.gate.clear()
    stepper = threading.Thread(target=engine.step)
    stepper.start()
    assert runner.inside.wait(PATIENCE)
    second = engine.add_request([3], params())
    assert engine.abort(first)
    assert engine.stats().scheduler.num_waiting == 1
    runner.gate.set()
    stepper.join()
    tokens, _ = drain(engine)
    assert tokens[second, 0] == [4, 5, 6, 7]
    assert engine.stats().scheduler.num_free_blocks == 32


def test_wait_for_work_and_wake():
    engine = make_engine(CountingRunner())
    assert not engine.wait_for_work(0)
    threading.Timer(0.02, engine.wake).start()
    assert not engine.wait_for_work(math.inf)
    threading.Timer(0.02, lambda: engine.add_request([1], params())).start()
    assert engine.wait_for_work(math.inf)


def test_threads_add_and_abort_while_another_steps():
    engine = make_engine(CountingRunner())
    news, expected, aborted = {}, {}, set()
    done = threading.Event()

    def step():
        while not done.is_set() or engine.has_unfinished():
            engine.wait_for_work(0.01)
            for output in engine.step().outputs:
                tokens, reasons = news.setdefault(output.request_id, ([], []))
                tokens.extend(output.new_token_ids)
                if output.finish_reason != _C.FinishReason.NONE:
                    reasons.append(output.finish_reason)

    def add(thread):
        for i in range(100):
            prompt = [thread, i % 50, (thread + i) % VOCAB_SIZE]
            request = engine.add_request(prompt, params())
            expected[request] = [(prompt[-1] + k) % VOCAB_SIZE for k in range(1, 5)]
            if i % 4 == 0 and engine.abort(request):
                aborted.add(request)
            if i % 10 == 0:
                time.sleep(0.001)

    stepper = threading.Thread(target=step)
    adders = [threading.Thread(target=add, args=(t,)) for t in range(3)]
    for thread in [stepper, *adders]:
        thread.start()
    for thread in adders:
        thread.join()
    done.set()
    engine.wake()
    stepper.join()

    assert set(news) == set(expected)
    for request, (tokens, reasons) in news.items():
        assert len(reasons) == 1
        if request in aborted:  # or it ended while it was being aborted
            assert reasons[0] in (_C.FinishReason.ABORT, _C.FinishReason.LENGTH)
            assert tokens == expected[request][: len(tokens)]
        else:
            assert tokens == expected[request]
    assert engine.stats().scheduler.num_free_blocks == 32
    engine.check_integrity()
