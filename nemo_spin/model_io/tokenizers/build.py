"""Makes the tokenizer that a description describes.

NeMo is imported when a tokenizer is built: it takes seconds, and configurations are checked before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from nemo_spin.errors import CheckpointError
from nemo_spin.model_io.tokenizers import huggingface, sentencepiece, tiktoken
from nemo_spin.model_io.tokenizers.base import NeMoTokenizer
from nemo_spin.model_io.tokenizers.description import HF_FILES, OVERRIDE_HINT, TokenizerDescription, override

_BUILDERS = {
    "huggingface": huggingface.build,
    "sentencepiece": sentencepiece.build,
    "tiktoken": tiktoken.build,
}


def build_tokenizer(description: TokenizerDescription | None, places: Sequence[Path] = ()) -> NeMoTokenizer:
    """The tokenizer that a checkpoint's configuration, or an override of it, describes.

    places: directories in which its files are looked for first (`CheckpointSource.places`); none for an override. The
    files are not needed any more when this returns. Code that comes with a tokenizer is never run. Raises
    CheckpointError, in one sentence that says what to give instead, if the tokenizer is not at hand or of another kind.
    """
    if description is None:
        raise CheckpointError(f"The checkpoint does not say which tokenizer it was trained with: {OVERRIDE_HINT}.")
    if description.library not in _BUILDERS:
        raise CheckpointError(
            f"{description.origin} asks for a tokenizer of the kind {description.library}, which is not supported: "
            f"{OVERRIDE_HINT}."
        )
    return _BUILDERS[description.library](description, local_path(description, places))


class DescribesTokenizer(Protocol):
    """What restoring a tokenizer asks of a checkpoint; see `CheckpointSource`."""

    @property
    def tokenizer(self) -> TokenizerDescription | None: ...

    @property
    def places(self) -> Sequence[Path]: ...


def restore_tokenizer(source: DescribesTokenizer, overriding: Mapping[str, Any] | None) -> NeMoTokenizer:
    """The tokenizer that `model.tokenizer` {library, type, model} names, else the checkpoint's own."""
    chosen = overriding and override(*(overriding.get(key) for key in ("library", "type", "model")))
    # An archive's own configuration names files inside the archive.
    if chosen and not str(chosen.source).startswith("nemo:"):
        return build_tokenizer(chosen)
    return build_tokenizer(source.tokenizer, source.places)


def check_tokenizer_fits(tokenizer: Any, vocab_rows: int, origin: str) -> None:
    """Raises CheckpointError if the tokenizer makes ids beyond the embedding's rows.

    tokenizer: anything with `vocab_size`. origin: names the checkpoint in the message.
    """
    if tokenizer.vocab_size > vocab_rows:
        raise CheckpointError(
            f"The tokenizer has {tokenizer.vocab_size} ids, but the embedding of {origin} has {vocab_rows} rows: it is "
            "not this model's tokenizer; set model.tokenizer to the one that the model was trained with."
        )


def local_path(description: TokenizerDescription, places: Sequence[Path]) -> Path | None:
    """The file or directory that the description names, if it is in one of the places or elsewhere on this machine."""
    source = Path((description.source or "").removeprefix("nemo:"))
    if not source.name:
        return None
    # A path that leads out of the checkpoint's files is not theirs: of it only the name counts there.
    inside = [] if source.is_absolute() or ".." in source.parts else [source]
    try:
        found = [path for place in places for name in (*inside, source.name) if _is_tokenizer(path := place / name)]
        elsewhere = source.expanduser()
        if not (description.source or "").startswith("nemo:") and elsewhere.exists():
            found.append(elsewhere)
    except (OSError, ValueError, RuntimeError):  # no name that a file can have
        return None
    return found[0] if found else None


def _is_tokenizer(path: Path) -> bool:
    """A directory may bear a tokenizer's name without being one: a model's or a run's, beside the checkpoint."""
    return path.is_file() or any((path / name).is_file() for name in HF_FILES)
