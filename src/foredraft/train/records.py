"""Conversations from the records of JSON Lines files.

Known shapes are OpenAI messages, ShareGPT conversations, instructions, questions and conversation trees. Every turn, tool call
and list of tools is kept as the file has it. Only the names of keys and of well-known roles are changed to the names that chat
templates use.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from foredraft.core.errors import shown
from foredraft.core.messages import MEDIA, ROLES

EXAMPLE = 'A record looks like {"messages": [{"role": "user", "content": "..."}]} or {"prompt": "..."}'

_LISTS = ("messages", "conversations", "conversation", "turns")

_ROLES = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "bot", "model", "chatgpt", "bing", "bard", "function_call", "tool_call"), "assistant"),
    **dict.fromkeys(("observation", "function_response", "tool_response"), "tool"),
}
"""Role names of well-known files, in lower case, and their standard names. Other roles are passed to the template unchanged."""

_ROLE_KEYS = ("role", "from", "speaker")
_TEXT_KEYS = ("content", "value", "utterance", "text")
_ANSWER_KEYS = ("response", "output", "answer", "completion")
_CALLS = ("tool_calls", "function_call")

_ALLOWED = {
    **dict.fromkeys(_LISTS, "a list of messages"),
    **dict.fromkeys(("instruction", "question"), "a text that is not empty"),
    "prompt": "a text that is not empty, or a list of messages",
}
"""Keys of a record that hold a conversation or its start, and what they must hold."""

Message = dict[str, Any]
"""A message for a chat template. `content` is absent, a text, or a list of ``{"type": "text", "text": ...}``."""


class CannotUse(Exception):
    """A conversation cannot be used. The message is the reason, worded to follow a count: "3 with image parts"."""


class Conversation(NamedTuple):
    """A conversation that a chat template can render.

    Attributes:
        messages: the messages, in order.
        tools: descriptions of the tools, as the record has them.
        variables: further variables for the template: `chat_template_kwargs` of the record.
        unused: description of a part of the record that is not used, worded to follow a count; None if all is used.
    """

    messages: list[Message]
    tools: list[Any] | None = None
    variables: Mapping[str, Any] | None = None
    unused: str | None = None

    @property
    def question(self) -> str | None:
        """Text of the first user turn; None if there is none."""
        return next((text_of(message) for message in self.messages if message["role"] == "user"), None)


def text_of(message: Message) -> str:
    """Returns the text of a message. Parts are joined by line ends."""
    content = message.get("content", "")
    return content if isinstance(content, str) else "\n".join(part["text"] for part in content)


def conversations_of(record: Mapping[str, Any]) -> list[Conversation]:
    """Reads the conversations of one record, with the answers that it holds.

    Raises:
        CannotUse: the record holds images, audio or video, or a tool call that cannot be read.
        ValueError: the shape of the record is unknown. The message describes it.
    """
    _check_media(record)
    tools, variables = _tools(record), record.get("chat_template_kwargs") or None
    if variables is not None and not isinstance(variables, dict):
        raise ValueError(f"chat_template_kwargs is of type {type(variables).__name__}, not an object")
    before = [{"role": "system", "content": record[key]} for key in ("system", "system_prompt") if _is_text(record.get(key))]
    return [found._replace(messages=[*before, *found.messages], tools=tools, variables=variables) for found in _shaped(record)]


def _shaped(record: Mapping[str, Any]) -> Iterator[Conversation]:
    """Yields the conversations of a record, without its system text and its tools."""
    for key in _LISTS:
        if isinstance(record.get(key), list):
            yield _listed(record[key], record)
            return
    if _is_text(record.get("instruction")):
        yield from _instructed(record)
    elif _is_text(record.get("question")) or _is_text(record.get("prompt")):
        question = record["question"] if _is_text(record.get("question")) else record["prompt"]
        for answer in _answers(record):
            yield Conversation(_pair(question, answer))
    elif isinstance(record.get("prompt"), list):
        answer = next((record[key] for key in ("completion", "chosen") if isinstance(record.get(key), list)), [])
        yield _listed([*record["prompt"], *answer], record)
    elif isinstance(record.get("prompt"), dict) and "text" in record["prompt"]:
        yield from _tree(record["prompt"])
    else:
        wrong = sorted((key for key in _ALLOWED if key in record), key=lambda key: record[key] is None)
        if wrong:
            raise ValueError(f"{wrong[0]} of a record must be {_ALLOWED[wrong[0]]}, got {shown(record[wrong[0]])}")
        known = f"{', '.join(_LISTS)}, instruction, question or prompt"
        raise ValueError(f"a record has the keys {', '.join(list(record)[:6])}, and none of them is {known}")


def _check_media(given: Mapping[str, Any]) -> None:
    for key, kind in MEDIA.items():
        if given.get(key):
            raise CannotUse(f"with {kind} parts")


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _pair(question: str, answer: str | None) -> list[Message]:
    asked: list[Message] = [{"role": "user", "content": question}]
    return asked if answer is None else [*asked, {"role": "assistant", "content": answer}]


def _answers(record: Mapping[str, Any]) -> list[str | None]:
    """Returns the answers to a record's question, or a single None if it has no answer."""
    texts = [record[key] for key in _ANSWER_KEYS if isinstance(record.get(key), str)][:1]
    results = record["results"] if isinstance(record.get("results"), list) else []
    for result in results:  # a report of sampled answers
        outputs = result.get("outputs") if isinstance(result, dict) else None
        texts += [text for text in outputs or () if isinstance(text, str)]
    return texts or [None]


def _instructed(record: Mapping[str, Any]) -> Iterator[Conversation]:
    """Yields a conversation per instance of an instruction, with its input, after the earlier pairs of `history`."""
    history = record["history"] if isinstance(record.get("history"), list) else []
    before = [message for question, answer in history for message in _pair(question, answer)]
    instances = record["instances"] if isinstance(record.get("instances"), list) else [record]
    for instance in instances:
        question = _joined(record["instruction"], instance.get("context") or instance.get("input") or "")
        yield from (Conversation([*before, *_pair(question, answer)]) for answer in _answers(instance))


def _joined(*parts: str) -> str:
    return "\n\n".join(part.strip() for part in parts if part.strip())


def _listed(messages: Sequence[Any], record: Mapping[str, Any]) -> Conversation:
    """Reads a list of messages. A list of plain strings holds only the user's turns; `choices` may hold the answers."""
    if all(isinstance(message, str) for message in messages):
        choices = record.get("choices")
        answers = choices[0].get("turns") if isinstance(choices, list) and choices and isinstance(choices[0], dict) else None
        if isinstance(answers, list) and len(answers) == len(messages):
            return Conversation([message for pair in zip(messages, answers, strict=True) for message in _pair(*pair)])
        unused = "with several questions and no answers: only the first question is asked" if len(messages) > 1 else None
        return Conversation(_pair(messages[0], None) if messages else [], unused=unused)
    return Conversation([_message(message) for message in messages])


def _message(given: Any) -> Message:
    """Reads a message, with the keys and roles that templates use. Keys without a value are dropped, as Transformers does."""
    if not isinstance(given, dict):
        raise ValueError(f"a message is of type {type(given).__name__}, not an object with a role and a content")
    role_key = next((key for key in _ROLE_KEYS if _is_text(given.get(key))), None)
    text_key = next((key for key in _TEXT_KEYS if key in given), None)
    if role_key is None or (text_key is None and not any(key in given for key in _CALLS)):
        raise ValueError(f"a message has the keys {', '.join(list(given)[:6])}, but no role or no content")
    _check_media(given)
    role = _role(str(given[role_key]), is_speaker=role_key == "speaker")
    dropped = {role_key, text_key, *_CALLS}
    kept = {key: value for key, value in given.items() if key not in dropped and value is not None}
    content, calls = _content(given.get(text_key), role), _calls(given)
    if text_key == "value" and given[role_key] in ("function_call", "tool_call"):
        content, calls = None, [*calls, *_spelled_calls(given["value"])]
    message: Message = {"role": role}
    message |= {} if content is None else {"content": content}
    return message | kept | ({"tool_calls": calls} if calls else {})


def _role(name: str, *, is_speaker: bool = False) -> str:
    """Returns the standard name of a role. The speaker SYSTEM of a dialogue corpus is the assistant."""
    if name == "SYSTEM":
        return "assistant" if is_speaker else "system"
    lower = name.lower()
    return _ROLES.get(lower, lower if lower in ROLES else name)


def _content(content: Any, role: str) -> str | list[dict[str, str]] | None:
    """Reads the content of a message: a text, a list of text parts, or None.

    Raises:
        CannotUse: a part is not text.
        ValueError: the content has another type.
    """
    if content is None or isinstance(content, str):
        return content
    if isinstance(content, dict) and isinstance(content.get("answer"), str):
        return content["answer"]
    if isinstance(content, list) and all(isinstance(part, str) or _is_part(part) for part in content):
        return [_part(part) for part in content]
    if role in ("tool", "function"):
        return json.dumps(content, ensure_ascii=False)
    raise ValueError(f"the content of a message is of type {type(content).__name__}, neither a text nor a list of parts")


def _is_part(part: Any) -> bool:
    return isinstance(part, dict) and ("type" in part or "text" in part)


def _part(part: str | Mapping[str, Any]) -> dict[str, str]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    kind = str(part.get("type", "text"))
    if kind in ("text", "input_text", "output_text"):
        if not isinstance(part.get("text"), str):
            raise ValueError("a text part of a message has no text")
        _check_media(part)
        return {"type": "text", "text": part["text"]}
    raise CannotUse(f"with {kind.removeprefix('input_').removesuffix('_url')} parts")


def _calls(given: Mapping[str, Any]) -> list[Any]:
    """Returns the tool calls of a message. The older key `function_call` holds one tool call."""
    calls = given.get("tool_calls") or []
    if not isinstance(calls, list):
        raise ValueError(f"tool_calls is of type {type(calls).__name__}, not a list")
    old = given.get("function_call")
    return [*calls, {"type": "function", "function": old}] if isinstance(old, dict) else calls


def _spelled_calls(value: Any) -> list[Any]:
    """Reads tool calls that are written as JSON in the text of a turn, as in ShareGPT files."""
    parsed = _json(value, "with a tool call that is not JSON")
    calls = parsed if isinstance(parsed, list) else [parsed]
    if not all(isinstance(call, dict) and "name" in call for call in calls):
        raise CannotUse("with a tool call without a name")
    return [{"type": "function", "function": {"name": call["name"], "arguments": call.get("arguments", {})}} for call in calls]


def _json(value: Any, complaint: str) -> Any:
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        raise CannotUse(complaint) from None


def _tools(record: Mapping[str, Any]) -> list[Any] | None:
    """Returns the tools of a record; some files write them as JSON in a text. The older key `functions` is converted."""
    tools = _json(record.get("tools") or None, "with a list of tools that is not JSON")
    if not tools and isinstance(record.get("functions"), list):
        tools = [{"type": "function", "function": function} for function in record["functions"]]
    if tools and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise ValueError(f"tools is of type {type(tools).__name__}, not a list of objects")
    return tools or None


def _tree(root: Mapping[str, Any]) -> Iterator[Conversation]:
    """Yields every path of a conversation tree from the root to an answer or a leaf."""
    stack: list[tuple[Mapping[str, Any], list[Message]]] = [(root, [])]
    while stack:
        node, before = stack.pop()
        role = _ROLES.get(str(node.get("role", "")).lower(), ("user", "assistant")[len(before) % 2])
        path = [*before, {"role": role, "content": node["text"]}]
        replies = node.get("replies") or ()
        if role == "assistant" or not replies:
            yield Conversation(path)
        stack.extend((reply, path) for reply in replies)
