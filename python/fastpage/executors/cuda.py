"""The executor for a GPU: torch multiplies matrices, fastpage._C.cuda does the rest of a Program.

Sampling is the runner's, on the CPU (the device's own,
fastpage._C.cuda.sample, is not used yet).
"""

from __future__ import annotations

from typing import Any

import torch

from fastpage import _C
from fastpage._C import Op, Program
from fastpage.errors import InvalidArgument
from fastpage.executors.torch import IntArray, TorchExecutor, _Frame

Shape = tuple[int, int, int]  # heads, KV heads, head_dim


class AttentionPlans:
    """The plan of a step and the buffers that it lies in, for attention of one shape.

    They grow when a step does not fit: so their addresses hold from then on.
    """

    def __init__(self, kernels: Any, shape: Shape, device: torch.device) -> None:
        self._kernels, self._shape, self._device = kernels, shape, device
        self._limits = {"max_num_seqs": 0, "max_num_tokens": 0, "max_seq_len": 0}

    def update(self, query_start_loc: IntArray, seq_lens: IntArray) -> None:
        wanted = {
            "max_num_seqs": len(seq_lens),
            "max_num_tokens": int(query_start_loc[-1]),
            "max_seq_len": int(max(seq_lens)),
        }
        if any(wanted[name] > limit for name, limit in self._limits.items()):
            self._grow({n: max(_power_of_two(w), self._limits[n]) for n, w in wanted.items()})
        self.plan.plan(query_start_loc, seq_lens, self._host_buffer)
        self.buffer.copy_(self._host_buffer)

    def _grow(self, limits: dict[str, int]) -> None:
        heads, kv_heads, head_dim = self._shape
        self._limits = limits
        self.plan = self._kernels.AttentionPlan(
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            num_multiprocessors=_num_multiprocessors(self._device),
            **limits,
        )
        pinned = self._device.type == "cuda"
        self._host_buffer = torch.zeros(self.plan.plan_size, dtype=torch.int32, pin_memory=pinned)
        self.buffer = self._host_buffer.to(self._device, copy=True)
        self.workspace = torch.empty(self.plan.workspace_size, device=self._device)
        self.counters = torch.zeros(self.plan.num_counters, dtype=torch.int32, device=self._device)


class CudaExecutor(TorchExecutor):
    """Same calls as TorchExecutor, in bfloat16 or float16.

    head_dim: a multiple of 16 up to 128, or 256.
    kv_cache_dtype: that of activations, or "float8_e4m3". kernels: fastpage._C.cuda; what has its
    functions may stand in for it.
    """

    def __init__(
        self,
        program: Program,
        *,
        device: str = "cuda",
        dtype: str = "bfloat16",
        kv_cache_dtype: str | None = None,
        kernels: Any | None = None,
        **options: Any,
    ) -> None:
        if kernels is None:
            if not _C.cuda.is_available():
                raise InvalidArgument(f"executor='cuda': {_C.cuda.unavailable_reason()}")
            kernels = _C.cuda
        if dtype not in ("bfloat16", "float16"):
            raise InvalidArgument(f"dtype {dtype}: CUDA kernels need bfloat16 or float16")
        if kv_cache_dtype not in (None, dtype, "float8_e4m3"):
            raise InvalidArgument(
                f"kv_cache_dtype {kv_cache_dtype}: CUDA kernels need {dtype} or float8_e4m3"
            )
        self._kernels = kernels
        super().__init__(
            program, device=device, dtype=dtype, kv_cache_dtype=kv_cache_dtype, **options
        )
        self._plans = {
            shape: AttentionPlans(kernels, shape, self._device)
            for shape in {_attention_shape(op) for op in program.ops if op.kind == "attend"}
        }

    def _cache_dtype(self, name: str) -> torch.dtype:
        return torch.uint8 if name == "float8_e4m3" else super()._cache_dtype(name)

    def forward_arrays(
        self,
        token_ids: IntArray,
        positions: IntArray,
        slot_mapping: IntArray,
        query_start_loc: IntArray,
        seq_lens: IntArray,
        block_tables: IntArray,
        logits_indices: IntArray,
    ) -> Any:
        self._token_ids = self._int32(token_ids)
        self._positions = self._int32(positions)
        self._slots = self._int32(slot_mapping)
        self._tables = self._int32(block_tables)
        for plans in self._plans.values():
            plans.update(query_start_loc, seq_lens)
        return super().forward_arrays(
            token_ids,
            positions,
            slot_mapping,
            query_start_loc,
            seq_lens,
            block_tables,
            logits_indices,
        )

    def apply_transfers(
        self, swap_outs: IntArray, block_copies: IntArray, swap_ins: IntArray
    ) -> None:
        for cache, host in ((self._keys, self._host_keys), (self._values, self._host_values)):
            blocks, host_blocks = cache.flatten(2), host.flatten(2)
            if len(swap_outs):
                self._kernels.swap_blocks(blocks, host_blocks, swap_outs, "out")
            if len(block_copies):
                self._kernels.copy_blocks(blocks, block_copies)
            if len(swap_ins):
                self._kernels.swap_blocks(blocks, host_blocks, swap_ins, "in")

    def _int32(self, array: IntArray) -> torch.Tensor:
        return torch.tensor(array, dtype=torch.int32, device=self._device)

    def _empty(self, like: torch.Tensor, cols: int | None = None) -> torch.Tensor:
        return like.new_empty(like.shape[0], like.shape[1] if cols is None else cols)

    # ---- the ops

    def _embed(self, op: Op, frame: _Frame) -> torch.Tensor:
        table = self._weight(op, 0)
        out = table.new_empty(len(self._token_ids), table.shape[1])
        self._kernels.embed(self._token_ids, table, out)
        return out

    def _norm(self, op: Op, frame: _Frame) -> torch.Tensor:
        x = self._input(op, 0, frame)
        out = self._empty(x)
        self._kernels.norm(
            x,
            out,
            str(op.attrs["kind"]),
            float(op.attrs["eps"]),
            self._weight(op, 1),
            self._weight(op, 2) if len(op.inputs) == 3 else None,
            None,
            int(op.attrs.get("group", x.shape[1])),
        )
        return out

    def _rotary(self, op: Op, frame: _Frame) -> torch.Tensor:
        x = self._input(op, 0, frame)
        out = self._empty(x)
        table, head_dim, style = self._weight(op, 1), int(op.attrs["head_dim"]), op.attrs["style"]
        self._kernels.rotary(x, self._positions, table, head_dim, style, out)
        return out

    def _write_cache(self, op: Op, frame: _Frame) -> None:
        k, v = (self._input(op, i, frame) for i in range(2))
        layer = int(op.attrs["layer"])
        self._kernels.reshape_and_cache(k, v, self._slots, self._keys[layer], self._values[layer])

    def _rotary_write_cache(self, op: Op, frame: _Frame) -> torch.Tensor:
        q, k, v = (self._input(op, i, frame) for i in range(3))
        layer = int(op.attrs["layer"])
        out = self._empty(q)
        self._kernels.rotary_and_cache(
            q,
            k,
            v,
            self._positions,
            self._slots,
            self._weight(op, 3),
            op.attrs["style"],
            self._keys[layer],
            self._values[layer],
            out,
        )
        return out

    def _attend(self, op: Op, frame: _Frame) -> torch.Tensor:
        q = self._input(op, 0, frame)
        plans = self._plans[_attention_shape(op)]
        layer = int(op.attrs["layer"])
        out = self._empty(q)
        self._kernels.paged_attention(
            q,
            self._keys[layer],
            self._values[layer],
            self._tables,
            plans.plan,
            plans.buffer,
            plans.workspace,
            plans.counters,
            out,
            scale=float(op.attrs["scale"]),
            sliding_window=int(op.attrs.get("sliding_window", 0)),
            soft_cap=float(op.attrs.get("soft_cap", 0)),
            alibi_slopes=self._weight(op, 1) if len(op.inputs) == 2 else None,
        )
        return out

    def _activate(self, op: Op, frame: _Frame) -> torch.Tensor:
        x, kind = self._input(op, 0, frame), str(op.attrs["kind"])
        out = self._empty(x, x.shape[1] // 2 if kind.endswith("_and_mul") else None)
        self._kernels.activate(x, kind, out)
        return out


def _attention_shape(op: Op) -> Shape:
    return int(op.attrs["num_heads"]), int(op.attrs["num_kv_heads"]), int(op.attrs["head_dim"])


def _num_multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 8
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()
