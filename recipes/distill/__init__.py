"""The modules of `distill_draft_lm.py`, in the order of their use: corpus, capture, batches, student, train, save."""
