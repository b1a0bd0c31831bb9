"""DecoderSpec: a decoder-only transformer described by data."""

from __future__ import annotations

from dataclasses import dataclass

from fastpage.models.rotary import RotarySpec


@dataclass(frozen=True)
class DecoderSpec:
    """What `decoder` needs to know of a model. Widths in columns, lengths in tokens."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    max_position_embeddings: int
    rotary: RotarySpec
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # RMSNorm of each head of q and of k, before the rotary embedding
    tie_embeddings: bool = False  # the output projection is the embedding table
    # Per layer, how many positions a token sees, itself included; 0 or no entry: all of them.
    sliding_windows: tuple[int, ...] = ()

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim

    def sliding_window(self, layer: int) -> int:
        return self.sliding_windows[layer] if self.sliding_windows else 0
