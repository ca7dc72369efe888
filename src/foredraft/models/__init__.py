"""Target models: exact laws (`table`), our decoder for the Llama family (`llama`), other Transformers models (`hf`)."""
