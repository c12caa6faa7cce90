"""The command line: `weft COMMAND ...`. Finds the command's function; `commands/arguments.py` reads its signature.

In: argv. Out: the process's exit status. A user's mistake (ValueError, OSError, a missing extra) prints one sentence and
exits with 2; `--debug` shows the traceback; anything else is our bug and always shows it.
"""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

COMMANDS: dict[str, tuple[str, str]] = {
    "quickstart": ("weft.commands.world:quickstart", "build the sample world, train one small generalist, report"),
    "sample-world": ("weft.commands.world:sample_world", "write the sample world: media, documents, data card"),
    "inspect": ("weft.commands.stream:inspect", "show a document as one token stream, as text and as a page"),
    "prepare": ("weft.commands.data:prepare", "pack documents into shards"),
    "fit-tokenizer": ("weft.commands.data:fit_tokenizer", "fit a tokenizer on prepared documents"),
    "tokenize": ("weft.commands.data:tokenize", "tokenize a run's documents ahead of training"),
    "data-report": ("weft.commands.data:report", "count what is in a folder of shards"),
    "train": ("weft.commands.train:train", "pretrain or fine-tune from a YAML run"),
    "plan": ("weft.commands.train:plan", "estimate memory, speed and cost of a run without building it"),
    "export": ("weft.commands.train:export", "turn a training checkpoint into one model folder"),
    "generate": ("weft.commands.use:generate", "continue a prompt with text, an image, a sound, ..."),
    "predict": ("weft.commands.use:predict", "choose among answers, or forecast a sensor"),
    "embed": ("weft.commands.use:embed", "vectors of files"),
    "search": ("weft.commands.use:search", "find the files nearest to a query"),
    "explain": ("weft.commands.use:explain", "which segments mattered for a reply"),
    "eval": ("weft.commands.evaluate:evaluate", "score a checkpoint on tasks"),
    "lm-eval": ("weft.commands.evaluate:lm_eval", "run lm-eval's command line with weft models registered"),
    "kernels": ("weft.commands.kernels:kernels", "list attention backends and what `auto` chooses, or bench them"),
    "doctor": ("weft.commands.doctor:doctor", "versions, devices, extras and kernels: what works here and why not"),
}


def usage() -> str:
    """The list of commands."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(
        ["usage: weft COMMAND [--help] ...", "", *lines, "", "weft COMMAND --help shows its options; --debug shows tracebacks."]
    )


def find(name: str) -> Callable[..., Any]:
    """The function behind a command. Raises `ValueError` naming the nearest command."""
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        raise ValueError(f"weft has no command {name!r}" + (f"; did you mean {near[0]!r}?" if near else "; see weft --help"))
    module, _, function = COMMANDS[name][0].partition(":")
    return getattr(import_module(module), function)


def run(argv: Sequence[str]) -> Any:
    """Parse and call one command; a command marked `raw = True` gets its arguments unparsed."""
    command = find(argv[0])
    if getattr(command, "raw", False):
        return command(list(argv[1:]))
    from weft.commands.arguments import call

    return call(command, argv[1:], f"weft {argv[0]}")


def explained(name: str, error: Exception) -> str:
    """The error in the words of the command line."""
    from weft.commands.arguments import spoken

    try:
        return spoken(str(error), find(name))
    except (ValueError, ModuleNotFoundError):
        return str(error)


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the `weft` script. A reader that leaves early, such as `| head`, is no mistake."""
    try:
        command_line(argv)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None


def command_line(argv: Sequence[str] | None) -> None:
    """Do what the words say."""
    argv = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in argv
    argv = [a for a in argv if a != "--debug"]
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return
    if argv[0] == "--version":
        from weft import __version__

        print(f"weft {__version__}")
        return
    try:
        status = run(argv)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        if debug or isinstance(error, BrokenPipeError):
            raise
        print(f"weft {argv[0]}: {explained(argv[0], error)}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print(f"weft {argv[0]}: interrupted; run the same command again to go on", file=sys.stderr)
        raise SystemExit(130) from None
    if isinstance(status, int) and status:
        raise SystemExit(status)
