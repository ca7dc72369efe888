"""Released checkpoints of draft heads: what fits, what does not, and how they become heads of this library."""
