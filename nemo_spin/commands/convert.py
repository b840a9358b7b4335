"""`nemo-spin convert`: a checkpoint of any family, written as one of another, a piece in memory at a time."""

from __future__ import annotations

import sys
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from nemo_spin.errors import CheckpointError
from nemo_spin.model_io.export import Content, StoredWeights, check_expressible, check_target, export
from nemo_spin.model_io.open import open_checkpoint
from nemo_spin.model_io.source import CheckpointSource
from nemo_spin.model_io.stores.interface import EMBEDDING, Region, WeightStore
from nemo_spin.model_io.tokenizers import NeMoTokenizer, build_tokenizer, check_tokenizer_fits
from nemo_spin.model_io.tokenizers.description import from_path


def convert(
    source: str | Path,
    target: str | Path,
    file_format: str,
    *,
    tokenizer_path: str | None = None,
    with_tokenizer: bool = True,
    overwrite: bool = False,
) -> list[str]:
    """Write the checkpoint at `source` to `target` as `file_format` (one of `export.FORMATS`); nothing else is kept.

    Weights keep their bits and their dtypes; the embedding loses padding rows only in Hugging Face's format, which has
    no word for them. tokenizer_path: in place of the checkpoint's own, see `tokenizers.description.from_path`.

    Returns what the user should know of the result, in sentences. Raises UserError in one sentence.
    """
    target = Path(target).expanduser()
    check_target(target, file_format, overwrite)
    with open_checkpoint(source) as opened:
        notes = [opened.chosen] if opened.chosen else []
        tokenizer = _tokenizer(opened, tokenizer_path) if with_tokenizer else None
        architecture = opened.architecture(tokenizer.vocab_size if tokenizer else None)
        # Before an archive is unpacked.
        check_expressible(architecture, opened.tensors[EMBEDDING].dtype, file_format)
        with _Progress(opened.weights()) as store:
            return notes + export(Content(architecture, StoredWeights(store), tokenizer), target, file_format)


def _tokenizer(source: CheckpointSource, path: str | None) -> NeMoTokenizer:
    try:
        if path is not None:
            tokenizer = build_tokenizer(from_path(path))
        else:
            tokenizer = build_tokenizer(source.tokenizer, source.places)
        check_tokenizer_fits(tokenizer, source.tensors[EMBEDDING].shape[0], str(source.path))
    except CheckpointError as error:
        raise CheckpointError(f"{error} To leave it out: --no-tokenizer.") from None
    return tokenizer


class _Progress:
    """A WeightStore that shows on the terminal how much of it has been read."""

    def __init__(self, store: WeightStore) -> None:
        self._store = store
        self.tensors = store.tensors
        total = sum(tensor.numel * tensor.dtype.itemsize for tensor in store.tensors.values())
        self._bar = tqdm(total=total, unit="B", unit_scale=True, disable=not sys.stderr.isatty(), leave=False)

    def read(self, name: str, region: Region | None = None) -> Tensor:
        found = self._store.read(name, region)
        self._bar.update(found.numel() * found.element_size())
        return found

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
