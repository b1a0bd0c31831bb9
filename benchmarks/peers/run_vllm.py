"""vLLM's CPU build: its offline LLM class, compiled, engine core in this process."""

from __future__ import annotations

import os

import runner

opts = runner.options()
os.environ.update(
    VLLM_CPU_KVCACHE_SPACE="2",  # GiB
    VLLM_CPU_OMP_THREADS_BIND=f"0-{opts['threads'] - 1}" if opts["threads"] > 1 else "0",
    VLLM_CPU_NUM_OF_RESERVED_CPU="0",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_LOGGING_LEVEL="WARNING",
    VLLM_NO_USAGE_STATS="1",
    HF_HUB_OFFLINE="1",
)


def main() -> None:
    import vllm

    llm = vllm.LLM(
        model=opts["model"],
        max_num_seqs=opts["max_num_seqs"],
        max_num_batched_tokens=opts["max_num_batched_tokens"],
        max_model_len=opts["max_model_len"],
        enable_prefix_caching=False,
        seed=0,
        disable_log_stats=True,
        **opts["settings"],
    )

    def generate(requests: list[runner.Request]) -> list[list[int]]:
        params = [
            vllm.SamplingParams(
                temperature=0.0, max_tokens=request["out"], ignore_eos=True, detokenize=False
            )
            for request in requests
        ]
        prompts = [{"prompt_token_ids": request["prompt"]} for request in requests]
        outputs = llm.generate(prompts, params, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    runner.serve(opts, f"vllm-cpu {vllm.__version__}", generate)


if __name__ == "__main__":  # vLLM may start helpers that import this file
    main()
