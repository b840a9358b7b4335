"""Makes small checkpoints in both of NeMo's formats, with the logits that this project's model computes of them."""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import sentencepiece
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "distributed"))

from toy import fill_deterministically, toy_architecture

from nemo_spin.commands.convert import convert
from nemo_spin.megatron import setup
from nemo_spin.megatron.architecture import Architecture, gelu_tanh, quick_gelu, squared_relu
from nemo_spin.megatron.gpt import DTYPES, build_gpt
from nemo_spin.model_io.export import Content, LiveWeights, export
from nemo_spin.model_io.tokenizers import build_tokenizer
from nemo_spin.model_io.tokenizers.description import TokenizerDescription

TEXT = "the answer is four"
VOCABULARY = 96
# What a training run writes into the configuration of a `.nemo`.
OF_A_RUN = {"target": "nemo_spin.model.MegatronGPTSPINModel", "nemo_version": "3.0.0"}


@dataclass(frozen=True)
class Made:
    """A checkpoint to be read. ids: of `TEXT`. truth: file with input_ids [b, s] and fp32 logits [b, s, vocabulary]."""

    name: str
    path: Path
    truth: Path
    ids: list[int]
    exported: bool = False
    override: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """exported: whether NeMo 2 has an exporter to Hugging Face for it. in_nemo1: whether NeMo 1 has it.

    converted: whether the `.nemo` is converted from the NeMo 2 directory; else it is written as a training run does.
    """

    architecture: Architecture
    tokenizer: str = "sentencepiece"
    precision: str = "32"
    exported: bool = False
    in_nemo1: bool = True
    converted: bool = True


def toy(**overrides: Any) -> Architecture:
    return toy_architecture(vocab_rows=VOCABULARY, vocab_size=VOCABULARY, **overrides)


_LAYER_NORM = {"normalization": "LayerNorm", "gated_linear_unit": False}
CASES = {
    "Llama 2": Case(toy(), exported=True),
    "Llama 2, bf16": Case(toy(), precision="bf16", converted=False),
    "Llama 2, Hugging Face tokenizer": Case(toy(), tokenizer="huggingface", exported=True),
    "Llama 2, padded vocabulary": Case(toy_architecture(vocab_rows=128, vocab_size=VOCABULARY)),
    "Llama 3.2": Case(
        toy(
            num_query_groups=1,
            kv_channels=16,
            rope_scaling=True,
            rope_scaling_factor=32.0,
            rotary_base=5e5,
            share_embeddings_and_output_weights=True,
        ),
        tokenizer="huggingface",
        exported=True,
    ),
    "Qwen 2": Case(toy(add_qkv_bias=True, rotary_base=1e6), tokenizer="huggingface", exported=True),
    "Qwen 3": Case(toy(qk_layernorm=True, kv_channels=16), tokenizer="huggingface", exported=True),
    "Nemotron": Case(
        toy(**_LAYER_NORM, layernorm_zero_centered_gamma=True, activation_func=squared_relu, rotary_percent=0.5),
        tokenizer="huggingface",
        exported=True,
    ),
    "GPT-2": Case(
        toy(
            **_LAYER_NORM,
            num_query_groups=None,
            activation_func=gelu_tanh,
            add_bias_linear=True,
            position_embedding_type="learned_absolute",
            share_embeddings_and_output_weights=True,
        )
    ),
    "quick GELU, interleaved and stretched RoPE": Case(
        toy(
            **_LAYER_NORM,
            activation_func=quick_gelu,
            rotary_interleaved=True,
            rotary_percent=0.5,
            seq_len_interpolation_factor=2.0,
        )
    ),
    "gated GELU, no positions": Case(toy(activation_func=F.gelu, position_embedding_type="none")),
    "ReLU": Case(toy(**_LAYER_NORM, activation_func=F.relu), in_nemo1=False),
}


def make_checkpoints(directory: Path) -> dict[str, list[Made]]:
    """One checkpoint per case and format below `directory`; "nemo2" and "nemo1" -> what was made."""
    setup.initialize(1, 1, seed=1)
    tokenizers = {
        library: build_tokenizer(TokenizerDescription(library, str(source), origin="the check"))
        for library, source in (
            ("sentencepiece", _sentencepiece(directory / "tokenizers")),
            ("huggingface", _huggingface(directory / "tokenizers" / "words")),
        )
    }
    made: dict[str, list[Made]] = {"nemo2": [], "nemo1": []}
    for number, (name, case) in enumerate(CASES.items()):
        folder = directory / f"{number:02d}"
        tokenizer = tokenizers[case.tokenizer]
        model = fill_deterministically(build_gpt(case.architecture, case.precision))
        truth = _truth(case, folder / "truth.pt")
        content = Content(case.architecture, LiveWeights(model, case.architecture), tokenizer, OF_A_RUN)
        about = {"name": name, "truth": truth, "ids": tokenizer.encode(TEXT)}
        path = folder / "nemo2"
        export(content, path, "nemo2")
        made["nemo2"].append(Made(path=path, exported=case.exported, **about))
        if case.in_nemo1:
            if case.converted:
                convert(path, folder / "model.nemo", "nemo")
            else:
                export(content, folder / "model.nemo", "nemo")
            path = folder / "model.nemo"
            # NeMo 1 keeps no Hugging Face tokenizer in an archive: its users name it.
            named = {"tokenizer": {"type": str(for_old_transformers(directory / "tokenizers" / "words"))}}
            override = named if case.tokenizer == "huggingface" else {}
            made["nemo1"].append(Made(path=path, override=override, **about))
    setup.shutdown()
    return made


def for_old_transformers(folder: Path) -> Path:
    """A copy of a tokenizer that names the class that transformers 4 has."""
    copy = folder.with_name(f"{folder.name}-4")
    if not copy.exists():
        shutil.copytree(folder, copy)
        config = copy / "tokenizer_config.json"
        config.write_text(config.read_text().replace("TokenizersBackend", "PreTrainedTokenizerFast"))
    return copy


@torch.no_grad()
def _truth(case: Case, path: Path) -> Path:
    """Computed in fp32, whatever precision the weights have."""
    model = fill_deterministically(build_gpt(case.architecture, "32"))
    for parameter in model.parameters():
        parameter.copy_(parameter.to(DTYPES[case.precision]))
    ids = torch.randint(case.architecture.vocab_size, (2, 24), generator=torch.Generator().manual_seed(5))
    logits = model.eval()(ids, torch.arange(24).expand_as(ids), None)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"input_ids": ids, "logits": logits[..., : case.architecture.vocab_size].clone()}, path)
    return path


def _sentencepiece(folder: Path) -> Path:
    folder.mkdir(parents=True)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([TEXT, "the quick brown fox jumps over the lazy dog", "0123456789"]),
        model_prefix=str(folder / "pieces"),
        model_type="bpe",
        vocab_size=VOCABULARY,
        byte_fallback=False,
        hard_vocab_limit=False,
        user_defined_symbols=[f"<extra_{number}>" for number in range(40)],
        minloglevel=2,
    )
    return folder / "pieces.model"


def _huggingface(folder: Path) -> Path:
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<s>", "</s>", *TEXT.split()]
    words += [f"word{number}" for number in range(VOCABULARY - len(words))]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.Fuse()
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    return folder
