"""What ``generate`` and ``chat`` share: they load an `LLM`, run it and print its answer."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from foredraft.cli import show
from foredraft.cli.options import ModelOptions
from foredraft.core.outputs import CompletionOutput, RequestOutput
from foredraft.core.params import RANDOM_SEED, SamplingParams
from foredraft.llm import LLM, Prompt
from foredraft.plan.choose import CHOICES

MAX_TOKENS = 256
"""Maximum number of tokens to generate if neither the user nor the model sets one."""

INTERRUPTED = 130
"""Exit code after Ctrl-C: 128 plus the number of the signal SIGINT."""


def note_memory(llm: LLM) -> None:
    """Prints how much memory keys and values may take on standard error."""
    show.note(str(llm.engine.memory))


def note_choice(llm: LLM, params: SamplingParams) -> None:
    """Prints an automatic choice and its reason on standard error."""
    if (reason := llm.drafting(params)["reason"]) is not None:
        show.note(reason)


def load(model: ModelOptions, generation_config: str, config: dict[str, Any] | None, *, seed: int) -> LLM:
    """Loads the model, for one output at a time. Its automatic choice is not logged, because `note_choice` prints it."""
    log = logging.getLogger(CHOICES)
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        return LLM(speculative_config=config, **model._asdict(), generation_config=generation_config, max_num_seqs=1, seed=seed)
    finally:
        log.setLevel(level)


def completed(llm: LLM, prompt: Prompt, sampling: dict[str, Any]) -> SamplingParams:
    """Returns the user's options, completed by the model's defaults, for a single output."""
    return llm.default_params_for(prompt, {"n": 1, **sampling}, max_tokens=MAX_TOKENS)


@dataclass(frozen=True)
class Outcome:
    """Result of a run: the latest output, the latest completion with a tree of drafts (`drawn`), and the exit code."""

    output: RequestOutput | None
    drawn: CompletionOutput | None
    code: int

    @property
    def completion(self) -> CompletionOutput | None:
        """The latest completion."""
        return self.output.outputs[0] if self.output else None


def consume(stream: Iterator[RequestOutput], screen: show.Screen | None) -> Outcome:
    """Reads a stream to its end. Ctrl-C stops it and keeps the output so far."""
    output, drawn, code = None, None, 0
    try:
        with show.waiting("generating") as stop_waiting:
            for output in stream:
                completion = output.outputs[0]
                if completion.last_tree is not None and completion.last_tree.num_nodes > 1:
                    drawn = completion
                if screen is not None:
                    stop_waiting()
                    screen.update(completion)
    except KeyboardInterrupt:
        code = INTERRUPTED
    failed = output is not None and any(completion.error is not None for completion in output.outputs)
    return Outcome(output, drawn, code or int(failed))


def say_failure(outcome: Outcome) -> None:
    """Prints the error that ended an output on standard error."""
    completion = outcome.completion
    if completion is not None and completion.error is not None:
        show.note(f"error: {completion.error.message}")
        show.note(f"hint: {completion.error.hint}")


def show_answer(llm: LLM, stream: Iterator[RequestOutput], params: SamplingParams, *, tree: bool) -> Outcome:
    """Prints an answer while it is generated, then its tree if requested, then a summary."""
    screen = show.Screen(llm.tokenizer, params, legend=llm.speculation is not None)
    outcome = consume(stream, screen)
    screen.finish(outcome.completion)
    if outcome.completion is not None:
        if tree:
            show.print_tree(llm.tokenizer, outcome.drawn)
        interrupted = " (interrupted)" if outcome.code == INTERRUPTED else ""
        seed = f", seed {outcome.output.seed}" if outcome.output and params.seed == RANDOM_SEED else ""
        show.note(show.summary(outcome.completion) + seed + interrupted)
    say_failure(outcome)
    return outcome


def result(outcome: Outcome, *, tree: bool) -> dict[str, Any]:
    """The output in the object that ``--json`` prints. Values are empty if Ctrl-C came before the first token."""
    completion = outcome.completion
    found: dict[str, Any] = {
        "text": completion.text if completion else "",
        "token_ids": completion.token_ids if completion else [],
        "kinds": completion.kinds if completion else [],
        "finish_reason": completion.finish_reason if completion else None,
        "stop_reason": completion.stop_reason if completion else None,
        "error": str(completion.error) if completion and completion.error else None,
        "metrics": asdict(completion.metrics) if completion else {},
    }
    if outcome.output is not None:
        found["prompt_token_ids"] = outcome.output.prompt_token_ids
    if tree:
        found["tree"] = show.tree_as_dict(outcome.drawn)
    return found


def configuration(llm: LLM, model: ModelOptions, generation_config: str, params: SamplingParams) -> dict[str, Any]:
    """The configuration of the run in the object that ``--json`` prints."""
    sampling = asdict(params)
    del sampling["output_kind"]
    if params.logit_bias:  # JSON has no infinity
        sampling["logit_bias"] = {i: bias if math.isfinite(bias) else str(bias) for i, bias in params.logit_bias.items()}
    given = {**model._asdict(), "generation_config": generation_config}
    return {**given, **_drafting(llm, params), "kv_cache_memory_bytes": llm.engine.memory.num_bytes, "sampling": sampling}


def _drafting(llm: LLM, params: SamplingParams) -> dict[str, Any]:
    speculation = llm.speculation
    if speculation is None:
        return {"method": "ar"}
    options = {**speculation.drafter_options, **speculation.grower_options}
    draft_model = None if speculation.model is None else str(speculation.model)
    return {**llm.drafting(params), "draft_model": draft_model, **options}
