"""Messages of a conversation: what they may be, and how a chat template makes a prompt of them. Loads no torch."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypedDict

from foredraft.errors import unknown_name
from foredraft.prompts import is_list

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
"""Roles that are taken from every template; another one must stand in the template's text."""

Message = Mapping[str, Any]
"""``{"role": "user", "content": "..."}``; the content may be a list of parts, ``[{"type": "text", "text": "..."}]``."""

_TEXT_PARTS = ("text", "input_text", "output_text")
_MARK = "QZXJMARK"
"""A word of capitals that no template has; it survives trimming and escaping."""

_OF_THE_CALL = ("conversation", "messages", "tokenize", "return_dict", "return_tensors", "padding", "truncation", "max_length")
_EXAMPLE = "[{'role': 'user', 'content': 'Hello'}]"


class Template(TypedDict, total=False):
    """How messages become a prompt; names and meanings are vLLM's, the defaults too.

    Attributes:
        chat_template: a Jinja template, or the path of a file with one; default: the model's.
        chat_template_content_format: ``string`` joins text parts with line breaks, ``openai`` gives the template lists of
            parts; default: ``auto``, what the template can take.
        add_generation_prompt: whether the prompt ends with the start of an answer; default: True.
        continue_final_message: whether the output continues the last message, which `add_generation_prompt` excludes.
        tools: functions that the model may call: JSON schemas, or Python functions with type hints and docstrings.
        chat_template_kwargs: further variables of the template, such as ``{"enable_thinking": False}``.
    """

    chat_template: str | None
    chat_template_content_format: Literal["auto", "string", "openai"]
    add_generation_prompt: bool
    continue_final_message: bool
    tools: Sequence[Any] | None
    chat_template_kwargs: Mapping[str, Any] | None


def conversations(messages: Any) -> list[Any]:
    """The conversations in what `LLM.chat` takes: one of them, or a list.

    Raises:
        TypeError: it is neither.
    """
    if not is_list(messages):
        raise _no_messages(messages)
    return list(messages) if all(is_list(one) for one in messages) else [messages]


def render(tokenizer: Any, messages: Any, template: Template) -> str:
    """The prompt of one conversation, with the special tokens of the template.

    Args:
        tokenizer: a Transformers tokenizer, or None.
        messages: a list of messages; it is not changed.
        template: how they become a prompt.

    Raises:
        ValueError: the model has no chat template, the template refuses the messages or drops one, has no tools, or a message
            is incomplete or holds other parts than text.
        TypeError: messages or options are of another type.
    """
    own = getattr(tokenizer, "chat_template", None)
    options = _options(template, own)
    if tokenizer is None or not (own or "chat_template" in options):
        raise ValueError(
            "this model has no chat template. Use generate() with a prompt in the model's own format, or give a chat_template"
        )

    def rendered(given: list[dict[str, Any]], **changed: Any) -> str:
        try:
            return tokenizer.apply_chat_template(given, tokenize=False, **{**options, **changed})
        except Exception as error:  # a template is a program of its own
            raise ValueError(f"the chat template refuses the conversation: {' '.join(str(error).split())}") from None

    checked = check(messages)
    checked = list(_with_contents(checked, _takes(rendered, template.get("chat_template_content_format", "auto"))))
    _check_roles(checked, _source(tokenizer, options))
    text = rendered(checked)
    _check_kept(checked, rendered)
    _check_calls(checked, text)
    if options.get("tools") and rendered(checked, tools=None) == text:
        raise ValueError("this model's chat template has no tools. Leave tools out, or give a chat_template that has them")
    return text


def is_plain(text: str, tokenizer: Any) -> bool:
    """Whether the model has a chat template, and the text none of the special tokens that templates put around messages."""
    if not getattr(tokenizer, "chat_template", None):
        return False
    return not any(token.strip() and token in text for token in tokenizer.get_added_vocab())


def _options(template: Template, named: Any) -> dict[str, Any]:
    """Arguments of `apply_chat_template`; `named`: the tokenizer's template, or several by name."""
    further = template.get("chat_template_kwargs") or {}
    if not isinstance(further, Mapping) or not all(isinstance(key, str) for key in further):
        raise TypeError(f"chat_template_kwargs must be a dict of variables for the template, got {further!r}")
    for key in _OF_THE_CALL:
        if key in further:
            raise ValueError(f"chat_template_kwargs cannot set {key!r}, which is no variable of a template. Leave it out")
    options = {"add_generation_prompt": True, "continue_final_message": False, **template, **further}
    for key in ("chat_template_kwargs", "chat_template_content_format"):
        options.pop(key, None)
    if options["add_generation_prompt"] and options["continue_final_message"]:
        raise ValueError(
            "continue_final_message and add_generation_prompt exclude each other: the last message goes on, or another begins. "
            "Give continue_final_message=True with add_generation_prompt=False"
        )
    options["chat_template"] = _template_text(options.get("chat_template"), named)
    options["tools"] = _checked_tools(options.get("tools"))
    return {key: value for key, value in options.items() if value is not None}


def _template_text(given: Any, named: Any) -> str | None:
    """A template itself; as in vLLM, a text without braces and line breaks is the path of a file that holds one."""
    if given is None or (isinstance(given, str) and re.search(r"[{}\n]", given)):
        return given
    if isinstance(named, Mapping) and given in named:
        return named[given]
    if not isinstance(given, str | Path):
        raise TypeError(f"chat_template must be a Jinja template or the path of a file with one, got {given!r}")
    if not Path(given).is_file():
        raise ValueError(f"no chat template: {str(given)!r} is neither a Jinja template nor a file. Give one of them")
    return Path(given).read_text(encoding="utf-8")


def _checked_tools(tools: Any) -> list[Any] | None:
    if tools is None:
        return None
    if not is_list(tools) or not all(isinstance(one, Mapping) or callable(one) for one in tools):
        raise TypeError(f"tools must be a list of JSON schemas or of Python functions, got {tools!r}")
    return [dict(one) if isinstance(one, Mapping) else one for one in tools] or None


def _no_messages(given: Any) -> TypeError:
    more = " Put the message into a list" if isinstance(given, Mapping) else " For a plain text use generate()"
    return TypeError(f"a conversation is a list of messages such as {_EXAMPLE}, got {given!r}.{more}")


def check(messages: Any) -> list[dict[str, Any]]:
    """Messages with a role and a content each: a text, or the texts of its parts as a list.

    Raises:
        ValueError: a message is incomplete, or holds other parts than text.
        TypeError: it is no list of messages.
    """
    if not is_list(messages):
        raise _no_messages(messages)
    if not messages:
        raise ValueError(f"the conversation is empty. Give at least one message, such as {_EXAMPLE}")
    return [_checked(one, number) for number, one in enumerate(messages, start=1)]


def _checked(message: Any, number: int) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise TypeError(f"message {number} must be a dict such as {_EXAMPLE[1:-1]}, got {message!r}")
    if not isinstance(message.get("role"), str) or not message["role"]:
        raise ValueError(f"message {number} has no role. Give one of {', '.join(ROLES)}, as in {_EXAMPLE[1:-1]}")
    content, called = message.get("content"), message.get("tool_calls")
    if called and not is_list(called):
        raise TypeError(f"tool_calls of message {number} must be a list of calls, got {called!r}")
    if content is None and not called:
        raise ValueError(f"message {number} (role {message['role']!r}) has no content. Give a text, as in {_EXAMPLE[1:-1]}")
    if is_list(content):
        content = [_text_of(part, number) for part in content or ()]
    elif content is not None and not isinstance(content, str):
        raise TypeError(f"the content of message {number} must be a text or a list of text parts, got {content!r}")
    checked = {key: value for key, value in message.items() if value is not None and key != "tool_calls"}
    calls = {"tool_calls": [_called(one, number) for one in called]} if called else {}  # templates ask whether there is the key
    return checked | {"content": content or ""} | calls


def _text_of(part: Any, number: int) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, Mapping):
        raise TypeError(f"a part of message {number} must be a dict such as {{'type': 'text', 'text': 'Hello'}}, got {part!r}")
    kind = part.get("type", "text" if "text" in part else None)
    if kind not in _TEXT_PARTS:
        raise ValueError(
            f"message {number} has a part of type {kind!r}, but models read text only here. Leave the part out, or describe it "
            "in a part of type 'text'"
        )
    if not isinstance(part.get("text"), str):
        raise TypeError(f"a text part of message {number} must hold a text, got {part!r}")
    return part["text"]


def _called(call: Any, number: int) -> Any:
    """A tool call with its arguments as an object, as templates want them; the OpenAI API has them as JSON in a string."""
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise TypeError(f"a tool call of message {number} must be a dict with a 'function' and its 'name', got {call!r}")
    given = function.get("arguments")
    try:
        arguments = json.loads(given or "{}") if isinstance(given, str) else given
    except json.JSONDecodeError as error:
        raise ValueError(f"the arguments of a tool call in message {number} are not JSON ({error}). Got {given!r}") from None
    changed = {**function, "arguments": arguments}
    return {**call, "function": changed} if "function" in call else changed


class _Takes(NamedTuple):
    """What contents a template takes."""

    texts: bool
    parts: bool


def _parts(texts: Sequence[str]) -> list[dict[str, str]]:
    return [{"type": "text", "text": text} for text in texts]


def _takes(rendered: Callable[..., str], wanted: Any) -> _Takes:
    """What contents a template takes, tried on a message with a word that is looked for in the prompt."""
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
    """Messages whose contents the template takes: texts as they are, and parts joined unless it takes parts."""
    for message in messages:
        content = message["content"]
        if isinstance(content, list):
            content = _parts(content) if takes.parts else "\n".join(content)
        elif takes.parts and not takes.texts:
            content = _parts([content])
        yield {**message, "content": content}


def _source(tokenizer: Any, options: Mapping[str, Any]) -> str:
    """The text of the templates, in which roles of their own are named."""
    own = options.get("chat_template") or tokenizer.chat_template
    return "\n".join(own.values()) if isinstance(own, Mapping) else str(own)


def _check_roles(messages: Sequence[Message], source: str) -> None:
    for number, message in enumerate(messages, start=1):
        role = message["role"]
        if role not in ROLES and not re.search(f"['\"]{re.escape(role)}['\"]", source):
            raise unknown_name(f"role of message {number}:", role, ROLES)


def _check_kept(messages: Sequence[dict[str, Any]], rendered: Callable[..., str]) -> None:
    """Raises where the template drops what a message says: each gets a word of its own, which is looked for in the prompt.

    An assistant's messages may be dropped: templates leave earlier reasoning out.
    """
    marks = [f"{_MARK}{number}END" for number in range(len(messages))]
    try:
        shown = rendered([{**one, "content": _marked(one["content"], mark)} for one, mark in zip(messages, marks, strict=True)])
    except ValueError:
        return  # it wants contents of a form that the words destroy
    for number, (message, mark) in enumerate(zip(messages, marks, strict=True), start=1):
        if message["role"] != "assistant" and message["content"] and mark not in shown:
            raise ValueError(
                f"the chat template drops message {number} (role {message['role']!r}). Leave it out, or say it in a message "
                "whose role the template knows"
            )


def _check_calls(messages: Sequence[Message], text: str) -> None:
    for number, message in enumerate(messages, start=1):
        names = [call.get("function", call)["name"] for call in message.get("tool_calls", ())]
        if not all(name in text for name in names):
            raise ValueError(
                f"the chat template drops the tool calls of message {number} ({', '.join(names)}). Write them into its "
                "content, or give a chat_template that has them"
            )


def _marked(content: Any, mark: str) -> Any:
    if isinstance(content, list):
        return [*content[:-1], {**content[-1], "text": content[-1]["text"] + mark}]
    return content + mark if content else content
