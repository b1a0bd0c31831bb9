"""What generation returns. Names and meanings of the fields are vLLM's."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum


@dataclass(slots=True)
class Logprob:
    """Log probability of one token at one position."""

    logprob: float
    rank: int | None = None  # 1 = most likely
    decoded_token: str | None = None


# Token id -> Logprob: the chosen token first, then the most likely ones.
PositionLogprobs = dict[int, Logprob]


@dataclass(slots=True)
class CompletionOutput:
    """One of the `n` outputs of a request. With best_of and beam search: the index-th best."""

    index: int
    text: str
    token_ids: list[int]
    # Of token_ids, if logprobs were asked for; with best_of and beam search always.
    cumulative_logprob: float | None = None
    logprobs: list[PositionLogprobs] | None = None
    finish_reason: str | None = None  # "stop", "length", "abort"; None while it goes on
    # The stop string or stop token id that ended it; None for the model's own end of sequence.
    stop_reason: int | str | None = None
    # Of a beam: cumulative_logprob / len(token_ids) ** length_penalty.
    score: float | None = None

    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass(slots=True)
class RequestMetrics:
    """When things happened, in seconds of time.monotonic()."""

    arrival_time: float
    first_token_time: float | None = None
    last_token_time: float | None = None
    # Seconds, no time: from its coming to the engine to the first step that computed on it.
    queue_seconds: float | None = None


@dataclass(slots=True)
class RequestOutput:
    """The state of a request: cumulative, or what is new since the output before."""

    request_id: str
    prompt: str | None  # None if it came as token ids
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    # One entry per prompt token, None for the first; if asked for.
    prompt_logprobs: list[PositionLogprobs | None] | None = None
    metrics: RequestMetrics | None = None
    num_cached_tokens: int = 0  # of the prompt, found in the prefix cache
    num_output_tokens: int = field(default=0, kw_only=True)  # so far, of all outputs


class RequestOutputKind(Enum):
    CUMULATIVE = 0  # every output holds all so far
    DELTA = 1  # every output holds what is new since the one before
    FINAL_ONLY = 2  # one output, when all is done
