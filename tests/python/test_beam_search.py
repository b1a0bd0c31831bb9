"""Beam search and best_of through the whole engine; transformers' generate() is the oracle."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from fastpage import _C, LLM, BeamSearchParams, SamplingParams
from fastpage.checkpoints import open_checkpoint
from fastpage.errors import InvalidArgument
from fastpage.models import build_model

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

BLOCK_SIZE = 16
VOCAB = 131
SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "max_position_embeddings": 128,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Mistral": {"sliding_window": 7},
    "Qwen2": {},
    "Qwen3": {},
}
# What the engine is told beside a pool and a step with room for all.
ENGINES: dict[str, dict[str, Any]] = {
    "room for all": {},
    "no prefix caching": {"enable_prefix_caching": False},
    "prompts in chunks": {"max_num_batched_tokens": 24, "max_num_seqs": 24},
    "few rows": {"max_num_seqs": 8},
    "small pool": {"num_blocks": 40},
    "small pool, host tier": {"num_blocks": 40, "num_host_blocks": 64},
    "async": {"async_scheduling": True},
    "speculation": {"num_speculative_tokens": 3, "prompt_lookup_min": 1},
}

Beams = list[tuple[list[int], float]]


class TinyModel(NamedTuple):
    reference: Any  # transformers'
    executor: _C.CpuExecutor


class Search(NamedTuple):
    """One request, in the words of SamplingParams."""

    prompt: list[int]
    fields: dict[str, Any]

    def params(self) -> _C.SamplingParams:
        return SamplingParams(**self.fields).to_core()


def oracle(model: Any, search: Search, eos_token_ids: Sequence[int] = ()) -> Beams:
    fields = search.fields
    stops = [*eos_token_ids, *fields.get("stop_token_ids", ())]
    pad = model.config.vocab_size  # no token
    config = transformers.GenerationConfig(
        num_beams=fields["beam_width"],
        num_return_sequences=fields.get("n", 1),
        do_sample=False,
        length_penalty=fields.get("length_penalty", 1.0),
        early_stopping=fields.get("early_stopping", False),
        min_new_tokens=fields.get("min_tokens", 0) or None,
        max_new_tokens=fields["max_tokens"],
        eos_token_id=stops or None,
        pad_token_id=pad,
        return_dict_in_generate=True,
        output_scores=True,
    )
    model.generation_config = config  # whose unset fields would fill in for ours
    input_ids = torch.tensor([search.prompt])
    with torch.inference_mode():
        out = model.generate(
            input_ids, attention_mask=torch.ones_like(input_ids), generation_config=config
        )
    outputs = out.sequences[:, len(search.prompt) :].tolist()
    trimmed = [[token for token in output if token != pad] for output in outputs]
    return list(zip(trimmed, out.sequences_scores.tolist(), strict=True))


def make_engine(
    executor: _C.CpuExecutor, vocab_size: int, eos_token_ids: Sequence[int] = (), **options: Any
) -> _C.Engine:
    async_scheduling = options.pop("async_scheduling", False)
    runner = _C.ProgramRunner(executor, max_steps_in_flight=2 if async_scheduling else 1)
    scheduler = {
        "num_blocks": NUM_BLOCKS,
        "block_size": BLOCK_SIZE,
        "max_num_seqs": 64,
        "max_num_batched_tokens": 512,
        "max_model_len": 128,
        "eos_token_ids": list(eos_token_ids),
        **options,
    }
    config = _C.EngineConfig(
        scheduler=_C.SchedulerConfig(**scheduler),
        vocab_size=vocab_size,
        async_scheduling=async_scheduling,
    )
    return _C.Engine(config, runner)


def run(
    engine: _C.Engine, searches: Sequence[Search], others: Sequence[Search] = ()
) -> list[Beams]:
    """The searches' beams, while `others` are computed beside them."""
    requests = [*searches, *others]
    order = list(range(len(requests)))
    random.Random(len(requests)).shuffle(order)
    ids: dict[int, int] = {}
    beams: list[Beams] = [[] for _ in requests]
    while order or engine.has_unfinished():
        if order:
            i = order.pop()
            ids[engine.add_request(requests[i].prompt, requests[i].params())] = i
        for output in engine.step().outputs:
            i = ids[output.request_id]
            if i >= len(searches):
                continue
            assert output.index == len(beams[i])  # all of them, once, the best first
            assert output.finish_reason in (_C.FinishReason.STOP, _C.FinishReason.LENGTH)
            assert output.num_output_tokens == len(output.new_token_ids)
            penalty = requests[i].fields.get("length_penalty", 1.0)
            total = output.score * output.num_output_tokens**penalty
            assert output.cumulative_logprob == pytest.approx(total, rel=1e-6, abs=1e-4)
            beams[i].append((output.new_token_ids, output.score))
    engine.check_integrity()
    stats = engine.stats().scheduler
    assert stats.num_running == stats.num_waiting == 0
    assert stats.num_free_blocks == stats.num_blocks
    return beams[: len(searches)]


def assert_same(beams: Beams, expected: Beams, tolerance: float = 1e-4) -> None:
    assert [tokens for tokens, _ in beams] == [tokens for tokens, _ in expected]
    for (_, score), (_, reference) in zip(beams, expected, strict=True):
        # A negative length_penalty multiplies the sum, and its float32 error, by the length: other
        # orders of summation (AVX2's) end 1.1e-6 away.
        assert score == pytest.approx(reference, rel=1e-5, abs=tolerance)


# ---- tiny models

NUM_BLOCKS = 256


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], TinyModel]:
    made: dict[str, TinyModel] = {}

    def make(family: str) -> TinyModel:
        if family not in made:
            config = getattr(transformers, f"{family}Config")(**SMALL, **FAMILIES[family])
            torch.manual_seed(len(made))
            reference = getattr(transformers, f"{family}ForCausalLM")(config).eval()
            with torch.no_grad():  # else every token is as likely as the others
                for parameter in reference.parameters():
                    parameter.add_(torch.randn_like(parameter) * (2 / parameter.shape[-1] ** 0.5))
            path = tmp_path_factory.mktemp(family)
            reference.save_pretrained(path)
            checkpoint = open_checkpoint(path)
            model = build_model(checkpoint.config)
            executor = _C.CpuExecutor(
                model.program,
                num_kv_blocks=NUM_BLOCKS,
                num_host_kv_blocks=64,
                block_size=BLOCK_SIZE,
                weight_dtype="float32",
                kv_cache_dtype="float32",
                max_num_tokens=512,
                max_num_logits=256,
            )
            model.load_weights(checkpoint, executor)
            made[family] = TinyModel(reference, executor)
        return made[family]

    return make


LENGTHS = ((0, 1), (0, 12), (0, 20), (5, 12), (5, 20))


def tiny_searches() -> list[Search]:
    rng = random.Random(3)
    grid = itertools.product(
        ((2, 1), (4, 4), (8, 3)), (0.0, 1.0, 2.0, -1.0), (False, True, "never")
    )
    return [
        Search(
            # Some begin alike, for the prefix cache.
            prompt=list(range(40))[: rng.choice((0, 17, 34))] + rng.choices(range(VOCAB), k=9),
            fields={
                "n": n,
                "beam_width": beam_width,
                "length_penalty": length_penalty,
                "early_stopping": early_stopping,
                **dict(zip(("min_tokens", "max_tokens"), rng.choice(LENGTHS), strict=True)),
                "stop_token_ids": rng.sample(range(VOCAB), rng.choice((0, 8))),
            },
        )
        for (beam_width, n), length_penalty, early_stopping in grid
    ]


def noise() -> list[Search]:
    rng = random.Random(4)
    return [
        Search(
            rng.choices(range(VOCAB), k=rng.randint(1, 60)),
            {"n": rng.randint(1, 3), "max_tokens": rng.randint(1, 30), "seed": i},
        )
        for i in range(8)
    ]


EOS_TOKEN_IDS = (5, 77)


@pytest.fixture(scope="module")
def expected(tiny_model: Callable[[str], TinyModel]) -> Callable[[str], list[Beams]]:
    made: dict[str, list[Beams]] = {}

    def make(family: str) -> list[Beams]:
        if family not in made:
            model = tiny_model(family).reference
            made[family] = [oracle(model, search, EOS_TOKEN_IDS) for search in tiny_searches()]
        return made[family]

    return make


@pytest.mark.usefixtures("one_torch_thread")
@pytest.mark.parametrize(
    ("family", "engine_name"),
    [("Llama", name) for name in ENGINES] + [(family, "small pool") for family in FAMILIES][1:],
)
def test_equals_transformers(
    tiny_model: Callable[[str], TinyModel],
    expected: Callable[[str], list[Beams]],
    family: str,
    engine_name: str,
) -> None:
    options = ENGINES[engine_name]
    engine = make_engine(tiny_model(family).executor, VOCAB, EOS_TOKEN_IDS, **options)
    for search, beams, reference in zip(
        tiny_searches(), run(engine, tiny_searches(), noise()), expected(family), strict=True
    ):
        try:
            assert_same(beams, reference)
        except AssertionError as error:
            raise AssertionError(f"{search}: {error}") from None
    stats = engine.stats().scheduler
    assert (stats.num_preemptions > 0) == ("small" in engine_name or engine_name == "few rows")
    assert (stats.num_blocks_swapped_in > 0) == ("host tier" in engine_name)
    assert (stats.prefix_cache_hits > 0) == (engine_name != "no prefix caching")


@pytest.mark.usefixtures("one_torch_thread")
def test_aborts_leave_nothing_behind(tiny_model: Callable[[str], TinyModel]) -> None:
    """In every phase: waiting, in the midst of the prompt, as beams."""
    engine = make_engine(tiny_model("Llama").executor, VOCAB, max_num_batched_tokens=24)
    search = Search(list(range(60)), {"n": 4, "beam_width": 4, "max_tokens": 12})
    for num_steps in range(8):
        kept = engine.add_request(search.prompt, search.params())
        gone = engine.add_request(search.prompt[::-1], search.params())
        for _ in range(num_steps):
            engine.step()
        assert not engine.abort(gone, 1)  # nobody knows yet which beam that will be
        assert engine.abort(gone)
        engine.check_integrity()
        finished: dict[int, list[_C.FinishReason]] = {kept: [], gone: []}
        while engine.has_unfinished():
            for output in engine.step().outputs:
                finished[output.request_id].append(output.finish_reason)
        assert finished == {
            kept: [_C.FinishReason.LENGTH] * 4,
            gone: [_C.FinishReason.ABORT] * 4,
        }
        stats = engine.stats().scheduler
        assert stats.num_free_blocks == stats.num_blocks


@pytest.mark.usefixtures("one_torch_thread")
def test_what_can_never_fit_is_refused(tiny_model: Callable[[str], TinyModel]) -> None:
    engine = make_engine(tiny_model("Llama").executor, VOCAB, num_blocks=20, max_num_seqs=6)

    def add(**fields: Any) -> None:
        engine.add_request([1, 2, 3], SamplingParams(**fields).to_core())

    with pytest.raises(InvalidArgument, match="beam_width is 7: more than max_num_seqs 6"):
        add(beam_width=7)
    with pytest.raises(InvalidArgument, match="x 6 beams needs 42 blocks, 20 exist"):
        add(beam_width=6, max_tokens=100)
    with pytest.raises(InvalidArgument, match="n must be at most beam_width"):
        add(beam_width=2, n=3)
    assert not engine.has_unfinished()


@pytest.mark.usefixtures("one_torch_thread")
@pytest.mark.parametrize("async_scheduling", [False, True])
def test_best_of(tiny_model: Callable[[str], TinyModel], async_scheduling: bool) -> None:
    engine = make_engine(
        tiny_model("Llama").executor, VOCAB, EOS_TOKEN_IDS, async_scheduling=async_scheduling
    )

    def draw(**fields: Any) -> list[tuple[float, list[int]]]:
        params = SamplingParams(max_tokens=12, seed=7, **fields).to_core()
        engine.add_request(list(range(20)), params)
        outputs: dict[int, tuple[float, list[int]]] = {}
        while engine.has_unfinished():
            for output in engine.step().outputs:
                tokens = outputs.get(output.index, (0.0, []))[1] + output.new_token_ids
                outputs[output.index] = output.cumulative_logprob, tokens
        return [outputs[i] for i in sorted(outputs)]

    samples = draw(n=8, logprobs=0)
    assert len({tuple(tokens) for _, tokens in samples}) == 8
    ranked = sorted(samples, key=lambda sample: -sample[0])
    best = draw(n=3, best_of=8)
    assert [tokens for _, tokens in best] == [tokens for _, tokens in ranked[:3]]
    assert [logprob for logprob, _ in best] == pytest.approx([p for p, _ in ranked[:3]])


# ---- the real model

PROMPTS = [
    "The capital of France is",
    "<|im_start|>user\nSay hello.<|im_end|>\n<|im_start|>assistant\n",
]


@pytest.fixture(scope="module")
def llm(smollm2_gguf: Path) -> LLM:
    return LLM(
        str(smollm2_gguf),
        dtype="float32",
        max_model_len=128,
        num_kv_blocks=64,
        max_num_batched_tokens=32,
        max_num_seqs=16,
    )


@pytest.fixture(autouse=True)
def nothing_is_left(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "llm" in request.fixturenames:
        llm = request.getfixturevalue("llm")
        stats = llm.stats().scheduler
        assert stats.num_running == stats.num_waiting == 0
        assert stats.num_free_blocks == stats.num_blocks
        llm._core.check_integrity()


@pytest.mark.usefixtures("one_torch_thread")  # two would wait for each other on a busy machine
@pytest.mark.parametrize(
    "fields",
    [
        {"beam_width": 4, "max_tokens": 12},
        {
            "beam_width": 3,
            "max_tokens": 16,
            "min_tokens": 12,
            "length_penalty": 0.0,
            "early_stopping": "never",
        },
    ],
)
def test_the_real_model(llm: LLM, smollm2_hf: Any, fields: dict[str, Any]) -> None:
    tokenizer = llm.get_tokenizer()
    penalty = fields.get("length_penalty", 1.0)
    tolerance = 1e-4 * fields["max_tokens"] ** (1 - penalty)  # 1e-4 a token
    outputs = llm.beam_search(PROMPTS, BeamSearchParams(**fields))
    for text, output in zip(PROMPTS, outputs, strict=True):
        prompt = tokenizer.encode(text)
        search = Search(prompt, {**fields, "n": fields["beam_width"]})
        expected = oracle(smollm2_hf.model, search, llm.info.eos_token_ids)
        beams = [(s.tokens[len(prompt) :], s.score) for s in output.sequences]
        assert_same(beams, expected, tolerance)
        for sequence in output.sequences:
            stopped = sequence.tokens[-1] in llm.info.eos_token_ids
            assert sequence.finish_reason == ("stop" if stopped else "length")
            assert sequence.stop_reason is None
            assert sequence.text == tokenizer.decode(sequence.tokens)
            length = len(sequence.tokens) - len(prompt)
            total = sequence.score * length**penalty
            assert sequence.cum_logprob == pytest.approx(total, abs=1e-4)


def test_beams_as_outputs_of_generate(llm: LLM) -> None:
    (expected,) = llm.beam_search(PROMPTS[0], BeamSearchParams(beam_width=4, max_tokens=10))
    params = SamplingParams(n=2, beam_width=4, max_tokens=10)
    (output,) = llm.generate(PROMPTS[0], params, use_tqdm=False)
    assert output.finished and len(expected.sequences) == 4
    for beam, sequence in zip(output.outputs, expected.sequences[:2], strict=True):
        assert output.prompt_token_ids + beam.token_ids == sequence.tokens
        assert PROMPTS[0] + beam.text == sequence.text
        assert (beam.score, beam.cumulative_logprob) == (sequence.score, sequence.cum_logprob)
        assert beam.finish_reason == sequence.finish_reason == "length"


def test_concurrency_limit_and_stop_tokens(llm: LLM) -> None:
    tokenizer = llm.get_tokenizer()
    fields: dict[str, Any] = {"beam_width": 3, "max_tokens": 8}
    (free,) = llm.beam_search(PROMPTS[0], BeamSearchParams(**fields))
    fields["stop_token_ids"] = [free.sequences[0].tokens[-4]]
    params = BeamSearchParams(**fields)
    outputs = llm.beam_search(PROMPTS, params)
    assert llm.beam_search(PROMPTS, params, concurrency_limit=1) == outputs
    stopped = [s for s in outputs[0].sequences if s.stop_reason is not None]
    assert stopped
    for sequence in stopped:
        assert sequence.finish_reason == "stop"
        assert sequence.tokens[-1] == sequence.stop_reason == params.stop_token_ids[0]
        assert sequence.text == tokenizer.decode(sequence.tokens[:-1])
    (output,) = llm.beam_search(
        PROMPTS[0], BeamSearchParams(**fields, include_stop_str_in_output=True)
    )
    for sequence in output.sequences:
        assert sequence.text == tokenizer.decode(sequence.tokens)
    assert llm.beam_search([], params) == []


def test_wrong_values(llm: LLM) -> None:
    with pytest.raises(InvalidArgument, match=r"temperature=0\.7 does not go with beam search"):
        BeamSearchParams(beam_width=2, max_tokens=3, temperature=0.7)
    for width in (0, 65, 2000, None, "2", True):
        with pytest.raises(InvalidArgument, match=f"^beam_width must be .* 1 to 64, got {width!r}"):
            BeamSearchParams(beam_width=width, max_tokens=3)
    params = BeamSearchParams(beam_width=2, max_tokens=3)
    with pytest.raises(InvalidArgument, match="concurrency_limit must be >= 1, got 0"):
        llm.beam_search(PROMPTS, params, concurrency_limit=0)
    with pytest.raises(InvalidArgument, match="beam_width is 17: more than max_num_seqs 16"):
        llm.beam_search(PROMPTS[0], BeamSearchParams(beam_width=17, max_tokens=3))
