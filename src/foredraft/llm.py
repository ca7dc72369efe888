"""`LLM`, the main entry point: generates text with a target, a drafter and an acceptance rule that are named."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from pathlib import Path
from typing import Any, Unpack

import torch

from foredraft.core.arguments import takes_other_names
from foredraft.core.chat import Template, render
from foredraft.core.errors import check_count
from foredraft.core.messages import Message, conversations
from foredraft.core.output_kind import RequestOutputKind
from foredraft.core.outputs import RequestOutput
from foredraft.core.params import MAX_COUNT, SamplingParams, check_seed, used_seed
from foredraft.core.progress import progress_bar
from foredraft.core.prompts import Params, Prompt, encode, is_list, prompt_list, with_params
from foredraft.core.treatment import CHAT, LOAD, RUN
from foredraft.engine.callers import Callers
from foredraft.engine.engine import Engine
from foredraft.engine.options import EngineOptions
from foredraft.models.generation import default_params
from foredraft.models.parts import load_parts
from foredraft.plan.build import Plan, describe, make_engine
from foredraft.plan.config import parse, usual_config
from foredraft.plan.speculation import Speculation


class LLM:
    """A language model that generates faster through speculative decoding.

    With an exact acceptance rule, the output has exactly the distribution that the model has without speculation.

    The weights are read once. Overwriting the files later has no effect, and neither has changing a loaded model later.
    One exception: a loaded model outside the Llama family is run as it is, so a change takes effect at its next forward.

    Args:
        model: a directory, a Hub id, or a loaded `PreTrainedModel`. None is the bundled target with its bundled drafters.
        speculative_config: ``{"method": ..., "model": ..., "tree": ..., "num_speculative_tokens": ..., "rule": ...}`` and the
            options of the method and the tree. ``{"method": "ar"}`` drafts nothing. If ``method`` is left out, it is the
            method of the head in ``model``, and ``lm`` if ``model`` holds no head. For the bundled target, ``model``
            defaults to the bundled head. None is method ``auto`` for the bundled target. For any other target, None is
            method ``suffix``, which needs no weights. If ``tree`` or ``num_speculative_tokens`` is left out or ``"auto"``,
            the fastest value is chosen from measurements, see `foredraft.plan.choose`. A list names several; the first
            is the default, and `SamplingParams.speculative` chooses another by its ``method``.
        tokenizer: a Transformers tokenizer, or its directory or Hub id. None is the tokenizer stored with the model.
        dtype: ``auto`` (the dtype of the checkpoint), ``bfloat16``, ``float16``, ``float32`` or ``float64``.
        activations: for weights of few bits, ``bf16`` multiplies the inputs of layers as they are. ``int8`` rounds them to
            eight bits, which is faster and another function of the same weights.
        device: None is CUDA if a CUDA device is available, else the CPU.
        max_model_len: maximum length of prompt plus output, in tokens. None is the model's context. For LongRoPE, that is
            the original context, which uses the short factors. A greater value, up to ``max_position_embeddings``, selects
            the long factors for all requests.
        max_num_seqs: maximum number of outputs decoded at once; further outputs wait. None allows 8. If the number of tree
            nodes is left open, a request with a seed keeps the number that pays with `max_num_seqs` running requests, or
            with one for None.
        engine: further options of the engine, see `foredraft.engine.options.EngineOptions`: ``max_num_batched_tokens``,
            ``kv_cache_memory_bytes``, ``enable_prefix_caching``, ``max_waiting``, ``max_wait_s``.
        seed: seed for requests that set none, 0 to 2**64 - 1. -1 takes a seed from the operating system. The attribute
            `seed` holds the seed in use.
        revision: branch, tag or commit of a Hub id.
        generation_config: ``auto`` takes defaults from the model's ``generation_config.json``. ``none`` ignores that file,
            including its end-of-sequence tokens, so that those of ``config.json`` apply. A directory is read in its place.

    Other names of vLLM and Transformers are accepted, ignored or refused; `foredraft.core.names` lists them.

    Raises:
        ValueError: something cannot be loaded, or the parts do not fit together. The message says what to do.
        TypeError: an argument is unknown, or belongs to another library and has no meaning here.
    """

    @takes_other_names(LOAD, EngineOptions.__annotations__)
    def __init__(
        self,
        model: Any = None,
        speculative_config: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
        *,
        tokenizer: Any = None,
        dtype: str | torch.dtype = "auto",
        activations: str = "bf16",
        device: str | torch.device | None = None,
        max_model_len: int | None = None,
        max_num_seqs: int | None = None,
        seed: int = 0,
        revision: str | None = None,
        generation_config: str | Path = "auto",
        **engine: Any,
    ):
        self._options = EngineOptions(max_num_seqs=max_num_seqs, **engine)
        max_model_len = check_count("max_model_len", max_model_len, MAX_COUNT, "no model's context is longer")
        self.seed = used_seed(check_seed(seed))
        speculations = _parsed(speculative_config, bundled=model is None)
        how = {"generation_config": generation_config, "activations": activations}
        self._parts = load_parts(model, tokenizer, dtype, device, max_model_len, revision, **how)
        self.target, self.tokenizer = self._parts.target, self._parts.tokenizer
        self.eos_ids, self.max_model_len = self._parts.eos_ids, self._parts.max_model_len
        self.max_num_seqs, self._fixed_load = self._options.num_seqs, self._options.max_num_seqs or 1
        self._speculate(speculations)

    def with_speculation(self, speculative_config: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None) -> LLM:
        """Returns another `LLM` on the same weights with a different speculative config.

        All of them share a draft model, which is loaded once.

        Raises:
            ValueError: the config is invalid.
        """
        other = copy(self)
        other._speculate(_parsed(speculative_config, bundled=self._parts.is_bundled))
        return other

    def _speculate(self, speculations: Sequence[Speculation | None]) -> None:
        self.speculation = speculations[0]
        self._plans = [
            Plan(self._parts, speculation, self._fixed_load) if speculation else None for speculation in speculations
        ]
        self.plan = self._plans[0]
        self.choices = self.plan.choices if self.plan else {}
        self.engine = self.new_engine()
        self._callers = Callers(self.engine)

    def new_engine(self) -> Engine:
        """Builds another engine on the same weights. It drafts like `engine`, and shares no requests and no memory with it."""
        others = [plan for plan in self._plans[1:] if plan]
        return make_engine(self._parts, self.plan, self._options, seed=self.seed, others=others)

    def drafting(self, sampling: SamplingParams | None = None) -> dict[str, Any]:
        """Tells how a request is drafted, and why if that was chosen automatically.

        Args:
            sampling: parameters of the request. None is `get_default_sampling_params`.

        Returns:
            ``method``, ``tree``, ``budget`` (number of nodes; 0 means plain decoding) and ``rule``. An automatic choice adds
            ``expected_speedup`` over plain decoding, ``timed_on`` (a date) and ``reason`` (one line). Otherwise these three
            are None.
        """
        return describe(self.plan, sampling or self.get_default_sampling_params())

    def get_default_sampling_params(self) -> SamplingParams:
        """Returns the sampling parameters of the model's ``generation_config.json``.

        ``max_length`` and ``min_length`` are not included, because they depend on the prompt. They apply when `generate` is
        called without parameters.
        """
        return default_params(self._parts.defaults)

    def default_params_for(
        self, prompt: Prompt, given: Mapping[str, Any] | None = None, *, max_tokens: int | None = None
    ) -> SamplingParams:
        """Returns the default sampling parameters for one prompt, including the length limits of the file.

        Args:
            given: values that override the file.
            max_tokens: the limit to use if neither the file nor `given` sets one.

        Raises:
            ValueError: the prompt fills the whole context, or a value is not allowed.
        """
        return default_params(self._parts.defaults, len(encode(prompt, self.tokenizer)[1]), given, max_tokens=max_tokens)

    def get_tokenizer(self) -> Any:
        """Returns the Transformers tokenizer, or None if the model has none. Prompts must then be token ids."""
        return getattr(self.tokenizer, "whole", self.tokenizer)

    @takes_other_names(RUN)
    def generate(
        self, prompts: Prompt | Sequence[Prompt], sampling_params: Params = None, *, progress: bool = False
    ) -> list[RequestOutput]:
        """Generates outputs for one prompt or a list of prompts.

        Prompts are decoded as a batch. Each output is the same as if its prompt were decoded alone. The model continues a
        text exactly as given. To put messages into the format of a chat model, use `chat`.

        Args:
            prompts: one prompt or a list of prompts.
            sampling_params: one for all prompts, or one per prompt. None is `get_default_sampling_params`.
            progress: show a progress bar after two seconds.

        Returns:
            One output per prompt, in the order of the prompts. An output that failed has ``finish_reason="error"`` and the
            reason in `error`.

        Raises:
            ValueError: a prompt or its parameters are invalid. Nothing has been generated in this case.
            Exception: Python code raised in every request, such as a tokenizer; the exception is that of the first.
        """
        given = self._checked(prompt_list(prompts), sampling_params, RequestOutputKind.FINAL_ONLY)
        total = sum(sampling.n for _, sampling in given)
        with progress_bar("generating", total, shown=progress) as advance:
            outputs = {}
            for index, output in self._callers.run(given):
                outputs[index] = output
                advance(len(output.outputs))
        return [outputs[index] for index in range(len(given))]

    @takes_other_names(RUN)
    def stream(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> Iterator[RequestOutput]:
        """Generates for one prompt. Yields the output so far after every step; the last output is complete.

        While the consumer pauses, other threads may run steps for it. It then gets the newest output, and not those between.

        Raises:
            ValueError: as in `generate`.
        """
        given = self._checked([prompt], sampling_params, RequestOutputKind.CUMULATIVE)
        return (output for _, output in self._callers.run(given))

    @takes_other_names(CHAT, Template.__annotations__)
    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: Params = None,
        *,
        progress: bool = False,
        **template: Unpack[Template],
    ) -> list[RequestOutput]:
        """Answers one conversation or a list of conversations: renders the model's chat template, then calls `generate`.

        Args:
            messages: ``[{"role": "user", "content": "..."}, ...]``, or a list of such conversations. ``content`` may also be
                a list of text parts, ``[{"type": "text", "text": "..."}]``.
            sampling_params: one for all conversations, or one per conversation. None is `get_default_sampling_params`.
            progress: as in `generate`.
            template: see `foredraft.core.chat.Template`.

        Raises:
            ValueError: the model has no chat template, or the template cannot render the messages or the tools.
            TypeError: the messages are not a conversation.
        """
        prompts = [self.chat_prompt(conversation, **template) for conversation in conversations(messages)]
        return self.generate(prompts, sampling_params, progress=progress)

    @takes_other_names(CHAT, Template.__annotations__)
    def chat_prompt(self, messages: Sequence[Message], **template: Unpack[Template]) -> dict[str, Any]:
        """Renders a conversation as a prompt, see `chat`. The template writes the special tokens, so none are added."""
        text = render(self.tokenizer, messages, template)
        return {"prompt": text, "prompt_token_ids": self.tokenizer(text, add_special_tokens=False)["input_ids"]}

    def _checked(
        self, prompts: Sequence[Prompt], sampling_params: Params, kind: RequestOutputKind
    ) -> list[tuple[Any, SamplingParams]]:
        pairs = with_params(prompts, sampling_params, self.default_params_for)
        return [(self.engine.checked(prompt, sampling), sampling.giving(kind)) for prompt, sampling in pairs]

    def drafter_grown_by(self, grower: Any) -> Any:
        """Builds the config's drafter again with another grower. For a ``-lookup`` method, builds its fallback drafter."""
        assert self.plan is not None and self.speculation is not None
        return self.plan.grown_by(grower, self.speculation.calibrated)

    def measured(self, speculation: Speculation) -> dict[str, Any]:
        """Reads the calibration of a config's drafter, see `foredraft.plan.store.read_calibration`."""
        return Plan(self._parts, speculation, self._fixed_load).measured()


def _parsed(given: Any, *, bundled: bool) -> list[Speculation | None]:
    """Returns what the configs mean, the default first."""
    configs = given if is_list(given) and given else [given]
    return [parse(usual_config(config, bundled=bundled)) for config in configs]
