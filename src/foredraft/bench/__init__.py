"""The ruler for speed: every method on the same prompts, paired with plain decoding in the same run."""
