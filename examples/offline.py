"""Offline generation: python examples/offline.py MODEL (a GGUF file, a directory, or a Hub id)."""

import sys

from fastpage import LLM, SamplingParams

prompts = [
    "The capital of France is",
    "A haiku about the sea:",
    "def fibonacci(n):",
]
sampling_params = SamplingParams(temperature=0.8, top_p=0.95, max_tokens=48, seed=1)

llm = LLM(model=sys.argv[1], max_model_len=2048)
for output in llm.generate(prompts, sampling_params):
    print(f"{output.prompt!r} -> {output.outputs[0].text!r}")

question = [{"role": "user", "content": "Why is the sky blue? Answer in one sentence."}]
print(llm.chat(question, SamplingParams(temperature=0, max_tokens=64))[0].outputs[0].text)
