#!/usr/bin/env python3
"""One round of OpenVINO GenAI (PyPI: openvino-genai), which reads GGUF files of some families and types.

exo-benches calls it with --openvino PYTHON, and reads one JSON object from stdout.
"""

import argparse
import json
import resource
import time

import numpy as np
import openvino
import openvino_genai


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--prompt-tokens", type=int, required=True)
    parser.add_argument("--generate-tokens", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    arguments = parser.parse_args()

    started = time.perf_counter()
    pipeline = openvino_genai.LLMPipeline(arguments.model, "CPU", INFERENCE_NUM_THREADS=arguments.threads)
    load_ms = (time.perf_counter() - started) * 1e3
    config = openvino_genai.GenerationConfig()
    config.max_new_tokens = config.min_new_tokens = arguments.generate_tokens
    config.ignore_eos = True
    config.do_sample = False

    def round(first):
        # Ids below 30,000 are in every vocabulary of the measured models. Prompts differ from the first token on, so
        # that no cached prefix saves the work.
        ids = (np.arange(arguments.prompt_tokens, dtype=np.int64) * 7919 + first) % 30_000
        tokens = openvino_genai.TokenizedInputs(
            openvino.Tensor(ids[None, :]), openvino.Tensor(np.ones((1, len(ids)), np.int64))
        )
        return pipeline.generate(tokens, config).perf_metrics

    # The first prompt compiles kernels for its shape.
    round(5)
    metrics = round(11)
    print(
        json.dumps(
            {
                "prefill_tokens_per_s": arguments.prompt_tokens / metrics.get_ttft().mean * 1e3,
                "decode_tokens_per_s": 1e3 / metrics.get_tpot().mean,
                "load_ms": load_ms,
                "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            }
        )
    )


if __name__ == "__main__":
    main()
