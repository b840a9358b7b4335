"""Opening a NeMo 1 checkpoint: a `.nemo` archive, or the directory that one was unpacked to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from nemo_spin.errors import CheckpointError
from nemo_spin.model_io.nemo1.archive import CONFIG, WEIGHTS, member_sizes, unpack
from nemo_spin.model_io.nemo1.config import NEMO1_PREFIX, architecture_from_nemo1
from nemo_spin.model_io.source import CheckpointSource, described, layout_in
from nemo_spin.model_io.stores.open import open_store
from nemo_spin.model_io.tokenizers.description import from_nemo1
from nemo_spin.model_io.untrusted import interpolation
from nemo_spin.model_io.untrusted.plain_data import read_mapping


def is_nemo1_directory(path: Path) -> bool:
    return (path / CONFIG).is_file()


def open_nemo1_directory(path: Path) -> CheckpointSource:
    """An unpacked `.nemo`. Raises CheckpointError."""
    _check_names({str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()}, path)
    return _source(path, path, None, None)


def open_nemo1_archive(path: Path, scratch: Path) -> CheckpointSource:
    """A `.nemo`, of which only descriptions are unpacked into `scratch`, and the weights when they are asked for.

    Raises CheckpointError.
    """
    sizes = member_sizes(path)
    if CONFIG not in sizes:
        raise CheckpointError(f"{path} is a tar archive, but no .nemo: it holds no {CONFIG}; or it is truncated.")
    _check_names(set(sizes), path)
    unpack(path, scratch, lambda name: name == CONFIG)
    wanted = _artifacts(_read_config(scratch / CONFIG, path))
    wanted |= {f"{WEIGHTS}/.metadata", f"{WEIGHTS}/metadata.json"}
    wanted |= {name for name in sizes if name.endswith("/.zarray")}
    unpack(path, scratch, lambda name: name in wanted or name.split("/")[0] in wanted)
    prefix = f"{WEIGHTS}/"

    def extract() -> Path:
        unpack(path, scratch, lambda name: name.startswith(prefix))
        return scratch / WEIGHTS

    weights = {name.removeprefix(prefix): size for name, size in sizes.items() if name.startswith(prefix)}
    return _source(path, scratch, weights, extract)


def _source(
    path: Path, files: Path, sizes: Mapping[str, int] | None, extract: Callable[[], Path] | None
) -> CheckpointSource:
    """sizes, extract: bytes of each file of the weights, and what unpacks them, where they are not yet."""
    config = _read_config(files / CONFIG, path)
    store = open_store(files / WEIGHTS, NEMO1_PREFIX, str(path), sizes)
    return CheckpointSource(
        path,
        "nemo1",
        store.layout,
        config,
        described(from_nemo1, config, str(path)),
        files,
        written_by=f"NeMo {config['nemo_version']}" if config.get("nemo_version") else None,
        trained_layout=layout_in(config),
        _store=store,
        _architecture=lambda vocab_size: architecture_from_nemo1(
            config, store.tensors, vocab_size, f"{path}: {CONFIG}"
        ),
        _unpack=extract,
        _store_in=lambda directory: open_store(directory, NEMO1_PREFIX, str(path)),
    )


def _check_names(names: set[str], path: Path) -> None:
    if any(name.startswith(f"{WEIGHTS}/") for name in names):
        return
    if any(name.endswith("model_weights.ckpt") for name in names):
        raise CheckpointError(
            f"{path} holds its weights in model_weights.ckpt, NeMo's layout of before megatron-core's distributed "
            "checkpoints: convert it with NeMo 1's convert_gpt_nemo_to_mcore.py script."
        )
    raise CheckpointError(f"{path} holds no {WEIGHTS}/ directory: it is no GPT of NeMo 1, or it is incomplete.")


def _read_config(file: Path, path: Path) -> dict[str, Any]:
    """The configuration as plain data; what it interpolates from elsewhere than the file stays as written."""
    return interpolation.resolve(read_mapping(file, f"{path}: {CONFIG}"))


def _artifacts(config: Mapping[str, Any]) -> set[str]:
    """Names of the archive's files that the tokenizer's configuration points at."""
    node = config.get("tokenizer")
    values = node.values() if isinstance(node, Mapping) else ()
    names = {value.removeprefix("nemo:") for value in values if isinstance(value, str)}
    return (names | {Path(name).name for name in names}) - {""}
