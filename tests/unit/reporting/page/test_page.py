"""The page of a run: its numbers are the logged ones, its texts are escaped, and it is written whole or not at all."""

from __future__ import annotations

import html
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import pytest
from fake_run import Line, lines, make, row, write_lines, write_rollouts

from nemo_spin.cli.main import main
from nemo_spin.errors import UserError
from nemo_spin.reporting.page import write_report
from nemo_spin.reporting.page.drawing import to_json
from nemo_spin.reporting.page.samples import COLUMNS

EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)>{{ 7 * 7 }} & \"quoted\" 'text'"


def page_of(directory: Path) -> str:
    return write_report(directory).read_text(encoding="utf-8")


def figures_of(page: str) -> dict[str, dict[str, Any]]:
    found = re.findall(r'<script type="application/json" id="figure-(\w+)">(.*?)</script>', page, flags=re.DOTALL)
    return {key: json.loads(text) for key, text in found}


def points_of(page: str, metric: str) -> list[tuple[Any, float]]:
    """The points that stand for logged values of a metric, without gaps."""
    for figure in figures_of(page).values():
        for trace in figure["data"]:
            if trace.get("meta") == {"metric": metric}:
                return [(x, y) for x, y in zip(trace["x"], trace["y"], strict=True) if y is not None]
    return []


def without_scripts(page: str) -> str:
    """What the page shows, with the texts of its plots' descriptions."""
    return html.unescape(re.sub(r"<(script|style)\b.*?</\1>", "", page, flags=re.DOTALL))


def table_of(page: str, name: str) -> list[list[str]]:
    (text,) = re.findall(rf'<table id="{name}">(.*?)</table>', page, flags=re.DOTALL)
    rows = re.findall(r"<tr>(.*?)</tr>", text, flags=re.DOTALL)
    return [[html.unescape(cell) for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row)] for row in rows]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    return page_of(make(tmp_path_factory.mktemp("page") / "run"))


def logged(all_lines: list[Line], name: str, kind: str) -> list[tuple[int, float]]:
    return [(line["step"], line[name]) for line in all_lines if line["kind"] == kind and name in line]


def test_the_curves_are_what_was_logged(page: str) -> None:
    made = lines(steps=40)
    position = ("time", "step", "kind", "iteration", "epoch", "iteration_step", "consumed_samples")
    for name in [name for name in made[3] if name not in position and not name.startswith("time/")]:
        assert points_of(page, name) == logged(made, name, "train"), name
    for name in ("val_loss", "val/loss", "val/rewards/margins", "val/rewards/accuracies"):
        assert points_of(page, name) == logged(made, name, "validation"), name
    assert points_of(page, "rollout/length") == logged(made, "rollout/length", "rollout")


def test_the_bars_are_what_was_logged(page: str) -> None:
    made = lines(steps=40)
    for name in ("finish_reason_stop", "finish_reason_length", "empty", "repeated", "exact_match"):
        values = [value for _, value in logged(made, f"rollout/{name}", "rollout")]
        assert points_of(page, f"rollout/{name}") == [(f"iteration {i}", value) for i, value in enumerate(values)]
    spent = [value / 60 for _, value in logged(made, "time/rollout", "rollout")]
    assert [value for _, value in points_of(page, "time/rollout")] == pytest.approx(spent)


def test_the_table_is_what_was_logged_at_the_end_of_each_iteration(page: str) -> None:
    titles, before, *rows = table_of(page, "iterations-table")
    ends = [line for line in lines(steps=40) if line["kind"] == "iteration"]
    assert before[titles.index("val_loss")] == "1.6200"
    assert [row[:3] for row in rows] == [["0", "1 to 40", "0.1"], ["1", "41 to 80", "0.1"], ["2", "81 to 120", "0.5"]]
    for cells, end in zip(rows, ends, strict=True):
        values = dict(zip(titles, cells, strict=True))
        assert values["loss"] == f"{end['loss']:.4f}"
        assert values["margin"] == f"{end['rewards/margins']:+.3f}"
        assert values["val_loss"] == f"{end['val_loss']:.4f}"
        assert values["cut off"] == f"{end['rollout/finish_reason_length']:.1%}"


def test_every_figure_is_valid_and_told_in_words(page: str) -> None:
    figures = figures_of(page)
    assert len(figures) == 15
    for key, figure in figures.items():
        go.Figure(figure)  # raises for a name or a value that plotly does not know
        assert f'data-figure="figure-{key}"' in page
    assert re.search(r'aria-label="Loss over optimizer steps\. loss: 0\.6931 at step 1, ', page)
    assert [shape["x0"] for shape in figures["loss"]["layout"]["shapes"]][:3] == [0, 40, 80]
    assert figures["loss"]["layout"]["shapes"][3]["y0"] == math.log(2)


def test_the_head_says_what_was_run(page: str) -> None:
    shown = without_scripts(page)
    for text in (
        "finished after 120 steps",
        "/models/llama3_8b_sft.nemo",
        "16 processes: tensor 4 x pipeline 2 x data 2, sequence parallel, precision bf16",
        "checkpoints/megatron_gpt_spin.nemo",
        "None: no metric is beyond the limits",
        "global_batch_size: 64",
    ):
        assert text in shown


def test_responses_stand_side_by_side(page: str) -> None:
    articles = re.findall(r"<article.*?</article>", page, flags=re.DOTALL)
    assert [re.search(r"Example (\d+)", article)[1] for article in articles] == ["0", "2", "4", "7", "9"]
    heads = [re.sub("<.*?>", "", head) for head in re.findall(r"<h4>(.*?)</h4>", articles[1])]
    assert heads == [
        "Human 16 tokens",
        "Iteration 0 12 tokens",
        "Iteration 1 12 tokens",
        "Iteration 2 12 tokens, equal to the human one",
    ]
    assert row(2, 1)["rejected"] in html.unescape(articles[1])


def test_unknown_metrics_and_texts_are_listed(tmp_path: Path) -> None:
    def change(all_lines: list[Line]) -> None:
        for line in all_lines:
            if line["kind"] == "train":
                line["my/metric"] = 0.5 * line["step"]
        all_lines[0]["host"] = "node-7"

    page = page_of(make(tmp_path / "run", change=change))
    rows = {row[0]: row[1:] for row in table_of(page, "metrics-table")}
    assert rows["my/metric"] == ["120", "0.5", "60", "0.5", "60", "0", "no"]
    assert rows["loss"][-1] == "yes"
    assert "node-7" in without_scripts(page)


def test_values_that_are_no_numbers_are_gaps(tmp_path: Path) -> None:
    def change(all_lines: list[Line]) -> None:
        train = [line for line in all_lines if line["kind"] == "train"]
        train[5]["loss"], train[6]["loss"] = math.nan, math.inf

    page = page_of(make(tmp_path / "run", change=change))
    assert [step for step, _ in points_of(page, "loss")] == [step for step in range(1, 121) if step not in (6, 7)]
    assert "2 logged values are NaN or infinite, first loss at step 6" in without_scripts(page)


def test_undone_steps_are_not_in_the_page(tmp_path: Path) -> None:
    directory = make(tmp_path / "run")
    made = lines(steps=40)
    interrupted = [line for line in made if line["step"] <= 70]
    resumed = {"time": made[0]["time"], "step": 60, "iteration": 1, "kind": "resume"}
    again = [line | {"loss": 0.25} if "loss" in line else line for line in made if line["step"] > 60]
    write_lines(directory, [*interrupted, resumed, *again])
    page = page_of(directory)
    expected = [(step, loss if step <= 60 else 0.25) for step, loss in logged(made, "loss", "train")]
    assert points_of(page, "loss") == expected
    assert "once; 10 undone lines do not count" in without_scripts(page)


def test_texts_of_others_are_escaped(tmp_path: Path) -> None:
    def change(all_lines: list[Line]) -> None:
        for line in all_lines:
            line[EVIL] = 1.0
        all_lines[0]["note"] = EVIL

    directory = make(tmp_path / "run", change=change)
    for iteration in range(3):
        rows = [row(index, iteration, prompt=EVIL, chosen=EVIL * 20, rejected=EVIL) for index in range(3)]
        write_rollouts(directory, iteration, rows)
    config = (directory / "config.yaml").read_text().replace("/models/llama3_8b_sft.nemo", json.dumps(EVIL))
    (directory / "config.yaml").write_text(config)
    (directory / "checkpoints" / "latest").write_text(EVIL)
    page = page_of(directory)
    harmless = page_of(make(tmp_path / "harmless"))
    assert page.count("<script") == harmless.count("<script")
    assert "<img src=x" not in page and "<script>alert" not in page
    assert EVIL in without_scripts(page)


def test_no_text_in_a_figure_ends_its_script_element() -> None:
    text = to_json([{"name": EVIL}], {})
    assert "<" not in text and json.loads(text)["data"] == [{"name": EVIL}]


def test_long_texts_are_folded_and_long_beyond_reason_cut(tmp_path: Path) -> None:
    directory = make(tmp_path / "run", iterations=1)
    write_rollouts(directory, 0, [row(0, 0, rejected="long " * 10_000, chosen="", finish_reason="length")])
    (article,) = re.findall(r"<article.*?</article>", page_of(directory), flags=re.DOTALL)
    assert "all 50,000 characters" in article and len(article) < 25_000
    assert "(empty)" in article and "cut off</span>" in article


def test_a_long_run_stays_small_and_keeps_its_extremes(tmp_path: Path) -> None:
    def change(all_lines: list[Line]) -> None:
        all_lines[:] = [
            {"time": 1.0, "step": step, "iteration": 0, "kind": "train", "loss": 0.5 + (step % 97) / 1000}
            for step in range(1, 20_001)
        ]
        all_lines[12_344]["loss"] = 9.0
        all_lines[7_000]["loss"] = -3.0

    page = page_of(make(tmp_path / "run", iterations=1, change=change))
    points = points_of(page, "loss")
    assert len(points) <= 2000
    assert {(12_345, 9.0), (7_001, -3.0), (1, 0.501)} <= set(points) and points[-1][0] == 20_000
    assert "of 20,000 points" in page


def test_an_unfinished_run_gives_a_report_that_says_so(tmp_path: Path) -> None:
    directory = make(tmp_path / "run")
    text = (directory / "metrics.jsonl").read_text()
    (directory / "metrics.jsonl").write_text(text[: len(text) * 2 // 3])
    (directory / "checkpoints" / "megatron_gpt_spin.nemo").unlink()
    shown = without_scripts(page_of(directory))
    assert re.search(r"unfinished: at step \d+ of 120, in iteration [12] \(from 0\) of 3", shown)
    assert "The run is not finished" in shown and "no .nemo file yet" in shown


def test_a_run_that_has_just_begun_gives_a_report(tmp_path: Path) -> None:
    directory = make(tmp_path / "run", change=lambda all_lines: all_lines.__delitem__(slice(1, None)))
    (directory / "config.yaml").unlink()
    page = page_of(directory)
    assert figures_of(page) == {}
    assert "There is no config.yaml" in page and "There are no generated responses" in page


def test_responses_of_an_undone_iteration_are_not_shown(tmp_path: Path) -> None:
    directory = make(tmp_path / "run")
    with (directory / "metrics.jsonl").open("a") as file:
        file.write('{"time": 2e9, "step": 60, "iteration": 1, "kind": "resume"}\n')
    page = page_of(directory)
    assert "<h4>Iteration 1 " in page and "<h4>Iteration 2 " not in page


def test_rollouts_in_windows_are_found_by_their_index(tmp_path: Path) -> None:
    directory = make(tmp_path / "run", iterations=1)
    write_rollouts(directory, 0, [row(index, 0) for index in range(0, 600, 2)])
    write_rollouts(directory, 0, [row(index, 0) for index in range(1, 600, 2)], part=1)
    made = [*lines(1, 40)[:-1], {"time": 1.0, "step": 40, "iteration": 1, "kind": "rollout"}]
    write_lines(directory, made)
    write_rollouts(directory, 1, [row(index, 1, rejected=f"second {index}") for index in (599, 301, 302, 4)])
    page = page_of(directory)
    assert re.findall(r"Example (\d+)", page) == ["4", "302"]
    assert "second 302" in page and row(302, 0)["rejected"][:40] in page


def test_the_columns_are_those_that_training_writes() -> None:
    from nemo_spin.selfplay.rollouts.part import SCHEMA

    assert set(COLUMNS) <= set(SCHEMA.names) and set(row(0, 0)) == set(SCHEMA.names)


def bad(tmp_path: Path, what: str) -> tuple[Path, str]:
    """A run directory with something wrong, and what is to be said about it."""
    directory = make(tmp_path / "run", iterations=1)
    part = directory / "rollouts" / "iteration-000" / "part-00000.parquet"
    match what:
        case "missing":
            return tmp_path / "nowhere", "does not exist"
        case "a file":
            return directory / "config.yaml", "is not a directory"
        case "another directory":
            return tmp_path, "is not the directory of a run, it lacks metrics.jsonl, config.yaml, checkpoints"
        case "empty metrics":
            (directory / "metrics.jsonl").write_text("")
            return directory, "metrics.jsonl has no lines yet"
        case "malformed metrics":
            (directory / "metrics.jsonl").write_text('{"a": 1}\n')
            return directory, 'metrics.jsonl:1 needs "step"'
        case "no parquet":
            part.write_bytes(b"PAR1 no more")
            return directory, "part-00000.parquet cannot be read as Parquet"
        case "cut parquet":
            part.write_bytes(part.read_bytes()[:-20])
            return directory, "part-00000.parquet cannot be read as Parquet"
        case "other parquet":
            write_rollouts(directory, 0, [{"index": 1, "text": "a"}])
            return directory, "lacks the column prompt"
        case "malformed config":
            (directory / "config.yaml").write_text("a: [1\n")
            return directory, "config.yaml cannot be read"
    assert what == "a list as config"
    (directory / "config.yaml").write_text("- 1\n")
    return directory, "config.yaml is not a mapping"


@pytest.mark.parametrize(
    "what",
    [
        "missing",
        "a file",
        "another directory",
        "empty metrics",
        "malformed metrics",
        "no parquet",
        "cut parquet",
        "other parquet",
        "malformed config",
        "a list as config",
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(
    what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory, message = bad(tmp_path, what)
    assert main(["report", str(directory), "--output", str(tmp_path / "page.html")]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not list(tmp_path.glob("*page*"))


def test_the_command_prints_where_the_page_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = make(tmp_path / "run", iterations=1)
    assert main(["report", str(directory)]) == 0
    assert capsys.readouterr().out.strip() == str(directory / "report.html")
    assert main(["report", str(directory), "--output", str(tmp_path / "page.html")]) == 0
    assert (tmp_path / "page.html").read_bytes() == (directory / "report.html").read_bytes()


@pytest.mark.parametrize("output", ["no/such/directory.html", "directory"])
def test_an_output_that_cannot_be_written(output: str, tmp_path: Path) -> None:
    directory = make(tmp_path / "run", iterations=1)
    (tmp_path / "directory").mkdir()
    with pytest.raises(UserError, match="cannot be written"):
        write_report(directory, tmp_path / output)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["directory", "run"]


def test_a_page_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = make(tmp_path / "run", iterations=1)
    before = page_of(directory)

    def full(*arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(UserError, match="No space left on device"):
        write_report(directory)
    assert (directory / "report.html").read_text(encoding="utf-8") == before
    assert not list(directory.glob(".*"))


def test_the_report_is_light() -> None:
    program = (
        "import sys, nemo_spin.reporting.page; print({'torch', 'megatron', 'nemo', 'transformers'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout.strip() == "set()"
