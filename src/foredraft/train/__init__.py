"""Training of draft heads: the training text, the target's features at it, and one loop for every method."""
