"""Command lines: a user's mistake is one line on stderr, and a closed stdout ends nothing."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import os
import re
import signal
import sys
from collections.abc import Iterator, Sequence
from typing import TypeVar

import gymnasium as gym
import tyro

Args = TypeVar("Args")

USER_ERROR = 2
"""Exit code of a mistake in the arguments or in what they name."""
MISTAKES = (ValueError, OSError, ImportError, gym.error.Error)
"""Exceptions that report a user's mistake while a command is set up. Others are defects, whose
traceback is shown."""


def parse(
    kind: type[Args], arguments: Sequence[str] | None = None, default: Args | None = None
) -> Args:
    """Parse the command line into a dataclass; a mistake is one line on stderr and exit code 2.

    Args:
        kind: Dataclass of the arguments.
        arguments: Command line without the program; None for that of this process.
        default: Values of the arguments that are not given; None for those of the dataclass. If it
            has a field `env_id` and the command line gives it, other defaults may depend on it.
    """
    box = io.StringIO()
    given = sys.argv[1:] if arguments is None else arguments
    has_id = any(f.name == "env_id" for f in dataclasses.fields(kind))  # type: ignore[arg-type]
    env_id = value_of("--env-id", given) if has_id and default is None else None
    try:
        if env_id is not None:
            default = kind(env_id=env_id)  # type: ignore[call-arg]
        # tyro takes the absence of `default` as "the defaults of the dataclass".
        defaults = {} if default is None else {"default": default}
        with contextlib.redirect_stderr(box):
            args: Args = tyro.cli(kind, args=arguments, **defaults)  # type: ignore[call-overload]
    except SystemExit as error:
        if error.code in (0, None):
            raise
        exit_with(_unbox(box.getvalue()), USER_ERROR)
    except (TypeError, *MISTAKES) as error:
        exit_with(str(error), USER_ERROR)
    sys.stderr.write(box.getvalue())
    return args


def value_of(flag: str, arguments: Sequence[str]) -> str | None:
    """Return the value of one option of a command line, before all of it is parsed."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument(flag, flag[:2] + flag[2:].replace("-", "_"), dest="value")
    with contextlib.suppress(argparse.ArgumentError):
        value: str | None = parser.parse_known_args(list(arguments))[0].value
        return value
    return None


def exit_with(message: str, code: int) -> None:
    """Print a message as one line on stderr and exit."""
    with contextlib.suppress(OSError):
        print(f"error: {' '.join(message.split())}", file=sys.stderr, flush=True)
    sys.exit(code)


@contextlib.contextmanager
def short_mistakes() -> Iterator[None]:
    """Turn the exceptions of `MISTAKES` into one line on stderr and exit code 2.

    Ctrl-C, which may come while kernels are compiled, is one line and exit code 130.
    """
    try:
        yield
    except KeyboardInterrupt:
        exit_with("interrupted before the first step", 128 + signal.SIGINT)
    except MISTAKES as error:
        exit_with(str(error) or type(error).__name__, USER_ERROR)


def say(text: str) -> None:
    """Print a line at once; if the reader of stdout has gone, discard all further output."""
    with lenient_stdout():
        print(text, flush=True)


@contextlib.contextmanager
def lenient_stdout() -> Iterator[None]:
    """Let nothing that is printed end the process.

    Characters that the locale does not know are printed as escape sequences. From the moment on
    when the reader of stdout has gone (`| head`), all output is discarded.
    """
    stream = sys.stdout if isinstance(sys.stdout, io.TextIOWrapper) else None
    errors = stream.errors if stream is not None else ""
    _print_escapes(stream, "backslashreplace")
    try:
        yield
        sys.stdout.flush()
    except OSError:
        _discard_stdout()
    finally:
        _print_escapes(stream, errors or "strict")


def _print_escapes(stream: io.TextIOWrapper | None, errors: str) -> None:
    """Set what a stream does with characters that its encoding does not know."""
    try:
        if stream is not None:
            stream.reconfigure(errors=errors)  # This also writes what is waiting.
    except OSError:
        _discard_stdout()


def _discard_stdout() -> None:
    """Discard all output from now on: BrokenPipeError of a pipe, or EIO of a closed terminal."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.close(null)


def _unbox(text: str) -> str:
    """Return the message in the box that tyro draws, with its first suggestion, as one line."""
    # Without Unicode the box is drawn by dashes alone. The first line is the title.
    lines = [line.strip("│|╭╮╰╯+ ") for line in text.splitlines()][1:]
    # Rules of dashes separate the message, the suggestions and the help of the argument.
    sections = re.split(r"^[─-]+$", "\n".join(lines), flags=re.MULTILINE)
    message = next(" ".join(section.split()) for section in sections if section.strip())
    message = message.removeprefix("Error parsing Args: ")
    suggested = re.search(r"Perhaps you meant:\s+(--\S+)", text.replace("│", " "))
    return f"{message}; did you mean {suggested[1]}?" if suggested else message
