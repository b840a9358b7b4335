"""Opening a NeMo 1 checkpoint: a `.nemo` archive, or the directory that one was unpacked to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from nemo_spin.errors import CheckpointError
from nemo_spin.model_io.nemo1 import archive as nemo_archive
from nemo_spin.model_io.nemo1 import config as nemo1
from nemo_spin.model_io.source import CheckpointSource, layout_in
from nemo_spin.model_io.stores.interface import WeightStore
from nemo_spin.model_io.stores.torch_dist import TorchDistStore
from nemo_spin.model_io.stores.zarr import ZarrStore, is_zarr
from nemo_spin.model_io.tokenizers import description as tokenizer_description
from nemo_spin.model_io.untrusted import interpolation
from nemo_spin.model_io.untrusted.plain_data import PlainDataError, read_yaml


def is_nemo1_directory(path: Path) -> bool:
    return (path / nemo_archive.CONFIG).is_file()


def open_directory(path: Path) -> CheckpointSource:
    """An unpacked `.nemo`. Raises CheckpointError."""
    _check_names({str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()}, path)
    return _source(path, path, None, None)


def open_archive(path: Path, scratch: Path) -> CheckpointSource:
    """A `.nemo`, of which only descriptions are unpacked into `scratch`, and the weights when they are asked for.

    Raises CheckpointError.
    """
    sizes = nemo_archive.member_sizes(path)
    if nemo_archive.CONFIG not in sizes:
        raise CheckpointError(
            f"{path} is a tar archive, but no .nemo: it holds no {nemo_archive.CONFIG}; or it is truncated."
        )
    _check_names(set(sizes), path)
    nemo_archive.unpack(path, scratch, lambda name: name == nemo_archive.CONFIG)
    wanted = _artifacts(_read_config(scratch / nemo_archive.CONFIG, path))
    wanted |= {f"{nemo_archive.WEIGHTS}/.metadata", f"{nemo_archive.WEIGHTS}/metadata.json"}
    wanted |= {name for name in sizes if name.endswith("/.zarray")}
    nemo_archive.unpack(path, scratch, lambda name: name in wanted or name.split("/")[0] in wanted)
    prefix = f"{nemo_archive.WEIGHTS}/"

    def extract() -> Path:
        nemo_archive.unpack(path, scratch, lambda name: name.startswith(prefix))
        return scratch / nemo_archive.WEIGHTS

    weights = {name.removeprefix(prefix): size for name, size in sizes.items() if name.startswith(prefix)}
    return _source(path, scratch, weights, extract)


def _source(
    path: Path, files: Path, sizes: Mapping[str, int] | None, unpack: Callable[[], Path] | None
) -> CheckpointSource:
    """sizes, unpack: bytes of each file of the weights, and what unpacks them, where they are not yet."""
    config = _read_config(files / nemo_archive.CONFIG, path)
    try:
        tokenizer = tokenizer_description.from_nemo1(config, str(path))
    except CheckpointError:
        tokenizer = None
    weights = files / nemo_archive.WEIGHTS
    layout = "zarr" if is_zarr(weights) else "torch_dist"
    store_type: Callable[..., WeightStore] = ZarrStore if layout == "zarr" else TorchDistStore
    store = store_type(weights, nemo1.KEY_PREFIX, str(path), sizes=sizes)
    return CheckpointSource(
        path,
        "nemo1",
        layout,
        config,
        tokenizer,
        files,
        written_by=f"NeMo {config['nemo_version']}" if config.get("nemo_version") else None,
        trained_layout=layout_in(config),
        _store=store,
        _architecture=lambda vocab_size: nemo1.architecture_from_nemo1(
            config, store.tensors, vocab_size, f"{path}: {nemo_archive.CONFIG}"
        ),
        _unpack=unpack,
        _store_in=lambda directory: store_type(directory, nemo1.KEY_PREFIX, str(path)),
    )


def _check_names(names: set[str], path: Path) -> None:
    if any(name.startswith(f"{nemo_archive.WEIGHTS}/") for name in names):
        return
    if any(name.endswith("model_weights.ckpt") for name in names):
        raise CheckpointError(
            f"{path} holds its weights in model_weights.ckpt, NeMo's layout of before megatron-core's distributed "
            "checkpoints: convert it with NeMo 1's convert_gpt_nemo_to_mcore.py script."
        )
    raise CheckpointError(
        f"{path} holds no {nemo_archive.WEIGHTS}/ directory: it is no GPT of NeMo 1, or it is incomplete."
    )


def _read_config(file: Path, path: Path) -> dict[str, Any]:
    """The configuration as plain data; what it interpolates from elsewhere than the file stays as written."""
    try:
        loaded = read_yaml(file)
    except (PlainDataError, OSError) as error:
        raise CheckpointError(f"{path}: {nemo_archive.CONFIG} cannot be read: {error}.") from None
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{path}: {nemo_archive.CONFIG} is no mapping.")
    return interpolation.resolve(loaded)


def _artifacts(config: Mapping[str, Any]) -> set[str]:
    """Names of the archive's files that the tokenizer's configuration points at."""
    node = config.get("tokenizer")
    values = node.values() if isinstance(node, Mapping) else ()
    names = {value.removeprefix("nemo:") for value in values if isinstance(value, str)}
    return (names | {Path(name).name for name in names}) - {""}
