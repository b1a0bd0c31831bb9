"""CTranslate2: generate_batch on static batches of prompts of about the same length.

It has neither pages nor batching of steps: prompts are read at once up to the length of the
shortest of a batch, and token by token from there; a batch runs until its longest output, and what
is beyond a request's own length is cut off.
"""

from __future__ import annotations

import json
from pathlib import Path

import runner

opts = runner.options()

import ctranslate2  # noqa: E402

BATCH = 4  # it gains nothing from more
generator = ctranslate2.Generator(
    opts["model"], device="cpu", intra_threads=opts["threads"], inter_threads=1
)
vocabulary = json.loads((Path(opts["model"]) / "vocabulary.json").read_text())


def generate_batch(requests: list[runner.Request]) -> list[list[int]]:
    longest = max(request["out"] for request in requests)
    results = generator.generate_batch(
        [[vocabulary[token] for token in request["prompt"]] for request in requests],
        max_length=longest,
        min_length=longest,
        end_token=[],
        beam_size=1,
        include_prompt_in_result=False,
    )
    return [
        result.sequences_ids[0][: request["out"]]
        for result, request in zip(results, requests, strict=True)
    ]


def generate(requests: list[runner.Request]) -> list[list[int]]:
    order = sorted(range(len(requests)), key=lambda i: len(requests[i]["prompt"]))
    outputs: list[list[int]] = [[]] * len(requests)
    for start in range(0, len(order), BATCH):
        batch = order[start : start + BATCH]
        for i, ids in zip(batch, generate_batch([requests[i] for i in batch]), strict=True):
            outputs[i] = ids
    return outputs


runner.serve(opts, f"ctranslate2 {ctranslate2.__version__} ({generator.compute_type})", generate)
