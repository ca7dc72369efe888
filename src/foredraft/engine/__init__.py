"""Requests, and the loop that serves them."""
