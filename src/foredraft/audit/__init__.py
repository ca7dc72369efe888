"""Audits a model, drafter, tree and rule: does their output have the law of plain decoding?

The law is computed exactly on small vocabularies, and tested statistically on the real models.
"""
