"""A client of a running fastpage-grpc: python examples/grpc_client.py [ADDRESS] [PROMPT].

The messages and the stub are made from proto/fastpage/v1/fastpage.proto, for Python they come with
the package; for other languages run protoc on that file.
"""

import sys

import grpc

from fastpage.v1 import fastpage_pb2 as pb
from fastpage.v1 import fastpage_pb2_grpc as pb_grpc

address = sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:50051"
prompt = sys.argv[2] if len(sys.argv) > 2 else "The capital of France is"

with grpc.insecure_channel(address) as channel:
    stub = pb_grpc.FastpageStub(channel)
    info = stub.GetModelInfo(pb.GetModelInfoRequest())
    print(f"{info.model}: {info.architecture}, {info.dtype}, up to {info.max_model_len} tokens")

    request = pb.GenerateRequest(
        text=prompt,
        sampling_params=pb.SamplingParams(temperature=0, max_tokens=32, stop=["\n\n"]),
    )
    print(prompt, end="")
    for response in stub.Generate(request, timeout=60):
        for delta in response.outputs:
            print(delta.text, end="", flush=True)
        if response.HasField("usage"):
            usage = response.usage
            print(f"\n[{usage.prompt_tokens} prompt + {usage.completion_tokens} output tokens]")
