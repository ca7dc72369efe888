"""Renders the messages of a conversation with a chat template. Does not import torch."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypedDict

from foredraft.core.errors import UserError, UserTypeError, check_text, shown, unknown_name
from foredraft.core.folders import is_file
from foredraft.core.messages import ROLES, Message, check
from foredraft.core.prompts import is_list

_NEVER_ROLES = (
    *("role", "content", "type", "text", "name", "id", "weight", "parameters", "arguments", "properties", "required"),
    *("description", "tool_calls", "tool_call_id", "function_call", "reasoning", "reasoning_content", "thinking"),
    *("string", "number", "integer", "boolean", "object", "array", "null"),
)
"""Words that templates quote because they are keys of messages and tools, or types of JSON."""


_MARK = "QZXJMARK"
"""A word in capitals that no template contains. It survives trimming and escaping."""

OF_THE_CALL = ("conversation", "messages", "tokenize", "return_dict", "return_tensors", "padding", "truncation", "max_length")


class Template(TypedDict, total=False):
    """Options that control how messages become a prompt. Names, meanings and defaults are those of vLLM.

    Attributes:
        chat_template: a Jinja template, or the path of a file with one. Default: the model's template.
        chat_template_content_format: ``string`` joins text parts with line breaks, and ``openai`` passes lists of parts to the
            template. Default: ``auto``, the format that the template supports.
        add_generation_prompt: whether the prompt ends with the start of an answer. Default: True.
        continue_final_message: whether the output continues the last message. It cannot be combined with
            `add_generation_prompt`. Default: False.
        tools: functions that the model may call, as JSON schemas or as Python functions with type hints and docstrings.
        chat_template_kwargs: further variables for the template, such as ``{"enable_thinking": False}``.
    """

    chat_template: str | None
    chat_template_content_format: Literal["auto", "string", "openai"]
    add_generation_prompt: bool
    continue_final_message: bool
    tools: Sequence[Any] | None
    chat_template_kwargs: Mapping[str, Any] | None


def render(tokenizer: Any, messages: Any, template: Template) -> str:
    """Renders one conversation as a prompt, with the special tokens of the template.

    Args:
        tokenizer: a Transformers tokenizer, or None.
        messages: a list of messages. It is not changed.
        template: options for the template.

    Raises:
        ValueError: the model has no chat template. Or the template refuses the messages, drops a message or does not support
            tools. Or a message is incomplete, is not valid text or has a part that is not text.
        TypeError: messages or options have a wrong type.
    """
    own = getattr(tokenizer, "chat_template", None)
    options = _options(template, own)
    if tokenizer is None or not (own or "chat_template" in options):
        raise UserError(
            "this model has no chat template",
            "Give a prompt in the model's own format, to `foredraft generate` without --chat or to generate() in Python, or "
            "give a chat template",
        )

    def rendered(given: list[dict[str, Any]], **changed: Any) -> str:
        try:
            return tokenizer.apply_chat_template(given, tokenize=False, **{**options, **changed})
        except Exception as error:  # a template is a program and can raise any error
            raise UserError(f"the chat template refuses the conversation: {' '.join(str(error).split())}") from None

    checked = check(messages)
    checked = list(_with_contents(checked, _takes(rendered, template.get("chat_template_content_format", "auto"))))
    _check_roles(checked, source_of(options.get("chat_template") or own))
    text = rendered(checked)
    check_text("the conversation that the chat template renders", text)
    _check_kept(checked, rendered)
    _check_calls(checked, text)
    if options.get("tools") and rendered(checked, tools=None) == text:
        raise UserError("this model's chat template has no tools", "Leave tools out, or give a chat_template that has them")
    return text


def is_plain(text: str, tokenizer: Any) -> bool:
    """Whether the model has a chat template but the text contains no special tokens, which templates put around messages."""
    if not getattr(tokenizer, "chat_template", None):
        return False
    return not any(token.strip() and token in text for token in tokenizer.get_added_vocab())


def _options(template: Template, named: Any) -> dict[str, Any]:
    """Returns arguments of `apply_chat_template`. `named` is the tokenizer's template, or a dictionary of named templates."""
    further = template.get("chat_template_kwargs") or {}
    if not isinstance(further, Mapping) or not all(isinstance(key, str) for key in further):
        raise UserTypeError(f"chat_template_kwargs must be a dict of variables for the template, got {further!r}")
    for key in OF_THE_CALL:
        if key in further:
            raise UserError(f"chat_template_kwargs cannot set {key!r}, which is not a variable of a template", "Leave it out")
    options = {"add_generation_prompt": True, "continue_final_message": False, **template, **further}
    for key in ("chat_template_kwargs", "chat_template_content_format"):
        options.pop(key, None)
    for key in ("add_generation_prompt", "continue_final_message"):
        if not isinstance(options[key], bool):
            raise UserTypeError(f"{key} must be True or False, got {shown(options[key])}")
    if options["add_generation_prompt"] and options["continue_final_message"]:
        raise UserError(
            "continue_final_message and add_generation_prompt exclude each other: an output continues a message or starts one",
            "Give continue_final_message=True with add_generation_prompt=False",
        )
    options["chat_template"] = _template_text(options.get("chat_template"), named)
    options["tools"] = _checked_tools(options.get("tools"))
    return {key: value for key, value in options.items() if value is not None}


def _template_text(given: Any, named: Any) -> str | None:
    """Returns the text of a template. As in vLLM, a string without braces and line breaks is the path of a file."""
    if given is None or (isinstance(given, str) and re.search(r"[{}\n]", given)):
        return given
    if not isinstance(given, str | Path):
        raise UserTypeError(f"chat_template must be a Jinja template or the path of a file with one, got {shown(given)}")
    if isinstance(named, Mapping) and given in named:
        return named[given]
    path = shown(str(given))
    if not is_file(Path(given)):
        raise UserError(f"no chat template: {path} is neither a Jinja template nor a file", "Give one of them")
    try:
        return Path(given).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        why = f"byte {error.start + 1} of the file is not UTF-8"
        raise UserError(f"the chat template {path} cannot be read: {why}", "Give a text file in UTF-8") from None
    except OSError as error:
        raise UserError(f"the chat template {path} cannot be read: {error.strerror}", "Give a file that can be read") from None


def _checked_tools(tools: Any) -> list[Any] | None:
    if tools is None:
        return None
    if not is_list(tools) or not all(isinstance(tool, Mapping) or callable(tool) for tool in tools):
        raise UserTypeError(f"tools must be a list of JSON schemas or of Python functions, got {tools!r}")
    return [dict(tool) if isinstance(tool, Mapping) else tool for tool in tools] or None


class _Takes(NamedTuple):
    """The forms of contents that a template accepts."""

    texts: bool
    parts: bool


def _parts(texts: Sequence[str]) -> list[dict[str, str]]:
    return [{"type": "text", "text": text} for text in texts]


def _takes(rendered: Callable[..., str], wanted: Any) -> _Takes:
    """Finds the forms of contents that a template accepts. Renders a test message and searches the prompt for its word."""
    if wanted not in ("auto", "string", "openai"):
        raise unknown_name("chat_template_content_format", wanted, ["auto", "string", "openai"])
    if wanted != "auto":
        return _Takes(wanted == "string", wanted == "openai")

    def tried(content: Any) -> str:
        try:
            out = rendered([{"role": "user", "content": content}], continue_final_message=False, tools=None)
        except ValueError:
            return ""
        return out if _MARK in out else ""

    as_text, as_parts = tried(_MARK), tried(_parts([_MARK]))
    quoted = re.search(f"['\"]{_MARK}['\"]", as_parts) is not None  # the list itself, as Python or JSON writes it
    return _Takes(bool(as_text), as_parts == as_text if as_text else bool(as_parts) and not quoted)


def _with_contents(messages: Sequence[dict[str, Any]], takes: _Takes) -> Iterator[dict[str, Any]]:
    """Converts contents to a form that the template accepts. Parts are joined unless the template accepts parts."""
    for message in messages:
        content = message["content"]
        if isinstance(content, list):
            content = _parts(content) if takes.parts else "\n".join(content)
        elif takes.parts and not takes.texts:
            content = _parts([content])
        yield {**message, "content": content}


def source_of(template: Any) -> str:
    """Returns the text of a tokenizer's template, or of all its named templates."""
    return "\n".join(template.values()) if isinstance(template, Mapping) else str(template)


def knows_role(source: str, role: str) -> bool:
    """Whether a role is usual, or named in the text of a template."""
    named = role not in _NEVER_ROLES and re.search(f"['\"]{re.escape(role)}['\"]", source)
    return role in ROLES or bool(named)


def _check_roles(messages: Sequence[Message], source: str) -> None:
    for number, message in enumerate(messages, start=1):
        role = message["role"]
        if not knows_role(source, role):
            raise unknown_name(f"role of message {number}:", role, ROLES)


def _check_kept(messages: Sequence[dict[str, Any]], rendered: Callable[..., str]) -> None:
    """Raises an error if the template drops the content of a message.

    Each message gets a unique word, which must occur in the prompt. Messages of the assistant may be dropped, because templates
    leave out earlier reasoning.
    """
    marks = [f"{_MARK}{number}END" for number in range(len(messages))]
    pairs = zip(messages, marks, strict=True)
    try:
        shown = rendered([{**message, "content": _marked(message["content"], mark)} for message, mark in pairs])
    except ValueError:
        return  # the template needs contents of a form that the words destroy
    for number, (message, mark) in enumerate(zip(messages, marks, strict=True), start=1):
        if message["role"] != "assistant" and message["content"] and mark not in shown:
            raise UserError(
                f"the chat template drops message {number} (role {message['role']!r})",
                "Leave it out, or say it in a message whose role the template knows",
            )


def _check_calls(messages: Sequence[Message], text: str) -> None:
    for number, message in enumerate(messages, start=1):
        names = [call.get("function", call)["name"] for call in message.get("tool_calls", ())]
        if not all(name in text for name in names):
            raise UserError(
                f"the chat template drops the tool calls of message {number} ({', '.join(names)})",
                "Write them into its content, or give a chat_template that has them",
            )


def _marked(content: Any, mark: str) -> Any:
    if isinstance(content, list):
        return [*content[:-1], {**content[-1], "text": content[-1]["text"] + mark}]
    return content + mark if content else content
