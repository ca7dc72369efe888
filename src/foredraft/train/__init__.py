"""Training draft heads: text that the target wrote, its features, one loop for every method."""
