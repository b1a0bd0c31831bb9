"""The ops of a model, as functions over symbolic tensors: calling them records a Program.

    with trace() as program:
        x = embed(weight("embed", (vocab_size, hidden_size)))
        ...
        output(linear(gather_rows(x), weight("lm_head", (vocab_size, hidden_size))))

A tensor's rows are symbolic: one per new token of the batch ("tokens") until `gather_rows`, then
one per token whose logits are wanted ("logits"). Shapes below are [rows, columns].
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from fastpage._C import Operand, Program

_program: contextvars.ContextVar[Program] = contextvars.ContextVar("fastpage.program")


@dataclass(frozen=True)
class Tensor:
    """Columns [offset, offset + cols) of an activation."""

    buffer: int
    offset: int
    cols: int
    rows: str  # "tokens" | "logits"

    def operand(self) -> Operand:
        return Operand(self.buffer, self.offset, self.cols)


@dataclass(frozen=True)
class Weight:
    """A constant, known by its canonical name."""

    buffer: int
    shape: tuple[int, ...]

    def operand(self) -> Operand:
        return Operand(self.buffer)


@contextlib.contextmanager
def trace() -> Iterator[Program]:
    """Ops called inside the `with` are appended to the Program that it yields."""
    program = Program()
    token = _program.set(program)
    try:
        yield program
    finally:
        _program.reset(token)
    program.validate()


def _current() -> Program:
    try:
        return _program.get()
    except LookupError:
        raise RuntimeError("fastpage.ops only work inside `with ops.trace():`") from None


def _append(
    kind: str,
    inputs: Sequence[Tensor | Weight],
    rows: str,
    cols: int,
    /,
    **attrs: int | float | str,
) -> Tensor:
    """Appends an op whose result is a new activation."""
    program = _current()
    buffer = program.add_activation(str(len(program.ops)), rows, cols)
    operands = [x.operand() for x in inputs]
    program.add_op(kind, operands, [Operand(buffer, 0, cols)], attrs)
    return Tensor(buffer, 0, cols, rows)


def weight(name: str, shape: Sequence[int]) -> Weight:
    """Declares a constant. Linear weights are [out, in], tables [entries, columns]."""
    return Weight(_current().add_weight(name, shape), tuple(shape))


def output(logits: Tensor) -> None:
    """Makes `logits` [logits, vocab] the program's result."""
    _current().set_output(logits.buffer)


def split(x: Tensor, widths: Sequence[int]) -> tuple[Tensor, ...]:
    """Ranges of columns, side by side: views, no op."""
    if sum(widths) != x.cols:
        raise ValueError(f"split: widths {list(widths)} do not add up to {x.cols} columns")
    parts = []
    offset = x.offset
    for width in widths:
        parts.append(Tensor(x.buffer, offset, width, x.rows))
        offset += width
    return tuple(parts)


def embed(table: Weight) -> Tensor:
    """Rows of `table` [vocab, hidden] for the batch's token ids: [tokens, hidden]."""
    return _append("embed", [table], "tokens", table.shape[1])


def embed_positions(table: Weight, offset: int = 0) -> Tensor:
    """Rows of `table` [entries, hidden], by position plus `offset`: [tokens, hidden]."""
    return _append("embed_positions", [table], "tokens", table.shape[1], offset=offset)


def norm(
    x: Tensor,
    weight: Weight,
    eps: float,
    bias: Weight | None = None,
    *,
    kind: str = "rms",
    group: int | None = None,
) -> Tensor:
    """RMSNorm (kind "rms") or LayerNorm ("layer") over groups of columns: x's shape.

    weight, bias: [group], the same for every group, or [columns of x]. group: weight's width unless
    given.
    """
    inputs: list[Tensor | Weight] = [x, weight] if bias is None else [x, weight, bias]
    group = weight.shape[0] if group is None else group
    return _append("norm", inputs, x.rows, x.cols, kind=kind, eps=eps, group=group)


def linear(x: Tensor, weight: Weight, bias: Weight | None = None) -> Tensor:
    """x [rows, in] times `weight` [out, in] transposed, plus `bias` [out]: [rows, out]."""
    inputs: list[Tensor | Weight] = [x, weight] if bias is None else [x, weight, bias]
    return _append("linear", inputs, x.rows, weight.shape[0])


def rotary(x: Tensor, cos_sin: Weight, head_dim: int, style: str = "neox") -> Tensor:
    """Rotary embedding of x [tokens, heads * head_dim] at the batch's positions: x's shape.

    cos_sin: [positions, rotary_dim], cosines in the first half of a row, sines in the second.
    """
    return _append("rotary", [x, cos_sin], x.rows, x.cols, head_dim=head_dim, style=style)


def write_cache(k: Tensor, v: Tensor, layer: int) -> None:
    """Keys and values, each [tokens, kv_heads * head_dim], into the layer's cache."""
    _current().add_op("write_cache", [k.operand(), v.operand()], [], {"layer": layer})


def attend(
    q: Tensor,
    alibi_slopes: Weight | None = None,
    *,
    layer: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    scale: float | None = None,
    sliding_window: int = 0,
    soft_cap: float = 0.0,
) -> Tensor:
    """Causal attention of q [tokens, num_heads * head_dim] over the layer's cache: q's shape.

    The new tokens' keys and values must have been written. scale: head_dim ** -0.5 unless given.
    sliding_window: 0, or how many positions a token sees, itself included. soft_cap: 0, or scores
    become soft_cap * tanh(score / soft_cap). alibi_slopes: [num_heads]; a head's, times how far
    back a position lies, is taken off its score (Press et al. 2022).
    """
    return _append(
        "attend",
        [q] if alibi_slopes is None else [q, alibi_slopes],
        q.rows,
        q.cols,
        layer=layer,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        scale=head_dim**-0.5 if scale is None else scale,
        sliding_window=sliding_window,
        soft_cap=soft_cap,
    )


def activate(x: Tensor, kind: str = "silu_and_mul") -> Tensor:
    """An activation function of each element, or of a gate.

    kind: "silu", "gelu", "gelu_tanh" (GELU's approximation by tanh) or "relu": x's shape. The same
    with "_and_mul": f(gate) * up, x being gate | up side by side [rows, 2 * width]: [rows, width].
    """
    cols = x.cols // 2 if kind.endswith("_and_mul") else x.cols
    return _append("activate", [x], x.rows, cols, kind=kind)


def scale(x: Tensor, factor: float) -> Tensor:
    """x * factor."""
    return _append("scale", [x], x.rows, x.cols, factor=factor)


def clamp(x: Tensor, limit: float) -> Tensor:
    """x, held within [-limit, limit]."""
    return _append("clamp", [x], x.rows, x.cols, limit=limit)


def soft_cap(x: Tensor, cap: float) -> Tensor:
    """cap * tanh(x / cap)."""
    return _append("soft_cap", [x], x.rows, x.cols, cap=cap)


def moe(
    x: Tensor,
    router_logits: Tensor,
    experts: Sequence[tuple[Weight, Weight]],
    *,
    top_k: int,
    renormalize: bool,
    kind: str = "silu_and_mul",
) -> Tensor:
    """A mixture of experts (Shazeer et al. 2017) of x [rows, hidden]: x's shape.

    router_logits: [rows, experts]. Each row goes to the top_k experts of the largest softmax
    probability, whose results are summed with these probabilities as weights (divided by their sum
    if renormalize). experts: of each, gate and up on top of each other [2 * width, hidden], and
    down [hidden, width]. kind: the gated activation between them, as in `activate`.
    """
    weights = [weight for expert in experts for weight in expert]
    return _append(
        "moe",
        [x, router_logits, *weights],
        x.rows,
        x.cols,
        top_k=top_k,
        renormalize=int(renormalize),
        kind=kind,
    )


def add(a: Tensor, b: Tensor) -> Tensor:
    """a + b, of the same shape."""
    return _append("add", [a, b], a.rows, a.cols)


def gather_rows(x: Tensor) -> Tensor:
    """The rows of x [tokens, cols] whose logits are wanted: [logits, cols]."""
    return _append("gather_rows", [x], "logits", x.cols)
