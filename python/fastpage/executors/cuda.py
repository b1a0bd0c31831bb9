"""The executor for a GPU: torch multiplies matrices, fastpage._C.cuda does the rest of a Program.

A step is only launched: nothing waits for the GPU but who reads its result. CudaRunner samples
there, too, and brings the tokens.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fastpage import _C
from fastpage._C import InputBatch, Op, Program
from fastpage.errors import InvalidArgument, ResourceExhausted
from fastpage.executors.attention_plans import GrowingPlans, PlannedAttention, attention_shape
from fastpage.executors.block_transfers import BlockTransfers, num_staging_blocks
from fastpage.executors.decode_graphs import (
    DecodeGraphs,
    FutureTokens,
    StepArrays,
)
from fastpage.executors.experts import Experts
from fastpage.executors.fixed_rows import FixedRows
from fastpage.executors.staging import send
from fastpage.executors.torch import Frame, IntArray, Step, TorchExecutor


class CudaExecutor(TorchExecutor):
    """Same calls as TorchExecutor, in bfloat16, float16 or (right rather than fast) float32.

    head_dim: a multiple of 16 up to 128, or 256.
    kv_cache_dtype: that of activations, or "float8_e4m3" beside 16 bits (see set_kv_scales).
    kernels: fastpage._C.cuda; what has its functions may stand in for it.
    disabled_passes: of those over the program that are for a GPU.
    batch_invariant: a token's logits are the same to the bit whatever else is computed in the step,
    however its sequence is cut into steps, and wherever its keys and values were computed.
    """

    def __init__(
        self,
        program: Program,
        *,
        num_kv_blocks: int,
        num_host_kv_blocks: int = 0,
        device: str = "cuda",
        dtype: str = "bfloat16",
        kv_cache_dtype: str | None = None,
        kernels: Any | None = None,
        batch_invariant: bool = False,
        disabled_passes: Sequence[str] = (),
        **options: Any,
    ) -> None:
        if kernels is None:
            require_gpu()
            kernels = _C.cuda
        cached = (dtype,) if dtype == "float32" else (dtype, "float8_e4m3")
        if kv_cache_dtype is not None and kv_cache_dtype not in cached:
            raise InvalidArgument(
                f"kv_cache_dtype {kv_cache_dtype}: with {dtype} CUDA kernels need "
                f"{' or '.join(cached)}"
            )
        program = _C.optimized(program, disabled_passes, target="gpu")
        super().__init__(
            program,
            num_kv_blocks=num_kv_blocks + num_staging_blocks(num_host_kv_blocks),
            num_host_kv_blocks=num_host_kv_blocks,
            device=device,
            dtype=dtype,
            kv_cache_dtype=kv_cache_dtype,
            **options,
        )
        # In the type of activations, so that nothing has to be converted in a step.
        self._packed |= _biases_and_positions(program)
        self.kernels = kernels
        self._transfers = BlockTransfers(
            kernels,
            ((self._keys, self._host_keys), (self._values, self._host_values)),
            num_blocks=num_kv_blocks,
            device=self._device,
        )
        self._keys, self._values = self._keys[:, :num_kv_blocks], self._values[:, :num_kv_blocks]
        self._fixed_rows = FixedRows() if batch_invariant else None
        self._plans = {
            shape: GrowingPlans(kernels, shape, self._device, batch_invariant=batch_invariant)
            for shape in {attention_shape(op) for op in program.ops if op.kind == "attend"}
        }
        self._graphs: DecodeGraphs | None = None
        # Experts' matrices lie together: by buffer, those of its op, and which one it is.
        self._stacks: dict[int, tuple[torch.Tensor, int]] = {}
        self._experts: dict[int, Experts] = {}
        for op in program.ops:
            if op.kind == "moe":
                self._add_experts(op)

    def _add_experts(self, op: Op) -> None:
        stacks = []
        for buffers in ([x.buffer for x in op.inputs[first::2]] for first in (2, 3)):
            shape = self._shapes[self.program.buffers[buffers[0]].name]
            stacks.append(torch.empty(len(buffers), *shape, dtype=self._dtype, device=self._device))
            self._stacks |= {buffer: (stacks[-1], i) for i, buffer in enumerate(buffers)}
        self._experts[op.inputs[2].buffer] = Experts(
            *stacks,
            top_k=int(op.attrs["top_k"]),
            renormalize=bool(op.attrs["renormalize"]),
            activate=functools.partial(self._activated, kind=str(op.attrs["kind"])),
            fixed_rows=self._fixed_rows,
        )

    def _place(self, buffer: int, values: torch.Tensor) -> torch.Tensor:
        if buffer not in self._stacks:
            return super()._place(buffer, values)
        stack, i = self._stacks[buffer]
        return stack[i].copy_(values)

    def _cache_dtype(self, name: str) -> torch.dtype:
        return torch.uint8 if name == "float8_e4m3" else super()._cache_dtype(name)

    @property
    def device(self) -> torch.device:
        return self._device

    @property
    def batch_invariant(self) -> bool:
        return self._fixed_rows is not None

    @property
    def graph_sizes(self) -> list[int]:
        """Numbers of sequences whose decode steps are CUDA graphs."""
        return [] if self._graphs is None else self._graphs.sizes

    @torch.inference_mode()
    def warm_up(
        self,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        graph_sizes: Sequence[int],
    ) -> None:
        """Once the weights are loaded: runs the largest step, so that memory that is short is so
        now, and records decode steps of graph_sizes sequences (none: no CUDA graphs)."""
        self.launch(_largest_step(max_num_seqs, max_num_batched_tokens, max_model_len))
        if not graph_sizes:
            return
        if self._fixed_rows is not None:
            graph_sizes = [self._fixed_rows.rounded(size) for size in graph_sizes]
        self._graphs = DecodeGraphs(
            self._run,
            self.program,
            self.kernels,
            self._device,
            sizes=graph_sizes,
            max_seq_len=max_model_len,
            block_size=self._block_size,
            batch_invariant=self.batch_invariant,
        )

    def launch_batch(self, batch: InputBatch, future: FutureTokens | None = None) -> torch.Tensor:
        """As launch(), the batch's transfers first."""
        self.apply_transfers(batch.swap_outs, batch.block_copies, batch.swap_ins)
        seq_lens = batch.seq_lens
        step = {
            "token_ids": batch.token_ids,
            "positions": batch.positions,
            "slot_mapping": batch.slot_mapping,
            "query_start_loc": batch.query_start_loc,
            "seq_lens": seq_lens,
            "block_tables": batch.first_blocks(self._num_blocks(seq_lens)),
            "logits_indices": batch.logits_indices,
        }
        return self.launch(step, future)

    @torch.inference_mode()
    def launch(self, step: StepArrays, future: FutureTokens | None = None) -> torch.Tensor:
        """The logits of a step, on the device, as the current stream will find them: float32 or
        the type of activations, valid until the next step is launched. `step` may change as soon
        as this returns."""
        if self._graphs is not None:
            logits = self._graphs.run(step, future)
            if logits is not None:
                return logits
        names = ["token_ids", "positions", "slot_mapping", "block_tables"]
        wanted = step["logits_indices"]
        if not np.array_equal(wanted, np.arange(len(step["token_ids"]))):
            names.append("logits_indices")
        arrays = {name: step[name] for name in names}
        for i, plans in enumerate(self._plans.values()):
            arrays[f"plan {i}"] = plans.lay_out(step["query_start_loc"], step["seq_lens"])
        if future is not None:
            arrays["future"] = future.places.T
        sent = send(arrays, self._device)
        if future is not None:
            future.write(sent["future"], sent["token_ids"])
        inputs: dict[str, Any] = {"logits_indices": None} | {name: sent[name] for name in names}
        inputs["attention"] = {
            shape: plans.beside(sent[f"plan {i}"])
            for i, (shape, plans) in enumerate(self._plans.items())
        }
        return self._run(Frame(**inputs))

    def forward(self, batch: InputBatch) -> npt.NDArray[np.float32]:
        return _to_numpy(self.launch_batch(batch))

    def forward_arrays(
        self,
        token_ids: IntArray,
        positions: IntArray,
        slot_mapping: IntArray,
        query_start_loc: IntArray,
        seq_lens: IntArray,
        block_tables: IntArray,
        logits_indices: IntArray,
    ) -> npt.NDArray[np.float32]:
        step = {
            "token_ids": token_ids,
            "positions": positions,
            "slot_mapping": slot_mapping,
            "query_start_loc": query_start_loc,
            "seq_lens": seq_lens,
            "block_tables": block_tables[:, : self._num_blocks(seq_lens)],
            "logits_indices": logits_indices,
        }
        return _to_numpy(self.launch(step))

    def _num_blocks(self, seq_lens: IntArray) -> int:
        """Of the longest sequence."""
        return -(-int(seq_lens.max()) // self._block_size)

    def apply_transfers(
        self, swap_outs: IntArray, block_copies: IntArray, swap_ins: IntArray
    ) -> None:
        self._transfers.launch(swap_outs, block_copies, swap_ins)

    def _empty(self, like: torch.Tensor, cols: int | None = None) -> torch.Tensor:
        return like.new_empty(like.shape[0], like.shape[1] if cols is None else cols)

    # ---- the ops

    def _embed(self, op: Step, frame: Frame) -> torch.Tensor:
        table = self._weight(op, 0)
        out = table.new_empty(len(frame.token_ids), table.shape[1])
        self.kernels.embed(frame.token_ids, table, out)
        return out

    def _embed_positions(self, op: Step, frame: Frame) -> torch.Tensor:
        table = self._weight(op, 0)[int(op.attrs.get("offset", 0)) :]
        out = table.new_empty(len(frame.positions), table.shape[1])
        self.kernels.embed(frame.positions, table, out)
        return out

    def _norm(self, op: Step, frame: Frame) -> torch.Tensor:
        x, inputs, residual = self._input(op, 0, frame), len(op.inputs), None
        if "residual" in op.attrs:
            inputs -= 1
            residual = self._input(op, inputs, frame)
            if not op.may_overwrite(inputs):
                residual = residual.clone()
            frame.activations[op.outputs[1].buffer] = residual  # the sum, once this is done
        out = self._empty(x)
        self.kernels.norm(
            x,
            out,
            str(op.attrs["kind"]),
            float(op.attrs["eps"]),
            self._weight(op, 1),
            self._weight(op, 2) if inputs == 3 else None,
            residual,
            int(op.attrs.get("group", x.shape[1])),
        )
        return out

    def _rotary(self, op: Step, frame: Frame) -> torch.Tensor:
        x = self._input(op, 0, frame)
        out = self._empty(x)
        table, head_dim, style = self._weight(op, 1), int(op.attrs["head_dim"]), op.attrs["style"]
        self.kernels.rotary(x, frame.positions, table, head_dim, style, out)
        return out

    def _scales(self, layer: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Of a float8 cache's keys and values; None: 1."""
        return self._kv_scales.get(layer, (None, None))

    def _write_cache(self, op: Step, frame: Frame) -> None:
        k, v = (self._input(op, i, frame) for i in range(2))
        layer = int(op.attrs["layer"])
        self.kernels.reshape_and_cache(
            k, v, frame.slot_mapping, self._keys[layer], self._values[layer], *self._scales(layer)
        )

    def _rotary_write_cache(self, op: Step, frame: Frame) -> torch.Tensor:
        q, k, v = (self._input(op, i, frame) for i in range(3))
        layer, normed = int(op.attrs["layer"]), "norm_eps" in op.attrs
        out = self._empty(q)
        self.kernels.rotary_and_cache(
            q,
            k,
            v,
            frame.positions,
            frame.slot_mapping,
            self._weight(op, 3),
            op.attrs["style"],
            self._keys[layer],
            self._values[layer],
            out,
            *self._scales(layer),
            *([self._weight(op, 4), self._weight(op, 5), op.attrs["norm_eps"]] if normed else ()),
        )
        return out

    def _attend(self, op: Step, frame: Frame) -> torch.Tensor:
        q = self._input(op, 0, frame)
        planned: PlannedAttention = frame.attention[attention_shape(op)]
        layer = int(op.attrs["layer"])
        k_scale, v_scale = self._scales(layer)
        out = self._empty(q)
        self.kernels.paged_attention(
            q,
            self._keys[layer],
            self._values[layer],
            frame.block_tables,
            planned.plan,
            planned.buffer,
            planned.workspace,
            planned.counters,
            out,
            scale=float(op.attrs["scale"]),
            sliding_window=int(op.attrs.get("sliding_window", 0)),
            soft_cap=float(op.attrs.get("soft_cap", 0)),
            alibi_slopes=self._weight(op, 1) if len(op.inputs) == 2 else None,
            k_scale=k_scale,
            v_scale=v_scale,
        )
        return out

    def _multiply(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        if self._fixed_rows is None:
            return super()._multiply(x, weight, bias)
        return self._fixed_rows.linear(x, weight, bias)

    def _activate(self, op: Step, frame: Frame) -> torch.Tensor:
        return self._activated(self._input(op, 0, frame), str(op.attrs["kind"]))

    def _activated(self, x: torch.Tensor, kind: str) -> torch.Tensor:
        out = self._empty(x, x.shape[1] // 2 if kind.endswith("_and_mul") else None)
        self.kernels.activate(x, kind, out)
        return out

    def _overwritten(self, op: Step, frame: Frame) -> torch.Tensor | None:
        """An input that ends here, for the result, which has its shape."""
        for i in range(len(op.inputs)):
            if op.may_overwrite(i):
                return self._input(op, i, frame)
        return None

    def _scale(self, op: Step, frame: Frame) -> torch.Tensor:
        out = self._overwritten(op, frame)
        return torch.mul(self._input(op, 0, frame), float(op.attrs["factor"]), out=out)

    def _clamp(self, op: Step, frame: Frame) -> torch.Tensor:
        limit, out = float(op.attrs["limit"]), self._overwritten(op, frame)
        return torch.clamp(self._input(op, 0, frame), -limit, limit, out=out)

    def _soft_cap(self, op: Step, frame: Frame) -> torch.Tensor:
        cap, out = float(op.attrs["cap"]), self._overwritten(op, frame)
        return torch.div(self._input(op, 0, frame), cap, out=out).tanh_().mul_(cap)

    def _add(self, op: Step, frame: Frame) -> torch.Tensor:
        a, b = (self._input(op, i, frame) for i in range(2))
        return torch.add(a, b, out=self._overwritten(op, frame))

    def _moe(self, op: Step, frame: Frame) -> torch.Tensor:
        x, logits = (self._input(op, i, frame) for i in range(2))
        return self._experts[op.inputs[2].buffer].run(x, logits, frame.may_wait)

    def _gather_rows(self, op: Step, frame: Frame) -> torch.Tensor:
        if frame.logits_indices is not None:
            return super()._gather_rows(op, frame)
        x = self._input(op, 0, frame)
        return x if op.may_overwrite(0) else x.clone()


def _biases_and_positions(program: Program) -> set[int]:
    """Weights that are only a linear layer's bias, or rows for positions."""
    found: set[int] = set()
    others: set[int] = set()
    for op in program.ops:
        for i, x in enumerate(op.inputs):
            is_bias = op.kind == "linear" and i == 2 and not op.attrs  # nothing is fused into it
            (found if is_bias or op.kind == "embed_positions" else others).add(x.buffer)
    return found - others


def require_gpu() -> None:
    if not _C.cuda.is_available():
        raise InvalidArgument(f"executor='cuda': {_C.cuda.unavailable_reason()}")


def free_bytes() -> int:
    """Of the GPU's memory."""
    require_gpu()
    return torch.cuda.mem_get_info()[0]


@contextlib.contextmanager
def naming_what_to_reduce() -> Iterator[None]:
    """Memory of the GPU that runs out as a model is loaded is ResourceExhausted."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ResourceExhausted(
            f"{str(error).splitlines()[0]} Give a smaller kv_cache_memory, max_num_batched_tokens "
            "or max_num_seqs, or enforce_eager"
        ) from None


def _largest_step(max_num_seqs: int, max_num_tokens: int, max_seq_len: int) -> StepArrays:
    """As many tokens and sequences as there may be; it writes nothing into the cache."""
    num_seqs = max(min(max_num_seqs, max_num_tokens), -(-max_num_tokens // max_seq_len))
    starts = np.arange(num_seqs + 1, dtype=np.int64) * max_num_tokens // num_seqs
    lens = np.diff(starts).astype(np.int32)
    zeros = np.zeros(max_num_tokens, np.int32)
    return {
        "token_ids": zeros,
        "positions": zeros,
        "slot_mapping": zeros - 1,
        "query_start_loc": starts.astype(np.int32),
        "seq_lens": lens,
        "block_tables": np.zeros((num_seqs, int(lens.max())), np.int32),
        "logits_indices": (starts[1:] - 1).astype(np.int32),
    }


def _to_numpy(logits: torch.Tensor) -> npt.NDArray[np.float32]:
    array: npt.NDArray[np.float32] = logits.float().cpu().numpy()
    return array
