"""One decoder for every architecture: a DecoderSpec in, a Program out."""

from __future__ import annotations

from fastpage import ops
from fastpage._C import Program
from fastpage.models.constants import ALIBI_SLOPES, COS_SIN, LOCAL_COS_SIN, NORM_ONES
from fastpage.models.spec import DecoderSpec


def decoder(spec: DecoderSpec) -> Program:
    """Traces the model. Its weights' canonical names are those declared here."""
    with ops.trace() as program:
        _Decoder(spec).trace()
    return program


class _Decoder:
    """Shapes in comments are [rows, columns]."""

    def __init__(self, spec: DecoderSpec) -> None:
        self.spec = spec
        positions = spec.max_position_embeddings
        self.cos_sin, self.local_cos_sin = (
            None if rotary is None else ops.weight(name, (positions, rotary.dim))
            for name, rotary in ((COS_SIN, spec.rotary), (LOCAL_COS_SIN, spec.local_rotary))
        )
        self.alibi_slopes = (
            ops.weight(ALIBI_SLOPES, (spec.num_heads,)) if spec.alibi_slopes else None
        )
        self.norm_ones = None if spec.norm_weight else ops.weight(NORM_ONES, (spec.hidden_size,))
        self.table = ops.weight("embed", (spec.vocab_size, spec.embed_size or spec.hidden_size))

    def trace(self) -> None:
        x = self._embedding()
        for layer in range(self.spec.num_layers):
            x = self._layer(layer, x)
        ops.output(self._logits(x))

    def _embedding(self) -> ops.Tensor:
        spec = self.spec
        x = ops.embed(self.table)
        if spec.embed_scale != 1:
            x = ops.scale(x, spec.embed_scale)
        if spec.embed_size:
            x = self._linear(x, "embed_in", spec.hidden_size, bias=False)
        if spec.learned_positions:
            table = ops.weight("positions", (spec.learned_positions, spec.hidden_size))
            x = ops.add(x, ops.embed_positions(table, spec.position_offset))
        return self._norm(x, "embed_norm") if spec.embed_norm else x

    def _layer(self, layer: int, x: ops.Tensor) -> ops.Tensor:
        """[tokens, hidden] -> the same; after the last layer, [logits, hidden]."""
        spec, name = self.spec, f"layers.{layer}"
        normed = self._input_norm(x, f"{name}.attn_norm")
        heads = self._attention(layer, normed)
        if layer == spec.num_layers - 1:
            # No later layer attends to this one's tokens: go on with the rows that are wanted.
            if spec.residual == "parallel":
                normed = ops.gather_rows(normed)
            heads, x = ops.gather_rows(heads), ops.gather_rows(x)
        attended = self._linear(heads, f"{name}.attn.o", spec.hidden_size, spec.o_bias)
        if spec.residual == "parallel":
            return self._add(self._add(x, attended), self._mlp(layer, normed))
        if spec.residual == "parallel_two_norms":
            mlp = self._mlp(layer, self._norm(x, f"{name}.mlp_norm"))
            return self._add(self._add(x, attended), mlp)
        x = self._join(x, attended, f"{name}.attn")
        return self._join(
            x, self._mlp(layer, self._input_norm(x, f"{name}.mlp_norm")), f"{name}.mlp"
        )

    def _input_norm(self, x: ops.Tensor, name: str) -> ops.Tensor:
        return self._norm(x, name) if self.spec.norm_place in ("pre", "sandwich") else x

    def _join(self, x: ops.Tensor, update: ops.Tensor, name: str) -> ops.Tensor:
        """What a part of a layer computed, into the residual stream."""
        place = self.spec.norm_place
        if place in ("output", "sandwich"):
            update = self._norm(update, f"{name}_out_norm")
        x = self._add(x, update)
        return self._norm(x, f"{name}_norm") if place == "post" else x

    def _add(self, x: ops.Tensor, update: ops.Tensor) -> ops.Tensor:
        factor = self.spec.residual_scale
        return ops.add(x, update if factor == 1 else ops.scale(update, factor))

    def _attention(self, layer: int, x: ops.Tensor) -> ops.Tensor:
        """[tokens, hidden] -> the heads' outputs, [tokens, num_heads * head_dim]."""
        spec, name = self.spec, f"layers.{layer}.attn"
        qkv = self._linear(x, f"{name}.qkv", spec.q_size + 2 * spec.kv_size, spec.qkv_bias)
        if spec.qkv_clip:
            qkv = ops.clamp(qkv, spec.qkv_clip)
        qk, v = ops.split(qkv, (spec.q_size + spec.kv_size, spec.kv_size))
        if spec.qk_norm:
            q, k = ops.split(qk, (spec.q_size, spec.kv_size))
            q = self._rotary(layer, self._qk_norm(q, f"{name}.q_norm"))
            k = self._rotary(layer, self._qk_norm(k, f"{name}.k_norm"))
        else:
            q, k = ops.split(self._rotary(layer, qk), (spec.q_size, spec.kv_size))
        ops.write_cache(k, v, layer)
        return ops.attend(
            q,
            self.alibi_slopes,
            layer=layer,
            num_heads=spec.num_heads,
            num_kv_heads=spec.num_kv_heads,
            head_dim=spec.head_dim,
            scale=spec.attention_scale(layer),
            sliding_window=spec.sliding_window(layer),
            soft_cap=spec.attention_soft_cap,
        )

    def _qk_norm(self, x: ops.Tensor, name: str) -> ops.Tensor:
        spec = self.spec
        columns = spec.head_dim if spec.qk_norm == "head" else x.cols
        group = x.cols if spec.qk_norm == "all" else spec.head_dim
        weight = ops.weight(name, (columns,))
        return ops.norm(x, weight, spec.norm_eps, kind=spec.norm_kind, group=group)

    def _rotary(self, layer: int, x: ops.Tensor) -> ops.Tensor:
        spec = self.spec
        rotary = spec.layer_rotary(layer)
        cos_sin = self.cos_sin if rotary is spec.rotary else self.local_cos_sin
        if rotary is None or cos_sin is None:
            return x
        return ops.rotary(x, cos_sin, spec.head_dim, rotary.style)

    def _mlp(self, layer: int, x: ops.Tensor) -> ops.Tensor:
        """[rows, hidden] -> [rows, hidden]."""
        spec, name = self.spec, f"layers.{layer}"
        if spec.has_experts(layer):
            return self._experts(x, f"{name}.moe")
        width = spec.intermediate_size
        if spec.gated_mlp:
            x = self._linear(x, f"{name}.mlp.gate_up", 2 * width, spec.mlp_bias)
            x = ops.activate(x, f"{spec.activation}_and_mul")
        else:
            x = self._linear(x, f"{name}.mlp.up", width, spec.mlp_bias)
            x = ops.activate(x, spec.activation)
        return self._linear(x, f"{name}.mlp.down", spec.hidden_size, spec.mlp_bias)

    def _experts(self, x: ops.Tensor, name: str) -> ops.Tensor:
        spec, moe = self.spec, self.spec.moe
        assert moe is not None
        experts = [
            (
                ops.weight(f"{name}.experts.{i}.gate_up", (2 * moe.intermediate_size, x.cols)),
                ops.weight(f"{name}.experts.{i}.down", (x.cols, moe.intermediate_size)),
            )
            for i in range(moe.num_experts)
        ]
        return ops.moe(
            x,
            self._linear(x, f"{name}.router", moe.num_experts, bias=False),
            experts,
            top_k=moe.top_k,
            renormalize=moe.renormalize,
            kind=f"{spec.activation}_and_mul",
        )

    def _logits(self, x: ops.Tensor) -> ops.Tensor:
        """[logits, hidden] -> [logits, vocab]."""
        spec = self.spec
        if spec.final_norm:
            x = self._norm(x, "final_norm")
        if spec.embed_size:
            x = self._linear(x, "embed_out", spec.embed_size, bias=False)
        table = ops.weight("lm_head", self.table.shape) if not spec.tie_embeddings else self.table
        bias = ops.weight("lm_head.bias", (spec.vocab_size,)) if spec.lm_head_bias else None
        x = ops.linear(x, table, bias)
        if spec.logits_scale != 1:
            x = ops.scale(x, spec.logits_scale)
        return ops.soft_cap(x, spec.logits_soft_cap) if spec.logits_soft_cap else x

    @staticmethod
    def _linear(x: ops.Tensor, name: str, out_features: int, bias: bool) -> ops.Tensor:
        weight = ops.weight(name, (out_features, x.cols))
        return ops.linear(x, weight, ops.weight(f"{name}.bias", (out_features,)) if bias else None)

    def _norm(self, x: ops.Tensor, name: str) -> ops.Tensor:
        spec = self.spec
        weight = self.norm_ones or ops.weight(name, (x.cols,))
        bias = ops.weight(f"{name}.bias", (x.cols,)) if spec.norm_bias else None
        return ops.norm(x, weight, spec.norm_eps, bias, kind=spec.norm_kind)
