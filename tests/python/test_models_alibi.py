"""BLOOM, Falcon, MPT and Baichuan against transformers and, where it has none of it, against plain
torch: no cache, no batch, the maths as published."""

from __future__ import annotations

import functools
import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from oracle import (
    NUM_TOKENS,
    SMALL,
    Case,
    MakeCheckpoint,
    check_greedy,
    check_less_precise,
    check_logits,
    check_rubbish,
    checkpoint_fixture,
)
from test_passes import assert_same_bits

from fastpage.checkpoints import open_checkpoint
from fastpage.errors import CheckpointError, UnsupportedArchitecture
from fastpage.models import build_model
from fastpage.models.constants import alibi_slopes

torch = pytest.importorskip("torch")
safetensors = pytest.importorskip("safetensors")
pytest.importorskip("safetensors.torch")
pytest.importorskip("transformers")
functional = torch.nn.functional
pytestmark = pytest.mark.usefixtures("one_torch_thread")

BLOOM = {
    "vocab_size": 131,
    "hidden_size": 54,
    "n_layer": 3,
    "n_head": 6,
    "layer_norm_epsilon": 1e-4,
}
FALCON = {
    "vocab_size": 131,
    "hidden_size": 60,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "layer_norm_epsilon": 1e-4,
    "max_position_embeddings": 256,
}
# Its slopes are powers of two, as transformers rounds them to bfloat16.
FALCON_RW = {"alibi": True, "bias": True, "multi_query": False, "parallel_attn": False}
FALCON_40B = {"new_decoder_architecture": True, "num_kv_heads": 2}
FALCON_11B = {
    **FALCON_40B,
    "num_ln_in_parallel_attn": 1,
    "ffn_hidden_size": 77,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500042.0},
    "tie_word_embeddings": False,
}
MPT = {"vocab_size": 131, "d_model": 54, "n_heads": 6, "n_layers": 3, "max_seq_len": 200}


class FalconCase(Case):
    def make(self, seed: int) -> Any:
        model = super().make(seed)
        # Eager attention adds ALiBi twice, by the mask and by itself.
        model.config._attn_implementation = "sdpa"
        return model


class MptCase(Case):
    def make(self, seed: int) -> Any:
        model = super().make(seed)
        # transformers takes alibi_bias_max to be 8 whatever the config says.
        build = model.transformer.build_mpt_alibi_tensor
        max_bias = model.config.attn_config.alibi_bias_max
        model.transformer.build_mpt_alibi_tensor = functools.partial(build, alibi_bias_max=max_bias)
        return model


CASES = {
    "bloom": Case("Bloom", base=BLOOM),
    "bloom-untied": Case("Bloom", {"tie_word_embeddings": False, "n_head": 3}, BLOOM),
    "falcon-7b": FalconCase("Falcon", {"hidden_size": 50, "num_attention_heads": 5}, FALCON),
    "falcon-40b": FalconCase("Falcon", FALCON_40B, FALCON),
    "falcon-11b": FalconCase("Falcon", FALCON_11B, FALCON),
    "falcon-rw": FalconCase("Falcon", FALCON_RW, FALCON),
    "falcon-40b-alibi": FalconCase("Falcon", {**FALCON_40B, "alibi": True}, FALCON),
    "falcon-multi-head": FalconCase("Falcon", {"multi_query": False, "bias": True}, FALCON),
    "falcon-sequential": FalconCase("Falcon", {"parallel_attn": False}, FALCON),
    "mpt": MptCase("Mpt", base=MPT),
    "mpt-clip": MptCase("Mpt", {"attn_config": {"clip_qkv": 0.3, "alibi_bias_max": 16}}, MPT),
    "mpt-scale": MptCase("Mpt", {"attn_config": {"softmax_scale": 0.2}, "n_heads": 2}, MPT),
}
checkpoint = checkpoint_fixture(CASES)


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(case: str, checkpoint: MakeCheckpoint) -> None:
    check_logits(*checkpoint(case))


@pytest.mark.parametrize("case", ["bloom", "falcon-7b", "falcon-40b", "falcon-rw", "mpt-clip"])
def test_greedy_tokens_equal_transformers(case: str, checkpoint: MakeCheckpoint) -> None:
    check_greedy(*checkpoint(case))


def test_slopes_of_falcon_are_in_bfloat16(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """12 heads have slopes that bfloat16 rounds. Their products with positions, which transformers
    rounds too, are exact here and in what is compared with."""
    from transformers.models.falcon import modeling_falcon

    def build(mask: Any, num_heads: int, dtype: Any) -> Any:
        slopes = torch.tensor(alibi_slopes(num_heads)).bfloat16().to(dtype)
        return (slopes[:, None] * torch.arange(mask.shape[1])).unsqueeze(1)

    monkeypatch.setattr(modeling_falcon, "build_alibi_tensor", build)
    changes = {**FALCON_RW, "num_attention_heads": 12, "hidden_size": 72}
    model = FalconCase("Falcon", changes, FALCON).make(seed=0)
    model.save_pretrained(tmp_path)
    check_logits(tmp_path, model)


def test_names_without_the_base_models_prefix(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    """As bigscience/bloom has them."""
    path, oracle = checkpoint("bloom")
    tensors = safetensors.torch.load_file(path / "model.safetensors")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    safetensors.torch.save_file(bare, tmp_path / "model.safetensors")
    shutil.copy(path / "config.json", tmp_path)
    check_logits(tmp_path, oracle)


@pytest.mark.parametrize("case", CASES)
def test_passes_keep_the_bits(case: str, checkpoint: MakeCheckpoint) -> None:
    program = build_model(open_checkpoint(checkpoint(case)[0]).config).program
    assert_same_bits(program, [], weight_dtype="float32", kv_cache_dtype="float32")


@pytest.mark.parametrize("case", ["bloom", "falcon-7b", "falcon-40b", "mpt-clip"])
def test_less_precise_weights(case: str, checkpoint: MakeCheckpoint) -> None:
    path, _ = checkpoint(case)
    bf16 = {"weight_dtype": "bfloat16", "kv_cache_dtype": "bfloat16"}
    check_less_precise(path, bf16)
    check_less_precise(path, {"quantization": "int8", "kv_cache_dtype": "int8"})


def test_the_clip_of_the_case_matters(checkpoint: MakeCheckpoint) -> None:
    _, oracle = checkpoint("mpt-clip")
    tokens = torch.arange(NUM_TOKENS)[None]
    with torch.no_grad():
        clipped = oracle(tokens).logits
        for block in oracle.transformer.blocks:
            block.attn.clip_qkv = None
        assert float((oracle(tokens).logits - clipped).abs().max()) > 1e-2
        for block in oracle.transformer.blocks:
            block.attn.clip_qkv = 0.3


# ---- what transformers does not have


def attention(q: Any, k: Any, v: Any, scale: float, slopes: Any = None) -> Any:
    """Causal, of q [tokens, heads, head_dim] and as many or fewer key and value heads."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    positions = torch.arange(q.shape[0])
    if slopes is not None:
        distances = positions[None, :] - positions[:, None]
        scores = scores + torch.tensor(slopes)[:, None, None] * distances
    scores = scores.masked_fill(positions[None, :] > positions[:, None], -torch.inf)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1)


@dataclass
class Reference:
    """A model written out for the tests: a checkpoint's config and tensors; logits of tokens."""

    config: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]

    def __post_init__(self) -> None:
        torch.manual_seed(1)
        self.tensors = {
            name: torch.randn(shape) * shape[-1] ** -0.5 + (len(shape) == 1)
            for name, shape in self.shapes.items()
        }

    def save(self, path: Path) -> Path:
        safetensors.torch.save_file(self.tensors, path / "model.safetensors")
        (path / "config.json").write_text(json.dumps(dict(self.config)))
        return path

    def __call__(self, token_ids: Any) -> Any:
        return SimpleNamespace(logits=self.logits(token_ids[0])[None])

    def logits(self, tokens: Any) -> Any:
        raise NotImplementedError

    def linear(self, x: Any, name: str) -> Any:
        tensors = self.tensors
        return functional.linear(x, tensors[f"{name}.weight"], tensors.get(f"{name}.bias"))


def mpt_reference(attn_config: Mapping[str, Any], **changes: Any) -> MptReference:
    config = {
        **MPT,
        "architectures": ["MPTForCausalLM"],
        "expansion_ratio": 4,
        "no_bias": True,
        "learned_pos_emb": True,
        "logit_scale": None,
        "norm_type": "low_precision_layernorm",
        "tie_word_embeddings": True,
        **changes,
        "attn_config": {
            "attn_type": "multihead_attention",
            "alibi": True,
            "alibi_bias_max": 8,
            "clip_qkv": None,
            "qk_ln": False,
            "softmax_scale": None,
            "prefix_lm": False,
            **attn_config,
        },
    }
    return MptReference(config, mpt_shapes(config))


def mpt_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    attn, width = config["attn_config"], config["d_model"]
    kv_width = mpt_kv_heads(config) * width // config["n_heads"]
    inner = config["expansion_ratio"] * width
    shapes: dict[str, tuple[int, ...]] = {"wte": (config["vocab_size"], width), "norm_f": (width,)}
    if not attn["alibi"]:
        shapes["wpe"] = config["max_seq_len"], width
    for layer in range(config["n_layers"]):
        block = f"blocks.{layer}"
        shapes[f"{block}.norm_1"] = shapes[f"{block}.norm_2"] = (width,)
        shapes[f"{block}.attn.Wqkv"] = width + 2 * kv_width, width
        shapes[f"{block}.attn.out_proj"] = width, width
        shapes[f"{block}.ffn.up_proj"] = inner, width
        shapes[f"{block}.ffn.down_proj"] = width, inner
        if attn["qk_ln"]:
            shapes[f"{block}.attn.q_ln"], shapes[f"{block}.attn.k_ln"] = (width,), (kv_width,)
    named = {f"transformer.{name}.weight": shape for name, shape in shapes.items()}
    if not config["no_bias"]:
        for name, shape in shapes.items():
            if name not in ("wte", "wpe"):
                named[f"transformer.{name}.bias"] = shape[:1]
    if not config["tie_word_embeddings"]:
        named["lm_head.weight"] = shapes["wte"]
    return named


def mpt_kv_heads(config: Mapping[str, Any]) -> int:
    attn = config["attn_config"]
    return {
        "multihead_attention": config["n_heads"],
        "multiquery_attention": 1,
        "grouped_query_attention": attn.get("kv_n_heads"),
    }[attn["attn_type"]]


class MptReference(Reference):
    """MPT as in MosaicML's llm-foundry."""

    def logits(self, tokens: Any) -> Any:
        config, tensors = self.config, self.tensors
        x = tensors["transformer.wte.weight"][tokens]
        if not config["attn_config"]["alibi"]:
            x = x + tensors["transformer.wpe.weight"][: len(tokens)]
        for layer in range(config["n_layers"]):
            block = f"transformer.blocks.{layer}"
            x = x + self.attention(self.norm(x, f"{block}.norm_1"), f"{block}.attn")
            inner = self.linear(self.norm(x, f"{block}.norm_2"), f"{block}.ffn.up_proj")
            x = x + self.linear(functional.gelu(inner), f"{block}.ffn.down_proj")
        x = self.norm(x, "transformer.norm_f")
        head = "transformer.wte.weight" if config["tie_word_embeddings"] else "lm_head.weight"
        scale = config["logit_scale"]
        if scale == "inv_sqrt_d_model":
            scale = 1 / math.sqrt(config["d_model"])
        return x @ tensors[head].T * (1 if scale is None else scale)

    def attention(self, x: Any, name: str) -> Any:
        config, attn = self.config, self.config["attn_config"]
        head_dim = config["d_model"] // config["n_heads"]
        kv_width = mpt_kv_heads(config) * head_dim
        qkv = self.linear(x, f"{name}.Wqkv")
        if attn["clip_qkv"]:
            qkv = qkv.clamp(-attn["clip_qkv"], attn["clip_qkv"])
        q, k, v = qkv.split((config["d_model"], kv_width, kv_width), -1)
        if attn["qk_ln"]:
            q, k = self.norm(q, f"{name}.q_ln"), self.norm(k, f"{name}.k_ln")
        q, k, v = (part.unflatten(-1, (-1, head_dim)) for part in (q, k, v))
        slopes = self.slopes(config["n_heads"]) if attn["alibi"] else None
        scale = attn["softmax_scale"] or head_dim**-0.5
        return self.linear(attention(q, k, v, scale, slopes), f"{name}.out_proj")

    def slopes(self, heads: int) -> list[float]:
        power = 2 ** math.ceil(math.log2(heads))
        max_bias = self.config["attn_config"]["alibi_bias_max"]
        slopes = [1 / 2 ** (i * max_bias / power) for i in range(1, power + 1)]
        return slopes if power == heads else (slopes[1::2] + slopes[::2])[:heads]

    def norm(self, x: Any, name: str) -> Any:
        weight, bias = self.tensors[f"{name}.weight"], self.tensors.get(f"{name}.bias")
        return functional.layer_norm(x, weight.shape, weight, bias, 1e-5)


class BaichuanReference(Reference):
    """Baichuan as its technical report and model card have it; inv_freq as in its checkpoints."""

    @staticmethod
    def make(architecture: str, **changes: Any) -> BaichuanReference:
        config = {
            **{name: SMALL[name] for name in ("vocab_size", "hidden_size", "intermediate_size")},
            "architectures": [architecture],
            "hidden_act": "silu",
            "model_max_length": 128,
            "num_attention_heads": 6,
            "num_hidden_layers": 2,
            "rms_norm_eps": 1e-4,
            "tie_word_embeddings": False,
            **changes,
        }
        width, inner = config["hidden_size"], config["intermediate_size"]
        shapes: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (config["vocab_size"], width),
            "model.norm.weight": (width,),
            "lm_head.weight": (config["vocab_size"], width),
        }
        for layer in range(config["num_hidden_layers"]):
            for name, shape in {
                "input_layernorm": (width,),
                "post_attention_layernorm": (width,),
                "self_attn.W_pack": (3 * width, width),
                "self_attn.o_proj": (width, width),
                "mlp.gate_proj": (inner, width),
                "mlp.up_proj": (inner, width),
                "mlp.down_proj": (width, inner),
            }.items():
                shapes[f"model.layers.{layer}.{name}.weight"] = shape
        return BaichuanReference(config, shapes)

    def logits(self, tokens: Any) -> Any:
        config, tensors = self.config, self.tensors
        x = tensors["model.embed_tokens.weight"][tokens]
        for layer in range(config["num_hidden_layers"]):
            name = f"model.layers.{layer}"
            x = x + self.attention(self.norm(x, f"{name}.input_layernorm"), f"{name}.self_attn")
            normed = self.norm(x, f"{name}.post_attention_layernorm")
            gate = functional.silu(self.linear(normed, f"{name}.mlp.gate_proj"))
            up = self.linear(normed, f"{name}.mlp.up_proj")
            x = x + self.linear(gate * up, f"{name}.mlp.down_proj")
        head = tensors["lm_head.weight"]
        if config["vocab_size"] == 125696:  # Baichuan 2
            head = functional.normalize(head)
        return self.norm(x, "model.norm") @ head.T

    def attention(self, x: Any, name: str) -> Any:
        heads = self.config["num_attention_heads"]
        head_dim = x.shape[1] // heads
        q, k, v = self.linear(x, f"{name}.W_pack").unflatten(-1, (3, heads, head_dim)).unbind(1)
        slopes = None
        if self.config["architectures"] == ["BaiChuanForCausalLM"]:
            q, k = self.rotated(q), self.rotated(k)
        else:
            slopes = self.slopes(heads)
        return self.linear(attention(q, k, v, head_dim**-0.5, slopes), f"{name}.o_proj")

    def slopes(self, heads: int) -> list[float]:
        if heads & (heads - 1) == 0:
            start = 2 ** (-(2 ** -(math.log2(heads) - 3)))
            return [start ** (i + 1) for i in range(heads)]
        power = 2 ** math.floor(math.log2(heads))
        return self.slopes(power) + self.slopes(2 * power)[::2][: heads - power]

    @staticmethod
    def rotated(x: Any) -> Any:
        frequencies = 10000.0 ** (-torch.arange(0, x.shape[2], 2) / x.shape[2])
        angles = (torch.arange(len(x))[:, None] * frequencies).repeat(1, 2)[:, None]
        low, high = x.chunk(2, -1)
        return x * angles.cos() + torch.cat((-high, low), -1) * angles.sin()

    def norm(self, x: Any, name: str) -> Any:
        variance = x.square().mean(-1, keepdim=True)
        eps = self.config["rms_norm_eps"]
        return x * torch.rsqrt(variance + eps) * self.tensors[f"{name}.weight"]


ROTARY = {"hidden_size": 60, "max_position_embeddings": 128}
BAICHUAN_2 = {"vocab_size": 125696, "hidden_size": 15, "num_attention_heads": 3}
REFERENCES = {
    "mpt": functools.partial(mpt_reference, {"clip_qkv": 1.0, "alibi_bias_max": 5}),
    "mpt-biases-positions": functools.partial(mpt_reference, {"alibi": False}, no_bias=False),
    "mpt-qk-norm-grouped": functools.partial(
        mpt_reference,
        {"qk_ln": True, "attn_type": "grouped_query_attention", "kv_n_heads": 2},
        expansion_ratio=3,
        logit_scale="inv_sqrt_d_model",
    ),
    "mpt-multi-query-untied": functools.partial(
        mpt_reference,
        {"attn_type": "multiquery_attention", "softmax_scale": 0.1},
        tie_word_embeddings=False,
        logit_scale=1.7,
    ),
    "baichuan-7b": functools.partial(BaichuanReference.make, "BaiChuanForCausalLM", **ROTARY),
    "baichuan-13b": functools.partial(BaichuanReference.make, "BaichuanForCausalLM"),
    "baichuan-2-13b": functools.partial(
        BaichuanReference.make, "BaichuanForCausalLM", **BAICHUAN_2
    ),
}


@pytest.mark.parametrize("case", REFERENCES)
def test_logits_equal_the_published_maths(case: str, tmp_path: Path) -> None:
    reference = REFERENCES[case]()
    check_logits(reference.save(tmp_path), reference)


@pytest.mark.parametrize("case", ["baichuan-7b", "baichuan-13b"])
def test_greedy_tokens_equal_the_published_maths(case: str, tmp_path: Path) -> None:
    reference = REFERENCES[case]()
    check_greedy(reference.save(tmp_path), reference)


# ---- configs as they are on the Hub

HUB_FALCON = {
    "alibi": False,
    "apply_residual_connection_post_layernorm": False,
    "architectures": ["FalconForCausalLM"],
    "bias": False,
    "hidden_size": 4544,
    "layer_norm_epsilon": 1e-05,
    "multi_query": True,
    "new_decoder_architecture": False,
    "num_attention_heads": 71,
    "num_hidden_layers": 32,
    "parallel_attn": True,
    "vocab_size": 65024,
}
HUB_BAICHUAN = {
    "architectures": ["BaichuanForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 5120,
    "intermediate_size": 13696,
    "model_max_length": 4096,
    "num_attention_heads": 40,
    "num_hidden_layers": 40,
    "rms_norm_eps": 1e-06,
    "tie_word_embeddings": False,
    "vocab_size": 64000,
}


def spec_of(config: Mapping[str, Any]) -> Any:
    return build_model(dict(config)).spec


def test_falcon_configs_of_the_hub() -> None:
    spec = spec_of(HUB_FALCON)
    assert (spec.num_kv_heads, spec.head_dim, spec.residual) == (1, 64, "parallel")
    assert spec.intermediate_size == 4 * 4544 and spec.max_position_embeddings == 2048
    assert spec.rotary.dim == 64 and spec.tie_embeddings and not spec.qkv_bias
    large = {"new_decoder_architecture": True, "num_kv_heads": 8, "num_attention_heads": 128}
    spec = spec_of({**HUB_FALCON, **large, "hidden_size": 8192})
    assert (spec.num_kv_heads, spec.residual) == (8, "parallel_two_norms")
    small = {**FALCON_RW, "hidden_size": 2048, "num_attention_heads": 32}
    spec = spec_of({**HUB_FALCON, **small})
    assert (spec.num_kv_heads, spec.residual, spec.rotary) == (32, "sequential", None)
    assert spec.alibi_slopes[3] == 0.5 / 8  # 2 ** (-8 * 4 / 32), over the root of a head's 64
    assert spec.alibi_slopes[0] == 0.83984375 / 8  # 2 ** -0.25 in bfloat16


def test_bloom_and_mpt_configs_of_the_hub() -> None:
    bloom = {
        "architectures": ["BloomForCausalLM"],
        "apply_residual_connection_post_layernorm": False,
        "layer_norm_epsilon": 1e-05,
        "n_embed": 1024,
        "n_inner": None,
        "n_layer": 24,
        "num_attention_heads": 16,
        "offset_alibi": 100,
        "pretraining_tp": 1,
        "slow_but_exact": False,
        "vocab_size": 250880,
    }
    spec = spec_of(bloom)
    assert (spec.hidden_size, spec.num_heads, spec.num_layers) == (1024, 16, 24)
    assert spec.max_position_embeddings == 2048 and spec.tie_embeddings
    attn = {"alibi": True, "alibi_bias_max": 16, "attn_impl": "torch", "clip_qkv": 6}
    attn |= {"attn_type": "multihead_attention", "attn_uses_sequence_id": False, "prefix_lm": False}
    attn |= {"qk_ln": False, "softmax_scale": None}
    storywriter = {
        "architectures": ["MPTForCausalLM"],
        "attn_config": attn,
        "d_model": 4096,
        "expansion_ratio": 4,
        "learned_pos_emb": True,
        "logit_scale": None,
        "max_seq_len": 65536,
        "n_heads": 32,
        "n_layers": 32,
        "no_bias": True,
        "norm_type": "low_precision_layernorm",
        "vocab_size": 50432,
    }
    spec = spec_of(storywriter)
    assert (spec.qkv_clip, spec.alibi_slopes[1], spec.max_position_embeddings) == (6, 0.5, 65536)
    assert not spec.learned_positions and not spec.norm_bias
    assert spec == spec_of({**storywriter, "architectures": ["MptForCausalLM"]})


def test_which_baichuan_is_rotary() -> None:
    small = {"hidden_size": 4096, "num_attention_heads": 32, "max_position_embeddings": 4096}
    for config, is_rotary in (
        ({**HUB_BAICHUAN, **small, "architectures": ["BaiChuanForCausalLM"]}, True),
        ({**HUB_BAICHUAN, **small, "vocab_size": 125696}, True),
        (HUB_BAICHUAN, False),
        ({**HUB_BAICHUAN, "vocab_size": 125696}, False),
    ):
        spec = spec_of(config)
        assert (spec.rotary is not None) == is_rotary == (spec.alibi_slopes == ())
        assert spec.max_position_embeddings == 4096
    assert spec.alibi_slopes == alibi_slopes(40)


# ---- what does not fit


def test_unsupported_options_are_named() -> None:
    bloom = {**BLOOM, "architectures": ["BloomForCausalLM"]}
    falcon = {**FALCON, "architectures": ["FalconForCausalLM"]}
    mpt = {**MPT, "architectures": ["MPTForCausalLM"]}
    for config in (bloom, falcon):
        build_model(config)
        with pytest.raises(UnsupportedArchitecture, match="apply_residual_connection"):
            build_model({**config, "apply_residual_connection_post_layernorm": True})
    for changes, words in (
        ({"attn_config": {"prefix_lm": True}}, "prefix_lm is True"),
        ({"attn_config": {"rope": True, "alibi": False}}, "rope is True"),
        ({"attn_config": {"sliding_window_size": 9}}, "sliding_window_size is 9"),
        ({"attn_config": {"attn_type": "linear"}}, "attn_type is 'linear'"),
        ({"attn_config": {"alibi": False}, "learned_pos_emb": False}, "learned_pos_emb"),
        ({"attn_config": {"qk_ln": True}, "no_bias": False}, "qk_ln is True"),
        ({"norm_type": "rmsnorm"}, "norm_type is 'rmsnorm'"),
        ({"ffn_config": {"ffn_type": "mptglu"}}, "ffn_type is 'mptglu'"),
    ):
        with pytest.raises(UnsupportedArchitecture, match=words):
            build_model({**mpt, **changes})
    with pytest.raises(UnsupportedArchitecture, match="tie_word_embeddings is True"):
        build_model({**HUB_BAICHUAN, "tie_word_embeddings": True})
    with pytest.raises(CheckpointError, match="7 heads, which do not divide"):
        build_model({**bloom, "n_head": 7})
    with pytest.raises(CheckpointError, match="attn_config 'torch': no mapping"):
        build_model({**mpt, "attn_config": "torch"})
    with pytest.raises(CheckpointError, match="no model_max_length"):
        build_model({**HUB_BAICHUAN, "model_max_length": None})


@pytest.mark.parametrize("case", ["bloom", "falcon-11b", "falcon-rw", "mpt-clip"])
def test_rubbish_in_a_config_is_an_error_of_one_line(case: str, checkpoint: MakeCheckpoint) -> None:
    check_rubbish(open_checkpoint(checkpoint(case)[0]).config)


def test_rubbish_in_a_config_of_baichuan() -> None:
    check_rubbish({**HUB_BAICHUAN, "num_hidden_layers": 2})
