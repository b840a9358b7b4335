"""What a run finds on this machine: packages with their versions, GPUs, and what the absence of each costs.

Nothing heavy is imported but torch: versions are read from what pip has recorded.
"""

from __future__ import annotations

import platform
import sys
from collections import Counter
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

_OURS = "nemo-spin"
_GIB = 2**30

# What everybody asks for first; other packages that are required are named only when something is wrong with them.
_SHOWN = {"torch": "torch", "megatron-core": "megatron-core", "nemo-toolkit": "NeMo", "transformers": "transformers"}
# name -> (what pip may call it, what is lost without)
_OPTIONAL = {
    "tensorboard": (
        ("tensorboard", "tensorboardX"),
        "exp_manager.create_tensorboard_logger, which is on by default, has to be false",
    ),
    "wandb": (("wandb",), "exp_manager.create_wandb_logger has to be false"),
    "mlflow": (("mlflow", "mlflow-skinny"), "exp_manager.create_mlflow_logger has to be false"),
    "tensorstore": (("tensorstore",), "checkpoints in the zarr layout of 2024 cannot be read"),
    "tiktoken": (("tiktoken",), "tiktoken tokenizers cannot be read"),
}


@dataclass(frozen=True, slots=True)
class Component:
    """Something that a run uses.

    state: "ok"; "absent"; "too old" or "too new" for the versions that are supported. version: None if absent.
    is_wrong: a run cannot do without it, or not with this version. says: what is there, or what its absence costs.
    """

    name: str
    state: str
    version: str | None
    is_wrong: bool
    says: str


def _absent(name: str, says: str, is_wrong: bool = False) -> Component:
    return Component(name, "absent", None, is_wrong, says)


def components() -> list[Component]:
    """All of them, in the order in which they are best read."""
    requirements = _requirements()
    python = _judged("Python", "python", requirements.pop("python", ""))
    shown = [_judged(name, distribution, requirements.get(distribution, "")) for distribution, name in _SHOWN.items()]
    others = [_judged(name, name, supported) for name, supported in requirements.items() if name not in _SHOWN]
    return [
        python,
        *shown,
        *_gpus(),
        _transformer_engine(),
        _apex(),
        *(found for found in others if found.state != "ok"),
        *(_optional(name, distributions, cost) for name, (distributions, cost) in _OPTIONAL.items()),
    ]


def state_of(version: str, supported: str) -> str:
    """ "ok", "too old" or "too new". Builds of NVIDIA's containers (2.6.0a0+nv25.01) count as what they become."""
    try:
        release = Version(Version(version).base_version)
    except InvalidVersion:
        return "ok"
    specifiers = SpecifierSet(supported)
    if specifiers.contains(release, prereleases=True):
        return "ok"
    lower = [one for one in specifiers if one.operator in (">=", ">", "==", "~=")]
    return "too old" if not all(one.contains(release, prereleases=True) for one in lower) else "too new"


def _judged(name: str, distribution: str, supported: str) -> Component:
    """Something that a run cannot do without."""
    version = platform.python_version() if name == "Python" else _version(distribution)
    if version is None:
        return _absent(name, f"no run without it: pip install '{distribution}{supported}'", is_wrong=True)
    state = state_of(version, supported)
    return Component(name, state, version, state == "too old", f"supported: {supported}" if supported else "")


def _requirements() -> dict[str, str]:
    """Python and the packages that this one needs here, with the versions that it takes. Empty if it was not installed
    by pip."""
    try:
        lines = metadata.requires(_OURS) or []
        python = SpecifierSet(metadata.metadata(_OURS)["Requires-Python"] or "")
    except metadata.PackageNotFoundError:
        return {}
    needed = [one for one in map(Requirement, lines) if one.marker is None or one.marker.evaluate({"extra": ""})]
    return {"python": _in_order(python)} | {canonicalize_name(one.name): _in_order(one.specifier) for one in needed}


def _in_order(specifiers: SpecifierSet) -> str:
    """ ">=2.6,<3", which packaging gives in any order."""
    return ",".join(sorted(map(str, specifiers), reverse=True))


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _gpus() -> list[Component]:
    try:
        import torch
    except (ImportError, OSError) as error:
        return [_absent("CUDA", f"torch cannot be imported: {' '.join(str(error).split())}", is_wrong=True)]
    if not torch.cuda.is_available():
        built = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is built for the CPU"
        return [
            _absent("CUDA", f"no GPU is found ({built}): runs take the CPU, which is for small models"),
            _absent("NCCL", "processes talk over gloo, as they do on CPUs"),
        ]
    found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    kinds = Counter(
        f"{one.name}, {one.total_memory / _GIB:.0f} GiB, compute capability {one.major}.{one.minor}" for one in found
    )
    says = "; ".join(f"{count} x {kind}" for kind, count in kinds.items())
    if not torch.cuda.is_bf16_supported(including_emulation=False):
        says += "; without bf16 in hardware: set trainer.precision=32"
    cuda = Component("CUDA", "ok", torch.version.cuda, False, says)
    if not torch.distributed.is_nccl_available():
        return [cuda, _absent("NCCL", "several GPUs need it: install a torch that has it", is_wrong=True)]
    return [cuda, Component("NCCL", "ok", ".".join(map(str, torch.cuda.nccl.version())), False, "")]


def _transformer_engine() -> Component:
    name = "TransformerEngine"
    spec = find_spec("transformer_engine")
    if spec is None:
        return _absent(name, "torch's attention and norms take its place: the same results, slower on GPUs")
    version = _version("transformer-engine") or "unknown version"
    folders = [Path(folder) for folder in (*(spec.submodule_search_locations or ()), *sys.path)]
    if not any(any(folder.glob("transformer_engine_torch*")) for folder in folders):
        says = "its part for PyTorch is missing, so it is not used: pip install --no-build-isolation "
        return Component(name, "absent", version, False, f"{says}'transformer-engine[pytorch]'")
    return Component(name, "ok", version, False, "used on GPUs")


def _apex() -> Component:
    """NVIDIA's Apex is built from source and brings the kernels amp_C; PyPI's apex is something else."""
    if find_spec("amp_C") is not None and find_spec("apex") is not None:
        return Component("Apex", "ok", _version("apex") or "unknown version", False, "")
    says = "Adam and gradient norms come from TransformerEngine, or else from torch: the same results, slower steps"
    if find_spec("apex") is not None:
        says = f"the package apex is not NVIDIA's (it lacks amp_C) and is not used; {says}"
    return _absent("Apex", says)


def _optional(name: str, distributions: tuple[str, ...], cost: str) -> Component:
    version = next(filter(None, map(_version, distributions)), None)
    if version is None:
        return _absent(name, f"{cost}: pip install {name}")
    return Component(name, "ok", version, False, "")
