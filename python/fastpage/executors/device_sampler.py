"""Samples on the GPU, with fastpage._C.cuda: the tokens that fastpage._C.Sampler would draw.

Logits stay where they are. What crosses to the CPU, in one copy, are token ids and the log
probabilities that were asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fastpage._C import ModelRunnerOutput, TokenLogprobs
from fastpage.executors.staging import Received, send
from fastpage.executors.torch import IntArray

MAX_VOCAB_SIZE = 1 << 22  # of fastpage._C.cuda.sample
_MOST_LOGITS = 1 << 27  # that are sampled at once

# By what fastpage._C.cuda calls them, which is what SamplingArrays does.
_DRAW = ("temperature", "top_k", "top_p", "min_p", "seeds", "positions")
_PROCESS = (
    "allowed",
    "bias_start",
    "bias_ids",
    "bias",
    "token_start",
    "tokens",
    "num_prompt_tokens",
    "repetition_penalty",
    "frequency_penalty",
    "presence_penalty",
)
_STARTS = ("bias_start", "token_start")  # one more than there are rows
_RAGGED = ("bias_ids", "bias", "tokens")

Arrays = Mapping[str, npt.NDArray[Any]]


@dataclass
class _LogprobGroup:
    """Positions of which as many log probabilities are asked for: sampled ones, then prompts'."""

    k: int
    sampled: IntArray  # sampling rows
    prompt: IntArray  # prompt logprob rows
    logits_rows: IntArray
    prompt_tokens: IntArray


class Sampled:
    """The samples of a step, on their way to the CPU; `tokens` are on the device already."""

    def __init__(
        self,
        tokens: torch.Tensor,
        groups: list[_LogprobGroup],
        logprobs: list[torch.Tensor],  # of each group ids, log probabilities, ranks
        num_prompt_rows: int,
        vocab_size: int,
    ) -> None:
        self.tokens = tokens
        self._groups = groups
        self._num_prompt_rows, self._vocab_size = num_prompt_rows, vocab_size
        parts = [x.reshape(-1).view(torch.int32) for x in (tokens, *logprobs)]
        self._received = Received(torch.cat(parts))

    def wait(self, step_id: int) -> ModelRunnerOutput:
        output = ModelRunnerOutput()
        output.step_id = step_id
        values = self._received.wait()
        output.sampled_token_ids, values = np.split(values, [len(self.tokens)])
        nothing = TokenLogprobs([], [], 0)
        logprobs, prompt_logprobs = (
            [nothing] * count for count in (len(self.tokens), self._num_prompt_rows)
        )
        for group in self._groups:
            n, width = len(group.logits_rows), 1 + group.k
            size = n * width
            ids, numbers, ranks, values = np.split(values, [size, 2 * size, 2 * size + n])
            numbers = numbers.view(np.float32)
            entries = [
                TokenLogprobs(self._ids(ids[row]), numbers[row].tolist(), int(ranks[i]))
                for i, row in enumerate(slice(j, j + width) for j in range(0, size, width))
            ]
            for row, entry in zip(group.sampled, entries, strict=False):
                logprobs[row] = entry
            for row, entry in zip(group.prompt, entries[len(group.sampled) :], strict=True):
                prompt_logprobs[row] = entry
        if any(len(group.sampled) for group in self._groups):
            output.logprobs = logprobs
        output.prompt_logprobs = prompt_logprobs
        return output

    def _ids(self, ids: IntArray) -> list[int]:
        """Where fewer tokens are possible than asked for, the lowest of the others follow: there
        the device says -1."""
        result: list[int] = ids.tolist()
        missing = result[1:].count(-1)
        if missing:
            listed = result[1 : len(result) - missing]
            others = np.setdiff1d(np.arange(min(self._vocab_size, len(result))), listed)
            result[len(result) - missing :] = others[:missing].tolist()
        return result


class DeviceSampler:
    """kernels: fastpage._C.cuda, or what has its functions. Sampling takes memory for max_rows
    rows at once (fewer of a huge vocabulary), about three times their logits in float32; more are
    sampled in slices."""

    def __init__(
        self, kernels: Any, vocab_size: int, device: torch.device, max_rows: int = 256
    ) -> None:
        self._kernels, self._vocab_size, self._device = kernels, vocab_size, device
        self._max_rows = min(max_rows, max(1, _MOST_LOGITS // vocab_size))
        self._counts: torch.Tensor | None = None  # of process_logits: zeros

    @torch.inference_mode()
    def launch(self, logits: torch.Tensor, arrays: Arrays) -> Sampled:
        """logits: [num_logits, vocab_size], of any float type, left as they are. arrays: of
        SamplingArrays."""
        logits_rows = arrays["logits_rows"]
        in_order = np.array_equal(logits_rows, np.arange(len(logits)))
        groups = _logprob_groups(arrays, self._vocab_size)
        needed = {name: arrays[name] for name in (*_DRAW, *_PROCESS) if name in arrays}
        if "allowed" in needed:
            needed["allowed"] = needed["allowed"].reshape(len(logits_rows), -1)
        if not in_order:
            needed["logits_rows"] = logits_rows
        for i, group in enumerate(groups):
            needed[f"logits_rows {i}"] = group.logits_rows
            needed[f"sampled {i}"] = group.sampled
            needed[f"prompt_tokens {i}"] = group.prompt_tokens
        sent = send(needed, self._device)

        tokens = torch.empty(len(logits_rows), dtype=torch.int32, device=self._device)
        for rows in self._slices(len(tokens)):
            these = logits[rows] if in_order else logits.index_select(0, sent["logits_rows"][rows])
            self._sample(these, {name: _of(name, sent[name], rows) for name in sent}, tokens[rows])
        logprobs: list[torch.Tensor] = []
        for i, group in enumerate(groups):
            chosen = tokens.index_select(0, sent[f"sampled {i}"])
            chosen = torch.cat((chosen, sent[f"prompt_tokens {i}"]))
            logprobs += self._logprobs(logits, sent[f"logits_rows {i}"], chosen, group.k)
        return Sampled(tokens, groups, logprobs, len(arrays["prompt_tokens"]), self._vocab_size)

    def warm_up(self, rows: int) -> None:
        """Takes the memory that sampling so many rows needs, and loads the kernel."""
        logits = torch.zeros(rows, self._vocab_size, device=self._device)
        self.launch(logits, arrays_of(rows, top_k=50, top_p=0.9)).wait(0)

    def _sample(
        self, raw: torch.Tensor, arrays: Mapping[str, torch.Tensor], tokens: torch.Tensor
    ) -> None:
        """arrays: what there is of _DRAW and _PROCESS."""
        process = {name: arrays[name] for name in _PROCESS if name in arrays}
        draw = [arrays[name] for name in _DRAW]
        workspace = self._workspace(len(raw))
        if not process:
            self._kernels.sample(raw.float(), *draw, workspace, tokens)
        else:
            logits = raw.to(torch.float32, copy=True)
            if "token_start" in process:
                process["counts"] = self._zero_counts(len(raw))
            self._kernels.process_logits(logits, **process)
            self._kernels.sample(logits, *draw, workspace, tokens)
            # Where every token is forbidden now, the most likely one of all is taken.
            most_likely = torch.empty_like(tokens)
            greedy = [torch.zeros_like(draw[0]), *draw[1:]]
            self._kernels.sample(raw.float(), *greedy, workspace, most_likely)
            tokens.copy_(torch.where(tokens < 0, most_likely, tokens))
        tokens.clamp_(min=0)

    def _logprobs(
        self, logits: torch.Tensor, logits_rows: torch.Tensor, tokens: torch.Tensor, k: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Ids and log probabilities, [rows, 1 + k], and ranks."""
        ids = torch.empty(len(tokens), 1 + k, dtype=torch.int32, device=self._device)
        values = torch.empty(len(tokens), 1 + k, device=self._device)
        ranks = torch.empty_like(tokens)
        for rows in self._slices(len(tokens)):
            these = logits.index_select(0, logits_rows[rows]).float()
            out = (ids[rows], values[rows], ranks[rows])
            self._kernels.logprobs(these, tokens[rows], self._workspace(len(these)), *out)
        return ids, values, ranks

    def _slices(self, count: int) -> list[slice]:
        step = self._max_rows
        return [slice(begin, min(begin + step, count)) for begin in range(0, count, step)]

    def _workspace(self, rows: int) -> torch.Tensor:
        return torch.empty(2 * rows * self._vocab_size, device=self._device)

    def _zero_counts(self, rows: int) -> torch.Tensor:
        """process_logits leaves them as it finds them."""
        if self._counts is None or len(self._counts) < rows:
            shape = (rows, self._vocab_size)
            self._counts = torch.zeros(shape, dtype=torch.int32, device=self._device)
        return self._counts[:rows]


def arrays_of(rows: int, *, top_k: int = 0, top_p: float = 1.0) -> Arrays:
    """As SamplingArrays has them of so many rows of logits, which ask for nothing else."""
    none = np.zeros(0, np.int32)
    return {
        "logits_rows": np.arange(rows, dtype=np.int32),
        "temperature": np.ones(rows, np.float32),
        "top_k": np.full(rows, top_k, np.int32),
        "top_p": np.full(rows, top_p, np.float32),
        "min_p": np.zeros(rows, np.float32),
        "seeds": np.arange(rows, dtype=np.int64),
        "positions": np.zeros(rows, np.int64),
        "num_logprobs": np.full(rows, -1, np.int32),
        "prompt_logits_rows": none,
        "prompt_tokens": none,
        "prompt_num_logprobs": none,
    }


def _of(name: str, array: torch.Tensor, rows: slice) -> torch.Tensor:
    """Those of some rows."""
    if name in _RAGGED:
        return array
    return array[rows.start : rows.stop + (name in _STARTS)]


def _logprob_groups(arrays: Arrays, vocab_size: int) -> list[_LogprobGroup]:
    sampled_k, prompt_k = (
        np.minimum(arrays[name], vocab_size) for name in ("num_logprobs", "prompt_num_logprobs")
    )
    groups = []
    for k in np.union1d(sampled_k, prompt_k):
        if k < 0:
            continue
        sampled, prompt = (
            np.flatnonzero(each == k).astype(np.int32) for each in (sampled_k, prompt_k)
        )
        rows = (arrays["logits_rows"][sampled], arrays["prompt_logits_rows"][prompt])
        tokens = arrays["prompt_tokens"][prompt]
        groups.append(_LogprobGroup(int(k), sampled, prompt, np.concatenate(rows), tokens))
    return groups
