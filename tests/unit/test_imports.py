"""Imports go only down (see FLOORS), also in functions and for type checkers alone."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "nemo_spin"
NEMO = {"nemo", "lightning", "pytorch_lightning"}
MEGATRON = {"megatron", "transformer_engine", "apex"}
PARALLELISM = {"torch.distributed", "megatron"}

# What lies directly in the package, from the ground up; a new folder has to be given its floor here. Folders
# on one floor do not know each other.
FLOORS: tuple[frozenset[str], ...] = tuple(
    frozenset(names.split())
    for names in (
        "errors __init__",
        "config runtime",
        "data megatron reporting",
        "generation model_io",
        "checkpoint selfplay",
        "trainer model",
        "commands",
        "cli",
        "__main__",
    )
)
# Who may load what: heavy libraries stay out of what is imported to show a usage or to check a configuration.
MAY_LOAD_MEGATRON = set("runtime megatron generation model_io checkpoint selfplay trainer model commands".split())
MAY_LOAD_NEMO = {"model_io", "model", "commands", "cli"}

FILES = sorted(PACKAGE.rglob("*.py"))


def floor_of(name: str) -> int:
    """Floor of a module or folder directly below nemo_spin."""
    floors = [floor for floor, names in enumerate(FLOORS) if name in names]
    assert len(floors) == 1, f"nemo_spin/{name} has no place in FLOORS"
    return floors[0]


def imports_of(path: Path) -> set[str]:
    """Dotted names that a file imports: `from a import b` counts as a.b."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide where they go"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def begins_with(name: str, prefixes: set[str]) -> bool:
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down(path: Path) -> None:
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    loads = imports_of(path)
    if own not in MAY_LOAD_MEGATRON:
        assert not [name for name in loads if begins_with(name, MEGATRON)], f"{own} must not know megatron-core"
    if own not in MAY_LOAD_NEMO:
        assert not [name for name in loads if begins_with(name, NEMO)], f"{own} must not know NeMo"
    for name in sorted(loads):
        other = name.split(".")[1] if name.startswith("nemo_spin.") else own
        if other != own and not other.startswith("__") and not is_attribute(other):
            assert floor_of(other) < floor_of(own), f"{own} (floor {floor_of(own)}) imports {name}"


def is_attribute(name: str) -> bool:
    """Whether `from nemo_spin import name` takes something that the package offers, not one of its modules."""
    return not (PACKAGE / name).is_dir() and not (PACKAGE / f"{name}.py").is_file()


def test_only_the_story_lies_flat() -> None:
    assert {path.stem for path in PACKAGE.glob("*.py")} == {"__init__", "__main__", "errors", "trainer", "model"}


def test_the_story_knows_no_ranks() -> None:
    trainer = PACKAGE / "trainer.py"
    assert not [name for name in imports_of(trainer) if begins_with(name, PARALLELISM)]
    words = {node.id for node in ast.walk(ast.parse(trainer.read_text())) if isinstance(node, ast.Name)}
    words |= {node.attr for node in ast.walk(ast.parse(trainer.read_text())) if isinstance(node, ast.Attribute)}
    assert not words & {"rank", "get_rank", "parallel_state", "world_size", "is_pipeline_last_stage"}


@pytest.mark.parametrize(
    "statement",
    [
        "import nemo_spin",
        "import nemo_spin.selfplay.losses, nemo_spin.megatron.sequences, nemo_spin.config, nemo_spin.data",
        "import nemo_spin.cli.main",
        "import nemo_spin.reporting.page",
    ],
)
def test_the_lower_floor_loads_neither_nemo_nor_megatron(statement: str) -> None:
    report = "import sys; print(sorted({name.split('.')[0] for name in sys.modules}))"
    output = subprocess.run(
        [sys.executable, "-c", f"{statement}; {report}"],
        cwd=PACKAGE.parent,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert not set(ast.literal_eval(output)) & (NEMO | MEGATRON)
