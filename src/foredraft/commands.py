"""What the commands do: choices of the command line to an `LLM` and `SamplingParams`, a run, and what is shown of it."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from foredraft import methods as tables
from foredraft import show
from foredraft.engine import CompletionOutput, RequestOutput
from foredraft.llm import LLM, Prompt
from foredraft.params import SamplingParams
from foredraft.speculation import AUTO, drafter_for

MAX_TOKENS = 256
"""Most tokens to generate where neither the user nor the model says a number."""

INTERRUPTED = 130
"""The exit code of a process that Ctrl-C ended: 128 and the number of the signal."""


@dataclass(frozen=True)
class ModelChoice:
    """Which target, in what form, where; see `LLM`."""

    model: str | None
    dtype: str
    device: str | None
    revision: str | None
    max_model_len: int | None = None
    generation_config: str = "auto"


@dataclass(frozen=True)
class Shown:
    """What is shown of a run; `chat`: the prompt goes through the chat template."""

    chat: bool = False
    tree: bool = False
    json: bool = False


def given(**options: Any) -> dict[str, Any]:
    """The options that the user gave: neither None nor an empty list."""
    return {name: value for name, value in options.items() if value is not None and value != []}


def speculative_config(
    model: str | None,
    method: str | None,
    draft_model: str | None,
    tree: str | None,
    budget: str | None,
    rule: str | None,
    *,
    extra: str | None = None,
    force: bool = False,
) -> dict[str, Any] | None:
    """The speculative config of the command line; None where nothing was said, which leaves the choice to `LLM`.

    Raises:
        ValueError: `extra` is not a JSON object, or the budget is no number.
    """
    if budget not in (None, AUTO) and not budget.lstrip("-").isdigit():
        raise ValueError(f"--budget must be a whole number or {AUTO}, got {budget!r}")
    nodes = int(budget) if budget not in (None, AUTO) else budget
    named = given(method=method, model=draft_model, tree=tree, num_speculative_tokens=nodes, rule=rule)
    config = {**_json_object(extra), **named, **({"force": True} if force else {})}
    if not config:
        return None
    has_draft_model = model is None or "model" in config or "tree" in config
    return {"method": drafter_for(config.get("model")) if has_draft_model else "suffix", **config}


def _json_object(text: str | None) -> dict[str, Any]:
    try:
        found = json.loads(text) if text is not None else {}
    except json.JSONDecodeError as error:
        raise ValueError(f"--speculative-config is not JSON ({error}). Example: '{{\"num_chains\": 2}}'") from None
    if not isinstance(found, dict):
        raise ValueError(f"--speculative-config must be a JSON object, got {text}. Example: '{{\"num_chains\": 2}}'")
    return found


def generate(prompt: str, choice: ModelChoice, config: dict[str, Any] | None, sampling: dict[str, Any], shown: Shown) -> int:
    """Runs ``foredraft generate``; returns its exit code."""
    text = sys.stdin.read() if prompt == "-" else prompt
    SamplingParams(**sampling)  # says what is wrong with them before anything is loaded
    with show.waiting("loading the model"):
        llm = _load(choice, config, seed=sampling["seed"])
        wrapped: Prompt = llm.chat_prompt([{"role": "user", "content": text}]) if shown.chat else text
        params = _params(llm, wrapped, sampling)
        stream = llm.stream(wrapped, params)
    if shown.json:
        outcome = _consume(stream, None)
        found = {"prompt": text, **_result(outcome, shown), "seed": params.seed, "config": _config(llm, choice, params)}
        print(json.dumps(found, ensure_ascii=False))
        return outcome.code
    return _show_answer(llm, stream, params, shown).code


def chat(system: str | None, choice: ModelChoice, config: dict[str, Any] | None, sampling: dict[str, Any], shown: Shown) -> int:
    """Runs ``foredraft chat`` until /exit or the end of input; returns its exit code."""
    SamplingParams(**sampling)
    with show.waiting("loading the model"):
        llm = _load(choice, config, seed=sampling.pop("seed"))
        llm.chat_prompt([{"role": "user", "content": "?"}])  # says now that there is no chat template
    start = [{"role": "system", "content": system}] if system else []
    messages = list(start)
    show.greet()
    for line in show.lines():
        if line == "/exit":
            break
        if line == "/reset":
            messages = list(start)
            show.note("the conversation is forgotten")
        elif line.startswith("/"):
            show.note(f"unknown command {line.split()[0]}: there are /reset and /exit")
        elif line:
            messages = _turn(llm, messages, line, sampling, shown)
    return 0


def methods(*, as_json: bool) -> None:
    """Runs ``foredraft methods``."""
    if as_json:
        print(json.dumps(tables.tables(), ensure_ascii=False))
    else:
        show.method_tables(tables.tables())


def _load(choice: ModelChoice, config: dict[str, Any] | None, *, seed: int) -> LLM:
    return LLM(
        choice.model,
        config,
        dtype=choice.dtype,
        device=choice.device,
        revision=choice.revision,
        max_model_len=choice.max_model_len,
        generation_config=choice.generation_config,
        max_num_seqs=1,
        seed=seed,
    )


def _params(llm: LLM, prompt: Prompt, sampling: dict[str, Any]) -> SamplingParams:
    """The user's options, else the model's defaults, for the one output that is shown."""
    return llm.default_params_for(prompt, {"n": 1, **sampling}, max_tokens=MAX_TOKENS)


def _turn(llm: LLM, messages: list[dict[str, str]], line: str, sampling: dict[str, Any], shown: Shown) -> list[dict[str, str]]:
    """One question and its answer; the conversation stays as it was where the model cannot take the question."""
    asked = [*messages, {"role": "user", "content": line}]
    try:
        prompt = llm.chat_prompt(asked)
        params = _params(llm, prompt, sampling)
        stream = llm.stream(prompt, params)
    except ValueError as error:
        show.note(f"error: {error}")
        show.note("hint: /reset forgets the conversation so far")
        return messages
    answer = _show_answer(llm, stream, params, shown).completion
    return [*asked, {"role": "assistant", "content": answer.text if answer else ""}]


@dataclass(frozen=True)
class _Outcome:
    """What a run gave: the latest output, the latest completion that had a tree of drafts, and the exit code."""

    output: RequestOutput | None
    drawn: CompletionOutput | None
    code: int

    @property
    def completion(self) -> CompletionOutput | None:
        return self.output.outputs[0] if self.output else None


def _consume(stream: Iterator[RequestOutput], screen: show.Screen | None) -> _Outcome:
    """Follows a stream to its end, or to Ctrl-C, which ends it and keeps what is there."""
    output, drawn, code = None, None, 0
    try:
        with show.waiting("generating") as stop_waiting:
            for output in stream:
                one = output.outputs[0]
                if one.last_tree is not None and one.last_tree.num_nodes > 1:
                    drawn = one
                if screen is not None:
                    stop_waiting()
                    screen.update(one)
    except KeyboardInterrupt:
        code = INTERRUPTED
    return _Outcome(output, drawn, code)


def _show_answer(llm: LLM, stream: Iterator[RequestOutput], params: SamplingParams, shown: Shown) -> _Outcome:
    """Prints an answer while it comes, then its tree if asked for, and its summary."""
    screen = show.Screen(llm.tokenizer, params, legend=llm.speculation is not None)
    outcome = _consume(stream, screen)
    screen.finish(outcome.completion)
    if outcome.completion is not None:
        if shown.tree:
            show.print_tree(llm.tokenizer, outcome.drawn)
        show.note(show.summary(outcome.completion) + (" (interrupted)" if outcome.code else ""))
    return outcome


def _result(outcome: _Outcome, shown: Shown) -> dict[str, Any]:
    """The run in the object that ``--json`` prints; empty where Ctrl-C came before the first token."""
    one = outcome.completion
    found: dict[str, Any] = {
        "text": one.text if one else "",
        "token_ids": one.token_ids if one else [],
        "kinds": one.kinds if one else [],
        "finish_reason": one.finish_reason if one else None,
        "stop_reason": one.stop_reason if one else None,
        "metrics": asdict(one.metrics) if one else {},
    }
    if outcome.output is not None:
        found["prompt_token_ids"] = outcome.output.prompt_token_ids
    if shown.tree:
        found["tree"] = tables.tree_as_dict(outcome.drawn)
    return found


def _config(llm: LLM, choice: ModelChoice, params: SamplingParams) -> dict[str, Any]:
    """What was run, in the object that ``--json`` prints."""
    sampling = asdict(params)
    if params.logit_bias:  # JSON has no infinity
        sampling["logit_bias"] = {i: bias if math.isfinite(bias) else str(bias) for i, bias in params.logit_bias.items()}
    return {**asdict(choice), **_drafting(llm, params), "sampling": sampling}


def _drafting(llm: LLM, params: SamplingParams) -> dict[str, Any]:
    one = llm.speculation
    if one is None:
        return {"method": "ar"}
    given = {**one.drafter_options, **one.grower_options}
    return {**llm.drafting(params), "draft_model": None if one.model is None else str(one.model), **given}
