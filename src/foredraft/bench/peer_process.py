"""Runs another engine for the benchmark, in a process of its own. It needs torch, transformers or vllm, but not foredraft.

    python peer_process.py KIND MODEL [DRAFT_MODEL] DTYPE DEVICE MAX_LEN

KIND is transformers, transformers-assisted or vllm. Reads one JSON object a line from standard input:

    {"prompts": [[ids]], "max_tokens": n, "temperature": t, "top_p": p, "eos": [ids], "seed": s, "setting": {...} | null}

and answers each with ``{"seconds": s, "token_ids": [[ids]]}``. The first answer, to no question, is ``{"settings": [{...}]}``:
the settings worth trying, of which the caller keeps the fastest.
"""

from __future__ import annotations

import json
import os
import sys
from itertools import product
from time import perf_counter
from typing import Any


class Transformers:
    """`generate` of Transformers, plain or with an assistant."""

    def __init__(self, model: str, draft_model: str | None, dtype: str, device: str, max_len: int):
        import torch
        from transformers import AutoModelForCausalLM

        self._torch, self._device = torch, device
        load: dict[str, Any] = {"dtype": getattr(torch, dtype), "local_files_only": True}
        auto: Any = AutoModelForCausalLM
        self._model = auto.from_pretrained(model, **load).to(device).eval()
        self._assistant = auto.from_pretrained(draft_model, **load).to(device).eval() if draft_model else None

    @property
    def settings(self) -> list[dict[str, Any]]:
        """Numbers of threads; for the assistant also how many tokens it drafts, fixed or by its confidence."""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        threads = sorted({1, max(1, cores // 2), cores}) if self._device == "cpu" else [cores]
        if self._assistant is None:
            return [{"threads": one} for one in threads]
        ways = [(3, 0.0), (5, 0.0), (8, 0.0), (20, 0.4)]
        return [{"threads": one, "num_assistant_tokens": k, "confidence": c} for one, (k, c) in product(threads, ways)]

    def run(self, ask: dict[str, Any]) -> list[list[int]]:
        """The outputs' token ids."""
        torch, setting = self._torch, ask["setting"]
        torch.set_num_threads(setting["threads"])
        longest = max(map(len, ask["prompts"]))
        ids = torch.tensor([[0] * (longest - len(one)) + one for one in ask["prompts"]], device=self._device)
        mask = torch.tensor([[0] * (longest - len(one)) + [1] * len(one) for one in ask["prompts"]], device=self._device)
        options: dict[str, Any] = {"do_sample": ask["temperature"] > 0}
        if ask["temperature"] > 0:
            torch.manual_seed(ask["seed"])
            options |= {"temperature": ask["temperature"], "top_p": ask["top_p"], "top_k": 0}
        if self._assistant is not None:
            config = self._assistant.generation_config
            config.num_assistant_tokens = setting["num_assistant_tokens"]
            config.num_assistant_tokens_schedule = "constant"
            config.assistant_confidence_threshold = setting["confidence"]
            options["assistant_model"] = self._assistant
        with torch.inference_mode():
            out = self._model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=ask["max_tokens"],
                eos_token_id=ask["eos"] or None,
                pad_token_id=0,
                **options,
            )
        return [_cut(one, ask["eos"]) for one in out[:, longest:].tolist()]


class VLLM:
    """vLLM's offline `LLM`."""

    def __init__(self, model: str, draft_model: str | None, dtype: str, device: str, max_len: int):
        import vllm  # pyright: ignore[reportMissingImports]

        self._vllm = vllm
        self._llm = vllm.LLM(model, dtype=dtype, max_model_len=max_len, enable_prefix_caching=False, disable_log_stats=True)

    @property
    def settings(self) -> list[dict[str, Any]]:
        """It binds its own threads."""
        return [{}]

    def run(self, ask: dict[str, Any]) -> list[list[int]]:
        """The outputs' token ids."""
        sampling = self._vllm.SamplingParams(
            temperature=ask["temperature"],
            top_p=ask["top_p"],
            max_tokens=ask["max_tokens"],
            stop_token_ids=ask["eos"],
            seed=ask["seed"],
        )
        prompts = [{"prompt_token_ids": one} for one in ask["prompts"]]
        return [list(one.outputs[0].token_ids) for one in self._llm.generate(prompts, sampling, use_tqdm=False)]


def _cut(token_ids: list[int], eos: list[int]) -> list[int]:
    """Without what a batch pads after an end of sequence."""
    ends = [i for i, token in enumerate(token_ids) if token in eos]
    return token_ids[: ends[0] + 1] if ends else token_ids


def main() -> None:
    """Answers until standard input ends."""
    kind, model, draft_model, dtype, device, max_len = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever the engine prints must not mix with the answers
    peer = (VLLM if kind == "vllm" else Transformers)(model, draft_model or None, dtype, device, int(max_len))
    print(json.dumps({"settings": peer.settings}), file=answers)
    for line in sys.stdin:
        ask = json.loads(line)
        began = perf_counter()
        token_ids = peer.run(ask)
        if device != "cpu":
            import torch

            torch.cuda.synchronize()
        print(json.dumps({"seconds": perf_counter() - began, "token_ids": token_ids}), file=answers)


if __name__ == "__main__":
    main()
