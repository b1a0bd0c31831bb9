"""Special tokens: what transformers makes of the same tokenizer files, case by case."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from checkpoint_files import CORPUS, byte_level_vocabulary, sentencepiece_vocabulary
from tokenizers import AddedToken

from fastpage.engine.prompts import chat_prompt
from fastpage.tokenizer import Tokenizer

transformers = pytest.importorskip("transformers")

TEXTS = [
    "",
    "hello world",
    " hello",
    "a<|end|>b",
    "a <|end|> b",
    "a  <|end|>  b\n",
    "<|begin|>x<|begin|>",
    "<strip>x <strip> y<strip>",
    "one<word>two <word> three",
    "<NORM> <norm> n <Norm>",
    "tab\t<|end|>\n\n<|end|>end",
    "<s>hi</s> <s> </s>",
    "<|new|>and <|new|>",
    "<plain>x<plain>",
]
TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
TOKENS = [
    AddedToken("<strip>", lstrip=True, rstrip=True, special=True, normalized=False),
    AddedToken("<word>", single_word=True, special=True, normalized=False),
    AddedToken("<NORM>", normalized=True, special=False),
    AddedToken("<plain>", normalized=False, special=False),
]
CASES: dict[str, dict[str, Any]] = {
    "as saved": {},
    "no bos": {"add_bos_token": False},
    "bos": {"add_bos_token": True},
    "bos and eos": {"add_bos_token": True, "add_eos_token": True},
    "eos": {"add_bos_token": False, "add_eos_token": True},
    "clean_up_tokenization_spaces": {"clean_up_tokenization_spaces": True},
    "additional special tokens": {"additional_special_tokens": ["<plain>"]},
    "extra special tokens": {"extra_special_tokens": ["<plain>"]},
}


def save(path: Path, kind: str, changes: dict[str, Any]) -> None:
    vocabulary = (
        byte_level_vocabulary(CORPUS, 500)
        if kind == "byte-level"
        else sentencepiece_vocabulary(CORPUS, 500)
    )
    metadata = {key: as_numbers(value) for key, value in vocabulary.items()}
    backend = Tokenizer.from_gguf_metadata(metadata, "x")._backend
    backend.add_tokens(TOKENS)
    backend.save(str(path / "tokenizer.json"))
    names = ("<|begin|>", "<|end|>") if kind == "byte-level" else ("<s>", "</s>")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": names[0],
        "eos_token": names[1],
        "chat_template": TEMPLATE,
        **changes,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(config))


def as_numbers(value: Any) -> Any:
    import numpy as np

    return np.array(value) if isinstance(value, list) and not isinstance(value[0], str) else value


@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece"])
@pytest.mark.parametrize("case", CASES)
def test_as_in_transformers(tmp_path, kind, case):
    save(tmp_path, kind, CASES[case])
    ours = Tokenizer.from_directory(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    for text in TEXTS:
        for special in (True, False):
            ids = ours.encode(text, add_special_tokens=special)
            assert ids == theirs.encode(text, add_special_tokens=special), (text, special)
            for skip in (True, False):
                expected = theirs.decode(ids, skip_special_tokens=skip)
                assert ours.decode(ids, skip_special_tokens=skip) == expected, (text, skip)
    assert ours.bos_token_id == theirs.bos_token_id
    assert theirs.eos_token_id in ours.eos_token_ids
    assert len(theirs) == ours.vocab_size


@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece"])
def test_a_template_that_writes_bos_does_not_double_it(tmp_path, kind):
    save(tmp_path, kind, {"add_bos_token": True})
    ours = Tokenizer.from_directory(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    messages = [{"role": "user", "content": "hello <|end|>"}]
    expected = theirs.apply_chat_template(messages, return_dict=False)
    prompt = chat_prompt(messages, ours)
    assert prompt.token_ids == expected
    assert prompt.token_ids.count(ours.bos_token_id) == 1


TEMPLATE_FILES: dict[str, tuple[Any, dict[str, str]]] = {
    "in the config": ("C", {}),
    "list in the config": (
        [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}],
        {},
    ),
    "file": (None, {"chat_template.jinja": "F"}),
    "file over config": ("C", {"chat_template.jinja": "F"}),
    "file over list": (
        [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}],
        {"chat_template.jinja": "F"},
    ),
    "files": (
        None,
        {"chat_template.jinja": "F", "additional_chat_templates/tool_use.jinja": "U"},
    ),
    "files over list": (
        [{"name": "default", "template": "D"}, {"name": "other", "template": "O"}],
        {"additional_chat_templates/tool_use.jinja": "U", "chat_template.jinja": "F"},
    ),
}


@pytest.mark.parametrize("case", TEMPLATE_FILES)
def test_where_chat_templates_come_from(tmp_path, case):
    declared, files = TEMPLATE_FILES[case]
    save(tmp_path, "byte-level", {"chat_template": declared} if declared else {})
    if declared is None:
        config = json.loads((tmp_path / "tokenizer_config.json").read_text())
        del config["chat_template"]
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    ours = Tokenizer.from_directory(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    messages = [{"role": "user", "content": "x"}]
    tool = {"type": "function", "function": {"name": "f", "description": "", "parameters": {}}}
    for tools in (None, [tool]):
        expected = theirs.apply_chat_template(messages, tools=tools, tokenize=False)
        assert ours.apply_chat_template(messages, tools=tools) == expected
