"""The text of a response ends before what has ended it."""

from __future__ import annotations

import pytest

from nemo_spin.generation.end_strings import text_of_response

STOP = ord("$")


class Letters:
    def decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))


@pytest.mark.parametrize(
    ("generated", "finish_reason", "text"),
    [
        ("abc$", "stop", "abc"),
        ("abc", "length", "abc"),
        ("abcEND", "length", "abcEND"),
        ("abcEND", "stop", "abc"),
        ("abEND, more, END.", "stop", "abEND, more, "),
        ("abcTHE END", "stop", "abc"),
        ("$", "stop", ""),
    ],
)
def test_text(generated: str, finish_reason: str, text: str) -> None:
    ids = list(map(ord, generated))
    assert text_of_response(ids, finish_reason, {STOP}, ("END", "THE END"), Letters()) == text
