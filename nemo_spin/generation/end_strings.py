"""Texts that end a response: finding them while it is made, and leaving them out of its text."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from nemo_spin.data.tokenizer import TextTokenizer


def ends_with_any(end_strings: Sequence[str], tokenizer: TextTokenizer) -> Callable[[Sequence[int]], bool]:
    """A function that tells whether the text of generated ids has come to one of the strings.

    Called after every token, so that it needs to look at the last tokens only: each has at least one character, up to
    byte-level pieces, for which there is room.
    """
    reach = max(map(len, end_strings)) * 4

    def should_stop(ids: Sequence[int]) -> bool:
        text = tokenizer.decode(ids[-reach:])
        return any(end in text for end in end_strings)

    return should_stop


def text_of_response(
    ids: Sequence[int],
    finish_reason: str,
    stop_ids: Collection[int],
    end_strings: Sequence[str],
    tokenizer: TextTokenizer,
) -> str:
    """The text of a response, without the stop token or the end string that has ended it."""
    if finish_reason != "stop":
        return tokenizer.decode(ids)
    if ids[-1] in stop_ids:
        return tokenizer.decode(ids[:-1])
    text = tokenizer.decode(ids)
    # The last one, because those before the response's minimum length have ended nothing; of two, the longer.
    found = [(place + len(end), len(end)) for end in end_strings if (place := text.rfind(end)) >= 0]
    stop, length = max(found, default=(len(text), 0))
    return text[: stop - length]
