"""LLM with the real model: how prompts and parameters may be written, and what comes back."""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from waiting import PATIENCE

from fastpage import _C, LLM, RequestOutput, SamplingParams
from fastpage.engine.engine_thread import EngineThread
from fastpage.errors import InvalidArgument

GREEDY = SamplingParams(temperature=0, max_tokens=6)
PARIS = "The capital of France is"


@pytest.fixture(scope="module")
def llm(smollm2_gguf: Path) -> LLM:
    return LLM(str(smollm2_gguf), dtype="bfloat16", max_model_len=256, num_kv_blocks=128)


@pytest.fixture(autouse=True)
def nothing_is_left(llm: LLM):
    yield
    scheduler = llm.stats().scheduler
    assert scheduler.num_running == scheduler.num_waiting == 0
    assert scheduler.num_free_blocks == scheduler.num_blocks
    llm._core.check_integrity()


def texts(outputs: list[RequestOutput]) -> list[str]:
    return [output.outputs[0].text for output in outputs]


def test_ways_to_write_prompts(llm: LLM) -> None:
    ids = llm.get_tokenizer().encode(PARIS)
    one = llm.generate(PARIS, GREEDY, use_tqdm=False)
    assert len(one) == 1
    assert one[0].prompt == PARIS
    assert one[0].prompt_token_ids == ids
    assert one[0].finished
    (expected,) = texts(one)
    assert expected.startswith(" Paris")
    for prompts in (
        [PARIS],
        {"prompt": PARIS},
        [{"prompt": PARIS}],
        ids,
        [ids],
        {"prompt_token_ids": ids},
        [{"prompt_token_ids": ids}],
        (PARIS,),
    ):
        assert texts(llm.generate(prompts, GREEDY, use_tqdm=False)) == [expected]
    assert llm.generate([], GREEDY, use_tqdm=False) == []


def test_outputs_come_in_the_order_of_the_prompts(llm: LLM) -> None:
    prompts = ["1, 2, 3,", PARIS, "Once upon a"]
    params = [SamplingParams(temperature=0, max_tokens=n) for n in (9, 2, 5)]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    assert [output.prompt for output in outputs] == prompts
    assert [len(output.outputs[0].token_ids) for output in outputs] == [9, 2, 5]
    assert len({output.request_id for output in outputs}) == 3


def test_samples_stop_strings_and_logprobs(llm: LLM) -> None:
    params = SamplingParams(
        n=3, temperature=1.0, seed=1, max_tokens=12, logprobs=2, stop=[" the", "\n"]
    )
    (output,) = llm.generate("My favourite animal is", params, use_tqdm=False)
    assert [sample.index for sample in output.outputs] == [0, 1, 2]
    assert len({tuple(sample.token_ids) for sample in output.outputs}) == 3
    for sample in output.outputs:
        assert " the" not in sample.text and "\n" not in sample.text
        assert len(sample.logprobs) == len(sample.token_ids)
        chosen = [
            position[token_id].logprob
            for position, token_id in zip(sample.logprobs, sample.token_ids, strict=True)
        ]
        assert sample.cumulative_logprob == pytest.approx(sum(chosen))
        assert sample.finish_reason in ("stop", "length")
        if sample.finish_reason == "stop" and isinstance(sample.stop_reason, str):
            assert sample.stop_reason in (" the", "\n")


def test_samples_of_one_prompt_compute_it_once(llm: LLM) -> None:
    llm.reset_prefix_cache()
    before = llm.stats()
    params = SamplingParams(n=4, temperature=1.0, seed=3, max_tokens=9, ignore_eos=True)
    (output,) = llm.generate("Three short words that rhyme with cat:", params, use_tqdm=False)
    after = llm.stats()
    num_prompt_tokens = len(output.prompt_token_ids)
    assert num_prompt_tokens % 16 != 0  # the last block is shared and copied, too
    computed = after.num_computed_tokens - before.num_computed_tokens
    assert computed == num_prompt_tokens + 4 * 8
    assert after.scheduler.num_blocks_copied - before.scheduler.num_blocks_copied == 3
    assert output.num_cached_tokens == 0
    assert output.num_output_tokens == 36
    # The n samples are those of n requests with the same seeds.
    for sample in output.outputs:
        alone = SamplingParams(
            temperature=1.0, seed=_C.sample_seed(3, sample.index), max_tokens=9, ignore_eos=True
        )
        (one,) = llm.generate(output.prompt, alone, use_tqdm=False)
        assert one.outputs[0].token_ids == sample.token_ids


def test_best_of(llm: LLM) -> None:
    options = {"temperature": 1.0, "seed": 5, "max_tokens": 8, "logprobs": 0}
    (drawn,) = llm.generate(PARIS, SamplingParams(n=6, **options), use_tqdm=False)
    ranked = sorted(drawn.outputs, key=lambda sample: -sample.cumulative_logprob)
    for logprobs in (0, None):
        params = SamplingParams(n=2, best_of=6, **{**options, "logprobs": logprobs})
        (output,) = llm.generate(PARIS, params, use_tqdm=False)
        assert [best.index for best in output.outputs] == [0, 1]
        for best, expected in zip(output.outputs, ranked, strict=False):
            assert best.token_ids == expected.token_ids
            assert best.text == expected.text
            assert best.cumulative_logprob == pytest.approx(expected.cumulative_logprob)
            assert best.score is None
            assert (best.logprobs is None) == (logprobs is None)
    with pytest.raises(InvalidArgument, match="stop does not go with best_of"):
        SamplingParams(best_of=2, stop="a")


def test_chat(llm: LLM) -> None:
    capital = [{"role": "user", "content": "What is the capital of France?"}]
    greeting = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello!"}]
    params = SamplingParams(temperature=0, max_tokens=16)
    (one,) = llm.chat(capital, params, use_tqdm=False)
    assert "Paris" in one.outputs[0].text
    assert one.outputs[0].finish_reason == "stop"
    # The template's special tokens are tokens, and written once.
    assert one.prompt_token_ids[0] == llm.get_tokenizer().token_to_id("<|im_start|>")
    assert one.prompt.count("What is") == 1
    two = llm.chat([capital, greeting], params, use_tqdm=False)
    assert texts(two)[0] == one.outputs[0].text
    assert len(two) == 2


def test_the_prefix_cache_is_used_and_reported(llm: LLM) -> None:
    text = "A long beginning that many prompts share, word for word, and that is computed once. "
    llm.generate(text * 3, GREEDY, use_tqdm=False)
    (output,) = llm.generate(text * 3 + "More.", GREEDY, use_tqdm=False)
    assert output.num_cached_tokens >= 32
    assert output.num_cached_tokens % 16 == 0


def test_an_output_may_reach_the_models_length(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=10_000, ignore_eos=True)
    (output,) = llm.generate("word " * 240, params, use_tqdm=False)
    assert len(output.prompt_token_ids) + len(output.outputs[0].token_ids) == 256
    assert output.outputs[0].finish_reason == "length"

    params = SamplingParams(temperature=0, max_tokens=4, truncate_prompt_tokens=20)
    (output,) = llm.generate("word " * 1000, params, use_tqdm=False)
    assert len(output.prompt_token_ids) == 20


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ("", "empty"),
        ([], "empty"),
        ([10**6], "not a token id"),
        ({"text": "a"}, "unknown keys: text"),
        (None, "NoneType"),
        ("word " * 300, "max_model_len"),
    ],
)
def test_a_bad_prompt_stops_the_others_before_they_start(llm: LLM, bad: object, words: str) -> None:
    steps = llm.stats().num_steps
    with pytest.raises(InvalidArgument, match=words) as error:
        llm.generate([PARIS, PARIS, bad], GREEDY, use_tqdm=False)
    assert str(error.value).startswith("prompts[2]: ")
    assert llm.stats().num_steps == steps


def test_bad_lists_of_parameters(llm: LLM) -> None:
    with pytest.raises(InvalidArgument, match="2 entries for 1 prompts"):
        llm.generate(PARIS, [GREEDY, GREEDY], use_tqdm=False)
    with pytest.raises(InvalidArgument, match="sampling_params is not"):
        llm.generate(PARIS, {"temperature": 0}, use_tqdm=False)
    with pytest.raises(InvalidArgument, match="stop_token_ids"):
        llm.generate(PARIS, SamplingParams(stop_token_ids=[10**6]), use_tqdm=False)
    with pytest.raises(InvalidArgument, match="messages"):
        llm.chat([], GREEDY, use_tqdm=False)


def test_more_logprobs_than_max_logprobs(llm: LLM) -> None:
    for name in ("logprobs", "prompt_logprobs"):
        params = SamplingParams(max_tokens=1, **{name: 20})
        assert llm.generate(PARIS, params, use_tqdm=False)[0].finished
        with pytest.raises(InvalidArgument, match=rf"^{name} .* 20 \(max_logprobs\), got 21"):
            llm.generate(PARIS, SamplingParams(max_tokens=1, **{name: 21}), use_tqdm=False)


def test_ctrl_c_ends_the_requests_where_they_are(
    llm: LLM, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A shell's background job starts with SIGINT ignored.
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, previous))
    before = llm.stats().num_generated_tokens
    make_step, stop_thread = _C.Engine.step, EngineThread.stop
    num_steps, stopping = 0, threading.Event()

    def step(engine: _C.Engine) -> _C.StepOutput:
        nonlocal num_steps
        num_steps += 1
        if num_steps == 3:
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        elif num_steps == 4:  # the news of the third have been taken in, or never will be
            assert stopping.wait(PATIENCE)
        return make_step(engine)

    def stop(thread: EngineThread) -> None:
        stopping.set()
        stop_thread(thread)

    monkeypatch.setattr(_C.Engine, "step", step)
    monkeypatch.setattr(EngineThread, "stop", stop)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(PARIS, SamplingParams(max_tokens=200, ignore_eos=True), use_tqdm=False)
    assert before + 3 <= llm.stats().num_generated_tokens <= before + 5


def test_without_parameters_the_models_own_are_used(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    recommended = {"temperature": 0.0, "max_tokens": 3}
    monkeypatch.setattr(llm._loaded, "sampling_defaults", recommended)
    expected = llm.generate(PARIS, SamplingParams(temperature=0, max_tokens=3), use_tqdm=False)
    assert texts(llm.generate(PARIS, use_tqdm=False)) == texts(expected)


def test_progress_bar(llm: LLM, capfd: pytest.CaptureFixture[str]) -> None:
    llm.generate([PARIS, "Once upon a"], GREEDY)
    shown = capfd.readouterr().err
    assert "2/2" in shown
    assert "output:" in shown and "tok/s" in shown


def test_what_vllm_scripts_pass(smollm2_gguf: Path) -> None:
    with pytest.warns(UserWarning, match="gpu_memory_utilization has no effect"):
        small = LLM(
            model=str(smollm2_gguf),
            dtype="bfloat16",
            tensor_parallel_size=1,
            gpu_memory_utilization=0.9,
            max_model_len=64,
            kv_cache_memory="8MiB",
        )
    assert small.get_default_sampling_params() == SamplingParams()
    assert small.info.num_kv_blocks == (8 << 20) // small.info.kv_block_bytes
    assert small.info.num_host_kv_blocks == 0
    for bad in (-1, "much", True):
        with pytest.raises(InvalidArgument, match="swap_space"):
            LLM(model=str(smollm2_gguf), swap_space=bad)
    with pytest.raises(InvalidArgument, match="give one of them"):
        LLM(model=str(smollm2_gguf), swap_space=1, host_cache_memory="1GiB")


# ---------------------------------------------------------------- how it is computed

STORY = "Once upon a time there was a small robot. The robot said: I am a small robot. "
PROMPTS = [
    STORY * 2 + "The small robot said:",
    STORY + "Repeat: 1 2 3 4 5 6 7 8 1 2 3 4 5 6 7 8 1 2 3 4",
    PARIS,
    "def add(a, b):\n    return a + b\n\ndef sub(a, b):\n    return",
    STORY * 3,
    "The quick brown fox jumps over the lazy dog. The quick brown fox",
]
MIXED = [
    *[SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)] * 3,
    SamplingParams(temperature=0.8, seed=1, n=2, max_tokens=40, ignore_eos=True, logprobs=1),
    SamplingParams(temperature=0.8, seed=2, best_of=3, max_tokens=30),
    SamplingParams(temperature=0, beam_width=3, n=2, max_tokens=20),
]


def outputs_of(llm: LLM, params: SamplingParams | list[SamplingParams]) -> list[object]:
    outputs = llm.generate(PROMPTS, params, use_tqdm=False)
    scheduler = llm.stats().scheduler
    assert scheduler.num_free_blocks == scheduler.num_blocks
    llm._core.check_integrity()
    return [output.outputs for output in outputs]


@pytest.fixture(scope="module")
def plain_outputs(llm: LLM) -> list[object]:
    return outputs_of(llm, MIXED)


@pytest.mark.parametrize(
    "options",
    [
        {"async_scheduling": True},
        {"num_speculative_tokens": 4},
        {"num_speculative_tokens": 3, "prompt_lookup_min": 1, "async_scheduling": True},
        {"long_prefill_token_threshold": 16, "max_num_partial_prefills": 1},
    ],
    ids=lambda options: "-".join(options),
)
def test_how_it_is_computed_does_not_show(
    smollm2_gguf: Path, plain_outputs: list[object], options: dict[str, Any]
) -> None:
    llm = LLM(str(smollm2_gguf), dtype="bfloat16", max_model_len=256, num_kv_blocks=128, **options)
    assert outputs_of(llm, MIXED) == plain_outputs
    scheduler = llm.stats().scheduler
    if "num_speculative_tokens" in options:
        assert 0 < scheduler.num_accepted_tokens < scheduler.num_draft_tokens
        assert llm.stats().num_steps < 40 + 20


@pytest.mark.parametrize("async_scheduling", [False, True])
@pytest.mark.parametrize("swap", [False, True])
def test_a_tiny_cache_costs_time_only(
    smollm2_gguf: Path,
    plain_outputs: list[object],
    swap: bool,
    async_scheduling: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:
    small = LLM(
        str(smollm2_gguf),
        dtype="bfloat16",
        max_model_len=256,
        num_kv_blocks=16,
        async_scheduling=async_scheduling,
        **({"swap_space": 0.02} if swap else {}),
    )
    assert (small.info.num_host_kv_blocks > 0) == swap
    with caplog.at_level(logging.WARNING, "fastpage.engine"):
        assert outputs_of(small, MIXED) == plain_outputs
    scheduler = small.stats().scheduler
    assert scheduler.num_preemptions > 0
    assert (scheduler.num_preemptions_swap > 0) == swap
    assert (scheduler.num_blocks_swapped_in > 0) == swap
    assert scheduler.preempted_cache_queries > 0
    warnings = [message for message in caplog.messages if "preempted" in message]
    assert warnings
    for message in warnings:
        assert "kv_cache_memory" in message
        assert ("host_cache_memory" in message) != swap


def test_the_schedulers_calls_are_recorded(smollm2_gguf: Path, tmp_path: Path) -> None:
    log = tmp_path / "scheduler.log"
    llm = LLM(
        str(smollm2_gguf),
        dtype="bfloat16",
        max_model_len=256,
        num_kv_blocks=16,
        record_scheduler=str(log),
    )
    llm.generate(PROMPTS, MIXED, use_tqdm=False)
    result = _C.replay(str(log))
    assert (result.complete, result.divergence) == (True, "")
    assert result.num_steps == llm.stats().num_steps
    with pytest.raises(InvalidArgument, match="cannot write"):
        LLM(str(smollm2_gguf), max_model_len=64, record_scheduler=str(tmp_path / "no" / "log"))


def test_importing_the_package_is_cheap() -> None:
    code = (
        "import sys, fastpage; from fastpage import _C; fastpage.__version__;"
        "heavy = {'torch', 'transformers', 'grpc', 'tokenizers', 'asyncio'} & set(sys.modules);"
        "sys.exit(f'imported: {heavy}' if heavy else 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
