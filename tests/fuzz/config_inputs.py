"""Configurations, overrides and YAML files: the shipped ones with anything at any key, and what is hardly YAML."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

from hypothesis import strategies as st
from omegaconf import OmegaConf

from nemo_spin.config import config_dir
from nemo_spin.config.aligner.table import TABLE
from nemo_spin.config.keys import KEYS

GIVEN = {
    "pretrained_checkpoint.restore_from_path": "sft.nemo",
    "model.data.train_ds.file_path": "train.jsonl",
    "model.data.validation_ds.file_path": "validation.jsonl",
}
SHIPPED = OmegaConf.to_container(OmegaConf.load(config_dir() / "gpt_spin.yaml"))
ALL_KEYS = sorted({f"{section}.{name}".lstrip(".") for section, names in KEYS.items() for name in names} | {*TABLE})
_ODD_KEYS = [
    "",
    " ",
    ".",
    "a.b",
    "modle",
    "lr ",
    "\ud800",
    "\0",
    "é",
    "__class__",
    "_target_",
    "???",
    "${model}",
    "x" * 300,
]
_TEXTS = [
    "", " ", "???", "null", "true", "1", "1e-4", "nan", "inf", "-1", "0x10", "${", "${}", "${nowhere}", "${model}",
    "${model.seed}",
    "${.seed}", "${..spin}", "${oc.env:HOME}", "${oc.env:NOWHERE_AT_ALL}", "${oc.decode:'['}", "${oc.create:{a: 1}}",
    "${int_div:1,0}", "${int_div:a,2}", "${int_div:1}", "${multiply:ab,99999999999}", "${multiply:1e308,1e308}",
    "${multiply:${model.seed},${model.seed}}", "${unknown:1}", "${hydra:runtime.cwd}", "${model.optim.lr}",
    "\\${model.seed}",
    "{input} {output}", "{output}", "{input", "}{", "{output}{output}", "\\ud800{output}", "\ud800", "\0", "\n",
    "\x1b[2J", "\u202e",
    "00:00:00:01", "99999999999999999999:0:0:0", "\u0663:\u0660:\u0660:\u0661", "00:00:00:00", "1:2:3:-4",
    "CosineAnnealing", "FULL", "val/loss", "max",
    "truncate", "drop", "input", "input,output", ",", "gpu", "fp32", "tiktoken", "adam", "x" * 5000,
]  # fmt: skip
_NUMBERS = [
    0, 1, -1, 2, 3, 7, 64, 128, 2**31, 2**63 - 1, 2**63, -(2**63), 10**30, 10**400, 0.0, -0.0, 0.5, 1.0, 1e-300,
    1e308, float("nan"), float("inf"), -float("inf"), True, False, 10**7, 10**12,
]  # fmt: skip
_SCALARS = st.one_of(
    st.none(), st.sampled_from(_NUMBERS), st.sampled_from(_TEXTS), st.integers(-3, 300), st.text(max_size=4)
)
_SOUND = [
    None,
    True,
    False,
    0,
    1,
    2,
    4,
    64,
    128,
    -1,
    0.0,
    0.5,
    1.0,
    1e-4,
    [0.1, 0.2],
    ["a"],
    "a",
    "a.jsonl",
    "full",
    "drop",
    "cpu",
]
_RARE = st.sampled_from(
    [b"\x01\x02", b"", (), {}, [], [[]], [None], {"a": None}, {1: 2}, {None: 1}, {True: 1}, {b"k": 1}, {1.5: 1}]
)
VALUES = st.recursive(
    _SCALARS | _RARE,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from([*_ODD_KEYS, "lr", "name", 1, True, b"k", 2.5]), inner, max_size=3)
    ),
    max_leaves=6,
)


ANYTHING = st.sampled_from(_SOUND) | VALUES


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


def put(cfg: Any, key: str, value: Any) -> None:
    *sections, name = key.split(".")
    for section in sections:
        if not isinstance(cfg.get(section), dict):
            cfg[section] = {}
        cfg = cfg[section]
    cfg[name] = value


# what is at the edge of a range, or of another type, alone and in lists
EDGES = [
    *_NUMBERS,
    "",
    "???",
    "1",
    "\0",
    "\ud800",
    "\n",
    b"\x01",
    [],
    {},
    {1: 2},
    [None],
    ["", "a"],
    [["a"]],
    [True, False],
]
EDGES += [wrapped for number in _NUMBERS for wrapped in ([number], [number, 0.5])]
READ_KEYS = sorted({f"{section}.{name}" for section, names in KEYS.items() for name in names if section} - {*KEYS})
# one key, and anything as its value
SETTINGS = st.tuples(st.sampled_from([key for key in ALL_KEYS if key not in KEYS]), ANYTHING)


@st.composite
def configurations(draw: st.DrawFn) -> Any:
    """The shipped configuration with a few keys set to anything, missing, or more."""
    cfg = deepcopy(SHIPPED)
    for key, value in GIVEN.items():
        put(cfg, key, value)
    if draw(st.integers(0, 30)) == 0:
        return draw(VALUES)
    for _ in range(draw(st.sampled_from([1, 1, 2, 3]))):
        match draw(st.integers(0, 15)):
            case 0:
                put(cfg, draw(st.sampled_from(ALL_KEYS)), nested(draw(st.sampled_from([20, 200, 2000]))))
            case 1:
                section = draw(st.sampled_from(sorted(KEYS)))
                node = cfg
                for name in filter(None, section.split(".")):
                    node = node.get(name) if isinstance(node, dict) else None
                if isinstance(node, dict):
                    node[draw(st.sampled_from([*_ODD_KEYS, 1, 2.5, True, b"k", None]))] = draw(VALUES)
            case 2:
                key = draw(st.sampled_from(ALL_KEYS))
                put(cfg, key, "${" + draw(st.sampled_from([key, key.rpartition(".")[0] or key, *ALL_KEYS])) + "}")
            case 3:
                put(cfg, draw(st.sampled_from(ALL_KEYS)), None)
            case _:
                put(cfg, draw(st.sampled_from(ALL_KEYS)), draw(ANYTHING))
    return cfg


_PARTS = st.sampled_from(
    ["", "[", "]", "{", "}", "'", '"', "\\", "${", "}", ",", ":", "=", "a", "1", "1e-4", "null", " ", "\t", "é",
    "\ud800", "\udcff", "@",
     "~", "+", "++", "/", "-", "--", "glob(*)", "choice(1,2)", "sort(", "extend_list(1)", "[" * 200,
     "${model.seed}", "${oc.env:HOME}"]
)  # fmt: skip
_ODD_VALUES = st.lists(_PARTS, max_size=4).map("".join) | st.sampled_from([text for text in _TEXTS if "\0" not in text])
_SOUND_VALUES = st.sampled_from(
    ["1", "2", "64", "0.5", "true", "false", "null", "cpu", "[0.1]", "a.jsonl", "'a b'", "{}", "[]"]
)
_OVERRIDE_KEYS = st.sampled_from(ALL_KEYS) | st.sampled_from(
    ["hydra.run.dir", "hydra", "model", "a.b", "model..lr", ".", "model.", "é.é"]
)
_SOUND_OVERRIDE = st.builds(
    "{}{}={}".format,
    st.sampled_from(["", "+", "++"]),
    st.sampled_from(ALL_KEYS),
    _SOUND_VALUES | _SOUND_VALUES | _ODD_VALUES,
)
_ODD_OVERRIDE = st.builds(
    "{}{}{}{}".format,
    st.sampled_from(["", "+", "++", "~", "-", "--"]),
    _OVERRIDE_KEYS,
    st.sampled_from(["=", "", "@a=", "=="]),
    _SOUND_VALUES | _ODD_VALUES,
)
OVERRIDES = st.lists(
    st.one_of(_SOUND_OVERRIDE, _SOUND_OVERRIDE, _SOUND_OVERRIDE, _ODD_OVERRIDE), min_size=1, max_size=2
)


FILES = st.one_of(
    st.binary(max_size=60),
    st.sampled_from(
        [b"a: " + b"9" * 5000, b"a: 0x" + b"f" * 5000, b"[" * 2000, b"? : 1", b"null: 1", b"- a", b"a: &a [*a]",
        b"a: !!python/name:os.system",
         b"\xff\xfea\0", b"a: b: c", b"a: 2001-01-01", b"a: 2001-99-99", b"a: !!binary x", b"\ta: 1",
         b"defaults: [nowhere]",
         b"defaults: 3", b"model: [1]", b"model: 3", b"trainer:", b"", b"a: '\\ud800'", b'a: "\\ud800"', b"1: 2",
         b"${a}: 1", b"<<: 3", b"=: 1"]
    ),
)  # fmt: skip
