"""Key-value caches of requests."""
