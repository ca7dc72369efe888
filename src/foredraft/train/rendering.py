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

from foredraft.core.chat import OF_THE_CALL, knows_role, source_of
from foredraft.train.records import CannotUse, Conversation, Message, text_of

_MARKERS = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")

_PROBE = "foredraft-probe"
"""A text that occurs in no conversation."""

_TOOLS = [{"type": "function", "function": {"name": "f", "description": "f", "parameters": {"type": "object"}}}]
"""A list of tools. Some tokenizers have a separate template for conversations with tools."""

_THOUGHTS = ("reasoning_content", "reasoning", "thinking")
"""Keys of a message that hold the thoughts before an answer."""

_RESERVED = (*OF_THE_CALL, "tools", "add_generation_prompt", "continue_final_message", "chat_template")
"""Names that `chat_template_kwargs` of a record cannot set."""

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
        """Renders the whole conversation, with a mask of all assistant turns. Turns of weight 0 are left out of the mask.

        The mask comes from the template's ``{% generation %}`` markers. Without markers, each assistant turn is located by two
        renderings: the prompt for the turn, and the conversation up to and including the turn. The turn is the difference.

        Raises:
            CannotUse: the template refuses the conversation or ignores a part of it, or the mask cannot be found.
        """
        weights = _weights(conversation)
        conversation = self._prepared(conversation)
        text = self._checked(conversation, generation=False)
        _check_text(text)
        if _MARKERS.search(str(self._tokenizer.get_chat_template(None, tools=conversation.tools))) and self._is_fast:
            ids, mask = self._marked(conversation, text, weights)
        else:
            ids, mask = self._by_prefixes(conversation, text, weights)
        if not any(mask):
            raise CannotUse("with no answer that the template marks")
        return Rendered(ids, mask)

    def unused(self, conversation: Conversation) -> str | None:
        """Describes the parts that are left out of the text, worded to follow a count; None if there are none."""
        return self._dropped(conversation) if self.has_template else _inexpressible(conversation)

    def _dropped(self, conversation: Conversation) -> str | None:
        """Names the thoughts and the variables that the template does not use. Some templates use the latest thoughts only."""
        prepared, source = self._prepared(conversation), source_of(self._tokenizer.chat_template)
        generation, held = prepared.messages[-1]["role"] != "assistant", []
        changes = [
            (_with(prepared, i, **{key: _PROBE}), key)
            for i, message in enumerate(prepared.messages)
            for key in _THOUGHTS
            if message.get(key)
        ]
        text = self._tried(prepared, generation=generation) if changes else None
        for change, key in changes:
            if key not in held and self._tried(change, generation=generation) == text:
                held.append(key)
        names = [key for key in conversation.variables or () if not re.search(rf"\b{re.escape(key)}\b", source)]
        held += [f"chat_template_kwargs {name!r}" for name in names]
        return f"with {' and '.join(held)} that the template does not use" if held else None

    @property
    def _is_fast(self) -> bool:
        return bool(getattr(self._tokenizer, "is_fast", False))

    def _encode(self, text: str, *, special: bool = False) -> list[int]:
        _check_text(text)
        return [int(token) for token in self._tokenizer.encode(text, add_special_tokens=special, verbose=False)]

    def _text(self, conversation: Conversation, *, generation: bool) -> str:
        """Renders a conversation as text.

        Raises:
            Exception: any exception that the template raises. Templates are programs.
        """
        options = {**(conversation.variables or {}), "tools": conversation.tools, "add_generation_prompt": generation}
        return self._tokenizer.apply_chat_template(list(conversation.messages), tokenize=False, **options)

    def _tried(self, conversation: Conversation, *, generation: bool = False) -> str | None:
        """Renders a conversation as text; returns None if the template raises."""
        try:
            return self._text(conversation, generation=generation)
        except Exception:
            return None

    def _checked(self, conversation: Conversation, *, generation: bool) -> str:
        """Renders a conversation as text, and checks that the template ignores no part of it.

        Raises:
            CannotUse: the template refuses the conversation, or ignores a part of it.
        """
        self._check_known(conversation)
        try:
            text = self._text(conversation, generation=generation)
        except Exception as error:
            raise CannotUse(self._refusal(conversation, error, generation=generation)) from None
        for change, name in _changes(conversation):
            if self._tried(change, generation=generation) == text:
                raise CannotUse(f"with {name} that the template ignores")
        return text

    def _check_known(self, conversation: Conversation) -> None:
        """Raises `CannotUse` for a role that the template does not know, and for a variable that it cannot be given."""
        source = source_of(self._tokenizer.chat_template)
        for role in sorted(_roles(conversation)):
            if not knows_role(source, role):
                raise CannotUse(f"with turns of role {role!r} that the template does not know")
        for key in conversation.variables or ():
            if key in _RESERVED:
                raise CannotUse(f"with chat_template_kwargs {key!r}, which is not a variable of a template")

    def _refusal(self, conversation: Conversation, error: Exception, *, generation: bool) -> str:
        """Names the role that the template refuses. If no single role is to blame, it quotes the template's error."""
        for role in sorted(_roles(conversation) - {"user", "assistant"}):
            others = [message for message in conversation.messages if message["role"] != role]
            if self._tried(conversation._replace(messages=others), generation=generation) is not None:
                return f"with turns of role {role!r} that the template refuses"
        quoted = " ".join(str(error).split())[:100] or type(error).__name__
        return f"refused by the template ({quoted})"

    def _marked(self, conversation: Conversation, whole: str, weights: Sequence[int]) -> tuple[list[int], list[bool]]:
        """Returns ids and mask, by the generation markers of the template."""
        encoded = self._tokenizer.apply_chat_template(
            conversation.messages,
            **{**(conversation.variables or {}), "tools": conversation.tools},
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        ids, mask = [int(token) for token in encoded["input_ids"]], [bool(flag) for flag in encoded["assistant_masks"]]
        left_out = [self._span(conversation, whole, i, prompt=False) for i, weight in enumerate(weights) if not weight]
        if left_out:
            offsets = self._tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
            inside = _overlapping(offsets["offset_mapping"], left_out)
            mask = [flag and not other for flag, other in zip(mask, inside, strict=True)]
        return ids, mask

    def _span(self, conversation: Conversation, whole: str, place: int, *, prompt: bool = True) -> tuple[int, int]:
        """Locates a turn in the text of the whole conversation, with or without the prompt for it.

        Raises:
            CannotUse: the template refuses the turns up to this one, or renders them differently.
        """

        def until(count: int, *, generation: bool = False) -> str | None:
            if count == len(conversation.messages):
                return whole
            return self._tried(conversation._replace(messages=conversation.messages[:count]), generation=generation)

        begin = until(place, generation=prompt) if place else None if prompt else ""
        end = until(place + 1)
        if begin is None or end is None:
            raise CannotUse("with an answer whose prompt alone the template refuses (no mask)")
        if not (whole.startswith(begin) and whole.startswith(end) and len(begin) <= len(end)):
            raise CannotUse(_NO_MASK)
        return len(begin), len(end)

    def _by_prefixes(self, conversation: Conversation, whole: str, weights: Sequence[int]) -> tuple[list[int], list[bool]]:
        """Returns ids and mask, by rendering the prompt for each assistant turn and the conversation up to its end."""
        learned = [i for i, message in enumerate(conversation.messages) if message["role"] == "assistant" and weights[i]]
        spans = [self._span(conversation, whole, i) for i in learned]
        if self._is_fast:
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
            called = self._formed({"role": "assistant", "content": "", "tool_calls": [_call({_PROBE: "x"})]})
            messages = [{"role": "user", "content": "x"}, called]
            bare = {key: value for key, value in called.items() if key != "content"}
            found = self._tried(Conversation(messages, _TOOLS)) is not None
            found = found and self._tried(Conversation([messages[0], bare], _TOOLS)) is None
            self._known["no content"] = str(found)
        return self._known["no content"] == "True"

    def _form_of_content(self, role: str) -> str:
        """Returns the form of content that the template reads in turns of a role: ``text``, ``parts`` or ``any``."""
        if role not in self._known:
            before = [] if role in ("user", "system", "developer") else [{"role": "user", "content": "x"}]
            after = [{"role": "user", "content": "x"}] if role in ("system", "developer") else []
            parts = [{"type": "text", "text": f"{_PROBE}-{i}"} for i in range(2)]
            spelled = self._tried(Conversation([*before, {"role": role, "content": parts}, *after]))
            plain = self._tried(Conversation([*before, {"role": role, "content": _PROBE}, *after]))
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
                text = self._tried(Conversation([{"role": "user", "content": "x"}, called], _TOOLS))
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


def _weights(conversation: Conversation) -> list[int]:
    """Returns whether each turn is learned from: 0 or 1. As in OpenAI's files, `weight` of an assistant turn says it.

    Raises:
        CannotUse: a weight is another value, or no answer has weight 1.
    """
    messages = conversation.messages
    answers = [message.get("weight", 1) for message in messages if message["role"] == "assistant"]
    if any(weight not in (0, 1) for weight in answers):
        raise CannotUse("with an assistant turn whose weight is neither 0 nor 1")
    if answers and not any(answers):
        raise CannotUse("with weight 0 for every answer")
    return [int(message.get("weight", 1)) if message["role"] == "assistant" else 1 for message in messages]


def _inexpressible(conversation: Conversation) -> str | None:
    """Describes the parts that a prompt without a chat template leaves out, worded to follow a count; None if none."""
    messages = conversation.messages
    last = max(i for i, message in enumerate(messages) if message["role"] == "user")
    roles = {message["role"] for i, message in enumerate(messages) if i != last}
    called = conversation.tools or any("tool_calls" in message for message in messages)
    others = sorted(roles - {"user", "assistant"})
    held = [f"turns of role {role!r}" for role in others] + ["tools"] * bool(called)
    held += ["earlier turns"] * bool(roles & {"user", "assistant"})
    held += ["chat_template_kwargs"] * bool(conversation.variables)
    return f"with {' and '.join(held)} that cannot be expressed without a chat template" if held else None


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
