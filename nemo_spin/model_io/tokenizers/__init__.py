"""The tokenizer of a checkpoint: NeMo's, of three libraries, behind one small interface."""

from nemo_spin.model_io.tokenizers.base import NeMoTokenizer
from nemo_spin.model_io.tokenizers.build import build_tokenizer, check_tokenizer_fits, restore_tokenizer

__all__ = ["NeMoTokenizer", "build_tokenizer", "check_tokenizer_fits", "restore_tokenizer"]
