"""Writes conf/gpt_spin.yaml and docs/configuration.md from the declarations of the settings in nemo_spin/config/.

    python docs/make_configuration.py

What is accepted for NeMo-Aligner's sake comes from nemo_spin/config/aligner/table.py.
"""

from __future__ import annotations

import ast
import inspect
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import is_dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from textwrap import dedent, wrap
from typing import Any, get_args, get_origin

from nemo_spin.config import config_dir
from nemo_spin.config.aligner.table import TABLE
from nemo_spin.config.keys import DECLARED, KEYS
from nemo_spin.config.parse import defaults
from nemo_spin.config.reading import at
from nemo_spin.config.schema import SpinConfig
from nemo_spin.config.settings import Part, Section, all_parts

PAGE = Path(__file__).resolve().parent / "configuration.md"
WIDTH = 120

HEAD = """\
# SPIN on a NeMo SFT checkpoint. The layout and the names are NeMo-Aligner's.
#
# Four values have to be given:
#   pretrained_checkpoint.restore_from_path, model.data.train_ds.file_path,
#   model.data.validation_ds.file_path (or null for no validation), exp_manager.explicit_log_dir
# Steps are optimizer steps, batches are global batches, lengths are tokens, batch sizes are pairs of a human response
# and a generated one. Unknown keys are refused.
#
# Made by docs/make_configuration.py from the declarations in nemo_spin/config/.
"""
INTRODUCTION = """\
# Configuration

Made by `docs/make_configuration.py` from the declarations in `nemo_spin/config/`, like
[conf/gpt_spin.yaml](../conf/gpt_spin.yaml). To change this page, change those and run it again.

A key is set on the command line, as in `nemo-spin train model.spin.ref_policy_kl_penalty=0.1`, or in a file of your own
that begins like [conf/gpt_spin_tiny.yaml](../conf/gpt_spin_tiny.yaml), found with `--config-path` and `--config-name`.
Lists are quoted for the shell, `'model.optim.lr=[5e-7,5e-7,1e-7]'`, and texts with spaces, braces or colons for hydra
too, `'model.data.train_ds.prompt_template="Q: {input} A: {output}"'`. `nemo-spin train --cfg job` prints the whole
configuration. An unknown key is refused, and the nearest known one named. A key that a file lacks has its default.
"""
ALIGNER = """\
## Keys of NeMo-Aligner

A configuration of NeMo-Aligner's SPIN is taken as it is, file and overrides. Its keys are those above, those here, or
refused with the reason. `nemo-spin doctor --config FILE` says which is which for a file of yours. A parallel size that
the file lacks is null, and so the checkpoint's.

These are translated, and a run says so when it begins:
"""
RENAMED = """\
These are refused, because they meant something slightly different:
"""
UNREAD_KEYS = """\
These are not read. With the values in the second column, or null, the result is what they ask for. What becomes of
other values is said in the third: they are noted when a run begins, or refused.
"""
_TOP = ("trainer", "exp_manager", "pretrained_checkpoint", "model")
_TYPES_FOR_PEOPLE = {bool: "true or false", int: "whole number", float: "number", str: "text", Mapping: "mapping"}


@cache
def _docs(cls: type) -> dict[str, str]:
    """Field -> the text below its declaration, of a dataclass and those that it inherits from."""
    inherited = {field: doc for base in cls.__bases__ if is_dataclass(base) for field, doc in _docs(base).items()}
    (body,) = (node.body for node in ast.parse(dedent(inspect.getsource(cls))).body if isinstance(node, ast.ClassDef))
    own = {
        field.target.id: " ".join(below.value.value.split())
        for field, below in pairwise(body)
        if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
    }
    return inherited | own


def doc_of(part: Part) -> str:
    """What a key or a section means; "" for a section without a word."""
    return _docs(part.owner).get(part.field, "")


SECTIONS = {
    part.key: doc_of(part) for part, _ in all_parts(SpinConfig) if isinstance(part.declared, Section) and doc_of(part)
}


def yaml_text() -> str:
    """conf/gpt_spin.yaml."""
    return "\n".join([HEAD, *(line for name in _TOP for line in [*_yaml_section(name), ""])]).rstrip() + "\n"


def page() -> str:
    """docs/configuration.md."""
    parts = [INTRODUCTION]
    for section in (key for name in _TOP for key in _sections_below(name)):
        rows = [
            (f"`{key.rpartition('.')[2]}`", _type(part), _default(part), _escaped(doc_of(part)))
            for key, part in _leaves(section)
        ]
        prose = f"{_escaped(SECTIONS[section])}\n\n" if section in SECTIONS else ""
        if rows:
            parts.append(f"## `{section}`\n\n{prose}{_table(('key', 'type', 'default', 'meaning'), rows)}")
    unread = _table(("keys", "fine", "other values are", "because"), _unread_rows())
    renamed = [(f"`{key}`", f"`{entry.target}`") for key, entry in TABLE.items() if not entry.is_taken]
    parts += [ALIGNER, _table(("key", "becomes"), _translated_rows()), RENAMED]
    return "\n".join([*parts, _table(("key", "use"), renamed), UNREAD_KEYS, unread])


def _leaves(section: str) -> list[tuple[str, Part]]:
    """The settings of a section, in the order in which they are declared."""
    return [(key, part) for key, part in DECLARED.items() if key.rpartition(".")[0] == section]


def _sections_below(section: str) -> Iterator[str]:
    """A section and those in it, in the order in which they are declared."""
    yield section
    inside = (key.removeprefix(f"{section}.") for key in DECLARED if key.startswith(f"{section}."))
    for name in dict.fromkeys(key.partition(".")[0] for key in inside):
        if f"{section}.{name}" in KEYS:
            yield from _sections_below(f"{section}.{name}")


def _yaml_section(section: str) -> Iterator[str]:
    """The lines of a section: its keys with their comments in a column, then the sections in it."""
    indent = "  " * section.count(".")
    if doc := SECTIONS.get(section):
        yield from (f"{indent}# {line}" for line in wrap(doc, WIDTH - len(indent) - 2, break_on_hyphens=False))
    yield f"{indent}{section.rpartition('.')[2]}:"
    yield from _yaml_leaves(section, indent + "  ")
    leaves = bool(_leaves(section))
    for below in _sections_below(section):
        if below.rpartition(".")[0] == section:
            if leaves:
                yield ""
            leaves = True
            yield from _yaml_section(below)


def _yaml_leaves(section: str, indent: str) -> Iterator[str]:
    lines = []
    for key, part in _leaves(section):
        name, value = key.rpartition(".")[2], at(defaults(), key)
        doc = "" if _reference(part) else doc_of(part)
        is_block = isinstance(value, Mapping)
        lines.append((f"{indent}{name}:" if is_block else f"{indent}{name}: {_scalar(value)}", doc))
        if is_block:
            lines += [(f"{indent}  {inner}: {_scalar(of_inner)}", "") for inner, of_inner in value.items()]
    column = max((len(code) for code, doc in lines if doc), default=0) + 1
    for code, doc in lines:
        first, *further = wrap(doc, WIDTH - column - 4, break_on_hyphens=False) or [""]
        yield f"{code:<{column}}# {first}" if first else code
        yield from (f"{'':<{column}}#   {line}" for line in further)


def _scalar(value: Any) -> str:
    if isinstance(value, float):
        return re.sub(r"e-0", "e-", repr(value))
    if isinstance(value, str) and re.fullmatch(r"[A-Za-z_][\w./-]*|\$\{[\w.]+\}", value):
        return value
    return json.dumps(value)


def _type(part: Part) -> str:
    declared, kind = part.declared, part.type
    is_null = (part.is_optional or declared.default is None) and not declared.is_required
    if declared.words:
        return declared.words + (" or null" if is_null else "")
    item = get_args(kind)[0] if get_origin(kind) is tuple else get_origin(kind) or kind
    if declared.choices:
        words = "one of " + ", ".join(f"`{choice}`" for choice in declared.choices)
    elif set(get_args(kind)) == {int, float}:
        return f"whole number, at least {declared.minimum or 0}, or fraction"
    else:
        words = _TYPES_FOR_PEOPLE[item]
        if get_origin(kind) is tuple and not declared.per_iteration:
            words = f"list of {words}s"
        if declared.per_iteration:
            words = f"{words} or list of {words}s"
    limits = (declared.minimum, declared.above, declared.maximum, declared.below)
    for name, limit in zip(("at least", "above", "at most", "below"), limits, strict=True):
        words += "" if limit is None else f", {name} {limit:g}"
    return f"{words}{',' if ', ' in words else ''} or null" if is_null else words


def _default(part: Part) -> str:
    if part.declared.is_required:
        return "to be given" if not part.declared.words.endswith("null") else "`null`"
    if reference := _reference(part):
        return f"the same as `{reference}`"
    value = at(defaults(), part.key)
    is_plain = isinstance(value, str) and value.isprintable()
    return f"`{value if is_plain else _scalar(value)}`"


def _escaped(text: str) -> str:
    return text.replace("$", "\\$")


def _reference(part: Part) -> str | None:
    """The key whose value is the default."""
    found = re.fullmatch(r"\$\{([\w.]+)\}", str(at(defaults(), part.key)))
    return found[1] if found else None


def _translated_rows() -> Iterator[tuple[str, str]]:
    for key, entry in TABLE.items():
        if entry.target and entry.is_taken:
            yield f"`{key}`", f"`{entry.target}`" + (", where that is null" if key == "trainer.max_time" else "")
    for dataset in ("train_ds", "validation_ds"):
        yield (
            f"`model.data.{dataset}.truncation_field`",
            f"`model.data.{dataset}.overlong: truncate` as well, where that is null and `model.data.chat` is not true",
        )


def _unread_rows() -> Iterator[tuple[str, ...]]:
    """Keys for which the same is so share a row."""
    groups: dict[tuple[str, str, str], list[str]] = {}
    for key, entry in TABLE.items():
        if entry.target is None:
            groups.setdefault((entry.agrees.words, entry.refused.words, entry.reason), []).append(f"`{key}`")
    for words, keys in groups.items():
        yield ", ".join(keys), *words


def _table(titles: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [titles, ("---",) * len(titles), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


if __name__ == "__main__":
    (config_dir() / "gpt_spin.yaml").write_text(yaml_text(), encoding="utf-8")
    PAGE.write_text(page(), encoding="utf-8")
