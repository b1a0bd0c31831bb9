"""From the tokens of the engine's steps to text: detokenizes, finds stop strings, keeps the state
of each request. Single-threaded: whoever owns a processor calls it from one thread only.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from fastpage import _C
from fastpage.engine.core import Core
from fastpage.engine.prompts import Prompt
from fastpage.errors import FastpageError
from fastpage.outputs import (
    CompletionOutput,
    Logprob,
    PositionLogprobs,
    RequestMetrics,
    RequestOutput,
)
from fastpage.sampling_params import SamplingParams
from fastpage.tokenizer import IncrementalDetokenizer, StopStringMatcher, Tokenizer


class EngineStepError(FastpageError):
    """The model failed in a step that this request was part of."""


class SampleAbort(NamedTuple):
    """What the core still computes but nobody needs: a sample whose stop string has come, or all
    that is left of a request that failed, or has ended with such a sample."""

    core_id: int
    sample: int | None  # None: all

    def tell(self, core: _C.Engine | Core) -> None:
        if self.sample is None:
            core.abort(self.core_id)
        else:
            core.abort(self.core_id, self.sample)


@dataclass(slots=True)
class ProcessedStep:
    """What a step has brought."""

    time: float  # of time.monotonic(): when it came
    changed: list[RequestState] = field(default_factory=list)  # the requests with news
    aborts: list[SampleAbort] = field(default_factory=list)
    num_new_tokens: int = 0
    first_tokens: list[RequestState] = field(default_factory=list)  # whose first token came
    # Seconds since its token before, of each output that got another.
    token_gaps: list[float] = field(default_factory=list)


class _Sample:
    """One of the n outputs of a request."""

    def __init__(
        self,
        index: int,
        prompt: Prompt,
        params: SamplingParams,
        tokenizer: Tokenizer,
        matcher: StopStringMatcher,
    ) -> None:
        self.output = CompletionOutput(index=index, text="", token_ids=[])
        self.finished = False
        if params.logprobs is not None:
            self.output.logprobs = []
            self.output.cumulative_logprob = 0.0
        self._params = params
        self._detokenizer: IncrementalDetokenizer | None = None
        if params.detokenize:
            self._detokenizer = IncrementalDetokenizer(
                tokenizer, prompt.token_ids, skip_special_tokens=params.skip_special_tokens
            )
        self._matcher = matcher
        self.last_token_time: float | None = None
        # How much delta() has given out.
        self._sent_chars = 0
        self._sent_tokens = 0
        self._sent_finish = False

    def push(self, token_id: int, logprobs: PositionLogprobs | None, silent: bool = False) -> None:
        """Takes in one token; finishes the sample if it completes a stop string. A silent token has
        no text: the stop token that ends the sample."""
        out = self.output
        out.token_ids.append(token_id)
        if out.logprobs is not None and out.cumulative_logprob is not None and logprobs is not None:
            out.logprobs.append(logprobs)
            out.cumulative_logprob += logprobs[token_id].logprob
        if self._detokenizer is None or silent:
            return
        text = self._detokenizer.push([token_id])
        if len(out.token_ids) <= self._params.min_tokens:
            out.text += text
        else:
            self._push_text(text)

    def finish(self, reason: str, stop_reason: int | str | None = None) -> None:
        """Releases the text held back; a stop string in it is the reason then."""
        if self._detokenizer is not None:
            self._push_text(self._detokenizer.flush())
            if self.finished:
                return
            self.output.text += self._matcher.flush()
        self._set_finished(reason, stop_reason)

    def snapshot(self) -> CompletionOutput:
        out = self.output
        return CompletionOutput(
            out.index,
            out.text,
            list(out.token_ids),
            out.cumulative_logprob,
            None if out.logprobs is None else list(out.logprobs),
            out.finish_reason,
            out.stop_reason,
            out.score,
        )

    def delta(self) -> CompletionOutput | None:
        out = self.output
        if len(out.token_ids) == self._sent_tokens and self._sent_finish == self.finished:
            return None
        news = CompletionOutput(
            out.index,
            out.text[self._sent_chars :],
            out.token_ids[self._sent_tokens :],
            out.cumulative_logprob,
            None if out.logprobs is None else out.logprobs[self._sent_tokens :],
            out.finish_reason,
            out.stop_reason,
            out.score,
        )
        self._sent_chars = len(out.text)
        self._sent_tokens = len(out.token_ids)
        self._sent_finish = self.finished
        return news

    def _push_text(self, text: str) -> None:
        released, stop = self._matcher.push(text)
        self.output.text += released
        if stop is not None:
            self._set_finished("stop", stop)

    def _set_finished(self, reason: str, stop_reason: int | str | None) -> None:
        self.output.finish_reason = reason
        self.output.stop_reason = stop_reason
        self.finished = True


class RequestState:
    """A request in progress, and what has become of it so far."""

    def __init__(
        self,
        request_id: str,
        core_id: int,
        prompt: Prompt,
        params: SamplingParams,
        tokenizer: Tokenizer,
    ) -> None:
        self.request_id = request_id
        self.core_id = core_id
        self.prompt = prompt
        self.params = params
        matcher = StopStringMatcher(list(params.stop or ()), params.include_stop_str_in_output)
        self.samples = [
            _Sample(i, prompt, params, tokenizer, matcher.fresh()) for i in range(params.n)
        ]
        # The core hands in ranked outputs whole, at the end, when it has compared them.
        self.ranked = bool(params.beam_width) or (params.best_of or 0) > params.n
        self.metrics = RequestMetrics(arrival_time=time.monotonic())
        self.prompt_logprobs: list[PositionLogprobs | None] | None = None
        if params.prompt_logprobs is not None:
            self.prompt_logprobs = [None]
        self.num_cached_tokens = 0
        self.num_in_core = params.n  # samples that the core still computes
        self.num_output_tokens = 0
        self.finished = False  # all of its samples, or it failed
        self.error: Exception | None = None
        self._sent_prompt_logprobs = 0

    def sample_finished(self) -> None:
        if all(sample.finished for sample in self.samples):
            self.finished = True

    def fail(self, error: Exception) -> None:
        self.error = error
        self.finished = True

    def abort(self) -> None:
        """Ends what has not ended."""
        for sample in self.samples:
            if not sample.finished:
                sample.finish("abort")
        self.finished = True

    def snapshot(self) -> RequestOutput:
        """All so far."""
        logprobs = None if self.prompt_logprobs is None else list(self.prompt_logprobs)
        return self._output([sample.snapshot() for sample in self.samples], logprobs)

    def delta(self) -> RequestOutput:
        """What is new since the last call: samples without news are left out."""
        news = [out for sample in self.samples if (out := sample.delta()) is not None]
        logprobs = None
        if self.prompt_logprobs is not None:
            logprobs = self.prompt_logprobs[self._sent_prompt_logprobs :]
            self._sent_prompt_logprobs = len(self.prompt_logprobs)
        return self._output(news, logprobs)

    def _output(
        self,
        samples: list[CompletionOutput],
        prompt_logprobs: list[PositionLogprobs | None] | None,
    ) -> RequestOutput:
        return RequestOutput(
            self.request_id,
            self.prompt.text,
            self.prompt.token_ids,
            samples,
            self.finished,
            prompt_logprobs,
            self.metrics,
            self.num_cached_tokens,
            num_output_tokens=self.num_output_tokens,
        )


class OutputProcessor:
    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        # For logprobs, a thousand tokens a position at worst. The vocabulary bounds it.
        self._token_texts: dict[int, str] = {}
        self._requests: dict[int, RequestState] = {}
        self._step_error: Exception | None = None

    def add(
        self, core_id: int, request_id: str, prompt: Prompt, params: SamplingParams
    ) -> RequestState:
        """`core_id` is what the core's add_request() gave out."""
        state = RequestState(request_id, core_id, prompt, params, self._tokenizer)
        self._requests[core_id] = state
        return state

    def forget(self, core_id: int) -> None:
        """The request was aborted: what the core still says of it is dropped."""
        self._requests.pop(core_id, None)

    @property
    def num_unfinished(self) -> int:
        return len(self._requests)

    def step_failed(self, error: Exception) -> None:
        """A step raised `error`; the core reports in its next step which requests it has cost."""
        self._step_error = error

    def process(self, outputs: Iterable[_C.RequestOutput]) -> ProcessedStep:
        """Takes in one step. The core is to be told the aborts."""
        changed: dict[int, RequestState] = {}
        step = ProcessedStep(time.monotonic())
        for output in outputs:
            state = self._requests.get(output.request_id)
            if state is None:
                continue
            reason = output.finish_reason
            still_computed = reason == _C.FinishReason.NONE
            state.num_in_core -= not still_computed
            sample = state.samples[output.index]
            if sample.finished:
                continue
            try:
                self._take_in(state, sample, output, None if still_computed else reason, step)
            except Exception as error:  # costs this request, nobody else
                state.fail(error)
            changed[state.core_id] = state
            if sample.finished:
                state.sample_finished()
            if state.finished:
                # All of it, so that the core knows that its name is free.
                if state.num_in_core:
                    step.aborts.append(SampleAbort(state.core_id, None))
                del self._requests[state.core_id]
            elif still_computed and sample.finished:
                step.aborts.append(SampleAbort(state.core_id, output.index))
        self._step_error = None
        step.changed = list(changed.values())
        return step

    def _take_in(
        self,
        state: RequestState,
        sample: _Sample,
        output: _C.RequestOutput,
        reason: _C.FinishReason | None,  # None: it goes on
        step: ProcessedStep,
    ) -> None:
        if reason == _C.FinishReason.ABORT:
            # Aborts that were asked for are forgotten before they get here.
            why = self._step_error or "memory ran out before its first step"
            state.fail(EngineStepError(f"the engine gave the request up: {why}"))
            return
        state.num_cached_tokens = output.num_cached_tokens
        if state.prompt_logprobs is not None:
            state.prompt_logprobs += map(self._position_logprobs, output.prompt_logprobs)
        token_ids = output.new_token_ids
        if token_ids:
            metrics = state.metrics
            step.num_new_tokens += len(token_ids)
            if metrics.first_token_time is None:
                metrics.first_token_time = step.time
                metrics.queue_seconds = output.queue_seconds
                step.first_tokens.append(state)
            if sample.last_token_time is not None:
                step.token_gaps.append(step.time - sample.last_token_time)
            metrics.last_token_time = sample.last_token_time = step.time
        logprobs: list[PositionLogprobs | None] = [None] * len(token_ids)
        if sample.output.logprobs is not None:
            logprobs = [self._position_logprobs(entry) for entry in output.logprobs]
        by_stop_token = reason == _C.FinishReason.STOP
        silent_end = by_stop_token and not state.params.include_stop_str_in_output
        for i, (token_id, entry) in enumerate(zip(token_ids, logprobs, strict=True)):
            state.num_output_tokens += 1
            sample.push(token_id, entry, silent=silent_end and i + 1 == len(token_ids))
            if sample.finished:
                return
        if reason is not None:
            if state.ranked:
                sample.output.cumulative_logprob = output.cumulative_logprob
            if state.params.beam_width:
                sample.output.score = output.score
            listed = by_stop_token and output.stop_token_id in (state.params.stop_token_ids or ())
            sample.finish(reason.name.lower(), output.stop_token_id if listed else None)

    def _position_logprobs(self, entry: _C.TokenLogprobs) -> PositionLogprobs:
        token_ids = entry.token_ids
        position: PositionLogprobs = {}
        for i, (token_id, logprob) in enumerate(zip(token_ids, entry.logprobs, strict=True)):
            if token_id not in position:
                rank = entry.rank if i == 0 else i
                position[token_id] = Logprob(logprob, rank, self._token_text(token_id))
        return position

    def _token_text(self, token_id: int) -> str:
        text = self._token_texts.get(token_id)
        if text is None:
            text = self._tokenizer.decode([token_id], skip_special_tokens=False)
            self._token_texts[token_id] = text
        return text
