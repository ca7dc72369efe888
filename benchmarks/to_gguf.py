"""Writes a Llama-family model as two GGUF files for llama.cpp, in bfloat16 and float16, into the model's own directory.

    python benchmarks/to_gguf.py --model DIR

The tokens are placeholders of ASCII letters, since a measurement sends and reads token ids. So llama.cpp need not know the
tokenizer of the model, and its server delivers each token at once. The tensors are those of llama.cpp's own converter: matrices
of 16 bits, norms in float32, queries and keys in the order of llama.cpp's rotary positions. The package `gguf` must be
importable.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from gguf import MODEL_ARCH, GGMLQuantizationType, GGUFWriter, LlamaFileType, TokenType, get_tensor_name_map, quants
from torch import Tensor

from foredraft.models.checkpoint import open_weights, read_config

TYPES = {
    "model-bf16.gguf": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    "model-f16.gguf": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
}
"""The files, and the type of their matrices."""


def rotary_order(weight: Tensor, heads: int) -> Tensor:
    """Moves the rows of each head from two halves, as in Transformers, to neighbouring pairs, as in llama.cpp."""
    halves = weight.unflatten(0, (heads, 2, -1))
    return halves.transpose(1, 2).reshape(weight.shape)


def describe(writer: GGUFWriter, config: Any) -> None:
    """Writes the sizes and constants of the model."""
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"t{token}" for token in range(config.vocab_size)])
    writer.add_token_scores([0.0] * config.vocab_size)
    writer.add_token_types([TokenType.NORMAL] * config.vocab_size)


def write(model: Path, file: str) -> None:
    """Writes one file."""
    config, weights = read_config(model), open_weights(model)
    stored, file_type = TYPES[file]
    writer = GGUFWriter(model / file, "llama")
    writer.add_file_type(file_type)
    describe(writer, config)
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, entry in weights.items():
        weight, part = entry.read().float(), name.split(".")[-2]
        if part in heads:
            weight = rotary_order(weight, heads[part])
        kind = stored if weight.ndim == 2 else GGMLQuantizationType.F32
        found = names.get_name(name, try_suffixes=(".weight",))
        if found is None:
            raise ValueError(f"llama.cpp has no tensor for {name}")
        writer.add_tensor(found, quants.quantize(np.ascontiguousarray(weight.numpy()), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="directory of a Llama-family model")
    given = parser.parse_args()
    for file in TYPES:
        write(given.model, file)
        print(given.model / file)


if __name__ == "__main__":
    main()
