"""Conversations rendered by the target's chat template. The template decides every token and the mask of the answers.

A template silently ignores the parts of a conversation that it does not know. To notice this, each conversation is rendered a
second time with such a part changed. If the text stays the same, the template ignores the part, and the conversation is not
used.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from foredraft.core.chat import OF_THE_CALL, knows_role, source_of
from foredraft.train.forms import PROBE, Forms
from foredraft.train.records import CannotUse, Conversation, text_of

_MARKERS = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


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
        self._forms = Forms(self._tried)

    def prompt(self, conversation: Conversation) -> list[int]:
        """Renders the prompt for the next assistant turn, as token ids.

        Raises:
            CannotUse: the template refuses the conversation, or ignores a part of it.
        """
        if not self.has_template:
            asked = [text_of(message) for message in conversation.messages if message["role"] == "user"]
            return self._encode(asked[-1], special=True)
        conversation = self._forms.prepared(conversation)
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
        conversation = self._forms.prepared(conversation)
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
        prepared, source = self._forms.prepared(conversation), source_of(self._tokenizer.chat_template)
        generation, held = prepared.messages[-1]["role"] != "assistant", []
        changes = [
            (_with(prepared, i, **{key: PROBE}), key)
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
    return PROBE if isinstance(content, str) else [{"type": "text", "text": PROBE}]


def _renamed(call: Any) -> Any:
    if isinstance(call, dict) and isinstance(call.get("function"), dict):
        return {**call, "function": {**call["function"], "name": PROBE}}
    return {**call, "name": PROBE} if isinstance(call, dict) else call
