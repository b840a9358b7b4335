"""The pages say what is so: commands are accepted, links lead somewhere, quoted errors are errors of the code."""

from __future__ import annotations

import ast
import re
import shlex
import string
from collections.abc import Callable
from pathlib import Path

import pytest

from nemo_spin.cli.main import COMMANDS, _parser

REPOSITORY = Path(__file__).resolve().parents[2]
PAGES = [REPOSITORY / "README.md", REPOSITORY / "SECURITY.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
# Directories of checkpoints and of runs.
FILES_OF_OTHERS = frozenset(
    "weights/ context/ rollouts/ checkpoints/ model_weights/ shards/ held_out/ tokenizer/".split()
)
VARIABLES = {"SLURM_NNODES": "2", "SLURM_NTASKS_PER_NODE": "8"}


def commands_of(page: Path) -> list[list[str]]:
    """Command lines of a page's bash blocks, from `nemo-spin` or the training script on, without "...".

    Those with options in brackets are a usage, no command, and are left out."""
    found = []
    for block in re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            start = re.search(r"(nemo-spin (?!\S*=)|examples/train_gpt_spin\.py)", line)
            if start is None or "[-" in line:
                continue
            text = string.Template(line[start.start() :]).safe_substitute(VARIABLES)
            words = [word for word in shlex.split(text, comments=True) if word != "..."]
            found.append(["train", *words[1:]] if words[0].endswith(".py") else words[1:])
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_of_the_documentation_are_accepted(page: Path, configured: Callable) -> None:
    for command in commands_of(page):
        if command[0] == "train":
            configured(command[1:])
        else:
            _parser().parse_args(command)


def test_commands_are_found() -> None:
    commands = [command for page in PAGES for command in commands_of(page)]
    assert {command[0] for command in commands} <= {module.__name__.rpartition(".")[2] for module in COMMANDS}
    assert sum(command[0] == "train" for command in commands) >= 5


def test_modules_and_folders_that_are_named_exist() -> None:
    """In docs/code.md, and in docstrings and comments of the package: `folder/module.py`, `folder/`."""
    roots = (REPOSITORY, REPOSITORY / "nemo_spin")
    for path in [REPOSITORY / "docs" / "code.md", *(REPOSITORY / "nemo_spin").rglob("*.py")]:
        for name in re.findall(r"`((?:[a-z_0-9]+/)+(?:[a-z_0-9]+\.py)?)`", path.read_text(encoding="utf-8")):
            if name not in FILES_OF_OTHERS and not any((root / name).exists() for root in (*roots, path.parent)):
                pytest.fail(f"{path}: {name} does not exist")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path) if path else page
        assert file.exists(), target
        if anchor and file.suffix == ".md":
            assert anchor in anchors_of(file), target


def anchors_of(page: Path) -> set[str]:
    """The anchors that GitHub gives to a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_quoted_errors_are_those_of_the_code() -> None:
    texts = [text for path in (REPOSITORY / "nemo_spin").rglob("*.py") for text in texts_of(path)]
    page = (REPOSITORY / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    quoted = [
        part for row in re.findall(r"^\| (`.*?) \| ", page, re.MULTILINE) for part in re.findall(r"`([^`]+)`", row)
    ]
    assert len(quoted) > 30
    assert [part for part in quoted if not any(part in text for text in texts)] == []


def texts_of(path: Path) -> list[str]:
    """The texts in a module; values in them are left out."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.JoinedStr):
            found.append("".join(part.value if isinstance(part, ast.Constant) else "\0" for part in node.values))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(node.value)
    return found
