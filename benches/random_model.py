#!/usr/bin/env python3
"""Writes a Llama model of random weights as a GGUF file, to measure speeds of types and sizes.

Usage: python3 -m pip install gguf, then
  benches/random_model.py --type q4_k --tokenizer-of ~/.cache/exo/models/SmolLM2-135M-Instruct.Q4_1.gguf model.gguf

All matrices have the type, and about the magnitude of trained weights; norms are ones. The default shape is that of
Llama 3.2 1B (https://huggingface.co/meta-llama/Llama-3.2-1B), with the vocabulary of the tokenizer's model.
"""

import argparse

import gguf
import numpy as np

# The largest magnitude of a weight.
LARGEST = 0.06
# Where a block has its half-precision floats, and each one's value, by the largest level and scale of the type.
FLOATS = {
    "Q4_0": {0: LARGEST / 8},
    "Q4_1": {0: LARGEST / 8, 2: -LARGEST},
    "Q5_0": {0: LARGEST / 16},
    "Q5_1": {0: LARGEST / 16, 2: -LARGEST},
    "Q8_0": {0: LARGEST / 128},
    "Q2_K": {80: LARGEST / 24, 82: LARGEST / 15},
    "Q3_K": {108: LARGEST / 128},
    "Q4_K": {0: LARGEST / 480, 2: LARGEST / 63},
    "Q5_K": {0: LARGEST / 992, 2: LARGEST / 63},
    "Q6_K": {208: LARGEST / 4096},
    "IQ4_NL": {0: LARGEST / 128},
    "IQ4_XS": {0: LARGEST / 4096},
    "MXFP4": {},
}


def matrix(random, kind, rows, columns):
    """Random weights, as the bytes or floats that GGUFWriter takes."""
    if kind.name in ("F32", "F16"):
        dtype = np.float32 if kind.name == "F32" else np.float16
        return (random.standard_normal((rows, columns), dtype=np.float32) * (LARGEST / 3)).astype(dtype)
    if kind.name == "BF16":
        values = random.standard_normal((rows, columns), dtype=np.float32) * np.float32(LARGEST / 3)
        return (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8).reshape(rows, -1)
    values, size = gguf.GGML_QUANT_SIZES[kind]
    blocks = random.integers(0, 256, (rows * columns // values, size), dtype=np.uint8)
    for at, value in FLOATS[kind.name].items():
        blocks[:, at : at + 2] = np.frombuffer(np.float16(value).tobytes(), np.uint8)
    if kind.name == "MXFP4":
        # An exponent: levels of up to 6 times 2^(120 - 127).
        blocks[:, 0] = 120
    return blocks.reshape(rows, -1)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--type", required=True, help="type of all matrices: f16, bf16, q4_0, q4_k, …")
    parser.add_argument("--tokenizer-of", required=True, help="GGUF file with the tokenizer")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--feed-forward", type=int, default=8192)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("file")
    arguments = parser.parse_args()

    kind = gguf.GGMLQuantizationType[arguments.type.upper()]
    source = gguf.GGUFReader(arguments.tokenizer_of)
    writer = gguf.GGUFWriter(arguments.file, "llama")
    # OpenVINO GenAI needs the number of the file's type.
    names = {"F32": "ALL_F32", "MXFP4": "MOSTLY_MXFP4_MOE"} | {f"Q{bits}_K": f"MOSTLY_Q{bits}_K_M" for bits in (3, 4, 5)}
    writer.add_file_type(gguf.LlamaFileType[names.get(kind.name, f"MOSTLY_{kind.name}")])
    writer.add_block_count(arguments.layers)
    writer.add_context_length(32768)
    writer.add_embedding_length(arguments.hidden)
    writer.add_feed_forward_length(arguments.feed_forward)
    writer.add_head_count(arguments.heads)
    writer.add_head_count_kv(arguments.kv_heads)
    writer.add_rope_freq_base(500000.0)
    writer.add_rope_dimension_count(arguments.hidden // arguments.heads)
    writer.add_layer_norm_rms_eps(1e-5)
    for key, field in source.fields.items():
        if key.startswith("tokenizer."):
            inner = field.types[1] if len(field.types) > 1 else None
            writer.add_key_value(key, field.contents(), field.types[0], sub_type=inner)
    vocabulary = len(source.fields["tokenizer.ggml.tokens"].data)
    writer.add_vocab_size(vocabulary)

    random = np.random.default_rng(0)
    hidden, width = arguments.hidden, arguments.feed_forward
    kv_width = hidden // arguments.heads * arguments.kv_heads

    def add(name, rows, columns):
        raw = None if kind.name in ("F32", "F16") else kind
        writer.add_tensor(f"{name}.weight", matrix(random, kind, rows, columns), raw_dtype=raw)

    def add_norm(name):
        writer.add_tensor(f"{name}.weight", np.ones(hidden, np.float32))

    add("token_embd", vocabulary, hidden)
    add_norm("output_norm")
    for layer in range(arguments.layers):
        block = f"blk.{layer}"
        add_norm(f"{block}.attn_norm")
        add(f"{block}.attn_q", hidden, hidden)
        add(f"{block}.attn_k", kv_width, hidden)
        add(f"{block}.attn_v", kv_width, hidden)
        add(f"{block}.attn_output", hidden, hidden)
        add_norm(f"{block}.ffn_norm")
        add(f"{block}.ffn_gate", width, hidden)
        add(f"{block}.ffn_up", width, hidden)
        add(f"{block}.ffn_down", hidden, width)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main()
