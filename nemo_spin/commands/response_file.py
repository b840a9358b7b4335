"""The output of `nemo-spin generate`: one line for each response, written as it is made, gone on with after an end.

Beside OUT.jsonl lies OUT.jsonl.settings.json, which says how the responses were made. A file of its own, because every
line of OUT.jsonl is a response, whatever reads it; and because an interrupted run that went on with another temperature
would mix two distributions, which nobody could tell from the lines.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_spin.data.prompts import Prompt
from nemo_spin.errors import UserError
from nemo_spin.runtime.files import written_whole

ResponseKey = tuple[str | int | float, int]  # (id, sample)
_REMEDY = "give the options of the first run to go on with it, another --output, or --overwrite to begin anew"


@dataclass(frozen=True, slots=True)
class Found:
    """What an output file holds. done: (id, sample) of its lines. size: bytes of its whole lines."""

    done: frozenset[ResponseKey] = frozenset()
    size: int = 0


def check_output(output: str | Path, prompts: str | Path) -> None:
    """Raise UserError if `output` is no place for a new file or to go on writing."""
    path = Path(output)
    if path.exists() and Path(prompts).exists() and path.samefile(prompts):
        raise UserError(f"--output {output} is the file of the prompts: choose another one.")
    place = path if path.exists() else path.absolute().parent
    is_usable = place.is_file() if path.exists() else place.is_dir()
    if not is_usable or not os.access(place, os.W_OK):
        raise UserError(f"--output {output} cannot be written: name a file in a directory that exists.")


def find_responses(
    output: str | Path, settings: Mapping[str, Any], prompts: Sequence[Prompt], num_samples: int
) -> Found:
    """The responses that an earlier run with the same settings has left. Nothing is changed.

    settings: name -> JSON value of what the responses depend on; `checkpoint` is not compared, for checkpoints move.
    Prompts may have been added at the end, and num_samples raised.

    Raises UserError if the file holds anything else.
    """
    path = Path(output)
    if not path.exists() or not path.stat().st_size:
        return Found()
    before = _read_settings(path)
    _compare(path, before, settings, prompts)
    ids = {prompt.id for prompt in prompts}
    done: set[ResponseKey] = set()
    size = 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                break
            key = _key_of(line, f"{path}:{number}")
            if key[0] not in ids or key[1] >= num_samples:
                raise UserError(
                    f"{path}:{number}: the response to id {key[0]!r}, sample {key[1]}, is not asked for now "
                    f"(--num-samples {num_samples}): {_REMEDY}."
                )
            if key in done:
                raise UserError(f"{path}:{number}: id {key[0]!r}, sample {key[1]}, is there twice: remove one line.")
            done.add(key)
            size += len(line)
    return Found(frozenset(done), size)


class ResponseWriter:
    """Appends lines to an output file, each of them whole or not at all."""

    def __init__(self, path: Path, size: int) -> None:
        """size: bytes of the file that stay."""
        # Unbuffered: a line is in the file when `append` returns, whatever happens to this process then.
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115
        # Until `close`; a job that was queued again may begin before its predecessor has ended.
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise UserError(f"{path} is being written by another run: wait for it, or end it.") from None
        except OSError:
            pass  # a file system without locks
        self._file.truncate(size)
        self._size = size

    def append(self, response: Mapping[str, Any]) -> None:
        rest = memoryview(json.dumps(response, ensure_ascii=False).encode() + b"\n")
        size = self._size + len(rest)
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except BaseException:
            self._file.truncate(self._size)
            raise
        self._size = size

    def close(self) -> None:
        self._file.close()


@contextmanager
def writing(
    output: str | Path, found: Found, settings: Mapping[str, Any], prompts: Sequence[Prompt]
) -> Iterator[ResponseWriter]:
    """What goes on after the responses that were found; all else that the file holds is removed.

    Raises UserError if the file cannot be written.
    """
    path = Path(output)
    try:
        with closing(ResponseWriter(path, found.size)) as writer:
            _write_settings(path, settings, prompts)
            yield writer
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror}): make room, and run the same command again to go on."
        ) from None


def settings_path(output: str | Path) -> Path:
    return Path(f"{output}.settings.json")


def _write_settings(path: Path, settings: Mapping[str, Any], prompts: Sequence[Prompt]) -> None:
    values = {**settings, "prompts": {"count": len(prompts), "sha256": _digest(prompts)}}
    with written_whole(settings_path(path)) as file:
        file.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(settings_path(path).read_text(encoding="utf-8"))
        count, digest = values["prompts"]["count"], values["prompts"]["sha256"]
        if isinstance(count, int) and isinstance(digest, str):
            return values
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise UserError(
        f"{path} exists, and {settings_path(path).name}, which would say how it was made, is not beside it or damaged: "
        "choose another --output, or --overwrite to replace the file."
    )


def _compare(path: Path, before: Mapping[str, Any], now: Mapping[str, Any], prompts: Sequence[Prompt]) -> None:
    for name in now.keys() - {"checkpoint"}:
        # As JSON has it, a tuple is a list.
        if before.get(name) != json.loads(json.dumps(now[name])):
            what = (
                f"another checkpoint, {before.get('checkpoint')}"
                if name == "checkpoint_fingerprint"
                else f"{name.replace('_', ' ')} {before.get(name)}, and not {now[name]}"
            )
            raise UserError(f"{path} was begun with {what}: {_REMEDY}.")
    count = before["prompts"]["count"]
    if count > len(prompts) or _digest(prompts[:count]) != before["prompts"]["sha256"]:
        raise UserError(
            f"{path} was begun with other prompts ({count} of them), or they are read in another way now; prompts may "
            f"only be added after them: {_REMEDY}."
        )


def _key_of(line: bytes, where: str) -> ResponseKey:
    try:
        response = json.loads(line)
        key = response["id"], response["sample"]
        if isinstance(key[0], str | int | float) and type(key[1]) is int:
            return key
    except (ValueError, KeyError, TypeError):
        pass
    raise UserError(f"{where}: this is no line that nemo-spin generate has written: remove it, or use --overwrite.")


def _digest(prompts: Sequence[Prompt]) -> str:
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(f"{json.dumps(prompt.id)} {len(prompt.ids)} ".encode())
        digest.update(prompt.ids.tobytes())
    return digest.hexdigest()
