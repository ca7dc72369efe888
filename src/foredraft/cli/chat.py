"""``foredraft chat``: a conversation with the model."""

from __future__ import annotations

from typing import Annotated, Any

from foredraft.cli.options import (
    DraftOptions,
    GenerationConfig,
    ModelOptions,
    SamplingOptions,
    ShowTree,
    TemplateOptions,
    option,
)
from foredraft.core.errors import check_text


def chat(
    *,
    system: Annotated[str | None, option(None, "Text of a system message.")] = None,
    template: TemplateOptions,
    model: ModelOptions,
    drafting: DraftOptions,
    sampling: SamplingOptions,
    generation_config: GenerationConfig = "auto",
    show_tree: ShowTree = False,
) -> int:
    """Chat with the model. /reset starts a new conversation, /exit ends the chat, Ctrl-C stops an answer."""
    from foredraft.cli import choices

    config, given = drafting.config(model.model), choices.given(**sampling._asdict())
    choices.check(model.model, config, given)
    templating = choices.template(*template)
    from foredraft.cli import answers, show
    from foredraft.core.params import RANDOM_SEED

    check_text("--system", system or "")
    start = [{"role": "system", "content": system}] if system else []
    with show.waiting("loading the model"):
        seed = given.pop("seed")
        llm = answers.load(model, generation_config, config, seed=seed)
        probe = llm.chat_prompt([*start, {"role": "user", "content": "?"}], **templating)  # reports a missing template now
    answers.note_memory(llm)
    answers.note_choice(llm, answers.completed(llm, probe, given))
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
            asked = [*messages, {"role": "user", "content": line}]
            messages = _turn(llm, asked, given, templating, tree=show_tree)
    return 0


def _turn(
    llm: Any, asked: list[dict[str, str]], sampling: dict[str, Any], template: Any, *, tree: bool
) -> list[dict[str, str]]:
    """Answers the last message and returns the new conversation. If that fails, returns the conversation without it."""
    from foredraft.cli import answers, show

    try:
        check_text("the question", asked[-1]["content"])
        prompt = llm.chat_prompt(asked, **template)
        params = answers.completed(llm, prompt, sampling)
        stream = llm.stream(prompt, params)
    except ValueError as error:
        show.note(f"error: {error}")
        show.note("hint: /reset forgets the conversation so far")
        return asked[:-1]
    answer = answers.show_answer(llm, stream, params, tree=tree).completion
    if answer is not None and answer.error is not None:
        return asked[:-1]
    return [*asked, {"role": "assistant", "content": answer.text if answer else ""}]
