"""Conversations rendered by the target's chat template. The template decides every token and the mask of the answers.

A template silently ignores the parts of a conversation that it does not know. To notice this, each conversation is rendered a
second time with such a part changed. If the text stays the same, the template ignores the part, and the conversation is not
used.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from foredraft.train.records import CannotUse, Conversation, Message, text_of

_MARKERS = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")

_PROBE = "foredraft-probe"
"""A text that occurs in no conversation."""

_TOOLS = [{"type": "function", "function": {"name": "f", "description": "f", "parameters": {"type": "object"}}}]
"""A list of tools. Some tokenizers have a separate template for conversations with tools."""

_NO_MASK = "with earlier turns that the template renders differently when more turns follow (no mask)"


class Rendered(NamedTuple):
    """A rendered conversation.

    Attributes:
        ids: token ids.
        mask: whether each token belongs to an assistant turn.
    """

    ids: list[int]
    mask: list[bool]


class Renderer:
    """Renders conversations with a tokenizer's chat template. Without a template, the last question is rendered as plain text.

    Attributes:
        has_template: whether the tokenizer has a chat template.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.has_template = bool(getattr(tokenizer, "chat_template", None))
        self._tokenizer = tokenizer
        self._known: dict[str, str] = {}

    def prompt(self, conversation: Conversation) -> list[int]:
        """Renders the prompt for the next assistant turn, as token ids.

        Raises:
            CannotUse: the template refuses the conversation, or ignores a part of it.
        """
        if not self.has_template:
            asked = [text_of(message) for message in conversation.messages if message["role"] == "user"]
            return self._encode(asked[-1], special=True)
        conversation = self._prepared(conversation)
        text = self._checked(conversation, generation=True)
        return self._encode(text)

    def given(self, conversation: Conversation) -> Rendered:
        """Renders the whole conversation, with a mask of all assistant turns.

        The mask comes from the template's ``{% generation %}`` markers. Without markers, each assistant turn is located by two
        renderings: the prompt for the turn, and the conversation up to and including the turn. The turn is the difference.

        Raises:
            CannotUse: the template refuses the conversation or ignores a part of it, or the mask cannot be found.
        """
        conversation = self._prepared(conversation)
        text = self._checked(conversation, generation=False)
        if _MARKERS.search(str(self._tokenizer.get_chat_template(None, tools=conversation.tools))) and self._is_fast:
            ids, mask = self._marked(conversation)
        else:
            ids, mask = self._by_prefixes(conversation, text)
        if not any(mask):
            raise CannotUse("with no answer that the template marks")
        return Rendered(ids, mask)

    def unused(self, conversation: Conversation) -> str | None:
        """Describes the parts that `prompt` leaves out because there is no template, worded to follow a count; None if none."""
        if self.has_template:
            return None
        messages = conversation.messages
        last = max(i for i, message in enumerate(messages) if message["role"] == "user")
        roles = {message["role"] for i, message in enumerate(messages) if i != last}
        called = conversation.tools or any("tool_calls" in message for message in messages)
        others = sorted(roles - {"user", "assistant"})
        held = [f"turns of role {role!r}" for role in others] + ["tools"] * bool(called)
        held += ["earlier turns"] * bool(roles & {"user", "assistant"})
        return f"with {' and '.join(held)} that cannot be expressed without a chat template" if held else None

    @property
    def _is_fast(self) -> bool:
        return bool(getattr(self._tokenizer, "is_fast", False))

    def _encode(self, text: str, *, special: bool = False) -> list[int]:
        _check_text(text)
        return [int(token) for token in self._tokenizer.encode(text, add_special_tokens=special, verbose=False)]

    def _text(self, messages: Sequence[Message], tools: Any, *, generation: bool) -> str:
        """Renders messages as text.

        Raises:
            Exception: any exception that the template raises. Templates are programs.
        """
        return self._tokenizer.apply_chat_template(
            list(messages), tools=tools, add_generation_prompt=generation, tokenize=False
        )

    def _tried(self, messages: Sequence[Message], tools: Any = None, *, generation: bool = False) -> str | None:
        """Renders messages as text; returns None if the template raises."""
        try:
            return self._text(messages, tools, generation=generation)
        except Exception:
            return None

    def _checked(self, conversation: Conversation, *, generation: bool) -> str:
        """Renders a conversation as text, and checks that the template ignores no part of it.

        Raises:
            CannotUse: the template refuses the conversation, or ignores a part of it.
        """
        messages, tools = conversation.messages, conversation.tools
        try:
            text = self._text(messages, tools, generation=generation)
        except Exception as error:
            raise CannotUse(self._refusal(conversation, error, generation=generation)) from None
        for change, name in _changes(conversation):
            if self._tried(change.messages, change.tools, generation=generation) == text:
                raise CannotUse(f"with {name} that the template ignores")
        return text

    def _refusal(self, conversation: Conversation, error: Exception, *, generation: bool) -> str:
        """Names the role that the template refuses. If no single role is to blame, it quotes the template's error."""
        for role in sorted(_roles(conversation) - {"user", "assistant"}):
            others = [message for message in conversation.messages if message["role"] != role]
            if self._tried(others, conversation.tools, generation=generation) is not None:
                return f"with turns of role {role!r} that the template refuses"
        quoted = " ".join(str(error).split())[:100] or type(error).__name__
        return f"refused by the template ({quoted})"

    def _marked(self, conversation: Conversation) -> tuple[list[int], list[bool]]:
        """Returns ids and mask, by the generation markers of the template."""
        encoded = self._tokenizer.apply_chat_template(
            conversation.messages, tools=conversation.tools, return_dict=True, return_assistant_tokens_mask=True
        )
        return [int(token) for token in encoded["input_ids"]], [bool(flag) for flag in encoded["assistant_masks"]]

    def _by_prefixes(self, conversation: Conversation, whole: str) -> tuple[list[int], list[bool]]:
        """Returns ids and mask, by rendering the prompt for each assistant turn and the conversation up to its end."""
        messages, spans = conversation.messages, []
        for i, message in enumerate(messages):
            if message["role"] == "assistant":
                begin = self._tried(messages[:i], conversation.tools, generation=True) if i else None
                end = whole if i + 1 == len(messages) else self._tried(messages[: i + 1], conversation.tools)
                if begin is None or end is None:
                    raise CannotUse("with an answer whose prompt alone the template refuses (no mask)")
                if not (whole.startswith(begin) and whole.startswith(end) and len(begin) <= len(end)):
                    raise CannotUse(_NO_MASK)
                spans.append((len(begin), len(end)))
        if self._is_fast:
            _check_text(whole)
            found = self._tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
            return [int(token) for token in found["input_ids"]], _overlapping(found["offset_mapping"], spans)
        ids = self._encode(whole)
        mask = [False] * len(ids)
        for before, after in ((self._encode(whole[:begin]), self._encode(whole[:end])) for begin, end in spans):
            if ids[: len(before)] != before or ids[: len(after)] != after:
                raise CannotUse(_NO_MASK)
            mask[len(before) : len(after)] = [True] * (len(after) - len(before))
        return ids, mask

    def _prepared(self, conversation: Conversation) -> Conversation:
        """Converts contents and arguments of tool calls to the form that the template reads."""
        return conversation._replace(messages=[self._formed(message) for message in conversation.messages])

    def _formed(self, message: Message) -> Message:
        message = dict(message)
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
            called = self._formed({"role": "assistant", "content": "", "tool_calls": [_call({_PROBE: "x"})]})
            messages = [{"role": "user", "content": "x"}, called]
            bare = {key: value for key, value in called.items() if key != "content"}
            found = self._tried(messages, _TOOLS) is not None and self._tried([messages[0], bare], _TOOLS) is None
            self._known["no content"] = str(found)
        return self._known["no content"] == "True"

    def _form_of_content(self, role: str) -> str:
        """Returns the form of content that the template reads in turns of a role: ``text``, ``parts`` or ``any``."""
        if role not in self._known:
            before = [] if role in ("user", "system", "developer") else [{"role": "user", "content": "x"}]
            after = [{"role": "user", "content": "x"}] if role in ("system", "developer") else []
            parts = [{"type": "text", "text": f"{_PROBE}-{i}"} for i in range(2)]
            spelled = self._tried([*before, {"role": role, "content": parts}, *after])
            plain = self._tried([*before, {"role": role, "content": _PROBE}, *after])
            reads_parts = spelled is not None and all(part["text"] in spelled for part in parts)
            reads_parts = reads_parts and not re.search(r"""['"]type['"]""", spelled or "")
            reads_text = plain is not None and _PROBE in plain
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
            for arguments in ({_PROBE: "x"}, json.dumps({_PROBE: "x"})):
                called = {"role": "assistant", "content": "", "tool_calls": [_call(arguments)]}
                text = self._tried([{"role": "user", "content": "x"}, called], _TOOLS)
                reads.append(text is not None and _PROBE in text and f'\\"{_PROBE}' not in text and f"'{_PROBE}'" not in text)
            self._known["arguments"] = {(True, False): "object", (False, True): "text"}.get((reads[0], reads[1]), "any")
        return self._known["arguments"]


def _call(arguments: Any) -> dict[str, Any]:
    return {"id": "abcdefghi", "type": "function", "function": {"name": "f", "arguments": arguments}}


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise CannotUse("with invalid Unicode characters (lone surrogates)") from None


def _overlapping(offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> list[bool]:
    """Marks the tokens that overlap one of the spans, as Transformers' own mask does. Spans are disjoint and in order."""
    mask, place = [], 0
    for first, last in offsets:
        while place < len(spans) and first >= spans[place][1]:
            place += 1
        mask.append(place < len(spans) and last > spans[place][0])
    return mask


def _object(text: str) -> Any:
    """Parses a text as a JSON object; returns the text itself if it is none."""
    try:
        parsed = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return parsed if isinstance(parsed, dict) else text


def _roles(conversation: Conversation) -> set[str]:
    return {message["role"] for message in conversation.messages}


def _changes(conversation: Conversation) -> list[tuple[Conversation, str]]:
    """Returns variants of the conversation, each with one part changed that some templates ignore, and the part's name."""
    messages = conversation.messages
    found = [(conversation._replace(tools=None), "tools")] if conversation.tools else []
    for i, message in enumerate(messages):
        if message["role"] not in ("user", "assistant") and text_of(message).strip():
            found.append((_with(conversation, i, content=_changed(message["content"])), f"turns of role {message['role']!r}"))
        if "tool_calls" in message:
            calls = [_renamed(call) for call in message["tool_calls"]]
            found.append((_with(conversation, i, tool_calls=calls), "tool calls"))
    return found


def _with(conversation: Conversation, place: int, **changed: Any) -> Conversation:
    messages = list(conversation.messages)
    messages[place] = {**messages[place], **changed}
    return conversation._replace(messages=messages)


def _changed(content: Any) -> Any:
    return _PROBE if isinstance(content, str) else [{"type": "text", "text": _PROBE}]


def _renamed(call: Any) -> Any:
    if isinstance(call, dict) and isinstance(call.get("function"), dict):
        return {**call, "function": {**call["function"], "name": _PROBE}}
    return {**call, "name": _PROBE} if isinstance(call, dict) else call
