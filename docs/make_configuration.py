"""Writes docs/configuration.md, the reference of all configuration keys, from conf/gpt_spin.yaml and the code.

    python docs/make_configuration.py

Keys, defaults and explanations are the YAML's; types come from the schema in nemo_spin/config/, and what is accepted
for NeMo-Aligner's sake from nemo_spin/config/aligner/translate.py and unread.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import yaml

from nemo_spin.config import algorithm, config_dir, schema
from nemo_spin.config.aligner.translate import TRANSLATED
from nemo_spin.config.aligner.unread import UNREAD
from nemo_spin.config.keys import KEYS

PAGE = Path(__file__).resolve().parent / "configuration.md"

INTRODUCTION = """\
# Configuration

Made by `docs/make_configuration.py` from [conf/gpt_spin.yaml](../conf/gpt_spin.yaml) and the code. To change this page,
change those and run it again.

A key is set on the command line, as in `nemo-spin train model.spin.ref_policy_kl_penalty=0.1`, or in a file of your own
that begins like [conf/gpt_spin_tiny.yaml](../conf/gpt_spin_tiny.yaml), found with `--config-path` and `--config-name`.
Lists are quoted for the shell, `'model.optim.lr=[5e-7,5e-7,1e-7]'`, and texts with spaces, braces or colons for hydra
too, `'model.data.train_ds.prompt_template="Q: {input} A: {output}"'`. `nemo-spin train --cfg job` prints the whole
configuration. An unknown key is refused, and the nearest known one named.
"""
ALIGNER = """\
## Keys of NeMo-Aligner

A configuration of NeMo-Aligner's SPIN is taken as it is, file and overrides. Its keys are those above, those here, or
refused with the reason. `nemo-spin doctor --config FILE` says which is which for a file of yours.

These are translated, and a run says so when it begins:
"""
UNREAD_KEYS = """\
These are not read. With the values in the second column, or null, the result is what they ask for. What becomes of
other values is said in the third: they are noted when a run begins, or refused.
"""
# keys without a default in the YAML, and what they are for
WITHOUT_DEFAULT = {
    **dict.fromkeys(
        ("summary_writer_kwargs", "log_local_rank_0_only", "log_global_rank_0_only", "files_to_copy"),
        "passed on to NeMo's `exp_manager`",
    ),
    **dict.fromkeys(
        ("add_BOS", "all_probs", "compute_logprob", "add_sep"),
        "NeMo-Aligner's; only false is supported",
    ),
}

_SECTION_TYPES: dict[str, tuple[type, ...]] = {
    "trainer": (schema.ParallelConfig,),
    "trainer.spin": (schema.LoopConfig,),
    "trainer.spin.stop_at_equilibrium": (schema.EquilibriumConfig,),
    "exp_manager.checkpoint_callback_params": (schema.CheckpointConfig,),
    "model": (schema.ParallelConfig, schema.SpinConfig),
    "model.spin": (algorithm.AlgorithmConfig, algorithm.LossConfig),
    "model.spin.sampling_params": (algorithm.SamplingParams,),
    "model.spin.length_params": (algorithm.LengthParams,),
    "model.spin.guards": (algorithm.GuardsConfig,),
    "model.optim": (schema.OptimConfig,),
    "model.optim.sched": (schema.SchedConfig,),
    "model.data.train_ds": (schema.DatasetConfig,),
    "model.data.validation_ds": (schema.DatasetConfig,),
}
_OTHER_NAMES = {"reset_optimizer_each_iteration": "reset_optimizer"}
_TYPES_FOR_PEOPLE = {bool: "true or false", int: "whole number", float: "number", str: "text"}
_TO_BE_GIVEN = ("pretrained_checkpoint.restore_from_path", "model.data.train_ds.file_path")


@dataclass
class Entry:
    """A key of the YAML. default: its value, interpolations as they are written; a mapping makes it a section."""

    path: str
    default: Any
    comments: list[str] = field(default_factory=list)

    @property
    def is_section(self) -> bool:
        return isinstance(self.default, dict)

    @property
    def section(self) -> str:
        return self.path.rpartition(".")[0]

    @property
    def name(self) -> str:
        return self.path.rpartition(".")[2]


def read(text: str) -> list[Entry]:
    """The keys of a YAML file with their comments, in its order.

    A comment beside a key, which lines below it may continue in the same column, explains that key. One in lines of its
    own explains the key that follows or, as a section's first line, that section. The head of the file is left out.
    """
    defaults = yaml.safe_load(text)
    entries: list[Entry] = []
    parents: list[tuple[int, str]] = []
    above: list[str] = []
    column = -1
    for line in text.splitlines():
        code, comment = _without_comment(line)
        if not code.strip():
            if comment and len(code) == column:
                entries[-1].comments[-1] += f" {comment}"
            elif comment and entries:
                above.append(comment)
            continue
        indent = len(code) - len(code.lstrip())
        parents = [(depth, name) for depth, name in parents if depth < indent]
        parents.append((indent, code.partition(":")[0].strip()))
        names = [name for _, name in parents]
        entry = Entry(".".join(names), _value(defaults, names))
        if above:
            explained = entries[-1] if entries[-1].is_section else entry
            explained.comments.append(" ".join(above))
        if comment:
            entry.comments.append(comment)
        entries.append(entry)
        column, above = (len(code) if comment else -1), []
    return entries


def page(entries: list[Entry]) -> str:
    """The page. entries: as `read` gives them."""
    by_path = {entry.path: entry for entry in entries}
    parts = [INTRODUCTION]
    for section in (entry for entry in entries if entry.is_section):
        keys = [entry for entry in entries if entry.section == section.path and not entry.is_section]
        if not keys:
            continue
        rows = []
        for key in keys:
            explained = by_path[_reference(key) or key.path]
            rows.append((f"`{key.name}`", _type(explained), _default(key), _explanation(key, explained)))
        further = sorted(KEYS.get(section.path, frozenset()) - set(section.default))
        rows += [(f"`{name}`", "", "", WITHOUT_DEFAULT[name]) for name in further]
        prose = "".join(f"{text}\n\n" for text in section.comments)
        parts.append(f"## `{section.path}`\n\n{prose}{_table(('key', 'type', 'default', 'meaning'), rows)}")
    unread = _table(("keys", "fine", "other values are", "because"), _unread_rows())
    return "\n".join([*parts, ALIGNER, _table(("key", "becomes"), _translated_rows()), UNREAD_KEYS, unread])


def _without_comment(line: str) -> tuple[str, str | None]:
    """The line up to its comment, with the spaces before it, and the comment."""
    quoted = re.sub(r'"[^"]*"', lambda text: "x" * len(text[0]), line)
    found = re.search(r"(?:^|(?<=\s))#", quoted)
    return (line, None) if found is None else (line[: found.start()], line[found.start() :].strip("# ") or None)


def _value(defaults: Any, names: list[str]) -> Any:
    for name in names:
        defaults = defaults[name]
    return defaults


def _type(key: Entry) -> str:
    hint = _hint(key)
    options = set(get_args(hint)) if not isinstance(hint, type) and get_origin(hint) is not tuple else {hint}
    (lists,) = [option for option in options if get_origin(option) is tuple] or [None]
    if lists is not None:
        item = _TYPES_FOR_PEOPLE[get_args(lists)[0]]
        words = f"list of {item}s"
        if not isinstance(key.default, list) and type(None) not in options:
            words = f"{item} or {words}"
    elif options >= {int, float}:
        words = "whole number or fraction"
    else:
        words = " or ".join(_TYPES_FOR_PEOPLE[option] for option in options if option in _TYPES_FOR_PEOPLE)
    return f"{words} or null" if key.default is None and key.path not in _TO_BE_GIVEN else words


def _hint(key: Entry) -> Any:
    """The annotation in the schema; of a key that is not there, the type of its default, or text."""
    if key.section == "model" and key.name.startswith("activations_checkpoint_"):
        return get_type_hints(schema.RecomputeConfig)[key.name.removeprefix("activations_checkpoint_")]
    for schema_type in _SECTION_TYPES.get(key.section, ()):
        hints = get_type_hints(schema_type)
        if hint := hints.get(_OTHER_NAMES.get(key.name, key.name)):
            return hint
    return str if key.default is None else type(key.default)


def _default(key: Entry) -> str:
    if key.path in _TO_BE_GIVEN:
        return "to be given"
    if _reference(key):
        return f"the same as `{_reference(key)}`"
    is_plain = isinstance(key.default, str) and key.default.isprintable()
    return f"`{key.default if is_plain else json.dumps(key.default)}`"


def _explanation(key: Entry, explained: Entry) -> str:
    return ". ".join(key.comments or explained.comments).replace("$", "\\$")


def _reference(key: Entry) -> str | None:
    """The key whose value an interpolation takes."""
    found = re.fullmatch(r"\$\{([\w.]+)\}", str(key.default))
    return found[1] if found else None


def _translated_rows() -> Iterator[tuple[str, str]]:
    for key, target in TRANSLATED.items():
        yield f"`{key}`", f"`{target}`" + (", where that is null" if key == "trainer.max_time" else "")
    for dataset in ("train_ds", "validation_ds"):
        yield (
            f"`model.data.{dataset}.truncation_field`",
            f"`model.data.{dataset}.overlong: truncate` as well, where that is null and `model.data.chat` is not true",
        )


def _unread_rows() -> Iterator[tuple[str, ...]]:
    """Keys for which the same is so share a row."""
    groups: dict[tuple[str, str, str], list[str]] = {}
    for key, unread in UNREAD.items():
        groups.setdefault((unread.agrees.words, unread.refused.words, unread.reason), []).append(f"`{key}`")
    for words, keys in groups.items():
        yield ", ".join(keys), *words


def _table(titles: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [titles, ("---",) * len(titles), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


if __name__ == "__main__":
    PAGE.write_text(page(read((config_dir() / "gpt_spin.yaml").read_text(encoding="utf-8"))), encoding="utf-8")
