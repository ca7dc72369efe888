"""The parts of `distill_draft_lm.py`, in the order in which it uses them: corpus, capture, batches, student, train, save."""
