"""The first example of the README: generates for one prompt with the bundled model and its FSPAD head."""

from foredraft import LLM, SamplingParams

llm = LLM(speculative_config={"method": "fspad", "tree": "dyspec", "num_speculative_tokens": 8})
messages = [{"role": "user", "content": "Write a Python function that reverses a string."}]
[output] = llm.chat(messages, SamplingParams(temperature=0, max_tokens=64, stop=["\n\n"]))
print(output.outputs[0].text)
print(f"{len(output.outputs[0].token_ids)} tokens in {output.metrics.num_steps} steps")
