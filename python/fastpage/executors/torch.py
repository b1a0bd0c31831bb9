"""The reference executor: the same Program on any torch device, a few lines an op.

It is what tests compare the C++ executors with, and pages its KV cache through the same block
tables and slots, in the plain layout [num_blocks, block_size, num_kv_heads, head_dim].
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from fastpage._C import InputBatch, ModelRunner, ModelRunnerOutput, Op, Operand, Program, Sampler
from fastpage.errors import InvalidArgument

IntArray = npt.NDArray[np.int32]


@dataclass
class Frame:
    """The step's own data, on the device, and the activations that are still to be read."""

    token_ids: torch.Tensor
    positions: torch.Tensor
    slot_mapping: torch.Tensor
    block_tables: torch.Tensor
    logits_indices: torch.Tensor | None  # None: all rows in order (CudaExecutor only)
    attention: Any  # what else attend() wants to know: the executor's own
    may_wait: bool = True  # for the device, to know what to do next
    activations: dict[int, torch.Tensor] = field(default_factory=dict)


class Step:
    """An Op as plain data (each look into an Op makes new objects), and what ends with it."""

    def __init__(self, op: Op, read_last: Sequence[int]) -> None:
        self.kind: str = op.kind
        self.inputs: list[Operand] = op.inputs
        self.outputs: list[Operand] = op.outputs
        self.attrs = dict(op.attrs)
        self.read_last = read_last  # buffers that no later op reads

    def may_overwrite(self, index: int) -> bool:
        """True if nothing else of the program needs what input `index` is a part of."""
        buffer = self.inputs[index].buffer
        return buffer in self.read_last and [x.buffer for x in self.inputs].count(buffer) == 1


@dataclass
class _Lengths:
    query_start_loc: list[int]
    seq_lens: list[int]


class TorchExecutor:
    """Same calls as fastpage._C.CpuExecutor.

    dtype is that of activations; weights are rounded to weight_dtype, keys and values to
    kv_cache_dtype (both `dtype` unless given).
    """

    def __init__(
        self,
        program: Program,
        *,
        num_kv_blocks: int,
        num_host_kv_blocks: int = 0,
        device: str = "cpu",
        dtype: str = "float32",
        weight_dtype: str | None = None,
        kv_cache_dtype: str | None = None,
        block_size: int = 16,
    ) -> None:
        self.program = program
        self._device = torch.device(device)
        self._block_size = block_size
        self._dtype = _torch_dtype(dtype)
        self._weight_dtype = _torch_dtype(weight_dtype or dtype)
        self._rounded = _ROUNDED.get(kv_cache_dtype or dtype)
        self._has_float8_cache = kv_cache_dtype == "float8_e4m3"
        self._kv_scales: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        cache_dtype = self._cache_dtype(kv_cache_dtype or dtype)
        layers, kv_heads, head_dim = program.kv_cache_spec

        def allocate(num_blocks: int, device: torch.device) -> torch.Tensor:
            shape = (layers, num_blocks, block_size, kv_heads, head_dim)
            # The host's part is read and written by the device, where there is another one.
            pinned = device.type == "cpu" and self._device.type == "cuda" and num_blocks > 0
            return torch.zeros(shape, dtype=cache_dtype, device=device, pin_memory=pinned)

        self._keys = allocate(num_kv_blocks, self._device)
        self._values = allocate(num_kv_blocks, self._device)
        host = torch.device("cpu")
        self._host_keys = allocate(num_host_kv_blocks, host)
        self._host_values = allocate(num_host_kv_blocks, host)
        self._ids = {b.name: i for i, b in enumerate(program.buffers) if b.kind == "weight"}
        self._shapes = {b.name: tuple(b.shape) for b in program.buffers if b.kind == "weight"}
        self._weights: dict[int, torch.Tensor] = {}
        self._packed = {
            op.inputs[index].buffer
            for op in program.ops
            for kind, index in (("embed", 0), ("linear", 1))
            if op.kind == kind
        } | {x.buffer for op in program.ops if op.kind == "moe" for x in op.inputs[2:]}
        self._steps = _steps(program)
        # Those of an op's result, or of the first where there are two.
        self._ops: dict[str, Callable[[Step, Frame], torch.Tensor | None]] = {
            "embed": self._embed,
            "embed_positions": self._embed_positions,
            "norm": self._norm,
            "linear": self._linear,
            "rotary": self._rotary,
            "write_cache": self._write_cache,
            "rotary_write_cache": self._rotary_write_cache,
            "attend": self._attend,
            "activate": self._activate,
            "scale": self._scale,
            "clamp": self._clamp,
            "soft_cap": self._soft_cap,
            "add": self._add,
            "moe": self._moe,
            "gather_rows": self._gather_rows,
        }

    def _cache_dtype(self, name: str) -> torch.dtype:
        # What is fewer bits is a rounding only: the reference keeps the rounded values as fp32.
        return torch.float32 if name in _ROUNDED else _torch_dtype(name)

    # ---- loading

    def load_weight(self, name: str, weight: Any, source_dtype: str | None = None) -> None:
        """`weight`: anything with __dlpack__; source_dtype="bfloat16" if it is bits in uint16."""
        if name not in self._ids:
            raise InvalidArgument(f"the program has no weight '{name}'")
        values = torch.from_dlpack(weight)
        if source_dtype is not None:
            values = values.view(_torch_dtype(source_dtype))
        if tuple(values.shape) != self._shapes[name]:
            raise InvalidArgument(
                f"weight '{name}' has shape {list(values.shape)}, the program wants "
                f"{list(self._shapes[name])}"
            )
        buffer = self._ids[name]
        if buffer in self._weights:
            raise InvalidArgument(f"weight '{name}' is loaded twice")
        if buffer in self._packed:
            values = values.to(self._weight_dtype).to(self._dtype)
        else:
            values = values.to(torch.float32)
        self._weights[buffer] = self._place(buffer, values)

    def _place(self, buffer: int, values: torch.Tensor) -> torch.Tensor:
        """A copy on the device."""
        return values.to(self._device, copy=True)

    def load_weight_blocks(self, name: str, blocks: Any, format: str) -> None:
        raise InvalidArgument(f"weight '{name}': TorchExecutor takes values, not {format} blocks")

    def finish_loading(self) -> None:
        missing = [name for name, buffer in self._ids.items() if buffer not in self._weights]
        if missing:
            raise InvalidArgument(f"{len(missing)} weight(s) not loaded: {', '.join(missing)}")

    def set_kv_scales(
        self, layer: int, k: npt.NDArray[np.float32], v: npt.NDArray[np.float32]
    ) -> None:
        """Of a float8 cache: what a layer's keys and values are divided by, [num_kv_heads]."""
        layers, kv_heads, _ = self.program.kv_cache_spec
        if not self._has_float8_cache:
            raise InvalidArgument("set_kv_scales: the cache is not float8_e4m3")
        if not 0 <= layer < layers or k.shape != (kv_heads,) or v.shape != (kv_heads,):
            raise InvalidArgument(
                f"set_kv_scales of layer {layer}: {k.shape} and {v.shape}; there are {layers} "
                f"layers of {kv_heads} KV heads"
            )
        as_tensor = functools.partial(torch.tensor, dtype=torch.float32, device=self._device)
        self._kv_scales[layer] = as_tensor(k), as_tensor(v)

    # ---- running

    def forward(self, batch: InputBatch) -> npt.NDArray[np.float32]:
        """All logits of the step, [num_logits, vocab_size], its transfers done first."""
        self.apply_transfers(batch.swap_outs, batch.block_copies, batch.swap_ins)
        return self.forward_arrays(
            batch.token_ids,
            batch.positions,
            batch.slot_mapping,
            batch.query_start_loc,
            batch.seq_lens,
            batch.block_tables,
            batch.logits_indices,
        )

    @torch.inference_mode()
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
        """See CpuExecutor.forward_arrays."""
        frame = Frame(
            token_ids=self._to_device(token_ids),
            positions=self._to_device(positions),
            slot_mapping=self._to_device(slot_mapping),
            block_tables=self._to_device(block_tables),
            logits_indices=self._to_device(logits_indices),
            attention=_Lengths([int(i) for i in query_start_loc], [int(i) for i in seq_lens]),
        )
        return self._run(frame).float().cpu().numpy()

    def _run(self, frame: Frame) -> torch.Tensor:
        """The logits, of the type of activations."""
        frame.activations = {}
        for op in self._steps:
            result = self._ops[op.kind](op, frame)
            if result is not None:
                frame.activations[op.outputs[0].buffer] = result
            for buffer in op.read_last:
                frame.activations.pop(buffer, None)
        return frame.activations.pop(self.program.output)

    def apply_transfers(
        self, swap_outs: IntArray, block_copies: IntArray, swap_ins: IntArray
    ) -> None:
        """See CpuExecutor.apply_transfers."""
        for cache, host in ((self._keys, self._host_keys), (self._values, self._host_values)):
            for device_block, host_block in swap_outs.tolist():
                host[:, host_block] = cache[:, device_block]
            for src, dst in block_copies.tolist():
                cache[:, dst] = cache[:, src]
            for device_block, host_block in swap_ins.tolist():
                cache[:, device_block] = host[:, host_block]

    def _to_device(self, array: IntArray) -> torch.Tensor:
        return torch.tensor(np.asarray(array), dtype=torch.int64, device=self._device)

    # ---- the ops

    def _input(self, op: Step, index: int, frame: Frame) -> torch.Tensor:
        operand: Operand = op.inputs[index]
        x = frame.activations[operand.buffer]
        if operand.cols == x.shape[1]:
            return x
        return x[:, operand.offset : operand.offset + operand.cols]

    def _weight(self, op: Step, index: int) -> torch.Tensor:
        return self._weights[op.inputs[index].buffer]

    def _embed(self, op: Step, frame: Frame) -> torch.Tensor:
        return self._weight(op, 0)[frame.token_ids]

    def _embed_positions(self, op: Step, frame: Frame) -> torch.Tensor:
        table = self._weight(op, 0)
        at = frame.positions + int(op.attrs.get("offset", 0))
        return table.index_select(0, at).to(self._dtype)

    def _norm(self, op: Step, frame: Frame) -> torch.Tensor:
        """With a residual as OpKind::kNorm says."""
        x, inputs = self._input(op, 0, frame), len(op.inputs)
        if "residual" in op.attrs:
            inputs -= 1
            x = x + self._input(op, inputs, frame)
            frame.activations[op.outputs[1].buffer] = x
        x = x.float()
        groups = x.unflatten(1, (-1, int(op.attrs.get("group", x.shape[1]))))
        if op.attrs["kind"] == "layer":
            groups = groups - groups.mean(-1, keepdim=True)
        y = _to_unit_rms(groups, float(op.attrs["eps"]))
        weight = self._weight(op, 1)
        if len(weight) == x.shape[1]:  # a weight for each column
            y = y.flatten(1)
        y = y * weight
        if inputs == 3:
            y = y + self._weight(op, 2)
        return y.reshape(x.shape).to(self._dtype)

    def _linear(self, op: Step, frame: Frame) -> torch.Tensor:
        """What a pass fused into it included: see OpKind::kLinear."""
        x = self._input(op, 0, frame)
        has_norm, has_residual = "norm_eps" in op.attrs, "residual" in op.attrs
        bias = None
        if len(op.inputs) > 2 + has_norm + has_residual:
            bias = self._weight(op, 2).to(self._dtype)
        if has_norm:
            norm_weight = self._weight(op, 2 if bias is None else 3)
            x = _to_unit_rms(x.float(), float(op.attrs["norm_eps"])) * norm_weight
            x = x.to(self._dtype)
        y = self._multiply(x, self._weight(op, 1), bias)
        if "activation" in op.attrs:
            y = activate(y, str(op.attrs["activation"]))
        return y + self._input(op, len(op.inputs) - 1, frame) if has_residual else y

    def _multiply(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        return functional.linear(x, weight, bias)

    def _rotary(self, op: Step, frame: Frame) -> torch.Tensor:
        return self._rotate(op, self._input(op, 0, frame), self._weight(op, 1), frame)

    def _rotate(self, op: Step, x: torch.Tensor, table: torch.Tensor, frame: Frame) -> torch.Tensor:
        cos, sin = table[frame.positions].unsqueeze(1).chunk(2, dim=-1)
        heads = x.float().unflatten(1, (-1, int(op.attrs["head_dim"])))
        turned, kept = heads.tensor_split([2 * cos.shape[-1]], dim=-1)
        if op.attrs["style"] == "neox":
            a, b = turned.chunk(2, dim=-1)
            turned = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
        else:
            a, b = turned[..., ::2], turned[..., 1::2]
            turned = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
        return torch.cat((turned, kept), dim=-1).flatten(1).to(self._dtype)

    def _write_cache(self, op: Step, frame: Frame) -> None:
        self._write(op, self._input(op, 0, frame), self._input(op, 1, frame), frame)

    def _rotary_write_cache(self, op: Step, frame: Frame) -> torch.Tensor:
        """With norms of q's and k's heads as OpKind::kRotaryWriteCache says."""
        q, k, v = (self._input(op, i, frame) for i in range(3))
        if "norm_eps" in op.attrs:
            q, k = (self._norm_heads(op, x, self._weight(op, i)) for x, i in ((q, 4), (k, 5)))
        self._write(op, self._rotate(op, k, self._weight(op, 3), frame), v, frame)
        return self._rotate(op, q, self._weight(op, 3), frame)

    def _norm_heads(self, op: Step, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        heads = x.float().unflatten(1, (-1, int(op.attrs["head_dim"])))
        y = _to_unit_rms(heads, float(op.attrs["norm_eps"])) * weight
        return y.flatten(1).to(self._dtype)

    def _write(self, op: Step, k: torch.Tensor, v: torch.Tensor, frame: Frame) -> None:
        layer = int(op.attrs["layer"])
        written = frame.slot_mapping >= 0
        slots = frame.slot_mapping[written]
        scales = self._kv_scales.get(layer, (None, None))
        caches = (self._keys[layer], self._values[layer])
        for new, cache, scale in zip((k, v), caches, scales, strict=True):
            x = new[written].unflatten(1, cache.shape[2:])
            if self._rounded is not None:
                x = self._rounded(x.float(), scale)
            cache.view(-1, *cache.shape[2:])[slots] = x.to(cache.dtype)

    def _attend(self, op: Step, frame: Frame) -> torch.Tensor:
        q = self._input(op, 0, frame).float()
        out = torch.empty_like(q)
        starts = frame.attention.query_start_loc
        for i, seq_len in enumerate(frame.attention.seq_lens):
            rows = slice(starts[i], starts[i + 1])
            out[rows] = self._attend_sequence(op, q[rows], frame.block_tables[i], seq_len)
        return out.to(self._dtype)

    def _attend_sequence(
        self, op: Step, q: torch.Tensor, block_table: torch.Tensor, seq_len: int
    ) -> torch.Tensor:
        """q: [new tokens, num_heads * head_dim], the last ones of seq_len."""
        layer, window = int(op.attrs["layer"]), int(op.attrs.get("sliding_window", 0))
        soft_cap = float(op.attrs.get("soft_cap", 0))
        repeat = int(op.attrs["num_heads"]) // int(op.attrs["num_kv_heads"])
        blocks = block_table[: -(-seq_len // self._keys.shape[2])]
        k = self._keys[layer, blocks].flatten(0, 1)[:seq_len].float()
        v = self._values[layer, blocks].flatten(0, 1)[:seq_len].float()
        heads = q.unflatten(1, (-1, int(op.attrs["head_dim"])))
        scores = torch.einsum("qhd,khd->hqk", heads, k.repeat_interleave(repeat, dim=1))
        scores = scores * float(op.attrs["scale"])
        if soft_cap > 0:
            scores = soft_cap * torch.tanh(scores / soft_cap)
        at = torch.arange(seq_len, device=q.device)
        age = at[seq_len - len(q) :, None] - at[None, :]
        if len(op.inputs) == 2:
            scores = scores - self._weight(op, 1)[:, None, None] * age
        hidden = age < 0
        if window > 0:
            hidden |= age >= window
        weights = scores.masked_fill(hidden, float("-inf")).softmax(dim=-1)
        return torch.einsum("hqk,khd->qhd", weights, v.repeat_interleave(repeat, dim=1)).flatten(1)

    def _activate(self, op: Step, frame: Frame) -> torch.Tensor:
        return activate(self._input(op, 0, frame), str(op.attrs["kind"]))

    def _scale(self, op: Step, frame: Frame) -> torch.Tensor:
        return self._input(op, 0, frame) * float(op.attrs["factor"])

    def _clamp(self, op: Step, frame: Frame) -> torch.Tensor:
        limit = float(op.attrs["limit"])
        return self._input(op, 0, frame).clamp(-limit, limit)

    def _soft_cap(self, op: Step, frame: Frame) -> torch.Tensor:
        cap = float(op.attrs["cap"])
        return cap * torch.tanh(self._input(op, 0, frame) / cap)

    def _add(self, op: Step, frame: Frame) -> torch.Tensor:
        return self._input(op, 0, frame) + self._input(op, 1, frame)

    def _moe(self, op: Step, frame: Frame) -> torch.Tensor:
        x, logits = (self._input(op, i, frame) for i in range(2))
        # topk does not say which of equal ones it takes.
        order = logits.float().sort(dim=1, descending=True, stable=True).indices
        chosen = torch.zeros_like(logits, dtype=torch.bool)
        chosen.scatter_(1, order[:, : int(op.attrs["top_k"])], True)
        shares = logits.float().softmax(dim=1) * chosen
        if op.attrs["renormalize"]:
            shares = shares / shares.sum(dim=1, keepdim=True)
        y = torch.zeros_like(x)
        for expert in range(logits.shape[1]):
            rows = chosen[:, expert].nonzero()[:, 0]
            gate_up, down = (self._weight(op, 2 + 2 * expert + i) for i in range(2))
            gated = activate(functional.linear(x[rows], gate_up), str(op.attrs["kind"]))
            part = functional.linear(gated, down)
            y[rows] += part * shares[rows, expert, None].to(self._dtype)
        return y

    def _gather_rows(self, op: Step, frame: Frame) -> torch.Tensor:
        assert frame.logits_indices is not None
        return self._input(op, 0, frame).index_select(0, frame.logits_indices)


class TorchRunner(ModelRunner):
    """Runs the engine's steps on a TorchExecutor, each within execute().

    With max_steps_in_flight=2 the engine may lay out a step before it takes in the one before, as
    it does with a runner that computes meanwhile.
    """

    def __init__(
        self, executor: TorchExecutor, num_threads: int = 1, max_steps_in_flight: int = 1
    ) -> None:
        super().__init__()
        self._executor = executor
        self._sampler = Sampler(executor.program.vocab_size, num_threads)
        self._max_steps_in_flight = max_steps_in_flight
        self._outputs: deque[ModelRunnerOutput] = deque(maxlen=max_steps_in_flight)

    def max_steps_in_flight(self) -> int:
        return self._max_steps_in_flight

    def execute(self, batch: InputBatch) -> None:
        if len(batch.future_tokens):
            batch.resolve(self._outputs[-1].sampled_token_ids)
        logits = np.ascontiguousarray(self._executor.forward(batch))
        self._outputs.append(self._sampler.sample(logits, batch))

    def wait(self, step_id: int) -> ModelRunnerOutput:
        for output in self._outputs:
            if output.step_id == step_id:
                return output
        raise InvalidArgument(f"wait for step {step_id}, which is not among the last ones executed")


def _steps(program: Program) -> list[Step]:
    """The ops, each with the buffers that no later one reads, but for the program's output."""
    ops = program.ops
    last: dict[int, int] = {}
    for i, op in enumerate(ops):
        for operand in (*op.inputs, *op.outputs):
            last[operand.buffer] = i
    last.pop(program.output)
    buffers: list[list[int]] = [[] for _ in ops]
    for buffer, i in last.items():
        buffers[i].append(buffer)
    return [Step(op, read_last) for op, read_last in zip(ops, buffers, strict=True)]


_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "relu": functional.relu,
}


def _to_unit_rms(x: torch.Tensor, eps: float) -> torch.Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def activate(x: torch.Tensor, kind: str) -> torch.Tensor:
    function = _ACTIVATIONS[kind.removesuffix("_and_mul")]
    if not kind.endswith("_and_mul"):
        return function(x)
    gate, up = x.chunk(2, dim=1)
    return function(gate) * up


def _rounded_to_int8(x: torch.Tensor, _: torch.Tensor | None) -> torch.Tensor:
    """Symmetric, with a scale for each vector of the last dimension."""
    largest = x.abs().amax(dim=-1, keepdim=True)
    inverse = torch.where(largest > 0, 127 / largest, 0)
    return torch.round(x * inverse) * (largest / 127)


def _rounded_to_float8(x: torch.Tensor, scales: torch.Tensor | None) -> torch.Tensor:
    """Saturated; scales: [heads], of x [..., heads, head_dim]."""
    scale = 1 if scales is None else scales[:, None]
    return (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale


# How keys and values are rounded that are kept in fewer bits than activations.
_ROUNDED = {"int8": _rounded_to_int8, "float8_e4m3": _rounded_to_float8}


def _torch_dtype(name: str) -> torch.dtype:
    dtype = {
        "float32": torch.float32,
        "bfloat16": torch.bfloat16,
        "float16": torch.float16,
    }.get(name)
    if dtype is None:
        raise InvalidArgument(f"unknown dtype '{name}': one of float32, bfloat16, float16")
    return dtype
