"""The launch scripts are well formed, ask for what can be run, and do what they say when a job ends."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

REPOSITORY = Path(__file__).resolve().parents[2]
SBATCH = REPOSITORY / "examples" / "slurm" / "spin.sbatch"
MANIFEST = REPOSITORY / "examples" / "kubernetes" / "pytorchjob.yaml"

# ------------------------------------------------------------------------------------------ Slurm

SRUN = """#!/bin/bash
printf '%s\\0' "$@" > "$HERE/arguments"
echo $$ > "$HERE/started"
exec bash -c "$RUN"
"""
SCONTROL = """#!/bin/bash
echo "$@" >> "$HERE/scontrol"
"""


@pytest.fixture
def cluster(tmp_path: Path) -> dict[str, str]:
    """An environment in which srun and scontrol are stand-ins that note their arguments."""
    (tmp_path / "bin").mkdir()
    for name, text in {"srun": SRUN, "scontrol": SCONTROL}.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "results" / "spin" / "checkpoints").mkdir(parents=True)
    return os.environ | {
        "HERE": str(tmp_path),
        "PATH": f"{tmp_path}/bin{os.pathsep}{os.environ['PATH']}",
        "RESULTS": str(tmp_path / "results"),
        "SLURM_JOB_ID": "7",
        "SLURM_NNODES": "2",
        "SLURM_NTASKS_PER_NODE": "8",
    }


def submit(cluster: dict[str, str], run: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(SBATCH)], env=cluster | {"RUN": run} | environment, capture_output=True, text=True, timeout=60
    )


def queued_again(cluster: dict[str, str]) -> bool:
    notes = Path(cluster["HERE"]) / "scontrol"
    return notes.is_file() and notes.read_text() == "requeue 7\n"


def test_the_job_asks_slurm_for_what_it_starts(cluster: dict[str, str], configured: Callable) -> None:
    submit(cluster, "true")
    arguments = (Path(cluster["HERE"]) / "arguments").read_text().split("\0")[:-1]
    command = arguments[arguments.index("nemo-spin") :]
    assert command[:2] == ["nemo-spin", "train"]
    spin = configured(command[2:])
    options = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?", SBATCH.read_text(), re.MULTILINE))
    assert options["ntasks-per-node"] == options["gpus-per-node"] == str(spin.parallel.devices)
    hours, minutes, seconds = map(int, options["time"].split(":"))
    assert spin.loop.max_seconds < 3600 * hours + 60 * minutes + seconds
    assert "requeue" in options
    mounted = "".join(argument for argument in arguments if argument.startswith("--container-mounts="))
    assert f"{cluster['RESULTS']}:{cluster['RESULTS']}" in mounted and "/data:/data" in mounted
    assert any(argument.startswith("--container-image=") for argument in arguments)


def test_a_job_that_is_not_finished_is_queued_again(cluster: dict[str, str]) -> None:
    assert submit(cluster, "true").returncode == 0
    assert queued_again(cluster)


def test_a_finished_job_is_not(cluster: dict[str, str]) -> None:
    nemo = Path(cluster["RESULTS"]) / "spin" / "checkpoints" / "spin.nemo"
    done = submit(cluster, f"touch {shlex.quote(str(nemo))}")
    assert (done.returncode, queued_again(cluster)) == (0, False)
    assert f"finished: {nemo}" in done.stdout
    (Path(cluster["HERE"]) / "started").unlink()
    assert submit(cluster, "false").returncode == 0, "nothing is started once the run has finished"
    assert not (Path(cluster["HERE"]) / "started").exists()


def test_a_job_that_failed_is_not(cluster: dict[str, str]) -> None:
    failed = submit(cluster, "exit 2")
    assert (failed.returncode, queued_again(cluster)) == (2, False)
    stopped = submit(cluster, "true", SLURM_RESTART_COUNT="20")
    assert (stopped.returncode, queued_again(cluster)) == (1, False)


@pytest.mark.parametrize(
    ("run", "saves"),
    [
        ("trap 'touch $HERE/saved; exit 0' USR1; touch $HERE/ready; sleep 60 & wait", True),
        ("trap '' USR1; touch $HERE/ready; sleep 60 & wait", False),
    ],
    ids=["that saves in time", "that does not"],
)
def test_a_job_near_its_limit_is_told_and_queued_again(cluster: dict[str, str], run: str, saves: bool) -> None:
    environment = cluster | {"RUN": run, "GRACE": "60" if saves else "1"}
    job = subprocess.Popen(["bash", str(SBATCH)], env=environment, stdout=subprocess.PIPE)
    started = Path(cluster["HERE"]) / "started"
    while not ((Path(cluster["HERE"]) / "ready").is_file() and started.read_text()):
        assert job.poll() is None
        time.sleep(0.01)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(timeout=30) == 0
    assert queued_again(cluster)
    assert (Path(cluster["HERE"]) / "saved").exists() == saves
    if not saves:
        os.kill(int(started.read_text()), signal.SIGKILL)  # as Slurm does with what is left of a job
    job.stdout.close()


# ------------------------------------------------------------------------------------------ Kubernetes


def test_the_pytorchjob_fits_together(configured: Callable) -> None:
    job = yaml.safe_load(MANIFEST.read_text())
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    replicas = job["spec"]["pytorchReplicaSpecs"]
    assert replicas["Master"]["replicas"] == 1, "the operator refuses more"
    pods = sum(spec["replicas"] for spec in replicas.values())
    for spec in replicas.values():
        (container,) = spec["template"]["spec"]["containers"]
        assert container["name"] == "pytorch"
        assert container["command"] == ["torchrun", "--no-python", "nemo-spin", "train"]
        parallel = configured(container["args"]).parallel
        assert (parallel.num_nodes, str(parallel.devices)) == (pods, job["spec"]["nprocPerNode"])
        assert container["resources"]["limits"]["nvidia.com/gpu"] == parallel.devices
        _check_volumes(spec["template"]["spec"], container)


def _check_volumes(pod: dict[str, Any], container: dict[str, Any]) -> None:
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert set(mounts) == set(volumes)
    assert mounts["shm"] == "/dev/shm" and volumes["shm"]["emptyDir"]["medium"] == "Memory"
    for argument in container["args"]:
        path = argument.partition("=")[2]
        assert not path.startswith("/") or path.startswith(mounts["shared"] + "/")
