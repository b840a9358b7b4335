"""Every attack of `attacks`, through every public way in: none leaves its mark, all end in a sentence."""

from __future__ import annotations

import io
import re
import resource
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import yaml
from attacks import ATTACKS, SECRET, VARIABLE, Attack, Place
from stores import random_store, write_zarr

from nemo_spin.checkpoint import tar_members
from nemo_spin.checkpoint.architecture import Architecture
from nemo_spin.checkpoint.nemo1 import architecture_from_nemo1, to_nemo1_config
from nemo_spin.checkpoint.opening import open_checkpoint
from nemo_spin.checkpoint.torch_dist import write_torch_dist
from nemo_spin.checkpoint.weight_store import EMBEDDING, StoredTensor
from nemo_spin.cli import main
from nemo_spin.errors import CheckpointError, UserError
from nemo_spin.tokenizers import build_tokenizer

ROOM = 2**31  # bytes that an attack may add to this process
SECONDS = 300


def architecture() -> Architecture:
    config = {"mcore_gpt": True, "num_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "ffn_hidden_size": 24}
    config |= {"normalization": "rmsnorm", "activation": "fast-swiglu", "bias": False, "encoder_seq_length": 32}
    config |= {"position_embedding_type": "rope", "share_embeddings_and_output_weights": False}
    import torch

    return architecture_from_nemo1(config, {EMBEDDING: StoredTensor((64, 16), torch.bfloat16)}, None, "it")


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small checkpoint of each family."""
    root = tmp_path_factory.mktemp("good")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["one two three four five six"] * 20),
        model_writer=model,
        minloglevel=2,
        hard_vocab_limit=False,
        vocab_size=30,
    )
    store = random_store(architecture())
    node = {"library": "sentencepiece", "model": "nemo:abc_tokenizer.model", "sentencepiece_legacy": False}
    for name in ("nemo1", "zarr"):
        directory = root / name
        (directory / "model_weights").mkdir(parents=True)
        (directory / "abc_tokenizer.model").write_bytes(model.getvalue())
        config = to_nemo1_config(architecture(), "bf16") | {"tokenizer": node}
        (directory / "model_config.yaml").write_text(yaml.safe_dump(config))
    write_torch_dist(store, root / "nemo1" / "model_weights", "model.")
    write_zarr(store, root / "zarr" / "model_weights")
    for file_format in ("nemo2", "megatron", "hf"):
        arguments = ["convert", "--from", str(root / "nemo1"), "--to", str(root / file_format)]
        assert main([*arguments, "--format", file_format]) == 0
    return {path.name: path for path in root.iterdir()}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    (tmp_path / "outside").mkdir()
    (tmp_path / "scratch").mkdir()
    (tmp_path / "written").mkdir()
    (tmp_path / "outside" / "secret.model").write_text(f"{SECRET}\n" * 50)
    monkeypatch.setenv(VARIABLE, SECRET)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    yield Place(tmp_path / "checkpoint", tmp_path / "outside")
    assert not any((tmp_path / "scratch").iterdir()), "something is left in TMPDIR"


@contextmanager
def limited() -> Iterator[None]:
    """An error for what takes more memory than a small checkpoint can need, or does not end."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + ROOM, before[1]))

    def ended(*_: Any) -> None:
        raise TimeoutError

    handler = signal.signal(signal.SIGALRM, ended)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, before)


def open_all(path: Path, place: Place) -> None:
    with open_checkpoint(path) as source:
        source.architecture()
        build_tokenizer(source.tokenizer, source.places)
        store = source.weights()
        for name in store.tensors:
            store.read(name)


def commands(path: Path, place: Place) -> None:
    """`inspect` may show what it can of a checkpoint whose weights or tokenizer are bad; `convert` reads all."""
    main(["inspect", str(path)])
    assert main(["inspect", str(path), "--json"]) in (0, 2)
    for file_format in ("nemo", "nemo2", "hf"):
        target = place.written / f"out.{file_format}"
        code = main(["convert", "--from", str(path), "--to", str(target), "--format", file_format])
        if code:
            assert code == 2
            assert not target.exists()
            raise CheckpointError("see the output")


def restore(path: Path, place: Place) -> None:
    from nemo_spin import MegatronGPTSPINModel
    from nemo_spin.megatron import setup

    try:
        MegatronGPTSPINModel.restore_from(str(path)).save_to(place.written / "again.nemo")
    finally:
        setup.shutdown()


WAYS: tuple[Callable[[Path, Place], None], ...] = (open_all, commands, restore)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name.replace(" ", "-"))
def test_no_mark_is_left(
    good: dict[str, Path], place: Place, attack: Attack, way: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name, value in attack.patched.items():
        monkeypatch.setattr(tar_members, name, value)
    shutil.copytree(good[attack.family], place.path)
    path = attack.make(place) or place.path
    before = {file: file.read_bytes() for file in place.outside.iterdir()}
    shown, refusal = io.StringIO(), None
    with limited(), redirect_stdout(shown), redirect_stderr(shown):
        try:
            way(path, place)
        except UserError as error:
            refusal = str(error)
    assert {file: file.read_bytes() for file in place.outside.iterdir()} == before
    output = shown.getvalue() + (refusal or "")
    assert SECRET not in output
    assert "Traceback" not in output
    assert "\x1b]" not in output
    written = (file for file in place.written.rglob("*") if file.is_file())
    assert not [file for file in written if SECRET.encode() in file.read_bytes()]
    if attack.words is None:
        assert refusal is None, output
    else:
        assert refusal is not None
        assert re.search(attack.words, output), output
        assert "\n" not in refusal
