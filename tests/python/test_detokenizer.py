"""Streamed text: the pieces make up the whole, and stop strings are found however it is cut."""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from typing import Any

import pytest
from checkpoint_files import sentencepiece_vocabulary
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fastpage.checkpoints import open_checkpoint
from fastpage.errors import InvalidArgument
from fastpage.tokenizer import IncrementalDetokenizer, StopStringMatcher, Tokenizer

TEXT = (
    " Hello, wörld!  日本語 🤗👩\u200d👩\u200d👧 naïve\n\n\tdef f():\n        return 1\n"
    "<|im_end|> \ufffd tail \ufffd\ufffd"
)


@pytest.fixture(scope="module")
def smollm2(smollm2_gguf) -> Tokenizer:
    return open_checkpoint(smollm2_gguf).tokenizer()


@pytest.fixture(scope="module")
def sentencepiece() -> Tokenizer:
    import numpy as np

    metadata = sentencepiece_vocabulary(["the quick brown fox jumps over the lazy dog"] * 3)
    metadata["tokenizer.ggml.scores"] = np.array(metadata["tokenizer.ggml.scores"], np.float32)
    metadata["tokenizer.ggml.token_type"] = np.array(metadata["tokenizer.ggml.token_type"])
    return Tokenizer.from_gguf_metadata(metadata, "test")


def stream(
    tokenizer: Tokenizer,
    ids: Sequence[int],
    prompt: Sequence[int] = (),
    skip: bool = True,
    step: int = 1,
) -> list[str]:
    detokenizer = IncrementalDetokenizer(tokenizer, prompt, skip)
    pieces = [detokenizer.push(ids[begin : begin + step]) for begin in range(0, len(ids), step)]
    return [*pieces, detokenizer.flush()]


# ---------------------------------------------------------------- detokenizer


@pytest.mark.parametrize("step", [1, 2, 7, 1000])
@pytest.mark.parametrize("skip", [True, False])
def test_pieces_make_up_the_whole(smollm2, skip, step):
    ids = smollm2.encode(TEXT * 5)
    assert "".join(stream(smollm2, ids, skip=skip, step=step)) == smollm2.decode(ids, skip)


def test_no_piece_ends_within_a_character(smollm2):
    text = "日本語🤗🎉é" * 20
    ids = smollm2.encode(text)
    pieces = stream(smollm2, ids)
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert len(ids) > len(text), "the test needs characters of several tokens"


def test_text_comes_at_once_where_it_can(smollm2):
    ids = smollm2.encode("plain words come out token by token")
    detokenizer = IncrementalDetokenizer(smollm2)
    assert [detokenizer.push([token]) for token in ids] == [smollm2.decode([t]) for t in ids]
    assert detokenizer.flush() == ""


def test_any_ids_of_a_byte_level_vocabulary(smollm2):
    @settings(max_examples=300, deadline=None)
    @given(
        ids=st.lists(st.integers(0, 400) | st.integers(0, 49151), max_size=80),
        prompt=st.lists(st.integers(0, 300), max_size=10),
        skip=st.booleans(),
        step=st.integers(1, 5),
    )
    @example(ids=[0, 1, 2] * 30, prompt=[], skip=True, step=1)
    @example(ids=[0, 1, 2] * 30, prompt=[], skip=False, step=1)
    @example(ids=[220] * 80, prompt=[], skip=True, step=1)
    @example(ids=[180, 200] * 40, prompt=[181], skip=True, step=1)
    @example(ids=[459] * 80 + [250] * 3, prompt=[181], skip=True, step=1)
    def check(ids: list[int], prompt: list[int], skip: bool, step: int) -> None:
        before = smollm2.decode(prompt, skip)
        whole = smollm2.decode(prompt + ids, skip)
        # Bytes that the prompt leaves open belong to the text that follows.
        expected = whole[len(before.rstrip("\ufffd")) :]
        assert "".join(stream(smollm2, ids, prompt, skip, step)) == expected

    check()


def test_bytes_that_never_become_a_character_do_not_pile_up(smollm2):
    continuation = smollm2.encode("é")
    stray = next(
        token
        for token in range(300)
        if smollm2.decode([token]) == "\ufffd" and smollm2.decode([*continuation, token])
    )
    detokenizer = IncrementalDetokenizer(smollm2)
    pieces = [detokenizer.push([stray]) for _ in range(5000)]
    assert len(detokenizer._window) < 100
    assert "".join(pieces) + detokenizer.flush() == smollm2.decode([stray] * 5000)
    assert len("".join(pieces)) > 4900


def test_characters_that_are_begun_and_never_ended_do_not_pile_up(smollm2):
    begun = next(token for token in range(1000) if smollm2.decode([token]) == " \ufffd")
    detokenizer = IncrementalDetokenizer(smollm2)
    pieces = [detokenizer.push([begun]) for _ in range(1000)]
    assert len(detokenizer._window) < 100
    assert "".join(pieces) + detokenizer.flush() == smollm2.decode([begun] * 1000)


def test_skipped_tokens_leave_no_trace(sentencepiece):
    words = sentencepiece.encode("the fox", add_special_tokens=False)
    fox = words[len(sentencepiece.encode("the", add_special_tokens=False)) :]
    ids = [1] * 40 + words + [2] * 40 + fox
    pieces = stream(sentencepiece, ids)
    assert "".join(pieces) == sentencepiece.decode(ids) == "the fox fox"


def test_ids_without_a_token_leave_no_trace(sentencepiece):
    words = sentencepiece.encode("the fox", add_special_tokens=False)
    fox = words[len(sentencepiece.encode("the", add_special_tokens=False)) :]
    absent = [sentencepiece.vocab_size + 7] * 40
    ids = words + absent + fox + absent
    assert "".join(stream(sentencepiece, ids)) == sentencepiece.decode(ids) == "the fox fox"


def test_skipped_tokens_do_not_pile_up(smollm2):
    detokenizer = IncrementalDetokenizer(smollm2)
    assert {detokenizer.push([2]) for _ in range(1000)} == {""}
    assert len(detokenizer._window) < 100


@pytest.mark.parametrize("skip", [True, False])
def test_ids_without_a_token_do_not_pile_up_nor_end_a_character(smollm2, skip):
    absent = smollm2.vocab_size + 7
    begun = next(token for token in range(1000) if smollm2.decode([token]) == "\ufffd")
    for before in ([], [begun]):
        detokenizer = IncrementalDetokenizer(smollm2, before, skip)
        assert {detokenizer.push([absent]) for _ in range(1000)} == {""}
        assert len(detokenizer._window) < 100
        assert detokenizer.flush() == "\ufffd" * len(before)


@pytest.mark.parametrize("step", [1, 3])
def test_sentencepiece_with_and_without_a_prompt(sentencepiece, step):
    text = "the quick  brown 🤗日本 fox\n\njumps"
    ids = sentencepiece.encode(text, add_special_tokens=False)
    assert "".join(stream(sentencepiece, ids, step=step)) == text
    # After a prompt the first word keeps its space.
    prompt = sentencepiece.encode("the lazy dog")
    assert "".join(stream(sentencepiece, ids, prompt, step=step)) == " " + text


def test_any_valid_text_of_a_sentencepiece_vocabulary(sentencepiece):
    @settings(max_examples=300, deadline=None)
    @given(text=st.text(max_size=80), prompt=st.text(max_size=20), step=st.integers(1, 5))
    def check(text: str, prompt: str, step: int) -> None:
        before = sentencepiece.encode(prompt)
        ids = sentencepiece.encode(text, add_special_tokens=False)
        whole = sentencepiece.decode(before + ids)
        expected = whole[len(sentencepiece.decode(before)) :]
        if "\ufffd" not in whole:
            assert "".join(stream(sentencepiece, ids, before, step=step)) == expected

    check()


# ---------------------------------------------------------------- stop strings


def run_matcher(
    stop: Sequence[str], pieces: Sequence[str], include: bool = False
) -> tuple[str, str | None]:
    matcher = StopStringMatcher(stop, include)
    shown = ""
    for piece in pieces:
        text, found = matcher.push(piece)
        shown += text
        if found is not None:
            assert matcher.flush() == ""
            return shown, found
    return shown + matcher.flush(), None


def first_complete(stop: Sequence[str], text: str, include: bool) -> tuple[str, str | None]:
    """The same by trying every end."""
    for end in range(1, len(text) + 1):
        found = [s for s in stop if text[:end].endswith(s)]
        if found:
            longest = max(found, key=len)
            return text[: end if include else end - len(longest)], longest
    return text, None


@pytest.mark.parametrize(
    ("stop", "text", "shown", "found"),
    [
        ([], "abc", "abc", None),
        (["x"], "abc", "abc", None),
        (["c"], "abcabc", "ab", "c"),
        (["abd", "b"], "abc", "a", "b"),
        (["bc", "abc"], "xabc", "x", "abc"),
        (["aab"], "aaab", "a", "aab"),
        (["abab"], "abacababab", "abac", "abab"),
        (["\n\nUser:"], "Hi\n\n\nUser: x", "Hi\n", "\n\nUser:"),
        (["never"], "neve", "neve", None),
        (["ende"], "das Ende, am ende", "das Ende, am ", "ende"),
        (["🤗!"], "a🤗🤗!b", "a🤗", "🤗!"),
    ],
)
def test_stop_strings(stop, text, shown, found):
    assert run_matcher(stop, [text]) == (shown, found)
    assert run_matcher(stop, list(text)) == (shown, found)
    with_stop = shown + (found or "")
    assert run_matcher(stop, list(text), include=True) == (with_stop, found)


@settings(max_examples=500, deadline=None)
@given(
    stop=st.lists(st.text("ab", min_size=1, max_size=5), max_size=4),
    pieces=st.lists(st.text("abc", max_size=6), max_size=10),
    include=st.booleans(),
)
def test_stop_strings_however_the_text_is_cut(stop, pieces, include):
    assert run_matcher(stop, pieces, include) == first_complete(stop, "".join(pieces), include)


def test_no_more_is_held_back_than_may_begin_a_stop_string():
    matcher = StopStringMatcher(["abcd", "xy"])
    assert matcher.push("hello ab") == ("hello ", None)
    assert matcher.push("c") == ("", None)
    assert matcher.push("x") == ("abc", None)
    assert matcher.push("z") == ("xz", None)
    assert matcher.push("abc") == ("", None)
    assert matcher.flush() == "abc"


def test_long_stop_strings_take_linear_time():
    rng = random.Random(0)
    stop = "a" * 100_000 + "b"
    matcher = StopStringMatcher([stop])
    text = "".join(rng.choices("aaaaaaaaab", k=200_000))
    shown, found = matcher.push(text)
    assert found is None
    assert shown + matcher.flush() == text


def test_many_stop_strings_are_no_more_work_than_one():
    def num_lines(stop: Sequence[str]) -> int:
        matcher = StopStringMatcher(stop)
        lines = 0

        def trace(frame: Any, event: str, argument: Any) -> Any:
            nonlocal lines
            lines += event == "line"
            return trace

        sys.settrace(trace)
        try:
            matcher.push("a" * 64)
        finally:
            sys.settrace(None)
        return lines

    many = [f"{'a' * 100}{i}" for i in range(30)]
    assert num_lines(many) < 2 * num_lines(many[:1])
    assert num_lines([str(i) for i in range(1000)]) < 20


def test_empty_stop_strings_are_refused():
    with pytest.raises(InvalidArgument, match="must not be empty"):
        StopStringMatcher(["a", ""])
