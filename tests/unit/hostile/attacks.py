"""Checkpoints as an attacker would make them, on the spot: nothing of them lies in the repository.

An attack is a function that turns a copy of a good checkpoint into a bad one, and what becomes of it: words of the
sentence that refuses it, or None where it is opened and must not do anything. One that works leaves a mark: the file
`MARK` exists, the secret (an environment variable and a file) is in what is shown or written, or memory runs out.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import shutil
import struct
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from torch.distributed.checkpoint.metadata import MetadataIndex

SECRET = "tangerine-7f3a9"
VARIABLE = "NEMO_SPIN_TEST_SECRET"
CONFIG = "model_config.yaml"


@dataclass(frozen=True)
class Place:
    """Where an attack happens. path: the copy of the good checkpoint. outside: a directory that is none of its."""

    path: Path
    outside: Path

    @property
    def mark(self) -> Path:
        return self.outside / "mark"

    @property
    def written(self) -> Path:
        """Where exports go."""
        return self.outside.parent / "written"

    @property
    def secret(self) -> Path:
        return self.outside / "secret.model"


@dataclass(frozen=True)
class Attack:
    """family: of the good checkpoint. make: changes it, and returns the path to give. words: see above."""

    name: str
    family: str
    make: Callable[[Place], Path | None]
    words: str | None
    patched: dict[str, Any] = field(default_factory=dict)


ATTACKS: list[Attack] = []


def attack(family: str, words: str | None, name: str = "", **patched: Any) -> Callable:
    def add(make: Callable[[Place], Path | None]) -> Callable:
        ATTACKS.append(Attack(f"{family}: {name or make.__name__.replace('_', ' ')}", family, make, words, patched))
        return make

    return add


class Calls:
    """Unpickled by ordinary means, it calls."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def touch(place: Place) -> Calls:
    return Calls(os.system, f"touch {place.mark}")


# ------------------------------------------------------------------------------------------------------- archives


def archive(place: Place, *members: bytes, compressed: bool = False, first: bool = False) -> Path:
    """The checkpoint as an archive, with more members after its own, or before."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", format=tarfile.GNU_FORMAT) as tar:
        tar.add(place.path, arcname=".")
        own = packed.getvalue()[: tar.offset]
    whole = b"".join([*members, own] if first else [own, *members]) + bytes(1024)
    path = place.path.with_suffix(".nemo")
    path.write_bytes(gzip.compress(whole) if compressed else whole)
    return path


def member(
    name: str, kind: bytes = tarfile.REGTYPE, content: bytes = b"", link: str = "", size: int | None = None
) -> bytes:
    """Header and content; size: what the header says instead of the content's."""
    made = tarfile.TarInfo(name)
    made.type, made.linkname, made.size = kind, link, len(content) if size is None else size
    return made.tobuf(tarfile.GNU_FORMAT) + content + bytes(-len(content) % 512)


def extended(kind: bytes = tarfile.XHDTYPE, **records: str | bytes) -> bytes:
    """A pax header."""
    content = b""
    for key, value in records.items():
        line = b" " + key.replace("__", ".").encode() + b"=" + (value if isinstance(value, bytes) else value.encode())
        length = next(n for n in range(len(line), len(line) + 9) if n == len(str(n)) + len(line) + 1)
        content += str(length).encode() + line + b"\n"
    return member("pax", kind, content)


UNSAFE = "holds an unsafe member and is not opened"

for name, escaping in {"a path with ..": "model_weights/../../{up}", "a path that begins with ..": "../{up}"}.items():

    @attack("nemo1", "lies outside the archive", name)
    def traversal(place: Place, escaping: str = escaping) -> Path:
        up = "../" * 12 + str(place.mark).lstrip("/")
        return archive(place, member(escaping.format(up=up), content=b"x"))


@attack("nemo1", "lies outside the archive")
def absolute_path(place: Place) -> Path:
    return archive(place, member(str(place.mark), content=b"x"))


@attack("nemo1", "lies outside the archive")
def absolute_path_in_a_pax_header(place: Place) -> Path:
    return archive(place, extended(path=str(place.mark)), member("harmless", content=b"x"))


@attack("nemo1", "is a symbolic link")
def symbolic_link_and_a_file_through_it(place: Place) -> Path:
    link = member("model_weights/out", tarfile.SYMTYPE, link=str(place.outside))
    return archive(place, link, member("model_weights/out/mark", content=b"x"))


@attack("nemo1", "is a symbolic link")
def the_tokenizer_is_a_link_to_a_secret(place: Place) -> Path:
    next(place.path.glob("*.model")).unlink()
    return archive(place, member("secret.model", tarfile.SYMTYPE, link=str(place.secret)), first=True)


@attack("nemo1", "is a hard link")
def hard_link(place: Place) -> Path:
    return archive(place, member("model_weights/more", tarfile.LNKTYPE, link=str(place.secret)))


for kind, words in {
    tarfile.CHRTYPE: "device node",
    tarfile.BLKTYPE: "device node",
    tarfile.FIFOTYPE: "named pipe",
}.items():

    @attack("nemo1", words, f"{words} {kind.decode()}")
    def special_file(place: Place, kind: bytes = kind) -> Path:
        return archive(place, member("model_weights/more", kind))


for kind in (tarfile.GNUTYPE_SPARSE, tarfile.CONTTYPE, b"V", b"Z"):

    @attack("nemo1", "not a file", f"a member of type {kind.decode()}")
    def other_kind(place: Place, kind: bytes = kind) -> Path:
        return archive(place, member("model_weights/more", kind))


@attack("nemo1", "GNU.sparse.major")
def sparse_by_a_pax_header(place: Place) -> Path:
    return archive(place, extended(GNU__sparse__major="1"), member("model_weights/more"))


for name in (CONFIG, f"./{CONFIG}", f"model_weights/.//../{CONFIG}"):

    @attack("nemo1", "outside" if ".." in name else "two members are named model_config.yaml", f"a second {name}")
    def two_of_a_name(place: Place, name: str = name) -> Path:
        return archive(place, member(name, content=b"{}"))


@attack("nemo1", "is a file and a directory")
def file_and_directory(place: Place) -> Path:
    return archive(place, member("model_weights", content=b"x"))


for name, odd in {
    "a line break": b"model\nweights",
    "an escape sequence": b"\x1b]0;mark\x07",
    "no UTF-8": b"\xff\xfe",
    "NUL": b"model\0weights",
    "5000 bytes": b"x" * 5000,
    "100 directories": b"x/" * 100 + b"x",
}.items():

    @attack("nemo1", UNSAFE, f"a name with {name}")
    def odd_name(place: Place, odd: bytes = odd) -> Path:
        return archive(place, extended(path=odd), member("harmless"))


@attack("nemo1", "claim more than")
def bomb(place: Place) -> Path:
    return archive(place, member("model_weights/more", size=2**33), compressed=True)


@attack("nemo1", "a header of it is larger")
def header_that_fills_memory(place: Place) -> Path:
    return archive(place, member("pax", tarfile.XHDTYPE, size=2**34), compressed=True)


@attack("nemo1", "more than 30 members", MOST_MEMBERS=30)
def many_members(place: Place) -> Path:
    return archive(place, *(member(f"model_weights/{index}") for index in range(40)))


for name, size in {"negative": "-512", "no number": "1e3", "of 50 digits": "9" * 50}.items():

    @attack("nemo1", "a size is no number", f"a size that is {name}")
    def odd_size(place: Place, size: str = size) -> Path:
        return archive(place, extended(size=size), member("model_weights/more"))


@attack("nemo1", "truncated")
def a_size_beyond_the_end(place: Place) -> Path:
    return archive(place, member("model_weights/more", size=10**6))


@attack("nemo1", "all members one name")
def a_global_name(place: Place) -> Path:
    return archive(place, extended(tarfile.XGLTYPE, path="evil"), first=True)


@attack("nemo1", None)
def an_archive_in_the_archive(place: Place) -> Path:
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w") as tar:
        tar.addfile(tarfile.TarInfo(str(place.mark)), io.BytesIO())
    (place.path / "more.nemo").write_bytes(inner.getvalue())
    return archive(place)


# -------------------------------------------------------------------------------------------------------- pickles


def described(directory: Path) -> Any:
    return pickle.loads((directory / ".metadata").read_bytes())


def describe(directory: Path, metadata: Any) -> None:
    (directory / ".metadata").write_bytes(pickle.dumps(metadata))


def _with_pickle(place: Place, content: bytes) -> None:
    """In place of `.metadata`, and under a key of it."""
    (place.path / "weights" / ".metadata").write_bytes(content)


UNREAD = r"weights/\.metadata cannot be read"


def in_metadata(name: str, words: str | None = UNREAD) -> Callable:
    """The decorated function gives the pickle."""

    def add(make: Callable[[Place], bytes]) -> Callable:
        attack("nemo2", words, f".metadata with {name}")(lambda place: _with_pickle(place, make(place)))
        return make

    return add


@in_metadata("a call")
def _(place: Place) -> bytes:
    return pickle.dumps(touch(place))


@in_metadata("a call in a key that nobody reads", None)
def _(place: Place) -> bytes:
    metadata = described(place.path / "weights")
    metadata.planner_data = [touch(place), Calls(eval, f"open({str(place.mark)!r}, 'w')")]
    return pickle.dumps(metadata)


@in_metadata("a chain of getattr")
def _(place: Place) -> bytes:
    return (
        b"cbuiltins\ngetattr\n(ctorch.distributed.checkpoint.filesystem\nos\nVsystem\ntR(Vtouch %b\ntR."
        % str(place.mark).encode()
    )


@in_metadata("a class that is changed for everybody")
def _(place: Place) -> bytes:
    return b"cpathlib\nPath\n(N(Vmark\nI1\ndtb."


@in_metadata("an allowed class that opens a file")
def _(place: Place) -> bytes:
    return b"ctorch.distributed.checkpoint\nFileSystemReader\n(V%b\ntR." % str(place.secret).encode()


@in_metadata("a class by a registered number")
def _(place: Place) -> bytes:
    return b"\x80\x02\x82\x01."


@in_metadata("lists 100,000 deep")
def _(place: Place) -> bytes:
    return b"(l" * 100_000 + b"a" * 99_999 + b"."


@in_metadata("a place in memory beyond all")
def _(place: Place) -> bytes:
    return b"\x80\x02Nr\xf0\xff\xff\x7f."


@in_metadata("bytes that are only claimed", r"cannot be read \(EOFError")
def _(place: Place) -> bytes:
    return b"\x80\x05\x96" + struct.pack("<Q", 2**36) + b"x."


# Nothing interrupts a hash: 2^24 parts are few enough for a test to end, also where nobody refuses them.
_DOUBLED = b")" + b"2\x86" * 24


@in_metadata("a key that takes forever to hash", "a key of nested tuples")
def _(place: Place) -> bytes:
    return b"\x80\x02}" + _DOUBLED + b"Ns."


@in_metadata("a set that takes forever to hash", "a key of nested tuples")
def _(place: Place) -> bytes:
    return b"\x80\x04\x8f(" + _DOUBLED + b"\x90."


@in_metadata("a number of 10,000 digits", "it holds a number of 39999 bits")
def _(place: Place) -> bytes:
    return b"\x80\x02\x8b" + struct.pack("<i", 5000) + b"\x7f" * 5000 + b"."


def in_description(name: str, words: str, family: str = "nemo2") -> Callable:
    """The decorated function changes what `.metadata` says."""

    def add(change: Callable[[Place, Any], None]) -> Callable:
        def make(place: Place) -> None:
            directory = place.path / "weights"
            metadata = described(directory)
            change(place, metadata)
            describe(directory, metadata)

        attack(family, words, f".metadata with {name}")(make)
        return change

    return add


def _relocate(metadata: Any, **fields: Any) -> None:
    for place in metadata.storage_data.values():
        for name, value in fields.items():
            object.__setattr__(place, name, value)


@in_description("a file outside", "names a file outside of its directory")
def _(place: Place, metadata: Any) -> None:
    _relocate(metadata, relative_path=os.path.relpath(place.secret, place.path / "weights"))


@in_description("an absolute path", "names a file outside of its directory")
def _(place: Place, metadata: Any) -> None:
    _relocate(metadata, relative_path=str(place.secret))


@in_description("a negative place", "a size or place that cannot be")
def _(place: Place, metadata: Any) -> None:
    _relocate(metadata, offset=-8)


@in_description("a place beyond the end", "is truncated")
def _(place: Place, metadata: Any) -> None:
    _relocate(metadata, offset=2**62)


def _entry(metadata: Any, suffix: str) -> Any:
    return next(entry for name, entry in metadata.state_dict_metadata.items() if name.endswith(suffix))


@in_description("10^12 layers", "more than 10000 are not read")
def _(place: Place, metadata: Any) -> None:
    entry = _entry(metadata, "mlp.linear_fc1.weight")
    entry.size = torch.Size((10**12, *entry.size[1:]))


@in_description("more weights than the files hold", "contradicts itself: it describes")
def _(place: Place, metadata: Any) -> None:
    entry = _entry(metadata, "embedding.word_embeddings.weight")
    entry.size = torch.Size((10**12, entry.size[1]))


@in_description("a shape that is negative", "a size or place that cannot be")
def _(place: Place, metadata: Any) -> None:
    entry = _entry(metadata, "embedding.word_embeddings.weight")
    entry.size = (-1, entry.size[1])


@in_description("a layer without a name", "does not ask for")
def _(place: Place, metadata: Any) -> None:
    metadata.state_dict_metadata["module.decoder.layers."] = _entry(metadata, "final_layernorm.weight")


@in_description("an escape sequence in a name", r"\\x1b\]0;mark")
def _(place: Place, metadata: Any) -> None:
    metadata.state_dict_metadata["module.\x1b]0;mark\x07\nproblem"] = _entry(metadata, "final_layernorm.weight")


def _put(place: Place, content: bytes) -> None:
    """In place of the embedding, at the end of its file."""
    directory = place.path / "weights"
    metadata = described(directory)
    index = next(index for index in metadata.storage_data if index.fqn.endswith("word_embeddings.weight"))
    info = metadata.storage_data[index]
    file = directory / info.relative_path
    object.__setattr__(info, "offset", file.stat().st_size)
    object.__setattr__(info, "length", len(content))
    with open(file, "ab") as opened:
        opened.write(content)
    describe(directory, metadata)


NOT_SAVED = "it is not what torch.save writes"


@attack("nemo2", NOT_SAVED)
def weights_that_are_a_pickle(place: Place) -> None:
    _put(place, pickle.dumps(touch(place)))


@attack("nemo2", NOT_SAVED)
def weights_that_are_a_tar(place: Place) -> None:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as tar:
        tar.addfile(tarfile.TarInfo(str(place.mark)), io.BytesIO())
    _put(place, content.getvalue())


@attack("nemo2", "claim to be larger than it is")
def weights_that_are_a_bomb(place: Place) -> None:
    saved, bomb = io.BytesIO(), io.BytesIO()
    torch.save(torch.zeros(16), saved)
    with zipfile.ZipFile(saved) as source, zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as target:
        for part in source.namelist():
            target.writestr(part, bytes(2**27) if "/data/" in part else source.read(part))
    _put(place, bomb.getvalue())


@attack("nemo2", "cannot be read")
def weights_whose_pickle_calls(place: Place) -> None:
    saved = io.BytesIO()
    torch.save(touch(place), saved)
    _put(place, saved.getvalue())


@attack("nemo2", None)
def extra_state_that_calls(place: Place) -> None:
    directory = place.path / "weights"
    metadata = described(directory)
    content = pickle.dumps(touch(place))
    for index, info in metadata.storage_data.items():
        if "_extra_state" in index.fqn:
            with open(directory / info.relative_path, "r+b") as opened:
                opened.seek(info.offset)
                opened.write(content[: info.length])
    describe(directory, metadata)


@attack("nemo2", None)
def files_of_a_run_that_call(place: Place) -> None:
    """fiddle keeps what is no JSON as a pickle beside its graph; NeMo 2 loads both."""
    context = place.path / "context"
    (context / "0c0514d8-f838-4dc5-abac-298ae7919b79").write_bytes(pickle.dumps(touch(place)))
    leaf = {"type": "leaf", "value": "0c0514d8-f838-4dc5-abac-298ae7919b79", "paths": ["<root>"]}
    called = {"type": {"type": "pyref", "module": "os", "name": "system"}, "items": [["0", leaf]], "metadata": None}
    graph = {"root": {"type": "ref", "key": "x"}, "objects": {"x": called}, "refcounts": {}, "version": "0.0.1"}
    (context / "io.json").write_text(json.dumps(graph))
    torch.save(touch(place), place.path / "weights" / "common.pt")


# ------------------------------------------------------------------------------------------------ Megatron's args


def _args(place: Place, state: Any) -> None:
    iteration = next(place.path.glob("iter_*"))
    (iteration / "run_config.yaml").unlink()
    if isinstance(state, bytes):
        with zipfile.ZipFile(iteration / "common.pt", "w") as target:
            target.writestr("common/data.pkl", state)
    else:
        torch.save(state, iteration / "common.pt")


@attack("megatron", "has no num_attention_heads")
def args_that_call(place: Place) -> None:
    _args(place, {"args": {"num_layers": touch(place), "hidden_size": touch(place)}})


@attack("megatron", "refers to its parts too often")
def args_that_double_60_times(place: Place) -> None:
    _args(place, b"\x80\x02}X\x04\x00\x00\x00args}X\x0a\x00\x00\x00num_layers)" + b"2\x86" * 60 + b"ss.")


@attack("megatron", "no archive that torch.save writes")
def args_that_are_a_bomb(place: Place) -> None:
    _args(place, {})
    with zipfile.ZipFile(next(place.path.glob("iter_*/common.pt")), "w", zipfile.ZIP_DEFLATED) as target:
        target.writestr("common/data.pkl", b"N0" * 2**26 + b"N.")


@attack("megatron", "names a file outside of its directory")
def args_in_a_file_outside(place: Place) -> None:
    _args(place, {})
    iteration = next(place.path.glob("iter_*"))
    (iteration / "common.pt").unlink()
    metadata = described(iteration)
    info = next(iter(metadata.storage_data.values()))
    changed = type(info)(os.path.relpath(place.secret, iteration), 0, 16)
    metadata.storage_data[MetadataIndex("common_state/shard_0_1")] = changed
    describe(iteration, metadata)


@attack("megatron", None)
def state_of_a_run_that_calls(place: Place) -> None:
    for file in [*place.path.glob("*.pt"), *place.path.glob("iter_*/*.pt")]:
        torch.save(touch(place), file)


@attack("megatron", "is no whole|holds no whole|is used|no checkpoint", "a tracker of 5,000 digits")
def tracker(place: Place) -> None:
    (place.path / "latest_checkpointed_iteration.txt").write_text("9" * 5000)
    shutil.rmtree(next(place.path.glob("iter_*")))


# ------------------------------------------------------------------------------------------ configurations as text


def _configured(place: Place, **changes: Any) -> None:
    file = place.path / CONFIG
    file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | changes))


def _written(place: Place, text: str) -> None:
    with open(place.path / CONFIG, "a") as opened:
        opened.write(f"\n{text}\n")


@attack("nemo1", None)
def targets_in_the_configuration(place: Place) -> Path:
    target = {"_target_": "os.system", "_args_": [f"touch {place.mark}"], "command": f"touch {place.mark}"}
    _configured(place, optim=target, hooks=[target], train_ds=target)
    return archive(place)


@attack("nemo1", "target: os.system, which is no GPT")
def a_class_of_the_model(place: Place) -> Path:
    _configured(place, target="os.system")
    return archive(place)


@attack("nemo1", None)
def a_target_at_the_root(place: Place) -> None:
    _configured(place, _target_="os.system", command=f"touch {place.mark}")


@attack("nemo2", None)
def targets_in_model_yaml(place: Place) -> None:
    file = place.path / "context" / "model.yaml"
    config = yaml.safe_load(file.read_text())
    config["optim"] = {"_target_": "os.system", "command": f"touch {place.mark}"}
    file.write_text(yaml.safe_dump(config))


@attack("nemo2", "cannot be understood")
def a_list_for_the_configuration(place: Place) -> None:
    (place.path / "context" / "model.yaml").write_text("config: [1]\n")


@attack("nemo1", None)
def interpolations_that_reach_outside(place: Place) -> Path:
    outside = {
        "variable": f"${{oc.env:{VARIABLE}}}",
        "nested": f"${{oc.decode:${{oc.env:{VARIABLE}}}}}",
        "made": f"${{oc.create:{{a: ${{oc.env:{VARIABLE}}}}}}}",
        "ours": "${multiply:2, 3}",
    }
    node = yaml.safe_load((place.path / CONFIG).read_text())["tokenizer"] | {"sentencepiece_legacy": True}
    special = ["<new>", f"<${{oc.env:{VARIABLE}}}>"]
    _configured(
        place,
        optim=outside,
        seed=outside["variable"],
        tokenizer=node | {"special_tokens": special, "sentencepiece_legacy": True},
    )
    return archive(place)


LAUGHS = "\n".join(
    ["laugh0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    + [f"laugh{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)]
)
MERGES = "\n".join(
    ["merge0: &m0 {k0: 1}"] + [f"merge{n}: &m{n} {{<<: [*m{n - 1}, *m{n - 1}], k{n}: 1}}" for n in range(1, 40)]
)
DOUBLING = "\n".join(["double0: lol"] + [f'double{n}: "${{double{n - 1}}}${{double{n - 1}}}"' for n in range(1, 60)])

for name, text, words in (
    ("aliases of aliases", LAUGHS, "more than 200000 values"),
    ("merged aliases", MERGES, "more than 200000 values"),
    ("an alias to what it stands in", "own: &own [*own]", "an alias to what it stands in"),
    ("a depth of 100", "deep: " + "[" * 100 + "]" * 100, "nested more than 64 deep"),
    ("a depth of 100,000", "deep: " + "[" * 100_000, "nested more than 64 deep"),
    ("code", "code: !!python/object/apply:os.system ['touch {mark}']", "could not determine a constructor"),
    ("a number of 100,000 digits", "num_layers_: " + "9" * 100_000, "a number of 100000 digits"),
    ("a key twice", "num_layers: 7", "it gives num_layers twice"),
    ("3 MiB", "long: " + "x" * 3 * 2**20, "larger than 2 MiB"),
):

    @attack("nemo1", words, f"a configuration with {name}")
    def yaml_bomb(place: Place, text: str = text) -> None:
        _written(place, text.replace("{mark}", str(place.mark)))


@attack("nemo1", None, "a configuration with text that doubles 60 times")
def doubling(place: Place) -> None:
    _written(place, DOUBLING)


for name, changes, words in (
    ("2^30 layers", {"num_layers": 2**30}, "holds no tensor"),
    ("10^12 layers", {"num_layers": 10**12}, "says num_layers: 1000000000000"),
    ("a list for a number", {"rotary_base": [1]}, r"says rotary_base: \[1\]"),
    ("a mapping for a name", {"activation": {"a": 1}}, "says activation: "),
    ("a number beyond all floats", {"rotary_base": 10**350}, "a number of 351 digits"),
):

    @attack("nemo1", words, f"a configuration with {name}")
    def wrong_kind(place: Place, changes: dict[str, Any] = changes) -> None:
        _configured(place, **changes)


# ----------------------------------------------------------------------------------------------------- tokenizers

for name, node, words in (
    ("a path out of the archive", {"library": "sentencepiece", "model": "nemo:{relative}"}, "is not there"),
    ("an absolute path in the archive", {"library": "sentencepiece", "model": "nemo:{secret}"}, "is not there"),
    ("a secret for its model", {"library": "sentencepiece", "model": "{secret}"}, "cannot be loaded"),
    ("a secret for its vocabulary", {"library": "tiktoken", "vocab_file": "{secret}"}, "cannot be loaded"),
    ("a secret for its directory", {"library": "huggingface", "type": "{secret}"}, "cannot be loaded"),
    ("a name of 5,000 bytes", {"library": "sentencepiece", "model": "x" * 5000}, "is not there"),
    ("a list for its name", {"library": "sentencepiece", "model": ["x"]}, "does not say which tokenizer"),
    (
        "10^12 special tokens",
        {"library": "tiktoken", "vocab_file": "{secret}", "num_special_tokens": 10**12},
        "does not say which tokenizer",
    ),
    (
        "files for special tokens",
        {"library": "huggingface", "type": "nobody/nothing", "special_tokens": {"vocab_file": "{secret}"}},
        "special token vocab_file",
    ),
):

    @attack("nemo1", words, f"a tokenizer with {name}")
    def tokenizer(place: Place, node: dict[str, Any] = node) -> Path:
        relative = "../" * 12 + str(place.secret).lstrip("/")
        filled = json.loads(json.dumps(node).replace("{secret}", str(place.secret)).replace("{relative}", relative))
        _configured(place, tokenizer=filled)
        return archive(place)


def _settings(place: Place, **changes: Any) -> None:
    file = place.path / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@attack("hf", None)
def code_of_a_tokenizer(place: Place) -> None:
    code = f"import os\nos.system('touch {place.mark}')\nclass Evil: ...\n"
    (place.path / "evil.py").write_text(code)
    _settings(place, auto_map={"AutoTokenizer": ["evil.Evil", "evil.Evil"]}, trust_remote_code=True)
    config = place.path / "config.json"
    auto_map = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}
    config.write_text(json.dumps(json.loads(config.read_text()) | {"auto_map": auto_map}))


@attack("hf", None)
def a_vocabulary_elsewhere(place: Place) -> None:
    _settings(place, vocab_file=str(place.secret), merges_file=str(place.secret), spm_file=str(place.secret))


@attack("hf", "is a link to outside")
def a_link_to_a_secret_beside_the_tokenizer(place: Place) -> None:
    (place.path / "tokenizer_more.model").symlink_to(place.secret)


@attack("hf", "cannot be read")
def settings_100_000_deep(place: Place) -> None:
    (place.path / "tokenizer_config.json").write_text("[" * 100_000)


@attack("hf", "nested more than 64 deep")
def a_config_100_000_deep(place: Place) -> None:
    (place.path / "config.json").write_text('{"a":' * 100_000)


@attack("hf", "nested more than 64 deep")
def a_config_100_deep(place: Place) -> None:
    (place.path / "config.json").write_text('{"a":' * 100 + "1" + "}" * 100)


@attack("hf", "a number of 10000 digits")
def a_number_of_10_000_digits(place: Place) -> None:
    (place.path / "config.json").write_text('{"rope_theta": ' + "9" * 10_000 + "}")


@attack("hf", "holds no tensor")
def ten_to_the_12_layers(place: Place) -> None:
    config = json.loads((place.path / "config.json").read_text()) | {"num_hidden_layers": 10**12}
    (place.path / "config.json").write_text(json.dumps(config))


@attack("hf", "is missing, which model.safetensors.index.json names")
def an_index_that_names_a_file_outside(place: Place) -> None:
    weights = place.path / "model.safetensors"
    weights.rename(place.outside / "outside.safetensors")
    (place.path / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"x": os.path.relpath(place.outside / "outside.safetensors", place.path)}})
    )


@attack("hf", "truncated or damaged")
def a_header_of_a_terabyte(place: Place) -> None:
    (place.path / "model.safetensors").write_bytes(struct.pack("<Q", 2**40) + b"{}")


@attack("hf", "pytorch_model.bin only, which is not read")
def weights_as_a_pickle(place: Place) -> None:
    (place.path / "model.safetensors").unlink()
    torch.save(touch(place), place.path / "pytorch_model.bin")


@attack("hf", "is a directory, but no checkpoint")
def a_version_outside_of_the_cache(place: Place) -> Path:
    cache = place.path.parent / "models--a--b"
    (cache / "refs").mkdir(parents=True)
    (cache / "snapshots").mkdir()
    (cache / "refs" / "main").write_text(f"../../{place.path.name}")
    return cache


# ------------------------------------------------------------------------------------------------------------ zarr


def _array(place: Place, **changes: Any) -> None:
    file = next((place.path / "model_weights").glob("*word_embeddings.weight/.zarray"))
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


for name, changes, words in (
    ("10^12 rows", {"shape": [10**12, 16]}, "contradicts itself: it describes"),
    ("a chunk of a terabyte", {"chunks": [2**40, 16], "compressor": {"id": "zlib", "level": 1}}, "does not describe"),
    ("objects", {"dtype": "|O", "filters": [{"id": "pickle", "protocol": 5}]}, r"as \|O, which is not supported"),
    ("a list for its dtype", {"dtype": [["x", "<f4"]]}, "which is not supported"),
    ("chunks elsewhere", {"dimension_separator": "/../../"}, "is missing"),
):

    @attack("zarr", words, f"an array with {name}")
    def zarr_array(place: Place, changes: dict[str, Any] = changes) -> None:
        _array(place, **changes)
