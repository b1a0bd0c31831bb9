"""Runs an engine's steps on a GPU: the forward pass and the sampling, waiting for neither."""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from fastpage._C import InputBatch, ModelRunner, ModelRunnerOutput, Sampler, SamplingArrays
from fastpage.errors import FastpageError, InvalidArgument
from fastpage.executors.cuda import CudaExecutor
from fastpage.executors.decode_graphs import FutureTokens
from fastpage.executors.device_sampler import MAX_VOCAB_SIZE, DeviceSampler, Sampled
from fastpage.executors.staging import Received, send
from fastpage.executors.torch import TorchRunner

_log = logging.getLogger(__name__)


@dataclass
class _Step:
    step_id: int
    batch: InputBatch | None  # None once the step is done
    sampled: Sampled
    # What the device cannot sample: sampling rows, and their logits.
    rows_for_cpu: list[int]
    logits_for_cpu: Received | None
    is_resolved: bool  # the batch's future tokens are written, or there are none
    output: ModelRunnerOutput | None = None


class CudaRunner(ModelRunner):
    """execute() launches a step and returns; wait() waits for its tokens, and for nothing else.

    With max_steps_in_flight=2 a step takes the tokens of the one before from the GPU's memory,
    where they will be by then. It is waited for in execute() only if the CPU has to know tokens to
    launch the step: where penalties or bad_words are asked for, or where the step before has rows
    that the GPU cannot sample. Those are sampled by fastpage._C.Sampler, on num_threads threads;
    `fallbacks` counts them by reason.
    """

    def __init__(
        self, executor: CudaExecutor, num_threads: int = 1, max_steps_in_flight: int = 1
    ) -> None:
        super().__init__()
        self.fallbacks: Counter[str] = Counter()
        self._executor = executor
        self._vocab_size = executor.program.vocab_size
        self._sampler = DeviceSampler(executor.kernels, self._vocab_size, executor.device)
        self._cpu_sampler = Sampler(self._vocab_size, num_threads)
        self._max_steps_in_flight = max_steps_in_flight
        self._steps: deque[_Step] = deque(maxlen=max_steps_in_flight + 1)

    def max_steps_in_flight(self) -> int:
        return self._max_steps_in_flight

    def warm_up(self, max_num_seqs: int) -> None:
        """The sampler, for the largest step; the executor has its own."""
        self._sampler.warm_up(max_num_seqs)

    @torch.inference_mode()
    def execute(self, batch: InputBatch) -> None:
        future = self._future_tokens(batch)
        logits = self._executor.launch_batch(batch, future)
        sampling = batch.sampling_arrays(self._vocab_size)
        sampled = self._sampler.launch(logits, sampling.arrays)
        reasons = self.rows_for_cpu(sampling)
        self._count(reasons.values())
        rows = list(reasons)
        self._steps.append(
            _Step(
                batch.step_id,
                batch,
                sampled,
                rows,
                self._receive(logits, batch, rows) if rows else None,
                is_resolved=future is None,
            )
        )

    def rows_for_cpu(self, sampling: SamplingArrays) -> dict[int, str]:
        """Sampling rows that the GPU cannot sample, and why."""
        return sampling.unsupported

    def wait(self, step_id: int) -> ModelRunnerOutput:
        for i, step in enumerate(self._steps):
            if step.step_id == step_id:
                output = self._finish(step)
                if i + 1 < len(self._steps):
                    self._resolve(self._steps[i + 1], output)
                return output
        raise InvalidArgument(f"wait for step {step_id}, which is not among the last ones executed")

    def _future_tokens(self, batch: InputBatch) -> FutureTokens | None:
        """None once they are known, and written."""
        places = batch.future_tokens
        if not len(places):
            return None
        if not self._steps:
            raise FastpageError(f"step {batch.step_id} needs tokens of the step before: none was")
        before = self._steps[-1]
        if before.rows_for_cpu or batch.reads_tokens:
            self._finish(before)
        if before.output is None:
            return FutureTokens(before.sampled.tokens, places)
        batch.resolve(before.output.sampled_token_ids)
        return None

    def _finish(self, step: _Step) -> ModelRunnerOutput:
        if step.output is None:
            assert step.batch is not None
            if not step.is_resolved:
                raise FastpageError(
                    f"step {step.step_id} needs tokens of the step before, which failed"
                )
            output = step.sampled.wait(step.step_id)
            if step.logits_for_cpu is not None:
                logits = step.logits_for_cpu.wait()
                rest = self._cpu_sampler.sample(logits, step.batch, step.rows_for_cpu)
                _replace(output, step.rows_for_cpu, rest)
            step.output, step.batch, step.logits_for_cpu = output, None, None
        return step.output

    def _resolve(self, step: _Step, before: ModelRunnerOutput) -> None:
        if not step.is_resolved:
            assert step.batch is not None
            step.batch.resolve(before.sampled_token_ids)
            step.is_resolved = True

    def _receive(self, logits: torch.Tensor, batch: InputBatch, rows: list[int]) -> Received:
        """The logits of some sampling rows."""
        logits_rows = send({"rows": batch.sampling_logits_rows[rows]}, logits.device)["rows"]
        return Received(logits.index_select(0, logits_rows).float())

    def _count(self, reasons: Iterable[str]) -> None:
        for reason in reasons:
            if reason not in self.fallbacks:
                _log.warning("sampled on the CPU, which the step waits for: %s", reason)
            self.fallbacks[reason] += 1


def new_runner(
    executor: CudaExecutor, num_threads: int, max_steps_in_flight: int, max_num_seqs: int
) -> ModelRunner:
    """A CudaRunner, warmed up, or what samples on the CPU if the vocabulary is too large."""
    size = executor.program.vocab_size
    if size <= MAX_VOCAB_SIZE:
        runner = CudaRunner(executor, num_threads, max_steps_in_flight)
        runner.warm_up(max_num_seqs)
        return runner
    _log.warning(
        "every token is sampled on the CPU: the vocabulary has %d tokens, the GPU's sampler takes "
        "%d at most",
        size,
        MAX_VOCAB_SIZE,
    )
    return TorchRunner(executor, num_threads, max_steps_in_flight)


def _replace(output: ModelRunnerOutput, rows: list[int], by: ModelRunnerOutput) -> None:
    """Some of the sampling rows' results."""
    token_ids = output.sampled_token_ids
    token_ids[rows] = by.sampled_token_ids
    output.sampled_token_ids = token_ids
    if not by.logprobs:
        return
    logprobs = output.logprobs
    for row, entry in zip(rows, by.logprobs, strict=True):
        logprobs[row] = entry
    output.logprobs = logprobs
