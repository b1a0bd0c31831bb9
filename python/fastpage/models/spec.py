"""DecoderSpec: a decoder-only transformer described by data."""

from __future__ import annotations

from dataclasses import dataclass

from fastpage.models.rotary import RotarySpec


@dataclass(frozen=True)
class MoeSpec:
    """A mixture of experts (Shazeer et al. 2017) in the place of the MLP of some layers."""

    num_experts: int
    top_k: int  # experts that a token goes to: those of the largest router probability
    intermediate_size: int  # of one expert, which is gated and has no biases
    renormalize: bool = True  # the probabilities of the top_k are divided by their sum
    layers: tuple[bool, ...] = ()  # which layers have experts; no entries: all of them

    def in_layer(self, layer: int) -> bool:
        return self.layers[layer] if self.layers else True


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

    # Positions: any of these, or none.
    rotary: RotarySpec | None = None
    local_rotary: RotarySpec | None = None  # of layers with a sliding window, if theirs differs
    rotary_layers: tuple[bool, ...] = ()  # which layers have one; no entries: all of them
    alibi_slopes: tuple[float, ...] = ()  # one a head
    learned_positions: int = 0  # rows of a table that is added to the embedding; 0: there is none
    position_offset: int = 0  # the table's row of position 0

    # Norms. place: "pre": x + f(norm(x)); "post": norm(x + f(x)); "output": x + norm(f(x));
    # "sandwich": x + norm(f(norm(x))).
    norm_kind: str = "rms"  # or "layer" (LayerNorm)
    norm_weight: bool = True  # False: norms only normalise
    norm_bias: bool = False
    norm_place: str = "pre"
    embed_norm: bool = False  # of the embedding
    final_norm: bool = True
    # Of q and k before the rotary embedding, of norm_kind, without bias. "": none; "head": each
    # head, by one weight for all heads; "each_head": each head, by a weight of its own; "all": all
    # heads together.
    qk_norm: str = ""
    # Where the MLP reads: "sequential": what attention has added to; "parallel": what attention
    # reads; "parallel_two_norms": the same x by a norm of its own.
    residual: str = "sequential"

    activation: str = "silu"  # "silu", "gelu", "gelu_tanh" or "relu"
    gated_mlp: bool = True  # activation(gate) * up rather than activation(up)

    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    lm_head_bias: bool = False
    tie_embeddings: bool = False  # the output projection is the embedding table
    embed_size: int = 0  # of the embedding, if it is projected to hidden_size and back; else 0

    # Multipliers and bounds; 1 and 0 mean none.
    embed_scale: float = 1.0
    residual_scale: float = 1.0  # of what attention and MLP add
    logits_scale: float = 1.0
    logits_soft_cap: float = 0.0  # logits become cap * tanh(logits / cap)
    attention_soft_cap: float = 0.0
    attention_scales: tuple[float, ...] = ()  # per layer; no entries: head_dim ** -0.5
    qkv_clip: float = 0.0  # q, k and v are clamped to [-clip, clip]

    # Per layer, how many positions a token sees, itself included; 0 or no entry: all of them.
    sliding_windows: tuple[int, ...] = ()

    moe: MoeSpec | None = None

    NORM_KINDS = ("rms", "layer")
    NORM_PLACES = ("pre", "post", "output", "sandwich")
    QK_NORMS = ("", "head", "each_head", "all")
    RESIDUALS = ("sequential", "parallel", "parallel_two_norms")
    ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")

    def __post_init__(self) -> None:
        for name, allowed in (
            ("norm_kind", self.NORM_KINDS),
            ("norm_place", self.NORM_PLACES),
            ("qk_norm", self.QK_NORMS),
            ("residual", self.RESIDUALS),
            ("activation", self.ACTIVATIONS),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}: one of {allowed}")
        if self.residual != "sequential" and self.norm_place != "pre":
            raise ValueError(f"residual {self.residual!r} needs norm_place 'pre'")
        for name, count in (
            ("alibi_slopes", self.num_heads),
            ("attention_scales", self.num_layers),
            ("sliding_windows", self.num_layers),
            ("rotary_layers", self.num_layers),
        ):
            if len(getattr(self, name)) not in (0, count):
                raise ValueError(f"{name} has {len(getattr(self, name))} entries, not {count}")
        if self.moe is not None and len(self.moe.layers) not in (0, self.num_layers):
            raise ValueError(
                f"moe.layers has {len(self.moe.layers)} entries, not {self.num_layers}"
            )

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim

    def sliding_window(self, layer: int) -> int:
        return self.sliding_windows[layer] if self.sliding_windows else 0

    def attention_scale(self, layer: int) -> float:
        return self.attention_scales[layer] if self.attention_scales else self.head_dim**-0.5

    def layer_rotary(self, layer: int) -> RotarySpec | None:
        if self.rotary_layers and not self.rotary_layers[layer]:
            return None
        is_local = self.local_rotary is not None and self.sliding_window(layer) > 0
        return self.local_rotary if is_local else self.rotary

    def has_experts(self, layer: int) -> bool:
        return self.moe is not None and self.moe.in_layer(layer)
