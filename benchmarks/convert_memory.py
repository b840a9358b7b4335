"""Memory of `nemo-spin convert`: far less than the model, whichever families it goes between.

    python benchmarks/convert_memory.py [--layers 24] [--hidden-size 2048] [--directory DIR]

A Llama with random bf16 weights is written as a NeMo 2 directory; then each step of a round through all families runs
in a process of its own. Printed are the most memory that a process had for itself while it converted, beyond what it
had when it began (pages of files, which the system may take back at any time, are not counted), and the time.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
from cost_model import Shape
from llama import llama
from torch import Tensor

from nemo_spin.megatron.architecture import Architecture
from nemo_spin.model_io.contradictions import expected_tensors
from nemo_spin.model_io.stores.interface import Region, StoredTensor

ROUND = (("nemo2", "hf"), ("hf", "megatron"), ("megatron", "nemo"), ("nemo", "nemo2"))


class RandomStore:
    """Weights that are made when they are read, the same each time."""

    def __init__(self, architecture: Architecture) -> None:
        self.tensors = {
            name: StoredTensor(shape, torch.bfloat16) for name, shape in expected_tensors(architecture).items()
        }

    def read(self, name: str, region: Region | None = None) -> Tensor:
        shape = self.tensors[name].shape
        # A row's values do not depend on which rows are asked for with it.
        rows = torch.arange(shape[0], dtype=torch.float32)[region[0] if region else slice(None)]
        columns = torch.arange(shape[-1] if len(shape) > 1 else 1, dtype=torch.float32)
        found = torch.sin(rows[:, None] * 12.9898 + columns[None] * 78.233 + len(name)).to(torch.bfloat16)
        return found if len(shape) > 1 else found[:, 0]


def of_size(layers: int, hidden_size: int) -> Architecture:
    heads, groups = hidden_size // 64, hidden_size // 256
    return llama(Shape(layers, hidden_size, heads, groups, 64, 4 * hidden_size, vocab=32000), 4096)


def own_memory() -> int:
    """Bytes that this process has for itself."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["RssAnon"].split()[0]) * 1024


def measure(source: str, target: str, file_format: str) -> dict[str, float]:
    from nemo_spin.commands.convert import convert

    peak = before = own_memory()
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.005):
            peak = max(peak, own_memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.perf_counter()
    convert(source, target, file_format, with_tokenizer=False)
    seconds = time.perf_counter() - started
    done.set()
    watcher.join()
    return {"gib": (peak - before) / 2**30, "seconds": seconds}


def main() -> None:
    from nemo_spin.model_io.export import Content, StoredWeights, export

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--hidden-size", type=int, default=2048)
    parser.add_argument("--directory", help="where the checkpoints are written (default: a temporary directory)")
    args = parser.parse_args()
    architecture = of_size(args.layers, args.hidden_size)
    store = RandomStore(architecture)
    size = sum(tensor.numel * tensor.dtype.itemsize for tensor in store.tensors.values()) / 2**30
    print(f"a model of {size:.2f} GiB")
    with tempfile.TemporaryDirectory(dir=args.directory) as directory:
        current = Path(directory) / "nemo2"
        export(Content(architecture, StoredWeights(store), None), current, "nemo2")
        for start, end in ROUND:
            target = Path(directory) / f"to-{end}{'.nemo' if end == 'nemo' else ''}"
            command = [sys.executable, __file__, "--convert", str(current), str(target), end]
            output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            found = json.loads(output.splitlines()[-1])
            print(
                f"{start:>8} -> {end:<8} {found['gib']:6.2f} GiB ({found['gib'] / size:4.0%} of the model) "
                f"{found['seconds']:6.1f} s",
                flush=True,
            )
            shutil.rmtree(current) if current.is_dir() else current.unlink()
            current = target


if __name__ == "__main__":
    if sys.argv[1:2] == ["--convert"]:
        print(json.dumps(measure(*sys.argv[2:5])))
    else:
        main()
