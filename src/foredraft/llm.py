"""`LLM`, the main entry point: loads a target, a drafter and an acceptance rule by name, and generates text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from functools import cache
from numbers import Integral
from pathlib import Path
from typing import Any, Unpack

import torch

from foredraft.cache.pool import check_pool
from foredraft.core.arguments import takes_other_names
from foredraft.core.chat import Message, Template, conversations, render
from foredraft.core.contracts import Setting
from foredraft.core.errors import plain_scalar, shown, whole_number
from foredraft.core.folders import BUNDLED as BUNDLED
from foredraft.core.folders import BUNDLED_HEAD as BUNDLED_HEAD
from foredraft.core.folders import BUNDLED_LM as BUNDLED_LM
from foredraft.core.folders import BUNDLED_TARGET as BUNDLED_TARGET
from foredraft.core.names import CHAT, LOAD, RUN
from foredraft.core.params import MAX_COUNT, SamplingParams, check_seed, used_seed
from foredraft.core.progress import progress_bar
from foredraft.core.prompts import Prompt, encode, is_list, is_one_prompt, not_a_prompt
from foredraft.core.shape import MAX_DEPTH, Budget
from foredraft.drafters import DRAFTERS
from foredraft.drafters.mixed import MixedDrafter
from foredraft.engine.engine import Engine, Request, RequestOutput
from foredraft.models.checkpoint import ModelError
from foredraft.models.generation import checked, default_params
from foredraft.models.loading import fingerprint_of, load_generation_config, load_target, load_tokenizer
from foredraft.models.rope import why_not_longer
from foredraft.models.tokenizer import refuse_misfit
from foredraft.plan.choose import Choice, Chooser
from foredraft.plan.config import PLAIN, Speculation, Way, parse, usual_config
from foredraft.plan.measure import sample_prompt
from foredraft.plan.store import read_calibration
from foredraft.rules.multiround import for_sampled
from foredraft.trees.base import ByTemperature

DEFAULT_NUM_SEQS = 8

MAX_NUM_SEQS = 4096
"""Upper limit of `max_num_seqs`. Every cache reserves a slot for each of them from the start, even if it stays unused."""

_REASONS = ("expected_speedup", "timed_on", "reason")


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
            the fastest value is chosen from measurements, see `foredraft.plan.choose`.
        tokenizer: a Transformers tokenizer, or its directory or Hub id. None is the tokenizer stored with the model.
        dtype: ``auto`` (the dtype of the checkpoint), ``bfloat16``, ``float16``, ``float32`` or ``float64``.
        device: None is CUDA if a CUDA device is available, else the CPU.
        max_model_len: maximum length of prompt plus output, in tokens. None is the model's context. For LongRoPE, that is
            the original context, which uses the short factors. A greater value, up to ``max_position_embeddings``, selects
            the long factors for all requests.
        max_num_seqs: maximum number of outputs decoded at once; further outputs wait. An automatic choice of the tree
            assumes this batch size. None allows 8, and the automatic choice then assumes a batch of 1.
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

    @takes_other_names(LOAD)
    def __init__(
        self,
        model: Any = None,
        speculative_config: Mapping[str, Any] | None = None,
        *,
        tokenizer: Any = None,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device | None = None,
        max_model_len: int | None = None,
        max_num_seqs: int | None = None,
        seed: int = 0,
        revision: str | None = None,
        generation_config: str | Path = "auto",
    ):
        if max_num_seqs is not None:
            max_num_seqs = _check_count("max_num_seqs", max_num_seqs, MAX_NUM_SEQS, "more prompts wait for their turn")
        if max_model_len is not None:
            max_model_len = _check_count("max_model_len", max_model_len, MAX_COUNT, "no model's context is longer")
        self.seed = used_seed(check_seed(seed))
        self._bundled = model is None
        if self._bundled:
            model = BUNDLED_TARGET
        speculation = parse(usual_config(speculative_config, bundled=self._bundled))
        self.target: Any = load_target(model, dtype=dtype, device=device, revision=revision, max_len=max_model_len)
        self.tokenizer = load_tokenizer(model, revision=revision) if tokenizer is None else _given_tokenizer(tokenizer)
        refuse_misfit(self.tokenizer, self.target.vocab_size)
        size = self.target.vocab_size
        self._defaults = load_generation_config(model, revision, choice=generation_config, vocab_size=size)
        self.eos_ids: list[int] = self._defaults.pop("eos_token_id")
        checked(self._defaults)
        self.max_model_len = self._context(max_model_len)
        self.max_num_seqs = max_num_seqs or DEFAULT_NUM_SEQS
        check_pool(self.target, self.max_num_seqs)
        self._usual_num_seqs = max_num_seqs or 1
        self._draft_models: dict[str, Any] = {}
        fingerprint = fingerprint_of(model, revision)  # taken now, so that it describes the weights just read
        self._fingerprint = lambda: fingerprint
        self._fingerprint_of = cache(fingerprint_of)
        self._speculate(speculation)

    def with_speculation(self, speculative_config: Mapping[str, Any] | None) -> LLM:
        """Returns another `LLM` on the same weights with a different speculative config.

        All of them share a draft model, which is loaded once.

        Raises:
            ValueError: the config is invalid.
        """
        other = copy(self)
        other._speculate(parse(usual_config(speculative_config, bundled=self._bundled)))
        return other

    def _speculate(self, speculation: Speculation | None) -> None:
        """Builds the engine. First chooses from measurements whatever the config leaves open."""
        self.speculation = speculation
        self.choices: dict[str, Choice] = {}
        drafter, rule, budget, nodes = None, None, None, {"greedy": 0, "sampled": 0}
        if speculation is not None and speculation.is_open:
            self.choices = self._choose(speculation)
        if speculation is not None and (not self.choices or any(choice.nodes for choice in self.choices.values())):
            nodes = {kind: self._nodes(speculation, kind) for kind in nodes}
            ways = {kind: self._way(speculation, kind) for kind in nodes if nodes[kind]}
            ways = {kind: ways.get(kind) or next(iter(ways.values())) for kind in nodes}  # an unused kind borrows a way
            budget = Budget(max(nodes.values()), min(max(nodes.values()), MAX_DEPTH))
            rule = speculation.rule_for(ways["sampled"].tree)
            if ways["sampled"] != ways["greedy"] and speculation.rule_name is None:
                rule = for_sampled(rule)
            drafter = self._drafter(speculation, ways["greedy"], ways["sampled"])
        self.engine = Engine(
            self.target,
            tokenizer=self.tokenizer,
            drafter=drafter,
            rule=rule,
            budget=budget,
            max_nodes=lambda sampling: nodes["sampled" if sampling.temperature > 0 else "greedy"],
            max_model_len=self.max_model_len,
            max_num_seqs=self.max_num_seqs,
            seed=self.seed,
            eos_ids=self.eos_ids,
        )

    def drafting(self, sampling: SamplingParams | None = None) -> dict[str, Any]:
        """Tells how a request is drafted, and why if that was chosen automatically.

        Args:
            sampling: parameters of the request. None is `get_default_sampling_params`.

        Returns:
            ``method``, ``tree``, ``budget`` (number of nodes; 0 means plain decoding) and ``rule``. An automatic choice adds
            ``expected_speedup`` over plain decoding, ``timed_on`` (a date) and ``reason`` (one line). Otherwise these three
            are None.
        """
        speculation = self.speculation
        if speculation is None:
            return {"method": PLAIN, "tree": None, "budget": None, "rule": None} | dict.fromkeys(_REASONS)
        kind = "sampled" if (sampling or self.get_default_sampling_params()).temperature > 0 else "greedy"
        way, choice = self._way(speculation, kind), self.choices.get(kind)
        rule = speculation.rule_name_for(way.tree)
        reasons = (choice.speedup, choice.timed_on, choice.reason) if choice else (None, None, None)
        drafting = {"method": way.drafter, "tree": way.tree, "budget": self._nodes(speculation, kind), "rule": rule}
        return drafting | dict(zip(_REASONS, reasons, strict=True))

    def _way(self, speculation: Speculation, kind: str) -> Way:
        return self.choices[kind].way if self.choices else Way(speculation.drafter, speculation.tree)

    def _nodes(self, speculation: Speculation, kind: str) -> int:
        return speculation.budget.nodes if speculation.budget else self.choices[kind].nodes

    def _choose(self, speculation: Speculation) -> dict[str, Choice]:
        """Chooses how greedy and sampled requests are drafted. Steps are timed on this machine and kept in the user's cache."""
        chooser = Chooser(
            target=self.target,
            speculation=speculation,
            has_model=self.draft_source is not None,
            build=lambda way: self._drafter(speculation, way, way),
            measured=self.measured(speculation),
            num_seqs=self._usual_num_seqs,
            prompt=sample_prompt(self.tokenizer, self.target.vocab_size, self.max_model_len),
            weights=[self._fingerprint(), self.draft_weights],
        )
        return chooser.choose()

    def get_default_sampling_params(self) -> SamplingParams:
        """Returns the sampling parameters of the model's ``generation_config.json``.

        ``max_length`` and ``min_length`` are not included, because they depend on the prompt. They apply when `generate` is
        called without parameters.
        """
        return default_params(self._defaults)

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
        return default_params(self._defaults, len(encode(prompt, self.tokenizer)[1]), given, max_tokens=max_tokens)

    def get_tokenizer(self) -> Any:
        """Returns the Transformers tokenizer, or None if the model has none. Prompts must then be token ids."""
        return getattr(self.tokenizer, "whole", self.tokenizer)

    @takes_other_names(RUN)
    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool = False,
    ) -> list[RequestOutput]:
        """Generates outputs for one prompt or a list of prompts.

        Prompts are decoded as a batch. Each output is the same as if its prompt were decoded alone. The model continues a
        text exactly as given. To put messages into the format of a chat model, use `chat`.

        Args:
            prompts: one prompt or a list of prompts.
            sampling_params: one for all prompts, or one per prompt. None is `get_default_sampling_params`.
            progress: show a progress bar after two seconds.

        Returns:
            One output per prompt, in the order of the prompts.

        Raises:
            ValueError: a prompt or its parameters are invalid. Nothing has been generated in this case.
        """
        if is_one_prompt(prompts):
            prompts = [prompts]  # type: ignore[list-item]
        if not is_list(prompts):
            raise not_a_prompt(prompts)
        requests = self._requests(list(prompts), sampling_params)  # type: ignore[arg-type]
        total = sum(request.sampling.n for request in requests)
        with progress_bar("generating", total, shown=progress) as advance:
            for running in self.engine.run(requests):
                advance(sum(continuation.finish_reason is not None for continuation in running))
        return [request.output() for request in requests]

    @takes_other_names(RUN)
    def stream(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> Iterator[RequestOutput]:
        """Generates for one prompt. Yields the output so far after every step; the last output is complete.

        Raises:
            ValueError: as in `generate`.
        """
        [request] = self._requests([prompt], sampling_params)
        return (request.output() for _ in self.engine.run([request]))

    @takes_other_names(CHAT, Template.__annotations__)
    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
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

    def _requests(
        self, prompts: Sequence[Prompt], sampling_params: SamplingParams | Sequence[SamplingParams] | None
    ) -> list[Request]:
        if sampling_params is None:
            sampling_params = [self.default_params_for(prompt) for prompt in prompts]
        if isinstance(sampling_params, SamplingParams):
            sampling_params = [sampling_params] * len(prompts)
        if not is_list(sampling_params) or not all(isinstance(params, SamplingParams) for params in sampling_params):
            raise TypeError(f"sampling_params must be a SamplingParams or a list of them, got {shown(sampling_params)}")
        if len(sampling_params) != len(prompts):
            raise ValueError(
                f"got {len(prompts)} prompts but {len(sampling_params)} sampling_params: give one for all prompts, "
                "or one per prompt"
            )
        pairs = zip(prompts, sampling_params, strict=True)
        return [self.engine.add(*encode(prompt, self.tokenizer), sampling) for prompt, sampling in pairs]

    def _context(self, max_model_len: int | None) -> int:
        if max_model_len is None:
            return self.target.max_len
        if max_model_len > self.target.max_len:
            why = why_not_longer(self.target.config)
            raise ValueError(f"max_model_len {max_model_len} exceeds the model's context of {self.target.max_len}{why}")
        return max_model_len

    def _drafter(self, speculation: Speculation, greedy: Way, sampled: Way) -> Any:
        """Builds the drafter of a config, which drafts greedy requests one way and sampled requests another."""
        if greedy.drafter != sampled.drafter:
            parts = [self._drafter(speculation, way, way) for way in (greedy, sampled)]
            return MixedDrafter(*parts)
        measured = self.measured(speculation)
        grower = speculation.grower(sampled.tree, measured)
        if greedy != sampled:
            grower = ByTemperature(speculation.grower(greedy.tree, measured), grower)
        return self._grown_by(grower, speculation, sampled.drafter)

    def drafter_grown_by(self, grower: Any) -> Any:
        """Builds the config's drafter again with another grower. For a ``-lookup`` method, builds its fallback drafter."""
        assert self.speculation is not None
        return self._grown_by(grower, self.speculation, self.speculation.calibrated)

    def _grown_by(self, grower: Any, speculation: Speculation, name: str) -> Any:
        setting = Setting(
            method=name,
            target=self.target,
            model=self.draft_source,
            load=self._draft_model,
            vocabulary=self._vocabulary,
            grower=grower,
            num_slots=self.max_num_seqs,
            fingerprint=self._fingerprint,
        )
        row, options = DRAFTERS[name], speculation.drafter_options
        return row.build(setting, **{key: options[key] for key in row.options if key in options})

    @property
    def draft_source(self) -> Any:
        """The draft model as given by the user, else the bundled one; None if there is no draft model."""
        speculation = self.speculation
        if speculation is not None and speculation.model is None and self._bundled and speculation.needs_model:
            return bundled_drafter(speculation.calibrated)
        return speculation.model if speculation else None

    def measured(self, speculation: Speculation) -> dict[str, Any]:
        """Reads the calibration of the drafter, see `foredraft.plan.store.read_calibration`."""
        source = self.draft_source
        if source is None and self._bundled and DRAFTERS[speculation.calibrated].weights is None:
            source = BUNDLED_LM  # its calibration file also covers drafters without weights
        return read_calibration(source, self.target, speculation.calibrated, self._weights(source))

    @property
    def draft_weights(self) -> str | None:
        """Fingerprint of the drafter's weights; None if it has no weights."""
        return self._weights(self.draft_source)

    def _weights(self, source: Any) -> str | None:
        try:
            return None if source is None else self._fingerprint_of(source)
        except ModelError:  # building the drafter reports it
            return None

    def _draft_model(self, source: Any) -> Any:
        key = str(source) if isinstance(source, str | Path) else str(id(source))
        if key not in self._draft_models:
            where = {"dtype": self.target.dtype, "device": self.target.device}
            self._draft_models[key] = load_target(source, **where, max_len=self.max_model_len)
        return self._draft_models[key]

    def _vocabulary(self, model: Any) -> dict[str, int] | None:
        tokenizer = self.tokenizer if model is None else load_tokenizer(model)
        if model is not None:
            refuse_misfit(tokenizer, self._draft_model(model).vocab_size, "draft model")
        return None if tokenizer is None else tokenizer.get_vocab()


def bundled_drafter(name: str) -> Path | None:
    """Returns the directory of a bundled drafter for the bundled target; None if that drafter is not bundled."""
    row = DRAFTERS[name]
    folder = BUNDLED / (row.asks or name) if row.weights == "head" else BUNDLED_LM
    return folder if folder.is_dir() else None


def _given_tokenizer(tokenizer: Any) -> Any:
    if isinstance(tokenizer, str | Path):
        found = load_tokenizer(tokenizer) if str(tokenizer) else None
        if found is None:
            raise ValueError(f"{str(tokenizer)!r} holds no tokenizer. Give a directory with a tokenizer.json or a Hub id")
        return found
    if not callable(tokenizer):
        raise TypeError(f"tokenizer must be a Transformers tokenizer, or its directory or Hub id, got {tokenizer!r}")
    return tokenizer


def _check_count(name: str, value: Any, most: int, why: str) -> int:
    value = plain_scalar(value)
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
        raise ValueError(f"{name} must be a whole number, at least 1, got {shown(value)}")
    return whole_number(name, value, 1, most, why)
