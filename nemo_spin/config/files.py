"""Where the shipped configurations lie."""

from __future__ import annotations

from pathlib import Path


def config_dir() -> Path:
    """The directory with the shipped YAML files: `conf/` of the source tree, or its copy in an installed package."""
    package = Path(__file__).resolve().parents[1]
    in_source_tree = package.parent / "conf"
    return in_source_tree if (in_source_tree / "gpt_spin.yaml").is_file() else package / "conf"
