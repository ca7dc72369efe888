"""Runs another engine for the benchmark, in a process of its own. It needs torch, transformers or vllm, but not foredraft.

    python peer_process.py KIND MODEL [DRAFT_MODEL] DTYPE DEVICE MAX_LEN

KIND is one of KINDS. Reads one JSON object a line from standard input:

    {"prompts": [[ids]], "max_tokens": n, "temperature": t, "top_p": p, "eos": [ids], "seed": s, "setting": {...} | null}

and answers each with ``{"seconds": s, "token_ids": [[ids]]}``. The first answer, to no question, is ``{"settings": [{...}]}``:
the settings worth trying, of which the caller keeps the fastest.
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
"""vLLM takes them only when it starts. Without a minimum it would find no match shorter than the longest."""

_COMPILERS = ("g++", "c++", "clang++")
_KV_CACHE_GIB = "2"
"""Else vLLM takes 92 % of the memory, and does not start where others hold some."""


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
        threads = _thread_counts() if self._device == "cpu" else [_cores()]
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
    """vLLM's offline `LLM`, plain or with its own n-gram drafts. On a CPU it runs in the environment of `vllm_environment`."""

    def __init__(
        self, model: str, draft_model: str | None, dtype: str, device: str, max_len: int, *, ngram: dict[str, int] | None = None
    ):
        import torch
        import vllm  # pyright: ignore[reportMissingImports]
        from vllm.platforms import current_platform  # pyright: ignore[reportMissingImports]

        built_for = current_platform.device_type
        if built_for != device.split(":")[0]:
            raise ValueError(f"this vLLM is built for {built_for!r}, the benchmark runs on {device!r}")
        self._vllm, self._device, self._ngram = vllm, device, ngram or {}
        self._set_num_threads = torch.set_num_threads  # vLLM puts a function that does nothing in its place
        self._compiled = device != "cpu" or any(map(shutil.which, _COMPILERS))
        options: dict[str, Any] = {"speculative_config": {"method": "ngram", **ngram}} if ngram else {}
        self._llm = vllm.LLM(
            model,
            dtype=dtype,
            max_model_len=max_len,
            enforce_eager=not self._compiled,
            enable_prefix_caching=False,  # the tuning and the other batches must not make a prompt free
            skip_tokenizer_init=True,  # token ids go in and out
            disable_log_stats=True,
            **options,
        )

    @property
    def settings(self) -> list[dict[str, Any]]:
        """On a CPU the numbers of threads; the rest is fixed when it starts, and reported.

        Measured with 14M parameters on two cores: compiled is faster than eager, and one process faster than vLLM's default of
        three, which hand every step on and leave one core to the work.
        """
        fixed = {"compiled": self._compiled, "prefix_caching": False, **self._ngram, "version": self._vllm.__version__}
        if self._device != "cpu":
            return [fixed]
        fixed |= {"processes": 1, "openmp": "intel" if "libiomp" in os.environ.get("LD_PRELOAD", "") else "gnu"}
        return [{"threads": one, **fixed} for one in _thread_counts()]

    def run(self, ask: dict[str, Any]) -> list[list[int]]:
        """The outputs' token ids."""
        if "threads" in ask["setting"]:
            self._set_num_threads(ask["setting"]["threads"])
        sampling = self._vllm.SamplingParams(
            temperature=ask["temperature"],
            top_p=ask["top_p"],
            max_tokens=ask["max_tokens"],
            stop_token_ids=ask["eos"],
            ignore_eos=not ask["eos"],  # vLLM also reads ends of sequence from the model's directory
            detokenize=False,
            seed=ask["seed"],
        )
        prompts = [{"prompt_token_ids": one} for one in ask["prompts"]]
        return [list(one.outputs[0].token_ids) for one in self._llm.generate(prompts, sampling, use_tqdm=False)]


KINDS: dict[str, Any] = {
    "transformers": Transformers,
    "transformers-assisted": Transformers,
    "vllm": VLLM,
    "vllm-ngram": partial(VLLM, ngram=NGRAM),
}


def vllm_environment(given: Mapping[str, str], prefix: str) -> dict[str, str]:
    """The environment variables for vLLM on a CPU. `given` is kept where a user may know better.

    It starts with all threads, since their number is chosen later; they are not bound to cores, as no other method's are.
    Intel's OpenMP, which comes with vLLM's CPU build under `prefix`, is what its documentation advises; its threads wait as
    long as vLLM lets those of its own processes wait. For tcmalloc, also advised, but not in the build, set LD_PRELOAD.
    """
    preload, intel = given.get("LD_PRELOAD", ""), Path(prefix, "lib", "libiomp5.so")
    if intel.is_file() and "libiomp" not in preload:
        preload = f"{preload}:{intel}".lstrip(":")
    free = {"VLLM_CPU_KVCACHE_SPACE": _KV_CACHE_GIB, "KMP_BLOCKTIME": "5", "KMP_TPAUSE": "0", "VLLM_NO_USAGE_STATS": "1"}
    fixed = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_NUM_THREADS": str(_cores()), "HF_HUB_OFFLINE": "1"}
    return {**free, **given, **fixed, **({"LD_PRELOAD": preload} if preload else {})}


def _enter(environment: dict[str, str]) -> None:
    """Starts this process anew: OpenMP and the loader read the environment only once."""
    if environment != dict(os.environ):
        os.execve(sys.executable, [sys.executable, *sys.argv], environment)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _thread_counts() -> list[int]:
    """Those worth trying."""
    return sorted({1, max(1, _cores() // 2), _cores()})


def _cut(token_ids: list[int], eos: list[int]) -> list[int]:
    """Without what a batch pads after an end of sequence."""
    ends = [i for i, token in enumerate(token_ids) if token in eos]
    return token_ids[: ends[0] + 1] if ends else token_ids


def main() -> None:
    """Answers until standard input ends."""
    kind, model, draft_model, dtype, device, max_len = sys.argv[1:]
    if kind.startswith("vllm") and device == "cpu":
        _enter(vllm_environment(os.environ, sys.prefix))
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever the engine prints must not mix with the answers
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
