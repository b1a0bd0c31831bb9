"""Parameters and results of LLM.beam_search(), under vLLM's names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fastpage.errors import InvalidArgument
from fastpage.outputs import CompletionOutput, RequestOutput
from fastpage.sampling_params import SamplingParams
from fastpage.tokenizer import Tokenizer


@dataclass
class BeamSearchParams:
    """vLLM's fields, and those that transformers has beside them; the rules are transformers'.

    Args:
        beam_width: Beams kept, and sequences returned, 1 to 64.
        max_tokens: Output tokens at most.
        ignore_eos: Go on after EOS.
        temperature: 0 or 1, which are the same: nothing is drawn.
        length_penalty, early_stopping, min_tokens, stop_token_ids: see SamplingParams.
        include_stop_str_in_output: Keep the text of the stop token.
        skip_special_tokens: Leave special tokens out of the text.

    Raises:
        InvalidArgument: also a ValueError.
    """

    beam_width: int
    max_tokens: int
    ignore_eos: bool = False
    temperature: float = 0.0
    length_penalty: float = 1.0
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    early_stopping: bool | Literal["never"] = False
    min_tokens: int = 0
    stop_token_ids: list[int] | None = None

    def __post_init__(self) -> None:
        # As n, too, it is to be named by its own name.
        width = self.beam_width
        if not isinstance(width, int) or isinstance(width, bool) or not 1 <= width <= 64:
            raise InvalidArgument(f"beam_width must be a whole number from 1 to 64, got {width!r}")
        self.to_sampling_params()

    def to_sampling_params(self) -> SamplingParams:
        return SamplingParams(
            n=self.beam_width,
            beam_width=self.beam_width,
            max_tokens=self.max_tokens,
            ignore_eos=self.ignore_eos,
            temperature=self.temperature,
            length_penalty=self.length_penalty,
            include_stop_str_in_output=self.include_stop_str_in_output,
            skip_special_tokens=self.skip_special_tokens,
            early_stopping=self.early_stopping,
            min_tokens=self.min_tokens,
            stop_token_ids=self.stop_token_ids,
            detokenize=False,  # together with the prompt, see BeamSearchSequence.text
        )


@dataclass(slots=True)
class BeamSearchSequence:
    """One of the best continuations of a prompt."""

    tokens: list[int]  # the prompt's and the output's, with the token that ended it
    text: str  # of all of them
    cum_logprob: float  # of the output
    score: float  # cum_logprob / (number of output tokens) ** length_penalty
    finish_reason: str | None  # "stop", "length"
    stop_reason: int | str | None  # the stop token id; None for the model's own end of sequence


@dataclass(slots=True)
class BeamSearchOutput:
    """The beam_width best continuations of a prompt, the best score first."""

    sequences: list[BeamSearchSequence]


def to_beam_search_output(
    output: RequestOutput, params: SamplingParams, tokenizer: Tokenizer
) -> BeamSearchOutput:
    def sequence(beam: CompletionOutput) -> BeamSearchSequence:
        assert beam.cumulative_logprob is not None and beam.score is not None
        tokens = output.prompt_token_ids + beam.token_ids
        silent_end = beam.finish_reason == "stop" and not params.include_stop_str_in_output
        return BeamSearchSequence(
            tokens=tokens,
            text=tokenizer.decode(
                tokens[:-1] if silent_end else tokens,
                skip_special_tokens=params.skip_special_tokens,
            ),
            cum_logprob=beam.cumulative_logprob,
            score=beam.score,
            finish_reason=beam.finish_reason,
            stop_reason=beam.stop_reason,
        )

    return BeamSearchOutput([sequence(beam) for beam in output.outputs])
