"""Benchmarks of speed. All methods run on the same prompts, and are compared with plain decoding in the same run."""
