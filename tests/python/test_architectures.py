"""Architectures from outside the package: the modules of docs/models.md, against numpy."""

from __future__ import annotations

import json
import re
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from oracle import check_greedy, check_logits, load
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models

import fastpage
from fastpage.errors import CheckpointError, InvalidArgument, UnsupportedArchitecture
from fastpage.models import Architecture, build_model, registry, supported_architectures
from fastpage.models.constants import constants

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.usefixtures("one_torch_thread")

DOCUMENT = (Path(__file__).resolve().parents[2] / "docs" / "models.md").read_text()
VOCAB, WIDTH, DEPTH, HEADS, CONTEXT = 59, 30, 2, 3, 128
HEAD_DIM = WIDTH // HEADS
CONFIG = {
    "vocab_size": VOCAB,
    "width": WIDTH,
    "depth": DEPTH,
    "heads": HEADS,
    "context": CONTEXT,
    "eos_token_id": 0,
}
Weights = Mapping[str, np.ndarray]


def block(language: str, words: str) -> str:
    """The block of code in the document that has `words`."""
    blocks = re.findall(rf"```{language}\n(.*?)```", DOCUMENT, re.S)
    (found,) = (code for code in blocks if words in code)
    return found


# ---- what the two models compute


def rms_norm(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return x / np.sqrt(np.square(x).mean(axis=-1, keepdims=True) + 1e-5) * weight


def rotary(x: np.ndarray, theta: float) -> np.ndarray:
    """x: [tokens, heads, head_dim]; halves of a head are rotated against each other."""
    half = x.shape[-1] // 2
    angles = np.arange(len(x))[:, None, None] * theta ** (-np.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    cos, sin = np.cos(angles), np.sin(angles)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def attend(q: np.ndarray, k: np.ndarray, v: np.ndarray, slopes: np.ndarray) -> np.ndarray:
    """q: [tokens, heads, head_dim]; k, v: one head for all, or as many. [tokens, width]."""
    distance = np.arange(len(q))[:, None] - np.arange(len(q))[None]
    k, v = (np.broadcast_to(part, q.shape) for part in (k, v))
    scores = np.einsum("qhd,khd->hqk", q, k) / HEAD_DIM**0.5 - slopes[:, None, None] * distance
    scores = np.where(distance < 0, -np.inf, scores)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    return np.einsum("hqk,khd->qhd", weights, v).reshape(len(q), -1)


def heads(x: np.ndarray) -> np.ndarray:
    return x.reshape(len(x), -1, HEAD_DIM)


def kestrel_logits(weights: Weights, tokens: np.ndarray) -> np.ndarray:
    x = weights["tokens.weight"][tokens]
    for i in range(DEPTH):
        w = {part: weights[f"blocks.{i}.{part}.weight"] for part in KESTREL_PARTS}
        normed = rms_norm(x, w["norm"])
        k, v = np.split(normed @ w["kv"].T, 2, axis=1)
        q, k = rotary(heads(normed @ w["q"].T), 500.0), rotary(heads(k), 500.0)
        attended = attend(q, k, heads(v), np.zeros(HEADS)) @ w["out"].T
        x = x + attended + np.maximum(normed @ w["up"].T, 0) @ w["down"].T
    return rms_norm(x, weights["norm.weight"]) @ weights["tokens.weight"].T


def macaron_logits(weights: Weights, tokens: np.ndarray) -> np.ndarray:
    def half_mlp(x: np.ndarray, name: str) -> np.ndarray:
        normed = rms_norm(x, weights[f"{name}.norm.weight"])
        y = normed @ weights[f"{name}.up.weight"].T
        return x + 0.5 * (y / (1 + np.exp(-y))) @ weights[f"{name}.down.weight"].T

    x = weights["tokens.weight"][tokens]
    for i in range(DEPTH):
        x = half_mlp(x, f"blocks.{i}.before")
        normed = rms_norm(x, weights[f"blocks.{i}.norm.weight"])
        q, k, v = map(heads, np.split(normed @ weights[f"blocks.{i}.qkv.weight"].T, 3, axis=1))
        attended = attend(q, k, v, 0.5 ** np.arange(1, HEADS + 1))
        x = half_mlp(x + attended @ weights[f"blocks.{i}.out.weight"].T, f"blocks.{i}.after")
    return rms_norm(x, weights["norm.weight"]) @ weights["tokens.weight"].T


KESTREL_PARTS = {
    "norm": (WIDTH,),
    "q": (WIDTH, WIDTH),
    "kv": (2 * HEAD_DIM, WIDTH),
    "out": (WIDTH, WIDTH),
    "up": (3 * WIDTH, WIDTH),
    "down": (WIDTH, 3 * WIDTH),
}
MACARON_PARTS = {
    "norm": (WIDTH,),
    "qkv": (3 * WIDTH, WIDTH),
    "out": (WIDTH, WIDTH),
    **{f"{half}.norm": (WIDTH,) for half in ("before", "after")},
    **{f"{half}.up": (2 * WIDTH, WIDTH) for half in ("before", "after")},
    **{f"{half}.down": (WIDTH, 2 * WIDTH) for half in ("before", "after")},
}
MODELS = {
    "kestrel": (KESTREL_PARTS, kestrel_logits),
    "macaron": (MACARON_PARTS, macaron_logits),
}


def write_checkpoint(name: str, path: Path) -> Callable[[Any], Any]:
    """A random checkpoint of the model, with a tokenizer. Returns the model, as transformers' are
    called."""
    parts, logits = MODELS[name]
    shapes = {"tokens": (VOCAB, WIDTH), "norm": (WIDTH,)}
    shapes |= {f"blocks.{i}.{part}": shape for i in range(DEPTH) for part, shape in parts.items()}
    random = np.random.default_rng(0)
    weights = {
        f"{weight}.weight": random.standard_normal(shape).astype(np.float32)
        / np.float32(shape[-1] ** 0.5 if len(shape) == 2 else 1)
        for weight, shape in shapes.items()
    }
    save_file(weights, path / "model.safetensors")
    architecture = f"{name.capitalize()}ForCausalLM"
    (path / "config.json").write_text(json.dumps({**CONFIG, "architectures": [architecture]}))
    vocabulary = {f"t{i}": i for i in range(VOCAB)}
    Tokenizer(models.WordLevel(vocabulary, unk_token="t0")).save(str(path / "tokenizer.json"))

    def model(tokens: Any) -> Any:
        values = logits(weights, tokens[0].numpy()).astype(np.float32)
        return types.SimpleNamespace(logits=torch.from_numpy(values)[None])

    return model


@pytest.fixture
def empty_registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(registry, "_registered", {})
    yield
    for name in MODELS:
        sys.modules.pop(name, None)


@pytest.fixture
def documented(
    empty_registry: None, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both models of the document, registered as it says."""
    site = tmp_path_factory.mktemp("site")
    for name in MODELS:
        (site / f"{name}.py").write_text(block("python", f"# {name}.py"))
    monkeypatch.syspath_prepend(str(site))
    exec(block("python", "register_architecture"), {})


@pytest.mark.parametrize("name", MODELS)
def test_registered(name: str, documented: None, tmp_path: Path) -> None:
    model = write_checkpoint(name, tmp_path)
    check_logits(tmp_path, model)
    check_greedy(tmp_path, model)


def test_served_from_an_installed_package(
    empty_registry: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found by its entry point, imported when it is asked for, and run by LLM."""
    site, checkpoint = tmp_path / "site", tmp_path / "checkpoint"
    checkpoint.mkdir()
    model = write_checkpoint("kestrel", checkpoint)
    with pytest.raises(UnsupportedArchitecture, match="KestrelForCausalLM is not supported"):
        fastpage.LLM(str(checkpoint))
    install(site, monkeypatch)
    assert "KestrelForCausalLM" in supported_architectures()
    assert "kestrel" not in sys.modules
    llm = fastpage.LLM(str(checkpoint), dtype="float32", num_kv_blocks=16)
    params = fastpage.SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    prompt = [3, 1, 4, 1, 5, 9, 2, 6]
    output = llm.generate([{"prompt_token_ids": prompt}], params)[0].outputs[0]
    assert len(output.token_ids) == 20
    for i, token in enumerate(output.token_ids):
        so_far = torch.tensor([prompt + list(output.token_ids[:i])])
        logits = model(so_far).logits[0, -1]
        assert float(logits.max() - logits[token]) < 1e-4
    assert llm.info.max_model_len == CONTEXT


def install(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `pip install` makes of the document's kestrel.py and entry point, on sys.path."""
    info = site / "kestrel-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "kestrel.py").write_text(block("python", "# kestrel.py"))
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kestrel\nVersion: 1.0\n")
    section, entry = block("toml", "entry-points").splitlines()
    assert section == '[project.entry-points."fastpage.architectures"]'
    (info / "entry_points.txt").write_text(
        f"[fastpage.architectures]\n{entry.replace(chr(34), '')}\n"
        "BrokenForCausalLM = kestrel_broken:architecture\n"
        "WrongForCausalLM = kestrel:sources\n"
    )
    monkeypatch.syspath_prepend(str(site))


def test_entry_points_that_fail_are_named(
    empty_registry: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, monkeypatch)
    for name, message in (
        ("BrokenForCausalLM", "entry point kestrel_broken:architecture failed"),
        ("WrongForCausalLM", "entry point kestrel:sources is a function, not a fastpage"),
    ):
        with pytest.raises(UnsupportedArchitecture, match=message) as error:
            build_model({"architectures": [name]})
        assert "\n" not in str(error.value)


def test_a_name_is_registered_once_and_goes_before_a_built_in(documented: None) -> None:
    kestrel = sys.modules["kestrel"].architecture
    with pytest.raises(InvalidArgument, match="'KestrelForCausalLM' is registered already"):
        fastpage.register_architecture("KestrelForCausalLM", kestrel)
    fastpage.register_architecture("LlamaForCausalLM", kestrel)
    assert build_model({**CONFIG, "architectures": ["LlamaForCausalLM"]}).spec.residual == (
        "parallel"
    )


def test_what_does_not_fit_is_listed(documented: None, tmp_path: Path) -> None:
    write_checkpoint("kestrel", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "depth": 1}))
    with pytest.raises(CheckpointError, match=r"6 fault\(s\): surplus blocks.1.down.weight"):
        load(tmp_path, "cpu")
    kestrel = sys.modules["kestrel"]
    tolerant = Architecture(kestrel.spec, kestrel.sources, ignored=("down.weight", "up.weight"))
    registry._registered["KestrelForCausalLM"] = tolerant
    with pytest.raises(CheckpointError, match=r"4 fault\(s\): surplus blocks.1.kv.weight"):
        load(tmp_path, "cpu")


def test_constants_of_a_spec(documented: None) -> None:
    model = build_model({**CONFIG, "architectures": ["MacaronForCausalLM"]}, max_model_len=17)
    assert model.spec.max_position_embeddings == 17
    np.testing.assert_array_equal(model.constants()["slopes"], [0.5, 0.25, 0.125])
    model = build_model({**CONFIG, "architectures": ["KestrelForCausalLM"]}, max_model_len=17)
    assert constants(model.spec)["rotary.cos_sin"].shape == (17, HEAD_DIM)
