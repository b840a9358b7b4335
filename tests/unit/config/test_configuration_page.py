"""conf/gpt_spin.yaml and docs/configuration.md are what the declarations say, key by key, and lack nothing."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from omegaconf import OmegaConf

from nemo_spin.config import config_dir
from nemo_spin.config.aligner.table import TABLE
from nemo_spin.config.keys import DECLARED
from nemo_spin.config.parse import defaults

DOCS = Path(__file__).resolve().parents[3] / "docs"
YAML = config_dir() / "gpt_spin.yaml"


@pytest.fixture(scope="module")
def maker() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(DOCS)
        return importlib.import_module("make_configuration")


def values(node: Any, path: str = "") -> dict[str, Any]:
    """Full keys of settings with their values."""
    found = {}
    for name, value in node.items():
        key = f"{path}.{name}".lstrip(".")
        found |= values(value, key) if isinstance(value, dict) and key not in DECLARED else {key: value}
    return found


def test_the_page_and_the_yaml_are_up_to_date(maker: ModuleType) -> None:
    assert (DOCS / "configuration.md").read_text(encoding="utf-8") == maker.page(), "run docs/make_configuration.py"
    assert YAML.read_text(encoding="utf-8") == maker.yaml_text(), "run docs/make_configuration.py"


def test_the_yaml_has_the_declared_defaults() -> None:
    shipped = values(OmegaConf.to_container(OmegaConf.load(YAML), resolve=False))
    assert shipped == values(defaults())
    assert set(shipped) == set(DECLARED)


def test_every_key_is_explained(maker: ModuleType) -> None:
    text, page = YAML.read_text(encoding="utf-8"), maker.page()
    assert max(map(len, text.splitlines())) <= 120
    for key, part in DECLARED.items():
        section, _, name = key.rpartition(".")
        assert maker.doc_of(part), f"{key} is not explained"
        rows = page.partition(f"## `{section}`\n")[2].partition("\n## ")[0].splitlines()
        assert [row for row in rows if row.startswith(f"| `{name}` |")], f"{key} is not on the page"
    lines = [line for line in text.splitlines() if re.match(r" +[A-Za-z_]+: \S", line) and "${model" not in line]
    without = {line.strip() for line in lines if "#" not in line}
    assert without == {  # of loggers' options, which their mapping explains
        "project: nemo_spin", "name: megatron_gpt_spin", "experiment_name: nemo_spin", "tracking_uri: null",
    }  # fmt: skip


def test_what_is_accepted_for_nemo_aligners_sake_is_listed(maker: ModuleType) -> None:
    rows = maker.page().partition(maker.ALIGNER)[2].splitlines()
    for key, entry in TABLE.items():
        (row,) = [row for row in rows if f"`{key}`" in row.partition(" | ")[0]]
        if entry.target:
            assert f"`{entry.target}`" in row
        else:
            assert entry.agrees.words in row and entry.refused.words in row and entry.reason in row
