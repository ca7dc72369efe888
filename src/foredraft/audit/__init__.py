"""The certificate: whether what a model, drafter, tree and rule emit has the law of plain decoding, computed where it can be
and tested where it cannot."""
