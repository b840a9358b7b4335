"""Opening a Hugging Face directory: `config.json`, safetensors and tokenizer files, or a model of the hub's cache."""

from __future__ import annotations

from pathlib import Path

from nemo_spin.model_io.huggingface.config import (
    ADAPTER_CONFIG,
    CONFIG,
    architecture_from_huggingface,
    read_huggingface_config,
)
from nemo_spin.model_io.huggingface.weights import HuggingFaceStore
from nemo_spin.model_io.source import CheckpointSource
from nemo_spin.model_io.tokenizers.description import from_huggingface


def is_huggingface_directory(path: Path) -> bool:
    """Whether it is a model, an adapter (which `open_huggingface_directory` refuses), or a model of the hub's cache."""
    return any((_snapshot(path) / name).is_file() for name in (CONFIG, ADAPTER_CONFIG))


def open_huggingface_directory(path: Path) -> CheckpointSource:
    """A Hugging Face directory. Raises CheckpointError, also for a model that is not supported."""
    root = _snapshot(path)
    config = read_huggingface_config(root, str(path))
    architecture = architecture_from_huggingface(config, f"{path}: {CONFIG}")
    version = config.get("transformers_version")
    return CheckpointSource(
        root,
        "huggingface",
        "safetensors",
        config,
        from_huggingface(root),
        root,
        chosen=None if root == path else f"{root.name} is used, the version that refs/main in {path} names.",
        written_by=f"transformers {version}" if version else None,
        _store=HuggingFaceStore(root, architecture, str(path)),
        _architecture=lambda vocab_size: architecture,
    )


def _snapshot(path: Path) -> Path:
    """Where the files are: in the hub's cache (models--OWNER--NAME) a level deeper, one directory for each version."""
    current = path / "refs" / "main"
    if not current.is_file():
        return path
    with open(current, "rb") as opened:
        version = opened.read(256).decode("ascii", "replace").strip()
    # It is the id of a commit, and no path to somewhere else.
    return path / "snapshots" / version if version.isalnum() else path
