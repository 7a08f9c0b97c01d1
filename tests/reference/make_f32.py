"""Makes the float32 references of the two small models, without the rounding of any engine.

    pip install torch transformers gguf accelerate && python tests/reference/make_f32.py FOLDER_WITH_GGUF_FILES

transformers dequantises every weight to float32 and computes in float32. The prompts are those of smollm2.jsonl and
gemma3-270m.jsonl, which llama.cpp made (with activations rounded to 8 bits).
"""

import json
import pathlib
import sys

import torch
from transformers import AutoModelForCausalLM

HERE = pathlib.Path(__file__).parent
FILES = {"smollm2": "SmolLM2-135M-Instruct.Q4_1.gguf", "gemma3-270m": "gemma-3-270m-q4_k_m.gguf"}


def reference(model, prompt, count):
    with torch.no_grad():
        first = torch.log_softmax(model(torch.tensor([prompt])).logits[0, -1].double(), -1)
        top = first.topk(10)
        tokens, margins, cache = torch.tensor([prompt]), [], None
        step = tokens
        for _ in range(count):
            out = model(step, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            logprobs = torch.log_softmax(out.logits[0, -1].double(), -1)
            best = logprobs.topk(2)
            margins.append(round((best.values[0] - best.values[1]).item(), 4))
            step = best.indices[:1].view(1, 1)
            tokens = torch.cat([tokens, step], 1)
    return dict(
        prompt_token_ids=prompt,
        output_token_ids=tokens[0, len(prompt) :].tolist(),
        first_token_top_logprobs=[[i, round(v, 5)] for i, v in zip(top.indices.tolist(), top.values.tolist())],
        margins=margins,
    )


def main():
    for name, file in FILES.items():
        model = AutoModelForCausalLM.from_pretrained(sys.argv[1], gguf_file=file, dtype=torch.float32).eval()
        lines = [json.loads(line) for line in (HERE / f"{name}.jsonl").read_text().splitlines()]
        out = [reference(model, line["prompt_token_ids"], len(line["output_token_ids"])) for line in lines]
        (HERE / f"{name}.f32.jsonl").write_text("".join(json.dumps(line) + "\n" for line in out))


if __name__ == "__main__":
    main()
