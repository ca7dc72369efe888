"""Checks the messages of a conversation. Does not import torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sized
from typing import Any

from foredraft.core.errors import UserError, UserTypeError, check_text, shown
from foredraft.core.prompts import is_list

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
"""Roles that are accepted for every template. Any other role must occur in the text of the template."""


Message = Mapping[str, Any]
"""``{"role": "user", "content": "..."}``. The content may also be a list of parts, ``[{"type": "text", "text": "..."}]``."""


MEDIA = {name: kind for kind in ("image", "audio", "video") for name in (kind, f"{kind}s", f"{kind}_url", f"input_{kind}")}
"""Keys of messages and of parts that hold images, audio or video, and their kinds. The models read text only."""


_TEXT_PARTS = ("text", "input_text", "output_text")


_KEYS_OF_PARTS = ("type", "text", "annotations", "logprobs", "cache_control")
"""Keys of a text part. Those after `text` say nothing to the model."""


_EXAMPLE = "[{'role': 'user', 'content': 'Hello'}]"


def conversations(messages: Any) -> list[Any]:
    """Returns the list of conversations in the argument `messages` of `LLM.chat`.

    Raises:
        TypeError: `messages` is neither a conversation nor a list of conversations.
    """
    if not is_list(messages):
        raise _no_messages(messages)
    return list(messages) if all(is_list(item) for item in messages) else [messages]


def _no_messages(given: Any) -> UserTypeError:
    hint = "Put the message into a list" if isinstance(given, Mapping) else "For a plain text use generate()"
    return UserTypeError(f"a conversation is a list of messages such as {_EXAMPLE}, got {given!r}", hint)


def check(messages: Any) -> list[dict[str, Any]]:
    """Checks messages and converts contents: each is a text, or the list of the texts of its parts.

    Raises:
        ValueError: a message is incomplete, or has a part that is not text.
        TypeError: `messages` is not a list of messages.
    """
    if not is_list(messages):
        raise _no_messages(messages)
    if not messages:
        raise UserError("the conversation is empty", f"Give at least one message, such as {_EXAMPLE}")
    return [_checked(message, number) for number, message in enumerate(messages, start=1)]


def _checked(message: Any, number: int) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise UserTypeError(f"message {number} must be a dict such as {_EXAMPLE[1:-1]}, got {message!r}")
    if not isinstance(message.get("role"), str) or not message["role"]:
        raise UserError(f"message {number} has no role", f"Give one of {', '.join(ROLES)}, as in {_EXAMPLE[1:-1]}")
    _check_media(message, number)
    content, called = message.get("content"), _calls_of(message, number)
    if content is None and not called:
        raise UserError(f"message {number} (role {message['role']!r}) has no content", f"Give a text, as in {_EXAMPLE[1:-1]}")
    if is_list(content):
        content = [_text_of(part, number) for part in content or ()]
    elif content is not None and not isinstance(content, str):
        raise UserTypeError(f"the content of message {number} must be a text or a list of text parts, got {content!r}")
    for text in content if isinstance(content, list) else (content or "",):
        check_text(f"the content of message {number}", text)
    checked = {key: value for key, value in message.items() if value is not None and key not in ("tool_calls", "function_call")}
    calls = {"tool_calls": [_called(call, number) for call in called]} if called else {}  # templates test for the key
    return checked | {"content": content or ""} | calls


def _check_media(message: Message, number: int) -> None:
    for key in MEDIA:
        value = message.get(key)
        if value is not None and value is not False and (not isinstance(value, Sized) or len(value)):
            raise UserError(
                f"message {number} has the key {key!r}, but models read text only here",
                "Leave the key out, or describe its value in the content",
            )


def _calls_of(message: Message, number: int) -> Any:
    """Returns the tool calls of a message. The older key `function_call` holds a single call."""
    called, old = message.get("tool_calls"), message.get("function_call")
    if called and not is_list(called):
        raise UserTypeError(f"tool_calls of message {number} must be a list of calls, got {shown(called)}")
    if not old:
        return called
    if called:
        raise UserError(f"message {number} has both function_call and tool_calls", "Leave function_call out")
    if not isinstance(old, Mapping) or not isinstance(old.get("name"), str):
        raise UserTypeError(f"function_call of message {number} must be a dict with a 'name' and 'arguments', got {shown(old)}")
    return [{"type": "function", "function": old}]


def _text_of(part: Any, number: int) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, Mapping):
        raise UserTypeError(
            f"a part of message {number} must be a dict such as {{'type': 'text', 'text': 'Hello'}}, got {part!r}"
        )
    kind = part.get("type", "text" if "text" in part else None)
    if kind not in _TEXT_PARTS:
        raise UserError(
            f"message {number} has a part of type {kind!r}, but models read text only here",
            "Leave the part out, or describe it in a part of type 'text'",
        )
    if not isinstance(part.get("text"), str):
        raise UserTypeError(f"a text part of message {number} must hold a text, got {shown(part)}")
    further = [key for key, value in part.items() if key not in _KEYS_OF_PARTS and value]
    if further:
        raise UserError(
            f"a text part of message {number} has the key {further[0]!r}, but models read its text only",
            "Leave the key out, or describe its value in the text",
        )
    return part["text"]


def _called(call: Any, number: int) -> Any:
    """Converts the arguments of a tool call to an object, which templates expect. The OpenAI API gives a JSON string."""
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise UserTypeError(f"a tool call of message {number} must be a dict with a 'function' and its 'name', got {call!r}")
    given = function.get("arguments")
    try:
        arguments = json.loads(given or "{}") if isinstance(given, str) else given
    except json.JSONDecodeError as error:
        raise UserError(
            f"the arguments of a tool call in message {number} are not JSON ({error}), got {shown(given)}", "Give a JSON object"
        ) from None
    except RecursionError:
        raise UserError(
            f"the arguments of a tool call in message {number} are nested too deeply, got {shown(given)}", "Give fewer levels"
        ) from None
    changed = {**function, "arguments": arguments}
    return {**call, "function": changed} if "function" in call else changed
