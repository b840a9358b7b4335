from __future__ import annotations

import argparse
import enum
import os
import pickle
import sys
import types
import zipfile
from collections import OrderedDict, defaultdict
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_spin.errors import CheckpointError
from nemo_spin.model_io.stores.common_state import StandIn, member_of, read_common_state


class Kind(enum.Enum):
    GPT = 1


class Victim:
    mark: int | None = None


def read(directory: Path, state: Any) -> Any:
    torch.save(state, directory / "common.pt")
    return read_common_state(directory, "ckpt")


def test_what_a_training_run_stores(tmp_path: Path) -> None:
    args = argparse.Namespace(
        num_layers=2,
        norm_epsilon=1e-6,
        params_dtype=torch.bfloat16,
        model_type=Kind.GPT,
        save=Path("/models/run"),
        init_method=torch.nn.init.normal_,
        spec=None,
        cp_comm_type=["p2p"],
    )
    state = {
        "args": args,
        "iteration": 1000,
        "optimizer": {"param_groups": [{"lr": 1e-5, "step": torch.tensor(3)}], "again": args},
        "sizes": torch.Size([2, 3]),
        "ordered": OrderedDict(a=1),
        "counted": defaultdict(int, b=2),
        "tags": {"x"},
    }
    found = read(tmp_path, state)
    assert found["iteration"] == 1000
    assert found["args"]["num_layers"] == 2
    assert found["args"]["norm_epsilon"] == 1e-6
    assert found["args"]["params_dtype"] is torch.bfloat16
    assert found["args"]["save"] == "/models/run"
    assert found["args"]["cp_comm_type"] == ["p2p"]
    assert found["args"]["spec"] is None
    assert member_of(found["args"]["model_type"]) in (1, "GPT")
    assert found["args"]["init_method"].qualified == "torch.nn.init.normal_"
    assert found["optimizer"]["again"] is found["args"]
    assert found["optimizer"]["param_groups"][0]["lr"] == 1e-5
    assert isinstance(found["optimizer"]["param_groups"][0]["step"], StandIn)
    assert (found["sizes"], found["ordered"], found["counted"]) == ((2, 3), {"a": 1}, {"b": 2})
    assert found["tags"] == ("x",)


def test_classes_that_exist_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = types.ModuleType("a_training_code")
    gone.__dict__.update(
        Callback=type("Callback", (), {"__module__": gone.__name__}),
        Settings=type("Settings", (dict,), {"__module__": gone.__name__}),
        Mode=enum.Enum("Mode", {"fast": "f"}, module=gone.__name__),
    )
    monkeypatch.setitem(sys.modules, gone.__name__, gone)
    callback = gone.Callback()
    callback.every = 7
    settings = gone.Settings(depth=3)
    args = argparse.Namespace(callback=callback, settings=settings, mode=gone.Mode.fast, bound=partial(print, 1))
    torch.save({"args": args}, tmp_path / "common.pt")
    monkeypatch.delitem(sys.modules, gone.__name__)
    found = read_common_state(tmp_path, "ckpt")["args"]
    assert (found["callback"].qualified, found["callback"].state) == ("a_training_code.Callback", {"every": 7})
    assert ("depth", 3) in found["settings"].items
    assert member_of(found["mode"]) in ("f", "fast")
    assert found["bound"].qualified == "functools.partial"


class Calls:
    """Unpickled by ordinary means, it calls."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def attacks(mark: Path) -> dict[str, Any]:
    code, system = f"open({str(mark)!r}, 'w').close()", Calls(os.system, f"touch {mark}")
    return {
        "os.system": system,
        "eval": Calls(eval, code),
        "exec": Calls(exec, code),
        "deep in args": argparse.Namespace(deep=[{"key": (system,)}]),
        "as a key": {system: 1},
        "a method": Calls(Path.touch, mark),
        "in a default dict": defaultdict(list, {1: system}),
    }


@pytest.mark.parametrize("name", attacks(Path()))
def test_nothing_is_called(tmp_path: Path, name: str) -> None:
    mark = tmp_path / "mark"
    read(tmp_path, {"args": attacks(mark)[name]})
    assert not mark.exists()
    # It is an attack: by ordinary means it leaves its mark.
    torch.load(tmp_path / "common.pt", weights_only=False)
    assert mark.exists()


def write_pickle(directory: Path, content: bytes) -> None:
    with zipfile.ZipFile(directory / "common.pt", "w") as archive:
        archive.writestr("common/data.pkl", content)


def test_what_is_called_may_be_the_result_of_a_call(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    chain = b"cbuiltins\ngetattr\n(cbuiltins\n__import__\n(Vos\ntRVsystem\ntR(Vtouch %b\ntR" % str(mark).encode()
    write_pickle(tmp_path, b"(Vargs\n" + chain + b"d.")
    read_common_state(tmp_path, "ckpt")
    assert not mark.exists()
    pickle.loads(chain + b".")
    assert mark.exists()


def test_no_class_of_others_is_changed(tmp_path: Path) -> None:
    # Filling a class, not an instance of it, with the state (None, {"mark": 1}) sets an attribute for everybody.
    fill = b"c%b\n%b\n(N(Vmark\nI1\ndtb."
    write_pickle(tmp_path, fill % (b"argparse", b"Namespace"))
    with pytest.raises(CheckpointError):
        read_common_state(tmp_path, "ckpt")
    assert not hasattr(argparse.Namespace, "mark")
    Victim.mark = None
    pickle.loads(fill % (__name__.encode(), b"Victim"))
    assert Victim.mark == 1


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut off", b"\x80\x02}q\x00."])
def test_damage(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "common.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"^ckpt: .*common\.pt cannot be read .* damaged"):
        read_common_state(tmp_path, "ckpt")


def test_no_state_of_a_run(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds a str"):
        read(tmp_path, "hello")
    write_pickle(tmp_path, b"(l" * 100_000 + b"a" * 99_999 + b".")
    with pytest.raises(CheckpointError, match="RecursionError"):
        read_common_state(tmp_path, "ckpt")
