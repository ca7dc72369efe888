"""Training text: every conversation as the target's chat template renders it, its mask, and what cannot be rendered."""

from __future__ import annotations

import dataclasses
import gzip
import json
import re
import shutil
import sys
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from foredraft.__main__ import main
from foredraft.core.errors import UserError
from foredraft.core.folders import BUNDLED_TARGET
from foredraft.heads import HEADS
from foredraft.heads.layers import Shape
from foredraft.llm import LLM
from foredraft.train import shards
from foredraft.train.attention import tables
from foredraft.train.batches import Batch, collate
from foredraft.train.corpus import Corpus, read_corpus
from foredraft.train.frozen import Frozen
from foredraft.train.lesson import Lesson
from foredraft.train.recipes import RECIPES
from foredraft.train.records import conversations_of
from foredraft.train.rendering import Renderer
from foredraft.train.run import TrainChoice, run
from foredraft.train.shards import TrainingError
from foredraft.train.texts import Text

pytestmark = pytest.mark.unchecked

STORIES = Path(__file__).parent / "data" / "babyllama-105"

_MARKED = """{% if tools %}<|tools|>
{{ tools | tojson }}<|end|>
{% endif %}{% for m in messages %}<|{{ m.role }}|>
{% if m.role == 'assistant' %}{% generation %}{{ m.content }}\
{% for call in m.tool_calls or [] %}<call>{{ call.function.name }} {{ call.function.arguments | tojson }}</call>{% endfor %}\
<|end|>
{% endgeneration %}{% else %}{{ m.content }}<|end|>
{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>
{% endif %}"""

TEMPLATES = {"marked": _MARKED, "plain": re.sub(r"{% (end)?generation %}", "", _MARKED)}

STRICT = """{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}\
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant') }}{% endif %}\
<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"""

FORGETFUL = """{% for m in messages %}<|{{ m.role }}|>\
{{ m.content if loop.last else m.content.split('</think>')[-1] }}<|end|>\
{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"""

PARTS = """{% for m in messages %}<|{{ m.role }}|>{% for part in m.content %}[{{ part.text }}]{% endfor %}<|end|>{% endfor %}\
{% if add_generation_prompt %}<|assistant|>{% endif %}"""


def turn(role: str, content: Any = "", **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


WEATHER = {
    "type": "function",
    "function": {"name": "weather", "description": "Of a city.", "parameters": {"type": "object", "properties": {}}},
}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
ASSISTANT_CALLS = turn("assistant", "", tool_calls=[CALL])
TOOL_CHAT = [
    turn("system", "Be brief."),
    turn("user", "Hello."),
    turn("user", "What is the weather in Oslo?"),
    ASSISTANT_CALLS,
    turn("tool", "rain, 4 degrees"),
    turn("assistant", "It rains."),
    turn("assistant", "Take a coat."),
    turn("user", "Thanks."),
    turn("assistant", "Welcome."),
]
SHARED_CHAT = [
    {"from": "system", "value": "Use tools."},
    {"from": "human", "value": "Weather?"},
    {"from": "function_call", "value": json.dumps({"name": "weather", "arguments": {"city": "Oslo"}})},
    {"from": "observation", "value": "sun"},
    {"from": "gpt", "value": "Sunny."},
]
SHARED_MESSAGES = [turn("system", "Use tools."), turn("user", "Weather?"), ASSISTANT_CALLS, turn("tool", "sun")]
REPEATED_CHAT = [
    turn("system", "One."),
    turn("system", "Two."),
    turn("user", "First."),
    turn("user", "Second."),
    turn("assistant", "Third."),
    turn("assistant", "Fourth."),
]
CONVERSATIONS = [
    ({"messages": TOOL_CHAT, "tools": [WEATHER]}, TOOL_CHAT, [WEATHER]),
    (
        {"conversations": SHARED_CHAT, "tools": json.dumps([WEATHER])},
        [*SHARED_MESSAGES, turn("assistant", "Sunny.")],
        [WEATHER],
    ),
    ({"messages": REPEATED_CHAT}, REPEATED_CHAT, None),
]
"""Records, and the messages and tools that a user of Transformers would give for them."""


@pytest.fixture
def tokenizer() -> Callable[[str | dict[str, str] | None], Any]:
    def make(template: Any) -> Any:
        made = AutoTokenizer.from_pretrained(BUNDLED_TARGET)
        made.chat_template = template
        return made

    return make


def corpus_of(folder: Path, records: list[Any], tokenizer: Any, **more: Any) -> Corpus:
    file = folder / "data.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return read_corpus([file], tokenizer, 0, **{"max_len": 4096, **more})


def reasons(folder: Path, records: list[Any], tokenizer: Any, **more: Any) -> dict[str, int]:
    """Why records are left out, beside a conversation that never is."""
    return dict(corpus_of(folder, [{"prompt": "?"}, *records], tokenizer, **more).usage.left_out)


# --- what is rendered, and what is learned from


@pytest.mark.parametrize("kind", TEMPLATES)
@pytest.mark.parametrize(("record", "messages", "tools"), CONVERSATIONS, ids=["openai", "sharegpt", "repeated"])
def test_prompts_are_the_templates_own(
    tmp_path: Path, tokenizer: Any, kind: str, record: Any, messages: Any, tools: Any
) -> None:
    made = tokenizer(TEMPLATES[kind])
    [prompt] = corpus_of(tmp_path, [record], made).prompts
    while messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    text = made.apply_chat_template(messages, tools=tools, add_generation_prompt=True, tokenize=False)
    assert prompt.ids == made.encode(text, add_special_tokens=False)
    assert prompt.mask is None


@pytest.mark.parametrize("kind", TEMPLATES)
@pytest.mark.parametrize(("record", "messages", "tools"), CONVERSATIONS, ids=["openai", "sharegpt", "repeated"])
def test_given_answers_have_the_templates_own_mask(
    tmp_path: Path, tokenizer: Any, kind: str, record: Any, messages: Any, tools: Any
) -> None:
    """With markers and without: the marked twin of the template says what the mask is."""
    [prompt] = corpus_of(tmp_path, [record], tokenizer(TEMPLATES[kind]), answers="given").prompts
    marked = tokenizer(TEMPLATES["marked"])
    wanted = marked.apply_chat_template(messages, tools=tools, return_dict=True, return_assistant_tokens_mask=True)
    assert prompt.ids == wanted["input_ids"]
    assert prompt.mask == [bool(one) for one in wanted["assistant_masks"]]
    learned = marked.decode([token for token, one in zip(prompt.ids, prompt.mask, strict=True) if one])
    assert all(message["content"] in learned for message in messages if message["role"] == "assistant")
    assert not any(message["content"] in learned for message in messages if message["role"] in ("user", "system", "tool"))


def test_a_tokenizer_without_offsets_gives_the_same_mask(tmp_path: Path, tokenizer: Any) -> None:
    class Slow:
        """A tokenizer written in Python has no offsets."""

        is_fast = False

        def __init__(self, inner: Any) -> None:
            self.inner = inner

        def __getattr__(self, name: str) -> Any:
            return getattr(self.inner, name)

    for template in TEMPLATES.values():
        fast = tokenizer(template)
        found = [corpus_of(tmp_path, [CONVERSATIONS[0][0]], one, answers="given").prompts for one in (fast, Slow(fast))]
        assert found[0] == found[1]
        assert any(found[0][0].mask)


def test_a_template_for_tools_is_used_for_tools(tmp_path: Path, tokenizer: Any) -> None:
    made = tokenizer({"default": STRICT, "tool_use": TEMPLATES["plain"]})
    record, messages, tools = CONVERSATIONS[1]
    [prompt] = corpus_of(tmp_path, [record], made).prompts
    text = made.apply_chat_template(messages[:-1], tools=tools, add_generation_prompt=True, tokenize=False)
    assert prompt.ids == made.encode(text, add_special_tokens=False)
    assert "<|tools|>" in text


@pytest.mark.parametrize("spelled", [False, True], ids=["object", "text"])
def test_arguments_are_given_as_the_template_reads_them(tmp_path: Path, tokenizer: Any, spelled: bool) -> None:
    """A text is parsed for a template that writes JSON, and an object is written for one that does not."""
    arguments = json.dumps({"city": "Oslo"}) if spelled else {"city": "Oslo"}
    call = {"type": "function", "function": {"name": "weather", "arguments": arguments}}
    messages = [turn("user", "Weather?"), turn("assistant", "", tool_calls=[call]), turn("tool", "sun")]
    for template in (TEMPLATES["plain"], TEMPLATES["plain"].replace("arguments | tojson", "arguments")):
        made = tokenizer(template)
        [prompt] = corpus_of(tmp_path, [{"messages": messages}], made).prompts
        assert '<call>weather {"city": "Oslo"}</call>' in made.decode(prompt.ids)


def test_the_older_function_call_is_a_tool_call(tmp_path: Path, tokenizer: Any) -> None:
    made = tokenizer(TEMPLATES["plain"])
    old = [turn("user", "Weather?"), {"role": "assistant", "content": None, "function_call": CALL["function"]}]
    record = {"messages": [*old, turn("function", "sun", name="weather")], "functions": [WEATHER["function"]]}
    [prompt] = corpus_of(tmp_path, [record], made).prompts
    text = made.decode(prompt.ids)
    assert '<call>weather {"city": "Oslo"}</call>' in text
    assert "<|function|>\nsun<|end|>" in text
    assert json.dumps([WEATHER]) in text
    assert "None" not in text


def test_a_call_without_content_is_rendered_where_the_template_needs_one(tmp_path: Path, tokenizer: Any) -> None:
    """As OpenAI writes it: the content of a message that only calls tools is null."""
    call = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    record = {"messages": [turn("user", "Weather?"), call, turn("tool", "sun")]}
    for template in (TEMPLATES["plain"], TEMPLATES["plain"].replace("{{ m.content }}", "{{ '' + m.content }}")):
        made = tokenizer(template)
        [prompt] = corpus_of(tmp_path, [record], made).prompts
        assert '<|assistant|>\n<call>weather {"city": "Oslo"}</call><|end|>' in made.decode(prompt.ids)


def test_text_parts_are_joined_or_passed_as_the_template_wants(tmp_path: Path, tokenizer: Any) -> None:
    parts = [{"type": "text", "text": "one"}, "two", {"type": "input_text", "text": "three"}]
    messages = [turn("system", "Be brief."), turn("user", parts)]
    for template, said in (
        (TEMPLATES["plain"], "one\ntwo\nthree<|end|>"),
        (PARTS, "[Be brief.]<|end|><|user|>[one][two][three]"),
    ):
        made = tokenizer(template)
        [prompt] = corpus_of(tmp_path, [{"messages": messages}], made).prompts
        assert said in made.decode(prompt.ids)
        assert "type" not in made.decode(prompt.ids)


def test_what_is_kept_of_a_message_is_all_that_it_has() -> None:
    given = {**turn("assistant", "x", reasoning_content="hm", tool_calls=[CALL]), "name": None, "refusal": None}
    [conversation] = conversations_of({"messages": [turn("developer", "d"), turn("user", "u"), given]})
    assert [message["role"] for message in conversation.messages] == ["developer", "user", "assistant"]
    assert conversation.messages[-1] == turn("assistant", "x", reasoning_content="hm", tool_calls=[CALL])


@pytest.mark.parametrize(
    ("record", "messages"),
    [
        (
            {"question": "q", "answer": "a", "system_prompt": "s"},
            [turn("system", "s"), turn("user", "q"), turn("assistant", "a")],
        ),
        ({"instruction": "i", "context": "c", "response": "r"}, [turn("user", "i\n\nc"), turn("assistant", "r")]),
        (
            {"instruction": "i", "history": [["p", "q"]], "output": "o"},
            [turn("user", "p"), turn("assistant", "q"), turn("user", "i"), turn("assistant", "o")],
        ),
        ({"instruction": "i", "instances": [{"input": "n", "output": "o"}]}, [turn("user", "i\n\nn"), turn("assistant", "o")]),
        ({"prompt": "p", "results": [{"outputs": ["o"]}]}, [turn("user", "p"), turn("assistant", "o")]),
        ({"turns": ["t"], "choices": [{"turns": ["a"]}]}, [turn("user", "t"), turn("assistant", "a")]),
        (
            {"prompt": [turn("user", "u")], "completion": [turn("assistant", "a")]},
            [turn("user", "u"), turn("assistant", "a")],
        ),
        ({"messages": [turn("human", "h"), turn("model", {"answer": "a"})]}, [turn("user", "h"), turn("assistant", "a")]),
    ],
)
def test_answers_of_every_shape(tmp_path: Path, tokenizer: Any, record: Any, messages: Any) -> None:
    made = tokenizer(TEMPLATES["marked"])
    [prompt] = corpus_of(tmp_path, [record], made, answers="given").prompts
    wanted = made.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    assert (prompt.ids, prompt.mask) == (wanted["input_ids"], [bool(one) for one in wanted["assistant_masks"]])
    [prompt] = corpus_of(tmp_path, [record], made).prompts
    assert made.decode(prompt.ids).endswith("<|assistant|>\n")


def test_a_tree_is_asked_at_every_turn_and_learned_from_once(tmp_path: Path, tokenizer: Any) -> None:
    leaf = {"text": "d", "role": "assistant", "replies": []}
    answer = {"text": "b", "role": "assistant", "replies": [{"text": "c", "role": "prompter", "replies": [leaf]}]}
    tree = {"prompt": {"text": "a", "role": "prompter", "replies": [answer]}}
    made = tokenizer(TEMPLATES["plain"])
    assert len(corpus_of(tmp_path, [tree], made).prompts) == 2
    [prompt] = corpus_of(tmp_path, [tree], made, answers="given").prompts
    learned = [token for token, one in zip(prompt.ids, prompt.mask, strict=True) if one]
    assert made.decode(learned) == "b<|end|>\nd<|end|>\n"


def test_equal_questions_fall_on_the_same_side(tmp_path: Path, tokenizer: Any) -> None:
    """Whatever stands before the question and behind it."""
    records = [
        {"messages": [*before, turn("user", f"question {i}"), *after]}
        for i in range(150)
        for before in ([], [turn("system", f"system {i}")])
        for after in ([], [turn("assistant", "yes"), turn("user", "more")])
    ]
    made, sides = tokenizer(TEMPLATES["plain"]), {}
    for prompt in corpus_of(tmp_path, records, made).prompts:
        question = re.search(r"question \d+", made.decode(prompt.ids))
        assert question is not None
        sides.setdefault(question[0], []).append(prompt.held_out)
    assert all(len(some) == 4 and len(set(some)) == 1 for some in sides.values())
    assert 0 < sum(some[0] for some in sides.values()) < 15


# --- what is left out


def test_a_strict_template_names_what_it_refuses(tmp_path: Path, tokenizer: Any) -> None:
    chat = [turn("user", "a"), turn("assistant", "b"), turn("user", "c"), turn("assistant", "d")]
    records = [
        {"messages": chat},
        {"messages": [turn("user", "x"), *chat]},
        {"messages": [turn("user", "y"), *chat]},
        {"messages": [turn("system", "s"), *chat]},
    ]
    for answers in ("own", "given"):
        corpus = corpus_of(tmp_path, records, tokenizer(STRICT), answers=answers)
        assert len(corpus.prompts) == 1
        assert corpus.usage.lines() == [
            "left out: 3 of 4 conversations: "
            "2 refused by the template (Conversation roles must alternate user/assistant/user/assistant); "
            "1 with turns of role 'system' that the template refuses"
        ]


def test_what_a_template_ignores_is_not_dropped_in_silence(tmp_path: Path, tokenizer: Any) -> None:
    deaf = "{% for m in messages if m.role in ('user', 'assistant') %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
    records = [
        {"messages": [turn("system", "s"), turn("user", "a")]},
        {"messages": [turn("user", "b"), turn("tool", "t")]},
        {"messages": [turn("user", "c"), ASSISTANT_CALLS, turn("user", "d")]},
        {"messages": [turn("user", "e")], "tools": [WEATHER]},
    ]
    assert reasons(tmp_path, records, tokenizer(deaf)) == {
        "with turns of role 'system' that the template ignores": 1,
        "with turns of role 'tool' that the template ignores": 1,
        "with tool calls that the template ignores": 1,
        "with tools that the template ignores": 1,
    }


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"messages": [turn("user", [{"type": "image_url", "image_url": {"url": "x"}}])]}, "with image parts"),
        ({"messages": [turn("user", [{"type": "input_audio", "input_audio": {}}])]}, "with audio parts"),
        ({"messages": [turn("user", "<image> what?")], "images": ["x.png"]}, "with image parts"),
        ({"messages": [turn("system", "s")]}, "with no user turn"),
        ({"messages": []}, "with no user turn"),
        ({"messages": [turn("assistant", "hello")]}, "with no user turn"),
        ({"messages": [turn("user", " ")]}, "with an empty user turn"),
        ({"messages": [turn("user", "a"), turn("assistant", ""), turn("user", "b")]}, "with an empty assistant turn"),
        (
            {"conversations": [{"from": "human", "value": "a"}, {"from": "function_call", "value": "weather(Oslo)"}]},
            "with a tool call that is not JSON",
        ),
        ({"prompt": "q", "tools": "["}, "with a list of tools that is not JSON"),
        ({"prompt": "\ud800"}, "with invalid Unicode characters (lone surrogates)"),
    ],
)
def test_what_cannot_be_rendered_is_named(tmp_path: Path, tokenizer: Any, record: Any, reason: str) -> None:
    assert reasons(tmp_path, [record], tokenizer(TEMPLATES["plain"])) == {reason: 1}


def test_long_and_repeated_conversations_are_named(tmp_path: Path, tokenizer: Any) -> None:
    records = [{"prompt": "word " * 200}] * 2 + [{"prompt": "again", "answer": "yes"}] * 7
    made = tokenizer(TEMPLATES["plain"])
    left = reasons(tmp_path, records, made, max_len=100)
    assert left == {"longer than 68 tokens (100 with the answer)": 2, "beyond the first 4 with the same opening question": 3}
    left = reasons(tmp_path, records, made, max_len=100, answers="given")
    assert left == {"with no answer to learn from": 3, "beyond the first 4 with the same opening question": 3}


def test_without_a_sound_mask_nothing_is_learned_from(tmp_path: Path, tokenizer: Any) -> None:
    """A template that strips earlier thoughts renders no prefix of a longer conversation as it renders the whole."""
    chat = [turn("user", "a"), turn("assistant", "<think>hm</think>b"), turn("user", "c"), turn("assistant", "d")]
    records = [{"messages": chat}, {"messages": chat[:2]}, {"messages": chat[1:]}]
    corpus = corpus_of(tmp_path, records, tokenizer(FORGETFUL), answers="given")
    [prompt] = corpus.prompts
    made = tokenizer(FORGETFUL)
    assert (
        made.decode([token for token, one in zip(prompt.ids, prompt.mask, strict=True) if one]) == "<think>hm</think>b<|end|>"
    )
    assert dict(corpus.usage.left_out) == {
        "with earlier turns that the template renders differently when more turns follow (no mask)": 1,
        "with an answer whose prompt alone the template refuses (no mask)": 1,
    }
    assert len(corpus_of(tmp_path, records, tokenizer(FORGETFUL)).prompts) == 3


def test_markers_around_nothing_are_named(tmp_path: Path, tokenizer: Any) -> None:
    never = TEMPLATES["plain"] + "{% generation %}{% endgeneration %}"
    left = reasons(tmp_path, [{"prompt": "q", "answer": "a"}, {"prompt": "r"}], tokenizer(TEMPLATES["plain"]), answers="given")
    assert left == {"with no answer to learn from": 2}
    with pytest.raises(ValueError, match=r"no training text in .*: 1 with no answer that the template marks"):
        corpus_of(tmp_path, [{"prompt": "q", "answer": "a"}], tokenizer(never), answers="given")


def test_without_a_template_what_cannot_be_expressed_is_named(tmp_path: Path, tokenizer: Any) -> None:
    records = [
        {"messages": [turn("system", "s"), turn("user", "a")]},
        {"messages": [turn("user", "b"), ASSISTANT_CALLS, turn("tool", "t")]},
        {"prompt": "c"},
    ]
    made = tokenizer(None)
    corpus = corpus_of(tmp_path, records, made)
    assert sorted(prompt.ids for prompt in corpus.prompts) == sorted(made.encode(text) for text in "abc")
    assert dict(corpus.usage.in_part) == {
        "with turns of role 'system' that cannot be expressed without a chat template": 1,
        "with turns of role 'tool' and tools and earlier turns that cannot be expressed without a chat template": 1,
    }


def test_questions_without_answers_are_asked_once_and_named(tmp_path: Path, tokenizer: Any) -> None:
    corpus = corpus_of(tmp_path, [{"turns": ["a", "b"]}, {"turns": ["c"]}], tokenizer(TEMPLATES["plain"]))
    assert corpus.usage.lines() == [
        "used in part: 1 of 2 conversations: 1 with several questions and no answers: only the first question is asked"
    ]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"title": "x"}', "a record has the keys title, and none of them is messages, "),
        ('{"messages": [{"content": "x"}]}', "a message has the keys content, but no role or no content"),
        ('{"messages": [{"role": "user", "contents": "x"}]}', "but no role or no content"),
        ('{"messages": [{"role": "user", "content": 3}]}', "the content of a message is of type int, neither a text nor"),
        ('{"messages": [["user", "x"]]}', "a message is of type list, not an object with a role and a content"),
        ('{"messages": [{"role": "assistant", "tool_calls": "x"}]}', "tool_calls is of type str, not a list"),
        ('{"messages": [{"role": "user", "content": [{"type": "text"}]}]}', "a text part of a message has no text"),
        ('{"prompt": "x", "tools": ["f"]}', "tools is of type list, not a list of objects"),
        ('{"prompt": {"text": "x", "replies": [3]}}', "a record has an unknown shape"),
        ('["x"]', "the line holds a list"),
        ("not json", "Expecting value"),
        ("[" * 100_000, "recursion"),
    ],
)
def test_bad_shapes_name_file_line_and_a_good_record(tmp_path: Path, tokenizer: Any, line: str, said: str) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_text('{"prompt": "x"}\n\n' + line + "\n")
    with pytest.raises(ValueError, match=re.escape(said)) as caught:
        read_corpus([file], tokenizer(TEMPLATES["plain"]), 0, max_len=64)
    message = str(caught.value)
    assert "\n" not in message
    assert str(file) in message
    assert "line 3" in message
    assert 'A record looks like {"messages": [{"role": "user", "content": "..."}]}' in message


def test_damaged_and_wrong_files_are_named(tmp_path: Path, tokenizer: Any) -> None:
    whole = gzip.compress(b'{"prompt": "x"}\n' * 1000)
    for name, content in (
        ("cut.gz", whole[:-20]),
        ("no.gz", b"x"),
        ("latin.jsonl", b'{"prompt": "\xe9"}'),
        ("empty.jsonl", b""),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=r"is not a JSON Lines file|they hold no conversation") as caught:
            read_corpus([tmp_path / name], tokenizer(TEMPLATES["plain"]), 0, max_len=64)
        assert name in str(caught.value)


# --- through shards, batches and the command line


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model with a chat template."""
    folder = tmp_path_factory.mktemp("model") / "target"
    shutil.copytree(STORIES, folder)
    spoken = TEMPLATES["plain"].replace("<|", "").replace("|>", "").replace("\n", " ")
    (folder / "chat_template.jinja").write_text(spoken)
    return folder


def chats(folder: Path) -> Path:
    names = ("Tom", "Lily", "Sue", "Ben", "Mia", "Sam")
    messages = [
        [
            turn("user", f"{name} saw a {what}."),
            turn("assistant", "It was big."),
            turn("user", "And?"),
            turn("assistant", "Fun."),
        ]
        for name in names
        for what in ("dog", "cat", "bird")
    ]
    records = [{"messages": one} for one in messages] + [{"messages": [turn("user", [{"type": "image"}])]}]
    (folder / "chats.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    return folder / "chats.jsonl"


def choice(folder: Path, target: Path, out: str = "head", **more: Any) -> TrainChoice:
    settings = {"steps": 2, "batch_tokens": 512, "evaluate_every": 1, "lr": 1e-3, "bf16": False, "optimizer": "muon"}
    return TrainChoice(
        **{"method": "eagle", "model": str(target), "data": [chats(folder)], "out": folder / out, "num_tokens": 400}
        | {"max_len": 128, "settings": settings}
        | more
    )


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory, target: Path) -> TrainChoice:
    """A run that has learned from given answers; its shards are shared."""
    folder = tmp_path_factory.mktemp("given")
    done = choice(folder, target, answers="given", shards=folder / "shards")
    run(done)
    return done


def opened(folder: Path, layers: tuple[int, ...] = (-1,)) -> list[Text]:
    manifest = json.loads((folder / "manifest.json").read_text())
    return [text for one in manifest["shards"] for text in shards.open_shard(folder / one["name"], one["sha256"], layers)]


@pytest.mark.parametrize("method", ["medusa", "ctc"])
def test_other_heads_learn_from_given_answers(tmp_path: Path, given: TrainChoice, method: str) -> None:
    done = run(dataclasses.replace(given, method=method, out=tmp_path / "head"))
    assert done.token_passes > 0
    assert all(torch.isfinite(torch.tensor(list(row.values()))).all() for row in done.history)
    about = json.loads((tmp_path / "head" / "provenance.json").read_text())
    assert about["answers"] == "given"


def test_shards_keep_the_mask_and_batches_use_it(given: TrainChoice) -> None:
    llm = LLM(given.model, {"method": "ar"})
    corpus = read_corpus(given.data, llm.tokenizer, 0, answers="given", max_len=128)
    wanted = {tuple(prompt.ids): prompt.mask for prompt in corpus.prompts}
    texts = opened(given.shards)
    assert len(texts) == len(wanted) == 18
    for text in texts:
        mask = wanted[tuple(text.ids.tolist())]
        assert text.answer.tolist() == mask
        assert mask.index(False, text.prompt_len) < len(mask) - 1  # the second question lies between two answers
        assert text.answer_share == pytest.approx(sum(mask) / len(mask))
    batch = collate(texts[:5], (-1,), llm.target)
    assert batch.num_tokens == sum(int(text.answer.sum()) for text in texts[:5])
    for row, text in enumerate(texts[:5]):
        assert batch.answer[row, : len(text.ids)].tolist() == text.answer.tolist()
        assert not batch.answer[row, len(text.ids) :].any()


@pytest.mark.parametrize("method", ["eagle", "medusa", "hydra", "ctc", "parallel"])
def test_what_stands_between_answers_is_not_learned_from(given: TrainChoice, method: str) -> None:
    """The target's features before tokens of no answer are changed: a loss that reads them would change."""
    llm = LLM(given.model, {"method": "ar"})
    texts = opened(given.shards)[:3]
    batch = collate(texts, (-1,), llm.target)
    shape, options = Shape.of(llm.target.config), {**RECIPES[method].options, "noise": 0.0}
    torch.manual_seed(0)
    head = HEADS[method].make(shape, **HEADS[method].options)
    frozen, rotary = Frozen(llm.target, shape.features), tables(llm.target.config, llm.target.device)

    @torch.no_grad()
    def loss(some: Batch) -> float:
        return float(RECIPES[method].learn(Lesson(head, some, frozen, rotary, options, None)).loss)

    wanted = torch.nn.functional.pad(batch.answer[:, 1:], (0, 1))[..., None]  # before tokens of answers
    changed = batch._replace(final=torch.where(wanted, batch.final, torch.randn_like(batch.final)))
    assert loss(changed) == pytest.approx(loss(batch), rel=1e-6)
    every = torch.nn.utils.rnn.pad_sequence([torch.arange(len(text.ids)) >= text.prompt_len for text in texts], True)
    assert loss(changed._replace(answer=every)) != pytest.approx(loss(batch._replace(answer=every)), rel=1e-4)


def test_texts_with_a_small_share_of_answer_are_counted(
    tmp_path: Path, given: TrainChoice, capsys: pytest.CaptureFixture[str]
) -> None:
    shares = sorted(text.answer_share for text in opened(given.shards) if not text.held_out)
    limit = shares[len(shares) // 2]
    run(dataclasses.replace(given, out=tmp_path / "head", settings={**given.settings, "answer_share": limit}))
    short = sum(share < limit for share in shares)
    assert 0 < short < len(shares)
    assert f"{short} of 18 texts are left out: less than {limit:.1%} of each is answer" in capsys.readouterr().err


def test_a_single_conversation_is_held_out_and_leaves_nothing_to_learn(tmp_path: Path, given: TrainChoice) -> None:
    data = tmp_path / "short.jsonl"
    data.write_text(Path(given.data[0]).read_text().splitlines(keepends=True)[0])
    with pytest.raises(UserError, match=r"all 1 texts are held out .*[Gg]ive more data"):
        run(dataclasses.replace(given, data=[data], shards=None, out=tmp_path / "head"))


def test_data_that_cannot_be_read_leave_no_folder(tmp_path: Path, given: TrainChoice) -> None:
    data = tmp_path / "damaged.jsonl"
    data.write_text("{not JSON")
    with pytest.raises(UserError, match=r"damaged\.jsonl"):
        run(dataclasses.replace(given, data=[data], shards=None, out=tmp_path / "head"))
    assert not (tmp_path / "head").exists()


def test_own_and_given_answers_are_not_mixed(tmp_path: Path, given: TrainChoice) -> None:
    own = dataclasses.replace(given, answers="own")
    with pytest.raises(TrainingError, match=r"made with temperatures \[\] \(now .*\) and answers given \(now own\)"):
        run(own)
    with pytest.raises(TrainingError, match="belongs to a run with another answers"):
        run(dataclasses.replace(own, shards=tmp_path / "own"))
    assert all(text.mask is None for text in opened(tmp_path / "own"))


def test_shards_of_an_earlier_version(tmp_path: Path, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole ones are used, and it is said; half ones are refused, for the order of the conversations is another."""
    asked = choice(tmp_path, target, num_tokens=1)
    run(asked)
    file = tmp_path / "head" / "shards" / "manifest.json"
    manifest = json.loads(file.read_text())
    for key in ("text_version", "usage"):
        del manifest[key]
    del manifest["made_from"]["answers"]
    file.write_text(json.dumps(manifest))
    run(choice(tmp_path, target, "again", num_tokens=1, shards=file.parent))
    assert shards.usage_lines(file.parent) == [
        f"the shards in {file.parent} are by an earlier version of foredraft, which left out system and tool turns"
    ]
    with pytest.raises(TrainingError, match=r"begun by another version of foredraft.*\. Give another --shards folder"):
        run(choice(tmp_path, target, "more", num_tokens=10**6, shards=file.parent))


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Any, str, str]]:
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments: Any) -> tuple[Any, str, str]:
        monkeypatch.setattr(sys, "stdin", StringIO(""))
        with pytest.raises(SystemExit) as ended:
            main([str(one) for one in arguments])
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return ended.value.code, out, err

    return call


def test_the_command_names_what_was_left_out(tmp_path: Path, target: Path, command: Any) -> None:
    base = ["train", "--method", "eagle", "--model", target, "--out", tmp_path / "head", "--fp32"]
    given = [*base, "--answers", "given", "--tokens", 50, "--max-len", 128, "--steps", 1, "--batch-tokens", 512]
    line = "left out: 1 of 19 conversations: 1 with image parts"
    code, _, err = command(*given, "--data", chats(tmp_path))
    assert code == 0
    assert err.splitlines()[-1] == line
    assert err.count(line) == 2  # before the model runs, and at the end
    code, _, err = command(*given, "--data", chats(tmp_path))
    assert (code, err.count(line)) == (0, 1)  # the shards remember it


def test_the_command_refuses_what_does_not_go_together(tmp_path: Path, target: Path, command: Any) -> None:
    base = ["train", "--method", "eagle", "--out", tmp_path / "head", "--data", chats(tmp_path)]
    (tmp_path / "bad.jsonl").write_text('{"prompt": "x"}\n{"title": "y"}\n')
    for more, error, hint in (
        (["--answers", "givn"], "error: unknown --answers 'givn'\n", "hint: Did you mean 'given'"),
        (
            ["--answers", "given", "--temperatures", "0"],
            "error: --temperatures apply to the target's own answers",
            "hint: Leave one of them out",
        ),
        (
            ["--answers", "given", "--model", STORIES],
            "error: the target has no chat template",
            "hint: Leave out --answers given",
        ),
        (
            ["--model", target, "--data", tmp_path / "bad.jsonl"],
            "bad.jsonl, line 2: a record has the keys title",
            "hint: A record",
        ),
    ):
        code, _, err = command(*base, *more)
        assert code == 1
        assert error in err
        assert hint in err


def test_help_says_whose_answers(command: Any) -> None:
    code, out, _ = command("train", "--help")
    assert code == 0
    assert "--answers" in out
    assert "given: the head learns from every answer in the files" in " ".join(out.replace("│", " ").split())


def test_no_template_is_asked_for_a_mask(tokenizer: Any) -> None:
    assert Renderer(tokenizer(None)).has_template is False
    assert Renderer(tokenizer(STRICT)).has_template is True


# --- weights, unknown roles, media beside the content, and what a template does not use


WEIGHED = [
    turn("user", "a"),
    turn("assistant", "first", weight=0),
    turn("user", "b"),
    turn("assistant", "second", weight=1),
    turn("assistant", "third", weight=0),
    turn("user", "c", weight=0),
    turn("assistant", "fourth"),
]


@pytest.mark.parametrize("kind", TEMPLATES)
def test_turns_of_weight_0_are_not_learned_from(tmp_path: Path, tokenizer: Any, kind: str) -> None:
    made = tokenizer(TEMPLATES[kind])
    [prompt] = corpus_of(tmp_path, [{"messages": WEIGHED}], made, answers="given").prompts
    bare = [{key: value for key, value in message.items() if key != "weight"} for message in WEIGHED]
    assert prompt.ids == made.encode(made.apply_chat_template(bare, tokenize=False), add_special_tokens=False)
    learned = made.decode([token for token, one in zip(prompt.ids, prompt.mask, strict=True) if one])
    assert learned == "second<|end|>\nfourth<|end|>\n"


@pytest.mark.parametrize("kind", TEMPLATES)
def test_other_weights_are_named(tmp_path: Path, tokenizer: Any, kind: str) -> None:
    answered = {"prompt": "?", "answer": "!"}
    records = [{"messages": [turn("user", f"{w}"), turn("assistant", "x", weight=w)]} for w in (0.5, -1, "0", [1], 1.0, None)]
    records.append({"messages": [turn("user", "q"), turn("assistant", "x", weight=0)]})
    usage = corpus_of(tmp_path, [answered, *records], tokenizer(TEMPLATES[kind]), answers="given").usage
    assert dict(usage.left_out) == {
        "with an assistant turn whose weight is neither 0 nor 1": 4,
        "with weight 0 for every answer": 1,
    }


def test_a_weight_of_0_without_a_sound_place_is_named(tmp_path: Path, tokenizer: Any) -> None:
    """A marked template that ends the last turn differently: the place of an earlier turn cannot be found by renderings."""
    odd = TEMPLATES["marked"].replace("{{ m.content }}", "{{ m.content }}{{ '!' if loop.last else '?' }}")
    records = [{"prompt": "?", "answer": "!"}, {"messages": WEIGHED}]
    usage = corpus_of(tmp_path, records, tokenizer(odd), answers="given").usage
    assert list(usage.left_out) == ["with earlier turns that the template renders differently when more turns follow (no mask)"]


@pytest.mark.parametrize("answers", ["own", "given"])
def test_a_role_that_the_template_does_not_know_is_named(tmp_path: Path, tokenizer: Any, answers: str) -> None:
    chat = [turn("user", "a"), turn("critic", "bad"), turn("assistant", "b"), turn("user", "c"), turn("assistant", "d")]
    records = [
        {"prompt": "?", "answer": "!"},
        {"messages": chat},
        {"messages": [turn("System", "s"), turn("User", "u"), chat[-1]]},
    ]
    usage = corpus_of(tmp_path, records, tokenizer(TEMPLATES["plain"]), answers=answers).usage
    assert dict(usage.left_out) == {"with turns of role 'critic' that the template does not know": 1}
    knows = TEMPLATES["plain"].replace("== 'assistant'", "in ('assistant', 'critic')")
    corpus = corpus_of(tmp_path, records, tokenizer(knows), answers=answers)
    assert len(corpus.prompts) == 3


@pytest.mark.parametrize(("key", "kind"), [("images", "image"), ("image", "image"), ("audio", "audio"), ("videos", "video")])
def test_media_in_messages_is_named(tmp_path: Path, tokenizer: Any, key: str, kind: str) -> None:
    records = [
        {"messages": [turn("user", "what?", **{key: ["x"]})]},
        {"messages": [turn("user", [{"type": "text", "text": "what?", key: "x"}])]},
        {"messages": [turn("user", "nothing", **{key: []})]},
    ]
    assert reasons(tmp_path, records, tokenizer(TEMPLATES["plain"])) == {f"with {kind} parts": 2}


def test_thoughts_are_passed_to_the_template_or_counted(tmp_path: Path, tokenizer: Any) -> None:
    chat = [turn("user", "a"), turn("assistant", "b", reasoning_content="hm"), turn("user", "c"), turn("assistant", "d")]
    records, said = (
        [{"messages": chat}, {"prompt": "q", "answer": "r"}],
        "with reasoning_content that the template does not use",
    )
    for answers in ("own", "given"):
        corpus = corpus_of(tmp_path, records, tokenizer(TEMPLATES["plain"]), answers=answers)
        assert corpus.usage.lines() == [f"used in part: 1 of 2 conversations: 1 {said}"]
        for kind in TEMPLATES:
            shows = TEMPLATES[kind].replace("{{ m.content }}", "{{ m.reasoning_content or '' }}{{ m.content }}", 1)
            made = tokenizer(shows)
            corpus = corpus_of(tmp_path, records[:1], made, answers=answers)
            assert corpus.usage.lines() == []
            assert "hmb<|end|>" in made.decode(corpus.prompts[0].ids)


def test_variables_of_a_record_are_passed_to_the_template_or_counted(tmp_path: Path, tokenizer: Any) -> None:
    record = {"prompt": "q", "answer": "r", "chat_template_kwargs": {"style": "brief", "enable_thinking": True}}
    for kind in TEMPLATES:
        made = tokenizer("{{ style }}|" + TEMPLATES[kind])
        for answers in ("own", "given"):
            corpus = corpus_of(tmp_path, [record], made, answers=answers)
            assert made.decode(corpus.prompts[0].ids).startswith("brief|<|user|>")
            assert dict(corpus.usage.in_part) == {
                "with chat_template_kwargs 'enable_thinking' that the template does not use": 1
            }
    left = reasons(tmp_path, [{"prompt": "q", "chat_template_kwargs": {"tokenize": True}}], tokenizer(TEMPLATES["plain"]))
    assert left == {"with chat_template_kwargs 'tokenize', which is not a variable of a template": 1}
    assert dict(corpus_of(tmp_path, [record], tokenizer(None)).usage.in_part) == {
        "with chat_template_kwargs that cannot be expressed without a chat template": 1
    }


def test_a_lone_surrogate_in_a_given_answer_is_named(tmp_path: Path, tokenizer: Any) -> None:
    records = [{"prompt": "?", "answer": "!"}, {"prompt": "q", "answer": "\ud800"}]
    for template in TEMPLATES.values():
        usage = corpus_of(tmp_path, records, tokenizer(template), answers="given").usage
        assert dict(usage.left_out) == {"with invalid Unicode characters (lone surrogates)": 1}


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"messages": {}}, "messages of a record must be a list of messages, got {}"),
        ({"conversations": "x", "messages": None}, "conversations of a record must be a list of messages, got 'x'"),
        ({"question": 3}, "question of a record must be a text that is not empty, got 3"),
        ({"question": ""}, "question of a record must be a text that is not empty, got ''"),
        ({"instruction": ["x"]}, "instruction of a record must be a text that is not empty, got ['x']"),
        ({"prompt": {}}, "prompt of a record must be a text that is not empty, or a list of messages, got {}"),
        ({"prompt": "x", "chat_template_kwargs": [1]}, "chat_template_kwargs is of type list, not an object"),
    ],
)
def test_values_of_a_wrong_type_are_named(tmp_path: Path, tokenizer: Any, record: Any, said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)) as caught:
        corpus_of(tmp_path, [record], tokenizer(TEMPLATES["plain"]))
    assert "none of them is" not in str(caught.value)
    assert "data.jsonl, line 1: " in str(caught.value)
