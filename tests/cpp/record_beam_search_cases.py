"""Writes beam_search_cases.h: what transformers' beam search makes of a model that is a hash.

    python tests/cpp/record_beam_search_cases.py    # needs torch and transformers

The logits of a token behind a prefix are a hash of both, so that the C++ test has the very same
model. Cases with `levels` have so few different ones that most of them are equal; since
torch.topk leaves the order of equals open, it is replaced there by one that prefers the lower
index, and log_softmax by nothing, because its rounding would tell some of them apart.
"""

from __future__ import annotations

import itertools
import random
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
import transformers
from transformers import GenerationConfig, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.generation.configuration_utils import GenerationMode
from transformers.modeling_outputs import CausalLMOutput

OUT = Path(__file__).with_name("beam_search_cases.h")
VOCAB = 40
HEADER = """\
// What transformers {version} returned; written by record_beam_search_cases.py.
#pragma once

#include <vector>

#include "fastpage/sampling_params.h"

namespace fastpage {{

struct ExpectedHypothesis {{
  float score;
  std::vector<TokenId> token_ids;
}};

struct BeamSearchCase {{
  uint64_t seed;     // of the model
  int32_t levels;    // of its logits, if that few
  float stop_logit;  // added to those of stop tokens
  int32_t beam_width;
  float length_penalty;
  EarlyStopping early_stopping;
  int32_t min_tokens;
  int32_t max_tokens;
  std::vector<TokenId> stop_token_ids;
  std::vector<TokenId> prompt_token_ids;
  std::vector<ExpectedHypothesis> expected;
}};

// clang-format off
inline const std::vector<BeamSearchCase>& beam_search_cases() {{
  static const std::vector<BeamSearchCase> cases = {{
"""
FOOTER = """\
  };
  return cases;
}
// clang-format on

}  // namespace fastpage
"""


class Case(NamedTuple):
    seed: int
    levels: int
    stop_logit: float
    beam_width: int
    length_penalty: float
    early_stopping: bool | str
    min_tokens: int
    max_tokens: int
    stop_token_ids: list[int]
    prompt_token_ids: list[int]


def mix(x: np.ndarray) -> np.ndarray:
    """The finalizer of SplitMix64 (Steele, Lea, Flood 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def hash_logits(case: Case, tokens: list[int]) -> np.ndarray:
    state = np.array([case.seed], np.uint64)
    for token in tokens:
        state = mix(state + np.uint64(token + 1))
    bits = mix(state + np.arange(1, VOCAB + 1, dtype=np.uint64)) >> np.uint64(40)
    if case.levels:
        logits = -(bits % np.uint64(case.levels) + np.uint64(1)).astype(np.float32) / np.float32(4)
    else:
        logits = bits.astype(np.float32) / np.float32(2**21)
    logits[case.stop_token_ids] += np.float32(case.stop_logit)
    return logits


class HashModel(PreTrainedModel, GenerationMixin):
    config_class = PreTrainedConfig

    def __init__(self, case: Case) -> None:
        super().__init__(PreTrainedConfig(vocab_size=VOCAB))
        self.case = case
        self.anchor = torch.nn.Parameter(torch.zeros(1))  # generate() asks for the device

    def forward(self, input_ids: torch.Tensor, **kwargs: Any) -> CausalLMOutput:
        rows = [hash_logits(self.case, row) for row in input_ids.tolist()]
        return CausalLMOutput(logits=torch.from_numpy(np.stack(rows))[:, None])


def lower_index_first(values: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    ordered, indices = torch.sort(values, dim=-1, descending=True, stable=True)
    return ordered[..., :k], indices[..., :k]


def generate(case: Case) -> list[tuple[np.float32, list[int]]]:
    prompt = torch.tensor([case.prompt_token_ids])
    config = GenerationConfig(
        num_beams=case.beam_width,
        num_return_sequences=case.beam_width,
        do_sample=False,
        length_penalty=case.length_penalty,
        early_stopping=case.early_stopping,
        min_new_tokens=case.min_tokens or None,
        max_new_tokens=case.max_tokens,
        eos_token_id=case.stop_token_ids or None,
        pad_token_id=VOCAB,  # no token
        use_cache=False,
        return_dict_in_generate=True,
        output_scores=True,
    )
    with ExitStack() as stack:
        # One beam would be greedy search.
        beam_search = mock.Mock(return_value=GenerationMode.BEAM_SEARCH)
        stack.enter_context(mock.patch.object(GenerationConfig, "get_generation_mode", beam_search))
        if case.levels:
            stack.enter_context(mock.patch.object(torch, "topk", lower_index_first))
            identity = mock.patch.object(
                torch.nn.functional, "log_softmax", lambda logits, dim: logits
            )
            stack.enter_context(identity)
        out = HashModel(case).generate(prompt, generation_config=config)
    outputs = out.sequences[:, prompt.shape[1] :].tolist()
    scores = out.sequences_scores.numpy()  # float32 is printed with the digits it has
    trimmed = [[token for token in output if token != VOCAB] for output in outputs]
    return list(zip(scores, trimmed, strict=True))


def make_cases() -> list[Case]:
    rng = random.Random(7)
    grid = itertools.product(
        (1, 2, 4, 8), (0.0, 0.5, 1.0, 2.0, -1.0), (False, True, "never"), (0, 3)
    )
    return [
        Case(
            seed=rng.getrandbits(32),
            levels=levels,
            stop_logit=rng.choice((1.0, 3.0, 4.0)) if not levels else 0.0,
            beam_width=beam_width,
            length_penalty=length_penalty,
            early_stopping=early_stopping,
            min_tokens=rng.choice((0, 0, 0, 3, 6)),
            max_tokens=rng.choice((6, 9, 12)),
            stop_token_ids=rng.sample(range(VOCAB), rng.choice((0, 1, 2, 2, 3))),
            prompt_token_ids=rng.choices(range(VOCAB), k=rng.randint(1, 4)),
        )
        for beam_width, length_penalty, early_stopping, levels in grid
    ]


def braces(values: list[Any]) -> str:
    return "{" + ", ".join(map(str, values)) + "}"


def main() -> None:
    kinds = {False: "kNo", True: "kYes", "never": "kNever"}
    text = [HEADER.format(version=transformers.__version__)]
    for case in make_cases():
        fields = [
            f"{case.seed}u",
            case.levels,
            f"{case.stop_logit}f",
            case.beam_width,
            f"{case.length_penalty}f",
            f"EarlyStopping::{kinds[case.early_stopping]}",
            case.min_tokens,
            case.max_tokens,
            braces(case.stop_token_ids),
            braces(case.prompt_token_ids),
        ]
        text.append("    {" + ", ".join(map(str, fields)) + ", {\n")
        text += [f"      {{{score!s}f, {braces(tokens)}}},\n" for score, tokens in generate(case)]
        text.append("    }},\n")
    text.append(FOOTER)
    OUT.write_text("".join(text))


if __name__ == "__main__":
    main()
