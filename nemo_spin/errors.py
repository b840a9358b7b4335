"""Errors that a person reads: one sentence that says what is wrong, where, and what to do.

The command line prints the sentence without a traceback and exits with `EXIT_CODE`.
"""

from __future__ import annotations

EXIT_CODE = 2


class UserError(Exception):
    """Something the user can put right: a path, a key, a value, a line of data.

    Its sentence is put on one line and, because it may quote a stranger's file, made safe for a terminal.
    """

    def __init__(self, sentence: str = "") -> None:
        super().__init__(printable(" ".join(sentence.splitlines())))


class ConfigError(UserError):
    """A configuration key or value that cannot be used. key: the full name of that key, where there is one."""

    def __init__(self, sentence: str = "", key: str | None = None) -> None:
        super().__init__(sentence)
        self.key = key


class MissingKeyError(ConfigError):
    """A configuration lacks a value that has to be given."""


class DataError(UserError):
    """A data file, or a line of it, that cannot be used."""


class CheckpointError(UserError):
    """A checkpoint that is missing, incomplete, or of a kind that is not supported."""


# A sentence with two paths and a list of names is shorter.
_LONGEST = 2000


def printable(text: str) -> str:
    """The text with control characters, which may change what a terminal shows, as escapes; its middle cut out where it
    is longer than any sentence."""
    if len(text) > _LONGEST:
        text = f"{text[: _LONGEST // 2]} ... {text[-_LONGEST // 2 :]}"
    if text.isprintable():
        return text
    return "".join(
        each if each.isprintable() else each.encode("unicode_escape", "surrogatepass").decode("ascii") for each in text
    )


def one_line(error: BaseException) -> str:
    """What another library says, as a part of a sentence: on one line, for a terminal, not too long; the name of the
    error's class where it says nothing."""
    return printable(" ".join(str(error).split()).rstrip(".") or type(error).__name__)[:500]
