"""Checks on the values of a record, each with an error that says where it is and what to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from reprlib import repr as shortened
from typing import Any

from nemo_spin.errors import DataError


@contextmanager
def located(where: str) -> Iterator[None]:
    """Around checks that do not know the record: a DataError from inside begins with `where` it is."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{where}: {error}") from error


def text_of(value: Any, what: str, where: str) -> str:
    """The value, which must be a string that has an encoding in UTF-8 and no NUL.

    what: names the value in the error. Raises DataError.
    """
    if not isinstance(value, str):
        raise DataError(f"{where}: {what} must be a string, found {kind_of(value)}: write it as text")
    if "\0" in value:
        raise DataError(f"{where}: {what} holds a NUL character: remove it")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: {what} holds half of a surrogate pair at character {error.start + 1}: export the file again"
        ) from None
    return value


def answer_of(value: Any, what: str, where: str) -> str:
    """As `text_of`, for a response: one without text teaches a model to say nothing. Raises DataError."""
    text = text_of(value, what, where)
    if not text.strip():
        raise DataError(f"{where}: the response is empty: fill {what}, or remove the record")
    return text


def ids_of(record: dict[str, Any], key: str, vocab_size: int, where: str) -> list[int]:
    """The record's token ids under `key`, at least one, each from 0 to vocab_size - 1. Raises DataError."""
    if key not in record:
        raise DataError(f"{where}: {key!r} is missing: a record of token ids needs 'prompt_ids' and 'response_ids'")
    ids = record[key]
    if not isinstance(ids, list) or not ids:
        raise DataError(f"{where}: {key!r} must be a list of at least one token id, found {kind_of(ids)}")
    for position, token in enumerate(ids):
        # JSON's true is an int to Python
        if type(token) is not int or not 0 <= token < vocab_size:
            raise DataError(
                f"{where}: {key}[{position}] is {shortened(token)}: token ids are integers from 0 to "
                f"{vocab_size - 1}, for this tokenizer"
            )
    return ids


def kind_of(value: Any) -> str:
    """What a value is, for a sentence: its JSON type, or that it is empty."""
    if isinstance(value, list | dict) and not value:
        return "an empty list" if isinstance(value, list) else "an empty object"
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return names.get(type(value), "null" if value is None else f"a {type(value).__name__}")
