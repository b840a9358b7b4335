"""An output that was left unfinished is gone on with, and nothing else is taken for one."""

from __future__ import annotations

import json
from array import array
from pathlib import Path
from typing import Any

import pytest

from nemo_spin.commands.response_file import Found, check_output, find_responses, settings_path, writing
from nemo_spin.data.prompts import Prompt
from nemo_spin.errors import UserError

PROMPTS = [Prompt(0, "a", array("i", [5, 6])), Prompt(1, "b", array("i", [7])), Prompt(2, 3, array("i", [8]))]
SETTINGS = {"checkpoint": "sft.nemo", "checkpoint_fingerprint": "0", "seed": 1, "end_strings": ("x",)}
LINES = [{"id": "a", "sample": 0, "text": "é\u2028"}, {"id": "a", "sample": 1}, {"id": 3, "sample": 0}]


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """Three of six responses, written in two runs."""
    path = tmp_path / "out.jsonl"
    for some in (LINES[:1], LINES[1:]):
        with writing(path, find(path), SETTINGS, PROMPTS) as file:
            for line in some:
                file.append(line)
    return path


def find(path: Path, settings: dict[str, Any] = SETTINGS, prompts: list[Prompt] = PROMPTS, samples: int = 2) -> Found:
    return find_responses(path, settings, prompts, samples)


def test_whole_lines_are_found(output: Path) -> None:
    assert [json.loads(line) for line in output.read_bytes().splitlines()] == LINES
    assert find(output) == Found(frozenset({("a", 0), ("a", 1), (3, 0)}), output.stat().st_size)


def test_an_unfinished_last_line_is_cut_off(output: Path) -> None:
    whole = output.read_bytes()
    for cut in range(1, len(whole) + 1):
        output.write_bytes(whole[:cut])
        found = find(output)
        assert len(found.done) == whole[:cut].count(b"\n")
        assert output.read_bytes() == whole[:cut]
    output.write_bytes(whole[:-3])
    with writing(output, find(output), SETTINGS, PROMPTS) as file:
        file.append(LINES[2])
    assert output.read_bytes() == whole


def test_what_may_change_between_runs(output: Path) -> None:
    more = [*PROMPTS, Prompt(3, "new", array("i", [9]))]
    assert len(find(output, {**SETTINGS, "checkpoint": "moved.nemo"}, more, samples=5).done) == 3
    with writing(output, find(output, prompts=more), SETTINGS, more) as file:
        file.append({"id": "new", "sample": 0})
    assert len(find(output, prompts=more).done) == 4
    with pytest.raises(UserError, match=r"other prompts \(4 of them\)"):
        find(output, prompts=[*PROMPTS, Prompt(3, "new", array("i", [10]))])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"settings": {**SETTINGS, "seed": 2}}, "was begun with seed 1, and not 2"),
        ({"settings": {**SETTINGS, "end_strings": ()}}, "was begun with end strings ['x'], and not ()"),
        ({"settings": {**SETTINGS, "new": 2}}, "was begun with new None, and not 2"),
        ({"settings": {**SETTINGS, "checkpoint_fingerprint": "1"}}, "was begun with another checkpoint, sft.nemo"),
        ({"prompts": PROMPTS[:2]}, "was begun with other prompts (3 of them)"),
        ({"prompts": [PROMPTS[1], PROMPTS[0], PROMPTS[2]]}, "was begun with other prompts"),
        ({"prompts": [*PROMPTS[:2], Prompt(2, 3, array("i", [9]))]}, "was begun with other prompts"),
        ({"prompts": [*PROMPTS[:2], Prompt(2, "3", array("i", [8]))]}, "was begun with other prompts"),
        ({"samples": 1}, "out.jsonl:2: the response to id 'a', sample 1, is not asked for"),
    ],
)
def test_another_request_is_refused(output: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as raised:
        find(output, **changes)
    assert words in str(raised.value)
    assert "--overwrite" in str(raised.value)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"{}\n", "no line that nemo-spin generate has written"),
        (b"\xff\n", "no line that nemo-spin generate has written"),
        (b'{"id": [1], "sample": 0}\n', "no line that nemo-spin generate has written"),
        (b'{"id": "none", "sample": 0}\n', "is not asked for"),
        (b'{"id": "a", "sample": 1}\n', "is there twice"),
    ],
)
def test_a_foreign_line_is_named(output: Path, line: bytes, words: str) -> None:
    with open(output, "ab") as file:
        file.write(line)
    with pytest.raises(UserError) as raised:
        find(output)
    assert f"{output}:4: " in str(raised.value)
    assert words in str(raised.value)


@pytest.mark.parametrize("settings", [None, "{", "[]", '{"prompts": {}}'])
def test_a_file_of_unknown_origin_is_not_touched(output: Path, settings: str | None) -> None:
    settings_path(output).unlink()
    if settings is not None:
        settings_path(output).write_text(settings)
    with pytest.raises(UserError, match="--overwrite"):
        find(output)
    output.write_bytes(b"")
    assert find(output) == Found()


def test_no_part_of_a_line_stays_when_it_cannot_be_written(output: Path) -> None:
    whole = output.read_bytes()

    class FullDisk:
        def __init__(self, file: Any) -> None:
            self.file, self.truncate, self.close = file, file.truncate, file.close
            self.written = False

        def write(self, data: memoryview) -> int:
            if self.written:
                raise OSError(28, "No space left on device")
            self.written = True
            return self.file.write(data[:5])

    def write_to_full_disk() -> None:
        with writing(output, find(output), SETTINGS, PROMPTS) as file:
            file._file = FullDisk(file._file)
            file.append({"id": "b", "sample": 0})

    with pytest.raises(UserError, match="No space left"):
        write_to_full_disk()
    assert output.read_bytes() == whole


def test_two_runs_do_not_write_at_once(output: Path) -> None:
    whole = output.read_bytes()

    def write_too() -> None:
        with writing(output, Found(), SETTINGS, PROMPTS):
            pass

    with writing(output, find(output), SETTINGS, PROMPTS), pytest.raises(UserError, match="by another run"):
        write_too()
    assert output.read_bytes() == whole


def test_begun_anew_nothing_of_the_old_file_stays(output: Path) -> None:
    with writing(output, Found(), {**SETTINGS, "seed": 2}, PROMPTS):
        pass
    assert output.read_bytes() == b""
    assert json.loads(settings_path(output).read_text())["seed"] == 2
    assert len(list(output.parent.iterdir())) == 2


def test_where_nothing_can_be_written(output: Path, tmp_path: Path) -> None:
    check_output(output, tmp_path / "prompts.jsonl")
    check_output(tmp_path / "new.jsonl", tmp_path / "prompts.jsonl")
    for bad in (tmp_path, tmp_path / "none" / "out.jsonl", "/dev/null"):
        with pytest.raises(UserError, match="cannot be written"):
            check_output(bad, tmp_path / "prompts.jsonl")
    with pytest.raises(UserError, match="is the file of the prompts"):
        check_output(output, output)
