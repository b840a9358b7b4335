"""The environment of the peers: TRL, and torch and transformers of the versions that this process runs with."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

TRL = "trl==1.16.0"


def requirements() -> list[str]:
    same = [f"{name}=={version(name)}" for name in ("torch", "transformers", "datasets")]
    return [*same, TRL, "accelerate"]


def interpreter(folder: Path, pip_arguments: Sequence[str]) -> Path:
    """Of the environment in `folder`, which is made unless it is there with the same requirements."""
    needed = "\n".join(requirements())
    stamp = folder / "installed.txt"
    python = folder / "bin" / "python"
    if stamp.is_file() and stamp.read_text() == needed and python.is_file():
        return python
    print(f"Installing {TRL} and what it needs into {folder}; this takes some minutes.", file=sys.stderr, flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *pip_arguments]
    # torch first: what comes after must not choose another build of it
    subprocess.run([*pip, requirements()[0]], check=True)
    subprocess.run([*pip, *requirements()], check=True)
    stamp.write_text(needed)
    return python


def variables(inherited: Mapping[str, str], threads: int, scratch: Path, steady_memory: bool) -> dict[str, str]:
    """Of the processes of both sides.

    steady_memory: freed tensors go back to the system at once, so that what is resident is what is used.
    """
    own = {
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HOME": str(scratch / "huggingface"),
        "HF_HUB_OFFLINE": "1",
        "TQDM_DISABLE": "1",
    }
    if steady_memory:
        own |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    return dict(inherited) | own
