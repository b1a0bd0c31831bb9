"""vllm.grpc.engine.VllmEngine: the tokenizer that a gateway gets."""

from __future__ import annotations

import hashlib
import io
import zipfile
from collections.abc import Iterable
from pathlib import Path

import pytest
from fakes import EOS_ID
from smg_grpc_proto.generated import common_pb2 as common
from worker_harness import STATUS, Client, refused, run

from fastpage.serving.worker import service
from fastpage.serving.worker.tokenizer_archive import build_archive, split
from fastpage.tokenizer import Tokenizer


def unpack(chunks: Iterable[common.GetTokenizerChunk], path: Path) -> Tokenizer:
    *first, last = chunks
    assert all(len(chunk.data) == 64 << 10 and not chunk.sha256 for chunk in first)
    data = b"".join(chunk.data for chunk in (*first, last))
    assert hashlib.sha256(data).hexdigest() == last.sha256
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        assert len(archive.namelist()) <= 50
        archive.extractall(path)
    return Tokenizer.from_directory(path)


def test_get_tokenizer(tmp_path: Path) -> None:
    async def test(client: Client) -> None:
        calls = [client.stub.GetTokenizer(common.GetTokenizerRequest()) for _ in range(2)]
        for i, call in enumerate(calls):
            tokenizer = unpack([chunk async for chunk in call], tmp_path / str(i))
            assert tokenizer.encode("abc.") == client.engine.tokenizer.encode("abc.")
            assert tokenizer.chat_template == client.engine.tokenizer.chat_template
            assert tokenizer.eos_token_ids == [EOS_ID]

    run(test)


def test_the_tokenizer_of_a_gguf_file_as_an_archive(smollm2_gguf: Path, tmp_path: Path) -> None:
    from fastpage.checkpoints import open_checkpoint

    own = open_checkpoint(str(smollm2_gguf)).tokenizer()
    archive = build_archive(own)
    assert archive == build_archive(own)
    chunks = list(split(archive))
    assert len(chunks) > 2
    copy = unpack(chunks, tmp_path)
    assert copy.special_tokens == own.special_tokens
    assert copy.eos_token_ids == own.eos_token_ids
    texts = [
        "Hello, 12345 worlds!\n\n  tabs\tand  spaces ",
        "naïve café Ωμέγα 你好 \U0001f600 \u200d",
        "<|im_start|>user\nhi<|im_end|>\n",
        "def f(x):\n    return x ** 2  # 3.14\r\n",
    ]
    messages = [{"role": "user", "content": "Hi"}]
    texts.append(own.apply_chat_template(messages))
    assert copy.apply_chat_template(messages) == texts[-1]
    for text in texts:
        assert copy.encode(text) == own.encode(text)
        ids = own.encode(text)
        assert copy.decode(ids) == own.decode(ids)


def test_a_tokenizer_archive_that_fails_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(tokenizer: Tokenizer) -> bytes:
        raise MemoryError

    async def test(client: Client) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(service, "build_archive", fails)
            error = await refused(client.stub.GetTokenizer(common.GetTokenizerRequest()))
            assert (error.code(), error.details()) == (STATUS.INTERNAL, "MemoryError")
        chunks = [c async for c in client.stub.GetTokenizer(common.GetTokenizerRequest())]
        assert chunks[-1].sha256

    run(test)
