"""The configuration reference is what docs/make_configuration.py makes of the YAML and the code, and lacks nothing."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest

from nemo_spin.config import config_dir
from nemo_spin.config.aligner.translate import TRANSLATED
from nemo_spin.config.aligner.unread import UNREAD
from nemo_spin.config.keys import KEYS

DOCS = Path(__file__).resolve().parents[3] / "docs"


@pytest.fixture(scope="module")
def maker() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(DOCS)
        return importlib.import_module("make_configuration")


@pytest.fixture(scope="module")
def yaml_text() -> str:
    return (config_dir() / "gpt_spin.yaml").read_text(encoding="utf-8")


def test_the_page_is_up_to_date(maker: ModuleType, yaml_text: str) -> None:
    made = maker.page(maker.read(yaml_text))
    assert (DOCS / "configuration.md").read_text(encoding="utf-8") == made, "run docs/make_configuration.py"


def test_every_key_is_explained(maker: ModuleType, yaml_text: str) -> None:
    entries = {entry.path: entry for entry in maker.read(yaml_text)}
    for path, entry in entries.items():
        if not entry.is_section:
            explained = entries[maker._reference(entry) or path]
            assert explained.comments, f"{path} has no comment in conf/gpt_spin.yaml"
    for section, names in KEYS.items():
        for name in names:
            path = f"{section}.{name}".lstrip(".")
            assert path in entries or name in maker.WITHOUT_DEFAULT, f"{path} is on no page"


def test_what_is_accepted_for_nemo_aligners_sake_is_listed(maker: ModuleType, yaml_text: str) -> None:
    rows = maker.page(maker.read(yaml_text)).partition(maker.ALIGNER)[2].splitlines()
    for key, unread in UNREAD.items():
        (row,) = [row for row in rows if f"`{key}`" in row.partition(" | ")[0]]
        assert unread.agrees.words in row and unread.refused.words in row and unread.reason in row
    for key, target in TRANSLATED.items():
        (row,) = [row for row in rows if row.startswith(f"| `{key}`")]
        assert f"`{target}`" in row


def test_comments_are_read_as_people_read_them(maker: ModuleType) -> None:
    text = """# the head
a:  # beside the section
  # inside, before its keys
  b: "#1" # first line
          #   and second
  # before c
  c: ${a.b}
"""
    found = {entry.path: entry.comments for entry in maker.read(text)}
    assert found == {
        "a": ["beside the section", "inside, before its keys"],
        "a.b": ["first line and second"],
        "a.c": ["before c"],
    }
