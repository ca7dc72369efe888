"""Generates for a batch of prompts, with different sampling parameters for each, and prints the steps of each output."""

from foredraft import LLM, SamplingParams

llm = LLM(max_num_seqs=4)
prompts = ["The train was late,", "Once upon a time there was a fox who", "import numpy as np\n"]
sampling = [
    SamplingParams(temperature=0.8, n=2, max_tokens=24, seed=1),  # two outputs that share one pass over the prompt
    SamplingParams(temperature=0, max_tokens=48, stop=["."]),  # ends before the first full stop
    SamplingParams(temperature=0.7, top_p=0.9, max_tokens=32, logprobs=1),
]
for request in llm.generate(prompts, sampling):
    for output in request.outputs:
        steps = f"{output.metrics.num_steps} steps for {len(output.token_ids)} tokens"
        print(f"{request.prompt!r} -> {output.text!r} ({output.finish_reason}, {steps})")
