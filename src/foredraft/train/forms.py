"""The forms of contents and of tool calls that a chat template reads, found by trying it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from foredraft.train.records import Conversation, Message, text_of

PROBE = "foredraft-probe"
"""A text that occurs in no conversation."""

_TOOLS = [{"type": "function", "function": {"name": "f", "description": "f", "parameters": {"type": "object"}}}]
"""A list of tools. Some tokenizers have a separate template for conversations with tools."""


class Forms:
    """Converts conversations to the forms that a template reads.

    Args:
        render: renders a conversation as text; None if the template raises.
    """

    def __init__(self, render: Callable[[Conversation], str | None]) -> None:
        self._render = render
        self._known: dict[str, str] = {}

    def prepared(self, conversation: Conversation) -> Conversation:
        """Converts contents and arguments of tool calls to the form that the template reads."""
        return conversation._replace(messages=[self._formed(message) for message in conversation.messages])

    def _formed(self, message: Message) -> Message:
        message = {key: value for key, value in message.items() if key != "weight"}
        if "content" in message:
            form = self._form_of_content(message["role"])
            if form == "text":
                message["content"] = text_of(message)
            elif form == "parts" and isinstance(message["content"], str):
                message["content"] = [{"type": "text", "text": message["content"]}]
        if "tool_calls" in message:
            if "content" not in message and self._needs_content():
                message["content"] = ""
            message["tool_calls"] = [self._formed_call(call) for call in message["tool_calls"]]
        return message

    def _needs_content(self) -> bool:
        """Whether the template needs a content beside a tool call: it raises without one, but accepts an empty one."""
        if "no content" not in self._known:
            called = self._formed({"role": "assistant", "content": "", "tool_calls": [_call({PROBE: "x"})]})
            messages = [{"role": "user", "content": "x"}, called]
            bare = {key: value for key, value in called.items() if key != "content"}
            found = self._render(Conversation(messages, _TOOLS)) is not None
            found = found and self._render(Conversation([messages[0], bare], _TOOLS)) is None
            self._known["no content"] = str(found)
        return self._known["no content"] == "True"

    def _form_of_content(self, role: str) -> str:
        """Returns the form of content that the template reads in turns of a role: ``text``, ``parts`` or ``any``."""
        if role not in self._known:
            before = [] if role in ("user", "system", "developer") else [{"role": "user", "content": "x"}]
            after = [{"role": "user", "content": "x"}] if role in ("system", "developer") else []
            parts = [{"type": "text", "text": f"{PROBE}-{i}"} for i in range(2)]
            spelled = self._render(Conversation([*before, {"role": role, "content": parts}, *after]))
            plain = self._render(Conversation([*before, {"role": role, "content": PROBE}, *after]))
            reads_parts = spelled is not None and all(part["text"] in spelled for part in parts)
            reads_parts = reads_parts and not re.search(r"""['"]type['"]""", spelled or "")
            reads_text = plain is not None and PROBE in plain
            self._known[role] = ("any" if reads_text else "parts") if reads_parts else "text"
        return self._known[role]

    def _formed_call(self, call: Any) -> Any:
        """Converts the arguments of a tool call to the form that the template reads: an object, or JSON in a text."""
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or "arguments" not in function:
            return call
        arguments, form = function["arguments"], self._form_of_arguments()
        if form == "object" and isinstance(arguments, str):
            arguments = _object(arguments)
        elif form == "text" and not isinstance(arguments, str):
            arguments = json.dumps(arguments, ensure_ascii=False)
        formed = {**function, "arguments": arguments}
        return {**call, "function": formed} if "function" in call else formed

    def _form_of_arguments(self) -> str:
        """Returns the form of a tool call's arguments that the template reads: ``object``, ``text`` or ``any``.

        A template that writes JSON itself would quote a text a second time. A template that expects a text would write an
        object in Python's notation.
        """
        if "arguments" not in self._known:
            reads = []
            for arguments in ({PROBE: "x"}, json.dumps({PROBE: "x"})):
                called = {"role": "assistant", "content": "", "tool_calls": [_call(arguments)]}
                text = self._render(Conversation([{"role": "user", "content": "x"}, called], _TOOLS))
                reads.append(text is not None and PROBE in text and f'\\"{PROBE}' not in text and f"'{PROBE}'" not in text)
            self._known["arguments"] = {(True, False): "object", (False, True): "text"}.get((reads[0], reads[1]), "any")
        return self._known["arguments"]


def _call(arguments: Any) -> dict[str, Any]:
    return {"id": "abcdefghi", "type": "function", "function": {"name": "f", "arguments": arguments}}


def _object(text: str) -> Any:
    """Parses a text as a JSON object; returns the text itself if it is none."""
    try:
        parsed = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return parsed if isinstance(parsed, dict) else text
