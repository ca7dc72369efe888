"""foredraft."""
