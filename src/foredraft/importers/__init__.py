"""Released checkpoints of draft heads: examines them, and converts them to heads of this library."""
