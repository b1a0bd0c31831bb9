"""Decode steps as CUDA graphs: recorded once for some numbers of sequences, replayed from then on.

A step in which every sequence brings one token is padded to the next recorded number. Rows of
padding have token 0 and no slot, so that they write nothing into the cache, and are not in the
attention plan, so that nothing is read for them: they cost their part of the matrix products.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fastpage._C import Program
from fastpage.errors import FastpageError, InvalidArgument
from fastpage.executors.attention_plans import Scratch, Shape, attention_shape, new_plan
from fastpage.executors.staging import send
from fastpage.executors.torch import Frame, IntArray

StepArrays = Mapping[str, IntArray]  # the arguments of forward_arrays
Run = Callable[[Frame], torch.Tensor]  # computes a step's logits, launching work only


@dataclass
class FutureTokens:
    """Tokens that the step before samples, of which only the device will know in time."""

    sampled: torch.Tensor  # by the step before, [its sampling rows]
    places: IntArray  # [n][2]: index of token_ids, sampling row

    def write(self, places: torch.Tensor, token_ids: torch.Tensor) -> None:
        """places: ours transposed, on the device."""
        indices, rows = places
        token_ids.index_copy_(0, indices.long(), self.sampled.index_select(0, rows))


def default_sizes(max_num_seqs: int) -> list[int]:
    """1, 2, 4, ... and max_num_seqs."""
    return [*(1 << i for i in range((max_num_seqs - 1).bit_length())), max_num_seqs]


class DecodeGraphs:
    def __init__(
        self,
        run: Run,
        program: Program,
        kernels: Any,
        device: torch.device,
        *,
        sizes: Sequence[int],
        max_seq_len: int,
        block_size: int,
        batch_invariant: bool,
    ) -> None:
        """Raises InvalidArgument for sizes that are none, Error for what cannot be recorded."""
        if not sizes or min(sizes) < 1:
            raise InvalidArgument(f"sizes of CUDA graphs must be at least 1, not {list(sizes)}")
        self.sizes = sorted(set(sizes))
        self._max_seq_len = max_seq_len
        largest = self.sizes[-1]
        blocks = -(-max_seq_len // block_size)
        tables = torch.zeros(largest, blocks, dtype=torch.int32, device=device)
        logits = torch.empty(largest, program.vocab_size, device=device)
        shapes = {attention_shape(op) for op in program.ops if op.kind == "attend"}
        scratch = {shape: Scratch(device) for shape in shapes}
        options: dict[str, Any] = {"max_seq_len": max_seq_len, "batch_invariant": batch_invariant}
        options |= {"fixed_grid": True, "decode_only": True}
        plans = {
            (size, shape): new_plan(
                kernels, shape, device, max_num_seqs=size, max_num_tokens=size, **options
            )
            for size in self.sizes
            for shape in shapes
        }
        for (_, shape), plan in plans.items():
            scratch[shape].reserve(plan)
        recorder = _Recorder(device)
        # The largest first: the others find room in its memory.
        self._graphs = {
            size: _DecodeGraph(
                run,
                recorder,
                {shape: plans[size, shape] for shape in shapes},
                scratch,
                tables[:size],
                logits[:size],
            )
            for size in reversed(self.sizes)
        }

    def run(self, step: StepArrays, future: FutureTokens | None) -> torch.Tensor | None:
        """The step's logits in fp32, valid until the next step; None if no graph is for it."""
        num_seqs = len(step["seq_lens"])
        if num_seqs > self.sizes[-1] or int(max(step["seq_lens"])) > self._max_seq_len:
            return None
        if not np.array_equal(step["query_start_loc"], np.arange(num_seqs + 1)):
            return None  # some sequence brings more than one token
        size = self.sizes[bisect.bisect_left(self.sizes, num_seqs)]
        return self._graphs[size].run(step, future)


class _DecodeGraph:
    """Steps of up to so many sequences, in buffers whose addresses never change."""

    def __init__(
        self,
        run: Run,
        recorder: _Recorder,
        plans: Mapping[Shape, Any],
        scratch: Mapping[Shape, Scratch],
        tables: torch.Tensor,
        logits: torch.Tensor,
    ) -> None:
        self._plans, self._tables, self._logits = plans, tables, logits
        size, device = len(tables), tables.device
        # What a step consists of, but for its block tables, goes to the device in one piece.
        names = ("token_ids", "positions", "slot_mapping")
        self._places = _places(
            dict.fromkeys(names, size) | {shape: plan.plan_size for shape, plan in plans.items()}
        )
        length = max(place.stop for place in self._places.values())
        self._image = np.zeros(length, np.int32)
        self._buffer = torch.zeros(length, dtype=torch.int32, device=device)
        rows: dict[str, Any] = {name: self._buffer[self._places[name]] for name in names}
        self._frame = Frame(
            **rows,
            block_tables=tables,
            logits_indices=None,
            attention={
                shape: scratch[shape].beside(plan, self._buffer[self._places[shape]])
                for shape, plan in plans.items()
            },
            may_wait=False,
        )
        self._lay_out(_sequences_of_one_token(size))
        self._buffer.copy_(torch.from_numpy(self._image))
        self._replay = recorder.record(lambda: self._logits.copy_(run(self._frame)))

    def run(self, step: StepArrays, future: FutureTokens | None) -> torch.Tensor:
        self._lay_out(step)
        arrays = {"image": self._image, "block_tables": step["block_tables"]}
        num_seqs, wanted = len(step["seq_lens"]), step["logits_indices"]
        if len(wanted) < num_seqs:
            arrays["wanted"] = wanted
        if future is not None:
            arrays["future"] = future.places.T
        sent = send(arrays, self._buffer.device)
        self._buffer.copy_(sent["image"])
        rows, cols = step["block_tables"].shape
        self._tables[:rows, :cols].copy_(sent["block_tables"])
        if future is not None:
            future.write(sent["future"], self._frame.token_ids)
        self._replay()
        if "wanted" in sent:
            return self._logits.index_select(0, sent["wanted"])
        return self._logits[:num_seqs]

    def _lay_out(self, step: StepArrays) -> None:
        num_seqs = len(step["seq_lens"])
        for name, padding in (("token_ids", 0), ("positions", 0), ("slot_mapping", -1)):
            rows = self._image[self._places[name]]
            rows[:num_seqs] = step[name]
            rows[num_seqs:] = padding
        for shape, plan in self._plans.items():
            image = self._image[self._places[shape]]
            plan.plan(step["query_start_loc"], step["seq_lens"], image)


class _Recorder:
    """Captures what is launched into CUDA graphs that share their memory.

    Without a GPU there is nothing to capture: what would be is called each time, which lets tests
    see everything else.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        if self._on_gpu:
            self._pool = torch.cuda.graph_pool_handle()
            self._stream = torch.cuda.Stream(device)

    def record(self, launch: Callable[[], Any]) -> Callable[[], Any]:
        if not self._on_gpu:
            return launch
        # Once before, on the same stream: kernels are loaded, libraries take their memory.
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            launch()
        torch.cuda.current_stream().wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
                launch()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise FastpageError(
                f"a decode step could not be captured into a CUDA graph: {error}; enforce_eager "
                "runs without"
            ) from error
        return graph.replay


def _places(sizes: Mapping[Any, int]) -> dict[Any, slice]:
    """One after the other, each on 16 bytes."""
    places, at = {}, 0
    for name, size in sizes.items():
        places[name] = slice(at, at + size)
        at += -(-size // 4) * 4
    return places


def _sequences_of_one_token(count: int) -> StepArrays:
    """A step that writes nothing into the cache."""
    zeros = np.zeros(count, np.int32)
    return {
        "token_ids": zeros,
        "positions": zeros,
        "slot_mapping": zeros - 1,
        "query_start_loc": np.arange(count + 1, dtype=np.int32),
        "seq_lens": zeros + 1,
    }
