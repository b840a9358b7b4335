"""What a killed export leaves beside its target, and what the next one makes of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemo_spin.model_io.export import _remove_leftovers


@pytest.mark.parametrize("new_is_there", [True, False])
def test_only_a_whole_result_stays(tmp_path: Path, new_is_there: bool) -> None:
    target = tmp_path / "model"
    other = tmp_path / ".unfinished-other.d"
    for directory in (tmp_path / ".unfinished-model.d", tmp_path / ".replaced-model", other):
        (directory / "deep").mkdir(parents=True)
        (directory / "weights").write_text(directory.name)
    (tmp_path / ".model.4711.partial").write_text("half of an archive")
    if new_is_there:
        target.mkdir()
        (target / "weights").write_text("new")
    _remove_leftovers(target)
    assert {path.name for path in tmp_path.iterdir()} == {"model", other.name}
    # Killed between its two steps, when the old one had been moved away and the new one was not there yet.
    assert (target / "weights").read_text() == ("new" if new_is_there else ".replaced-model")
