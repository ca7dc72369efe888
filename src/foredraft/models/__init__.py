"""Targets: exact laws (`table`), our decoder for the Llama family (`llama`), any other Transformers model (`hf`)."""
