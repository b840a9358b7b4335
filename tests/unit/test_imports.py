"""Imports go only down (see FLOORS): what a floor must not know, its files do not import, not even in a function."""

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

# Files and directories of the package, by floor; a new one has to be given its place here.
FLOORS: tuple[frozenset[str], ...] = tuple(
    frozenset(names.split())
    for names in (
        "__init__.py errors.py faults.py where.py guards.py losses.py pairs.py packing.py micro_batches.py progress.py "
        "mixture.py plan.py identity.py timing.py equilibrium.py response_file.py config data",
        "megatron generation checkpoint reference.py rollouts.py rollout_files rollout_store.py memory.py "
        "stopping.py watchdog.py",
        "model.py trainer.py iteration_pairs.py iteration_rollouts.py validation.py equilibrium_check.py safeguards.py "
        "non_finite_report.py tokenizers archive.py export.py reporting.py metrics_log.py",
        "run.py best_iteration.py experiment.py score.py generate.py data_view.py inspection.py convert.py doctor.py "
        "environment.py launch.py processes.py run_lock.py cli.py commands quiet.py report",
    )
)
FORBIDDEN = (NEMO | MEGATRON, NEMO, set(), set())

FILES = sorted(PACKAGE.rglob("*.py"))
MODULES = {path.stem for path in PACKAGE.iterdir()} - {"__pycache__"}


def floor_of(name: str) -> int:
    """Floor of a file or a subpackage directly below nemo_spin."""
    floors = [floor for floor, names in enumerate(FLOORS) if {name, f"{name}.py"} & names]
    assert len(floors) == 1, f"{name} has no place in FLOORS"
    return floors[0]


def imports_of(path: Path, at_run_time_only: bool = False) -> set[str]:
    """Dotted names that a file imports: `from a import b` counts as a.b."""
    found: set[str] = set()
    for node in ast.walk(_without_type_checking(ast.parse(path.read_text()), at_run_time_only)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide where they go"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def _without_type_checking(tree: ast.Module, remove: bool) -> ast.Module:
    if remove:
        tree.body = [
            node for node in tree.body if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test))
        ]
    return tree


def begins_with(name: str, prefixes: set[str]) -> bool:
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down(path: Path) -> None:
    floor = floor_of(path.relative_to(PACKAGE).parts[0])
    for name in imports_of(path):
        assert not begins_with(name, FORBIDDEN[floor]), f"floor {floor} must not know {name}"
    for name in imports_of(path, at_run_time_only=True):
        if name.startswith("nemo_spin."):
            other = name.split(".")[1]
            if other in MODULES:  # and not an attribute of the package, such as __version__
                assert floor_of(other) <= floor, f"floor {floor} imports {name} from above"


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
