"""Makes the tokenizer that a description describes.

NeMo is imported when a tokenizer is built: it takes seconds, and configurations are checked before.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nemo_spin.checkpoint.tokenizer_description import OVERRIDE_HINT, TokenizerDescription
from nemo_spin.errors import CheckpointError
from nemo_spin.tokenizers import huggingface, sentencepiece, tiktoken
from nemo_spin.tokenizers.base import NeMoTokenizer

_BUILDERS = {
    "huggingface": huggingface.build,
    "sentencepiece": sentencepiece.build,
    "tiktoken": tiktoken.build,
}


def build_tokenizer(description: TokenizerDescription | None, base_dir: str | Path | None = None) -> NeMoTokenizer:
    """The tokenizer that a checkpoint's configuration, or an override of it, describes.

    base_dir: where the checkpoint's files are (`CheckpointSource.files_dir`); None for an override. The files are not
    needed any more when this returns. Code that comes with a tokenizer is never run. Raises CheckpointError, in one
    sentence that says what to give instead, if the tokenizer is not at hand or of another kind.
    """
    if description is None:
        raise CheckpointError(f"The checkpoint does not say which tokenizer it was trained with: {OVERRIDE_HINT}.")
    if description.library not in _BUILDERS:
        raise CheckpointError(
            f"{description.origin} asks for a tokenizer of the kind {description.library}, which is not supported: "
            f"{OVERRIDE_HINT}."
        )
    return _BUILDERS[description.library](description, local_path(description, base_dir))


def check_tokenizer_fits(tokenizer: Any, vocab_rows: int, origin: str) -> None:
    """Raises CheckpointError if the tokenizer makes ids beyond the embedding's rows.

    tokenizer: anything with `vocab_size`. origin: names the checkpoint in the message.
    """
    if tokenizer.vocab_size > vocab_rows:
        raise CheckpointError(
            f"The tokenizer has {tokenizer.vocab_size} ids, but the embedding of {origin} has {vocab_rows} rows: it is "
            "not this model's tokenizer; set model.tokenizer to the one that the model was trained with."
        )


def local_path(description: TokenizerDescription, base_dir: str | Path | None) -> Path | None:
    """The file or directory that the description names, if it is on this machine."""
    source = (description.source or "").removeprefix("nemo:")
    if not source:
        return None
    in_checkpoint = [Path(base_dir) / source, Path(base_dir) / Path(source).name] if base_dir else []
    elsewhere = [] if (description.source or "").startswith("nemo:") else [Path(source).expanduser()]
    return next((path for path in [*in_checkpoint, *elsewhere] if path.exists()), None)
