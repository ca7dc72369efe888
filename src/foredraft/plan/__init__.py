"""What a `speculative_config` means, and which way of drafting pays."""
