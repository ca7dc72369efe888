"""Runs another engine for the benchmark, in a separate process. It needs torch, transformers or vllm, but not foredraft.

    python peer_process.py KIND MODEL [DRAFT_MODEL] DTYPE DEVICE MAX_LEN

KIND is one of KINDS. Reads one JSON object a line from standard input:

    {"prompts": [[ids]], "max_tokens": n, "temperature": t, "top_p": p, "eos": [ids], "seed": s, "setting": {...} | null}

and answers each with ``{"seconds": s, "token_ids": [[ids]]}``. Before the first question it prints ``{"settings": [{...}]}``,
the settings to try. The caller keeps the fastest of them.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Mapping
from functools import partial
from itertools import product
from pathlib import Path
from time import perf_counter
from typing import Any

NGRAM = {"num_speculative_tokens": 4, "prompt_lookup_min": 2, "prompt_lookup_max": 4}
"""Settings of vLLM's n-gram drafts, fixed when it starts. Without a minimum, vLLM ignores matches shorter than the maximum."""

_COMPILERS = ("g++", "c++", "clang++")
_KV_CACHE_GIB = "2"
"""Size of vLLM's KV cache. By default vLLM takes 92 % of the memory, and fails to start if other processes hold some of it."""


class Transformers:
    """Transformers' `generate`, plain or with an assistant."""

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
        """Settings to try: numbers of threads and, for the assistant, numbers of draft tokens and confidence thresholds."""
        counts = _thread_counts() if self._device == "cpu" else [_cores()]
        if self._assistant is None:
            return [{"threads": threads} for threads in counts]
        lengths = [(3, 0.0), (5, 0.0), (8, 0.0), (20, 0.4)]
        return [
            {"threads": threads, "num_assistant_tokens": k, "confidence": c} for threads, (k, c) in product(counts, lengths)
        ]

    def run(self, ask: dict[str, Any]) -> list[list[int]]:
        """Generates, and returns the token ids of the outputs."""
        torch, setting = self._torch, ask["setting"]
        torch.set_num_threads(setting["threads"])
        longest = max(map(len, ask["prompts"]))
        ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in ask["prompts"]], device=self._device)
        rows = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in ask["prompts"]]
        mask = torch.tensor(rows, device=self._device)
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
        return [_cut(token_ids, ask["eos"]) for token_ids in out[:, longest:].tolist()]


class VLLM:
    """vLLM's offline `LLM`, plain or with its own n-gram drafts. On a CPU it needs the variables of `vllm_environment`."""

    def __init__(
        self, model: str, draft_model: str | None, dtype: str, device: str, max_len: int, *, ngram: dict[str, int] | None = None
    ):
        import torch
        import vllm  # pyright: ignore[reportMissingImports]
        from vllm.platforms import current_platform  # pyright: ignore[reportMissingImports]

        built_for = current_platform.device_type
        if built_for != device.split(":")[0]:
            raise ValueError(f"this vLLM is built for {built_for!r}, but the benchmark runs on {device!r}")
        self._vllm, self._device, self._ngram = vllm, device, ngram or {}
        self._set_num_threads = torch.set_num_threads  # vLLM later replaces it with a function that does nothing
        self._compiled = device != "cpu" or any(map(shutil.which, _COMPILERS))
        options: dict[str, Any] = {"speculative_config": {"method": "ngram", **ngram}} if ngram else {}
        self._llm = vllm.LLM(
            model,
            dtype=dtype,
            max_model_len=max_len,
            enforce_eager=not self._compiled,
            enable_prefix_caching=False,  # else prompts of the tuning or of other batches would cost nothing
            skip_tokenizer_init=True,  # token ids go in and out
            disable_log_stats=True,
            **options,
        )

    @property
    def settings(self) -> list[dict[str, Any]]:
        """The only setting. On a CPU it has all cores from its start: to change their number in between would make it slow.

        With 14M parameters on two cores, compiled code is faster than eager code. One process is faster than vLLM's default of
        three, which pass on every step and leave one core for the work.
        """
        fixed = {"compiled": self._compiled, "prefix_caching": False, **self._ngram, "version": self._vllm.__version__}
        if self._device != "cpu":
            return [fixed]
        fixed |= {"processes": 1, "openmp": "intel" if "libiomp" in os.environ.get("LD_PRELOAD", "") else "gnu"}
        return [{"threads": _cores(), **fixed}]

    def run(self, ask: dict[str, Any]) -> list[list[int]]:
        """Generates, and returns the token ids of the outputs."""
        if "threads" in ask["setting"]:
            self._set_num_threads(ask["setting"]["threads"])
        sampling = self._vllm.SamplingParams(
            temperature=ask["temperature"],
            top_p=ask["top_p"],
            max_tokens=ask["max_tokens"],
            stop_token_ids=ask["eos"],
            ignore_eos=not ask["eos"],  # vLLM also reads end-of-sequence tokens from the model's directory
            detokenize=False,
            seed=ask["seed"],
        )
        prompts = [{"prompt_token_ids": token_ids} for token_ids in ask["prompts"]]
        results = self._llm.generate(prompts, sampling, use_tqdm=False)
        return [list(result.outputs[0].token_ids) for result in results]


KINDS: dict[str, Any] = {
    "transformers": Transformers,
    "transformers-assisted": Transformers,
    "vllm": VLLM,
    "vllm-ngram": partial(VLLM, ngram=NGRAM),
}


def vllm_environment(given: Mapping[str, str], prefix: str) -> dict[str, str]:
    """Returns the environment variables for vLLM on a CPU.

    The user's values in `given` win, except for a few variables that the benchmark needs. vLLM starts with all threads, because
    their number is chosen later. The threads are not bound to cores, like those of all other methods. vLLM's documentation
    advises Intel's OpenMP, which its CPU build contains under `prefix`. Idle threads wait as long as in vLLM's own processes.
    The documentation also advises tcmalloc, which the build lacks: set LD_PRELOAD to use it.
    """
    preload, intel = given.get("LD_PRELOAD", ""), Path(prefix, "lib", "libiomp5.so")
    if intel.is_file() and "libiomp" not in preload:
        preload = f"{preload}:{intel}".lstrip(":")
    free = {"VLLM_CPU_KVCACHE_SPACE": _KV_CACHE_GIB, "KMP_BLOCKTIME": "5", "KMP_TPAUSE": "0", "VLLM_NO_USAGE_STATS": "1"}
    fixed = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_NUM_THREADS": str(_cores()), "HF_HUB_OFFLINE": "1"}
    return {**free, **given, **fixed, **({"LD_PRELOAD": preload} if preload else {})}


def _enter(environment: dict[str, str]) -> None:
    """Restarts this process with the environment, since OpenMP and the loader read it only once."""
    if environment != dict(os.environ):
        os.execve(sys.executable, [sys.executable, *sys.argv], environment)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _thread_counts() -> list[int]:
    """Returns the numbers of threads to try: 1, half of the cores, and all cores."""
    return sorted({1, max(1, _cores() // 2), _cores()})


def _cut(token_ids: list[int], eos: list[int]) -> list[int]:
    """Cuts an output after its end of sequence, where a batch is padded."""
    ends = [i for i, token in enumerate(token_ids) if token in eos]
    return token_ids[: ends[0] + 1] if ends else token_ids


def main() -> None:
    """Answers questions until standard input ends."""
    kind, model, draft_model, dtype, device, max_len = sys.argv[1:]
    if kind.startswith("vllm") and device == "cpu":
        _enter(vllm_environment(os.environ, sys.prefix))
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # the engine's own output must not mix with the answers
    peer = KINDS[kind](model, draft_model or None, dtype, device, int(max_len))
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
