"""``foredraft generate``: continues a prompt."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer

from foredraft.cli.options import (
    AsJson,
    DraftOptions,
    GenerationConfig,
    ModelOptions,
    SamplingOptions,
    ShowTree,
    TemplateOptions,
)
from foredraft.core.errors import UserError, check_text, speaks_unicode


def generate(
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="Text to continue; - reads it from standard input.")],
    *,
    chat: Annotated[bool, typer.Option("--chat", help="Wrap PROMPT in the model's chat template.")] = False,
    template: TemplateOptions,
    model: ModelOptions,
    drafting: DraftOptions,
    sampling: SamplingOptions,
    generation_config: GenerationConfig = "auto",
    show_tree: ShowTree = False,
    as_json: AsJson = False,
) -> int:
    """Continue PROMPT and stream the text. Colours mark accepted, recovered and bonus tokens."""
    from foredraft.cli import choices

    config, given = drafting.config(model.model), choices.given(**sampling._asdict())
    choices.check(model.model, config, given)
    choices.check_prompt(prompt)
    templating = choices.template(*template, chat=chat)
    from foredraft.cli import answers, show
    from foredraft.core.chat import is_plain

    text = _read_stdin() if prompt == "-" else prompt
    check_text("the prompt", text)
    with show.waiting("loading the model"):
        llm = answers.load(model, generation_config, config, seed=sampling.seed)
        wrapped = llm.chat_prompt([{"role": "user", "content": text}], **templating) if chat else text
        params = answers.completed(llm, wrapped, given)
        stream = llm.stream(wrapped, params)
    answers.note_choice(llm, params)
    if as_json:
        outcome = answers.consume(stream, None)
        seed = outcome.output.seed if outcome.output else params.seed
        found = {"prompt": text, **answers.result(outcome, tree=show_tree), "seed": seed}
        found["config"] = answers.configuration(llm, model, generation_config, params)
        print(json.dumps(found, ensure_ascii=not speaks_unicode(sys.stdout)))
        answers.say_failure(outcome)
        return outcome.code
    if not chat and is_plain(text, llm.tokenizer):
        show.note("the model has a chat template; --chat applies it, and without --chat the model continues PROMPT as given")
    return answers.show_answer(llm, stream, params, tree=show_tree).code


def _read_stdin() -> str:
    if sys.stdin is None:
        raise UserError("standard input is closed", "Give the prompt as PROMPT")
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise UserError(
            f"standard input is not text in {error.encoding} ({error.reason})", "Give it in that encoding"
        ) from None
