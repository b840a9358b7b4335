"""Tables and plots of scaling, and projections: from figures that are given."""

import xml.etree.ElementTree as ElementTree
from dataclasses import asdict, replace

import plot
import project
import pytest
import scaling
from cost_model import Cost, Iteration, Layout


def found(tp: int, pp: int, train: float, predicted: float) -> scaling.Found:
    costs = {f"predicted_{side}": asdict(Cost(compute=predicted)) for side in scaling.SIDES}
    return {"size": "8.6M", "tp": tp, "pp": pp, "dp": 1, "train": train, "decode": train, **costs}


def test_speed_up_is_over_one_process():
    table = list(scaling.rows([found(1, 1, 0.2, 0.1), found(2, 1, 0.1, 0.08)]))
    assert table[2] == ["8.6M", "TP2", "2", *["100.0", "80.0", "1.25", "2.00", "1.25"] * 2]
    assert len({len(line) for line in scaling.table(table).splitlines()}) == 1


@pytest.mark.parametrize(("most", "count"), [(1, 1), (2, 4), (4, 7)])
def test_layouts_fit_the_processes(most, count):
    layouts = list(scaling.layouts(most))
    assert len(set(layouts)) == count
    assert max(layout.processes for layout in layouts) == most


def test_plot_is_svg_with_every_point(tmp_path):
    points = scaling.points([found(1, 1, 0.2, 0.1), found(2, 1, 0.1, 0.3)])
    plot.write_plot(points, tmp_path / "plot.svg")
    root = ElementTree.parse(tmp_path / "plot.svg").getroot()
    circles = root.findall("{*}circle")
    assert len(circles) == len(points) == 4
    # Slower than predicted lies above the line, where the left and the upper edge are as far away.
    slow, fast = circles[0], circles[2]
    assert float(slow.get("cx")) < float(fast.get("cx")) and float(slow.get("cy")) < float(fast.get("cy"))


def test_projections_fit_and_the_fastest_comes_first():
    work = Iteration(50_000, 64, 300, 300, 250, 128, 4600)
    for model in project.MODELS:
        found = project.projections(model, work, longest=1024)
        assert all(one.layout.processes == model.gpus and one.bytes <= project.MEMORY for one in found)
        hours = [one.cost.seconds for one in found]
        assert hours == sorted(hours) and found
        # No machine computes faster than this.
        tokens = 50_000 * 1150
        assert hours[0] > 6 * tokens * (model.shape.parameters / 1.1) / (model.gpus * project.FLOPS)
        assert "GiB" in project.table(found)
    # 70B does not fit into 64 GPUs as 64 replicas, whatever is computed again.
    assert Layout(dp=64) not in [one.layout for one in found]
    assert project.projections(replace(project.MODELS[1], gpus=1), work, longest=1024) == []
