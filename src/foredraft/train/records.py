"""Conversations from the records of JSON Lines files: OpenAI messages, ShareGPT conversations, instructions, questions, trees.

A record is read, not judged: every turn, tool call and list of tools is kept as the file has it. Only the names of keys and of
well-known roles are changed to those that chat templates use.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

EXAMPLE = 'A record looks like {"messages": [{"role": "user", "content": "..."}]} or {"prompt": "..."}'

_LISTS = ("messages", "conversations", "conversation", "turns")

_ROLES = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "bot", "model", "chatgpt", "bing", "bard", "function_call", "tool_call"), "assistant"),
    **dict.fromkeys(("observation", "function_response", "tool_response"), "tool"),
}
"""Roles of well-known files, in lower case. All others are passed to the template as they are."""

_ROLE_KEYS = ("role", "from", "speaker")
_TEXT_KEYS = ("content", "value", "utterance", "text")
_ANSWER_KEYS = ("response", "output", "answer", "completion")
_CALLS = ("tool_calls", "function_call")

_MEDIA = {name: name.rstrip("s") for name in ("image", "images", "audio", "audios", "video", "videos")}
"""Keys of a record that hold what no text model reads, and how they are named."""

Message = dict[str, Any]
"""As chat templates take it; `content` is absent, a text, or a list of ``{"type": "text", "text": ...}``."""


class CannotUse(Exception):
    """A conversation cannot be used; the message says why, in words that follow a number of conversations."""


class Conversation(NamedTuple):
    """What a chat template renders.

    Attributes:
        tools: descriptions of the tools, as the record has them.
        unused: what the record holds beyond the messages, in words that follow a number of conversations.
    """

    messages: list[Message]
    tools: list[Any] | None = None
    unused: str | None = None

    @property
    def question(self) -> str | None:
        """Text of the first user turn."""
        return next((text_of(message) for message in self.messages if message["role"] == "user"), None)


def text_of(message: Message) -> str:
    """The text of a message; parts are joined by line ends."""
    content = message.get("content", "")
    return content if isinstance(content, str) else "\n".join(part["text"] for part in content)


def conversations_of(record: Mapping[str, Any]) -> list[Conversation]:
    """The conversations of one record, with the answers that it holds.

    Raises:
        CannotUse: it holds images or the like, or a tool call that cannot be read.
        ValueError: its shape is unknown; the message says what was found.
    """
    for key, kind in _MEDIA.items():
        if record.get(key):
            raise CannotUse(f"with {kind} parts")
    tools = _tools(record)
    before = [{"role": "system", "content": record[key]} for key in ("system", "system_prompt") if _is_text(record.get(key))]
    return [one._replace(messages=[*before, *one.messages], tools=tools) for one in _shaped(record)]


def _shaped(record: Mapping[str, Any]) -> Iterator[Conversation]:
    """The conversations of a record, without its system text and its tools."""
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
        known = f"{', '.join(_LISTS)}, instruction, question or prompt"
        raise ValueError(f"a record has the keys {', '.join(list(record)[:6])}, of which none is {known}")


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _pair(question: str, answer: str | None) -> list[Message]:
    asked: list[Message] = [{"role": "user", "content": question}]
    return asked if answer is None else [*asked, {"role": "assistant", "content": answer}]


def _answers(record: Mapping[str, Any]) -> list[str | None]:
    """The answers to a record's question; None alone if it has none."""
    texts = [record[key] for key in _ANSWER_KEYS if isinstance(record.get(key), str)][:1]
    results = record["results"] if isinstance(record.get("results"), list) else []
    for result in results:  # a report of sampled answers
        outputs = result.get("outputs") if isinstance(result, dict) else None
        texts += [text for text in outputs or () if isinstance(text, str)]
    return texts or [None]


def _instructed(record: Mapping[str, Any]) -> Iterator[Conversation]:
    """An instruction with its input, once for every instance; earlier pairs of `history` stand before it."""
    history = record["history"] if isinstance(record.get("history"), list) else []
    before = [message for question, answer in history for message in _pair(question, answer)]
    instances = record["instances"] if isinstance(record.get("instances"), list) else [record]
    for instance in instances:
        question = _joined(record["instruction"], instance.get("context") or instance.get("input") or "")
        yield from (Conversation([*before, *_pair(question, answer)]) for answer in _answers(instance))


def _joined(*parts: str) -> str:
    return "\n\n".join(part.strip() for part in parts if part.strip())


def _listed(messages: Sequence[Any], record: Mapping[str, Any]) -> Conversation:
    """A list of messages. A list of plain strings holds the user's alone; `choices` may hold the answers."""
    if all(isinstance(message, str) for message in messages):
        choices = record.get("choices")
        answers = choices[0].get("turns") if isinstance(choices, list) and choices and isinstance(choices[0], dict) else None
        if isinstance(answers, list) and len(answers) == len(messages):
            return Conversation([one for pair in zip(messages, answers, strict=True) for one in _pair(*pair)])
        unused = "with more questions than the first, which alone is asked" if len(messages) > 1 else None
        return Conversation(_pair(messages[0], None) if messages else [], unused=unused)
    return Conversation([_message(message) for message in messages])


def _message(given: Any) -> Message:
    """A message with the keys and roles that templates use; keys without a value are dropped, as Transformers does."""
    if not isinstance(given, dict):
        raise ValueError(f"a message is a {type(given).__name__}, not an object with a role and a content")
    role_key = next((key for key in _ROLE_KEYS if _is_text(given.get(key))), None)
    text_key = next((key for key in _TEXT_KEYS if key in given), None)
    if role_key is None or (text_key is None and not any(key in given for key in _CALLS)):
        raise ValueError(f"a message has the keys {', '.join(list(given)[:6])}: it lacks a role or a content")
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
    """The role that templates know by a name; the speaker SYSTEM of a dialogue corpus is the assistant."""
    if name == "SYSTEM":
        return "assistant" if is_speaker else "system"
    return _ROLES.get(name.lower(), name)


def _content(content: Any, role: str) -> str | list[dict[str, str]] | None:
    """A text, a list of text parts, or None.

    Raises:
        CannotUse: a part is no text.
    """
    if content is None or isinstance(content, str):
        return content
    if isinstance(content, dict) and isinstance(content.get("answer"), str):
        return content["answer"]
    if isinstance(content, list) and all(isinstance(part, str) or _is_part(part) for part in content):
        return [_part(part) for part in content]
    if role in ("tool", "function"):
        return json.dumps(content, ensure_ascii=False)
    raise ValueError(f"the content of a message is a {type(content).__name__}, neither a text nor a list of parts")


def _is_part(part: Any) -> bool:
    return isinstance(part, dict) and ("type" in part or "text" in part)


def _part(part: str | Mapping[str, Any]) -> dict[str, str]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    kind = str(part.get("type", "text"))
    if kind in ("text", "input_text", "output_text"):
        if not isinstance(part.get("text"), str):
            raise ValueError("a text part of a message has no text")
        return {"type": "text", "text": part["text"]}
    raise CannotUse(f"with {kind.removeprefix('input_').removesuffix('_url')} parts")


def _calls(given: Mapping[str, Any]) -> list[Any]:
    """The tool calls of a message; the older `function_call` is a tool call by another name."""
    calls = given.get("tool_calls") or []
    if not isinstance(calls, list):
        raise ValueError(f"tool_calls is a {type(calls).__name__}, not a list")
    old = given.get("function_call")
    return [*calls, {"type": "function", "function": old}] if isinstance(old, dict) else calls


def _spelled_calls(value: Any) -> list[Any]:
    """Tool calls that are written as JSON in the text of a turn, as ShareGPT files have them."""
    found = _json(value, "with a tool call that is no JSON")
    calls = found if isinstance(found, list) else [found]
    if not all(isinstance(call, dict) and "name" in call for call in calls):
        raise CannotUse("with a tool call without a name")
    return [{"type": "function", "function": {"name": one["name"], "arguments": one.get("arguments", {})}} for one in calls]


def _json(value: Any, complaint: str) -> Any:
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        raise CannotUse(complaint) from None


def _tools(record: Mapping[str, Any]) -> list[Any] | None:
    """The tools of a record, which some files write as JSON in a text; the older `functions` are wrapped as tools are."""
    tools = _json(record.get("tools") or None, "with a list of tools that is no JSON")
    if not tools and isinstance(record.get("functions"), list):
        tools = [{"type": "function", "function": one} for one in record["functions"]]
    if tools and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise ValueError(f"tools is a {type(tools).__name__}, not a list of objects")
    return tools or None


def _tree(root: Mapping[str, Any]) -> Iterator[Conversation]:
    """Every path of a conversation tree down to an answer or to a leaf."""
    stack: list[tuple[Mapping[str, Any], list[Message]]] = [(root, [])]
    while stack:
        node, before = stack.pop()
        role = _ROLES.get(str(node.get("role", "")).lower(), ("user", "assistant")[len(before) % 2])
        path = [*before, {"role": role, "content": node["text"]}]
        replies = node.get("replies") or ()
        if role == "assistant" or not replies:
            yield Conversation(path)
        stack.extend((reply, path) for reply in replies)
