"""Training and decoding over tensor, pipeline and data parallelism and over model sizes, beside the cost model.

    python benchmarks/scaling.py [--quick] [--json FILE] [--plot FILE.svg]

On the CPU: processes of one thread that talk over gloo, at most one for each core unless --oversubscribe is given. With
GPUs: one process on each, bf16 and NCCL; that was written by reading and never ran. Everything that the model is told
of the machine is measured in the same run. A ratio of measured to predicted above 1 is time that it does not know of.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cost_model import Layout
from plot import Point, write_plot

HERE = Path(__file__).resolve().parent
SIZE = "8.6M"
SIZES = ("3M", "8.6M", "34M")
SIZE_ON_GPU = "1B"
SIDES = ("train", "decode")
BAR_OF_STAGES = 0.9

Found = dict[str, Any]


def layouts(most: int) -> Iterator[Layout]:
    """With 1, 2 and 4 processes, each kind of parallelism by itself and in pairs."""
    for tp, pp, dp in ((1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 2, 1), (2, 1, 2), (1, 2, 2)):
        if tp * pp * dp <= most:
            yield Layout(tp, pp, dp)


def run(size: str, layout: Layout, layer_seconds: list[float], scratch: Path) -> Found:
    """Measure one layout, in processes of its own. layer_seconds: of training and decoding, empty to find them out."""
    told, result = scratch / "told.json", scratch / "result.json"
    result.unlink(missing_ok=True)
    told.write_text(
        json.dumps(
            {"size": size, "tp": layout.tp, "pp": layout.pp, "layer_seconds": layer_seconds, "result": str(result)}
        )
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={layout.processes}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(HERE / "scaling_worker.py"), str(told)], env=environment, capture_output=True, text=True
    )
    if done.returncode or not result.is_file():
        raise SystemExit(f"{layout} of {size} failed:\n" + "\n".join(done.stderr.splitlines()[-15:]))
    return json.loads(result.read_text())


def seconds_of_a_layer(scratch: Path) -> list[float]:
    """What a layer costs before it computes anything, forward: of a model that is too small to compute anything.

    Of training and of decoding, with one process.
    """
    found = run("nothing", Layout(), [], scratch)
    layers, passes, micro_batches = 8, 3, 4
    return [found["train"] / (layers * passes * micro_batches), found["decode"] / layers]


def predicted(found: Found, side: str) -> float:
    return sum(found[f"predicted_{side}"].values())


def rows(everything: list[Found]) -> Iterator[list[str]]:
    yield ["model", "layout", "processes", *(f"{side}: {what}" for side in SIDES for what in _COLUMNS)]
    alone = {found["size"]: found for found in everything if found["tp"] * found["pp"] * found["dp"] == 1}
    for found in everything:
        layout = Layout(found["tp"], found["pp"], found["dp"])
        cells = [found["size"], str(layout), str(layout.processes)]
        for side in SIDES:
            base = alone[found["size"]]
            cells += [
                f"{1000 * found[side]:.1f}",
                f"{1000 * predicted(found, side):.1f}",
                f"{found[side] / predicted(found, side):.2f}",
                f"{base[side] / found[side]:.2f}",
                f"{predicted(base, side) / predicted(found, side):.2f}",
            ]
        yield cells


_COLUMNS = ("ms", "predicted", "ratio", "speed-up", "predicted")


def table(cells: list[list[str]]) -> str:
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in cells]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def points(everything: list[Found]) -> list[Point]:
    return [
        Point(
            side,
            f"{found['size']}, {Layout(found['tp'], found['pp'], found['dp'])}",
            predicted(found, side),
            found[side],
        )
        for found in everything
        for side in SIDES
    ]


def pipeline_decoding() -> list[str]:
    """Decoding in two stages beside decoding without stages on the same cores."""
    command = [sys.executable, str(HERE / "pipeline_decode.py"), "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    lines = []
    for found in map(json.loads, done.stdout.splitlines()):
        for other, ratio in (("one process makes", "to_one_process"), ("replicas make", "to_replicas")):
            verdict = "met" if found[ratio] >= BAR_OF_STAGES else "MISSED"
            lines.append(
                f"Decoding in {found['stages']} stages, {found['lengths']} lengths: {found[ratio]:.2f} of the tokens "
                f"per second that {other} on the same cores, >= {BAR_OF_STAGES} {verdict}"
            )
    return lines


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Training and decoding over layouts and sizes, beside the cost model.")
    add = parser.add_argument
    add("--quick", action="store_true", help="one size of model, at most two processes")
    add("--oversubscribe", action="store_true", help="layouts of four processes also where there are fewer cores")
    add("--json", type=Path, help="write the figures to this file too")
    add("--plot", type=Path, help="write measured over predicted times to this file, as SVG")
    return parser.parse_args()


def main() -> None:
    options = parse()
    import torch

    gpus = torch.cuda.device_count()
    most = gpus or (4 if options.oversubscribe else len(os.sched_getaffinity(0)))
    size, sizes = (SIZE_ON_GPU, (SIZE_ON_GPU,)) if gpus else (SIZE, SIZES)
    where = f"{gpus} GPUs, bf16, NCCL" if gpus else f"{most} processes at most, one thread each, fp32, gloo"
    print(f"torch {torch.__version__}, {where}; load average {os.getloadavg()[0]:.1f}\n", flush=True)
    everything = []
    with tempfile.TemporaryDirectory(prefix="scaling_") as directory:
        scratch = Path(directory)
        layer_seconds = seconds_of_a_layer(scratch)
        todo = [(size, layout) for layout in layouts(min(most, 2) if options.quick else most)]
        if not options.quick:
            todo += [(other, Layout()) for other in sizes if other != size]
        for model, layout in todo:
            everything.append(run(model, layout, layer_seconds, scratch))
            print(f"{model}, {layout}", file=sys.stderr, flush=True)
    print(table(list(rows(everything))))
    if options.json:
        options.json.write_text(json.dumps({"layer_seconds": layer_seconds, "found": everything}, indent=1) + "\n")
    if options.plot:
        write_plot(points(everything), options.plot)
    if most > 1 and not gpus and not options.quick:
        print("", *pipeline_decoding(), sep="\n")


if __name__ == "__main__":
    main()
