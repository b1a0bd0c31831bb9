"""One decoder for every architecture: a DecoderSpec in, a Program out."""

from __future__ import annotations

from fastpage import ops
from fastpage._C import Program
from fastpage.models.spec import DecoderSpec


def decoder(spec: DecoderSpec) -> Program:
    """Traces the model. Its weights' canonical names are those declared here."""
    with ops.trace() as program:
        cos_sin = ops.weight("rotary.cos_sin", (spec.max_position_embeddings, spec.rotary.dim))
        table = ops.weight("embed", (spec.vocab_size, spec.hidden_size))
        x = ops.embed(table)
        for layer in range(spec.num_layers):
            heads = _attention(spec, layer, x, cos_sin)
            if layer == spec.num_layers - 1:
                # No later layer attends to this one's tokens: go on with the rows that are wanted.
                heads, x = ops.gather_rows(heads), ops.gather_rows(x)
            x = ops.add(x, _linear(heads, f"layers.{layer}.attn.o", spec.hidden_size, spec.o_bias))
            x = ops.add(x, _mlp(spec, layer, x))
        x = _norm(spec, x, "final_norm")
        if spec.tie_embeddings:
            ops.output(ops.linear(x, table))
        else:
            ops.output(_linear(x, "lm_head", spec.vocab_size, bias=False))
    return program


def _attention(spec: DecoderSpec, layer: int, x: ops.Tensor, cos_sin: ops.Weight) -> ops.Tensor:
    """[tokens, hidden] -> the heads' outputs, [tokens, num_heads * head_dim]."""
    name = f"layers.{layer}.attn"
    x = _norm(spec, x, f"{name}_norm")
    qkv = _linear(x, f"{name}.qkv", spec.q_size + 2 * spec.kv_size, spec.qkv_bias)
    if spec.qk_norm:
        q, k, v = ops.split(qkv, (spec.q_size, spec.kv_size, spec.kv_size))
        q = ops.norm(q, ops.weight(f"{name}.q_norm", (spec.head_dim,)), spec.norm_eps)
        k = ops.norm(k, ops.weight(f"{name}.k_norm", (spec.head_dim,)), spec.norm_eps)
        q = ops.rotary(q, cos_sin, spec.head_dim)
        k = ops.rotary(k, cos_sin, spec.head_dim)
    else:
        qk, v = ops.split(qkv, (spec.q_size + spec.kv_size, spec.kv_size))
        qk = ops.rotary(qk, cos_sin, spec.head_dim)
        q, k = ops.split(qk, (spec.q_size, spec.kv_size))
    ops.write_cache(k, v, layer)
    return ops.attend(
        q,
        layer=layer,
        num_heads=spec.num_heads,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        sliding_window=spec.sliding_window(layer),
    )


def _mlp(spec: DecoderSpec, layer: int, x: ops.Tensor) -> ops.Tensor:
    """[rows, hidden] -> [rows, hidden]."""
    name = f"layers.{layer}.mlp"
    x = _norm(spec, x, f"{name}_norm")
    x = _linear(x, f"{name}.gate_up", 2 * spec.intermediate_size, spec.mlp_bias)
    return _linear(ops.activate(x), f"{name}.down", spec.hidden_size, spec.mlp_bias)


def _linear(x: ops.Tensor, name: str, out_features: int, bias: bool) -> ops.Tensor:
    weight = ops.weight(name, (out_features, x.cols))
    return ops.linear(x, weight, ops.weight(f"{name}.bias", (out_features,)) if bias else None)


def _norm(spec: DecoderSpec, x: ops.Tensor, name: str) -> ops.Tensor:
    return ops.norm(x, ops.weight(name, (x.cols,)), spec.norm_eps)
