"""The end of the quick start for people: a table, what happened in plain words, and how to go on."""

from __future__ import annotations

import json
import os
import sys
from itertools import islice
from pathlib import Path
from typing import Any

from nemo_spin.data.jsonl import read_jsonl

_COLUMNS = [
    ("", "name", "{}"),
    ("sampled answers right", "accuracy", "{:.1%}"),
    ("likeliest answer right", "greedy_accuracy", "{:.1%}"),
    ("NLL (nats/token)", "nll", "{:.4f}"),
    ("response tokens", "length", "{:.2f}"),
    ("margin (nats)", "margin", "{:+.3f}"),
]
# Samples come in thousands: differences below this are noise.
_NOISE = 0.02


def show(directory: Path) -> None:
    """Print what compare.py found."""
    rows = json.loads((directory / "figures.json").read_text(encoding="utf-8"))
    records = [record for _, record in read_jsonl(directory / "held_out.jsonl")]
    human_length = sum(len(record["output"].split()) + 1 for record in records) / len(records)
    print(f"\nOn {len(records)} held-out numbers:\n")
    print(table(rows))
    print(
        f"Sampled at temperature 1; right answers have {human_length:.2f} tokens. margin: by how much more than its\n"
        "opponent, the policy before it, this one prefers right answers to the opponent's own.\n"
    )
    print(examples(rows, records))
    print("What happened: " + " ".join(verdict(rows)) + "\n")
    print(how_to_go_on(directory))


def table(rows: list[dict[str, Any]]) -> str:
    cells = [[title for title, _, _ in _COLUMNS]]
    cells += [["-" if row[key] is None else form.format(row[key]) for _, key, form in _COLUMNS] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for name, *values in cells:
        lines.append("  ".join([name.ljust(widths[0]), *(v.rjust(w) for v, w in zip(values, widths[1:], strict=True))]))
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]]) + "\n"


def examples(rows: list[dict[str, Any]], records: list[dict[str, str]]) -> str:
    """One sampled answer of the SFT model and of the last SPIN policy to each of the first held-out numbers."""
    before, after = rows[0], [row for row in rows if row["name"].startswith("SPIN")][-1]
    lines = []
    for record, first, last in islice(zip(records, before["examples"], after["examples"], strict=False), 3):
        number = record["input"].rjust(4)
        lines += [f"{number}   {before['name']}: {first}", f"{' ' * len(number)}   {after['name']}: {last}"]
    return "\n".join(lines) + "\n"


def verdict(rows: list[dict[str, Any]]) -> list[str]:
    """What the figures say, better or worse, in sentences."""
    before, spin, controls = rows[0], rows[1:-2], rows[-2:]
    last = spin[-1]
    best = max(spin, key=lambda row: row["accuracy"])
    numbers = f"{before['accuracy']:.0%} before, {last['accuracy']:.0%} after {len(spin)} iterations"
    sentences = []
    if abs(last["accuracy"] - before["accuracy"]) < _NOISE:
        sentences.append(f"SPIN made no difference to the accuracy of sampled answers ({numbers}).")
    else:
        better = last["accuracy"] > before["accuracy"]
        sentences.append(f"With SPIN, sampled answers were right {'more' if better else 'less'} often ({numbers}).")
    if best["accuracy"] > last["accuracy"] + _NOISE:
        sentences.append(f"It was best after {best['name'].removeprefix('SPIN, ')} and lost some of it later.")
    for control in controls:
        difference = control["accuracy"] - last["accuracy"]
        comparison = "about as good" if abs(difference) < _NOISE else "better" if difference > 0 else "worse"
        name = control["name"].replace(", ", " (") + ")"
        sentences.append(f"As many steps of {name} on the same answers were {comparison}: {control['accuracy']:.0%}.")
        if control["greedy_accuracy"] < before["greedy_accuracy"] - _NOISE:
            sentences.append(
                "With them the model forgot some of what it had known (likeliest answer right: "
                f"{control['greedy_accuracy']:.0%}, once {before['greedy_accuracy']:.0%})."
            )
    if max(control["accuracy"] for control in controls) > last["accuracy"] + _NOISE:
        sentences.append("Careful answers are plentiful here and never disagree with each other, which suits SFT.")
    return sentences


def how_to_go_on(directory: Path) -> str:
    spin = directory / "spin"
    (nemo,) = (spin / "checkpoints").glob("*.nemo")
    environment = os.path.relpath(sys.prefix)
    return f"""The result:      {nemo}
Its opponents' answers, beside the human ones:  {spin}/rollouts/*/*.parquet
Curves and more:  {spin}/report.html, or tensorboard --logdir {spin}

How to go on, after `source {environment}/bin/activate`:
  score answers  nemo-spin score --checkpoint {nemo} \\
                     --data {directory}/held_out.jsonl --output scores.jsonl --prompt-template "{{input}} = {{output}}"
  make more      nemo-spin generate --checkpoint {nemo} --prompts {directory}/held_out.jsonl \\
                     --output responses.jsonl --prompt-template "{{input}} = {{output}}" --max-new-tokens 16
  look at data   nemo-spin data {directory}/careful.jsonl --checkpoint {nemo} \\
                     --prompt-template "{{input}} = {{output}}"
  your own data  the `nemo-spin train` command above with your checkpoint and JSONL files; conf/gpt_spin.yaml explains
                 every key
  other layouts  make quickstart DEVICES=4 TP=2 PP=2"""
