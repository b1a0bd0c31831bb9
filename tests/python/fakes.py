"""A model without weights and a tokenizer of single letters, behind a real core."""

from __future__ import annotations

import contextlib
import socket
import string
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import tokenizers
from waiting import PATIENCE

from fastpage import _C
from fastpage.engine.loading import LoadedModel, ModelInfo
from fastpage.tokenizer import Tokenizer

LETTERS = string.ascii_lowercase
EOS = "<end>"
VOCAB = [*LETTERS, " ", ".", EOS]
EOS_ID = VOCAB.index(EOS)

_TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"


def letter_tokenizer(template: str = _TEMPLATE) -> Tokenizer:
    """One token per character; anything but a-z, space and full stop is unknown and dropped."""
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab={token: i for i, token in enumerate(VOCAB)}, merges=[])
    )
    backend.decoder = tokenizers.decoders.Fuse()
    backend.add_special_tokens([EOS])
    return Tokenizer(backend, eos_token_ids=[EOS_ID], chat_templates={"default": template})


class AlphabetRunner(_C.ModelRunner):
    """After each letter comes the next one of the alphabet, after "z" "a", after "." the end.

    `before_step` is called first in each step: it may wait, or raise.
    """

    def __init__(self, before_step: Callable[[], None] | None = None) -> None:
        super().__init__()
        self.before_step = before_step
        self.num_steps = 0
        self._sampler = _C.Sampler(len(VOCAB))
        self._output: _C.ModelRunnerOutput | None = None

    def execute(self, batch: _C.InputBatch) -> None:
        self.num_steps += 1
        if self.before_step is not None:
            self.before_step()
        last = batch.token_ids[batch.logits_indices]
        following = np.where(last < 26, (last + 1) % 26, EOS_ID)
        logits = np.zeros((batch.num_logits, len(VOCAB)), np.float32)
        logits[np.arange(len(last)), following] = 10.0
        self._output = self._sampler.sample(logits, batch)

    def wait(self, step_id: int) -> _C.ModelRunnerOutput:
        assert self._output is not None
        return self._output


class Gate:
    """A before_step that lets one step pass for each permit."""

    def __init__(self) -> None:
        self._permits = threading.Semaphore(0)

    def __call__(self) -> None:
        # A step that fails frees its request, as a test may be waiting for something else to do.
        assert self._permits.acquire(timeout=3 * PATIENCE)

    def open(self, steps: int = 1) -> None:
        self._permits.release(steps)

    @classmethod
    @contextlib.contextmanager
    def opened_at_the_end(cls, before_step: Callable[[], None] | None) -> Iterator[None]:
        """Of a test that failed, too, so that its engine can end."""
        try:
            yield
        finally:
            if isinstance(before_step, cls):
                before_step.open(1 << 20)


def load_alphabet(
    before_step: Callable[[], None] | None = None, **scheduler_options: Any
) -> LoadedModel:
    options = {
        "num_blocks": 256,
        "block_size": 4,
        "max_num_seqs": 16,
        "max_num_batched_tokens": 64,
        "max_model_len": 128,
        "eos_token_ids": [EOS_ID],
        **scheduler_options,
    }
    scheduler = _C.SchedulerConfig(**options)
    config = _C.EngineConfig(scheduler=scheduler, vocab_size=len(VOCAB))
    runner = AlphabetRunner(before_step)
    engine = _C.Engine(config, runner)
    info = ModelInfo(
        served_model_name="alphabet",
        model="/models/alphabet",
        architecture="AlphabetForCausalLM",
        dtype="float32",
        quantization="none",
        kv_cache_dtype="float32",
        vocab_size=len(VOCAB),
        max_model_len=options["max_model_len"],
        eos_token_ids=[EOS_ID],
        has_chat_template=True,
        block_size=options["block_size"],
        num_kv_blocks=options["num_blocks"],
        kv_block_bytes=1,
        weight_bytes=0,
        max_num_seqs=options["max_num_seqs"],
        max_num_batched_tokens=options["max_num_batched_tokens"],
        num_threads=1,
        scheduling_policy=options.get("policy", "fcfs"),
    )
    return LoadedModel(
        engine=engine,
        runner=runner,
        tokenizer=letter_tokenizer(),
        info=info,
        sampling_defaults={},
        phases={},
    )


@contextlib.contextmanager
def serve_on_a_thread(loaded: LoadedModel) -> Iterator[int]:
    """The engine behind a channel; gives the front end's socket."""
    with serve_front_ends(loaded, 1) as (fileno,):
        yield fileno


@contextlib.contextmanager
def serve_front_ends(loaded: LoadedModel, count: int) -> Iterator[list[int]]:
    """The same for several front ends."""
    pairs = [socket.socketpair() for _ in range(count)]
    server = _C.EngineServer(loaded.engine, [theirs.detach() for _, theirs in pairs])
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        yield [ours.detach() for ours, _ in pairs]
    finally:
        server.stop()
        thread.join()
