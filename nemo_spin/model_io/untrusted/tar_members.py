"""What is in a tar archive that a stranger made, read strictly.

NeMo writes files and directories, and nothing else has a place in a `.nemo`. Python's tarfile reads far more, differs
between its releases in what it lets through, and reads extended headers of any size into memory; here whatever is not
a plain file or directory inside the archive is refused before a byte of it is written.

The format: POSIX.1-2017, pax, "ustar Interchange Format"; GNU tar manual, "Basic Tar Format".
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

# zarr has a file for each chunk: a 405B model in eight parts has about 20,000.
MOST_MEMBERS = 200_000
# Names of weights have about 100 bytes. File systems take 255 of each part.
LONGEST_NAME = 1024
LONGEST_PART = 255
MOST_PARTS = 16
# Of a pax or long-name header: it holds a name, a size and times. It is read into memory.
LONGEST_HEADER = 8 * 1024

_BLOCK = 512
_REGULAR, _OLD_REGULAR, _DIRECTORY, _LONG_NAME, _PAX, _PAX_GLOBAL = b"0", b"\0", b"5", b"L", b"x", b"g"
_KINDS = {
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a device node",
    b"4": "a device node",
    b"6": "a named pipe",
    b"K": "a link",
    b"S": "a sparse file",
}


class UnsafeMemberError(ValueError):
    """Something that NeMo does not put into an archive."""


class TruncatedArchiveError(ValueError):
    """No tar archive, or not all of one."""


@dataclass(frozen=True, slots=True)
class Member:
    """name: parts joined by "/", none of them "." or "..". size: bytes of a file. offset: of its content."""

    name: str
    size: int
    offset: int
    is_file: bool


def starts_archive(block: bytes) -> bool:
    """Whether 512 bytes are the header of a tar archive."""
    return len(block) == _BLOCK and block[257:262] == b"ustar" and _has_right_checksum(block)


def read_members(stream: BinaryIO, most_bytes: int) -> list[Member]:
    """Every member of an archive, in its order; the contents are passed over.

    most_bytes: of all files together. Raises UnsafeMemberError for what has no place in a `.nemo` and for more than the
    limits above; TruncatedArchiveError if the archive does not reach its end.
    """
    members: list[Member] = []
    total = 0
    for member in _scan(stream):
        total += member.size
        if len(members) == MOST_MEMBERS:
            raise UnsafeMemberError(f"it has more than {MOST_MEMBERS} members")
        if total > most_bytes:
            raise UnsafeMemberError(f"its files claim more than {most_bytes} bytes, far more than it has itself")
        members.append(member)
    _check_distinct(members)
    return members


def _scan(stream: BinaryIO) -> Iterator[Member]:
    offset, name, size, headers = 0, None, None, 0
    while True:
        stream.seek(offset)
        block = _exactly(stream, _BLOCK)
        if not any(block):
            return
        if not starts_archive(block):
            raise TruncatedArchiveError("a header is damaged")
        kind, content = block[156:157], offset + _BLOCK
        stored = _number(block[124:136])
        if kind in (_LONG_NAME, _PAX, _PAX_GLOBAL):
            headers += 1
            if stored > LONGEST_HEADER or headers > 2 * MOST_MEMBERS:
                raise UnsafeMemberError(f"a header of it is larger than {LONGEST_HEADER} bytes, or there are too many")
            header = _exactly(stream, stored)
            if kind == _LONG_NAME:
                name = header.partition(b"\0")[0]
            elif kind == _PAX:
                records = _pax_records(header)
                name = records.get(b"path", name)
                size = _decimal(records[b"size"]) if b"size" in records else size
            elif _pax_records(header).keys() & {b"path", b"size"}:
                raise UnsafeMemberError("a header gives all members one name or size")
            offset = content + _padded(stored)
            continue
        length = stored if size is None else size
        member = _member(block, kind, name, length, content)
        yield member
        offset, name, size = content + _padded(length), None, None


def _member(block: bytes, kind: bytes, long_name: bytes | None, size: int, content: int) -> Member:
    raw = _text(block[0:100])
    if prefix := _text(block[345:500]):
        raw = prefix + b"/" + raw
    raw = raw if long_name is None else long_name
    is_directory = kind == _DIRECTORY or (kind == _OLD_REGULAR and raw.endswith(b"/"))
    name = _checked_name(raw, is_directory)
    if not is_directory and kind not in (_REGULAR, _OLD_REGULAR):
        raise UnsafeMemberError(f"{name} is {_KINDS.get(kind, 'of an unknown kind')}, not a file")
    if is_directory and size:
        raise UnsafeMemberError(f"{name} is a directory with content")
    return Member(name, size, content, not is_directory)


def _checked_name(raw: bytes, is_directory: bool) -> str:
    shown = repr(raw[:200])[1:]
    try:
        name = raw.decode("utf-8")
    except UnicodeDecodeError:
        raise UnsafeMemberError(f"the name {shown} is no text") from None
    if not name.isprintable():
        raise UnsafeMemberError(f"the name {shown} holds control characters")
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if name.startswith("/") or ".." in parts:
        raise UnsafeMemberError(f"{name[:200]} lies outside the archive")
    if len(raw) > LONGEST_NAME or any(len(part.encode()) > LONGEST_PART for part in parts):
        raise UnsafeMemberError(f"a name is longer than {LONGEST_NAME} bytes, or a part of it than {LONGEST_PART}")
    if len(parts) > MOST_PARTS:
        raise UnsafeMemberError(f"{name[:200]} lies more than {MOST_PARTS} directories deep")
    if not is_directory and (not parts or name.endswith("/")):
        raise UnsafeMemberError(f"the name {shown} is that of a directory, but it is a file")
    return "/".join(parts)


def _check_distinct(members: list[Member]) -> None:
    """Of two files with one name, readers differ in which of them counts."""
    files: set[str] = set()
    directories: set[str] = set()
    for member in members:
        parents = member.name.split("/")[: None if not member.is_file else -1]
        for depth in range(1, len(parents) + 1):
            directories.add("/".join(parents[:depth]))
        if member.is_file:
            if member.name in files:
                raise UnsafeMemberError(f"two members are named {member.name}")
            files.add(member.name)
    if both := files & directories:
        raise UnsafeMemberError(f"{min(both)} is a file and a directory")


def _pax_records(header: bytes) -> dict[bytes, bytes]:
    """Records "LENGTH KEY=VALUE\\n", of which LENGTH counts all."""
    records: dict[bytes, bytes] = {}
    while header:
        found = re.match(rb"([1-9]\d{0,5}) ([^=\n]+)=", header)
        length = int(found[1]) if found else 0
        if not found or length <= found.end() or header[length - 1 : length] != b"\n":
            raise UnsafeMemberError("a pax header is malformed")
        key = found[2]
        if key.startswith(b"GNU.sparse.") or key == b"hdrcharset":
            raise UnsafeMemberError(f"a pax header has {key.decode('ascii', 'replace')}")
        records[key] = header[found.end() : length - 1]
        header = header[length:]
    return records


def _exactly(stream: BinaryIO, length: int) -> bytes:
    found = stream.read(length)
    if len(found) != length:
        raise TruncatedArchiveError("it ends too early")
    return found


def _has_right_checksum(block: bytes) -> bool:
    stored = _text(block[148:156]).strip(b" ")
    return bool(re.fullmatch(rb"[0-7]{1,7}", stored)) and int(stored, 8) == sum(block) - sum(block[148:156]) + 8 * 32


def _number(field: bytes) -> int:
    """Octal digits, or, for what these cannot express, GNU's base 256."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = _text(field).strip(b" ")
    if not re.fullmatch(rb"[0-7]*", digits):
        raise UnsafeMemberError("a size is no number")
    return int(digits or b"0", 8)


def _decimal(value: bytes) -> int:
    if not re.fullmatch(rb"\d{1,19}", value):
        raise UnsafeMemberError("a size is no number")
    return int(value)


def _text(field: bytes) -> bytes:
    return field.partition(b"\0")[0]


def _padded(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK
