"""What transformers gets to see of a tokenizer's directory: a copy of the tokenizer's own files, and no more.

The directory may come from a stranger. `tokenizer_config.json` can name code to import (`auto_map`) and files anywhere
on this machine (`vocab_file`), links can lead anywhere, and what is loaded is written into every checkpoint that is
made of it. No code is among the files that are copied, and nothing that says where else to look.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nemo_spin.errors import CheckpointError
from nemo_spin.model_io.untrusted.plain_data import read_mapping

# What a tokenizer may consist of; other files beside it (weights, model cards) are not its own.
PATTERNS = (
    "tokenizer*.json",
    "tokenizer*.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
    "spiece.model",
    "sentencepiece*.model",
)
# transformers asks the model's configuration where the tokenizer's own does not say of which class it is.
MODEL_CONFIG = "config.json"
_OF_MODEL_CONFIG = ("model_type", "tokenizer_class", "transformers_version")
_SETTINGS = "tokenizer_config.json"
# The largest tokenizer.json have some 30 MB.
_LARGEST = 256 * 2**20


def read_own_files(directory: Path) -> dict[str, bytes]:
    """Name -> content. Raises CheckpointError for a file that is none of the directory's, is damaged or too large."""
    names = sorted({path.name for pattern in PATTERNS for path in directory.glob(pattern) if path.is_file()})
    found = {name: _content(directory, name) for name in names}
    if _SETTINGS in found:
        settings = read_mapping(directory / _SETTINGS, str(directory / _SETTINGS))
        kept = {key: value for key, value in settings.items() if key != "auto_map" and not _names_file(key, value)}
        if len(kept) < len(settings):
            found[_SETTINGS] = json.dumps(kept, indent=2, ensure_ascii=False).encode()
    return found


@contextmanager
def as_directory(files: dict[str, bytes], beside: Path) -> Iterator[Path]:
    """A temporary directory with these files, and of `beside`'s config.json what tells the tokenizer's class."""
    with tempfile.TemporaryDirectory(prefix="nemo_spin_") as scratch:
        for name, content in files.items():
            (Path(scratch) / name).write_bytes(content)
        if (beside / MODEL_CONFIG).is_file():
            config = read_mapping(beside / MODEL_CONFIG, str(beside / MODEL_CONFIG))
            kept = {key: config[key] for key in _OF_MODEL_CONFIG if isinstance(config.get(key), str)}
            (Path(scratch) / MODEL_CONFIG).write_text(json.dumps(kept), encoding="utf-8")
        yield Path(scratch)


def _content(directory: Path, name: str) -> bytes:
    file = (directory / name).resolve()
    home = directory.resolve()
    # In the hub's cache, models--OWNER--NAME/snapshots/VERSION, files are links into models--OWNER--NAME/blobs.
    home = home.parent.parent if home.parent.name == "snapshots" else home
    if not file.is_relative_to(home):
        raise CheckpointError(
            f"{directory / name} is a link to outside of the tokenizer's directory: put the file itself there."
        )
    with open(file, "rb") as opened:
        content = opened.read(_LARGEST + 1)
    if len(content) > _LARGEST:
        raise CheckpointError(f"{directory / name} is larger than {_LARGEST // 2**20} MiB: it is no tokenizer's file.")
    return content


def _names_file(key: str, value: Any) -> bool:
    return key.endswith(("_file", "_files")) and value is not None
