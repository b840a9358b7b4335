"""Data files that are sound, damaged, hostile, or anything between, with what is known of their lines."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from hypothesis import strategies as st


@dataclass(frozen=True)
class Line:
    """text: without its line break. texts: prompt and response that a sound record must become; None for any other.
    is_bad: no example may come of it."""

    text: bytes
    texts: tuple[str, str] | None = None
    is_bad: bool = False

    @property
    def is_template(self) -> bool:
        return self.text.startswith(b'{"input"')


@dataclass(frozen=True)
class DataFile:
    """lines: of the file, of which `content` is the bytes. whole: whether nothing was done to the file as a whole."""

    name: str
    content: bytes
    lines: list[Line]
    whole: bool


_PLAIN = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=12)
_ANSWER = _PLAIN.filter(lambda text: text.strip())
_ODD_TEXT = st.sampled_from(
    ["", " ", "\ud800", "\udfff\ud800", "\0", "\x1b[2J", "﻿", "\u2028", "\u202e", "{input}", "</s>", "tool", "system"]
) | st.text(max_size=6)
_ODD_NUMBER = st.sampled_from(
    [0, -1, 2**31, 2**63, -(2**63), 10**400, 1.5, 1e308, float("nan"), float("inf"), -float("inf"), -0.0]
)
_LEAF = st.none() | st.booleans() | st.integers() | _ODD_NUMBER | _ODD_TEXT
ANY_VALUE = st.recursive(
    _LEAF,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(_ODD_TEXT | st.sampled_from(["role"]), inner, max_size=3)
    ),
    max_leaves=8,
)


def _template() -> st.SearchStrategy[tuple[dict[str, Any], tuple[str, str]]]:
    def make(prompt: str, answer: str) -> tuple[dict[str, Any], tuple[str, str]]:
        return {"input": prompt, "output": answer}, (prompt.strip(" "), " " + answer.strip(" "))

    return st.builds(make, _PLAIN.filter(lambda text: text.strip(" ")), _ANSWER)


def _messages(wrap: Callable[[list[dict[str, str]]], dict[str, Any]]) -> st.SearchStrategy[Any]:
    def make(system: str | None, prompt: str, answer: str) -> tuple[dict[str, Any], tuple[str, str]]:
        turns = [] if system is None else [{"role": "system", "content": system}]
        turns.append({"role": "user", "content": prompt})
        text = "".join(f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in turns)
        record = wrap([*turns, {"role": "assistant", "content": answer}])
        return record, (text + "<|im_start|>assistant\n", f"{answer}<|im_end|>")

    return st.builds(make, st.none() | _PLAIN, _PLAIN, _ANSWER)


def _conversations() -> st.SearchStrategy[tuple[dict[str, Any], tuple[str, str]]]:
    def make(prompt: str, answer: str) -> tuple[dict[str, Any], tuple[str, str]]:
        record = {
            "conversations": [{"from": "User", "value": prompt}, {"from": "Assistant", "value": answer}],
            "system": "s",
            "mask": "User",
            "type": None,
        }
        text = f"<extra_id_0>System\ns\n<extra_id_1>User\n{prompt}\n<extra_id_1>Assistant\n"
        return record, (text, f"{answer}\n<extra_id_1>")

    return st.builds(make, _PLAIN, _ANSWER)


def _ids() -> st.SearchStrategy[tuple[dict[str, Any], tuple[str, str]]]:
    def make(prompt: str, answer: str) -> tuple[dict[str, Any], tuple[str, str]]:
        ids = [[9 + byte for byte in text.encode()] for text in (prompt, answer)]
        return {"prompt_ids": ids[0], "response_ids": [*ids[1], 2]}, (prompt, answer + "</s>")

    return st.builds(make, _ANSWER, _PLAIN)


RECORDS = st.one_of(
    _template(),
    _messages(lambda turns: {"messages": turns}),
    _messages(lambda turns: {"real": turns, "generated": [*turns[:-1], {"role": "assistant", "content": "bad"}]}),
    _conversations(),
    _ids(),
)


@st.composite
def changed(draw: st.DrawFn, value: Any) -> Any:
    """The value with one place of it replaced, removed, or doubled."""
    if isinstance(value, dict) and value and draw(st.integers(0, 4)):
        key = draw(st.sampled_from(sorted(value)))
        match draw(st.integers(0, 4)):
            case 0:
                return {name: part for name, part in value.items() if name != key}
            case 1:
                more = st.sampled_from(["name", "name", "label", "id", "tools"]) | _ODD_TEXT
                return value | {draw(more): draw(_ODD_TEXT | ANY_VALUE)}
            case _:
                return value | {key: draw(changed(value[key]))}
    if isinstance(value, list) and value and draw(st.integers(0, 4)):
        at = draw(st.integers(0, len(value) - 1))
        match draw(st.integers(0, 4)):
            case 0:
                return value[:at] + value[at + 1 :]
            case 1:
                return [*value[: at + 1], *value[at:]]
            case _:
                return [*value[:at], draw(changed(value[at])), *value[at + 1 :]]
    return draw(ANY_VALUE)


def _encoded(record: Any, ascii_only: bool) -> bytes:
    return json.dumps(record, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")


_sound = st.builds(lambda pair, ascii_only: Line(_encoded(pair[0], ascii_only), pair[1]), RECORDS, st.booleans())
_odd = st.builds(
    lambda record, ascii_only: Line(_encoded(record, ascii_only)),
    RECORDS.flatmap(lambda pair: changed(pair[0])),
    st.booleans(),
)
_BAD = [
    b"[" * 100_000,
    b'{"input":' * 100_000,
    b'{"input": "x", "output": ' + b"[" * 900 + b"]" * 900 + b"}",
    b'{"id": ' + b"9" * 5000 + b', "input": "x", "output": "y"}',
    b'{"input": "x", "input": "z", "output": "y"}',
    b'{"messages": [{"role": "user", "role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]}',
    b'{"input": NaN, "output": Infinity}',
    b'{"input": "\\ud800", "output": "\\udc00\\ud800"}',
    '{"input": "é", "output": "ü"}'.encode("latin-1"),
    '{"input": "é", "output": "ü"}'.encode("utf-16"),
    b'{"input": "x\0", "output": "y"}',
    b'{"input": "x", "output": "y"} {"input": "x", "output": "y"}',
    b"null", b"true", b"-", b'"', b"{", b"}", b"{}", b"[]", b"0", b"//", b"\xff\xfe", b"\x80", b"\\",
]  # fmt: skip
_ODD = [
    b'{"input": "x", "output": "y", "more": ' + b"[" * 980 + b"]" * 980 + b"}",
    b'{"id": ' + b"9" * 4000 + b', "input": "x", "output": "y"}',
    b'{"input": "x", "output": "y"}\x0b\x0c',
    b"\xef\xbb\xbf",
]
_bad = st.sampled_from([Line(text, is_bad=True) for text in _BAD])
_hostile = _bad | st.builds(Line, st.sampled_from(_ODD) | st.binary(max_size=20).map(lambda b: b.replace(b"\n", b"")))
_blank = st.sampled_from([Line(b""), Line(b" \t"), Line(b"\r")])


@st.composite
def _damaged(draw: st.DrawFn, line: Line) -> Line:
    """A byte of the line changed, or its end lost."""
    text = bytearray(line.text)
    if not text:
        return Line(b"")
    at = draw(st.integers(0, len(text) - 1))
    if draw(st.booleans()):
        del text[at:]
    else:
        text[at] = draw(st.integers(0, 255).filter(lambda byte: byte != 0x0A))
    return Line(bytes(text))


_line = st.one_of(_sound, _sound, _odd, _odd, _hostile, _sound.flatmap(_damaged), _blank)


# So that a bad line that is read stands out among the counts.
_ONE_BAD = st.builds(
    lambda before, bad, after: [*before, bad, *after], st.lists(_sound, max_size=2), _bad, st.lists(_sound, max_size=2)
)


def zstd(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


_MAGIC = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd", b"PK\x03\x04", b"ARROW1", b"\x93NUMPY", b"PAR1")
COMPRESSIONS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd}


@st.composite
def data_files(draw: st.DrawFn) -> DataFile:
    lines = draw(st.lists(_line, max_size=8) | _ONE_BAD)
    content = b"".join(line.text + draw(st.sampled_from([b"\n", b"\r\n"])) for line in lines)
    if draw(st.booleans()):
        content = content.removesuffix(b"\n")
    if draw(st.integers(0, 5)) == 0:
        content = b"\xef\xbb\xbf" + content
    suffix = draw(st.sampled_from(["", "", "", "", ".gz", ".bz2", ".xz", ".zst", ".parquet"]))
    name = f"data.jsonl{suffix}"
    if suffix in COMPRESSIONS:
        return DataFile(name, COMPRESSIONS[suffix](content), lines, True)
    match draw(st.integers(0, 12)):
        case 0:
            text = content.decode("utf-8", "replace")
            return DataFile(name, text.encode(draw(st.sampled_from(["utf-16", "utf-32", "utf-8-sig"]))), lines, False)
        case 1:
            return DataFile(name, content.replace(b"\n", draw(st.sampled_from([b"\r", b"\0", b""]))), lines, False)
        case 2:
            return DataFile(name, draw(st.binary(max_size=60)), [], False)
        case _:
            # bytes that Hypothesis took from the reader's own source would make it another kind of file
            is_text = suffix == "" and not content.startswith(_MAGIC)
            return DataFile(name, content, lines, is_text)
