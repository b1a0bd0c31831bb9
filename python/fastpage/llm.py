"""LLM: offline generation, with vLLM's names."""

from __future__ import annotations

import dataclasses
import itertools
import queue
import threading
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from fastpage import _C
from fastpage.beam_search import BeamSearchOutput, BeamSearchParams, to_beam_search_output
from fastpage.engine.args import EngineArgs
from fastpage.engine.engine_thread import EngineThread
from fastpage.engine.loading import ModelInfo, load_model
from fastpage.engine.output_processor import OutputProcessor, RequestState
from fastpage.engine.prompts import Message, Prompt, PromptType, chat_prompt, to_prompt, truncate
from fastpage.errors import InvalidArgument
from fastpage.outputs import RequestOutput
from fastpage.sampling_params import SamplingParams
from fastpage.tokenizer import Tokenizer

# What scripts written for vLLM may pass and fastpage has no use for.
_WITHOUT_EFFECT = {
    "gpu_memory_utilization": "see kv_cache_memory",
    "trust_remote_code": "code from a checkpoint is never run",
    "disable_log_stats": "nothing is logged",
}


class LLM:
    """A model, its KV cache and a scheduler in this process.

        llm = LLM(model="SmolLM2-135M-Instruct.Q4_1.gguf", dtype="bfloat16")
        for output in llm.generate(["Paris is"], SamplingParams(temperature=0, max_tokens=20)):
            print(output.outputs[0].text)

    Keyword arguments are the fields of EngineArgs. Errors are InvalidArgument (a ValueError) or
    ResourceExhausted.
    """

    def __init__(self, model: str, *, tensor_parallel_size: int = 1, **kwargs: Any) -> None:
        if tensor_parallel_size != 1:
            raise InvalidArgument(
                f"tensor_parallel_size={tensor_parallel_size}: one process with all cores (threads="
                "...) is all there is so far"
            )
        for name in _WITHOUT_EFFECT.keys() & kwargs.keys():
            if kwargs.pop(name):
                warnings.warn(f"{name} has no effect: {_WITHOUT_EFFECT[name]}", stacklevel=2)
        known = {field.name for field in dataclasses.fields(EngineArgs)}
        if "swap_space" in kwargs:
            _take_swap_space(kwargs)
        unknown = kwargs.keys() - known
        if unknown:
            raise InvalidArgument(
                f"LLM() knows no {', '.join(sorted(unknown))} (known: {', '.join(sorted(known))})"
            )
        # Whoever hands in a list wants all of it done.
        kwargs.setdefault("max_num_waiting", 1 << 20)
        kwargs.setdefault("max_num_waiting_tokens", 0)
        self._loaded = load_model(EngineArgs(model=model, **kwargs))
        self._core = self._loaded.engine
        self._processor = OutputProcessor(self._loaded.tokenizer)
        self._request_ids = itertools.count()
        self._lock = threading.Lock()

    # ---- generation

    def generate(
        self,
        prompts: PromptType | Sequence[PromptType],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        *,
        priority: Sequence[int] | None = None,
    ) -> list[RequestOutput]:
        """One output per prompt, in their order. A prompt is a text, a list of token ids, or a dict
        with "prompt" or "prompt_token_ids". A bad one raises before anything is run. Without
        `sampling_params`: get_default_sampling_params()."""
        tokenizer = self._loaded.tokenizer
        vocab_size = self._loaded.info.vocab_size
        return self._run(
            _as_list(prompts),
            lambda prompt: to_prompt(prompt, tokenizer, vocab_size),
            sampling_params,
            priority,
            use_tqdm,
        )

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """The next answer to a conversation, or to each of a list of conversations, through the
        model's chat template."""
        single = len(messages) == 0 or isinstance(messages[0], dict)
        conversations = [messages] if single else list(messages)
        tokenizer = self._loaded.tokenizer
        return self._run(
            conversations,
            lambda conversation: chat_prompt(conversation, tokenizer),
            sampling_params,
            None,
            use_tqdm,
        )

    def beam_search(
        self,
        prompts: PromptType | Sequence[PromptType],
        params: BeamSearchParams,
        use_tqdm: bool = False,
        concurrency_limit: int | None = None,
    ) -> list[BeamSearchOutput]:
        """The best continuations of each prompt; prompts as generate() takes them. With
        `concurrency_limit` only that many prompts are in the engine at once; without, it computes
        as many together as there is room for."""
        sampling_params = params.to_sampling_params()
        prompts = _as_list(prompts)
        limit = len(prompts) or 1
        if concurrency_limit is not None:
            if concurrency_limit < 1:
                raise InvalidArgument(f"concurrency_limit must be >= 1, got {concurrency_limit}")
            limit = concurrency_limit
        outputs: list[RequestOutput] = []
        for start in range(0, len(prompts), limit):
            part = prompts[start : start + limit]
            outputs += self.generate(part, sampling_params, use_tqdm)
        tokenizer = self._loaded.tokenizer
        return [to_beam_search_output(output, sampling_params, tokenizer) for output in outputs]

    # ---- about the model

    def get_tokenizer(self) -> Tokenizer:
        return self._loaded.tokenizer

    @property
    def info(self) -> ModelInfo:
        """What was loaded, and how."""
        return self._loaded.info

    def get_default_sampling_params(self) -> SamplingParams:
        """What the model's generation_config.json recommends."""
        return self._loaded.default_sampling_params()

    def stats(self) -> _C.EngineStats:
        return self._core.stats()

    def reset_prefix_cache(self) -> bool:
        return self._core.reset_prefix_cache()

    # ---- inside

    def _run(
        self,
        prompts: Sequence[Any],
        convert: Callable[[Any], Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        priority: Sequence[int] | None,
        use_tqdm: bool,
    ) -> list[RequestOutput]:
        if sampling_params is None:
            sampling_params = self.get_default_sampling_params()
        params = _one_per_prompt("sampling_params", sampling_params, len(prompts), SamplingParams)
        priorities = _one_per_prompt("priority", priority, len(prompts), int)
        with self._lock:
            states: list[RequestState] = []
            try:
                for i, prompt in enumerate(prompts):
                    with _naming(f"prompts[{i}]", only_if=len(prompts) > 1):
                        states.append(self._add(convert(prompt), params[i], priorities[i]))
                self._step_until_done(states, use_tqdm)
                self._drain()
            except BaseException:
                self._abort(states)
                raise
        for state in states:
            if state.error is not None:
                raise state.error
        return [state.snapshot() for state in states]

    def _add(self, prompt: Prompt, params: SamplingParams, priority: int) -> RequestState:
        self._loaded.info.check_priority(priority)
        max_model_len = self._loaded.info.max_model_len
        prompt = truncate(prompt, params, max_model_len)
        core_params = params.to_core(self._loaded.tokenizer)
        self._loaded.info.check_logprobs(core_params)
        room = max_model_len - len(prompt.token_ids)
        # As in vLLM, an output that reaches the model's length ends there.
        if room >= 1 and core_params.max_tokens > room:
            core_params.max_tokens = room
        core_id = self._core.add_request(
            prompt.token_ids, core_params, priority=priority, cache_salt=prompt.cache_salt
        )
        return self._processor.add(core_id, str(next(self._request_ids)), prompt, params)

    def _step_until_done(self, states: list[RequestState], use_tqdm: bool) -> None:
        # Steps run on a thread of their own, so that the text of one is made during the next.
        news: queue.SimpleQueue[_C.StepOutput | Exception] = queue.SimpleQueue()
        thread = EngineThread(self._core, lambda step, stats: news.put(step), news.put)
        thread.start()
        try:
            with _Progress(states, use_tqdm) as progress:
                while self._processor.num_unfinished:
                    item = news.get()
                    if isinstance(item, Exception):
                        self._processor.step_failed(item)
                        continue
                    processed = self._processor.process(item.outputs)
                    for abort in processed.aborts:
                        abort.tell(self._core)
                    progress.update(processed.changed)
        finally:
            thread.stop()

    def _abort(self, states: list[RequestState]) -> None:
        for state in states:
            self._core.abort(state.core_id)
            self._processor.forget(state.core_id)
        self._drain()

    def _drain(self) -> None:
        """Lets the core report what was aborted, to nobody."""
        while self._core.has_unfinished():
            self._core.step()


def _take_swap_space(kwargs: dict[str, Any]) -> None:
    """vLLM's name for host_cache_memory, in GiB."""
    swap_space = kwargs.pop("swap_space")
    is_number = isinstance(swap_space, int | float) and not isinstance(swap_space, bool)
    if not is_number or not 0 <= swap_space < 2**30:
        raise InvalidArgument(f"swap_space={swap_space!r} is not a number of GiB")
    if kwargs.get("host_cache_memory") is not None:
        raise InvalidArgument("swap_space and host_cache_memory are the same: give one of them")
    if swap_space > 0:
        kwargs["host_cache_memory"] = int(swap_space * 2**30)


class _naming:
    """Puts `where` in front of the message of an InvalidArgument."""

    def __init__(self, where: str, only_if: bool) -> None:
        self._where = where
        self._on = only_if

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if self._on and isinstance(error, InvalidArgument):
            raise type(error)(f"{self._where}: {error}") from None


class _Progress:
    """A progress bar with tokens per second; tqdm is imported only if it is wanted."""

    def __init__(self, states: list[RequestState], on: bool) -> None:
        self._bar: Any = None
        self._prompt_tokens = self._output_tokens = 0
        if on:
            from tqdm import tqdm

            self._bar = tqdm(total=len(states), desc="Processed prompts", dynamic_ncols=True)

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def update(self, changed: list[RequestState]) -> None:
        if self._bar is None:
            return
        for state in changed:
            if state.finished:
                self._prompt_tokens += len(state.prompt.token_ids)
                self._output_tokens += sum(len(s.output.token_ids) for s in state.samples)
                seconds = max(self._bar.format_dict["elapsed"], 1e-6)
                self._bar.set_postfix_str(
                    f"prompt: {self._prompt_tokens / seconds:.1f} tok/s, "
                    f"output: {self._output_tokens / seconds:.1f} tok/s",
                    refresh=False,
                )
                self._bar.update()


def _as_list(prompts: Any) -> Sequence[PromptType]:
    """A single prompt becomes a list of one; a list of ints is a single prompt."""
    is_many = isinstance(prompts, Sequence) and not isinstance(prompts, str)
    if not is_many or (prompts and all(isinstance(item, int) for item in prompts)):
        prompts = [prompts]
    return prompts


def _one_per_prompt(name: str, values: Any, count: int, kind: type) -> list[Any]:
    if values is None:
        values = kind()
    if isinstance(values, kind):
        return [values] * count
    if not isinstance(values, Sequence) or not all(isinstance(value, kind) for value in values):
        raise InvalidArgument(f"{name} is not a {kind.__name__} or a list of them")
    if len(values) != count:
        raise InvalidArgument(f"{name} has {len(values)} entries for {count} prompts")
    return list(values)
