"""Messages: what they may be, and what a chat template makes of them, through `render`, `LLM` and the command line."""

from __future__ import annotations

import json
import shutil
from functools import cache
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from foredraft import LLM, SamplingParams
from foredraft.__main__ import main
from foredraft.bench.tasks import encode, read_prompts
from foredraft.core.chat import Template, is_plain, render
from foredraft.core.messages import ROLES, conversations

DATA = Path(__file__).parent / "data"
TARGET = DATA / "babyllama-105"
PLAIN = {"method": "ar"}
SHORT = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)

START = "{% if add_generation_prompt %}<assistant>{% endif %}"
CHATML = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</>{% endfor %}" + START
PARTS = (
    "{% for m in messages %}<{{ m.role }}>{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}{% endif %}{% endfor %}"
    "</>{% endfor %}" + START
)
BOTH = (
    "{% for m in messages %}<{{ m.role }}>{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}[{{ p.text }}]{% endfor %}{% endif %}</>{% endfor %}" + START
)
BOTH_EQUAL = BOTH.replace("[", "", 1).replace("]{% endfor", "{% endfor")
JSON_PARTS = "{% for m in messages %}<{{ m.role }}>{{ m.content | tojson }}</>{% endfor %}" + START
TURNS = (
    "{% for m in messages %}{% if m.role == 'user' %}U:{{ m.content | trim }} {% elif m.role == 'assistant' %}A:{{ m.content }}"
    " {% elif m.role == 'ipython' %}I:{{ m.content }} {% endif %}{% endfor %}{% if add_generation_prompt %}A:{% endif %}"
)
WITH_TOOLS = "{% if tools %}{% for t in tools %}({{ t.function.name }}){% endfor %}{% endif %}" + CHATML
CALLS = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% for c in m.tool_calls or [] %}"
    "{{ c.function.name }}:{{ c.function.arguments.x }}{% endfor %}</>{% endfor %}" + START
)
SCHEMA = {"type": "function", "function": {"name": "look_up", "description": "Looks up.", "parameters": {"type": "object"}}}


def said(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def text(*texts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": one} for one in texts]


HELLO = [said("user", "Hi")]


@cache
def tokenizer(template: str | None) -> Any:
    found = AutoTokenizer.from_pretrained(TARGET)
    found.chat_template = template
    return found


def prompt(template: str | None, messages: Any, **options: Any) -> str:
    return render(tokenizer(template), messages, Template(**options))


# --- roles


@pytest.mark.parametrize("role", ROLES)
def test_usual_roles_pass(role: str) -> None:
    assert prompt(CHATML, [said(role, "x"), *HELLO]) == f"<{role}>x</><user>Hi</><assistant>"


@pytest.mark.parametrize(
    ("role", "near"), [("wizard", ""), ("usr", " Did you mean 'user'?"), ("User", " Did you mean 'user'?")]
)
@pytest.mark.parametrize("template", [CHATML, TURNS])
def test_other_roles_are_refused(template: str, role: str, near: str) -> None:
    """Also where the template writes whatever role it gets: the model has never seen it."""
    with pytest.raises(ValueError) as caught:
        prompt(template, [*HELLO, said(role, "x")])
    assert str(caught.value) == f"unknown role of message 2: {role!r}.{near} Allowed: {', '.join(ROLES)}"


def test_a_role_that_the_template_names_passes() -> None:
    assert prompt(TURNS, [*HELLO, said("ipython", "4")]) == "U:Hi I:4 A:"


@pytest.mark.parametrize("role", ["system", "developer", "tool", "function"])
def test_a_message_that_the_template_drops_is_refused(role: str) -> None:
    with pytest.raises(ValueError, match=rf"the chat template drops message 1 \(role '{role}'\)\. Leave it out, or"):
        prompt(TURNS, [said(role, "x"), *HELLO])
    assert prompt(TURNS, [said(role, ""), *HELLO]) == "U:Hi A:"  # nothing is lost


def test_only_messages_with_their_text_in_the_prompt_pass() -> None:
    once = (
        "{{ messages[0].content }}{% for m in messages[1:] %}{% if m.role != 'system' %}|{{ m.content }}{% endif %}{% endfor %}"
    )
    assert prompt(once, [said("system", "a"), *HELLO]) == "a|Hi"
    with pytest.raises(ValueError, match="drops message 3"):
        prompt(once, [said("system", "a"), *HELLO, said("system", "b")])


def test_reasoning_that_a_template_leaves_out_is_no_loss() -> None:
    template = "{% for m in messages %}{% if m.role != 'assistant' or loop.last %}{{ m.content }};{% endif %}{% endfor %}"
    assert prompt(template, [*HELLO, said("assistant", "thinking"), said("user", "Go on")]) == "Hi;Go on;"


def test_what_the_template_itself_refuses() -> None:
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + CHATML
    with pytest.raises(ValueError, match="the chat template refuses the conversation: System role not supported"):
        prompt(template, [said("system", "x"), *HELLO])


# --- contents


@pytest.mark.parametrize(
    ("template", "wanted"),
    [
        (CHATML, "<user>a\nb</><assistant>"),
        (PARTS, "<user>ab</><assistant>"),
        (BOTH_EQUAL, "<user>ab</><assistant>"),
        (BOTH, "<user>a\nb</><assistant>"),  # it changes what it takes in parts
        (JSON_PARTS, '<user>"a\\nb"</><assistant>'),
        (TURNS, "U:a\nb A:"),
    ],
    ids=["text", "parts", "both", "changed", "json", "trimmed"],
)
def test_text_parts_are_joined_as_the_template_wants(template: str, wanted: str) -> None:
    for content in (text("a", "b"), ["a", "b"], [{"text": "a"}, {"type": "input_text", "text": "b"}]):
        messages = [said("user", content)]
        assert prompt(template, messages) == wanted
        assert messages == [said("user", content)]  # not changed


def test_plain_texts_reach_a_template_that_takes_parts_alone() -> None:
    assert prompt(PARTS, [said("system", "S"), *HELLO]) == "<system>S</><user>Hi</><assistant>"
    for template in (CHATML, BOTH):
        assert prompt(template, HELLO) == "<user>Hi</><assistant>"


def test_the_format_of_contents_can_be_named() -> None:
    messages = [said("user", text("a", "b"))]
    assert prompt(BOTH_EQUAL, messages, chat_template_content_format="string") == "<user>a\nb</><assistant>"
    assert prompt(BOTH, messages, chat_template_content_format="openai") == "<user>[a][b]</><assistant>"
    with pytest.raises(ValueError, match=r"unknown chat_template_content_format 'strings'\. Did you mean 'string'"):
        prompt(BOTH, messages, chat_template_content_format="strings")


@pytest.mark.parametrize("kind", ["image_url", "image", "input_audio", "audio", "video_url", "file", "refusal"])
def test_other_parts_are_refused_by_name(kind: str) -> None:
    content = [*text("What is this?"), {"type": kind, kind: "x"}]
    with pytest.raises(
        ValueError, match=f"message 2 has a part of type '{kind}', but models read text only here. Leave the part"
    ):
        prompt(CHATML, [said("system", "S"), said("user", content)])


@pytest.mark.parametrize(
    ("message", "kind", "said_"),
    [
        ({"content": "x"}, ValueError, "message 1 has no role. Give one of system, developer, user, assistant, tool, function"),
        ({"role": "", "content": "x"}, ValueError, "message 1 has no role"),
        ({"role": 3, "content": "x"}, ValueError, "message 1 has no role"),
        ({"role": "user"}, ValueError, "message 1 (role 'user') has no content. Give a text"),
        ({"role": "user", "content": None}, ValueError, "message 1 (role 'user') has no content"),
        ({"role": "user", "content": 3}, TypeError, "the content of message 1 must be a text or a list of text parts, got 3"),
        ({"role": "user", "content": {"a": 1}}, TypeError, "the content of message 1 must be a text or a list"),
        ({"role": "user", "content": [3]}, TypeError, "a part of message 1 must be a dict such as"),
        ({"role": "user", "content": [{"type": "text"}]}, TypeError, "a text part of message 1 must hold a text"),
        ({"role": "user", "content": [{"type": "text", "text": 3}]}, TypeError, "a text part of message 1 must hold a text"),
        ({"role": "user", "content": [{}]}, ValueError, "message 1 has a part of type None"),
        ({"role": "assistant", "tool_calls": 3}, TypeError, "tool_calls of message 1 must be a list"),
        ({"role": "assistant", "tool_calls": [3]}, TypeError, "a tool call of message 1 must be a dict with a 'function'"),
        (
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]},
            ValueError,
            "the arguments of a tool call in message 1 are not JSON",
        ),
        ("text", TypeError, "message 1 must be a dict such as {'role': 'user', 'content': 'Hello'}, got 'text'"),
        (3, TypeError, "message 1 must be a dict"),
    ],
)
def test_incomplete_messages(message: Any, kind: type[Exception], said_: str) -> None:
    with pytest.raises(kind) as caught:
        prompt(CHATML, [message])
    assert str(caught.value).startswith(said_)


def test_calls_of_tools_and_their_results() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "look_up", "arguments": '{"x": 4}'}}
    answer = said("tool", "four", tool_call_id="1")
    for function in (call["function"], {"name": "look_up", "arguments": {"x": 4}}):
        for content in ({}, {"content": None}, {"content": ""}):
            asked = {"role": "assistant", **content, "tool_calls": [{**call, "function": function}]}
            wanted = "<user>Hi</><assistant>look_up:4</><tool>four</><assistant>"
            assert prompt(CALLS, [*HELLO, asked, answer]) == wanted


def test_calls_that_the_template_drops_are_refused() -> None:
    calls = [{"function": {"name": name, "arguments": {"x": 1}}} for name in ("look_up", "add")]
    asked = {"role": "assistant", "content": "Well", "tool_calls": calls}
    with pytest.raises(ValueError, match=r"drops the tool calls of message 2 \(look_up, add\)\. Write them into its content"):
        prompt(CHATML, [*HELLO, asked, said("tool", "4")])
    template = CALLS.replace("{{ m.content }}", "{{ 'calls' if 'tool_calls' in m else m.content }}")
    assert prompt(template, [said("user", "Hi", tool_calls=None), said("assistant", "Well", tool_calls=[])]).count("calls") == 0
    assert "look_up:1add:1" in prompt(CALLS, [*HELLO, asked, said("tool", "4")])


def test_conversations() -> None:
    assert conversations(HELLO) == [HELLO]
    assert conversations([HELLO, HELLO]) == [HELLO, HELLO]
    assert conversations([]) == []


@pytest.mark.parametrize("given", [3, "text", None, {"role": "user", "content": "x"}, b"x", 1.5])
def test_what_is_no_conversation(given: Any) -> None:
    for call in (conversations, lambda one: prompt(CHATML, one)):
        with pytest.raises(TypeError, match=r"a conversation is a list of messages such as .*'Hello'") as caught:
            call(given)
        assert (
            "Put the message into a list" in str(caught.value) if isinstance(given, dict) else "generate()" in str(caught.value)
        )
    with pytest.raises(ValueError, match=r"the conversation is empty\. Give at least one message"):
        prompt(CHATML, [])


# --- the template


def test_no_chat_template() -> None:
    for none in (tokenizer(None), None):
        with pytest.raises(ValueError, match="this model has no chat template"):
            render(none, HELLO, {})
    assert prompt(None, HELLO, chat_template=CHATML) == "<user>Hi</><assistant>"


def test_another_template_as_text_as_a_file_and_by_name(tmp_path: Path) -> None:
    file = tmp_path / "other.jinja"
    file.write_text(TURNS)
    for given in (TURNS, str(file)):
        assert prompt(CHATML, HELLO, chat_template=given) == "U:Hi A:"
    several = tokenizer(None)
    try:
        several.chat_template = {"default": CHATML, "short": TURNS}
        assert render(several, HELLO, {}) == "<user>Hi</><assistant>"
        assert render(several, HELLO, {"chat_template": "short"}) == "U:Hi A:"
    finally:
        several.chat_template = None
    for missing in ("missing.jinja", "chatml"):
        with pytest.raises(ValueError, match=f"no chat template: '{missing}' is neither a Jinja template nor a file. Give one"):
            prompt(CHATML, HELLO, chat_template=missing)
    with pytest.raises(TypeError, match="chat_template must be a Jinja template or the path"):
        render(tokenizer(CHATML), HELLO, {"chat_template": 3})  # type: ignore[typeddict-item]
    with pytest.raises(ValueError, match="the chat template refuses the conversation"):
        prompt(CHATML, HELLO, chat_template="{% for %}")


def test_generation_prompt_and_continuing() -> None:
    begun = [*HELLO, said("assistant", "I am ")]
    assert prompt(CHATML, HELLO, add_generation_prompt=False) == "<user>Hi</>"
    continued = {"add_generation_prompt": False, "continue_final_message": True}
    assert prompt(CHATML, begun, **continued) == "<user>Hi</><assistant>I am "
    assert prompt(PARTS, begun, **continued) == "<user>Hi</><assistant>I am "
    assert prompt(CHATML, [*HELLO, said("assistant", text("I", "am"))], **continued) == "<user>Hi</><assistant>I\nam"
    with pytest.raises(
        ValueError, match=r"exclude each other.* Give continue_final_message=True with add_generation_prompt=False"
    ):
        prompt(CHATML, begun, continue_final_message=True)


def test_variables_of_the_template() -> None:
    template = "{% if enable_thinking is defined and not enable_thinking %}quiet {% endif %}" + CHATML
    assert prompt(template, HELLO, chat_template_kwargs={"enable_thinking": False}) == "quiet <user>Hi</><assistant>"
    assert prompt(template, HELLO, chat_template_kwargs=None) == "<user>Hi</><assistant>"
    # as in vLLM, they win over the arguments
    assert prompt(CHATML, HELLO, chat_template_kwargs={"add_generation_prompt": False}) == "<user>Hi</>"
    for name in ("tokenize", "messages", "return_tensors"):
        with pytest.raises(ValueError, match=f"chat_template_kwargs cannot set '{name}'"):
            prompt(CHATML, HELLO, chat_template_kwargs={name: True})
    for wrong in (3, ["x"], {1: 2}):
        with pytest.raises(TypeError, match="chat_template_kwargs must be a dict"):
            render(tokenizer(CHATML), HELLO, {"chat_template_kwargs": wrong})  # type: ignore[typeddict-item]


def look_up(word: str) -> str:
    """Looks up a word.

    Args:
        word: the word.
    """
    return word


def test_tools() -> None:
    wanted = "(look_up)<user>Hi</><assistant>"
    for tools in ([SCHEMA], (SCHEMA,), [look_up]):
        assert prompt(WITH_TOOLS, HELLO, tools=tools) == wanted
    for none in (None, []):
        assert prompt(WITH_TOOLS, HELLO, tools=none) == prompt(CHATML, HELLO, tools=none) == "<user>Hi</><assistant>"
    with pytest.raises(ValueError, match=r"this model's chat template has no tools\. Leave tools out, or give a chat_template"):
        prompt(CHATML, HELLO, tools=[SCHEMA])
    for wrong in (3, "look_up", SCHEMA, [3]):
        with pytest.raises(TypeError, match="tools must be a list of JSON schemas or of Python functions"):
            render(tokenizer(WITH_TOOLS), HELLO, {"tools": wrong})  # type: ignore[typeddict-item]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"tools": [SCHEMA]},
        {"add_generation_prompt": False},
        {"add_generation_prompt": False, "continue_final_message": True},
        {"chat_template_kwargs": {"x": 1}},
    ],
    ids=str,
)
def test_the_prompt_is_that_of_transformers(options: dict[str, Any]) -> None:
    messages = [said("system", "S"), *HELLO, said("assistant", "Well"), said("user", "Go"), said("assistant", "I go")]
    theirs = {"add_generation_prompt": True, **options}
    theirs |= theirs.pop("chat_template_kwargs", {})
    wanted = tokenizer(WITH_TOOLS).apply_chat_template(messages, tokenize=False, **theirs)
    assert prompt(WITH_TOOLS, messages, **options) == wanted


# --- through LLM


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Model directories, by what their chat template can do."""
    found = {}
    for name, template in {"chatml": CHATML, "tools": WITH_TOOLS, "parts": PARTS, "none": ""}.items():
        found[name] = tmp_path_factory.mktemp(name) / "model"
        shutil.copytree(TARGET, found[name])
        if template:
            (found[name] / "chat_template.jinja").write_text(template)
    return found


def test_llm_chat(folders: dict[str, Path]) -> None:
    llm = LLM(folders["tools"], PLAIN)
    encoded = llm.get_tokenizer()("(look_up)<user>a\nb</><assistant>", add_special_tokens=False)["input_ids"]
    messages = [said("user", text("a", "b"))]
    for given in (messages, [messages, messages]):
        for one in llm.chat(given, SHORT, tools=[SCHEMA], use_tqdm=False):  # type: ignore[call-arg]
            assert (one.prompt, one.prompt_token_ids) == ("(look_up)<user>a\nb</><assistant>", encoded)
            assert len(one.outputs[0].token_ids) == 2
    assert llm.chat([], SHORT) == []
    params = [SamplingParams(temperature=0, max_tokens=count, ignore_eos=True) for count in (1, 3)]
    assert [len(one.outputs[0].token_ids) for one in llm.chat([messages, HELLO], params)] == [1, 3]


def test_llm_chat_continues_a_message(folders: dict[str, Path]) -> None:
    llm = LLM(folders["chatml"], PLAIN, dtype="float64")
    begun = [*HELLO, said("assistant", "Once upon")]
    [one] = llm.chat(begun, SHORT, add_generation_prompt=False, continue_final_message=True)
    ids = llm.get_tokenizer()("<user>Hi</><assistant>Once upon", add_special_tokens=False)["input_ids"]
    assert one.prompt_token_ids == ids
    assert one.outputs[0].token_ids == llm.generate([ids], SHORT)[0].outputs[0].token_ids


@pytest.mark.parametrize(
    ("messages", "kind", "text_"),
    [
        (3, TypeError, "a conversation is a list of messages"),
        ("text", TypeError, "For a plain text use generate"),
        ([[]], ValueError, "the conversation is empty"),
        ([HELLO, 3], TypeError, "message 1 must be a dict"),
        ([said("wizard", "x")], ValueError, "unknown role of message 1: 'wizard'"),
        ([HELLO, [said("user", [{"type": "image_url", "image_url": "x"}])]], ValueError, "a part of type 'image_url'"),
    ],
)
@pytest.mark.unchecked
def test_llm_chat_refuses(messages: Any, kind: type[Exception], text_: str) -> None:
    with pytest.raises(kind, match=text_):
        bundled().chat(messages, SHORT)


@cache
def bundled() -> LLM:
    return LLM(None, PLAIN)


def test_the_bundled_model_takes_a_system_message_and_no_tools() -> None:
    assert bundled().chat_prompt([said("system", "S"), *HELLO])["prompt"] == "<|user|>\nS\n<|user|>\nHi\n<|assistant|>\n"
    with pytest.raises(ValueError, match="has no tools"):
        bundled().chat(HELLO, SHORT, tools=[SCHEMA])


def test_is_plain() -> None:
    one = bundled().get_tokenizer()
    assert is_plain("Hi", one)
    assert not is_plain("<|user|>\nHi\n<|assistant|>\n", one)
    assert not is_plain("Hi", tokenizer(None))
    assert not is_plain("Hi", None)


# --- files of prompts


def test_messages_with_parts_and_tools_in_a_file(folders: dict[str, Path], tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    rows = [{"messages": [said("user", text("a", "b"))], "tools": [SCHEMA]}, {"messages": HELLO}, {"question": "q"}]
    file.write_text("\n".join(map(json.dumps, rows)))
    llm = LLM(folders["tools"], PLAIN)
    shown = ["(look_up)<user>a\nb</><assistant>", "<user>Hi</><assistant>", "<user>q</><assistant>"]
    wanted = [llm.get_tokenizer()(one, add_special_tokens=False)["input_ids"] for one in shown]
    assert encode(llm, read_prompts(file), raw=False) == wanted


@pytest.mark.parametrize(
    ("row", "text_"),
    [
        ({"messages": [said("user", [{"type": "image", "image": "x"}])]}, "a part of type 'image'"),
        ({"messages": [{"role": "user"}]}, "has no content"),
        ({"prompt": 5}, "prompt must be a text, got 5"),
    ],
)
def test_wrong_messages_in_a_file(run: Any, tmp_path: Path, row: Any, text_: str) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps(row))
    with pytest.raises(ValueError, match=text_):
        read_prompts(file)
    code, _, err = run("bench", "--methods", "suffix", "--prompts", file)
    assert code == 1
    assert f"error: {file}, line 1: " in err and text_ in err and "hint: " in err


# --- the command line


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs the command line in this process: (exit code, standard output, standard error)."""
    monkeypatch.setenv("COLUMNS", "200")

    def call(*given: Any, stdin: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr("sys.stdin", StringIO(stdin))
        with pytest.raises(SystemExit) as ended:
            main([str(one) for one in given])
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return ended.value.code, out, err  # type: ignore[return-value]

    return call


USUAL = ["--method", "ar", "--temperature", 0, "--max-tokens", 2, "--ignore-eos"]


def test_options_for_the_chat_template(run: Any, folders: dict[str, Path], tmp_path: Path) -> None:
    tools, template = tmp_path / "tools.json", tmp_path / "other.jinja"
    tools.write_text(json.dumps([SCHEMA]))
    template.write_text("{{ style }} " + WITH_TOOLS)
    given = ["generate", "Hi", "--chat", "--json", "--model", folders["chatml"], "--tools", tools, *USUAL]
    given += ["--chat-template", template, "--chat-template-kwargs", '{"style": "brief"}']
    code, out, err = run(*given)
    assert (code, err) == (0, "")
    wanted = LLM(folders["chatml"], PLAIN).get_tokenizer()("brief (look_up)<user>Hi</><assistant>", add_special_tokens=False)
    assert json.loads(out)["prompt_token_ids"] == wanted["input_ids"]


@pytest.mark.parametrize(
    ("options", "error", "hint"),
    [
        (["--chat", "--tools", "missing.json"], "--tools cannot be read", "Give a file with a JSON list"),
        (["--chat", "--tools", "OBJECT"], "--tools must be a file with a JSON list", "Put a single schema into [ ]"),
        (
            ["--chat", "--chat-template-kwargs", "x"],
            "--chat-template-kwargs is not JSON",
            "Example: '{\"enable_thinking\": false}'",
        ),
        (["--chat", "--chat-template-kwargs", "[1]"], "--chat-template-kwargs must be a JSON object", "Example"),
        (["--chat-template", "{{ messages }}"], "--chat-template only affects the chat template", "Add --chat to apply"),
        (["--chat", "--chat-template", "missing"], "'missing' is neither a Jinja template nor a file", "Give one of them"),
        (["--chat", "--tools", "LIST"], "this model's chat template has no tools", "Leave tools out"),
    ],
)
def test_wrong_options_for_the_chat_template(
    run: Any, folders: dict[str, Path], tmp_path: Path, options: list[str], error: str, hint: str
) -> None:
    files = {"OBJECT": SCHEMA, "LIST": [SCHEMA]}
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    options = [str(tmp_path / one) if one in files else one for one in options]
    code, out, err = run("generate", "Hi", "--model", folders["chatml"], *USUAL, *options)
    assert (code, out) == (1, "")
    first, second = err.splitlines()
    assert first.startswith("error: ") and error in first
    assert second.startswith("hint: ") and hint in second


def test_the_chat_command_takes_them_too(run: Any, folders: dict[str, Path], tmp_path: Path) -> None:
    tools = tmp_path / "tools.json"
    tools.write_text(json.dumps([SCHEMA]))
    code, out, _ = run("chat", "--model", folders["tools"], "--tools", tools, *USUAL, stdin="Hi\nAgain\n")
    assert code == 0
    assert len(out.splitlines()) >= 2
    code, _, err = run("chat", "--model", folders["chatml"], "--tools", tools, *USUAL, stdin="Hi\n")
    assert code == 1
    assert "has no tools" in err


def test_a_dropped_system_message_is_said_before_the_first_question(run: Any, folders: dict[str, Path]) -> None:
    given = ["chat", "--model", folders["chatml"], "--chat-template", TURNS, *USUAL]
    code, _, err = run(*given, "--system", "Be brief", stdin="Hi\n")
    assert code == 1
    assert "the chat template drops message 1 (role 'system')" in err
    assert run(*given, stdin="Hi\n")[0] == 0


NOTE = "the model has a chat template"


def test_raw_text_on_a_chat_model_is_said_once(run: Any, folders: dict[str, Path]) -> None:
    given = ["generate", "Hi", "--model", folders["chatml"], *USUAL]
    code, out, err = run(*given)
    assert code == 0
    assert err.count(NOTE) == 1 and "--chat" in err
    assert NOTE not in out
    assert NOTE not in run(*given, "--chat")[2]
    assert NOTE not in run("generate", "Hi", "--model", folders["none"], *USUAL)[2]
    code, out, err = run(*given, "--json")
    assert NOTE not in out + err
    assert NOTE not in run("generate", "<|user|>\nHi\n<|assistant|>\n", *USUAL)[2]  # the bundled model's own format
    assert NOTE in run("generate", "Hi", *USUAL)[2]


# --- what would be dropped or misread in silence


@pytest.mark.parametrize("key", ["images", "image", "audio", "audios", "video", "videos", "image_url"])
def test_media_beside_the_content_is_refused_by_name(key: str) -> None:
    with pytest.raises(ValueError, match=f"message 2 has the key '{key}', but models read text only here. Leave the key out"):
        prompt(CHATML, [said("system", "S"), said("user", "What?", **{key: ["x.png"]})])
    for empty in (None, [], "", False):
        assert prompt(CHATML, [said("user", "Hi", **{key: empty})]) == "<user>Hi</><assistant>"


def test_further_keys_of_a_text_part_are_refused_by_name() -> None:
    for key in ("image", "image_url", "file"):
        part = {"type": "text", "text": "What?", key: "x.png"}
        with pytest.raises(ValueError, match=f"a text part of message 1 has the key '{key}', but .* Leave the key out"):
            prompt(CHATML, [said("user", [part])])
    harmless = {"type": "output_text", "text": "Hi", "annotations": [1], "cache_control": {"type": "x"}, "image": None}
    assert prompt(CHATML, [said("user", [harmless])]) == "<user>Hi</><assistant>"


def test_the_older_function_call_is_a_tool_call() -> None:
    function = {"name": "look_up", "arguments": '{"x": 4}'}
    asked = {"role": "assistant", "content": None, "function_call": function}
    assert prompt(CALLS, [*HELLO, asked]) == "<user>Hi</><assistant>look_up:4</><assistant>"
    with pytest.raises(ValueError, match=r"drops the tool calls of message 2 \(look_up\)"):
        prompt(CHATML, [*HELLO, asked])
    with pytest.raises(ValueError, match=r"message 2 has both function_call and tool_calls\. Leave function_call out"):
        prompt(CALLS, [*HELLO, {**asked, "tool_calls": [{"function": function}]}])
    for wrong in ("auto", {"arguments": "{}"}):
        with pytest.raises(TypeError, match="function_call of message 2 must be a dict with a 'name' and 'arguments', got"):
            prompt(CALLS, [*HELLO, {**asked, "function_call": wrong}])


@pytest.mark.parametrize("role", ["content", "role", "type", "string"])
def test_quoted_keys_of_messages_are_no_roles(role: str) -> None:
    template = CHATML + "{{ 'type' if x else 'string' }}"
    with pytest.raises(ValueError, match=f"unknown role of message 2: '{role}'"):
        prompt(template, [*HELLO, said(role, "x")])


@pytest.mark.parametrize("name", ["add_generation_prompt", "continue_final_message"])
def test_switches_are_bools(name: str) -> None:
    for wrong in ("False", 1, None):
        for options in ({name: wrong}, {"chat_template_kwargs": {name: wrong}}):
            with pytest.raises(TypeError, match=f"{name} must be True or False, got {wrong!r}"):
                prompt(CHATML, HELLO, **options)


def test_lone_surrogates_are_named() -> None:
    for content in ("a\ud800", text("b", "a\ud800")):
        with pytest.raises(ValueError, match=r"the content of message 2 is not valid text: character 2 is .* U\+D800"):
            prompt(CHATML, [*HELLO, said("user", content)])
    with pytest.raises(ValueError, match=r"the conversation that the chat template renders is not valid text: character 1 is"):
        prompt("{{ style }}" + CHATML, HELLO, chat_template_kwargs={"style": "\udfff"})


def test_a_path_that_is_too_long_and_a_file_that_is_no_text(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no chat template: 'xxx.* is neither a Jinja template nor a file\. Give") as caught:
        prompt(CHATML, HELLO, chat_template="x" * 5000)
    assert len(str(caught.value)) < 400
    file = tmp_path / "latin.jinja"
    file.write_bytes(b"ab\xe9{{ x }}")
    with pytest.raises(ValueError, match=r"latin\.jinja' cannot be read: byte 3 of the file is not UTF-8\. Give a text file"):
        prompt(CHATML, HELLO, chat_template=str(file))


def test_deeply_nested_arguments_of_a_tool_call() -> None:
    deep = '{"x": ' + "[" * 100_000 + "]" * 100_000 + "}"
    call = {"function": {"name": "f", "arguments": deep}}
    with pytest.raises(ValueError, match="the arguments of a tool call in message 2 are nested too deeply") as caught:
        prompt(CALLS, [*HELLO, {"role": "assistant", "tool_calls": [call]}])
    assert str(caught.value).endswith("Give fewer levels")
    assert len(str(caught.value)) < 400
