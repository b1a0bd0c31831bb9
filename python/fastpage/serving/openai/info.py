"""The endpoints that generate nothing."""

from __future__ import annotations

from typing import Any

from fastpage._C import __version__
from fastpage.engine.async_engine import AsyncEngine
from fastpage.errors import InvalidArgument
from fastpage.serving.openai.chat import to_chat_prompt
from fastpage.serving.openai.errors import invalid, model_not_found
from fastpage.serving.openai.model import Model
from fastpage.serving.openai.protocol import DetokenizeRequest, RequestDecoder, TokenizeRequest
from fastpage.serving.openai.understanding import check_model

_tokenize_decoder = RequestDecoder(TokenizeRequest)
_detokenize_decoder = RequestDecoder(DetokenizeRequest)

TOKENIZE_FIELDS = _tokenize_decoder.fields
DETOKENIZE_FIELDS = _detokenize_decoder.fields


def list_models(model: Model, created: int) -> dict[str, Any]:
    return {"object": "list", "data": [describe_model(model, created)]}


def describe_model(model: Model, created: int, name: str | None = None) -> dict[str, Any]:
    """Raises ApiError (404) if another `name` is asked for."""
    info = model.info
    if name is not None and name != info.served_model_name:
        raise model_not_found(name, info.served_model_name)
    return {
        "id": info.served_model_name,
        "object": "model",
        "created": created,
        "owned_by": "fastpage",
        "root": info.model,
        "parent": None,
        "max_model_len": info.max_model_len,
    }


def tokenize(body: bytes, engine: AsyncEngine, model: Model) -> dict[str, Any]:
    request: TokenizeRequest = _tokenize_decoder.decode(body)
    check_model(request.model, model)
    tokenizer = model.tokenizer
    if request.messages is not None:
        if request.prompt is not None:
            raise invalid("prompt and messages: give one of them", "prompt")
        tokens = to_chat_prompt(request, tokenizer).token_ids
    elif request.prompt is not None:
        tokens = tokenizer.encode(request.prompt, request.add_special_tokens is not False)
    else:
        raise invalid("prompt is missing, or messages", "prompt", "missing_required_parameter")
    answer: dict[str, Any] = {
        "count": len(tokens),
        "max_model_len": model.info.max_model_len,
        "tokens": tokens,
    }
    if request.return_token_strs:
        answer["token_strs"] = [tokenizer.id_to_token(token) for token in tokens]
    return answer


def detokenize(body: bytes, engine: AsyncEngine, model: Model) -> dict[str, Any]:
    request: DetokenizeRequest = _detokenize_decoder.decode(body)
    check_model(request.model, model)
    vocab_size = model.info.vocab_size
    for i, token in enumerate(request.tokens):
        if not 0 <= token < vocab_size:
            raise InvalidArgument(
                f"tokens[{i}]={token} is not a token id of this model (0 to {vocab_size - 1})"
            )
    skip = bool(request.skip_special_tokens)
    return {"prompt": model.tokenizer.decode(request.tokens, skip_special_tokens=skip)}


def load(body: bytes, engine: AsyncEngine, model: Model) -> dict[str, Any]:
    """vLLM's `server_load`, and what it consists of."""
    scheduler = engine.stats().scheduler
    used = scheduler.num_blocks - scheduler.num_free_blocks
    return {
        "server_load": scheduler.num_running + scheduler.num_waiting,
        "num_running": scheduler.num_running,
        "num_waiting": scheduler.num_waiting,
        "kv_cache_usage": used / max(scheduler.num_blocks, 1),
    }


def version() -> dict[str, str]:
    return {"version": __version__}
