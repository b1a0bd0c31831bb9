"""Requests that no decent client sends, from a seeded generator."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from smg_grpc_proto import vllm_engine_pb2 as vllm

from fastpage.v1 import fastpage_pb2 as pb

INF, NAN = float("inf"), float("nan")
FLOATS = (0.0, -0.0, 1e-45, 0.5, 1.0, 2.5, -1.0, 100.0, 3.4e38, -3.4e38, INF, -INF, NAN)
# The vocabulary of the model behind has 803 entries, its context 4,096.
INTEGERS = (0, 1, 2, 3, 16, 20, 100, 802, 803, 4095, 4096, 10_000, 2**31 - 1)
MOST_NESTED = 12
NEGATIVE = (-1, -2, -1000, -(2**31))
STRINGS = (
    "",
    "a",
    "user",
    "def main():",
    "\0",
    "\n" * 50,
    "\u202e\ufeff\U0001f9ff",
    "e\u0301" * 300,
    "<|end|>" * 20,
    "{{ 7 * 7 }}{% for x in range(10**9) %}{% endfor %}",
    "x" * 500,
    "the same id",
)

Damage = Callable[[Random, bytes], bytes]


def cut(rng: Random, data: bytes) -> bytes:
    return data[: rng.randrange(len(data) + 1)]


def flip(rng: Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.randint(1, 8)):
        if changed:
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def splice(rng: Random, data: bytes) -> bytes:
    at = rng.randrange(len(data) + 1)
    return data[:at] + rng.randbytes(rng.randint(1, 40)) + data[at:]


def repeat(rng: Random, data: bytes) -> bytes:
    return data * rng.randint(2, 20)


def nest(rng: Random, data: bytes) -> bytes:
    """The message as its own field `field`, and that again, 200 deep: for readers that recurse."""
    field = bytes([rng.choice((0x0A, 0x12, 0x1A, 0x52, 0x5A, 0x6A))])
    for _ in range(200):
        size, length = len(data), b""
        while size > 127:
            length += bytes([size & 127 | 128])
            size >>= 7
        data = field + length + bytes([size]) + data
    return data


def noise(rng: Random, data: bytes) -> bytes:
    return rng.randbytes(rng.randint(1, 300))


DAMAGES: tuple[Damage, ...] = (cut, flip, splice, repeat, nest, noise)


class MalformedMessages:
    """Messages of one type: valid ones with some fields changed, and bytes that are none at all."""

    def __init__(self, rng: Random, valid: Sequence[Message]) -> None:
        self._rng = rng
        self._valid = valid

    def next(self) -> bytes:
        message = type(self._valid[0])()
        message.CopyFrom(self._rng.choice(self._valid))
        if self._rng.random() < 0.7:
            for _ in range(self._rng.choice((1, 1, 1, 2, 4))):
                self._change(message)
            return message.SerializeToString()
        return self._rng.choice(DAMAGES)(self._rng, message.SerializeToString())

    def _change(self, message: Message, depth: int = 0) -> None:
        """Sets one field to anything that its type can hold, in some message within it."""
        fields = message.DESCRIPTOR.fields
        if not fields or depth == MOST_NESTED:
            return
        field = self._rng.choice(fields)
        if field.message_type is not None and not is_repeated(field):
            self._change(getattr(message, field.name), depth + 1)
        elif is_map(field):
            self._change_map(getattr(message, field.name), field.message_type, depth + 1)
        elif is_repeated(field):
            values = getattr(message, field.name)
            nested = field.message_type is not None
            for _ in range(self._rng.choice((0, 1, 3, 10 if nested else 1000))):
                if nested:
                    self._change(values.add(), depth + 1)
                else:
                    values.append(self._value(field))
        else:
            setattr(message, field.name, self._value(field))

    def _change_map(self, entries: Any, entry: Descriptor, depth: int) -> None:
        key, value = entry.fields_by_name["key"], entry.fields_by_name["value"]
        nested = value.message_type is not None
        for _ in range(self._rng.choice((1, 3, 5 if nested else 300))):
            if nested:
                self._change(entries[self._value(key)], depth)
            else:
                entries[self._value(key)] = self._value(value)

    def _value(self, field: FieldDescriptor) -> Any:
        rng = self._rng
        kind = field.cpp_type
        if kind in (FieldDescriptor.CPPTYPE_FLOAT, FieldDescriptor.CPPTYPE_DOUBLE):
            return rng.choice(FLOATS)
        if kind == FieldDescriptor.CPPTYPE_BOOL:
            return rng.random() < 0.5
        if field.type == FieldDescriptor.TYPE_BYTES:
            return rng.randbytes(rng.choice((0, 1, 100)))
        if kind == FieldDescriptor.CPPTYPE_STRING:
            return rng.choice(STRINGS)
        if kind in (FieldDescriptor.CPPTYPE_UINT32, FieldDescriptor.CPPTYPE_UINT64):
            return rng.choice((*INTEGERS, 2**32 - 1))
        return rng.choice((*INTEGERS, *NEGATIVE))  # int32, int64, enum


def is_repeated(field: FieldDescriptor) -> bool:
    return bool(field.is_repeated)


def is_map(field: FieldDescriptor) -> bool:
    return field.message_type is not None and field.message_type.GetOptions().map_entry


# ---------------------------------------------------------------- what is damaged

SERVICES = ("fastpage.v1.Fastpage", "vllm.grpc.engine.VllmEngine")
PROMPT = "parser = argparse.ArgumentParser("
IDS = range(100, 140)


def valid_messages(service: str) -> dict[str, list[Message]]:
    """For every method of the service, by its path."""
    known = fastpage_messages() if service.startswith("fastpage") else vllm_messages()
    file = pb if service.startswith("fastpage") else vllm
    methods = file.DESCRIPTOR.services_by_name[service.rpartition(".")[2]].methods
    found: dict[str, list[Message]] = {}
    for method in methods:
        kind = GetMessageClass(method.input_type)
        found[f"/{service}/{method.name}"] = [m for m in known if type(m) is kind] or [kind()]
    return found


def fastpage_messages() -> list[Message]:
    sampling = pb.SamplingParams(temperature=0.9, seed=1, max_tokens=3)
    common: dict[str, Any] = {"sampling_params": sampling}
    chat = [pb.ChatMessage(role="user", content="x"), pb.ChatMessage(role="system", content="y")]
    full = pb.SamplingParams(n=2, best_of=3, logprobs=2, prompt_logprobs=1, max_tokens=4)
    beams = pb.SamplingParams(n=2, beam_width=3, max_tokens=4, temperature=0)
    stops = pb.SamplingParams(stop=["e", "import"], stop_token_ids=[5], max_tokens=30)
    ids = pb.TokenIds(ids=IDS)
    variables = {"a": {"b": [1, True, None, {"c": "x" * 40}]}}
    return [
        pb.GenerateRequest(text=PROMPT, **common),
        pb.GenerateRequest(token_ids=ids, request_id="the same id", **common),
        pb.GenerateRequest(text=PROMPT, sampling_params=full),
        pb.GenerateRequest(token_ids=ids, sampling_params=beams),
        pb.GenerateRequest(text=PROMPT, sampling_params=stops),
        pb.ChatRequest(messages=chat, **common),
        pb.ChatRequest(messages=chat, template_kwargs=variables, **common),
        pb.AbortRequest(request_id="the same id"),
        pb.TokenizeRequest(text=PROMPT, return_tokens=True),
        pb.TokenizeRequest(conversation=pb.Conversation(messages=chat, template_kwargs=variables)),
        pb.DetokenizeRequest(token_ids=IDS),
    ]


def vllm_messages() -> list[Message]:
    tokenized = vllm.TokenizedInput(original_text=PROMPT, input_ids=IDS)
    sampling = vllm.SamplingParams(temperature=0.9, seed=1, max_tokens=3)
    stops = vllm.SamplingParams(stop=["e", "import"], n=2, logprobs=2, max_tokens=30)
    return [
        vllm.GenerateRequest(
            request_id="the same id", tokenized=tokenized, sampling_params=sampling, stream=True
        ),
        vllm.GenerateRequest(request_id="one", tokenized=tokenized, sampling_params=stops),
        vllm.GenerateRequest(request_id="two", text=PROMPT, sampling_params=sampling, stream=True),
        vllm.EmbedRequest(request_id="three", tokenized=tokenized),
        vllm.AbortRequest(request_ids=["the same id", "one"]),
        vllm.GetLoadsRequest(include=["all"]),
    ]


# ---------------------------------------------------------------- JSON

JSON_VALUES: tuple[Any, ...] = (
    None,
    True,
    [],
    {},
    [[]],
    "",
    "a",
    "NaN",
    "x" * 5000,
    "\ud800",
    -1,
    0,
    1,
    2**31,
    2**63,
    10**400,
    -0.5,
    1e308,
    NAN,
    INF,
    [None],
    [1, "a", None],
    {"a": {"b": [1]}},
    [[1, 2], [3]],
    ["a"] * 1000,
)


def malformed_json(rng: Random, valid: Sequence[dict[str, Any]]) -> bytes:
    """A body for HTTP: mostly JSON with wrong values, now and then something else."""
    body = json.loads(json.dumps(rng.choice(valid)))
    for _ in range(rng.choice((1, 1, 2, 3))):
        change_json(rng, body)
    text = json.dumps(body).encode()
    kind = rng.random()
    if kind < 0.75:
        return text
    if kind < 0.8:
        return deep_json(rng)
    return rng.choice((cut, flip, splice, repeat, noise))(rng, text)


def change_json(rng: Random, body: Any) -> None:
    while True:
        keys: list[Any] = list(body) if isinstance(body, dict) else list(range(len(body)))
        if not keys:
            return
        key = rng.choice(keys)
        if isinstance(body[key], (dict, list)) and rng.random() < 0.6:
            body = body[key]
            continue
        if isinstance(body, dict) and rng.random() < 0.2:
            del body[key]
        else:
            body[key] = copy.deepcopy(rng.choice(JSON_VALUES))
        return


def deep_json(rng: Random) -> bytes:
    depth = rng.choice((50, 1000, 100_000))
    inside, outside = rng.choice(((b"[", b"]"), (b'{"a":', b"}")))
    nested = inside * depth + b"1" + outside * depth
    return rng.choice((nested, b'{"model":' + nested + b"}", b'{"messages":[' + nested + b"]}"))
