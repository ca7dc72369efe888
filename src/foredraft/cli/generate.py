"""The commands ``generate`` and ``chat``: they build an `LLM` and `SamplingParams`, run them and print the output."""

from __future__ import annotations

import json
import logging
import math
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from foredraft.cli import show
from foredraft.cli.choices import ModelChoice, Shown
from foredraft.core.chat import Template, is_plain
from foredraft.core.errors import check_text, speaks_unicode
from foredraft.core.params import RANDOM_SEED, SamplingParams
from foredraft.engine.engine import CompletionOutput, RequestOutput
from foredraft.llm import LLM, Prompt
from foredraft.plan.choose import CHOICES

MAX_TOKENS = 256
"""Maximum number of tokens to generate if neither the user nor the model sets one."""

INTERRUPTED = 130
"""Exit code after Ctrl-C: 128 plus the number of the signal SIGINT."""


def generate(
    prompt: str,
    choice: ModelChoice,
    config: dict[str, Any] | None,
    sampling: dict[str, Any],
    shown: Shown,
    template: Template,
) -> int:
    """Runs ``foredraft generate``; returns its exit code."""
    text = _read_stdin() if prompt == "-" else prompt
    check_text("the prompt", text)
    with show.waiting("loading the model"):
        llm = _load(choice, config, seed=sampling["seed"])
        wrapped: Prompt = llm.chat_prompt([{"role": "user", "content": text}], **template) if shown.chat else text
        params = _params(llm, wrapped, sampling)
        stream = llm.stream(wrapped, params)
    _note_choice(llm, params)
    if shown.json:
        outcome = _consume(stream, None)
        seed = outcome.output.seed if outcome.output else params.seed
        found = {"prompt": text, **_result(outcome, shown), "seed": seed, "config": _config(llm, choice, params)}
        print(json.dumps(found, ensure_ascii=not speaks_unicode(sys.stdout)))
        _say_failure(outcome)
        return outcome.code
    if not shown.chat and is_plain(text, llm.tokenizer):
        show.note("the model has a chat template; --chat applies it, and without --chat the model continues PROMPT as given")
    return _show_answer(llm, stream, params, shown).code


def _read_stdin() -> str:
    if sys.stdin is None:
        raise ValueError("standard input is closed. Give the prompt as PROMPT")
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise ValueError(f"standard input is not text in {error.encoding} ({error.reason}). Give it in that encoding") from None


def chat(
    system: str | None,
    choice: ModelChoice,
    config: dict[str, Any] | None,
    sampling: dict[str, Any],
    shown: Shown,
    template: Template,
) -> int:
    """Runs ``foredraft chat`` until /exit or the end of input; returns its exit code."""
    check_text("--system", system or "")
    start = [{"role": "system", "content": system}] if system else []
    with show.waiting("loading the model"):
        seed = sampling.pop("seed")
        llm = _load(choice, config, seed=seed)
        probe = llm.chat_prompt([*start, {"role": "user", "content": "?"}], **template)  # reports a missing template now
    _note_choice(llm, _params(llm, probe, sampling))
    messages = list(start)
    show.greet()
    if seed == RANDOM_SEED:
        show.note(f"seed {llm.seed}: --seed {llm.seed} repeats this conversation")
    for line in show.lines():
        if line == "/exit":
            break
        if line == "/reset":
            messages = list(start)
            show.note("the conversation is forgotten")
        elif line.startswith("/"):
            show.note(f"unknown command {line.split()[0]}; the commands are /reset and /exit")
        elif line:
            messages = _turn(llm, [*messages, {"role": "user", "content": line}], sampling, shown, template)
    return 0


def _note_choice(llm: LLM, params: SamplingParams) -> None:
    """Prints an automatic choice and its reason on standard error."""
    if (reason := llm.drafting(params)["reason"]) is not None:
        show.note(reason)


def _load(choice: ModelChoice, config: dict[str, Any] | None, *, seed: int) -> LLM:
    log = logging.getLogger(CHOICES)
    level = log.level
    log.setLevel(logging.CRITICAL)  # `_note_choice` prints the choice
    try:
        return LLM(
            choice.model,
            config,
            dtype=choice.dtype,
            device=choice.device,
            revision=choice.revision,
            tokenizer=choice.tokenizer,
            max_model_len=choice.max_model_len,
            generation_config=choice.generation_config,
            max_num_seqs=1,
            seed=seed,
        )
    finally:
        log.setLevel(level)


def _params(llm: LLM, prompt: Prompt, sampling: dict[str, Any]) -> SamplingParams:
    """Returns the user's options, completed by the model's defaults, for a single output."""
    return llm.default_params_for(prompt, {"n": 1, **sampling}, max_tokens=MAX_TOKENS)


def _turn(
    llm: LLM, asked: list[dict[str, str]], sampling: dict[str, Any], shown: Shown, template: Template
) -> list[dict[str, str]]:
    """Answers the last message and returns the new conversation. If that fails, returns the conversation without it."""
    try:
        check_text("the question", asked[-1]["content"])
        prompt = llm.chat_prompt(asked, **template)
        params = _params(llm, prompt, sampling)
        stream = llm.stream(prompt, params)
    except ValueError as error:
        show.note(f"error: {error}")
        show.note("hint: /reset forgets the conversation so far")
        return asked[:-1]
    answer = _show_answer(llm, stream, params, shown).completion
    if answer is not None and answer.error is not None:
        return asked[:-1]
    return [*asked, {"role": "assistant", "content": answer.text if answer else ""}]


@dataclass(frozen=True)
class _Outcome:
    """Result of a run: the latest output, the latest completion with a tree of drafts (`drawn`), and the exit code."""

    output: RequestOutput | None
    drawn: CompletionOutput | None
    code: int

    @property
    def completion(self) -> CompletionOutput | None:
        return self.output.outputs[0] if self.output else None


def _consume(stream: Iterator[RequestOutput], screen: show.Screen | None) -> _Outcome:
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
    return _Outcome(output, drawn, code or int(failed))


def _say_failure(outcome: _Outcome) -> None:
    """Prints the error that ended an output on standard error."""
    completion = outcome.completion
    if completion is not None and completion.error is not None:
        problem, _, advice = completion.error.partition(". ")
        show.note(f"error: {problem}")
        show.note(f"hint: {advice}")


def _show_answer(llm: LLM, stream: Iterator[RequestOutput], params: SamplingParams, shown: Shown) -> _Outcome:
    """Prints an answer while it is generated, then its tree if requested, then a summary."""
    screen = show.Screen(llm.tokenizer, params, legend=llm.speculation is not None)
    outcome = _consume(stream, screen)
    screen.finish(outcome.completion)
    if outcome.completion is not None:
        if shown.tree:
            show.print_tree(llm.tokenizer, outcome.drawn)
        interrupted = " (interrupted)" if outcome.code == INTERRUPTED else ""
        seed = f", seed {outcome.output.seed}" if outcome.output and params.seed == RANDOM_SEED else ""
        show.note(show.summary(outcome.completion) + seed + interrupted)
    _say_failure(outcome)
    return outcome


def _result(outcome: _Outcome, shown: Shown) -> dict[str, Any]:
    """The output in the object that ``--json`` prints. Values are empty if Ctrl-C came before the first token."""
    completion = outcome.completion
    result: dict[str, Any] = {
        "text": completion.text if completion else "",
        "token_ids": completion.token_ids if completion else [],
        "kinds": completion.kinds if completion else [],
        "finish_reason": completion.finish_reason if completion else None,
        "stop_reason": completion.stop_reason if completion else None,
        "error": completion.error if completion else None,
        "metrics": asdict(completion.metrics) if completion else {},
    }
    if outcome.output is not None:
        result["prompt_token_ids"] = outcome.output.prompt_token_ids
    if shown.tree:
        result["tree"] = show.tree_as_dict(outcome.drawn)
    return result


def _config(llm: LLM, choice: ModelChoice, params: SamplingParams) -> dict[str, Any]:
    """The configuration of the run in the object that ``--json`` prints."""
    sampling = asdict(params)
    if params.logit_bias:  # JSON has no infinity
        sampling["logit_bias"] = {i: bias if math.isfinite(bias) else str(bias) for i, bias in params.logit_bias.items()}
    return {**asdict(choice), **_drafting(llm, params), "sampling": sampling}


def _drafting(llm: LLM, params: SamplingParams) -> dict[str, Any]:
    speculation = llm.speculation
    if speculation is None:
        return {"method": "ar"}
    options = {**speculation.drafter_options, **speculation.grower_options}
    draft_model = None if speculation.model is None else str(speculation.model)
    return {**llm.drafting(params), "draft_model": draft_model, **options}
