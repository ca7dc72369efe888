"""The README's first example: the bundled pair, one prompt, and what speculation did."""

from foredraft import LLM, SamplingParams

llm = LLM()
[output] = llm.chat([{"role": "user", "content": "Name three things to bring on a walk."}], SamplingParams(max_tokens=64))
completion = output.outputs[0]
print(completion.text)
print(f"{completion.metrics.acceptance_length:.2f} tokens per step, finished by {completion.finish_reason}")
