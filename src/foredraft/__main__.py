"""The command line: builds the commands that are called, and shows errors. A command stands in a file of `foredraft.cli`."""

from __future__ import annotations

import _thread
import inspect
import os
import sys
import threading
from collections.abc import Callable, Sequence
from copy import copy
from importlib import import_module
from typing import Annotated, Any, get_type_hints

import typer

from foredraft.core.errors import told

COMMANDS = ("generate", "chat", "bench", "calibrate", "train", "convert", "doctor", "audit", "methods", "theory")
"""The commands, in the order of ``--help``. The command or group of commands ``x`` is the object ``x`` of `foredraft.cli.x`."""


def build(arguments: Sequence[str]) -> typer.Typer:
    """Builds the command line. If `arguments` call no command that exists, it has all commands, for help and advice."""
    app = typer.Typer(
        name="foredraft",
        help="Generate faster with language models: exact speculative decoding with trees of drafted tokens.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )
    app.callback(invoke_without_command=True)(_root)
    called = _called(arguments)
    for name in [called] if called in COMMANDS else COMMANDS:
        command = getattr(import_module(f"foredraft.cli.{name}"), name)
        if isinstance(command, typer.Typer):
            app.add_typer(command)
        else:
            app.command(name)(command)
    return only_called(app, arguments)


def only_called(commands: typer.Typer, arguments: Sequence[str]) -> typer.Typer:
    """Returns the same commands, without the options of those that `arguments` do not call.

    Typer builds the options of all commands in every call, which takes longer than everything else.
    """
    called, found = _called(arguments), copy(commands)
    found.registered_commands, found.registered_groups = [], []
    for command in commands.registered_commands:
        shown = copy(command)
        if command.name == called:
            shown.callback = spread(command.callback)  # type: ignore[arg-type]
        else:
            shown.help, shown.callback = inspect.getdoc(command.callback), lambda: None
        found.registered_commands.append(shown)
    for group in commands.registered_groups:
        shown = copy(group)
        below = arguments[1:] if group.typer_instance.info.name == called else []  # type: ignore[union-attr]
        shown.typer_instance = only_called(group.typer_instance, below)  # type: ignore[arg-type]
        found.registered_groups.append(shown)
    return found


def _called(arguments: Sequence[str]) -> str | None:
    return next((word for word in arguments if not word.startswith("-")), None)


def spread(command: Callable[..., Any]) -> Callable[..., int | None]:
    """Returns the same command with the fields of its groups of options as parameters of its own, for Typer.

    A group is a parameter whose type is a named tuple, see `foredraft.cli.options`. What the command returns is the exit code.
    """
    hints, groups = get_type_hints(command, include_extras=True), {}
    parameters: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(command).parameters.items():
        if hasattr(hints[name], "_fields"):
            group = groups[name] = hints[name]
            types, defaults = get_type_hints(group, include_extras=True), group._field_defaults
            for field in group._fields:
                default = defaults.get(field, parameter.empty)
                parameters.append(parameter.replace(name=field, annotation=types[field], default=default))
        else:
            parameters.append(parameter.replace(annotation=hints[name]))

    def run(**given: Any) -> int | None:
        made = {name: group(*map(given.pop, group._fields)) for name, group in groups.items()}
        return command(**given, **made)

    run.__doc__ = command.__doc__
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def _root(*, version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        from importlib.metadata import version as version_of

        typer.echo(version_of("foredraft"))
        raise typer.Exit


_UsageError: Any = typer.BadParameter.__base__
"""Some versions of Typer bundle Click, others use the installed Click. The base class is the right one in both cases."""


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line and exits with code 0, 1 (error), 2 (wrong usage) or 130 (interrupted).

    No traceback is shown unless the environment variable FOREDRAFT_TRACEBACK is set.
    """
    _never_refuse_output()
    hook, sys.unraisablehook = sys.unraisablehook, _repeat_interrupt
    try:
        code = build(arguments or sys.argv[1:])(arguments, prog_name="foredraft", standalone_mode=False) or 0
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except _UsageError as error:
        code = _report_usage(error)
    except Exception as error:
        if os.environ.get("FOREDRAFT_TRACEBACK"):
            raise
        code = _report(error, arguments or sys.argv[1:])
    finally:
        sys.unraisablehook = hook
    sys.exit(code)


def _never_refuse_output() -> None:
    """Prints characters outside the terminal's encoding as escapes such as ``\\xe9``. By default Python raises an error."""
    streams: list[Any] = [sys.stdout, sys.stderr]
    for stream in streams:
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]


def _repeat_interrupt(unraisable: Any) -> None:
    """Sends a lost Ctrl-C again a moment later. Python drops a Ctrl-C that arrives while an object is being destroyed."""
    if issubclass(unraisable.exc_type, KeyboardInterrupt):
        threading.Timer(0.05, _thread.interrupt_main).start()
    else:
        sys.__unraisablehook__(unraisable)


def _report_usage(error: Any) -> int:
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()
        return 2
    from foredraft.core.arguments import option_advice
    from foredraft.plan.config import option_names

    context = getattr(error, "ctx", None)
    command = context.command_path if context else "foredraft"
    usual = error.format_message(), f"`{command} --help` lists all options"
    if command.endswith("generate") and ("extra argument" in usual[0] or "'PROMPT'" in usual[0]):
        usual = usual[0], f'give one prompt, in quotes: {command} "Once upon a time" (--help lists all options)'
    option = getattr(error, "option_name", None) or ""
    problem, hint = (option_advice(option, command, option_names()) if option else None) or usual
    _say("error", problem)
    _say("hint", hint)
    return 2


def _report(error: Exception, arguments: list[str]) -> int:
    """Prints one line that describes the error and one line of advice. Returns the exit code."""
    message, hint = f"{type(error).__name__}: {error}", None
    if isinstance(error, ValueError | TypeError | OSError):
        message, hint = told(error)
        message = " ".join(message.split()) or type(error).__name__
    if hint is None and isinstance(error, OSError):
        hint = "check that the file can be read or written, and that its disk has space"
    elif hint is None and isinstance(error, ValueError):
        command = " ".join(arguments[: 2 if arguments[0] == "theory" else 1])
        hint = f"`foredraft {command} --help` describes the values of each option"
    _say("error", message)
    _say("hint", " ".join((hint or "set FOREDRAFT_TRACEBACK=1 to see the traceback").split()))
    return 1


def _say(what: str, message: str) -> None:
    # `file=sys.stderr` keeps the stream's encoding; `err=True` would replace an ASCII stream by a UTF-8 one
    typer.secho(f"{what}: ", file=sys.stderr, nl=False, bold=True, fg="red" if what == "error" else "cyan")
    typer.echo(message, file=sys.stderr)


if __name__ == "__main__":
    main()
