"""Tokenizers: the ids, texts and chat prompts that transformers gives, from GGUF and from JSON."""
# ruff: noqa: RUF001 (unusual characters are what is tested)

from __future__ import annotations

import copy
import json
import math
import random
import resource
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from checkpoint_files import (
    CORPUS,
    byte_level_vocabulary,
    model_metadata,
    sentencepiece_vocabulary,
    write_gguf,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from fastpage.checkpoints import open_checkpoint
from fastpage.checkpoints.gguf_file import GgufFile
from fastpage.engine.prompts import chat_text
from fastpage.errors import CheckpointError, InvalidArgument
from fastpage.tokenizer import Tokenizer, bounded_jinja

TEXTS = [
    "",
    " ",
    "Hello, world!",
    " leading and trailing ",
    "two  spaces,   three,\ttab,\n\nnewlines\r\n  and  indents\n\t\tx",
    "It's we'll I'D they've DON'T 'quoted'",
    "Numbers: 0 12 345 6789 3.14159 1,000,000 0xFF 2024-11-21 v1.2.3",
    "many  1  spaces   22    before\n\n333  digits \t 4",
    "Grüße, naïve café, Ångström, ﬁne, ½ ² Ⅷ ٣ ५",
    "e\u0301 cafe\u0301 A\u030a \u1e9b\u0323 combining",
    "日本語のテキスト、中文文本。한국어 텍스트",
    "Привет мир! Γειά σου Κόσμε! مرحبا بالعالم שלום עולם",
    "🤗 🎉👩‍👩‍👧‍👦🏳️‍🌈 👍🏽 emoji",
    "def f(x: int) -> int:\n    return x ** 2  # comment\n\n\nclass A:\n\tpass\n",
    '{"key": [1, 2.5, null], "nested": {"a": "b\\n"}}',
    "<|im_start|>user\nhello<|im_end|>\n<|endoftext|> <|im_start|><|im_start|> <|im_ start|>",
    "<s> </s> <unk> <0x0A> [INST] <|begin|> x <|end|>y",
    "https://example.com/a?b=c&d=e#f user@host.tld C:\\path",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa" * 4,
    "\x00\x01\x7f\x80\u200b\ufeff\u2028 control \ufffd",
    "▁sentencepiece ▁ marks Ġ byte Ċ level",
    "∀x∈ℝ: ⌈x⌉ = −⌊−x⌋, α ∧ ¬β → ∫f(x)dx √2 ≤ ∞",
    "".join(map(chr, range(32, 1000))),
]
CONVERSATIONS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "Hi"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why is <sky> blue?"}],
    [
        {"role": "user", "content": "1 + 1?\n"},
        {"role": "assistant", "content": " 2 "},
        {"role": "user", "content": "日本語 & 🤗"},
    ],
]


def random_texts(count: int) -> list[str]:
    """Strings of bytes read as Latin-1 or, where that works, as UTF-8, and of mixed characters."""
    rng = random.Random(0)
    texts = []
    for _ in range(count):
        raw = rng.randbytes(rng.randrange(60))
        texts.append(raw.decode("latin-1"))
        texts.append(raw.decode("utf-8", "ignore"))
        texts.append("".join(rng.choices(" \n\t'ab1é日🤗.<|", k=rng.randrange(40))))
    return texts


def assert_same(ours: Tokenizer, theirs: Any, texts: list[str]) -> None:
    for text in texts:
        for special in (True, False):
            ids = ours.encode(text, add_special_tokens=special)
            assert ids == theirs.encode(text, add_special_tokens=special), repr(text)
            for skip in (True, False):
                expected = theirs.decode(ids, skip_special_tokens=skip)
                assert ours.decode(ids, skip_special_tokens=skip) == expected, repr(text)


@pytest.fixture(scope="module")
def smollm2(smollm2_gguf: Path) -> Tokenizer:
    return open_checkpoint(smollm2_gguf).tokenizer()


@pytest.fixture(scope="module")
def smollm2_digits(smollm2_hf: Any) -> Any:
    """transformers' tokenizer, mended: it overlooks the pre-tokenizer that the file names.

    The files name "smollm", which as in the model's own tokenizer.json sets digits apart before
    words are cut. It shows where several spaces precede a digit.
    """
    mended = copy.deepcopy(smollm2_hf.tokenizer)
    backend = mended.backend_tokenizer
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [tokenizers.pre_tokenizers.Digits(individual_digits=True), backend.pre_tokenizer]
    )
    return mended


# ---------------------------------------------------------------- from GGUF


@pytest.fixture
def transformers() -> Any:
    pytest.importorskip("torch")  # with which it reads GGUF
    return pytest.importorskip("transformers")


def test_real_model_equals_transformers(smollm2, smollm2_hf, smollm2_digits):
    assert_same(smollm2, smollm2_digits, TEXTS + random_texts(300))
    digitless = [text for text in TEXTS if not any(c.isnumeric() for c in text)]
    assert len(digitless) > 10
    assert_same(smollm2, smollm2_hf.tokenizer, digitless)
    assert smollm2.vocab_size == len(smollm2_hf.tokenizer) == 49152
    assert smollm2.bos_token_id == smollm2_hf.tokenizer.bos_token_id
    assert smollm2.eos_token_ids == [smollm2_hf.tokenizer.eos_token_id]
    assert smollm2.special_token_ids == set(smollm2_hf.tokenizer.all_special_ids) | set(range(17))


def test_real_model_equals_transformers_on_any_text(smollm2, smollm2_digits):
    @settings(max_examples=300, deadline=None)
    @given(st.text(max_size=200))
    def check(text: str) -> None:
        assert_same(smollm2, smollm2_digits, [text])

    check()


def test_any_ids_decode_as_in_transformers(smollm2, smollm2_hf):
    rng = random.Random(1)
    for _ in range(200):
        ids = [rng.randrange(49152) for _ in range(rng.randrange(30))]
        for skip in (True, False):
            expected = smollm2_hf.tokenizer.decode(ids, skip_special_tokens=skip)
            assert smollm2.decode(ids, skip_special_tokens=skip) == expected


PRE_TYPES = {"gpt-2": "llama", "llama-bpe": "llama", "tekken": "llama", "qwen2": "qwen2"}


@pytest.mark.parametrize("pre", PRE_TYPES)
@pytest.mark.parametrize("add_bos", [False, True])
def test_byte_level_gguf_equals_transformers(transformers, tmp_path, pre, add_bos):
    metadata = byte_level_vocabulary(CORPUS, 2000) | {
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.add_bos_token": add_bos,
    }
    architecture = PRE_TYPES[pre]
    path = tmp_path / "tiny.gguf"
    write_gguf(path, architecture, {}, model_metadata(architecture) | metadata)
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path), gguf_file=path.name)
    if pre == "qwen2":  # of the model's own tokenizer, and lost on the way through a GGUF file
        theirs.backend_tokenizer.normalizer = tokenizers.normalizers.NFC()
    ours = Tokenizer.from_gguf_metadata(GgufFile(path).metadata, "tiny.gguf")
    assert_same(ours, theirs, TEXTS + CORPUS + random_texts(100))
    assert ours.bos_token_id == theirs.bos_token_id
    assert (ours.encode("x")[0] == ours.bos_token_id) == add_bos


@pytest.mark.parametrize("add_bos", [None, False])
def test_sentencepiece_gguf_equals_transformers(transformers, tmp_path, add_bos):
    metadata = sentencepiece_vocabulary(CORPUS, 2000)
    if add_bos is not None:
        metadata["tokenizer.ggml.add_bos_token"] = add_bos
    path = tmp_path / "tiny.gguf"
    write_gguf(path, "llama", {}, model_metadata("llama") | metadata)
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path), gguf_file=path.name)
    ours = Tokenizer.from_gguf_metadata(GgufFile(path).metadata, "tiny.gguf")
    assert_same(ours, theirs, TEXTS + CORPUS + random_texts(100))
    assert (ours.encode("x")[0] == 1) == (add_bos is None)
    assert ours.decode(ours.encode("one  two 🤗\n")) == "one  two 🤗\n"


def test_gguf_without_a_space_before(tmp_path):
    metadata = sentencepiece_vocabulary(CORPUS, 2000) | {"tokenizer.ggml.add_space_prefix": False}
    write_gguf(tmp_path / "a.gguf", "llama", {}, metadata)
    ours = Tokenizer.from_gguf_metadata(GgufFile(tmp_path / "a.gguf").metadata, "a.gguf")
    assert ours.decode(ours.encode(" Hello")) == " Hello"
    assert ours.decode(ours.encode("Hello")) == "Hello"
    assert ours.encode("Hello")[1:] != ours.encode(" Hello")[1:]


def test_words_of_llama3_are_taken_whole_from_the_vocabulary():
    # "cab" is a token but no merges lead to it.
    metadata = byte_level_vocabulary(["ab"], size=0) | {"tokenizer.ggml.merges": []}
    tokens = [*metadata["tokenizer.ggml.tokens"], "cab"]
    metadata |= {"tokenizer.ggml.tokens": tokens}
    del metadata["tokenizer.ggml.token_type"]
    whole = Tokenizer.from_gguf_metadata(metadata | {"tokenizer.ggml.pre": "llama-bpe"}, "x")
    merged = Tokenizer.from_gguf_metadata(metadata | {"tokenizer.ggml.pre": "gpt-2"}, "x")
    assert whole.encode("cab") == [len(tokens) - 1]
    assert len(merged.encode("cab")) == 3


def test_gguf_end_tokens_and_user_defined_tokens():
    metadata = byte_level_vocabulary(["ab"], size=0)
    tokens = [*metadata["tokenizer.ggml.tokens"], "<|eot|>", "<think>"]
    types = [*metadata["tokenizer.ggml.token_type"], 3, 4]
    metadata |= {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": as_array(types),
        "tokenizer.ggml.eot_token_id": len(tokens) - 2,
        "tokenizer.ggml.add_eos_token": True,
    }
    tokenizer = Tokenizer.from_gguf_metadata(metadata, "x")
    eos = metadata["tokenizer.ggml.eos_token_id"]
    assert tokenizer.eos_token_ids == [eos, len(tokens) - 2]
    ids = tokenizer.encode("<think>a<|eot|>")
    assert (ids[0], ids[-2], ids[-1]) == (len(tokens) - 1, len(tokens) - 2, eos)
    assert tokenizer.decode(ids) == "<think>a"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<think>a<|eot|><|end|>"


def as_array(values: list[int]) -> Any:
    import numpy as np

    return np.array(values, np.int32)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": "bert"}, "'tokenizer.ggml.model' is 'bert'"),
        ({"model": 3}, "'tokenizer.ggml.model' is a int, not a str"),
        ({"pre": "new-type"}, "'tokenizer.ggml.pre' is 'new-type', which is not known"),
        ({"tokens": None}, "'tokenizer.ggml.tokens' is missing"),
        ({"merges": None}, "'tokenizer.ggml.merges' is missing"),
        ({"merges": ["a b c"]}, "'tokenizer.ggml.merges' holds a line"),
        ({"merges": ["ab"]}, "'tokenizer.ggml.merges' holds a line"),
        ({"merges": ["zzz yyy"]}, "'tokenizer.ggml.merges' does not fit the tokens"),
        ({"bos_token_id": 10**6}, "'tokenizer.ggml.bos_token_id' is 1000000"),
        ({"token_type": as_array([1])}, "'tokenizer.ggml.token_type' has 1 items"),
        ({"model": "llama"}, "'tokenizer.ggml.scores' is missing"),
    ],
)
def test_gguf_metadata_that_makes_no_sense(changes, words):
    metadata = byte_level_vocabulary(["ab"], size=0)
    del metadata["tokenizer.ggml.token_type"]
    for key, value in changes.items():
        metadata[f"tokenizer.ggml.{key}"] = value
    with pytest.raises(CheckpointError) as error:
        Tokenizer.from_gguf_metadata(metadata, "file.gguf")
    assert "file.gguf: " in str(error.value) and words in str(error.value)
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------- from a directory


@pytest.fixture
def saved(smollm2_digits, tmp_path) -> Path:
    """The real model's tokenizer as transformers saves it."""
    smollm2_digits.save_pretrained(tmp_path)
    return tmp_path


def test_directory_equals_transformers(transformers, saved):
    ours = Tokenizer.from_directory(saved)
    theirs = transformers.AutoTokenizer.from_pretrained(str(saved))
    assert_same(ours, theirs, TEXTS + CORPUS + random_texts(100))
    assert (ours.bos_token_id, ours.eos_token_ids) == (1, [2])
    assert ours.chat_template == theirs.chat_template
    assert ours.special_tokens["eos_token"] == "<|im_end|>"


def test_directory_of_a_sentencepiece_tokenizer_equals_transformers(transformers, tmp_path):
    metadata = sentencepiece_vocabulary(CORPUS, 2000)
    (tmp_path / "gguf").mkdir()
    write_gguf(tmp_path / "gguf" / "a.gguf", "llama", {}, model_metadata("llama") | metadata)
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path / "gguf"), gguf_file="a.gguf")
    theirs.save_pretrained(tmp_path)
    ours = Tokenizer.from_directory(tmp_path)
    assert_same(ours, transformers.AutoTokenizer.from_pretrained(str(tmp_path)), TEXTS + CORPUS)
    assert ours.encode("x")[0] == 1


def edit_json(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text()) if path.is_file() else {}
    content.update(changes)
    path.write_text(json.dumps({key: v for key, v in content.items() if v is not None}))


def test_end_tokens_come_from_all_files(saved):
    assert Tokenizer.from_directory(saved).eos_token_ids == [2]
    edit_json(saved / "config.json", eos_token_id=5)
    assert Tokenizer.from_directory(saved).eos_token_ids == [2, 5]
    edit_json(saved / "generation_config.json", eos_token_id=[0, 7])
    assert Tokenizer.from_directory(saved).eos_token_ids == [0, 2, 7]
    edit_json(saved / "generation_config.json", eos_token_id="many")
    with pytest.raises(CheckpointError, match=r"generation_config\.json: eos_token_id is 'many'"):
        Tokenizer.from_directory(saved)


def test_older_layouts_of_the_json_files(saved):
    """Special tokens as dicts, in a file of their own; tokens missing from tokenizer.json."""
    named = {"content": "<|im_end|>", "lstrip": False}
    edit_json(saved / "special_tokens_map.json", eos_token=named)
    edit_json(
        saved / "tokenizer_config.json",
        eos_token=None,
        added_tokens_decoder={"49152": {"content": "<|new|>", "special": True}},
    )
    tokenizer = Tokenizer.from_directory(saved)
    assert tokenizer.eos_token_ids == [2]
    assert tokenizer.encode("<|new|>") == [49152]
    assert tokenizer.vocab_size == 49153
    assert tokenizer.decode([49152]) == ""


def test_padding_and_truncation_of_the_file_are_ignored(saved):
    backend = tokenizers.Tokenizer.from_file(str(saved / "tokenizer.json"))
    backend.enable_truncation(3)
    backend.enable_padding(length=50)
    backend.save(str(saved / "tokenizer.json"))
    assert len(Tokenizer.from_directory(saved).encode("one two three four five six")) == 6


def test_broken_directory(saved):
    (saved / "tokenizer_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json: not valid JSON"):
        Tokenizer.from_directory(saved)
    (saved / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: not a tokenizer"):
        Tokenizer.from_directory(saved)
    (saved / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        Tokenizer.from_directory(saved)


# ---------------------------------------------------------------- use


def test_bad_text_and_ids(smollm2):
    with pytest.raises(InvalidArgument, match="not a string of valid Unicode"):
        smollm2.encode("half a pair: \ud83e")
    with pytest.raises(InvalidArgument, match="token ids"):
        smollm2.decode([-1])
    assert smollm2.decode([10**6]) == ""
    assert smollm2.decode([]) == ""
    assert smollm2.id_to_token(2) == "<|im_end|>"
    assert smollm2.token_to_id("<|im_end|>") == 2
    assert smollm2.id_to_token(10**6) is None


def test_encode_batch(smollm2):
    assert smollm2.encode_batch(TEXTS) == [smollm2.encode(text) for text in TEXTS]
    assert smollm2.encode_batch([]) == []


def test_encode_from_many_threads(smollm2):
    expected = [smollm2.encode(text) for text in TEXTS]
    wrong: list[str] = []

    def work(seed: int) -> None:
        order = list(range(len(TEXTS)))
        random.Random(seed).shuffle(order)
        for index in order * 5:
            ids = smollm2.encode(TEXTS[index])
            if ids != expected[index] or smollm2.decode(ids, False) != smollm2.decode(ids, False):
                wrong.append(TEXTS[index])
            smollm2.apply_chat_template(CONVERSATIONS[index % 3])

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


# ---------------------------------------------------------------- chat templates


def with_template(smollm2: Tokenizer, *templates: str) -> Tokenizer:
    names = ("default", "tool_use")
    return Tokenizer(
        smollm2._backend,
        special_tokens={"bos_token": "<s>", "eos_token": "</s>"},
        chat_templates=dict(zip(names, templates, strict=False)),
    )


TEMPLATES = {
    "special tokens": "{{ bos_token }}{% for m in messages %}{{ m.role }}{{ eos_token }}"
    "{% endfor %}",
    "blocks": "{% for m in messages %}\n  {% if m.role == 'user' %}\n{{ m.content | trim }}\n"
    "  {% endif %}\n{% endfor %}\n{{ messages | length }}",
    "json": "{{ messages | tojson }}{{ messages | tojson(indent=2, sort_keys=true) }}",
    "loop controls": "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}"
    "{{ m.content }}{% endfor %}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}"
    "{% endfor %}{% if add_generation_prompt %}>{% endif %}",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
    "{% endfor %}{{ ns.n }} {{ dict(a=1).items() | list }} {{ tools is none }}",
    "variables": "{% if enable_thinking is defined and not enable_thinking %}no{% endif %}"
    "{{ undefined_one }}{{ messages[0]['content'][:2] }} {{ '<&>' }}",
    "date": "{{ strftime_now('%Y') | length }}",
}


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("prompt", [True, False])
def test_templates_render_as_in_transformers(smollm2, smollm2_hf, name, prompt):
    ours = with_template(smollm2, TEMPLATES[name])
    theirs = copy.copy(smollm2_hf.tokenizer)
    for conversation in CONVERSATIONS:
        expected = theirs.apply_chat_template(
            conversation,
            chat_template=TEMPLATES[name].replace("bos_token", "b").replace("eos_token", "e"),
            add_generation_prompt=prompt,
            tokenize=False,
            enable_thinking=False,
            b="<s>",
            e="</s>",
        )
        shown = ours.apply_chat_template(
            conversation, add_generation_prompt=prompt, enable_thinking=False
        )
        assert shown == expected


@pytest.mark.parametrize("prompt", [True, False])
def test_chat_of_the_real_model_equals_transformers(smollm2, smollm2_hf, prompt):
    for conversation in CONVERSATIONS:
        expected = smollm2_hf.tokenizer.apply_chat_template(
            conversation, tokenize=False, add_generation_prompt=prompt
        )
        shown = smollm2.apply_chat_template(conversation, add_generation_prompt=prompt)
        assert shown == expected
        assert smollm2.encode(shown, add_special_tokens=False)[0] == 1


def test_content_in_parts(smollm2):
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    assert smollm2.apply_chat_template([{"role": "user", "content": parts}]) == (
        smollm2.apply_chat_template([{"role": "user", "content": "one\ntwo"}])
    )


def test_a_message_goes_on_where_it_stands_last(smollm2):
    tokenizer = with_template(
        smollm2, "{{ messages[-1].content }}: {% for m in messages %}{{ m.content }}|{% endfor %}"
    )
    chat = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y "}]
    assert chat_text(chat, tokenizer, continue_final_message=True).endswith("x|y ")


def test_tools_choose_their_template(smollm2):
    tokenizer = with_template(smollm2, "plain", "{{ tools | tojson }}")
    chat = [{"role": "user", "content": "x"}]
    assert tokenizer.apply_chat_template(chat) == "plain"
    assert tokenizer.apply_chat_template(chat, tools=[]) == "plain"
    assert tokenizer.apply_chat_template(chat, tools=[{"a": 1}]) == '[{"a": 1}]'


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        (["hello"], "message 0: a dict with a 'role'"),
        ([{"content": "x"}], "message 0: a dict with a 'role'"),
        ([{"role": "user", "content": 3}], "message 0: 'content' must be a string"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "'image_url'; only text"),
        ([{"role": "user", "content": [{"type": "text"}]}], "only text"),
        ([{"role": "user", "content": "x", "extra": object()}], "a object cannot be part"),
        ([{"role": "user"}], "rejects the messages"),
        ([{"role": "user", "content": None}], "rejects the messages"),
    ],
)
def test_messages_that_make_no_sense(smollm2, messages, words):
    with pytest.raises(InvalidArgument) as error:
        smollm2.apply_chat_template(messages)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (None, "no chat template"),
        ("{{ raise_exception('roles must\n alternate') }}", "rejects the messages: roles must alt"),
        ("{% for %}", "chat template is broken"),
        ("{{ ''.__class__.__mro__ }}", "rejects the messages"),
        ("{{ messages.append(1) }}", "rejects the messages"),
        ("{{ 1 / 0 }}", "rejects the messages"),
        ("{% for i in range(10**9) %}x{% endfor %}", "rejects the messages"),
        (
            "{% for i in range(99999) %}{% for j in range(999) %}" + "x" * 9999 + "{% endfor %}"
            "{% endfor %}",
            "takes over 33554432 characters",
        ),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "rejects the messages"),
    ],
)
def test_templates_that_fail(smollm2, template, words):
    tokenizer = with_template(smollm2, *([template] if template else []))
    with pytest.raises(InvalidArgument) as error:
        tokenizer.apply_chat_template([{"role": "user", "content": "x"}])
    assert words in str(error.value)
    assert "\n" not in str(error.value)


NESTED = "{% set x = [1] %}{% set y = [1] %}" + "{% set x = [x, x] %}{% set y = [y, y] %}" * 50
BOMBS = {
    "loop": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "loop over a string": "{% for c in 'ab' * 9999999 %}{% endfor %}",
    "recursive loop": "{% for i in [[]] recursive %}{{ loop([[]]) ~ loop([[]]) }}{% endfor %}",
    "macro": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}"
    "{{ f(60) }}",
    "call block": "{% macro m() %}{% for i in range(99999) %}{{ caller() }}{% endfor %}"
    "{% endmacro %}{% call m() %}" + "x" * 999 + "{% endcall %}",
    "times": "{{ 'x' * 10**10 }}",
    "times, a list": "{{ ([0] * 10**10) | length }}",
    "times, the other way": "{{ 10**10 * 'x' }}",
    "power": "{{ 10**(10**10) }}",
    "product": "{% set ns = namespace(n=3) %}{% for i in range(99) %}{% set ns.n = ns.n * ns.n %}"
    "{% endfor %}",
    "tilde": "{% set ns = namespace(s='x') %}{% for i in range(99) %}{% set ns.s = ns.s ~ ns.s %}"
    "{% endfor %}",
    "plus": "{% set ns = namespace(s='x') %}{% for i in range(99) %}{% set ns.s = ns.s + ns.s %}"
    "{% endfor %}",
    "lists": "{% set ns = namespace(s=[0]) %}{% for i in range(99) %}{% set ns.s = ns.s + ns.s %}"
    "{% endfor %}",
    "nested lists": "{% set ns = namespace(s=[]) %}{% for i in range(99) %}"
    "{% set ns.s = [ns.s, ns.s] %}{% endfor %}{{ ns.s }}",
    "nested lists to JSON": "{% set ns = namespace(s=[]) %}{% for i in range(99) %}"
    "{% set ns.s = [ns.s, ns.s] %}{% endfor %}{{ ns.s | tojson }}",
    "nested lists in a namespace": "{% set ns = namespace(s=[]) %}{% for i in range(99) %}"
    "{% set ns.s = [ns.s, ns.s] %}{% endfor %}{{ ns }}",
    "nested lists in a view": NESTED + "{{ {'x': x}.values() }}",
    "nested lists compared": NESTED + "{{ x == y }}",
    "nested lists sought": NESTED + "{{ x in [y] }}",
    "nested lists tested": NESTED + "{{ x is eq(y) }}",
    "nested lists selected": NESTED + "{{ [x] | select('eq', y) | list | length }}",
    "nested lists sorted": NESTED + "{{ [x, y] | sort | length }}",
    "nested lists counted": NESTED + "{{ [x].count(y) }}",
    "nested lists changing": NESTED + "{% for z in [x, y] %}{{ loop.changed(z) }}{% endfor %}",
    "nested tuples as a key": "{% set x = (1, 1) %}" + "{% set x = (x, x) %}" * 50 + "{{ {x: 1} }}",
    "sum of lists": "{% set x = range(99999) | map('string') | map('list') | list %}"
    "{{ x | sum(start=[]) | length }}",
    "set blocks": "{% set a = 'x' %}" + "{% set a %}{{ a }}{{ a }}{% endset %}" * 60,
    "slices": "{% set s = 'x' * 999999 %}{% set ns = namespace(l=[]) %}{% for i in range(99999) %}"
    "{% set ns.l = ns.l + [s[1:]] %}{% endfor %}",
    "replace": "{% set s = 'x' * 99999 %}{{ s.replace('', s) }}",
    "filter replace": "{% set s = 'x' * 99999 %}{{ s | replace('', s) }}",
    "replace, named": "{% set s = 'x' * 99999 %}{{ s | replace(new=s, old='') }}",
    "join": "{% set s = 'x' * 99999 %}{{ s.join(s) }}",
    "filter join": "{% set s = 'x' * 99999 %}{{ range(99999) | join(s) }}",
    "filter join of a generator": "{% set s = 'x' * 99999 %}"
    "{{ range(99999) | map('string') | join(s) }}",
    "ljust": "{{ 'x'.ljust(10**10) }}",
    "center": "{{ 'x' | center(10**10) }}",
    "indent": "{{ 'x\n' | indent(10**10, true) }}",
    "json indent": "{{ [[[]]] | tojson(indent=10**10) }}",
    "expandtabs": "{{ ('\t' * 999999).expandtabs(999) }}",
    "round": "{{ 1.5 | round(10**10, 'ceil') }}",
    "%": "{{ '%10000000000d' % 1 }}",
    "% *": "{{ '%*d' % (10**10, 1) }}",
    "filter format": "{{ '%10000000000d' | format(1) }}",
    "format": "{{ '{:>10000000000}'.format(1) }}",
    "format, nested": "{{ '{:>{}}'.format(1, 10**10) }}",
    "format_map": "{{ '{a:>10000000000}'.format_map({'a': 1}) }}",
    "format, repeated": "{{ ('{0}' * 99999).format('x' * 99999) }}",
    "lipsum": "{{ lipsum(10**9) }}",
    "bytes": "{{ 'x'.encode() * 10**10 }}",
    "int": "{{ (1).to_bytes(10**10, 'big') }}",
    "date": "{{ strftime_now('%10000000000d') }}",
    "split": "{{ ('Āā ' * 4999999).split() | length }}",
    "characters": "{{ ('Ā' * 4999999) | list | length }}",
    "source": "x" * (1 << 20) + "x",
}


@pytest.fixture
def little_memory() -> Iterator[None]:
    """What would take more than 300 MB fails with a MemoryError."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    limit = pages * resource.getpagesize() + (300 << 20)
    resource.setrlimit(resource.RLIMIT_AS, (limit, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.parametrize("name", BOMBS)
def test_templates_cannot_take_time_or_memory(smollm2, little_memory, monkeypatch, name):
    """One that does would run into pytest's time limit. (On a machine of any speed: what no time
    bounds, the allowance of characters does.)"""
    tokenizer = with_template(smollm2, BOMBS[name])
    with monkeypatch.context() as patch, pytest.raises(InvalidArgument) as error:
        patch.setattr(bounded_jinja, "_MAX_SECONDS", 0.2)
        tokenizer.apply_chat_template([{"role": "user", "content": "x"}])
    assert "MemoryError" not in str(error.value)
    assert "\n" not in str(error.value)
    chat = [{"role": "user", "content": "y"}]
    assert with_template(smollm2, "{{ messages[0].content }}").apply_chat_template(chat) == "y"


def test_long_conversations_render(smollm2, monkeypatch):
    monkeypatch.setattr(bounded_jinja, "_MAX_SECONDS", math.inf)  # however slow the machine is
    turn = {"role": "user", "content": "word " * 200}
    chat = [turn, {**turn, "role": "assistant"}] * 1000  # 2 million characters
    assert len(smollm2.apply_chat_template(chat)) > 2_000_000
    quadratic = (
        "{% for m in messages %}{% for n in messages[:loop.index] %}{% endfor %}{% endfor %}ok"
    )
    assert with_template(smollm2, quadratic).apply_chat_template(chat[:500]) == "ok"


def test_templates_of_a_directory(saved):
    (saved / "chat_template.jinja").unlink(missing_ok=True)
    listed = [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}]
    edit_json(saved / "tokenizer_config.json", chat_template=listed)
    chat = [{"role": "user", "content": "x"}]
    tokenizer = Tokenizer.from_directory(saved)
    assert tokenizer.apply_chat_template(chat) == "D"
    assert tokenizer.apply_chat_template(chat, tools=[{}]) == "T"
    (saved / "chat_template.jinja").write_text("F")
    assert Tokenizer.from_directory(saved).apply_chat_template(chat) == "F"
