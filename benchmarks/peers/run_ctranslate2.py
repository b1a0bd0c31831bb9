"""CTranslate2: generate_batch on static batches in order of arrival.

It has neither pages nor batching of steps: a batch runs until its longest output, and what is
beyond a request's own length is cut off.
"""

from __future__ import annotations

import json
from pathlib import Path

import runner

opts = runner.options()

import ctranslate2  # noqa: E402

settings = dict(opts["settings"])
BATCH = settings.pop("batch")
generator = ctranslate2.Generator(
    opts["model"], device="cpu", intra_threads=opts["threads"], inter_threads=1, **settings
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
    starts = range(0, len(requests), BATCH)
    return [ids for start in starts for ids in generate_batch(requests[start : start + BATCH])]


runner.serve(opts, f"ctranslate2 {ctranslate2.__version__} ({generator.compute_type})", generate)
