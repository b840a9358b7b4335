"""Every attack of `attacks`, through every public way in: none leaves its mark, all end in a sentence."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import resource
import shutil
import signal
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
import yaml
from attacks import ATTACKS, CONFIG, SECRET, VARIABLE, Attack, Place, describe, described
from nemo.core.connectors.save_restore_connector import SaveRestoreConnector
from omegaconf import OmegaConf
from stores import random_store, write_zarr
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex

from nemo_spin.cli.main import main
from nemo_spin.errors import CheckpointError, DataError, UserError
from nemo_spin.megatron.architecture import Architecture
from nemo_spin.model_io.nemo1.archive import member_sizes, pack, unpack
from nemo_spin.model_io.nemo1.config import architecture_from_nemo1, to_nemo1_config
from nemo_spin.model_io.open import open_checkpoint
from nemo_spin.model_io.stores.interface import EMBEDDING, StoredTensor
from nemo_spin.model_io.stores.torch_dist import TorchDistStore, write_torch_dist
from nemo_spin.model_io.tokenizers import build_tokenizer
from nemo_spin.model_io.tokenizers.description import TokenizerDescription
from nemo_spin.model_io.tokenizers.own_files import as_directory, read_own_files
from nemo_spin.model_io.untrusted import tar_members

ROOM = 2**31  # bytes that an attack may add to this process
SECONDS = 300


def architecture() -> Architecture:
    config = {"mcore_gpt": True, "num_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "ffn_hidden_size": 24}
    config |= {"normalization": "rmsnorm", "activation": "fast-swiglu", "bias": False, "encoder_seq_length": 32}
    config |= {"position_embedding_type": "rope", "share_embeddings_and_output_weights": False}
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


def made(place: Place, good: dict[str, Path], name: str) -> Path:
    """An attack by its name, ready to be opened."""
    attack = next(attack for attack in ATTACKS if attack.name == name)
    shutil.copytree(good[attack.family], place.path)
    return attack.make(place) or place.path


WORK_UNCHECKED: dict[str, Callable[[Path, Place], Any]] = {
    "nemo1: absolute path": lambda path, place: extract_trustingly(path, place),
    "nemo1: symbolic link and a file through it": lambda path, place: extract_trustingly(path, place),
    "nemo2: .metadata with a call": lambda path, place: pickle.loads((path / "weights" / ".metadata").read_bytes()),
    "nemo2: files of a run that call": lambda path, place: torch.load(path / "weights/common.pt", weights_only=False),
    "nemo1: a configuration with code": lambda path, place: yaml.unsafe_load((path / CONFIG).read_text()),
}


def extract_trustingly(path: Path, place: Place) -> None:
    with tarfile.open(path) as tar:
        tar.extractall(place.written, filter="fully_trusted")


@pytest.mark.parametrize("name", WORK_UNCHECKED)
def test_they_are_attacks(good: dict[str, Path], place: Place, name: str) -> None:
    path = made(place, good, name)
    assert not place.mark.exists()
    WORK_UNCHECKED[name](path, place)
    assert place.mark.exists()


def test_the_interpolations_are_an_attack(good: dict[str, Path], place: Place) -> None:
    made(place, good, "nemo1: interpolations that reach outside")
    resolved = OmegaConf.to_container(OmegaConf.load(place.path / CONFIG).tokenizer, resolve=True)
    assert SECRET in str(resolved)


def test_an_export_is_text_to_omegaconf(good: dict[str, Path], place: Place) -> None:
    path = made(place, good, "nemo1: interpolations that reach outside")
    target = place.written / "out.nemo"
    assert main(["convert", "--from", str(path), "--to", str(target), "--format", "nemo"]) == 0
    unpack(target, place.written)
    written = OmegaConf.to_container(OmegaConf.load(place.written / CONFIG), resolve=True)
    special = f"<${{oc.env:{VARIABLE}}}>"
    assert special in written["tokenizer"]["special_tokens"]
    with open_checkpoint(target) as source:
        assert special in source.tokenizer.special_tokens


ARCHIVES = [attack for attack in ATTACKS if attack.family == "nemo1" and attack.words]
ACTED_ON = ["nemo1: a target at the root", "nemo1: interpolations that reach outside"]


@pytest.mark.parametrize("name", [*(attack.name for attack in ARCHIVES), *ACTED_ON])
def test_nemo_s_own_connector_does_not_see_them(
    good: dict[str, Path], place: Place, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nemo_spin import MegatronGPTSPINModel
    from nemo_spin.megatron import setup

    attack = next(attack for attack in ATTACKS if attack.name == name)
    if attack.words and "tokenizer" in attack.name:
        pytest.skip("the tokenizer is built by us, also then")
    for constant, value in attack.patched.items():
        monkeypatch.setattr(tar_members, constant, value)
    path = made(place, good, name)
    if path.is_dir():
        path = place.path.with_suffix(".nemo")
        pack(place.path, path)
    monkeypatch.setattr(SaveRestoreConnector, "_unpack_nemo_file", lambda *_, **__: pytest.fail("it was unpacked"))
    words = attack.words or "NeMo's connector would act on: leave save_restore_connector out"
    try:
        with limited(), pytest.raises(CheckpointError, match=words):
            MegatronGPTSPINModel.restore_from(str(path), save_restore_connector=SaveRestoreConnector())
    finally:
        setup.shutdown()


def test_what_nemo_has_unpacked_and_resolved_is_refused(good: dict[str, Path], place: Place) -> None:
    """ModelPT.restore_from does not ask us before."""
    from nemo_spin import MegatronGPTSPINModel
    from nemo_spin.megatron import setup

    path = made(place, good, "nemo1: interpolations that reach outside")
    try:
        with pytest.raises(CheckpointError, match="refers to what is not in it"):
            SaveRestoreConnector().restore_from(MegatronGPTSPINModel, str(path))
    finally:
        setup.shutdown()
        MegatronGPTSPINModel._set_model_restore_state(is_being_restored=False)


@pytest.mark.parametrize(
    "template",
    [
        "{{{{ cycler.__init__.__globals__.os.system('touch {mark}') }}}}",
        "{{{{ ''.__class__.__mro__[1].__subclasses__() }}}}",
        "{{{{ messages.append.__self__.__class__.__base__.__subclasses__() }}}}",
        "{{% include '{secret}' %}}",
    ],
)
def test_a_chat_template_reaches_nothing(good: dict[str, Path], place: Place, template: str) -> None:
    shutil.copytree(good["hf"], place.path)
    filled = template.format(mark=place.mark, secret=place.secret)
    settings = json.loads((place.path / "tokenizer_config.json").read_text()) | {"chat_template": filled}
    (place.path / "tokenizer_config.json").write_text(json.dumps(settings))
    with open_checkpoint(place.path) as source:
        tokenizer = build_tokenizer(source.tokenizer, source.places)
    with pytest.raises(DataError):
        tokenizer.render_chat([{"role": "user", "content": "x"}], add_generation_prompt=True)
    assert not place.mark.exists()


def test_settings_of_a_tokenizer_name_no_files_and_no_code(good: dict[str, Path], place: Place) -> None:
    """transformers 4 reads what they name; transformers 5 does not."""
    for name in ("hf: a vocabulary elsewhere", "hf: code of a tokenizer"):
        path = made(place, good, name)
        files = read_own_files(path)
        settings = json.loads(files["tokenizer_config.json"])
        assert not {"vocab_file", "merges_file", "spm_file", "auto_map"} & settings.keys()
        with as_directory(files, path) as copy:
            assert "auto_map" not in (copy / "config.json").read_text()
            assert not list(copy.glob("*.py"))
        shutil.rmtree(path)


def test_a_tokenizer_of_the_hub_reaches_nothing(good: dict[str, Path], place: Place, monkeypatch: Any) -> None:
    """Its name may come from a stranger's configuration."""
    shutil.copytree(good["hf"], place.path)
    version = place.outside.parent / "hub" / "models--a--b" / "snapshots" / "0abc"
    shutil.copytree(good["hf"], version, ignore=shutil.ignore_patterns("*.safetensors"))
    (version.parent.parent / "refs").mkdir()
    (version.parent.parent / "refs" / "main").write_text("0abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(version.parents[2]))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    description = TokenizerDescription("huggingface", "a/b", "it")
    assert build_tokenizer(description).encode("one two")
    (version / "tokenizer_more.model").symlink_to(place.secret)
    with pytest.raises(CheckpointError, match="is a link to outside"):
        build_tokenizer(description)


def test_what_is_unpacked_is_the_user_s_alone(good: dict[str, Path], place: Place) -> None:
    shutil.copytree(good["nemo1"], place.path)
    (place.path / "tool").write_text("x")
    (place.path / "tool").chmod(0o6777)
    pack(place.path, place.written / "x.nemo")
    unpack(place.written / "x.nemo", place.outside)
    assert (place.outside / "tool").stat().st_mode & 0o7777 == 0o600


def test_links_are_packed_as_files(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a").write_text("a")
    os.link(tmp_path / "in" / "a", tmp_path / "in" / "b")
    (tmp_path / "in" / "c").symlink_to("a")
    pack(tmp_path / "in", tmp_path / "x.nemo")
    assert member_sizes(tmp_path / "x.nemo") == {"a": 1, "b": 1, "c": 1}


def test_there_is_room_before_anything_is_unpacked(good: dict[str, Path], place: Place, monkeypatch: Any) -> None:
    pack(good["nemo1"], place.written / "x.nemo")
    usage = shutil.disk_usage(place.written)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100))
    words = r"cannot be unpacked \(.* GiB are needed, .* has 0.00 GiB\): make room, set TMPDIR"
    with pytest.raises(CheckpointError, match=words), open_checkpoint(place.written / "x.nemo"):
        pass


def test_pieces_that_overlap_show_no_memory(tmp_path: Path) -> None:
    """They can be as many elements as the tensor has, and leave a gap."""
    write_torch_dist(random_store(architecture()), tmp_path, "")
    metadata = described(tmp_path)
    (entry,) = [entry for name, entry in metadata.state_dict_metadata.items() if name == EMBEDDING]
    (old,) = [index for index in metadata.storage_data if index.fqn == EMBEDDING]
    rows, columns = entry.size
    half = ChunkStorageMetadata(torch.Size((0, 0)), torch.Size((rows // 2, columns)))
    entry.chunks = [half, half]
    saved = io.BytesIO()
    torch.save(torch.ones(rows // 2, columns, dtype=torch.bfloat16), saved)
    place = metadata.storage_data.pop(old)
    (tmp_path / "half").write_bytes(saved.getvalue())
    metadata.storage_data[MetadataIndex(EMBEDDING, torch.Size((0, 0)))] = type(place)("half", 0, saved.tell())
    describe(tmp_path, metadata)
    torch.full((rows, columns), 7.0, dtype=torch.bfloat16)  # freed at once: memory that the next tensor may get
    read = TorchDistStore(tmp_path, "", "it").read(EMBEDDING)
    assert read[: rows // 2].eq(1).all()
    assert read[rows // 2 :].eq(0).all()
