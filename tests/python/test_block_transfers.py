"""Blocks are copied and swapped beside the steps: whatever order a GPU's streams leave open, steps
read what they would read if everything were done at once."""

from __future__ import annotations

import contextlib
import random
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from fastpage import _C

torch = pytest.importorskip("torch")

from fastpage.executors import block_transfers  # noqa: E402  needs torch
from fastpage.executors.block_transfers import BlockTransfers, num_staging_blocks  # noqa: E402

BLOCK_SIZE, NUM_BLOCKS, NUM_HOST_BLOCKS, VOCAB = 4, 14, 24, 100

Contents = list[npt.NDArray[np.int64]]


class Event:
    def __init__(self) -> None:
        self.is_reached = False


class Stream:
    """What was launched on it, all of which is still to be done."""

    def __init__(self, device: Any = None) -> None:
        self.queue: deque[Event | Callable[[], None]] = deque()
        GPU.streams.append(self)

    def record_event(self) -> Event:
        event = Event()
        self.queue.append(lambda: setattr(event, "is_reached", True))
        return event

    def wait_event(self, event: Event) -> None:
        self.queue.append(event)

    def wait_stream(self, other: Stream) -> None:
        self.wait_event(other.record_event())

    def synchronize(self) -> None:
        """Nobody is to wait for it while steps are launched."""

    def advance(self) -> bool:
        """Whether there was something to do that waits for nothing."""
        while self.queue:
            first = self.queue[0]
            if isinstance(first, Event) and not first.is_reached:
                return False
            self.queue.popleft()
            if not isinstance(first, Event):
                first()
                return True
        return False


class GPU:
    """Stands in for torch.cuda: nothing is done before finish()."""

    streams: list[Stream]
    current: Stream

    @classmethod
    def reset(cls) -> None:
        cls.streams = []
        cls.current = Stream()

    @classmethod
    @contextlib.contextmanager
    def stream(cls, stream: Stream) -> Iterator[None]:
        before, cls.current = cls.current, stream
        yield
        cls.current = before

    @classmethod
    def launch(cls, work: Callable[[], None]) -> None:
        cls.current.queue.append(work)

    @classmethod
    def finish(cls, choose: Callable[[list[Stream]], list[Stream]]) -> None:
        """choose: streams in the order in which they are asked to do their next piece."""
        while any(stream.advance() for stream in choose(list(cls.streams))):
            pass
        assert not any(stream.queue for stream in cls.streams)


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    GPU.reset()
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", GPU.stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: GPU.current)


class Kernels:
    """Those of fastpage._C.cuda, on the current stream; pairs are taken as they are launched."""

    def copy_blocks(self, cache: torch.Tensor, copies: npt.NDArray[Any]) -> None:
        pairs = copies.tolist()

        def run() -> None:
            for src, dst in pairs:
                cache[:, dst] = cache[:, src]

        GPU.launch(run)

    def swap_blocks(
        self, cache: torch.Tensor, host: torch.Tensor, swaps: npt.NDArray[Any], direction: str
    ) -> None:
        pairs = swaps.tolist()

        def run() -> None:
            for there, here in pairs:
                if direction == "out":
                    host[:, here] = cache[:, there]
                else:
                    cache[:, there] = host[:, here]

        GPU.launch(run)


class AtOnce:
    """A runner whose steps read the cache and write something new into it."""

    def __init__(self, num_staging: int = 0) -> None:
        shape = (2, NUM_BLOCKS + num_staging, BLOCK_SIZE)
        self.keys, self.values = (torch.zeros(shape, dtype=torch.int64) for _ in range(2))
        shape = (2, NUM_HOST_BLOCKS, BLOCK_SIZE)
        self.host_keys, self.host_values = (torch.zeros(shape, dtype=torch.int64) for _ in range(2))
        self.caches = ((self.keys, self.host_keys), (self.values, self.host_values))
        self.seen: Contents = []
        self.steps = 0
        self.kernels = Kernels()

    def transfer(self, outs: Any, copies: Any, ins: Any) -> None:
        for cache, host in self.caches:
            for there, here in outs.tolist():
                host[:, here] = cache[:, there]
            for src, dst in copies.tolist():
                cache[:, dst] = cache[:, src]
            for there, here in ins.tolist():
                cache[:, there] = host[:, here]

    def launch(self, work: Callable[[], None]) -> None:
        work()

    def step(self, slots: Any, tables: Any, seq_lens: Any) -> None:
        slots, seq_lens = slots.copy(), seq_lens.copy()
        blocks = [t[: -(-n // BLOCK_SIZE)].copy() for t, n in zip(tables, seq_lens, strict=True)]
        self.steps += 1
        new = torch.arange(len(slots)) + 1000 * self.steps

        def run() -> None:
            for sign, (cache, _) in zip((1, -1), self.caches, strict=True):
                cache.flatten(1)[:, slots] = sign * new
                for table, length in zip(blocks, seq_lens, strict=True):
                    self.seen.append(cache[:, table].flatten(1)[:, :length].numpy().copy())

        self.launch(run)


class Launched(AtOnce):
    def __init__(self) -> None:
        super().__init__(num_staging_blocks(NUM_HOST_BLOCKS))
        self.transfers = BlockTransfers(
            self.kernels, self.caches, num_blocks=NUM_BLOCKS, device=torch.device("cuda")
        )

    def transfer(self, outs: Any, copies: Any, ins: Any) -> None:
        self.transfers.launch(outs, copies, ins)

    def launch(self, work: Callable[[], None]) -> None:
        GPU.launch(work)


class Runner(_C.ModelRunner):
    """The same steps on several caches."""

    def __init__(self, caches: list[AtOnce], max_steps_in_flight: int) -> None:
        super().__init__()
        self._caches, self._max_steps_in_flight = caches, max_steps_in_flight
        self._outputs: deque[_C.ModelRunnerOutput] = deque(maxlen=2)
        self.most_swapped_out = 0

    def max_steps_in_flight(self) -> int:
        return self._max_steps_in_flight

    def execute(self, batch: _C.InputBatch) -> None:
        self.most_swapped_out = max(self.most_swapped_out, len(batch.swap_outs))
        if len(batch.future_tokens):
            batch.resolve(self._outputs[-1].sampled_token_ids)
        for caches in self._caches:
            caches.transfer(batch.swap_outs, batch.block_copies, batch.swap_ins)
            caches.step(batch.slot_mapping, batch.block_tables, batch.seq_lens)
        output = _C.ModelRunnerOutput()
        output.step_id = batch.step_id
        output.sampled_token_ids = np.arange(batch.num_samples, dtype=np.int32) + 1
        self._outputs.append(output)

    def wait(self, step_id: int) -> _C.ModelRunnerOutput:
        return next(output for output in self._outputs if output.step_id == step_id)


def serve(runner: Runner) -> None:
    """Many sequences in few blocks, samples of one prompt among them."""
    config = _C.EngineConfig(
        scheduler=_C.SchedulerConfig(
            num_blocks=NUM_BLOCKS,
            num_host_blocks=NUM_HOST_BLOCKS,
            block_size=BLOCK_SIZE,
            max_num_seqs=6,
            max_num_batched_tokens=24,
            max_model_len=40,
            swap_cost_per_block=0.1,
        ),
        vocab_size=VOCAB,
        async_scheduling=runner.max_steps_in_flight() == 2,
    )
    engine = _C.Engine(config, runner)
    draw = np.random.default_rng(1)
    for i in range(16):
        params = _C.SamplingParams(max_tokens=14, ignore_eos=True, n=1 + i % 2)
        engine.add_request(draw.integers(0, VOCAB, 5 + i).tolist(), params)
    while engine.has_unfinished():
        engine.step()
    stats = engine.stats().scheduler
    assert min(stats.num_blocks_copied, stats.num_blocks_swapped_in) > 0


def shuffled(seed: int) -> Callable[[list[Stream]], list[Stream]]:
    draw = random.Random(seed)
    return lambda streams: draw.sample(streams, len(streams))


ORDERS = {
    "steps first": lambda streams: streams,
    "transfers first": lambda streams: streams[::-1],
    "random 1": shuffled(1),
    "random 2": shuffled(2),
}


@pytest.mark.parametrize("most_staged", [64, 4, 2])
@pytest.mark.parametrize("max_steps_in_flight", [1, 2])
@pytest.mark.parametrize("order", ORDERS)
def test_steps_read_the_same_in_any_order(
    monkeypatch: pytest.MonkeyPatch, order: str, max_steps_in_flight: int, most_staged: int
) -> None:
    monkeypatch.setattr(block_transfers, "_MOST_STAGED", most_staged)
    at_once, launched = AtOnce(), Launched()
    runner = Runner([at_once, launched], max_steps_in_flight)
    serve(runner)
    assert runner.most_swapped_out > 4  # more than both parts of the fewest staging blocks
    assert not launched.seen
    GPU.finish(ORDERS[order])
    assert len(launched.seen) == len(at_once.seen)
    for i, (got, want) in enumerate(zip(launched.seen, at_once.seen, strict=True)):
        assert np.array_equal(got, want), i
    for name in ("host_keys", "host_values"):
        assert torch.equal(getattr(launched, name), getattr(at_once, name))


@pytest.mark.parametrize("order", ORDERS)
def test_a_block_that_comes_back_in_the_step_that_swaps_it_out(order: str) -> None:
    caches = [AtOnce(), Launched()]
    outs, ins = np.array([[3, 1], [4, 2]]), np.array([[3, 2], [5, 0]])
    none = np.zeros((0, 2), np.int32)
    for each in caches:
        each.step(np.arange(8, 24), np.zeros((0, 1), int), np.zeros(0, int))
        each.transfer(outs, none, ins)
        each.step(np.arange(16, 20), np.array([[3, 5, 2]]), np.array([12]))
    GPU.finish(ORDERS[order])
    assert np.array_equal(caches[0].seen, caches[1].seen)


def test_a_step_does_not_wait_for_what_is_swapped_out() -> None:
    """It is done before the first block is on the host."""
    launched = Launched()
    none = np.zeros((0, 2), np.int32)
    launched.step(np.arange(8), np.zeros((0, 1), int), np.zeros(0, int))
    launched.transfer(np.array([[0, 3], [1, 4]]), none, none)
    launched.step(np.arange(8), np.array([[0, 1]]), np.array([8]))
    while GPU.current.advance():
        pass
    assert len(launched.seen) == 2
    assert not launched.host_keys.any()
    GPU.finish(ORDERS["steps first"])
    assert launched.host_keys[:, [3, 4]].min() == 1000
