"""Memory and speed of a data set of a thousand examples, and of a million: they take the same memory.

    python benchmarks/data_memory.py [NUMBER_OF_EXAMPLES ...]

For each number a data file is written, and a fresh process loads it (tokenizing it), a second one loads it again from
the cache; both read every example once, in shuffled order. The tokenizer gives a token for every word, so that what is
measured is this package.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

WORDS_PER_EXAMPLE = 40


class WordTokenizer:
    """One token per word, whose text is a number."""

    vocab_size, eos_id, bos_id, pad_id, space_sensitive, fingerprint = 1000, 0, None, 0, True, "words"

    def encode(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]


def write_data(path: Path, number: int) -> None:
    rng = random.Random(0)
    with open(path, "w") as file:
        for _ in range(number):
            words = [str(rng.randrange(1, 1000)) for _ in range(WORDS_PER_EXAMPLE)]
            half = WORDS_PER_EXAMPLE // 2
            file.write(json.dumps({"input": " ".join(words[:half]), "output": " ".join(words[half:])}) + "\n")


def memory() -> dict[str, float]:
    """Resident memory of this process in MiB: its own, and pages of files, which the system may take back."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(status[name].split()[0]) / 1024 for name in ("RssAnon", "RssFile", "VmHWM")}


def measure(data: str, cache: str) -> dict[str, Any]:
    """Load and iterate in this process; MiB and seconds."""
    from nemo_spin.config import DatasetConfig
    from nemo_spin.data.dataset import load_dataset
    from nemo_spin.data.order import batches, epoch_order

    before = memory()
    started = time.perf_counter()
    dataset = load_dataset(DatasetConfig((data,), cache_dir=cache), WordTokenizer(), 100)
    loaded, seconds_to_load = memory(), time.perf_counter() - started
    started = time.perf_counter()
    order = epoch_order(len(dataset), seed=1, iteration=0, epoch=0, shuffle=True)
    tokens = sum(len(example.prompt_ids) for batch in batches(dataset, order, 64) for example in batch)
    assert tokens == len(dataset) * WORDS_PER_EXAMPLE // 2
    after = memory()
    return {
        "load s": seconds_to_load,
        "iterate s": time.perf_counter() - started,
        "own MiB, loaded": loaded["RssAnon"] - before["RssAnon"],
        "own MiB, iterated": after["RssAnon"] - before["RssAnon"],
        "file MiB, iterated": after["RssFile"] - before["RssFile"],
        "peak MiB": after["VmHWM"],
    }


def in_fresh_process(data: Path, cache: Path) -> dict[str, Any]:
    command = [sys.executable, __file__, "--measure", str(data), str(cache)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    if sys.argv[1:2] == ["--measure"]:
        print(json.dumps(measure(*sys.argv[2:])))
        return
    numbers = [int(number) for number in sys.argv[1:]] or [1_000, 1_000_000]
    header_shown = False
    for number in numbers:
        with tempfile.TemporaryDirectory() as directory:
            data, cache = Path(directory) / "data.jsonl", Path(directory) / "cache"
            write_data(data, number)
            for how in ("tokenized", "from the cache"):
                figures = in_fresh_process(data, cache)
                if not header_shown:
                    print(f"{'examples':>10} {'':<14}" + "".join(f"{name:>20}" for name in figures))
                    header_shown = True
                cells = "".join(f"{value:>20,.1f}" for value in figures.values())
                print(f"{number:>10,} {how:<14}{cells}", flush=True)


if __name__ == "__main__":
    main()
