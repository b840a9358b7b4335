"""The report of runs that measured their distance from the data, ended by it, or have iterations of several lengths."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import pytest
from fake_run import CONFIG, Line, make
from test_page import figures_of, page_of, points_of, table_of, without_scripts

from nemo_spin.reporting.page.findings import find
from nemo_spin.reporting.page.run_directory import read_run

REASON = "At equilibrium before iteration 2: accuracy 0.540 (at most 0.55)."


def measured(iteration: int, step: int) -> Line:
    values = {"logps_gap": 0.5 / (iteration + 1), "logps_gap_error": 0.01, "token_overlap": 0.4, "exact_match": 0.1}
    if iteration:
        values["accuracy"] = 0.7 - 0.08 * iteration
    line = {"time": 1.76e9, "kind": "equilibrium", "step": step, "iteration": iteration}
    return line | {f"equilibrium/{name}": value for name, value in values.items()}


def ends_at_equilibrium(all_lines: list[Line]) -> None:
    """Two iterations of 40 steps, and an end before the third."""
    all_lines[:] = [line for line in all_lines if line["iteration"] < 2 and line["kind"] != "end"]
    all_lines[0]["total_steps"] = 120
    for iteration, step in ((0, 0), (1, 40), (2, 80)):
        at = next((i for i, line in enumerate(all_lines) if line["step"] > step), len(all_lines))
        all_lines.insert(at, measured(iteration, step))
    all_lines.append({"time": 2e9, "kind": "end", "step": 80, "iteration": 2, "reason": REASON})


def test_the_end_at_the_equilibrium_is_an_end_with_its_reason(tmp_path: Path) -> None:
    run = read_run(make(tmp_path / "run", change=ends_at_equilibrium))
    assert run.is_finished and run.state == "finished after 80 steps"
    assert find(run) == []
    shown = without_scripts(page_of(tmp_path / "run"))
    assert shown.count(REASON) >= 1 and "Ended" in shown


def test_a_run_that_goes_on_from_its_equilibrium_is_unfinished(tmp_path: Path) -> None:
    def goes_on(all_lines: list[Line]) -> None:
        ends_at_equilibrium(all_lines)
        all_lines.append({"time": 2e9, "kind": "resume", "step": 80, "iteration": 2, "total_steps": 120})

    run = read_run(make(tmp_path / "run", change=goes_on))
    assert not run.is_finished and run.end_reason is None
    assert run.state == "unfinished: at step 80 of 120, in iteration 2 (from 0) of 3"


def test_the_distance_from_the_data_is_drawn_and_in_the_table(tmp_path: Path) -> None:
    page = page_of(make(tmp_path / "run", change=ends_at_equilibrium))
    assert points_of(page, "equilibrium/logps_gap") == [(0, 0.5), (40, 0.25), (80, pytest.approx(0.5 / 3))]
    assert points_of(page, "equilibrium/accuracy") == [(40, pytest.approx(0.62)), (80, pytest.approx(0.54))]
    figures = figures_of(page)
    assert {"logps_gap", "equilibrium"} < set(figures)
    assert figures["logps_gap"]["data"][0]["error_y"]["array"] == [0.01] * 3
    for key in ("logps_gap", "equilibrium"):
        go.Figure(figures[key])
    titles, _, *rows = table_of(page, "iterations-table")
    assert [row[titles.index("gap before")] for row in rows] == ["+0.500", "+0.250", "+0.167"]
    assert [row[titles.index("overlap before")] for row in rows] == ["0.400"] * 3
    held_out = [row[titles.index("held-out accuracy")] for row in rows]
    assert held_out[-1] == "-" and all(0.5 < float(value) < 1 for value in held_out[:2])
    assert rows[-1][:2] == ["2", "-"]


def run_with(directory: Path, loop: str, steps: tuple[int, ...], total: int | None = None) -> Any:
    """A run of three iterations, under way: it has made these steps in each, but for the very last one."""

    def change(all_lines: list[Line]) -> None:
        lines: list[Line] = [{"time": 1.0, "kind": "start", "step": 0, "iteration": 0}]
        if total is not None:
            lines[0]["total_steps"] = total
        step = 0
        for iteration, number in enumerate(steps):
            for done in range(1, number + 1 - (iteration == len(steps) - 1)):
                step += 1
                position = {"iteration": iteration, "iteration_step": done}
                lines.append({"time": 1.0, "kind": "train", "step": step, "loss": 0.6, **position})
        all_lines[:] = lines

    make(directory, change=change)
    config = CONFIG.format(iterations=3, betas="0.1").replace("max_epochs: 2", loop)
    (directory / "config.yaml").write_text(config)
    return read_run(directory)


@pytest.mark.parametrize(("total", "of"), [(77, " of 77"), (None, "")])
def test_a_run_under_way_says_how_far_it_is(tmp_path: Path, total: int | None, of: str) -> None:
    run = run_with(tmp_path / "run", "max_epochs: 2", (10, 20), total)
    assert run.state == f"unfinished: at step 29{of}, in iteration 1 (from 0) of 3"


def test_epochs_of_each_iteration_are_shown(tmp_path: Path) -> None:
    run_with(tmp_path / "a", "max_epochs: [1, 2, 4]", (10, 20))
    assert "3 iterations, 1, 2, 4 epochs, 64 pairs" in without_scripts(page_of(tmp_path / "a"))
    run_with(tmp_path / "b", "max_epochs: [2, 2, 2]", (10, 20))
    assert "3 iterations, 2 epochs each, 64 pairs" in without_scripts(page_of(tmp_path / "b"))
