"""A command's options from its signature: argv in, the call's result out.

jsonargparse makes an option of every parameter and its help from the docstring. What is added here: dashes in option names,
flags without a value, `*rest` parameters as any number of words anywhere on the line, and a mistake as one `ValueError`.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Sequence
from typing import Any, get_type_hints

HELP = ("-h", "--help")


class UsageError(ValueError):
    """The words on the command line do not fit the command."""


def call(command: Callable[..., Any], argv: Sequence[str], prog: str) -> Any:
    """Parse `argv` by the signature of `command` and call it. Raises `UsageError` for words that do not fit."""
    parser = build(command, prog)
    if any(word in HELP for word in argv[: argv.index("--") if "--" in argv else None]):
        print(dashed(parser.format_help()))
        return None
    options, words = split(command, argv)
    if missing := required(command)[len(words) :]:
        raise UsageError(f"{' and '.join(name.upper() for name in missing)} missing; see {prog} --help")
    if rest_of(command) is None and (more := words[len(required(command)) :]):
        raise UsageError(f"{more[0]!r} is one word too many; see {prog} --help")
    try:
        found = parser.parse_args([*options, "--", *words] if words else options)
    except UsageError:
        raise
    except Exception as error:  # jsonargparse raises several types for one thing: a word that does not fit
        raise UsageError(f"{one_line(error)}; see {prog} --help") from error
    given = dict(found.items(branches=False)) if not isinstance(found, dict) else found
    rest = rest_of(command)
    more = given.pop(rest, None) or [] if rest else []
    first = [given.pop(name) for name in required(command)]
    return command(*first, *more, **given)


def build(command: Callable[..., Any], prog: str) -> Any:
    """The parser: required parameters are words in order, `*rest` the words after them, everything else an option."""
    from jsonargparse import ArgumentParser, set_parsing_settings

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(prog=prog, description=summary(command), exit_on_error=False)
    parser.add_function_arguments(command, as_group=False, as_positional=True, fail_untyped=True)
    if rest := rest_of(command):
        parser.add_argument(rest, nargs="*", help=about(command, rest))
    return parser


def parameters(command: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The parameters of a command by name."""
    return dict(inspect.signature(command).parameters)


def rest_of(command: Callable[..., Any]) -> str | None:
    """The name of the `*rest` parameter."""
    return next((n for n, p in parameters(command).items() if p.kind is p.VAR_POSITIONAL), None)


def required(command: Callable[..., Any]) -> list[str]:
    """Parameters without a default, which are words and not options."""
    return [n for n, p in parameters(command).items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]


def split(command: Callable[..., Any], argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Options with their values, and words, in whatever order they came. `--` ends the options."""
    flags = {n for n, kind in get_type_hints(command).items() if kind is bool}
    options: list[str] = []
    words: list[str] = []
    left = list(argv)
    while left:
        word = left.pop(0)
        if word == "--":
            return options, words + left
        if len(word) == 2 and word[0] == "-" and word[1].isalpha():
            word = f"-{word}"
        if not word.startswith("--"):
            words.append(word)
            continue
        name, equals, value = word[2:].partition("=")
        name = name.replace("-", "_")
        known = parameters(command)
        if name.removeprefix("no_") in flags and name not in known:
            options.append(f"--{name.removeprefix('no_')}=false")
        elif name in flags and not equals:
            options.append(f"--{name}=true")
        elif equals:
            options.append(f"--{name}={value}")
        elif not left:
            raise UsageError(f"{word} needs a value")
        else:
            options.append(f"--{name}={left.pop(0)}")
        if (found := options[-1][2:].partition("=")[0]) not in known or found in required(command):
            raise UsageError(f"there is no option {word}{near(name, command)}")
    return options, words


def near(name: str, command: Callable[..., Any]) -> str:
    """The options, the nearest one first."""
    import difflib

    known = [n for n, p in parameters(command).items() if p.default is not p.empty]
    found = difflib.get_close_matches(name, known, n=1)
    listed = ", ".join("--" + n.replace("_", "-") for n in known) or "none"
    return f"; did you mean --{found[0].replace('_', '-')}?" if found else f"; the options are {listed}"


def summary(command: Callable[..., Any]) -> str:
    """The docstring's first paragraph."""
    return (inspect.getdoc(command) or "").partition("\n\n")[0]


def about(command: Callable[..., Any], name: str) -> str:
    """What the docstring's Args section says of a `*rest` parameter."""
    match = re.search(rf"^\s+\*?{name}: (.*(?:\n\s{{8,}}.*)*)", inspect.getdoc(command) or "", re.M)
    return re.sub(r"\s+", " ", match[1]) if match else ""


def dashed(text: str) -> str:
    """Help with dashes in option names."""
    return re.sub(r"--[a-z_]+", lambda m: m[0].replace("_", "-"), text)


def spoken(text: str, command: Callable[..., Any]) -> str:
    """An error of the library in the words of the command line: `space=` becomes `--space`."""
    names = "|".join(n for n, p in parameters(command).items() if p.default is not p.empty)
    return re.sub(rf"(?<![\w.])({names})=(?=[\s,;)]|$)", lambda m: "--" + m[1].replace("_", "-"), text) if names else text


def one_line(error: BaseException) -> str:
    """jsonargparse explains in several lines; a sentence is enough."""
    text = re.sub(r'Parser key "(\w+)":', lambda m: "--" + m[1].replace("_", "-") + ":", str(error))
    text = re.sub(r"<class '(\w+)'>", r"\1", text)
    return re.sub(r"\s+", " ", text).strip().rstrip(".")
